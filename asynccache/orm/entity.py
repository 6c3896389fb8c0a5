"""What one mapped class caches in one database: the slots of its rows, and what lies in them; built once per mapper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Dialect, Table
from sqlalchemy.exc import MissingGreenlet, StatementError
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.attributes import instance_state

from asynccache.backends.base import Key
from asynccache.errors import NotCacheableError
from asynccache.orm.cacheable import bypass_of, check_cacheable
from asynccache.orm.codec import wires_of
from asynccache.orm.hydrate import IdentityKey, refresh
from asynccache.orm.keys import PrimaryKey, by_what_is_sent
from asynccache.orm.registry import (
    Hierarchy,
    Model,
    Models,
    TableName,
    UniqueKey,
    mapper_of,
    name_of,
    root_of,
    subclasses_of,
)
from asynccache.orm.relationships import Eager, eager_relationships
from asynccache.orm.rows import SCHEMA_BYTES, RowFormat, UnusableRecordError
from asynccache.orm.slots import HierarchySlots, KeySlots
from asynccache.orm.wire import DecodeError
from asynccache.protocol import Slot
from asynccache.settings import Policy


class Entity:
    """One mapped class in one database.

    row: the slot of a row, by its primary key as Python code has it; None if it has none.
    bypass: why no row of it is read from the cache, or None.
    eager: what a get has to bring along with the rows of those classes that have eager relationships.
    """

    def __init__(self, scope: Scope, mapper: Mapper[Any], policy: Policy, hierarchy: Hierarchy) -> None:
        self.model: Model = mapper.class_
        self.mapper = mapper
        self.policy = policy
        self.is_root = root_of(mapper) is mapper
        self.scope = scope
        self.hierarchy = hierarchy
        self.slots = slots = scope.slots_of(hierarchy)
        self.row = by_what_is_sent([column.type for column in mapper.primary_key], scope.dialect, slots.row)
        self._identity_class = _identity_class(mapper)
        self._formats: dict[Model, list[RowFormat]] = {}
        self._formats_by_schema = slots.formats[self._identity_class]
        self.eager: dict[Model, Eager] = {}
        self.bypass = bypass_of(mapper, scope.models) or self._take_eager()
        if self.bypass is None:
            for each in subclasses_of(mapper):
                if _identity_class(each) is not self._identity_class:
                    continue  # nothing in the row tells its class, and a get of this one gives no other
                for asked in each.iterate_to_root():
                    self._add_format(each, asked)
                    if asked is mapper:
                        break
            if not self._formats_of(self.model):
                self.bypass = "column type"

    def identity_key(self, primary_key: PrimaryKey) -> IdentityKey:
        return (self._identity_class, primary_key, None)

    def encode(self, instance: object, identity_key: IdentityKey) -> bytes | None:
        """The record of a row that was just loaded; None if it must not be stored."""
        state = instance_state(instance)
        # The database may have found it under another key than was asked for.
        if state.key != identity_key:
            return None
        return next(filter(None, (each.encode(instance) for each in self._formats_of(type(instance)))), None)

    def hydrate(
        self, session: Session, identity_key: IdentityKey, record: bytes, expired: object | None = None
    ) -> object | None:
        """Put the row into the session; None if it is of another class.

        expired: what the identity map holds under the key, to be refreshed; None if it holds nothing.
        Raises UnusableRecordError.
        """
        row_format, values = self._decoded(record)
        if expired is not None:
            if row_format.not_loaded:
                raise UnusableRecordError(f"not all that a refresh of {self.model.__qualname__} loads")
            if row_format.model is not type(expired) or not isinstance(expired, self.model):
                return None
        elif row_format.asked is not self.model and not issubclass(row_format.asked, self.model):
            if issubclass(row_format.model, self.model):
                raise UnusableRecordError(f"a row of {self.model.__qualname__} without its own columns")
            return None
        try:
            if expired is not None:
                return refresh(session, expired, row_format.keys, values)
            return row_format.hydrate(session, identity_key, values)
        except (MissingGreenlet, StatementError) as error:
            if isinstance(error, StatementError) and not isinstance(error.orig, MissingGreenlet):
                raise
            # A listener of the application's wants more than the row, for which a hit has no greenlet.
            self.bypass = "load listener"
            if expired is None:
                session.expunge(session.identity_map[identity_key])
            raise UnusableRecordError(f"a row of {self.model.__qualname__} whose listener executes SQL") from error

    def _decoded(self, record: bytes) -> tuple[RowFormat, tuple[Any, ...]]:
        row_format = self._formats_by_schema.get(record[:SCHEMA_BYTES])
        if row_format is None:
            raise UnusableRecordError(f"a row of {self.model.__qualname__} that was stored with other columns")
        try:
            return row_format, row_format.codec.decode(record[SCHEMA_BYTES:])
        except DecodeError as error:
            raise UnusableRecordError(f"a damaged row of {self.model.__qualname__}") from error

    def has(self, record: bytes, values: Mapping[str, Any]) -> bool:
        """Whether these attributes of a row have these values. Raises UnusableRecordError."""
        row_format, stored = self._decoded(record)
        found = dict(zip(row_format.keys, stored, strict=True))
        return all(name in found and found[name] == value for name, value in values.items())

    def is_whole(self, instance: object) -> bool:
        """Whether an instance has all that a SELECT of the model would load into it, and a hit would bring."""
        state = instance_state(instance)
        row_format = self.scope.format_of(state.mapper, self.mapper)
        return row_format is None or state.dict.keys() >= set(row_format.keys)

    def has_all_of(self, table: TableName) -> bool:
        """Whether a SELECT of the model finds all rows of this table."""
        local = self.mapper.local_table
        return isinstance(local, Table) and name_of(local) == table and not self.mapper.single

    def why_not_by(self, key: UniqueKey) -> str | None:
        """Why no row is looked for by this key in the cache, or None."""
        if any(each.concrete for each in self.mapper.self_and_descendants):
            return "secondary key of concrete classes"
        if any(not set(key.attributes).issubset(each.keys) for each in self._formats_of(self.model)):
            return "secondary key of a column that is not stored"
        return None

    def slots_of(self, primary_key: PrimaryKey, values: Mapping[str, Any]) -> list[Slot] | None:
        """The slots that tell of a row: its own, and those of its secondary keys; None if they are not all known.

        values: of the attributes of its secondary keys.
        """
        slots = [self.row(primary_key)]
        for key in self.scope.models.unique_keys_into(self.hierarchy):
            if not values.keys() >= set(key.attributes):
                return None
            of_key = [values[name] for name in key.attributes]
            if None not in of_key:
                slots.append(self.scope.key_slots(self.hierarchy, key).asked(of_key))
        known = [slot for slot in slots if slot is not None]
        return known if len(known) == len(slots) else None

    def differences(self, record: bytes, instance: object) -> tuple[str, ...]:
        """The attributes in which a record differs from a row that was just loaded, as far as they can be compared."""
        ours = self._formats_by_schema.get(record[:SCHEMA_BYTES])
        if ours is None or not issubclass(ours.asked, self.model):
            return ()
        for each in self._formats_of(type(instance)):
            loaded = each.encode(instance)
            if loaded is not None and loaded != record:
                try:
                    stored = dict(zip(ours.keys, wires_of(record[SCHEMA_BYTES:]), strict=True))
                except (DecodeError, ValueError):
                    return ()
                wires = zip(each.keys, wires_of(loaded[SCHEMA_BYTES:]), strict=True)
                return tuple(name for name, wire in wires if name not in stored or stored[name] != wire)
        return ()

    def knows_schema(self, record: bytes) -> bool:
        """Whether a row was stored with columns that a model has here, as far as such rows were asked for."""
        return record[:SCHEMA_BYTES] in self._formats_by_schema

    def stored_values(self, record: bytes) -> Mapping[str, Any]:
        """What a record holds, by attributes, without the application's own code: where that would make the value, what
        it would be made from. So what is encrypted stays encrypted.

        Raises UnusableRecordError.
        """
        row_format = self._formats_by_schema.get(record[:SCHEMA_BYTES])
        if row_format is None:
            raise UnusableRecordError(f"a row of {self.model.__qualname__} that was stored with other columns")
        try:
            return dict(zip(row_format.keys, row_format.codec.show(record[SCHEMA_BYTES:]), strict=True))
        except DecodeError as error:
            raise UnusableRecordError(f"a damaged row of {self.model.__qualname__}") from error

    def _take_eager(self) -> str | None:
        for each in subclasses_of(self.mapper):
            eager = eager_relationships(each, self.mapper, self.scope.models.caches)
            if eager is None:
                return "eager relationship"
            if eager.parents or eager.selected:
                self.eager[each.class_] = eager
        return None

    def _formats_of(self, model: Model) -> list[RowFormat]:
        """How rows of a class are stored that a get of this one has loaded: with all columns or, if it does not load
        them all, with those that it loads."""
        if model not in self._formats:  # mapped later than this one was met
            mapper = mapper_of(model)
            if mapper is not None:
                self._add_format(mapper, mapper)
                self._add_format(mapper, self.mapper)
        return self._formats.setdefault(model, [])

    def _add_format(self, mapper: Mapper[Any], asked: Mapper[Any]) -> None:
        row_format = self.scope.format_of(mapper, asked)
        if row_format is None:
            return
        self._formats_by_schema[row_format.schema] = row_format
        known = self._formats.setdefault(mapper.class_, [])
        if asked in (mapper, self.mapper) and row_format not in known:
            known.append(row_format)


def _identity_class(mapper: Mapper[Any]) -> Model:
    """The class by which a session's identity map knows the rows of a class."""
    identity_class: Model = mapper.identity_key_from_primary_key((None,) * len(mapper.primary_key))[0]
    return identity_class


