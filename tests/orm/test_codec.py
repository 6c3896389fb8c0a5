"""The codec: what goes in comes out, exactly, or does not go in."""

# ruff: noqa: ARG002 (the signatures are SQLAlchemy's)

from __future__ import annotations

import collections
import contextlib
import enum
import ipaddress
import pickle
import random
import reprlib
import uuid
import zoneinfo
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from asyncpg.pgproto import pgproto
from msgspec import msgpack
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql.ranges import MultiRange, Range
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.ext.mutable import MutableDict, MutableList, MutableSet
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import NullType, TypeDecorator, TypeEngine, UserDefinedType

from asynccache.orm.codec import Codec, check_type, compile_codec
from asynccache.orm.column_types import UncacheableTypeError
from asynccache.orm.forms import TypeCodec
from asynccache.orm.wire import DecodeError, EncodeError

POSTGRESQL: Dialect = sa.make_url("postgresql+asyncpg://").get_dialect()()
SQLITE: Dialect = sa.make_url("sqlite+aiosqlite://").get_dialect()()

Type = TypeEngine[Any]
PARIS = zoneinfo.ZoneInfo("Europe/Paris")
BitString: Callable[[str], Any] | None = getattr(pg, "BitString", None)  # new in SQLAlchemy 2.1


class Colour(enum.Enum):
    RED = "r"
    BLUE = ("a", "tuple")
    AZURE = BLUE  # an alias


class Level(enum.IntEnum):
    LOW = 1


class Word(str):
    __slots__ = ()


class Access(enum.Flag):
    READ = 1
    WRITE = 2


