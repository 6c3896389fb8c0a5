"""Which mapped classes are cached, how and for how long, and which cached hierarchies of rows a table belongs to."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, ColumnElement, FromClause, Join, Table, inspect
from sqlalchemy.orm import Mapper, registry
from sqlalchemy.orm.exc import UnmappedClassError
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression
from sqlalchemy.types import TypeEngine

from asynccache.errors import AsyncCacheWarning, ConfigurationError
from asynccache.orm.forms import TypeCodec
from asynccache.orm.statements import conjuncts
from asynccache.settings import Policy

Model = type[Any]
TableName = tuple[str | None, str]
"""A table's schema, not translated, and its name. A table is known by these: two models may map one table by two
`Table` objects."""
KeyNames = tuple[str, ...] | None
"""The columns of a table that hold a hierarchy's primary key, in its order; None if it does not have them all."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Rows that have one primary key among them: those of a root table, however many classes are mapped to it; or those
    of one class that is mapped to a join of tables.

    tables: the root table, or those that are joined.
    distinction: what tells it from the rows of the same table by its own primary key; "" for these.
    columns: the primary key, as one of the mapped tables has it.
    model: a class at the root, by which people know it.
    """

    tables: tuple[TableName, ...]
    distinction: str
    columns: tuple[ColumnElement[Any], ...] = field(compare=False, repr=False)
    model: Model = field(compare=False, repr=False)

    @classmethod
    def of(cls, mapper: Mapper[Any]) -> Hierarchy | None:
        """The hierarchy of a class, or None if it is mapped to something else than tables."""
        root = root_of(mapper)
        tables = tables_of(root.local_table)
        if not tables:
            return None
        first, *others = tables
        distinction = ""
        if others:  # which rows a join has, its class alone knows
            distinction = f"{root.class_.__module__}.{root.class_.__qualname__}"
        elif [column.name for column in root.primary_key] != [column.name for column in first.primary_key]:
            distinction = repr(tuple(column.name for column in root.primary_key))
        return cls(tuple(map(name_of, tables)), distinction, tuple(root.primary_key), root.class_)


def root_of(mapper: Mapper[Any]) -> Mapper[Any]:
    """The uppermost class whose rows are in the same table: with concrete inheritance each class has one of its own."""
    while mapper.inherits is not None and not mapper.concrete:
        mapper = mapper.inherits
    return mapper


def subclasses_of(mapper: Mapper[Any]) -> Iterator[Mapper[Any]]:
    """A class, and its subclasses with rows in the same hierarchy."""
    root = root_of(mapper)
    return (each for each in mapper.self_and_descendants if root_of(each) is root)


def tables_of(selectable: FromClause) -> tuple[Table, ...]:
    """A table, or those that are joined, each once; none if it is something else."""
    if isinstance(selectable, Table):
        return (selectable,)
    if not isinstance(selectable, Join):
        return ()
    left, right = tables_of(selectable.left), tables_of(selectable.right)
    return (*left, *right) if left and right and not {*left} & {*right} else ()


def conditions_of(selectable: FromClause) -> Iterator[ColumnElement[Any]]:
    """The conditions of a join that all its rows meet, or have nothing to do with."""
    if isinstance(selectable, Join):
        yield from conditions_of(selectable.left)
        yield from conditions_of(selectable.right)
        if selectable.onclause is not None:
            yield from conjuncts(selectable.onclause)


@dataclass(frozen=True, slots=True)
class UniqueKey:
    """A secondary key: columns of one table of a hierarchy, in which no two of its rows have the same values.

    columns: their names, in alphabetical order: two models that have one table have its keys in common, too.
    attributes: a model's names for them.
    columns_mapped: the same, as that model has them.
    """

    table: TableName
    columns: tuple[str, ...]
    attributes: tuple[str, ...] = field(compare=False)
    columns_mapped: tuple[Column[Any], ...] = field(compare=False, repr=False)


def name_of(table: Table) -> TableName:
    return table.schema, table.name


def _key_names(mapper: Mapper[Any], table: Table) -> KeyNames:
    """The columns of one of a class's tables that equal its hierarchy's primary key."""
    equal: list[tuple[ColumnElement[Any], ColumnElement[Any]]] = []
    for each in mapper.iterate_to_root():
        equal += [
            (condition.left, condition.right)
            for condition in (*conjuncts(each.inherit_condition), *conditions_of(each.local_table))
            if isinstance(condition, BinaryExpression) and condition.operator is operators.eq
        ]
    names = []
    for column in root_of(mapper).primary_key:
        same = {column}
        while more := {b for pair in equal for a, b in (pair, pair[::-1]) if a in same and b not in same}:
            same |= more
        found = [
            each.name
            for each in same
            if isinstance(each, Column) and isinstance(each.table, Table) and name_of(each.table) == name_of(table)
        ]
        if not found:
            return None
        names.append(found[0])
    return tuple(names)


class Models:
    """What was registered, and what was excluded. The nearest class in the method resolution order decides."""

    def __init__(self) -> None:
        self.codecs: dict[type[TypeEngine[Any]], TypeCodec] = {}
        self._policies: dict[Model, Policy | None] = {}
        self._registries: dict[registry, Policy] = {}
        self._unique: dict[Model, Sequence[UniqueKey]] = {}
        self._keys: Mapping[TableName, Sequence[tuple[Hierarchy, UniqueKey]]] = {}
        self._mapped_in: set[registry] = set()
        self._warned: set[Model] = set()
        self._mapped_count = -1
        self._held: frozenset[Mapper[Any]] = frozenset()
        self._hierarchies: Mapping[TableName, Mapping[Hierarchy, KeyNames]] = {}

    def add(self, target: Model | registry, policy: Policy, unique: Sequence[UniqueKey] = ()) -> None:
        """Cache this class and its subclasses, or all that is mapped by this registry.

        unique: secondary keys of the class.
        Raises ConfigurationError if it is neither a mapped class, nor a declarative base, nor a registry.
        """
        if isinstance(target, registry):
            self._registries[target] = policy
            self._mapped_in.add(target)
        else:
            self._mapped_in.add(registry_of(target))
            self._policies[target] = policy
            self._set_unique(target, unique)
        self._mapped_count = -1

    def exclude(self, target: Model) -> None:
        """Do not cache this class and its subclasses. Raises as `add`."""
        self._mapped_in.add(registry_of(target))
        self._policies[target] = None
        self._set_unique(target, ())
        self._mapped_count = -1

    def _set_unique(self, model: Model, keys: Sequence[UniqueKey]) -> None:
        self._unique[model] = keys
        # Models that know the rows of one table by different primary keys have slots of their own, and those that map
        # its columns by different types have them named by what each sends.
        by_table: defaultdict[TableName, dict[object, tuple[Hierarchy, UniqueKey]]] = defaultdict(dict)
        for each, its_keys in self._unique.items():
            mapper = mapper_of(each)
            hierarchy = Hierarchy.of(mapper) if mapper is not None else None
            if hierarchy is not None:
                for key in its_keys:
                    by_table[key.table][hierarchy, key, key.columns_mapped] = hierarchy, key
        self._keys = {table: list(found.values()) for table, found in by_table.items()}

    def unique_key(self, model: Model, attributes: Collection[str]) -> UniqueKey:
        """The secondary key of these attributes, that this class was registered with, or a base of it.

        Raises ConfigurationError if there is none.
        """
        keys = [key for each in model.__mro__ for key in self._unique.get(each, ())]
        for key in keys:
            if set(key.attributes) == set(attributes):
                return key
        asked, name = " + ".join(attributes) or "nothing", model.__qualname__
        known = ", ".join([" + ".join(key.attributes) for key in keys])
        raise ConfigurationError(
            f"{name} has no secondary key of {asked}; "
            + (f"it has {known}" if keys else f"name it at registration: cache.register({name}, unique=[...])")
        )

    def unique_keys_in(self, table: TableName) -> Sequence[tuple[Hierarchy, UniqueKey]]:
        """The secondary keys in the columns of a table, each with the hierarchy whose rows they are of."""
        return self._keys.get(table, ())

    def unique_keys_into(self, hierarchy: Hierarchy) -> Sequence[UniqueKey]:
        """All secondary keys of the rows of a hierarchy, whichever class they were registered with."""
        return [key for found in self._keys.values() for each, key in found if each == hierarchy]

    def policy_of(self, model: Model) -> Policy | None:
        """How this class is cached, or None if it is not."""
        for each in model.__mro__:
            if each in self._policies:
                return self._policies[each]
        mapper = mapper_of(model)
        return self._registries.get(mapper.registry) if mapper is not None else None

    def caches(self, model: object) -> bool:
        return isinstance(model, type) and self.policy_of(model) is not None

    def warn_once(self, model: Model, message: str) -> None:
        """Say, once for each class, that it is not cached although a base of it was registered."""
        if model not in self._warned:
            self._warned.add(model)
            warnings.warn(message, AsyncCacheWarning, stacklevel=2)

    @property
    def ttl_max_s(self) -> float:
        """The longest that anything registered is served, be it that there is no such row."""
        policies = [*self._policies.values(), *self._registries.values()]
        return max((max(policy.ttl_s, policy.negative_ttl_s) for policy in policies if policy is not None), default=0.0)

    def mappers(self) -> Iterator[Mapper[Any]]:
        """The mappers of all classes that are cached, as far as they are mapped by now."""
        return (mapper for mapper in self._mapped() if self.policy_of(mapper.class_) is not None)

    def hierarchies(self) -> Mapping[TableName, Mapping[Hierarchy, KeyNames]]:
        """The cached hierarchies that have rows in each table, and the columns by which the table knows these rows.
        Made anew when classes were mapped meanwhile."""
        # Asked in every transaction, so they are counted. A registry loses no class whose mapper is held here, so that
        # as many are the same.
        count = sum([len(each._managers) for each in self._mapped_in])
        if count != self._mapped_count:
            found: defaultdict[TableName, dict[Hierarchy, KeyNames]] = defaultdict(dict)
            mapped = self._mapped()
            for mapper in mapped:
                hierarchy = Hierarchy.of(mapper)
                if hierarchy is not None and self.policy_of(mapper.class_) is not None:
                    for each in subclasses_of(root_of(mapper)):
                        for table in each.tables:
                            if isinstance(table, Table):
                                known = found[name_of(table)]
                                known[hierarchy] = known.get(hierarchy) or _key_names(each, table)
            self._hierarchies = dict(found)
            # One that is declared (AbstractConcreteBase) may be mapped later: until then all are looked at each time.
            self._mapped_count, self._held = count if len(mapped) == count else -1, mapped
        return self._hierarchies

    def _mapped(self) -> frozenset[Mapper[Any]]:
        return frozenset(
            manager.mapper for each in self._mapped_in for manager in list(each._managers) if manager.is_mapped
        )


def mapper_of(model: object) -> Mapper[Any] | None:
    """The mapper of a class, or None if it is not mapped."""
    if not isinstance(model, type):
        return None
    try:
        mapper: object = inspect(model, raiseerr=False)
    except UnmappedClassError:
        return None
    return mapper if isinstance(mapper, Mapper) else None


def registry_of(model: object) -> registry:
    """The registry of a mapped class or declarative base. Raises ConfigurationError if it is neither."""
    mapper = mapper_of(model)
    # SQLModel has it by the name alone that SQLAlchemy gives it in declarative classes.
    declared = getattr(model, "registry", None) or getattr(model, "_sa_registry", None)
    found = mapper.registry if mapper is not None else declared
    if not (isinstance(model, type) and isinstance(found, registry)):
        raise ConfigurationError(
            f"{model!r} is not a mapped class; register a mapped class, a declarative base or a registry"
        )
    return found
