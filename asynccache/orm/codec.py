"""Column values <-> bytes: typed msgpack, compiled once for each mapper, exact or refused, and never pickle.

What is stored is the value as Python code sees it on a loaded instance. The one exception is a `TypeDecorator` that
converts both ways: its *bind form* is stored, so that a column that Python encrypts is encrypted in the cache too. (One
that the database decrypts, by a `column_expression`, is not.)

Exact means: the same type and the same value come back, down to the offset of a datetime, the exponent of a Decimal
and the sign of a zero. Where that cannot be had, the type is refused (`UncacheableTypeError`, once, at registration)
or the row is not cached (`EncodeError`). msgspec alone is not exact: it takes an int for a float, an `IntEnum` for an
int, a tuple for a list. So the types are compared here, before it sees the value.

Three values come back as their plain form, on purpose: asyncpg's own subclass of `uuid.UUID` as `uuid.UUID`; what
`sqlalchemy.ext.mutable` wraps as the plain dict or list (the ORM wraps it again in its load event); and the name, if it
has one, of a `datetime.timezone` is dropped.
"""

from __future__ import annotations

import enum
import ipaddress
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from msgspec import msgpack
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql.ranges import AbstractMultiRange, AbstractSingleRange, MultiRange, Range
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.ext.mutable import Mutable
from sqlalchemy.types import NullType, TypeDecorator, TypeEngine, UserDefinedType

__all__ = [
    "Codec",
    "Codecs",
    "DecodeError",
    "EncodeError",
    "TypeCodec",
    "UncacheableTypeError",
    "UnresolvedTypeError",
    "check_type",
    "compile_codec",
    "own_processors",
    "resolved",
    "wires_of",
]

BitString: type[str] | None = getattr(pg, "BitString", None)
"""What a BIT column gives since SQLAlchemy 2.1; before, each driver gave a type of its own."""


class UncacheableTypeError(Exception):
    """Raised when no value of a column type could be brought back exactly; the text is the reason and the way out."""


class EncodeError(Exception):
    """Raised when a value is not exactly what its column's wire form can carry: the row is not cached.

    The text names types, never the value: it may be what an encrypting type is there to hide.
    """


class DecodeError(Exception):
    """Raised when bytes are not a row of the codec that reads them: damaged, foreign, or of another schema."""


