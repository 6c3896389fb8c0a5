"""Primary keys: what was given to `get()`, and the slot that it names.

A slot is named by what is sent to the database: the value of a primary key column itself or, where a `TypeDecorator`
makes another value of it, that one. So a read that was given a value, and a statement that was given what is sent for
it, name the same slot. Each value has one text, and values that are equal to the database have the same. Where that
cannot be had, a type is refused; a value that is not just as the database would give it back names no slot.
"""

from __future__ import annotations

import enum
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import CHAR, NCHAR, DateTime, Dialect, Enum, Interval, String, Uuid
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import CITEXT
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Mapper
from sqlalchemy.types import TypeDecorator, TypeEngine

from asynccache.backends.base import Key
from asynccache.orm.column_types import UncacheableTypeError, resolved
from asynccache.protocol import Slot

K = TypeVar("K")

PrimaryKey = tuple[Any, ...]

RowSlot = Callable[[Sequence[Any]], Slot | None]
"""A primary key -> the slot of its row; None if a value is not exactly of its column's type."""

_PLAIN = re.compile(r"[A-Za-z0-9_./-]*")
"""What is put into a key as it is. Anything else is hashed: a user may choose it."""

_NAME_BYTES_MAX = 100
"""Longer parts of keys are hashed. memcached takes 250 bytes in all."""


def _hash(text: bytes) -> str:
    return "~" + blake2b(text, digest_size=16).hexdigest()


