"""What one mapped class caches in one database: its keys, its columns, their bytes; built once per mapper."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import CHAR, Column, ColumnElement, Dialect, String, Table, Uuid
from sqlalchemy.dialects.postgresql import CITEXT
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import ColumnProperty, Mapper, Session
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.sql import elements, visitors
from sqlalchemy.types import TypeDecorator, TypeEngine

from asynccache.backends.base import Key
from asynccache.errors import NotCacheableError
from asynccache.orm.codec import Codec, DecodeError, EncodeError, UncacheableTypeError, check_type, compile_codec
from asynccache.orm.hydrate import Hydrate, IdentityKey, compile_hydrate, refresh
from asynccache.orm.registry import Hierarchy, Model, Models, mapper_of
from asynccache.orm.relationships import Eager, eager_relationships
from asynccache.protocol import Slot
from asynccache.settings import Policy

SCHEMA_BYTES = 8
"""A row's bytes begin with a fingerprint of the columns that were stored, so that two versions of an application that
share a cache never read each other's rows. It is in the value and not in the key: while both run, each must invalidate
what the other reads."""

_PLAIN = re.compile(r"[A-Za-z0-9_./-]*")
"""What is put into a key as it is. Anything else is hashed: a user may choose it."""

_PREFIX_BYTES_MAX = _NAME_BYTES_MAX = 100
"""Longer parts of keys are hashed. memcached takes 250 bytes in all."""

PrimaryKey = tuple[Any, ...]


# --------------------------------------------------------------------------------------------------------------- keys


def _hash(text: bytes) -> str:
    return "~" + blake2b(text, digest_size=16).hexdigest()


def _plain_or_hash(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else _hash(text.encode())


def _short_or_hash(text: str, bytes_max: int) -> str:
    return text if len(text) <= bytes_max else _hash(text.encode())


class _KeyForm(NamedTuple):
    """One primary key column's part of `_SOURCE`, as Python: whether the value `{v}` is exactly of the column's type,
    and its text in keys."""

    is_exact: str
    text: str


_KEY_FORMS: Mapping[type, _KeyForm] = {
    int: _KeyForm("type({v}) is int", "{v}"),
    str: _KeyForm("type({v}) is str", "plain_or_hash({v})"),
    UUID: _KeyForm("isinstance({v}, UUID)", "{v}.hex"),  # drivers have subclasses of their own
    bytes: _KeyForm("type({v}) is bytes", "hash_bytes({v})"),
}
"""By the type of a column's values. One that is not exactly of that type has no key, since the database may take it for
another (1 for True, "1" for 1) in ways that differ from Python's."""

RowSlot = Callable[[Sequence[Any]], Slot | None]
"""A primary key -> the slot of its row; None if a value is not exactly of its column's type."""


def _compile_row_slot(forms: Sequence[_KeyForm], prefix: str, generations: Sequence[Key]) -> RowSlot:
    """Generate the function that names slots, which every hit calls. For two columns, an int and a str, it is

        def row_slot(primary_key):
            if len(primary_key) != 2:
                return None
            v0, v1, = primary_key
            if not (type(v0) is int and type(v1) is str):
                return None
            name = f"{v0},{plain_or_hash(v1)}"
            if len(name) > name_bytes_max:
                name = short_or_hash(name, name_bytes_max)
            name = name.encode()
            generation = generations[crc32(name) % buckets]
            return Slot(Key(prefix + name, generation.route), generation)

    with the two tuples made directly, which takes half the time. No name or value of the user's is in its source.
    """
    values = [f"v{i}" for i in range(len(forms))]
    source = _SOURCE.format(
        count=len(forms),
        values="".join(f"{v}, " for v in values),
        are_exact=" and ".join(form.is_exact.format(v=v) for form, v in zip(forms, values, strict=True)),
        name=",".join("{" + form.text.format(v=v) + "}" for form, v in zip(forms, values, strict=True)),
    )
    scope: dict[str, Any] = {
        "UUID": UUID,
        "plain_or_hash": _plain_or_hash,
        "hash_bytes": _hash,
        "short_or_hash": _short_or_hash,
        "name_bytes_max": _NAME_BYTES_MAX,
        "crc32": zlib.crc32,
        "buckets": len(generations),
        "generations": generations,
        "prefix": prefix.encode() + b":",
        "new": tuple.__new__,
        "Slot": Slot,
        "Key": Key,
    }
    exec(source, scope)  # noqa: S102 (positions alone, as said above)
    row_slot: RowSlot = scope["row_slot"]
    return row_slot