@dataclass(frozen=True, slots=True)
class Codec:
    """The wire form of one mapper's rows.

    encode: one value a column -> bytes. Raises `EncodeError`, nothing else.
    decode: bytes -> fresh values, sharing nothing with an earlier call. Raises `DecodeError`, nothing else, and runs
        no code that the bytes could choose.
    show: as `decode`, but runs no code of the application's: where that would make a value (a `TypeDecorator` that
        decrypts it), what it would be made from.
    given: names and versions of the codecs of the application's own that take part in it.
    """

    encode: Callable[[tuple[Any, ...]], bytes]
    decode: Callable[[bytes], tuple[Any, ...]]
    show: Callable[[bytes], tuple[Any, ...]]
    given: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TypeCodec:
    """How an application has values of a column type of its own written: see `Cache.codec_for`.

    name: tells this codec, and this version of it, from others.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    name: str


Codecs = Mapping[type[TypeEngine[Any]], TypeCodec]
"""By column type. The nearest class in the method resolution order decides."""

_NONE: Codecs = {}


def check_type(type_: TypeEngine[Any], dialect: Dialect | None, codecs: Codecs = _NONE) -> None:
    """Refuse a column type whose values cannot be cached.

    dialect: None when it is not known yet. Types are then judged by SQLAlchemy's default dialect, and a type that
        resolves on its own database only is left to `compile_codec`.

    Raises UncacheableTypeError with the reason.
    """
    try:
        _form(type_, dialect or DefaultDialect(), codecs)
    except UnresolvedTypeError:
        if dialect is not None:
            raise


def compile_codec(column_types: Sequence[TypeEngine[Any]], dialect: Dialect, codecs: Codecs = _NONE) -> Codec:
    """Generate the codec for rows of these column types, in this order.

    Both functions are straight-line code over the columns, the way `dataclasses` writes an `__init__`: a loop over
    columns costs a third more. The source is made of positions alone; no name or value of the user's is in it.

    Raises UncacheableTypeError for a type that `check_type` refuses.
    """
    forms = [_form(type_, dialect, codecs) for type_ in column_types]
    row_type = types.GenericAlias(tuple, tuple(form.annotation for form in forms))
    scope: dict[str, Any] = {
        "pack": _pack,
        "unpack": msgpack.Decoder(row_type, ext_hook=_load_extension).decode,
        "write_all": lambda row: [form.write(value) for form, value in zip(forms, row, strict=True)],
        "EncodeError": EncodeError,
        "DecodeError": DecodeError,
    }
    written, read = "", ""
    for i, form in enumerate(forms):
        scope |= {f"kind{i}": form.verbatim, f"write{i}": form.write, f"kinds{i}": form.as_read, f"read{i}": form.read}
        written += (f"v{i} if type(v{i}) is kind{i} else " if form.verbatim else "") + f"write{i}(v{i}), "
        if form.read is None:
            read += f"v{i}, "
        else:
            read += (f"v{i} if type(v{i}) in kinds{i} else " if form.as_read else "") + f"read{i}(v{i}), "
    row = "".join(f"v{i}, " for i in range(len(forms)))
    exec(_SOURCE.format(row=row, written=written, read=read), scope)  # noqa: S102 (positions alone, as said above)
    given = tuple(form.given for form in forms if form.given is not None)

    def show(data: bytes) -> tuple[Any, ...]:
        try:
            return tuple([form.show(wire) for form, wire in zip(forms, scope["unpack"](data), strict=True)])
        except Exception as error:
            raise DecodeError("not a row of this codec: " + type(error).__name__) from error

    return Codec(scope["encode"], scope["decode"], show, given)


def wires_of(data: bytes) -> Sequence[Any]:
    """What a codec has written for each column, to compare. Raises DecodeError."""
    try:
        wires: Sequence[Any] = msgpack.decode(data, type=list[Any])
    except Exception as error:
        raise DecodeError("not a row: " + type(error).__name__) from error
    return wires


# `except Exception`: a TypeDecorator's own code runs in here and may raise whatever it likes, as may hostile bytes.
_SOURCE = """
def encode(row):
    try:
        try:
            ({row}) = row
            return pack(({written}))
        except OverflowError:  # an int beyond 64 bits went the fast way; each `write` knows what to do with it
            return pack(write_all(row))
    except EncodeError:
        raise
    except Exception as error:
        raise EncodeError("no wire form for this row: " + type(error).__name__) from error

def decode(data):
    try:
        ({row}) = unpack(data)
        return ({read})
    except Exception as error:
        raise DecodeError("not a row of this codec: " + type(error).__name__) from error
"""


# -- The wire form of any plain value ---------------------------------------------------------------------------------

_pack = msgpack.Encoder(decimal_format="string", uuid_format="bytes").encode
_ATOMS = frozenset({types.NoneType, bool, float, str, bytes})
_STR = frozenset({str})
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1


def _dump(value: Any) -> Any:
    """Give the self-describing wire form of a value: msgpack's own where that is exact, else one of `_EXTENSIONS`."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is int and _INT_MIN <= value <= _INT_MAX:
        return value
    if kind is list:
        return [item if type(item) in _ATOMS else _dump(item) for item in value]
    if kind is dict:
        if not _STR.issuperset(map(type, value)):
            raise EncodeError("a dict with keys that are not str has no wire form")
        return {key: item if type(item) in _ATOMS else _dump(item) for key, item in value.items()}
    extension = _EXTENSION_OF.get(UUID if _is_asyncpg_uuid(kind) else kind)
    if extension is None:
        raise EncodeError(f"{kind.__module__}.{kind.__qualname__} has no wire form")
    return msgpack.Ext(extension.code, extension.dump(value))


def _load_extension(code: int, data: memoryview) -> Any:
    return _EXTENSIONS[code].load(bytes(data))


_load = msgpack.Decoder(ext_hook=_load_extension).decode