def standard_schema(dialect: Dialect) -> str:
    """Where tables are that name no schema, unless somebody has set up something else."""
    return {"postgresql": "public", "sqlite": "main"}.get(dialect.name, "")


class _Entities(dict[Model, "Entity | None"]):
    """Made when they are first asked for."""

    def __init__(self, make: Callable[[Model], Entity | None]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, model: Model) -> Entity | None:
        entity = self[model] = self._make(model)
        return entity


class Scope:
    """One database, as one cache sees it: the entities that live there, and their keys.

    name: of the database, without its host, since a primary and its replicas share slots.
    default_schema: where tables are that name none.
    """

    def __init__(
        self,
        models: Models,
        dialect: Dialect,
        *,
        name: str,
        namespace: str,
        default_schema: str,
        schema_translate_map: Mapping[str | None, str | None],
        buckets: int,
    ) -> None:
        self.models = models
        self.dialect = dialect
        self.name = name
        self.namespace = namespace
        self.default_schema = default_schema
        self.schema_translate_map = schema_translate_map
        self.buckets = buckets
        self._entities = _Entities(self._make_entity)
        self.entity: Callable[[Model], Entity | None] = self._entities.__getitem__
        """The entity of a mapped class, or None if it is not cached. Each get asks for it."""
        self._slots: dict[Hierarchy, HierarchySlots] = {}
        self._key_slots: dict[object, KeySlots] = {}
        self._roots: dict[Key, Model] = {}
        self._formats: dict[tuple[Model, Model], RowFormat | None] = {}

    def schema_of(self, schema: str | None) -> str:
        """Where the tables of a schema really are, by one name: "" is the database's standard schema, whether it is
        spelled out or not."""
        schema = self.schema_translate_map.get(schema, schema) or self.default_schema
        return "" if schema == standard_schema(self.dialect) else schema

    def forget(self) -> None:
        """What is registered has changed."""
        self._entities.clear()
        self._formats.clear()

    def _make_entity(self, model: Model) -> Entity | None:
        mapper = mapper_of(model)
        policy = self.models.policy_of(model) if mapper is not None else None
        if mapper is None or policy is None:
            return None
        try:
            check_cacheable(mapper, policy, self.models.codecs)
        except NotCacheableError as error:
            self.models.warn_once(model, str(error))
            return None
        hierarchy = Hierarchy.of(mapper)
        assert hierarchy is not None, "checked above"
        return Entity(self, mapper, policy, hierarchy)

    def slots_of(self, hierarchy: Hierarchy) -> HierarchySlots:
        slots = self._slots.get(hierarchy)
        if slots is None:
            names = [self.namespace, self.name]
            for schema, table in hierarchy.tables:
                names += [self.schema_of(schema), table]
            slots = self._slots[hierarchy] = HierarchySlots(hierarchy, names, self.dialect, self.buckets)
            self._roots |= dict.fromkeys([generation.key for generation in slots.generations], hierarchy.model)
        return slots

    def key_slots(self, hierarchy: Hierarchy, key: UniqueKey) -> KeySlots:
        name = (hierarchy, key, key.columns_mapped)
        slots = self._key_slots.get(name)
        if slots is None:
            rows = self.slots_of(hierarchy)
            slots = self._key_slots[name] = KeySlots(rows, hierarchy, key, self.dialect, self.models.codecs)
        return slots

    def model_of(self, slot: Slot) -> Model | None:
        """The class at the root of the hierarchy that a slot is of; None if it is not of this database."""
        return self._roots.get(slot.generation)

    def format_of(self, mapper: Mapper[Any], asked: Mapper[Any]) -> RowFormat | None:
        """How rows of a class are stored as a get of another class has loaded them, or None if they are not."""
        key = (mapper.class_, asked.class_)
        if key not in self._formats:
            self._formats[key] = self._make_format(mapper, asked)
        return self._formats[key]

    def _make_format(self, mapper: Mapper[Any], asked: Mapper[Any]) -> RowFormat | None:
        policy = self.models.policy_of(mapper.class_)
        if policy is None:
            return None
        try:
            made = RowFormat.of(mapper, asked, policy, self.models.codecs, self.dialect)
        except NotCacheableError as error:
            self.models.warn_once(mapper.class_, str(error))
            return None
        # Where nothing is left to be loaded later, it is the usual one.
        return made if made.not_loaded or asked is mapper else self.format_of(mapper, mapper)