def plain_or_hash(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else _hash(text.encode())


def short_or_hash(text: str, bytes_max: int = _NAME_BYTES_MAX) -> str:
    return text if len(text) <= bytes_max else _hash(text.encode())


# ---------------------------------------------------------------------------------------------------- what get() takes


def primary_key_of(mapper: Mapper[Any], ident: Any) -> PrimaryKey:
    """What was given to `get()` as a tuple in the order of the primary key's columns.

    ident: a value, a tuple or list of values, or a dict by attribute names.
    Raises sqlalchemy.exc.InvalidRequestError, in SQLAlchemy's own words, if values are missing or too many.
    """
    values = ident if isinstance(ident, dict) else tuple(ident) if isinstance(ident, (tuple, list)) else (ident,)
    if len(values) != len(mapper.primary_key):
        raise InvalidRequestError(
            "Incorrect number of values in identifier to formulate primary key for session.get(); "
            f"primary key columns are {','.join(repr(str(column)) for column in mapper.primary_key)}"
        )
    if isinstance(values, tuple):
        return values
    names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    synonyms = mapper.synonyms
    by_name = {synonyms[name].name if name in synonyms else name: value for name, value in values.items()}
    if not all(name in by_name for name in names):
        raise InvalidRequestError(
            "Incorrect names of values in identifier to formulate primary key for session.get(); "
            f"primary key attribute names are {','.join(map(repr, names))} (synonym names are also accepted)"
        )
    return tuple(by_name[name] for name in names)


def primary_keys_of(mapper: Mapper[Any], idents: Iterable[K]) -> dict[K, PrimaryKey]:
    """The same for many, each by what was given. Raises as `primary_key_of`."""
    is_single = len(mapper.primary_key) == 1
    return {
        ident: (ident,) if is_single and not isinstance(ident, (tuple, list, dict)) else primary_key_of(mapper, ident)
        for ident in idents
    }


# ------------------------------------------------------------------------------------------------ the text of one value


class KeyForm(NamedTuple):
    """One primary key column's part of `_SOURCE`, as Python: whether the value `{v}` is exactly of the column's type
    (`{kind}`), and its text in keys.

    databases: those that are known to compare such values as Python compares them, by the dialect's name; None: all.
    """

    is_exact: str
    text: str
    kind: type | None = None
    databases: frozenset[str] | None = None


_KNOWN = frozenset({"default", "sqlite", "postgresql"})
"""Others compare text by collations that ignore case, and may round times. `default`: not known yet."""

_FORMS: Mapping[type, KeyForm] = {
    int: KeyForm("type({v}) is int", "{v}"),
    str: KeyForm("type({v}) is str", "plain_or_hash({v})", databases=_KNOWN),
    UUID: KeyForm("isinstance({v}, UUID)", "{v}.hex"),  # drivers have subclasses of their own
    bytes: KeyForm("type({v}) is bytes", "hash_bytes({v})"),
    date: KeyForm("type({v}) is date", "{v}", databases=_KNOWN),
    datetime: KeyForm(
        "type({v}) is datetime and {v}.tzinfo is None", "plain_or_hash({v}.isoformat())", databases=_KNOWN
    ),
}
"""By the type of a column's values. One that is not exactly of that type has no key, since the database may take it for
another (1 for True, "1" for 1) in ways that differ from Python's."""

# PostgreSQL takes "a" and "a  " for the same, and fills up what it gives.
_PADDED = KeyForm("type({v}) is str and not {v}.endswith(' ')", "plain_or_hash({v})", databases=_KNOWN)

# An instant, whatever offset it is written with. SQLite keeps the time alone, and forgets the offset.
_INSTANT = KeyForm(
    "type({v}) is datetime and {v}.tzinfo is not None",
    "plain_or_hash({v}.astimezone(UTC).isoformat())",
    databases=_KNOWN - {"sqlite"},
)


def key_form(type_: TypeEngine[Any], dialect: Dialect) -> KeyForm:
    """How values of a primary key column become text. Raises UncacheableTypeError."""
    if isinstance(type_, (sqlite.DATE, sqlite.DATETIME)):
        raise UncacheableTypeError(f"{type_!r} as a primary key may store less than the value; use Date or DateTime")
    impl = resolved(type_, dialect)
    while isinstance(impl, TypeDecorator) and not isinstance(impl, Interval):
        if impl._has_bind_expression:
            raise UncacheableTypeError(f"{type_!r} as a primary key has a bind_expression: the database makes the key")
        impl = impl.impl_instance
    form = _form_of(impl)
    if form is None:
        raise UncacheableTypeError(f"{type_!r} as a primary key is not supported")
    if form.databases is not None and dialect.name not in form.databases:
        raise UncacheableTypeError(f"{type_!r} as a primary key: {dialect.name} may not compare it as Python does")
    return form


def _form_of(impl: TypeEngine[Any]) -> KeyForm | None:
    if (
        isinstance(impl, CITEXT)
        or (isinstance(impl, String) and impl.collation is not None)
        or (isinstance(impl, Uuid) and not impl.as_uuid)
    ):
        raise UncacheableTypeError("values that differ may be equal to the database: case or collation")
    if isinstance(impl, (CHAR, NCHAR)):
        return _PADDED
    if isinstance(impl, Enum) and impl.enum_class is not None:
        kind: Any = impl.enum_class
        named = KeyForm("type({v}) is {kind}", "plain_or_hash({v}._name_)", kind=kind, databases=_KNOWN)
        return named if issubclass(kind, enum.Enum) and not issubclass(kind, enum.Flag) else None
    if isinstance(impl, DateTime) and getattr(impl, "precision", None) is not None:
        raise UncacheableTypeError("values that differ may be equal to the database: it rounds them")
    try:
        python_type = impl.python_type
    except NotImplementedError:
        return None
    if python_type is datetime and getattr(impl, "timezone", False):
        return _INSTANT
    return _FORMS.get(python_type)


def value_from_text(type_: TypeEngine[Any], text: str) -> Any:
    """A value of a primary key column that was typed: bytes in hex, enums by name, times in ISO 8601, and for a
    TypeDecorator what is sent to the database. Raises ValueError."""
    dialect = DefaultDialect()
    impl = type_.dialect_impl(dialect)
    while isinstance(impl, TypeDecorator):
        impl = impl.impl_instance
    try:
        kind: Any = impl.python_type
    except NotImplementedError:  # a type of the application's own: as good as text
        kind = str
    parse, form = _TYPED.get(kind, (kind, kind.__name__))
    try:
        value = kind[text] if issubclass(kind, enum.Enum) else parse(text)
        return _received(type_, value, dialect)
    except Exception as error:  # a TypeDecorator may raise what it likes
        raise ValueError(f"{text!r} is no {form}") from error


_TYPED: Mapping[type, tuple[Callable[[str], Any], str]] = {
    bytes: (bytes.fromhex, "row of bytes in hex"),
    date: (date.fromisoformat, "date (2024-05-06)"),
    datetime: (datetime.fromisoformat, "time (2024-05-06T07:08)"),
}


# -------------------------------------------------------------------------------------------- what TypeDecorators make


def sent(type_: TypeEngine[Any], value: Any, dialect: Dialect) -> Any:
    """What is sent to the database for a value, as far as TypeDecorators make it. Raises what they raise."""
    impl = type_.dialect_impl(dialect)
    while isinstance(impl, TypeDecorator):
        if type(impl).process_bind_param is not TypeDecorator.process_bind_param:
            value = impl.process_bind_param(value, dialect)
        impl = impl.impl_instance
    # A column of UUIDs takes them as text, too, and gives UUIDs.
    return UUID(value) if isinstance(impl, Uuid) and type(value) is str else value


def _received(type_: TypeEngine[Any], value: Any, dialect: Dialect) -> Any:
    """What TypeDecorators make of what the database gives."""
    decorators = []
    impl = type_.dialect_impl(dialect)
    while isinstance(impl, TypeDecorator):
        decorators.append(impl)
        impl = impl.impl_instance
    for each in reversed(decorators):
        if type(each).process_result_value is not TypeDecorator.process_result_value:
            value = each.process_result_value(value, dialect)
    return value


def by_what_is_sent(types: Sequence[TypeEngine[Any]], dialect: Dialect, row_slot: RowSlot) -> RowSlot:
    """The slot of a row by its key as Python code has it, where `row_slot` takes what is sent.

    A key that the database would give back as another one (in lower case, say) has none: the row that it finds is to be
    known by that other key.
    """
    if not any(isinstance(type_, TypeDecorator) for type_ in types):
        return row_slot
    if dialect.name == "default":
        return lambda _: None  # what is sent may depend on the database, which is not known

    def slot(primary_key: Sequence[Any]) -> Slot | None:
        try:
            key = [sent(type_, value, dialect) for type_, value in zip(types, primary_key, strict=True)]
            again = [_received(type_, value, dialect) for type_, value in zip(types, key, strict=True)]
            return row_slot(key) if again == list(primary_key) else None
        except Exception:  # of the decorator's own code, which SQLAlchemy will meet in its turn
            return None

    return slot


# ----------------------------------------------------------------------------------------------------------- the slot


def compile_row_slot(forms: Sequence[KeyForm], prefix: str, generations: Sequence[Key]) -> RowSlot:
    """Generate the function that names slots, which every hit calls. For two columns, an int and a str, it is

        def slot_of(v0, v1):
            if not (type(v0) is int and type(v1) is str):
                return None
            name = f"{v0},{plain_or_hash(v1)}"
            if len(name) > name_bytes_max:
                name = short_or_hash(name)
            name = name.encode()
            generation = generations[crc32(name) % buckets]
            return Slot(Key(prefix + name, generation.route), generation)

    with the two tuples made directly, which takes half the time. No name or value of the user's is in its source. The
    slots that were asked for last are remembered, by the values and their types: True is no 1.
    """
    places = [{"v": f"v{i}", "kind": f"kind{i}"} for i in range(len(forms))]
    source = _SOURCE.format(
        values=", ".join(place["v"] for place in places),
        are_exact=" and ".join(form.is_exact.format(**place) for form, place in zip(forms, places, strict=True)),
        name=",".join("{" + form.text.format(**place) + "}" for form, place in zip(forms, places, strict=True)),
    )
    scope: dict[str, Any] = {
        "UUID": UUID,
        "UTC": UTC,
        "date": date,
        "datetime": datetime,
        "plain_or_hash": plain_or_hash,
        "hash_bytes": _hash,
        "short_or_hash": short_or_hash,
        "name_bytes_max": _NAME_BYTES_MAX,
        "crc32": zlib.crc32,
        "buckets": len(generations),
        "generations": generations,
        "prefix": prefix.encode() + b":",
        "new": tuple.__new__,
        "Slot": Slot,
        "Key": Key,
        **{place["kind"]: form.kind for form, place in zip(forms, places, strict=True)},
    }
    exec(source, scope)  # noqa: S102 (positions alone, as said above)
    slot_of: Callable[..., Slot | None] = lru_cache(_SLOTS_REMEMBERED, typed=True)(scope["slot_of"])

    def row_slot(primary_key: Sequence[Any]) -> Slot | None:
        try:
            return slot_of(*primary_key)
        except TypeError:  # not as many values as columns, or one that is not hashable
            return None

    return row_slot


_SLOTS_REMEMBERED: Final = 1024
"""Of the rows of a hierarchy. Each takes some 400 bytes."""

_SOURCE = """
def slot_of({values}):
    if not ({are_exact}):
        return None
    name = f"{name}"
    if len(name) > name_bytes_max:
        name = short_or_hash(name)
    name = name.encode()
    generation = generations[crc32(name) % buckets]
    return new(Slot, (new(Key, (prefix + name, generation.route)), generation))
"""