class _Extension(NamedTuple):
    code: int
    kind: type
    dump: Callable[[Any], bytes]
    load: Callable[[bytes], Any]


def _as_text(code: int, kind: type, dump: Callable[[Any], str], load: Callable[[str], Any]) -> _Extension:
    return _Extension(code, kind, lambda value: dump(value).encode(), lambda data: load(data.decode()))


def _dump_int(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)


def _load_int(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _dump_datetime(value: datetime) -> str:
    """ISO 8601, and the name of a zone in brackets after it (RFC 9557), as psycopg's datetimes need it: a ZoneInfo is
    more than its offset once somebody adds a month."""
    zone = value.tzinfo
    if type(zone) is ZoneInfo and zone.key:
        return f"{value.isoformat()}[{zone.key}]"
    if value.fold or not (zone is None or type(zone) is timezone):
        raise EncodeError(f"a datetime with fold={value.fold} and tzinfo {type(zone).__qualname__} has no wire form")
    return value.isoformat()


def _load_datetime(text: str) -> datetime:
    if not text.endswith("]"):
        return datetime.fromisoformat(text)
    iso, _, key = text[:-1].partition("[")
    written = datetime.fromisoformat(iso)
    value = written.replace(tzinfo=ZoneInfo(key))
    if value.utcoffset() != written.utcoffset():
        value = value.replace(fold=1)
    if value.utcoffset() != written.utcoffset():  # this machine's time zone database is not the writer's
        raise DecodeError(f"{key} has another offset at that time")
    return value


def _dump_time(value: time) -> str:
    if value.fold or not (value.tzinfo is None or type(value.tzinfo) is timezone):
        raise EncodeError(f"a time with tzinfo {type(value.tzinfo).__qualname__} has no wire form")
    return value.isoformat()


def _load_range(data: bytes) -> Range[Any]:
    lower, upper, bounds, empty = _load(data)
    if bounds not in ("[)", "(]", "[]", "()") or type(empty) is not bool:
        raise DecodeError("not a range")
    return Range(lower, upper, bounds=bounds, empty=empty)


def _load_multirange(data: bytes) -> MultiRange[Any]:
    ranges = MultiRange[Any](_load(data))
    if not all(type(item) is Range for item in ranges):
        raise DecodeError("not a multirange")
    return ranges


_IP_KINDS: tuple[type, ...] = (
    ipaddress.IPv4Address,
    ipaddress.IPv4Interface,
    ipaddress.IPv4Network,
    ipaddress.IPv6Address,
    ipaddress.IPv6Interface,
    ipaddress.IPv6Network,
)

# A code is for ever: what another version of the library wrote is still in the cache.
_EXTENSIONS = {
    extension.code: extension
    for extension in (
        _Extension(1, int, _dump_int, _load_int),
        _as_text(2, Decimal, str, Decimal),
        _as_text(3, datetime, _dump_datetime, _load_datetime),
        _as_text(4, date, date.isoformat, date.fromisoformat),
        _as_text(5, time, _dump_time, time.fromisoformat),
        _Extension(
            6,
            timedelta,
            lambda value: _pack((value.days, value.seconds, value.microseconds)),
            lambda data: timedelta(*msgpack.decode(data, type=tuple[int, int, int])),
        ),
        _Extension(7, UUID, lambda value: bytes(value.bytes), lambda data: UUID(bytes=data)),
        _Extension(8, tuple, lambda value: _pack(_dump(list(value))), lambda data: tuple(_load(data))),
        _Extension(
            9,
            Range,
            lambda value: _pack((_dump(value.lower), _dump(value.upper), value.bounds, value.empty)),
            _load_range,
        ),
        _Extension(10, MultiRange, lambda value: _pack(_dump(list(value))), _load_multirange),
        *([_as_text(11, BitString, str, BitString)] if BitString else []),
        *(_as_text(code, kind, str, kind) for code, kind in enumerate(_IP_KINDS, start=12)),
    )
}
_EXTENSION_OF = {extension.kind: extension for extension in _EXTENSIONS.values()}


def _is_asyncpg_uuid(kind: type) -> bool:
    return kind.__module__ == "asyncpg.pgproto.pgproto" and issubclass(kind, UUID)


def _unwrapped(value: Any) -> Any:
    """Take off what `sqlalchemy.ext.mutable` puts around a loaded value: the ORM puts it on again by itself."""
    if not isinstance(value, Mutable):
        return value
    plain: type[Any] | None = next((kind for kind in (dict, list, set) if issubclass(type(value), kind)), None)
    return plain(value) if plain else value


# -- The wire form of one column --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Form:
    """How the values of one column are written and read.

    write: any value, None included, to what msgspec packs; raises EncodeError where that would not be exact.
    read: the way back; None where msgspec's answer is the value.
    annotation: what msgspec may unpack.
    verbatim: values of exactly this type are their own wire form, and need no `write`.
    as_read: msgspec's answers of exactly these types are the values, and need no `read`.
    plain: whether `_dump` can write what this form writes, so that arrays and decorators need not ask it.
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


def _native(kind: type) -> _Form:
    """msgspec's own form is exact: nothing but the type of the value needs looking at."""

    def write(value: Any) -> Any:
        if value is None or type(value) is kind:
            return value
        raise _mismatch((kind,), value)

    return _Form(write, annotation=kind | None, verbatim=kind)


def _write_int(value: Any) -> Any:
    if value is None:
        return None
    if type(value) is not int:
        raise _mismatch((int,), value)
    return value if _INT_MIN <= value <= _INT_MAX else _dump_int(value)


def _read_int(wire: bytes | None) -> int | None:
    return None if wire is None else _load_int(wire)


def _write_float(value: Any) -> Any:
    # SQLite gives an int for a whole number in a NUMERIC column, and keeps it one here.
    if value is None or type(value) is float or (type(value) is int and _INT_MIN <= value <= _INT_MAX):
        return value
    raise _mismatch((float,), value)


def _write_uuid(value: Any) -> Any:
    if value is None:
        return None
    if type(value) is UUID or _is_asyncpg_uuid(type(value)):
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
    return (_dump_datetime(value),)


def _read_datetime(wire: datetime | tuple[str] | None) -> datetime | None:
    return _load_datetime(wire[0]) if isinstance(wire, tuple) else wire


def _dynamic(*kinds: type) -> _Form:
    """Self-describing values of these types at the top, of any plain type below."""

    def write(value: Any) -> Any:
        if type(value) not in kinds:
            value = _unwrapped(value)
            if value is not None and type(value) not in kinds:
                raise _mismatch(kinds, value)
        return _dump(value)

    def read(wire: Any) -> Any:
        if wire is not None and type(wire) not in kinds:
            raise DecodeError(f"{type(wire).__qualname__} where another type was written")
        return wire

    return _Form(write, read, as_read=frozenset(kinds))


def _enum(enum_class: type[enum.Enum]) -> _Form:
    """By name: the value may be anything, the name is what the database holds."""
    members: dict[str | None, enum.Enum | None] = {None: None}
    members.update(enum_class.__members__)

    def write(value: Any) -> Any:
        if value is None:
            return None
        # A combination of flags has a type and a name, but is no member.
        if type(value) is enum_class and members.get(value._name_) is value:
            return value._name_
        raise _mismatch((enum_class,), value)

    return _Form(write, members.__getitem__, annotation=str | None, plain=False)


_LEAF, _LIST, _TUPLE = range(3)


def _array(item: _Form) -> _Form:
    """Nested lists (or tuples) of items that have a form of their own.

    Each node says what it is, since an item may be written as a list as well.
    """
    if item.plain:
        return _dynamic(list, tuple)

    def write_node(value: Any) -> list[Any]:
        if type(value) is list or type(value) is tuple:
            return [_LIST if type(value) is list else _TUPLE, *map(write_node, value)]
        return [_LEAF, item.write(value)]

    def write(value: Any) -> Any:
        value = _unwrapped(value)
        if value is None or type(value) is list or type(value) is tuple:
            return None if value is None else write_node(value)
        raise _mismatch((list, tuple), value)

    read, shown = _array_reader(item.read), item.shown and _array_reader(item.shown)
    return _Form(write, read, annotation=list[Any] | None, plain=False, given=item.given, shown=shown)


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
    return _dump(bound)


def _bind_form(decorator: TypeDecorator[Any], inner: _Form, dialect: Dialect) -> _Form:
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
        again = read(_load(_pack(wire)))
        if _same(again, value):
            return wire
        no_equality = type(again) is type(value) and type(value).__eq__ is _IDENTITY
        if no_equality and _same(bind(again, dialect), bound):
            return wire
        raise EncodeError(f"{type(decorator).__qualname__} makes another value of what it was given to store")

    shown = inner.shown or read_bound or _as_it_is
    return _Form(write, read, plain=False, given=inner.given, shown=shown)


def _given(codec: TypeCodec) -> _Form:
    """What an application's own codec writes, which is any plain value. It is trusted no more than a TypeDecorator:
    each value is made anew once, and has to be written as before. Its equality is not asked: arrays have none."""

    def read(wire: Any) -> Any:
        return None if wire is None else codec.decode(wire)

    def write(value: Any) -> Any:
        value = _unwrapped(value)
        if value is None:
            return None
        wire = _dump(codec.encode(value))
        packed = _pack(wire)
        again = read(_load(packed))
        if type(again) is type(value) and _pack(_dump(codec.encode(again))) == packed:
            return wire
        raise EncodeError(f"the codec {codec.name} makes another value of what it was given to store")

    return _Form(write, read, plain=False, given=codec.name, shown=_as_it_is)


def _same(left: Any, right: Any) -> bool:
    """Compare more exactly than `==`, for which 1 is True, 1.0 is 1.00 and noon in Paris is eleven in London."""
    left, right = _unwrapped(left), _unwrapped(right)
    try:
        return _pack(_dump(left)) == _pack(_dump(right))
    except EncodeError:  # a type of the user's: it knows its own equality
        return type(left) is type(right) and bool(left == right)


# -- Which column type has which form ---------------------------------------------------------------------------------


class UnresolvedTypeError(UncacheableTypeError):
    """Raised when a type has no implementation for this dialect; it may have one for another."""


_ANY = _Form(lambda value: _dump(_unwrapped(value)))

# By `TypeEngine.python_type`, which every generic type and most types of the dialects name.
_BY_PYTHON_TYPE: dict[type, _Form] = {
    **{kind: _native(kind) for kind in (bool, str, bytes, Decimal, date)},
    int: _Form(_write_int, _read_int, int | bytes | None, verbatim=int, as_read=frozenset({int})),
    float: _Form(_write_float, annotation=float | int | None, verbatim=float),
    UUID: _Form(_write_uuid, annotation=UUID | None, verbatim=UUID),
    datetime: _Form(
        _write_datetime, _read_datetime, datetime | tuple[str] | None, as_read=frozenset({datetime, types.NoneType})
    ),
    time: _dynamic(time),
    timedelta: _dynamic(timedelta),
}

# By class, for types that name no Python type or one that is too narrow.
_BY_CLASS: tuple[tuple[tuple[type[Any], ...], _Form], ...] = (
    ((sa.JSON,), _dynamic(dict, list, str, int, float, bool, Decimal)),
    ((pg.HSTORE,), _dynamic(dict)),
    ((pg.INET, pg.CIDR), _dynamic(str, *_IP_KINDS)),
    ((pg.MACADDR, pg.MACADDR8, pg.MONEY, pg.TSVECTOR, pg.TSQUERY, pg.REGCLASS, pg.REGCONFIG), _native(str)),
    ((pg.OID,), _BY_PYTHON_TYPE[int]),
    ((AbstractSingleRange,), _dynamic(Range)),
    ((AbstractMultiRange,), _dynamic(MultiRange)),
)


def resolved(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """A column type as the dialect implements it. Raises UncacheableTypeError."""
    _refuse_own_processors(type_)
    impl = _implementation(type_, dialect)
    _refuse_own_processors(impl)
    return impl


def _implementation(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    try:
        return type_.dialect_impl(dialect)  # knows `with_variant` and `TypeDecorator.load_dialect_impl`
    except Exception as error:
        raise UnresolvedTypeError(
            f"{_name(type_)} has no implementation for {dialect.name}: {type(error).__name__}: {error}"
        ) from error


def _codec_of(type_: TypeEngine[Any], dialect: Dialect, codecs: Codecs) -> TypeCodec | None:
    def nearest(kind: type[Any]) -> TypeCodec | None:
        return next((codecs[each] for each in kind.__mro__ if each in codecs), None)

    if not codecs:
        return None
    return nearest(type(type_)) or nearest(type(_implementation(type_, dialect)))


def _form(type_: TypeEngine[Any], dialect: Dialect, codecs: Codecs) -> _Form:
    """Choose the wire form of a column type, as the dialect implements it. Raises UncacheableTypeError."""
    if codec := _codec_of(type_, dialect, codecs):
        return _given(codec)
    impl = resolved(type_, dialect)
    if isinstance(impl, sa.PickleType):
        raise UncacheableTypeError("PickleType holds pickles, and nothing in the cache may be one; use JSON instead")
    if isinstance(impl, sa.Interval):  # a TypeDecorator in name: where it is emulated it brings its own processors
        return _BY_PYTHON_TYPE[timedelta]
    if isinstance(impl, TypeDecorator):
        return _decorated(impl, dialect, codecs)
    if isinstance(impl, NullType):
        raise UncacheableTypeError("the column has no type (NullType); give it the type that it has in the database")
    if isinstance(impl, UserDefinedType):
        raise UncacheableTypeError(
            f"{_name(type_)} is a UserDefinedType, whose values could be anything; wrap a type of SQLAlchemy in a "
            "TypeDecorator instead"
        )
    if isinstance(impl, sa.ARRAY):
        return _array(_form(impl.item_type, dialect, codecs))
    if isinstance(impl, pg.DOMAIN):  # has no processors: values are what the driver makes of the type below it
        return _ANY
    if isinstance(impl, sa.Enum):
        return _native(str) if impl.enum_class is None else _enum(impl.enum_class)
    if isinstance(impl, pg.BIT) and BitString:
        return _dynamic(str, BitString)
    for classes, form in _BY_CLASS:
        if isinstance(impl, classes):
            return form
    try:
        python_type = impl.python_type
    except NotImplementedError:  # SQLAlchemy 2.0 raises, 2.1 says `object`
        python_type = object
    if python_type in _BY_PYTHON_TYPE:
        return _BY_PYTHON_TYPE[python_type]
    raise UncacheableTypeError(f"{_name(type_)} has values of no known wire form; convert them in a TypeDecorator")


def _decorated(decorator: TypeDecorator[Any], dialect: Dialect, codecs: Codecs) -> _Form:
    inner = _form(decorator.impl_instance, dialect, codecs)
    binds = type(decorator).process_bind_param is not TypeDecorator.process_bind_param
    results = type(decorator).process_result_value is not TypeDecorator.process_result_value
    if results and binds:
        return _bind_form(decorator, inner, dialect)
    if results:
        raise UncacheableTypeError(
            f"{_name(decorator)} defines process_result_value alone, so that nothing can be stored from which its "
            "values could be made again; define process_bind_param too"
        )
    return inner


def own_processors(type_: TypeEngine[Any]) -> Sequence[str]:
    """The methods by which a type that is not SQLAlchemy's own makes other values of those that it is given."""
    for cls in type(type_).__mro__:
        own = {"bind_processor", "result_processor"} & vars(cls).keys()
        if own and cls.__module__.partition(".")[0] != "sqlalchemy":
            return sorted(own)
    return ()


def _refuse_own_processors(type_: TypeEngine[Any]) -> None:
    if own := own_processors(type_):
        raise UncacheableTypeError(
            f"{_name(type_)} overrides {' and '.join(own)}, so that its values could be anything; use a "
            "TypeDecorator with process_bind_param and process_result_value"
        )


def _name(type_: TypeEngine[Any]) -> str:
    return f"{type(type_).__module__}.{type(type_).__qualname__}"