def exact(value: Any) -> Any:
    """Give something that is equal for two values only if they are the same to the last detail."""
    if isinstance(value, dict):
        return type(value), [(exact(key), exact(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [exact(item) for item in value]
    if isinstance(value, Range):
        return Range, exact(value.lower), exact(value.upper), value.bounds, value.empty
    if isinstance(value, (datetime, time)):
        return type(value), value.isoformat(), type(value.tzinfo)
    return type(value), repr(value)


def codec_for(*types: Type, dialect: Dialect = POSTGRESQL) -> Codec:
    return compile_codec(types, dialect, {})


def there_and_back(type_: Type, value: Any, dialect: Dialect = POSTGRESQL) -> Any:
    codec = codec_for(type_, dialect=dialect)
    (decoded,) = codec.decode(codec.encode((value,)))
    return decoded


class Told(reprlib.Repr):
    """Tells tests apart, in a line at most and by the same words in every process: no addresses, and sets in order."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 80

    def repr_Ext(self, value: msgpack.Ext, level: int) -> str:  # noqa: N802 (named after the type)
        return f"Ext({value.code}, {value.data!r})"

    def repr_Point(self, value: Point, level: int) -> str:  # noqa: N802
        return f"Point({value.x}, {value.y})"


TOLD = Told()


# -- Values of every type ----------------------------------------------------------------------------------------------

GENERIC: list[tuple[Type, Any]] = [
    (sa.Integer(), 5),
    (sa.SmallInteger(), -1),
    (sa.BigInteger(), 2**63 - 1),
    (sa.BigInteger(), -(2**63)),
    (sa.BigInteger(), 2**64),
    (sa.Integer(), 10**100),
    (sa.Integer(), -(10**100)),
    (sa.String(), "héllo\x00😀"),
    (sa.Text(), ""),
    (sa.Unicode(), "ü"),
    (sa.UnicodeText(), "ü" * 70_000),
    (sa.Boolean(), True),
    (sa.Boolean(), False),
    (sa.LargeBinary(), b""),
    (sa.LargeBinary(), bytes(range(256))),
    (sa.Float(), 0.1),
    (sa.Float(), 1.0),
    (sa.Float(), -0.0),
    (sa.Float(), float("nan")),
    (sa.Float(), float("-inf")),
    (sa.Double(), 5e-324),
    (sa.Float(asdecimal=True), Decimal("0.5")),
    (sa.Numeric(), Decimal("1.500")),
    (sa.Numeric(), Decimal("1E+30")),
    (sa.Numeric(), Decimal("-0.00")),
    (sa.Numeric(), Decimal("NaN")),
    (sa.Numeric(), Decimal("-Infinity")),
    (sa.Numeric(), Decimal("1234567890" * 5)),
    (sa.Numeric(asdecimal=False), 2.5),
    (sa.Numeric(asdecimal=False), 2),
    (sa.Date(), date.min),
    (sa.Date(), date.max),
    (sa.Time(), time(1, 2, 3, 4)),
    (sa.Time(timezone=True), time(1, 2, tzinfo=timezone(timedelta(hours=-9, minutes=-30)))),
    (sa.DateTime(), datetime.min),  # noqa: DTZ901
    (sa.DateTime(), datetime(2024, 1, 2, 3, 4, 5, 678901)),  # noqa: DTZ001
    (sa.DateTime(timezone=True), datetime(2024, 1, 2, tzinfo=UTC)),
    (sa.DateTime(timezone=True), datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
    (sa.DateTime(timezone=True), datetime.max.replace(tzinfo=UTC)),
    (sa.DateTime(timezone=True), datetime(2024, 1, 2, tzinfo=timezone(timedelta(hours=5, minutes=45)))),
    (sa.DateTime(timezone=True), datetime(1890, 1, 2, tzinfo=timezone(timedelta(seconds=561)))),
    (sa.DateTime(timezone=True), datetime(2024, 7, 1, 12, tzinfo=PARIS)),
    (sa.DateTime(timezone=True), datetime(2024, 10, 27, 2, 30, tzinfo=PARIS)),
    (sa.DateTime(timezone=True), datetime(2024, 10, 27, 2, 30, tzinfo=PARIS, fold=1)),
    (sa.Interval(), timedelta(days=-3, microseconds=7)),
    (sa.Interval(), timedelta.max),
    (sa.Interval(native=False), timedelta.min),
    (sa.Enum(Colour), Colour.BLUE),
    (sa.Enum(Colour), Colour.AZURE),
    (sa.Enum(Level), Level.LOW),
    (sa.Enum(Access), Access.WRITE),
    (sa.Enum(Colour, values_callable=lambda cls: [member.name.lower() for member in cls]), Colour.RED),
    (sa.Enum("a", "b", name="ab"), "b"),
    (sa.Uuid(), uuid.UUID(int=7)),
    (sa.Uuid(as_uuid=False), str(uuid.UUID(int=7))),
    (sa.UUID(), uuid.UUID(int=2**128 - 1)),
    (sa.JSON(), {"a": [1, 2.5, 1.0, None, True, {"b": {}}], "big": 2**70, "é": "x", "": [[]]}),
    (sa.JSON(), []),
    (sa.JSON(), "text"),
    (sa.JSON(), 0),
    (sa.JSON(), False),
    (sa.JSON(), -(2**64)),
    (sa.JSON(), [Decimal("1.10")]),  # as a json_deserializer with parse_float=Decimal gives
]

POSTGRESQL_ONLY: list[tuple[Type, Any]] = [
    (pg.JSONB(), {"z": 1, "a": 2}),
    (pg.ARRAY(sa.Integer), [1, None, 2**63]),
    (pg.ARRAY(sa.Integer), []),
    (pg.ARRAY(sa.Integer, dimensions=2), [[1, 2], [3, None]]),
    (pg.ARRAY(sa.String, as_tuple=True), ("x", None)),
    (pg.ARRAY(sa.String, as_tuple=True, dimensions=2), (("x",), ("y",))),
    (pg.ARRAY(sa.Boolean), [True, False]),
    (pg.ARRAY(sa.Float), [1.0, float("inf")]),
    (pg.ARRAY(sa.Uuid()), [uuid.UUID(int=1)]),
    (pg.ARRAY(sa.LargeBinary), [b"\x00"]),
    (pg.ARRAY(sa.DateTime(timezone=True)), [datetime(2024, 1, 1, tzinfo=UTC)]),
    (pg.ARRAY(sa.DateTime()), [datetime(2024, 1, 1)]),  # noqa: DTZ001
    (pg.ARRAY(sa.Date()), [date(2024, 1, 1)]),
    (pg.ARRAY(sa.Time()), [time(1)]),
    (pg.ARRAY(sa.Interval()), [timedelta(1, 2, 3)]),
    (pg.ARRAY(sa.Numeric), [Decimal("1.20")]),
    (pg.ARRAY(pg.JSONB), [{"a": [1]}, [2], "x", None]),
    (pg.ARRAY(sa.Enum(Colour, name="colours")), [Colour.RED, None, Colour.BLUE]),
    (pg.ARRAY(sa.Enum(Colour, name="colours"), dimensions=2), [[Colour.RED], [Colour.BLUE]]),
    (pg.ARRAY(sa.Enum(Colour, name="colours"), as_tuple=True), (Colour.RED,)),
    (sa.ARRAY(sa.Integer), [1]),
    (pg.HSTORE(), {"a": "1", "b": None}),
    (pg.INET(), "10.0.0.1"),
    (pg.INET(), ipaddress.ip_interface("10.0.0.1/8")),
    (pg.INET(), ipaddress.ip_address("fe80::1%eth0")),
    (pg.CIDR(), ipaddress.ip_network("10.0.0.0/8")),
    (pg.CIDR(), ipaddress.ip_network("2001:db8::/32")),
    (pg.MACADDR(), "08:00:2b:01:02:03"),
    (pg.MACADDR8(), "08:00:2b:01:02:03:04:05"),
    (pg.MONEY(), "$1.00"),
    (pg.OID(), 7),
    (pg.REGCLASS(), "pg_class"),
    (pg.REGCONFIG(), "english"),
    (pg.TSVECTOR(), "'cat':1"),
    (pg.TSQUERY(), "'cat' & 'dog'"),
    (pg.CITEXT(), "Cat"),
    (pg.BYTEA(), b"\xff"),
    (pg.INTERVAL(), timedelta(hours=1)),
    (pg.TIMESTAMP(timezone=True), datetime(2024, 1, 1, tzinfo=UTC)),
    (pg.ENUM(Colour, name="colours"), Colour.RED),
    (pg.ENUM("a", "b", name="letters"), "a"),
    (pg.DOMAIN("positive", sa.Integer), 1),
    (pg.DOMAIN("amount", sa.Numeric), Decimal("1.0")),
    (pg.DOMAIN("colour", sa.Enum(Colour)), "RED"),  # a domain has no processors: this is what the driver gave
    (pg.INT4RANGE(), Range(1, 5)),
    (pg.INT8RANGE(), Range(None, 2**70, bounds="()")),
    (pg.INT4RANGE(), Range(empty=True)),
    (pg.NUMRANGE(), Range(Decimal("1.0"), Decimal("2.50"), bounds="[]")),
    (pg.DATERANGE(), Range(date(2024, 1, 1), None)),
    (pg.TSRANGE(), Range(datetime(2024, 1, 1), None)),  # noqa: DTZ001
    (pg.TSTZRANGE(), Range(datetime(2024, 1, 1, tzinfo=UTC), None, bounds="(]")),
    (pg.INT4MULTIRANGE(), MultiRange([Range(1, 3), Range(5, 9)])),
    (pg.INT4MULTIRANGE(), MultiRange([])),
    (pg.TSTZMULTIRANGE(), MultiRange([Range(datetime(2024, 1, 1, tzinfo=UTC), None)])),
]
BITS: list[tuple[Type, Any]] = (
    [(pg.BIT(4), BitString("0101")), (pg.BIT(varying=True), BitString(""))] if BitString else []
)

ALL = GENERIC + POSTGRESQL_ONLY + BITS


@pytest.mark.parametrize(("type_", "value"), ALL, ids=TOLD.repr)
def test_a_value_comes_back_as_it_was(type_: Type, value: Any) -> None:
    assert exact(there_and_back(type_, value)) == exact(value)


@pytest.mark.parametrize("dialect", [SQLITE, DefaultDialect()], ids=["sqlite", "default"])
@pytest.mark.parametrize(("type_", "value"), GENERIC, ids=TOLD.repr)
def test_on_other_dialects_too(type_: Type, value: Any, dialect: Dialect) -> None:
    assert exact(there_and_back(type_, value, dialect)) == exact(value)


@pytest.mark.parametrize("type_", [type_ for type_, _ in ALL], ids=TOLD.repr)
def test_null_comes_back_as_none(type_: Type) -> None:
    assert there_and_back(type_, None) is None


@pytest.mark.parametrize("type_", [type_ for type_, _ in ALL], ids=TOLD.repr)
def test_every_such_type_is_accepted_before_the_dialect_is_known(type_: Type) -> None:
    check_type(type_, None, {})


def test_a_row_keeps_the_order_of_its_columns() -> None:
    codec = codec_for(*(type_ for type_, _ in ALL))
    row = tuple(value for _, value in ALL)
    assert exact(codec.decode(codec.encode(row))) == exact(row)


def test_a_row_may_have_no_columns() -> None:
    codec = codec_for()
    assert codec.decode(codec.encode(())) == ()


def test_a_zone_is_kept_by_its_name_and_not_as_an_offset() -> None:
    summer = there_and_back(sa.DateTime(timezone=True), datetime(2024, 7, 1, 12, tzinfo=PARIS))
    assert summer.tzinfo is PARIS
    assert (summer + timedelta(days=180)).utcoffset() == timedelta(hours=1)


def test_asyncpgs_uuid_comes_back_as_the_standard_librarys() -> None:
    theirs = pgproto.UUID("12345678123456781234567812345678")
    for type_, value in ((sa.Uuid(), theirs), (pg.ARRAY(sa.Uuid()), [theirs])):
        decoded = there_and_back(type_, value)
        assert decoded == value
        assert type(decoded[0] if isinstance(decoded, list) else decoded) is uuid.UUID


def test_mutable_wrappers_come_back_as_what_they_wrap() -> None:
    assert exact(there_and_back(sa.JSON(), MutableDict({"a": 1}))) == exact({"a": 1})
    assert exact(there_and_back(pg.ARRAY(sa.Integer), MutableList([1]))) == exact([1])
    assert exact(there_and_back(pg.ARRAY(sa.Enum(Colour)), MutableList([Colour.RED]))) == exact([Colour.RED])
    assert exact(there_and_back(pg.HSTORE(), MutableDict({"a": None}))) == exact({"a": None})
    assert there_and_back(Tags(), MutableSet({"a"})) == {"a"}


def test_each_decode_gives_fresh_objects() -> None:
    codec = codec_for(sa.JSON(), pg.ARRAY(sa.Integer))
    data = codec.encode(({"a": [1]}, [1]))
    for _ in range(2):
        document, array = codec.decode(data)
        assert (document, array) == ({"a": [1]}, [1])
        document["a"].append(2)
        array.append(2)


def test_encoding_leaves_the_value_alone() -> None:
    value = {"a": [1, {"b": 2**70}]}
    codec_for(sa.JSON()).encode((value,))
    assert value == {"a": [1, {"b": 2**70}]}


def test_a_variant_is_judged_and_stored_as_its_dialect_implements_it() -> None:
    type_ = sa.String().with_variant(sa.Integer(), "postgresql")
    assert there_and_back(type_, 1, POSTGRESQL) == 1
    assert there_and_back(type_, "1", SQLITE) == "1"
    with pytest.raises(EncodeError):
        there_and_back(type_, 1, SQLITE)


# -- Values that are not what their column says ------------------------------------------------------------------------

NAIVE = datetime(2024, 1, 1)  # noqa: DTZ001
SELF_CONTAINING: list[Any] = []
SELF_CONTAINING.append(SELF_CONTAINING)


class OtherZone(zoneinfo.ZoneInfo):
    pass


TRAPS: list[tuple[Type, Any]] = [
    (sa.Integer(), True),
    (sa.Integer(), 1.0),
    (sa.Integer(), "1"),
    (sa.Integer(), Level.LOW),
    (sa.Integer(), Decimal(1)),
    (sa.Integer(), b"\x01"),
    (sa.String(), 1),
    (sa.String(), b"x"),
    (sa.String(), Word("x")),
    (sa.String(), sa.sql.quoted_name("x", quote=True)),
    (sa.String(), "\ud800"),
    (sa.String(), uuid.UUID(int=1)),
    (sa.String(), NAIVE),
    (sa.Boolean(), 1),
    (sa.Boolean(), 0),
    (sa.Boolean(), "true"),
    (sa.Float(), True),
    (sa.Float(), Decimal(1)),
    (sa.Float(), "1.0"),
    (sa.Float(), 2**64),
    (sa.Numeric(), 1.0),
    (sa.Numeric(), 1),
    (sa.Numeric(), "1"),
    (sa.LargeBinary(), "x"),
    (sa.LargeBinary(), bytearray(b"x")),
    (sa.LargeBinary(), memoryview(b"x")),
    (sa.Date(), NAIVE),
    (sa.Date(), "2024-01-01"),
    (sa.DateTime(), date(2024, 1, 1)),
    (sa.DateTime(), "2024-01-01T00:00:00"),
    (sa.DateTime(), NAIVE.replace(fold=1)),
    (sa.DateTime(), NAIVE.replace(tzinfo=OtherZone("Europe/Paris"))),
    (sa.Time(), NAIVE),
    (sa.Time(), time(1, fold=1)),
    (sa.Time(), time(1, tzinfo=PARIS)),
    (sa.Interval(), 5),
    (sa.Enum(Colour), "RED"),
    (sa.Enum(Colour), Level.LOW),
    (sa.Enum(Access), Access.READ | Access.WRITE),
    (sa.Enum("a", "b"), Colour.RED),
    (sa.Uuid(), "00000000-0000-0000-0000-000000000007"),
    (sa.Uuid(as_uuid=False), uuid.UUID(int=7)),
    (sa.JSON(), (1, 2)),
    (sa.JSON(), [(1, 2), {1, 2}]),
    (sa.JSON(), {1: "a"}),
    (sa.JSON(), {None: "a"}),
    (sa.JSON(), {Word("a"): 1}),
    (sa.JSON(), {"a": Word("b")}),
    (sa.JSON(), {"a": Level.LOW}),
    (sa.JSON(), {"a": object()}),
    (sa.JSON(), {"a": bytearray(b"x")}),
    (sa.JSON(), {"\ud800": 1}),
    (sa.JSON(), collections.OrderedDict(a=1)),
    (sa.JSON(), [collections.defaultdict(int)]),
    (sa.JSON(), NAIVE),
    (sa.JSON(), sa.JSON.NULL),
    (sa.JSON(), SELF_CONTAINING),
    (pg.ARRAY(sa.Integer), {1, 2}),
    (pg.ARRAY(sa.Integer), [Level.LOW]),
    (pg.ARRAY(sa.Integer), "12"),
    (pg.ARRAY(sa.Enum(Colour)), ["RED"]),
    (pg.ARRAY(sa.Enum(Colour)), Colour.RED),
    (pg.HSTORE(), [("a", "b")]),
    (pg.HSTORE(), {"a": Word("b")}),
    (pg.INET(), 1),
    (pg.INT4RANGE(), (1, 2)),
    (pg.INT4RANGE(), Range(Level.LOW, 2)),
    (pg.INT4MULTIRANGE(), [Range(1, 2)]),
    (pg.TSVECTOR(), ["cat"]),
    (pg.OID(), "7"),
    (pg.DOMAIN("any", sa.Integer), object()),
]


@pytest.mark.parametrize(("type_", "value"), TRAPS, ids=lambda case: type(case).__name__)
def test_a_value_that_would_come_back_changed_is_refused(type_: Type, value: Any) -> None:
    codec = codec_for(sa.Integer(), type_)
    with pytest.raises(EncodeError):
        codec.encode((1, value))


def test_a_row_of_another_length_is_refused() -> None:
    codec = codec_for(sa.Integer(), sa.Integer())
    for row in ((), (1,), (1, 2, 3)):
        with pytest.raises(EncodeError):
            codec.encode(row)


def test_a_refusal_names_types_and_never_the_value() -> None:
    with pytest.raises(EncodeError, match=r"a column of int held builtins\.str") as refusal:
        codec_for(sa.Integer()).encode(("secret",))
    assert "secret" not in str(refusal.value)


# -- TypeDecorators ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Money:
    amount: Decimal
    currency: str


class MoneyType(TypeDecorator[Money]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Money | None, dialect: Dialect) -> str | None:
        return None if value is None else f"{value.amount}|{value.currency}"

    def process_result_value(self, value: str | None, dialect: Dialect) -> Money | None:
        if value is None:
            return None
        amount, currency = value.split("|")
        return Money(Decimal(amount), currency)


class Encrypted(TypeDecorator[str]):
    """Never the same bytes twice, as a cipher with a nonce gives."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes:
        nonce = random.randbytes(4)
        key = nonce * 1000
        return nonce + bytes(left ^ right for left, right in zip((value or "").encode(), key, strict=False))

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str:
        assert value is not None
        return bytes(left ^ right for left, right in zip(value[4:], value[:4] * 1000, strict=False)).decode()


class HashedWhenWritten(TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str:
        return f"hash of {value}"


class ReadOnly(TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return value


class Lowered(TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value.lower() if value else value

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return value


class Guid(TypeDecorator[uuid.UUID]):
    """SQLAlchemy's own recipe: on PostgreSQL it sends a str for a column that answers with a UUID."""

    impl = sa.CHAR
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Type:
        return dialect.type_descriptor(sa.UUID() if dialect.name == "postgresql" else sa.CHAR(32))

    def process_bind_param(self, value: uuid.UUID | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        return str(value) if dialect.name == "postgresql" else value.hex

    def process_result_value(self, value: Any, dialect: Dialect) -> uuid.UUID | None:
        return value if value is None or isinstance(value, uuid.UUID) else uuid.UUID(value)


class Utc(TypeDecorator[datetime]):
    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value


class TwiceWrapped(TypeDecorator[Money]):
    impl = MoneyType
    cache_ok = True

    def process_bind_param(self, value: Money | None, dialect: Dialect) -> Money | None:
        return None if value is None else Money(value.amount * 100, value.currency)

    def process_result_value(self, value: Money | None, dialect: Dialect) -> Money | None:
        return None if value is None else Money(value.amount / 100, value.currency)


class ColourCode(TypeDecorator[str]):
    impl = sa.Enum(Colour)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Colour | None:
        return None if value is None else Colour[value.upper()]

    def process_result_value(self, value: Colour | None, dialect: Dialect) -> str | None:
        return None if value is None else value.name.lower()


class Coordinates(TypeDecorator[tuple[float, float]]):
    impl = pg.JSONB
    cache_ok = True

    def process_bind_param(self, value: tuple[float, float] | None, dialect: Dialect) -> list[float] | None:
        return None if value is None else list(value)

    def process_result_value(self, value: list[float] | None, dialect: Dialect) -> tuple[float, float] | None:
        return None if value is None else (value[0], value[1])


class Point:
    """Without an equality of its own."""

    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y


class PointType(TypeDecorator[Point]):
    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: Point | None, dialect: Dialect) -> Any:
        return None if value is None else [value.x, value.y]

    def process_result_value(self, value: Any, dialect: Dialect) -> Point | None:
        return None if value is None else Point(*value)


class ForgetfulPointType(PointType):
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> Point | None:
        return None if value is None else Point(value[0], 0)


class LevelType(TypeDecorator[Level]):
    """Sends the member itself, since a driver takes it for the int that it is."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Level | None, dialect: Dialect) -> int | None:
        return value

    def process_result_value(self, value: int | None, dialect: Dialect) -> Level | None:
        return None if value is None else Level(value)


class WordType(TypeDecorator[Word]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Word | None, dialect: Dialect) -> str | None:
        return value

    def process_result_value(self, value: str | None, dialect: Dialect) -> Word | None:
        return None if value is None else Word(value)


class Tags(TypeDecorator[set[str]]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: set[str] | None, dialect: Dialect) -> str | None:
        return None if value is None else ",".join(sorted(value))

    def process_result_value(self, value: str | None, dialect: Dialect) -> set[str] | None:
        return None if value is None else set(value.split(","))


class NullMeansNothing(TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value or None

    def process_result_value(self, value: str | None, dialect: Dialect) -> str:
        return value or ""


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (MoneyType(), Money(Decimal("3.10"), "EUR")),
        (MoneyType(), None),
        (Encrypted(), "attack at dawn"),
        (HashedWhenWritten(), "the hash, as it was loaded"),
        (Lowered(), "low"),
        (Guid(), uuid.UUID(int=9)),
        (Utc(), datetime(2024, 1, 1, tzinfo=UTC)),
        (TwiceWrapped(), Money(Decimal("3.1"), "EUR")),
        (ColourCode(), "red"),
        (Coordinates(), (1.0, 2.0)),
        (NullMeansNothing(), ""),
        (LevelType(), Level.LOW),
        (WordType(), Word("x")),
        (Tags(), {"a", "b"}),
        (pg.ARRAY(MoneyType()), [Money(Decimal(1), "EUR"), None]),
        (pg.ARRAY(Guid(), dimensions=2), [[uuid.UUID(int=1)], [uuid.UUID(int=2)]]),
        (pg.ARRAY(ColourCode(), as_tuple=True), ("red", None)),
        (pg.ARRAY(NullMeansNothing()), ["", "x"]),
    ],
    ids=TOLD.repr,
)
@pytest.mark.parametrize("dialect", [POSTGRESQL, SQLITE], ids=["postgresql", "sqlite"])
def test_a_decorated_value_comes_back(type_: Type, value: Any, dialect: Dialect) -> None:
    decoded = there_and_back(type_, value, dialect)
    assert decoded == value
    assert type(decoded) is type(value)


def test_what_a_decorator_encrypts_is_encrypted_in_the_cache() -> None:
    assert b"attack" not in codec_for(Encrypted()).encode(("attack at dawn",))


def test_what_a_decorator_only_changes_when_writing_is_stored_as_it_was_loaded() -> None:
    assert there_and_back(HashedWhenWritten(), "loaded") == "loaded"


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (Lowered(), "LOUD"),
        (Utc(), datetime(2024, 1, 1, tzinfo=PARIS)),
        (Guid(), "not a uuid"),
        (MoneyType(), "no money"),
        (ColourCode(), "green"),
        (Coordinates(), [1.0, 2.0]),
        (NullMeansNothing(), None),
        (LevelType(), 1),
        (WordType(), "x"),
        (Tags(), ["a", "b"]),
        (ForgetfulPointType(), Point(1, 2)),
        (pg.ARRAY(Lowered()), ["low", "LOUD"]),
        (pg.ARRAY(Coordinates()), [(1.0, 2.0)]),  # its items cannot be told from the arrays around them
    ],
    ids=TOLD.repr,
)
def test_a_decorated_value_that_would_come_back_changed_is_refused(type_: Type, value: Any) -> None:
    with pytest.raises(EncodeError):
        codec_for(type_).encode((value,))


def test_a_value_without_equality_is_judged_by_what_it_sends_to_the_database() -> None:
    decoded = there_and_back(PointType(), Point(1, 2))
    assert (type(decoded), decoded.x, decoded.y) == (Point, 1, 2)


def test_a_decorator_sees_the_dialect_that_the_rows_come_from() -> None:
    assert uuid.UUID(int=9).hex.encode() in codec_for(Guid(), dialect=SQLITE).encode((uuid.UUID(int=9),))
    assert str(uuid.UUID(int=9)).encode() in codec_for(Guid()).encode((uuid.UUID(int=9),))


def test_a_decorator_that_fails_while_decoding_is_a_decode_error() -> None:
    stored = codec_for(sa.JSON()).encode(("no separator",))
    with pytest.raises(DecodeError):
        codec_for(MoneyType()).decode(stored)


# -- Types that are refused --------------------------------------------------------------------------------------------


class OwnString(sa.String):
    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return Word


class OwnDecorator(TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> None:
        return None


class OwnPickle(sa.PickleType):
    cache_ok = True


class DecoratedPickle(TypeDecorator[Any]):
    impl = sa.PickleType
    cache_ok = True


class Geometry(UserDefinedType[Any]):
    cache_ok = True


class Composite(TypeEngine[Any]):
    pass


class OnlyOnPostgresql(TypeDecorator[Any]):
    impl = sa.String
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Type:
        if dialect.name != "postgresql":
            raise NotImplementedError(dialect.name)
        return sa.Uuid()


@pytest.mark.parametrize("dialect", [None, POSTGRESQL, SQLITE], ids=["unknown", "postgresql", "sqlite"])
@pytest.mark.parametrize(
    ("type_", "reason"),
    [
        (sa.PickleType(), "PickleType holds pickles.*use JSON"),
        (OwnPickle(), "PickleType holds pickles"),
        (DecoratedPickle(), "PickleType holds pickles"),
        (pg.ARRAY(sa.PickleType()), "PickleType holds pickles"),
        (NullType(), "NullType"),
        (pg.ARRAY(NullType()), "NullType"),
        (Geometry(), "Geometry is a UserDefinedType"),
        (Composite(), "Composite has values of no known wire form"),
        (sa.types.TupleType(sa.Integer()), "TupleType has values of no known wire form"),
        (pg.JSONPATH(), "JSONPATH has values of no known wire form"),
        (mysql.YEAR(), "YEAR has values of no known wire form"),
        (OwnString(), "OwnString overrides result_processor.*use a TypeDecorator"),
        (pg.ARRAY(OwnString()), "OwnString overrides result_processor"),
        (OwnDecorator(), "OwnDecorator overrides bind_processor"),
        (ReadOnly(), "ReadOnly defines process_result_value alone.*define process_bind_param too"),
    ],
    ids=TOLD.repr,
)
def test_a_type_that_could_not_come_back_is_refused_with_its_reason(
    type_: Type, reason: str, dialect: Dialect | None
) -> None:
    with pytest.raises(UncacheableTypeError, match=reason):
        check_type(type_, dialect, {})
    with pytest.raises(UncacheableTypeError, match=reason):
        compile_codec([sa.Integer(), type_], dialect or DefaultDialect(), {})


@pytest.mark.sqlalchemy_2_0  # since 2.1 its values have a type of SQLAlchemy's
def test_bits_are_refused_where_each_driver_has_its_own_type_for_them() -> None:
    with pytest.raises(UncacheableTypeError, match="BIT has values of no known wire form"):
        check_type(pg.BIT(), POSTGRESQL, {})


def test_a_type_that_only_its_own_database_resolves_is_judged_when_that_is_known() -> None:
    check_type(OnlyOnPostgresql(), None, {})
    check_type(OnlyOnPostgresql(), POSTGRESQL, {})
    with pytest.raises(UncacheableTypeError, match=r"OnlyOnPostgresql has no implementation for sqlite"):
        check_type(OnlyOnPostgresql(), SQLITE, {})


class Spot(NamedTuple):
    x: int
    y: int


class GeometryOfOurs(Geometry):
    """A subclass, which has what its base was given."""


class Named(TypeDecorator[Any]):
    """What it sends is a value of the type below it."""

    impl = Geometry
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Spot | None:
        return None if value is None else Spot(*map(int, value.split(",")))

    def process_result_value(self, value: Spot | None, dialect: Dialect) -> str | None:
        return None if value is None else f"{value.x},{value.y}"


GIVEN: dict[type[Type], TypeCodec] = {
    Geometry: TypeCodec(encode=list, decode=lambda plain: Spot(*plain), name="Geometry, version 1")
}


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (Geometry(), Spot(1, 2)),
        (GeometryOfOurs(), Spot(1, 2)),
        (Geometry(), None),
        (sa.JSON().with_variant(Geometry(), "postgresql"), Spot(1, 2)),
        (pg.ARRAY(Geometry()), [Spot(1, 2), None, [Spot(3, 4)]]),
        (Named(), "1,2"),
        (pg.ARRAY(Named()), ["1,2", None]),
    ],
    ids=TOLD.repr,
)
def test_a_codec_that_was_given_serves_wherever_its_type_is(type_: Type, value: object) -> None:
    check_type(type_, POSTGRESQL, GIVEN)
    codec = compile_codec([sa.Integer(), type_], POSTGRESQL, GIVEN)
    assert codec.given == ("Geometry, version 1",)
    assert exact(codec.decode(codec.encode((5, value)))[1]) == exact(value)
    with pytest.raises(UncacheableTypeError):
        check_type(type_, POSTGRESQL, {})


def test_a_subclass_that_leaves_the_processors_alone_is_accepted() -> None:
    class Email(sa.String):
        pass

    assert there_and_back(Email(), "a@example.com", SQLITE) == "a@example.com"


# -- Bytes that are no row ---------------------------------------------------------------------------------------------

EXTENSION_CODES = range(-128, 128)
IP_KINDS = tuple(
    getattr(ipaddress, f"IPv{version}{kind}") for version in (4, 6) for kind in ("Address", "Interface", "Network")
)
Everything = tuple[Codec, bytes, list[tuple[type, ...]]]


@pytest.fixture(scope="module")
def everything() -> Everything:
    """A codec of all types above, a row of it, and the types that may stand in each column."""
    cases = [(type_, value) for type_, value in ALL if len(repr(value)) < 1000]
    cases += [(MoneyType(), Money(Decimal("3.10"), "EUR")), (pg.ARRAY(ColourCode()), [["red"], ["blue"]])]
    codec = codec_for(*(type_ for type_, _ in cases))
    json = (dict, list, str, int, float, bool, Decimal)
    kinds: list[tuple[type, ...]] = []
    for type_, value in cases:
        if isinstance(type_, (pg.DOMAIN, sa.JSON)):
            kinds.append((*json, bytes, datetime, date, time, timedelta, uuid.UUID, tuple, Range))
        elif isinstance(type_, sa.ARRAY):
            kinds.append((list, tuple))
        elif isinstance(type_, (pg.INET, pg.CIDR)):
            kinds.append((str, *IP_KINDS))
        elif isinstance(type_, (sa.Float, sa.Numeric)):
            kinds.append((Decimal,) if type(value) is Decimal else (float, int))
        elif isinstance(type_, pg.BIT):
            kinds.append((str, type(value)))
        else:
            kinds.append((type(value),))
    return codec, codec.encode(tuple(value for _, value in cases)), kinds


def decodes_or_refuses(codec: Codec, data: bytes, kinds: list[tuple[type, ...]]) -> bool:
    try:
        row = codec.decode(data)
    except DecodeError:
        return False
    assert type(row) is tuple
    assert len(row) == len(kinds)
    for value, allowed in zip(row, kinds, strict=True):
        assert value is None or type(value) in allowed
    return True


def test_truncated_anywhere_it_is_a_decode_error(everything: Everything) -> None:
    codec, data, kinds = everything
    assert decodes_or_refuses(codec, data, kinds)
    assert not any(decodes_or_refuses(codec, data[:end], kinds) for end in range(len(data)))
    assert not decodes_or_refuses(codec, data + b"\x00", kinds)


def test_any_flipped_bit_gives_an_error_or_values_of_the_right_types(everything: Everything) -> None:
    codec, data, kinds = everything
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            decodes_or_refuses(codec, bytes(flipped), kinds)


def test_random_bytes_give_an_error_or_values_of_the_right_types(everything: Everything) -> None:
    codec, data, kinds = everything
    source = random.Random(1)
    for _ in range(3000):
        assert not decodes_or_refuses(codec, source.randbytes(source.randrange(60)), kinds)
        spliced = bytearray(data)
        start = source.randrange(len(data))
        spliced[start : start + 4] = source.randbytes(source.randrange(8))
        decodes_or_refuses(codec, bytes(spliced), kinds)


SINGLE: list[tuple[Type, tuple[type, ...]]] = [
    (sa.Integer(), (int,)),
    (sa.DateTime(), (datetime,)),
    (sa.Time(), (time,)),
    (sa.Interval(), (timedelta,)),
    (sa.Uuid(), (uuid.UUID,)),
    (sa.Numeric(), (Decimal,)),
    (sa.Enum(Colour), (Colour,)),
    (pg.HSTORE(), (dict,)),
    (pg.INT4RANGE(), (Range,)),
    (pg.INT4MULTIRANGE(), (MultiRange,)),
    (pg.ARRAY(sa.Enum(Colour)), (list, tuple)),
]


@pytest.mark.parametrize(("type_", "kinds"), SINGLE, ids=TOLD.repr)
def test_every_extension_code_with_any_content_is_safe(type_: Type, kinds: tuple[type, ...]) -> None:
    codec = codec_for(type_)
    contents = [
        b"",
        b"\x00",
        b"x" * 16,
        b"\xff" * 12,
        b"../../etc/passwd",
        b"2024-01-01T00:00:00+00:00[../../etc/passwd]",
        b"2024-01-01T00:00:00[Europe/Paris]",
        b"2024-01-01T00:00:00+09:00[Europe/Paris]",
        msgpack.encode([1, 2, "{}", False]),
        msgpack.encode([1, 2, 3, 4]),
        msgpack.encode([2**63, 2**63, 2**63]),
        msgpack.encode("text"),
    ]
    for code in EXTENSION_CODES:
        for content in contents:
            decodes_or_refuses(codec, msgpack.encode([msgpack.Ext(code, content)]), [kinds])


def test_a_damaged_zone_is_refused() -> None:
    codec = codec_for(sa.DateTime(timezone=True))
    data = codec.encode((datetime(2024, 7, 1, 12, tzinfo=PARIS),))
    for damaged in (data.replace(b"+02:00", b"+09:00"), data.replace(b"Paris", b"Paros")):
        with pytest.raises(DecodeError):
            codec.decode(damaged)


@pytest.mark.parametrize(
    ("type_", "wire"),
    [
        (pg.INT4RANGE(), msgpack.Ext(9, msgpack.encode([1, 2, "{}", False]))),
        (pg.INT4RANGE(), msgpack.Ext(9, msgpack.encode([1, 2, "[)", 0]))),
        (pg.INT4MULTIRANGE(), msgpack.Ext(10, msgpack.encode([1, 2]))),
        (pg.ARRAY(sa.Enum(Colour)), [0, "RED"]),
        (pg.ARRAY(sa.Enum(Colour)), [7, [0, "RED"]]),
        (sa.Enum(Colour), "GREEN"),
        (sa.JSON(), msgpack.Ext(99, b"")),
    ],
    ids=TOLD.repr,
)
def test_well_formed_bytes_of_the_wrong_meaning_are_refused(type_: Type, wire: Any) -> None:
    with pytest.raises(DecodeError):
        codec_for(type_).decode(msgpack.encode([wire]))


class Exploit:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Exploit, "ran", True)


def test_a_pickle_is_never_run() -> None:
    bomb = pickle.dumps(Exploit())
    for type_, _ in ALL:
        codec = codec_for(type_)
        for data in (bomb, msgpack.encode([bomb]), *(msgpack.encode([msgpack.Ext(c, bomb)]) for c in EXTENSION_CODES)):
            with contextlib.suppress(DecodeError):
                codec.decode(data)
    assert not Exploit.ran
    pickle.loads(bomb)  # noqa: S301 (to see that it would have)
    assert Exploit.ran


def test_deep_nesting_is_an_error_and_not_a_crash() -> None:
    depth = 200_000
    nested: Any = None
    for _ in range(depth):
        nested = [nested]
    for type_ in (sa.JSON(), pg.ARRAY(sa.Integer), pg.ARRAY(sa.Enum(Colour)), PointType()):
        codec = codec_for(type_)
        with pytest.raises(EncodeError):
            codec.encode((nested,))
        for opening in (b"\x91", b"\x92\x01", b"\x81\xa1a"):
            with pytest.raises(DecodeError):
                codec.decode(b"\x91" + opening * depth + b"\xc0")


def test_deeply_nested_extensions_are_an_error_and_not_a_crash() -> None:
    for code in EXTENSION_CODES:
        data = msgpack.encode([1])
        for _ in range(2_000):
            data = msgpack.encode([msgpack.Ext(code, data)])
        for type_ in (sa.JSON(), pg.ARRAY(sa.Integer), pg.INT4MULTIRANGE()):
            with contextlib.suppress(DecodeError):  # as one enormous int it is fine
                codec_for(type_).decode(data)


# -- Real databases ----------------------------------------------------------------------------------------------------


async def assert_rows_survive(url: str, cases: list[tuple[Type, Any]], *prepare: str) -> None:
    """Write the values and a row of NULLs, read both through the driver, and see that a codec changes nothing."""
    metadata = sa.MetaData()
    columns = [sa.Column(f"c{i}", type_) for i, (type_, _) in enumerate(cases)]
    table = sa.Table("every_type", metadata, sa.Column("id", sa.Integer, primary_key=True), *columns)
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            for statement in prepare:
                await connection.execute(sa.text(statement))
            await connection.run_sync(metadata.create_all)
            await connection.execute(table.insert(), {"id": 1, **{f"c{i}": v for i, (_, v) in enumerate(cases)}})
            await connection.execute(table.insert(), {"id": 2})
            full, empty = (await connection.execute(table.select().order_by(table.c.id))).all()
        codec = compile_codec([column.type for column in table.columns], engine.dialect, {})
        for row in (full, empty):
            decoded = codec.decode(codec.encode(tuple(row)))
            changed = {
                str(column.type): (was, now)
                for column, was, now in zip(table.columns, row, decoded, strict=True)
                if exact(standard(was)) != exact(now)
            }
            assert changed == {}
    finally:
        await engine.dispose()


def standard(value: Any) -> Any:
    """Give the standard library's UUID for the driver's."""
    if isinstance(value, list):
        return type(value)(map(standard, value))
    return uuid.UUID(bytes=value.bytes) if isinstance(value, uuid.UUID) else value


REAL_POSTGRESQL: list[tuple[Type, Any]] = [
    *(
        (type_, value)
        for type_, value in GENERIC
        if not isinstance(type_, (sa.Integer, sa.BigInteger, sa.Enum, sa.Interval))
        and not (isinstance(value, str) and "\x00" in value)
        and not (isinstance(type_, sa.JSON) and "Decimal" in repr(value))
    ),
    *(
        (type_, value)
        for type_, value in POSTGRESQL_ONLY + BITS
        if not isinstance(type_, (sa.Enum, pg.DOMAIN, pg.INET, pg.CIDR, pg.INT8RANGE))
        and "9223372036854775808" not in repr(value)
        and "colours" not in repr(type_)
    ),
    (sa.Integer(), 5),
    (sa.BigInteger(), 2**63 - 1),
    (pg.INT8RANGE(), Range(None, 2**62, bounds="()")),
    (sa.Interval(), timedelta(days=-3, microseconds=7)),
    (sa.Enum(Colour, name="colour"), Colour.BLUE),
    (sa.Enum("a", "b", name="ab"), "b"),
    (pg.ARRAY(sa.Enum(Colour, name="colour")), [Colour.RED, Colour.BLUE]),
    (pg.DOMAIN("positive", sa.Integer, check="VALUE > 0"), 1),
    (pg.INET(), "10.0.0.1/8"),
    (pg.INET(), "2001:db8::1"),
    (pg.CIDR(), "10.0.0.0/8"),
    (MoneyType(), Money(Decimal("3.10"), "EUR")),
    (HashedWhenWritten(), "secret"),
    (Guid(), uuid.uuid4()),
    (pg.ARRAY(Guid()), [uuid.uuid4()]),
    (Utc(), datetime(2024, 1, 1, 5, tzinfo=PARIS)),
    (ColourCode(), "red"),
    (Coordinates(), (1.0, 2.5)),
]


async def test_rows_of_a_real_postgresql_survive(postgres_url: str) -> None:
    extensions = ("CREATE EXTENSION hstore", "CREATE EXTENSION citext")
    await assert_rows_survive(postgres_url, REAL_POSTGRESQL, *extensions)


REAL_SQLITE: list[tuple[Type, Any]] = [
    *(
        (type_, value)
        for type_, value in GENERIC
        if not isinstance(type_, (sa.Interval, sa.Numeric))  # few can be stored; see below
        and not (type(value) is int and value.bit_length() > 63)
        and not isinstance(value, Decimal)
        and "Decimal" not in repr(value)
    ),
    (sa.Interval(), timedelta(days=-3, microseconds=7)),
    (sa.Numeric(asdecimal=False), 2.0),
    (sa.Numeric(asdecimal=False), 2.5),
    (MoneyType(), Money(Decimal("3.10"), "EUR")),
    (HashedWhenWritten(), "secret"),
    (Guid(), uuid.uuid4()),
    (ColourCode(), "red"),
]


async def test_rows_of_a_real_sqlite_survive(sqlite_url: str) -> None:
    await assert_rows_survive(sqlite_url, REAL_SQLITE)


@pytest.mark.filterwarnings("ignore:Dialect sqlite.aiosqlite does .not. support Decimal")
async def test_decimals_of_a_real_sqlite_survive(sqlite_url: str) -> None:
    await assert_rows_survive(sqlite_url, [(sa.Numeric(10, 4), Decimal("1.5")), (sa.Numeric(), Decimal(-2))])


async def test_what_a_permissive_sqlite_holds_against_its_column_type_is_refused(sqlite_url: str) -> None:
    table = sa.Table("permissive", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("blob", sa.LargeBinary))
    engine = create_async_engine(sqlite_url)
    async with engine.begin() as connection:
        await connection.run_sync(table.metadata.create_all)
        await connection.exec_driver_sql("INSERT INTO permissive VALUES ('seven', NULL), (1.5, NULL)")
        rows = (await connection.execute(table.select())).all()
    await engine.dispose()
    codec = codec_for(*(column.type for column in table.columns), dialect=SQLITE)
    assert [type(row[0]) for row in rows] == [str, float]
    for row in rows:
        with pytest.raises(EncodeError):
            codec.encode(tuple(row))


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(sa.JSON(none_as_null=False)))


async def test_a_loaded_mutable_and_either_kind_of_null_come_back(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(
            sa.insert(Note),
            [{"document": {"a": [None]}}, {"document": sa.JSON.NULL}, {"document": None}],
        )
        await connection.execute(sa.insert(Note).values(document=sa.null()))
    async with AsyncSession(engine) as session:
        documents = (await session.scalars(sa.select(Note.document).order_by(Note.id))).all()
        notes = (await session.scalars(sa.select(Note).order_by(Note.id))).all()
        loaded = [note.document for note in notes]
    await engine.dispose()
    assert type(loaded[0]) is MutableDict
    decoded = [there_and_back(sa.JSON(), document, SQLITE) for document in loaded]
    assert exact(decoded) == exact(list(documents)) == exact([{"a": [None]}, None, None, None])
