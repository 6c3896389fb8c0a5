"""The wire form of one column: how its values are written, and how they are read again.

Where a column has values of one type, they need not say which; but msgspec alone is not exact, and takes an int for a
float. So a form compares the types of values before it sees them. The application's own code, in a `TypeDecorator` or a
codec, is not believed: what it makes of a value is made anew once while it is written.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import NoneType
from typing import Any
from uuid import UUID

from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.types import TypeDecorator

from asynccache.orm.wire import (
    INT_MAX,
    INT_MIN,
    DecodeError,
    EncodeError,
    dump,
    dump_datetime,
    dump_int,
    is_asyncpg_uuid,
    load,
    load_datetime,
    load_int,
    pack,
    same,
    unwrapped,
)


@dataclass(frozen=True, slots=True)
class TypeCodec:
    """How an application has values of a column type of its own written: see `Cache.codec_for`.

    name: tells this codec, and this version of it, from others.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    name: str


@dataclass(frozen=True, slots=True)
class Form:
    """How the values of one column are written and read.

    write: any value, None included, to what msgspec packs; raises EncodeError where that would not be exact.
    read: the way back; None where msgspec's answer is the value.
    annotation: what msgspec may unpack.
    verbatim: values of exactly this type are their own wire form, and need no `write`.
    as_read: msgspec's answers of exactly these types are the values, and need no `read`.
    plain: whether `dump` can write what this form writes, so that arrays and decorators need not ask it.
    given: the name of the application's own codec in it.
    shown: the way back that runs no code of the application's, where `read` does.
    """

    write: Callable[[Any], Any]
    read: Callable[[Any], Any] | None = None
    annotation: Any = Any
    verbatim: type | None = None
    as_read: frozenset[type] = frozenset()
    plain: bool = True
    given: str | None = None
    shown: Callable[[Any], Any] | None = None

    def show(self, wire: Any) -> Any:
        """The value or, where the application's code makes it, what it is made from."""
        read = self.shown or self.read
        return wire if read is None or type(wire) in self.as_read else read(wire)


def _as_it_is(wire: Any) -> Any:
    return wire


def _mismatch(kinds: tuple[type, ...], value: Any) -> EncodeError:
    expected = " or ".join(kind.__name__ for kind in kinds)
    return EncodeError(f"a column of {expected} held {type(value).__module__}.{type(value).__qualname__}")


def native(kind: type) -> Form:
    """msgspec's own form is exact: nothing but the type of the value needs looking at."""

    def write(value: Any) -> Any:
        if value is None or type(value) is kind:
            return value
        raise _mismatch((kind,), value)

    return Form(write, annotation=kind | None, verbatim=kind)


def _write_int(value: Any) -> Any:
    if value is None:
        return None
    if type(value) is not int:
        raise _mismatch((int,), value)
    return value if INT_MIN <= value <= INT_MAX else dump_int(value)


def _read_int(wire: bytes | None) -> int | None:
    return None if wire is None else load_int(wire)


def _write_float(value: Any) -> Any:
    # SQLite gives an int for a whole number in a NUMERIC column, and keeps it one here.
    if value is None or type(value) is float or (type(value) is int and INT_MIN <= value <= INT_MAX):
        return value
    raise _mismatch((float,), value)


def _write_uuid(value: Any) -> Any:
    if value is None:
        return None
    if type(value) is UUID or is_asyncpg_uuid(type(value)):
        return value.bytes
    raise _mismatch((UUID,), value)


def _write_datetime(value: Any) -> Any:
    if value is None:
        return None
    if type(value) is not datetime:
        raise _mismatch((datetime,), value)
    zone = value.tzinfo
    # msgspec is ten times faster than isoformat(), and exact for these: UTC is the one zone of a msgpack timestamp.
    if (zone is None or zone is UTC) and not value.fold:
        return value
    return (dump_datetime(value),)


def _read_datetime(wire: datetime | tuple[str] | None) -> datetime | None:
    return load_datetime(wire[0]) if isinstance(wire, tuple) else wire


def dynamic(*kinds: type) -> Form:
    """Self-describing values of these types at the top, of any plain type below."""

    def write(value: Any) -> Any:
        if type(value) not in kinds:
            value = unwrapped(value)
            if value is not None and type(value) not in kinds:
                raise _mismatch(kinds, value)
        return dump(value)

    def read(wire: Any) -> Any:
        if wire is not None and type(wire) not in kinds:
            raise DecodeError(f"{type(wire).__qualname__} where another type was written")
        return wire

    return Form(write, read, as_read=frozenset(kinds))