_SOURCE = """
def row_slot(primary_key):
    if len(primary_key) != {count}:
        return None
    {values} = primary_key
    if not ({are_exact}):
        return None
    name = f"{name}"
    if len(name) > name_bytes_max:
        name = short_or_hash(name, name_bytes_max)
    name = name.encode()
    generation = generations[crc32(name) % buckets]
    return new(Slot, (new(Key, (prefix + name, generation.route)), generation))
"""


def _key_form(column: ColumnElement[Any]) -> _KeyForm:
    """How values of this primary key column become text. Raises UncacheableTypeError."""
    type_ = column.type
    if isinstance(type_, TypeDecorator):
        raise UncacheableTypeError(f"{type(type_).__name__} as a primary key is not supported")
    if (
        isinstance(type_, (CHAR, CITEXT))
        or (isinstance(type_, String) and type_.collation is not None)
        or (isinstance(type_, Uuid) and not type_.as_uuid)
    ):
        raise UncacheableTypeError("values that differ may be equal to the database: padding, case or collation")
    try:
        return _KEY_FORMS[type_.python_type]
    except (NotImplementedError, KeyError):
        raise UncacheableTypeError(f"{type_!r} as a primary key is not supported") from None


def check_cacheable(mapper: Mapper[Any]) -> None:
    """Say at registration what can never be cached.

    Looks at columns only: asking for attributes would configure all mappers, too early for an application that is
    still defining them. Raises NotCacheableError naming model, column and reason.
    """
    name = mapper.class_.__qualname__
    if not isinstance(mapper.base_mapper.local_table, Table):
        raise NotCacheableError(
            f"{name} cannot be cached: it is mapped to {mapper.base_mapper.local_table!r}, not a table"
        )
    if any(each.concrete for each in mapper.base_mapper.self_and_descendants):
        raise NotCacheableError(f"{name} cannot be cached: its hierarchy has concrete table inheritance")
    for column in mapper.columns:
        try:
            if column in mapper.primary_key:
                _key_form(column)
            check_type(column.type, None)
        except UncacheableTypeError as error:
            raise NotCacheableError(f"{name}.{column.key} cannot be cached: {error}. Exclude the model") from error


# --------------------------------------------------------------------------------------------------------------- rows


def primary_key_of(mapper: Mapper[Any], ident: Any) -> PrimaryKey:
    """What was given to `get()` as a tuple in the order of the primary key's columns.

    ident: a value, a tuple or list of values, or a dict by attribute names.
    Raises sqlalchemy.exc.InvalidRequestError, in SQLAlchemy's own words, if values are missing or too many.
    """
    if isinstance(ident, dict):
        names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        synonyms = mapper.synonyms
        ident = {synonyms[name].name if name in synonyms else name: value for name, value in ident.items()}
        if not all(name in ident for name in names):
            raise InvalidRequestError(
                "Incorrect names of values in identifier to formulate primary key for session.get(); "
                f"primary key attribute names are {','.join(map(repr, names))} (synonym names are also accepted)"
            )
        return tuple(ident[name] for name in names)
    values = tuple(ident) if isinstance(ident, (tuple, list)) else (ident,)
    if len(values) != len(mapper.primary_key):
        raise InvalidRequestError(
            "Incorrect number of values in identifier to formulate primary key for session.get(); "
            f"primary key columns are {','.join(repr(str(column)) for column in mapper.primary_key)}"
        )
    return values


class UnusableRecordError(Exception):
    """A record that this process cannot read: damaged, foreign, or stored by another version of the application."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of one class become bytes and instances."""

    schema: bytes
    model: Model
    keys: tuple[str, ...]
    codec: Codec
    hydrate: Hydrate

    @classmethod
    def of(cls, mapper: Mapper[Any], dialect: Dialect) -> RowFormat:
        """Raises UncacheableTypeError for a type that cannot make the round trip."""
        properties = [each for each in mapper.column_attrs if not each.deferred]
        keys = tuple(each.key for each in properties)
        types: list[TypeEngine[Any]] = [each.columns[0].type for each in properties]
        columns = [(each.key, str(each.columns[0]), repr(each.columns[0].type)) for each in properties]
        # Addresses of objects in the types' arguments would make each process's rows unreadable to the others.
        fingerprint = re.sub(r" at 0x[0-9a-f]+", "", repr((mapper.class_.__qualname__, columns))).encode()
        return cls(
            schema=blake2b(fingerprint, digest_size=SCHEMA_BYTES).digest(),
            model=mapper.class_,
            keys=keys,
            codec=compile_codec(types, dialect),
            hydrate=compile_hydrate(mapper, keys),
        )

    def encode(self, instance: object) -> bytes | None:
        """The row's bytes, or None if it is not just as the database has it, or not all there."""
        state = instance_state(instance)
        loaded = state.dict
        if state.modified:
            return None
        try:
            return self.schema + self.codec.encode(tuple([loaded[key] for key in self.keys]))
        except (KeyError, EncodeError):
            return None


