"""The wire form of any plain value: msgpack that says of each value which type it has, exact or refused.

Plain are Python's own numbers, texts, times and the like, SQLAlchemy's own ranges and bits, and lists, tuples and dicts
of all these. msgspec alone is not exact: it takes an `IntEnum` for an int, a tuple for a list. So types are compared
before it sees the value.

Three values come back as their plain form, on purpose: asyncpg's own subclass of `uuid.UUID` as `uuid.UUID`; what
`sqlalchemy.ext.mutable` wraps as the plain dict or list (the ORM wraps it again in its load event); and the name, if it
has one, of a `datetime.timezone` is dropped.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from types import NoneType
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

from msgspec import msgpack
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql.ranges import MultiRange, Range
from sqlalchemy.ext.mutable import Mutable

BitString: type[str] | None = getattr(pg, "BitString", None)
"""What a BIT column gives since SQLAlchemy 2.1; before, each driver gave a type of its own."""


class EncodeError(Exception):
    """Raised when a value is not exactly what its column's wire form can carry: the row is not cached.

    The text names types, never the value: it may be what an encrypting type is there to hide.
    """


class DecodeError(Exception):
    """Raised when bytes are not a row of the codec that reads them: damaged, foreign, or of another schema."""


pack = msgpack.Encoder(decimal_format="string", uuid_format="bytes").encode
_ATOMS = frozenset({NoneType, bool, float, str, bytes})
_STR = frozenset({str})
INT_MIN, INT_MAX = -(2**63), 2**64 - 1


def dump(value: Any) -> Any:
    """Give the self-describing wire form of a value: msgpack's own where that is exact, else one of `_EXTENSIONS`."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is int and INT_MIN <= value <= INT_MAX:
        return value
    if kind is list:
        return [item if type(item) in _ATOMS else dump(item) for item in value]
    if kind is dict:
        if not _STR.issuperset(map(type, value)):
            raise EncodeError("a dict with keys that are not str has no wire form")
        return {key: item if type(item) in _ATOMS else dump(item) for key, item in value.items()}
    extension = _EXTENSION_OF.get(UUID if is_asyncpg_uuid(kind) else kind)
    if extension is None:
        raise EncodeError(f"{kind.__module__}.{kind.__qualname__} has no wire form")
    return msgpack.Ext(extension.code, extension.dump(value))


def load_extension(code: int, data: memoryview) -> Any:
    return _EXTENSIONS[code].load(bytes(data))


load = msgpack.Decoder(ext_hook=load_extension).decode


class _Extension(NamedTuple):
    code: int
    kind: type
    dump: Callable[[Any], bytes]
    load: Callable[[bytes], Any]


def _as_text(code: int, kind: type, to_text: Callable[[Any], str], from_text: Callable[[str], Any]) -> _Extension:
    return _Extension(code, kind, lambda value: to_text(value).encode(), lambda data: from_text(data.decode()))


def dump_int(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)


def load_int(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def dump_datetime(value: datetime) -> str:
    """ISO 8601, and the name of a zone in brackets after it (RFC 9557), as psycopg's datetimes need it: a ZoneInfo is
    more than its offset once somebody adds a month."""
    zone = value.tzinfo
    if type(zone) is ZoneInfo and zone.key:
        return f"{value.isoformat()}[{zone.key}]"
    if value.fold or not (zone is None or type(zone) is timezone):
        raise EncodeError(f"a datetime with fold={value.fold} and tzinfo {type(zone).__qualname__} has no wire form")
    return value.isoformat()


def load_datetime(text: str) -> datetime:
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
    lower, upper, bounds, empty = load(data)
    if bounds not in ("[)", "(]", "[]", "()") or type(empty) is not bool:
        raise DecodeError("not a range")
    return Range(lower, upper, bounds=bounds, empty=empty)


def _load_multirange(data: bytes) -> MultiRange[Any]:
    ranges = MultiRange[Any](load(data))
    if not all(type(item) is Range for item in ranges):
        raise DecodeError("not a multirange")
    return ranges


IP_KINDS: tuple[type, ...] = (
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
        _Extension(1, int, dump_int, load_int),
        _as_text(2, Decimal, str, Decimal),
        _as_text(3, datetime, dump_datetime, load_datetime),
        _as_text(4, date, date.isoformat, date.fromisoformat),
        _as_text(5, time, _dump_time, time.fromisoformat),
        _Extension(
            6,
            timedelta,
            lambda value: pack((value.days, value.seconds, value.microseconds)),
            lambda data: timedelta(*msgpack.decode(data, type=tuple[int, int, int])),
        ),
        _Extension(7, UUID, lambda value: bytes(value.bytes), lambda data: UUID(bytes=data)),
        _Extension(8, tuple, lambda value: pack(dump(list(value))), lambda data: tuple(load(data))),
        _Extension(
            9,
            Range,
            lambda value: pack((dump(value.lower), dump(value.upper), value.bounds, value.empty)),
            _load_range,
        ),
        _Extension(10, MultiRange, lambda value: pack(dump(list(value))), _load_multirange),
        *([_as_text(11, BitString, str, BitString)] if BitString else []),
        *(_as_text(code, kind, str, kind) for code, kind in enumerate(IP_KINDS, start=12)),
    )
}
_EXTENSION_OF = {extension.kind: extension for extension in _EXTENSIONS.values()}


def is_asyncpg_uuid(kind: type) -> bool:
    return kind.__module__ == "asyncpg.pgproto.pgproto" and issubclass(kind, UUID)


def unwrapped(value: Any) -> Any:
    """Take off what `sqlalchemy.ext.mutable` puts around a loaded value: the ORM puts it on again by itself."""
    if not isinstance(value, Mutable):
        return value
    plain: type[Any] | None = next((kind for kind in (dict, list, set) if issubclass(type(value), kind)), None)
    return plain(value) if plain else value


def same(left: Any, right: Any) -> bool:
    """Compare more exactly than `==`, for which 1 is True, 1.0 is 1.00 and noon in Paris is eleven in London."""
    left, right = unwrapped(left), unwrapped(right)
    try:
        return pack(dump(left)) == pack(dump(right))
    except EncodeError:  # a type of the user's: it knows its own equality
        return type(left) is type(right) and bool(left == right)