def by_name(enum_class: type[enum.Enum]) -> Form:
    """Members by their names: the value may be anything, the name is what the database holds."""
    members: dict[str | None, enum.Enum | None] = {None: None}
    members.update(enum_class.__members__)

    def write(value: Any) -> Any:
        if value is None:
            return None
        # A combination of flags has a type and a name, but is no member.
        if type(value) is enum_class and members.get(value._name_) is value:
            return value._name_
        raise _mismatch((enum_class,), value)

    return Form(write, members.__getitem__, annotation=str | None, plain=False)


ANYTHING = Form(lambda value: dump(unwrapped(value)))
INTS = Form(_write_int, _read_int, int | bytes | None, verbatim=int, as_read=frozenset({int}))
FLOATS = Form(_write_float, annotation=float | int | None, verbatim=float)
UUIDS = Form(_write_uuid, annotation=UUID | None, verbatim=UUID)
DATETIMES = Form(_write_datetime, _read_datetime, datetime | tuple[str] | None, as_read=frozenset({datetime, NoneType}))

_LEAF, _LIST, _TUPLE = range(3)


def array_of(item: Form) -> Form:
    """Nested lists (or tuples) of items that have a form of their own.

    Each node says what it is, since an item may be written as a list as well.
    """
    if item.plain:
        return dynamic(list, tuple)

    def write_node(value: Any) -> list[Any]:
        if type(value) is list or type(value) is tuple:
            return [_LIST if type(value) is list else _TUPLE, *map(write_node, value)]
        return [_LEAF, item.write(value)]

    def write(value: Any) -> Any:
        value = unwrapped(value)
        if value is None or type(value) is list or type(value) is tuple:
            return None if value is None else write_node(value)
        raise _mismatch((list, tuple), value)

    read, shown = _array_reader(item.read), item.shown and _array_reader(item.shown)
    return Form(write, read, annotation=list[Any] | None, plain=False, given=item.given, shown=shown)


def _array_reader(read_item: Callable[[Any], Any] | None) -> Callable[[list[Any] | None], Any]:
    def read_node(node: list[Any]) -> Any:
        kind, *items = node
        if kind == _LEAF:
            (wire,) = items
            return wire if read_item is None else read_item(wire)
        return {_LIST: list, _TUPLE: tuple}[kind](map(read_node, items))

    def read(wire: list[Any] | None) -> Any:
        if wire is None:
            return None
        value = read_node(wire)
        if type(value) is list or type(value) is tuple:
            return value
        raise DecodeError("not an array")

    return read


_IDENTITY: Any = object.__eq__


def _dump_as_driver(bound: Any) -> Any:
    """Drivers send an `IntEnum` or a `StrEnum` as the number or text that it is."""
    if isinstance(bound, int) and type(bound) is not bool:
        bound = int.__int__(bound)
    elif isinstance(bound, str):
        bound = str.__str__(bound)
    return dump(bound)


def by_bind_form(decorator: TypeDecorator[Any], inner: Form, dialect: Dialect) -> Form:
    """What a TypeDecorator sends to the database, from which it makes the value anew.

    The form that it sends need not be the one that the database answers with (a str for a UUID column is usual), nor
    need one be the inverse of the other (some lower the case, some round). So each value is made anew once while it
    is written, and is refused if it is not the same; one without an equality of its own is judged by its bind form.
    """
    bind, result = decorator.process_bind_param, decorator.process_result_value
    write_bound = _dump_as_driver if inner.plain else inner.write
    read_bound = None if inner.plain else inner.read

    def read(wire: Any) -> Any:
        return result(wire if read_bound is None else read_bound(wire), dialect)

    def write(value: Any) -> Any:
        bound = bind(value, dialect)
        wire = write_bound(bound)
        # Through bytes, so that what is compared has met everything that a reader's copy will meet.
        again = read(load(pack(wire)))
        if same(again, value):
            return wire
        no_equality = type(again) is type(value) and type(value).__eq__ is _IDENTITY
        if no_equality and same(bind(again, dialect), bound):
            return wire
        raise EncodeError(f"{type(decorator).__qualname__} makes another value of what it was given to store")

    shown = inner.shown or read_bound or _as_it_is
    return Form(write, read, plain=False, given=inner.given, shown=shown)


def by_codec(codec: TypeCodec) -> Form:
    """What an application's own codec writes, which is any plain value. It is trusted no more than a TypeDecorator:
    each value is made anew once, and has to be written as before. Its equality is not asked: arrays have none."""

    def read(wire: Any) -> Any:
        return None if wire is None else codec.decode(wire)

    def write(value: Any) -> Any:
        value = unwrapped(value)
        if value is None:
            return None
        wire = dump(codec.encode(value))
        packed = pack(wire)
        again = read(load(packed))
        if type(again) is type(value) and pack(dump(codec.encode(again))) == packed:
            return wire
        raise EncodeError(f"the codec {codec.name} makes another value of what it was given to store")

    return Form(write, read, plain=False, given=codec.name, shown=_as_it_is)