class HierarchySlots:
    """The keys of one hierarchy's rows and generations in one database, and the formats of its rows."""

    def __init__(self, scope: Scope, hierarchy: Hierarchy) -> None:
        schema, table = hierarchy.table
        parts = [scope.namespace, scope.name, scope.schema_of(schema), table]
        if not hierarchy.is_table_key:
            parts.append(repr(hierarchy.primary_key))
        prefix = _short_or_hash(":".join(map(_plain_or_hash, parts)), _PREFIX_BYTES_MAX)
        route = zlib.crc32(table.encode())
        buckets = [Key(f"{prefix}#{bucket}".encode(), route + bucket) for bucket in range(scope.buckets)]
        self.generations = tuple(Slot(key, key) for key in buckets)
        self.formats: defaultdict[Model, dict[bytes, RowFormat]] = defaultdict(dict)
        """By identity class, since two that are mapped to one table read the same slots, and by fingerprint."""
        self.row: RowSlot
        """The slot of a row; None if a value is not exactly of its column's type."""
        try:
            self.row = _compile_row_slot([_key_form(column) for column in hierarchy.columns], prefix, buckets)
        except UncacheableTypeError:
            self.row = lambda _: None


class Entity:
    """One mapped class in one database.

    bypass: why no row of it is read from the cache, or None.
    eager: what a get has to bring along with the rows of those classes that have eager relationships.
    """

    def __init__(self, scope: Scope, mapper: Mapper[Any], policy: Policy, slots: HierarchySlots) -> None:
        self.model: Model = mapper.class_
        self.mapper = mapper
        self.policy = policy
        self.is_root = mapper.inherits is None
        self.scope = scope
        self.slots = slots
        nothing = (None,) * len(mapper.base_mapper.primary_key)
        self._identity_class = mapper.identity_key_from_primary_key(nothing)[0]
        self._formats: dict[Model, RowFormat | None] = {}
        self._formats_by_schema = slots.formats[self._identity_class]
        self.eager: dict[Model, Eager] = {}
        self.bypass = _bypass(mapper, scope.dialect) or self._take_eager()
        if self.bypass is None:
            for each in mapper.self_and_descendants:
                self._format_of(each.class_)
            if self._format_of(self.model) is None:
                self.bypass = "column type"

    def identity_key(self, primary_key: PrimaryKey) -> IdentityKey:
        return (self._identity_class, primary_key, None)

    def encode(self, instance: object, identity_key: IdentityKey) -> bytes | None:
        """The record of a row that was just loaded; None if it must not be stored."""
        state = instance_state(instance)
        # The database may have found it under another key than was asked for.
        if state.key != identity_key:
            return None
        row_format = self._format_of(type(instance))
        return row_format.encode(instance) if row_format is not None else None

    def hydrate(
        self, session: Session, identity_key: IdentityKey, record: bytes, expired: object | None = None
    ) -> object | None:
        """Put the row into the session; None if it is of another class.

        expired: what the identity map holds under the key, to be refreshed; None if it holds nothing.
        Raises UnusableRecordError.
        """
        row_format = self._formats_by_schema.get(record[:SCHEMA_BYTES])
        if row_format is None:
            raise UnusableRecordError(f"a row of {self.model.__qualname__} that was stored with other columns")
        try:
            values = row_format.codec.decode(record[SCHEMA_BYTES:])
        except DecodeError as error:
            raise UnusableRecordError(f"a damaged row of {self.model.__qualname__}") from error
        if expired is not None:
            return refresh(session, expired, row_format.keys, values) if row_format.model is type(expired) else None
        if row_format.model is not self.model and not issubclass(row_format.model, self.model):
            return None
        return row_format.hydrate(session, identity_key, values)

    def differences(self, record: bytes, instance: object) -> tuple[str, ...]:
        """The attributes in which a record differs from a row that was just loaded, as far as they can be compared."""
        ours = self._formats_by_schema.get(record[:SCHEMA_BYTES])
        row_format = self._format_of(type(instance))
        loaded = row_format.encode(instance) if row_format is not None else None
        if ours is None or row_format is None or loaded is None or loaded == record:
            return ()
        try:
            stored = dict(zip(ours.keys, ours.codec.decode(record[SCHEMA_BYTES:]), strict=True))
        except DecodeError:
            return ()
        values = zip(row_format.keys, row_format.codec.decode(loaded[SCHEMA_BYTES:]), strict=True)
        return tuple(name for name, value in values if name not in stored or stored[name] != value)

    def _take_eager(self) -> str | None:
        for each in self.mapper.self_and_descendants:
            eager = eager_relationships(each, self.scope.models.caches)
            if eager is None:
                return "eager relationship"
            if eager.parents or eager.selected:
                self.eager[each.class_] = eager
        return None

    def _format_of(self, model: Model) -> RowFormat | None:
        if model not in self._formats:
            self._formats[model] = row_format = self.scope.format_of(model)
            if row_format is not None:
                self._formats_by_schema[row_format.schema] = row_format
        return self._formats[model]


def _bypass(mapper: Mapper[Any], dialect: Dialect) -> str | None:
    if mapper.always_refresh:
        return "always_refresh"
    if dialect.name not in ("sqlite", "postgresql") and any(
        isinstance(column.type, String) for column in mapper.base_mapper.primary_key
    ):
        return "primary key collation"
    for each in mapper.self_and_descendants:
        if not all(_reads_own_row(each, attribute) for attribute in each.column_attrs if not attribute.deferred):
            return "column_property beyond its own row"
    return None


_PURE_EXPRESSIONS = (
    elements.BindParameter,
    elements.BinaryExpression,
    elements.UnaryExpression,
    elements.Grouping,
    elements.ClauseList,
    elements.ExpressionClauseList,
    elements.Label,
    elements.Cast,
    elements.TypeCoerce,
    elements.Case,
    elements.Null,
    elements.True_,
    elements.False_,
)


def _reads_own_row(mapper: Mapper[Any], attribute: ColumnProperty[Any]) -> bool:
    """Whether an attribute changes only when its own row does: a column, or an expression over the row's columns.
    A function may be volatile, and a subquery reads other rows."""
    return all(
        each.table in mapper.tables if isinstance(each, Column) else isinstance(each, _PURE_EXPRESSIONS)
        for each in visitors.iterate(attribute.columns[0])
    )


def standard_schema(dialect: Dialect) -> str:
    """Where tables are that name no schema, unless somebody has set up something else."""
    return {"postgresql": "public", "sqlite": "main"}.get(dialect.name, "")


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
        self._entities: dict[Model, Entity | None] = {}
        self._slots: dict[Hierarchy, HierarchySlots] = {}
        self._formats: dict[Model, RowFormat | None] = {}

    def schema_of(self, schema: str | None) -> str:
        """Where the tables of a schema really are, by one name: "" is the database's standard schema, whether it is
        spelled out or not."""
        schema = self.schema_translate_map.get(schema, schema) or self.default_schema
        return "" if schema == standard_schema(self.dialect) else schema

    def forget(self) -> None:
        """What is registered has changed."""
        self._entities.clear()
        self._formats.clear()

    def entity(self, model: Model) -> Entity | None:
        """The entity of a mapped class, or None if it is not cached."""
        try:
            return self._entities[model]
        except KeyError:
            entity = self._entities[model] = self._make_entity(model)
            return entity

    def _make_entity(self, model: Model) -> Entity | None:
        mapper = mapper_of(model)
        policy = self.models.policy_of(model) if mapper is not None else None
        if mapper is None or policy is None:
            return None
        try:
            check_cacheable(mapper)
        except NotCacheableError as error:
            self.models.warn_once(model, str(error))
            return None
        hierarchy = Hierarchy.of(mapper)
        assert hierarchy is not None, "checked above"
        return Entity(self, mapper, policy, self.slots_of(hierarchy))

    def slots_of(self, hierarchy: Hierarchy) -> HierarchySlots:
        slots = self._slots.get(hierarchy)
        if slots is None:
            slots = self._slots[hierarchy] = HierarchySlots(self, hierarchy)
        return slots

    def format_of(self, model: Model) -> RowFormat | None:
        """How rows of this class are stored, or None if they are not."""
        if model not in self._formats:
            self._formats[model] = self._make_format(model)
        return self._formats[model]

    def _make_format(self, model: Model) -> RowFormat | None:
        mapper = mapper_of(model)
        if mapper is None or self.models.policy_of(model) is None:
            return None
        try:
            return RowFormat.of(mapper, self.dialect)
        except UncacheableTypeError as error:
            self.models.warn_once(model, f"{model.__qualname__} is not cached: {error}")
            return None
