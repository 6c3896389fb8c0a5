"""Each way to map a class, with a row of it, how it is changed, and what a get of it is.

`tests/session/test_mappings.py` runs its tests over `MAPPINGS`.
"""

# ruff: noqa: ARG002 (the signatures are SQLAlchemy's)

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from uuid import UUID

import sqlmodel
from pgvector.sqlalchemy import Vector
from sqlalchemy import (
    CHAR,
    JSON,
    Column,
    Computed,
    Dialect,
    Enum,
    ForeignKey,
    Identity,
    Integer,
    LargeBinary,
    String,
    Table,
    TypeDecorator,
    Update,
    func,
    join,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.ext.mutable import MutableDict, MutableList
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    column_property,
    composite,
    mapped_column,
    reconstructor,
    synonym,
)
from sqlalchemy.types import TypeEngine, UserDefinedType

from asynccache import Cache


class Base(AsyncAttrs, DeclarativeBase):
    pass


# ------------------------------------------------------------------------------------------------------- primary keys


class Seat(Base):
    __tablename__ = "seat"
    line: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


class ByUuid(Base):
    __tablename__ = "by_uuid"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]


class GUID(TypeDecorator[UUID]):
    """UUIDs of the database where it has them, and text elsewhere: the usual recipe."""

    impl = CHAR
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.UUID())
        return dialect.type_descriptor(CHAR(36))

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else str(value if isinstance(value, UUID) else UUID(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> UUID | None:
        return value if value is None or isinstance(value, UUID) else UUID(value)


class ByGuid(Base):
    __tablename__ = "by_guid"
    id: Mapped[UUID] = mapped_column(GUID, primary_key=True)
    name: Mapped[str]


class Isbn(str):
    """A type of the application's."""

    __slots__ = ()


class IsbnType(TypeDecorator[Isbn]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else "isbn:" + value

    def process_result_value(self, value: Any, dialect: Dialect) -> Isbn | None:
        return None if value is None else Isbn(value.removeprefix("isbn:"))


class ByDecorated(Base):
    __tablename__ = "by_decorated"
    isbn: Mapped[Isbn] = mapped_column(IsbnType, primary_key=True)
    name: Mapped[str]


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


class ByEnum(Base):
    __tablename__ = "by_enum"
    colour: Mapped[Colour] = mapped_column(Enum(Colour), primary_key=True)
    name: Mapped[str]


class ByDay(Base):
    __tablename__ = "by_day"
    day: Mapped[date] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(primary_key=True)
    name: Mapped[str]


class ByCode(Base):
    __tablename__ = "by_code"
    code: Mapped[str] = mapped_column(CHAR(2), primary_key=True)
    name: Mapped[str]


class ByBytes(Base):
    __tablename__ = "by_bytes"
    digest: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    name: Mapped[str]


class ByIdentity(Base):
    __tablename__ = "by_identity"
    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str]


# -------------------------------------------------------------------------------------------------------- inheritance


class Animal(Base):
    """Joined."""

    __tablename__ = "animal"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    __tablename__ = "dog"
    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
    breed: Mapped[str]
    __mapper_args__ = {"polymorphic_identity": "dog"}


class Puppy(Dog):
    __tablename__ = "puppy"
    id: Mapped[int] = mapped_column(ForeignKey("dog.id"), primary_key=True)
    weeks: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "puppy"}


class Pet(Base):
    """Joined, and a subclass comes with all its columns when its base is asked for."""

    __tablename__ = "pet"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "pet"}


class Cat(Pet):
    __tablename__ = "cat"
    id: Mapped[int] = mapped_column(ForeignKey("pet.id"), primary_key=True)
    colour: Mapped[str]
    __mapper_args__ = {"polymorphic_identity": "cat", "polymorphic_load": "inline"}


class Vehicle(Base):
    """Single table."""

    __tablename__ = "vehicle"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "vehicle"}


class Car(Vehicle):
    doors: Mapped[int | None]
    __mapper_args__ = {"polymorphic_identity": "car"}


class Place(Base):
    """Joined, and nothing in the row tells of which class it is."""

    __tablename__ = "place"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Cafe(Place):
    __tablename__ = "cafe"
    id: Mapped[int] = mapped_column(ForeignKey("place.id"), primary_key=True)
    tables: Mapped[int]


class Shape(Base):
    """Concrete."""

    __tablename__ = "shape"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Circle(Shape):
    __tablename__ = "circle"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    radius: Mapped[int]
    __mapper_args__ = {"concrete": True}


class Employee(ConcreteBase, Base):
    """Concrete, and the base is asked for all of them."""

    __tablename__ = "employee"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_identity": "employee", "concrete": True}


class Manager(Employee):
    __tablename__ = "manager"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    budget: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "manager", "concrete": True}


pet = Base.metadata.tables["pet"]
manager = Base.metadata.tables["manager"]


class Named(Base):
    __abstract__ = True
    name: Mapped[str]


class OfAbstract(Named):
    __tablename__ = "of_abstract"
    id: Mapped[int] = mapped_column(primary_key=True)


# ---------------------------------------------------------------------------------------------------------- attributes


class Dataclass(MappedAsDataclass, Base):
    __tablename__ = "dataclass"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    note: Mapped[str] = mapped_column(default="none")


@dataclass
class Point:
    x: int
    y: int


class Attributes(Base):
    """composite(), synonym, hybrid, column_property, and a column that the database has by another name."""

    __tablename__ = "attributes"
    id: Mapped[int] = mapped_column("attributes_id", primary_key=True)
    name: Mapped[str] = mapped_column("db_name")
    x: Mapped[int] = mapped_column(Integer)
    y: Mapped[int] = mapped_column(Integer)
    point: Mapped[Point] = composite("x", "y")
    area: Mapped[int] = column_property(x * y)
    title = synonym("name")
    key = synonym("id")

    @hybrid_property
    def loud(self) -> str:
        return self.name.upper()


class Deferred(Base):
    __tablename__ = "deferred"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    text: Mapped[str] = mapped_column(deferred=True)
    front: Mapped[str] = mapped_column(deferred=True, deferred_group="cover")
    back: Mapped[str] = mapped_column(deferred=True, deferred_group="cover")
    never: Mapped[str] = mapped_column(deferred=True, deferred_raiseload=True)


class Mutables(Base):
    __tablename__ = "mutables"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    a_dict: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(JSON))
    a_list: Mapped[list[Any]] = mapped_column(MutableList.as_mutable(JSON))


class Versioned(Base):
    __tablename__ = "versioned"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}


class ServerSide(Base):
    __tablename__ = "server_side"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    made: Mapped[str] = mapped_column(server_default="by the database")
    changed: Mapped[str] = mapped_column(String, server_default="never", onupdate=func.lower("NOW"))
    length: Mapped[int] = mapped_column(Integer, Computed("length(name)"))


class Reconstructed(Base):
    __tablename__ = "reconstructed"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]

    @reconstructor
    def init_on_load(self) -> None:
        self.initial = self.name[0]


# ---------------------------------------------------------------------------------------------------- tables and joins

customer = Table("customer", Base.metadata, Column("id", Integer, primary_key=True), Column("name", String))
address = Table(
    "address",
    Base.metadata,
    Column("id", ForeignKey("customer.id"), primary_key=True),
    Column("street", String),
)


class CustomerWithAddress(Base):
    """Two tables, one row of each."""

    __table__ = join(customer, address)
    id = column_property(customer.c.id, address.c.id)
    name: Mapped[str]
    street: Mapped[str]


class Imperative:
    id: int
    name: str

    def __init__(self, id: int, name: str) -> None:  # noqa: A002
        self.id, self.name = id, name


Base.registry.map_imperatively(
    Imperative,
    Table("imperative", Base.metadata, Column("id", Integer, primary_key=True), Column("name", String)),
)


class Hero(sqlmodel.SQLModel, table=True):
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    name: str


# --------------------------------------------------------------------------------------------- left out, or told how to


class Geometry(UserDefinedType["Spot"]):
    """A type of the application's own, as GeoAlchemy has one."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "VARCHAR(40)"

    def bind_processor(self, dialect: Dialect) -> Any:
        return lambda spot: None if spot is None else f"{spot.x} {spot.y}"

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return lambda text: None if text is None else Spot(*map(int, text.split()))


class Spot:
    """Without an equality of its own."""

    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y


class Located(Base):
    __tablename__ = "located"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    spot: Mapped[Spot | None] = mapped_column(Geometry)


class Embedded(Base):
    """A vector of pgvector's, which without PostgreSQL's extension is kept as the text that it is sent as."""

    __tablename__ = "embedded"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    embedding: Mapped[Any] = mapped_column(Vector(3))


class LeftOut(Base):
    """A column is not stored, and its type need not be known."""

    __tablename__ = "left_out"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    large: Mapped[str]
    unknown: Mapped[Spot | None] = mapped_column(Geometry)


def register(cache: Cache) -> None:
    """All of them."""
    cache.codec_for(Geometry, encode=lambda spot: [spot.x, spot.y], decode=lambda plain: Spot(*plain))
    cache.codec_for(Vector, encode=list, decode=list)
    cache.register(Base)
    cache.register(LeftOut, exclude_columns=[LeftOut.large, "unknown"])
    cache.register(Imperative)
    cache.register(sqlmodel.SQLModel)


# ----------------------------------------------------------------------------------------------------------- the table


def _rename(instance: Any) -> None:
    instance.name = "changed"


def _rename_where(model: Any) -> Callable[[Any], Update]:
    def bulk(pk: Any) -> Update:
        columns = model.__mapper__.primary_key
        values = pk if isinstance(pk, tuple) else (pk,)
        return (
            update(model)
            .where(*(column == value for column, value in zip(columns, values, strict=True)))
            .values(name="changed in bulk")
        )

    return bulk


@dataclass(frozen=True)
class Mapping:
    """A row of the table.

    make: the instances that are added to have the row.
    pk: its primary key.
    asked: the class that is asked for; the row's own by default.
    change: what the unit of work is to write.
    bulk: an UPDATE of the same row, by its primary key.
    sees: an attribute, and the values that a get has to see after each of them.
    left_out: what a get that is answered from the cache does not have, although one from the database has.
    """

    name: str
    make: Callable[[], object]
    pk: Any = 1
    asked: type[Any] | None = None
    change: Callable[[Any], None] = _rename
    bulk: Callable[[Any], Update] | None = None
    sees: tuple[str, Any, Any] = ("name", "changed", "changed in bulk")
    left_out: frozenset[str] = frozenset()
    databases: Sequence[str] = ("sqlite", "postgresql")

    @property
    def model(self) -> type[Any]:
        return type(self.make())

    @property
    def get(self) -> type[Any]:
        return self.asked or self.model

    def update(self) -> Update:
        return (self.bulk or _rename_where(self.get))(self.pk)


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda instance: setattr(instance, name, value)


def _move(instance: Any) -> None:
    instance.point = Point(7, 8)


def _mutate(instance: Any) -> None:
    instance.a_dict["k"] = "changed"
    instance.a_list.append("changed")


GUID_1 = UUID("0a0b0c0d-0000-0000-0000-00000000000f")

MAPPINGS = [
    Mapping("composite primary key", lambda: Seat(line=1, number="ä b", name="n"), pk=(1, "ä b")),
    Mapping("UUID primary key", lambda: ByUuid(id=GUID_1, name="n"), pk=GUID_1),
    Mapping("TypeDecorator primary key, GUID", lambda: ByGuid(id=GUID_1, name="n"), pk=GUID_1),
    Mapping("TypeDecorator primary key", lambda: ByDecorated(isbn=Isbn("3"), name="n"), pk=Isbn("3")),
    Mapping("Enum primary key", lambda: ByEnum(colour=Colour.GREEN, name="n"), pk=Colour.GREEN),
    Mapping(
        "date and datetime primary key",
        lambda: ByDay(day=date(2024, 5, 6), at=datetime(2024, 5, 6, 7, 8, 9, 10), name="n"),  # noqa: DTZ001
        pk=(date(2024, 5, 6), datetime(2024, 5, 6, 7, 8, 9, 10)),  # noqa: DTZ001
    ),
    Mapping("CHAR primary key", lambda: ByCode(code="DE", name="n"), pk="DE"),
    Mapping("bytes primary key", lambda: ByBytes(digest=b"\0 \r\n", name="n"), pk=b"\0 \r\n"),
    Mapping("Identity", lambda: ByIdentity(name="n")),
    Mapping("joined, base", lambda: Animal(id=1, name="n")),
    Mapping("joined, subclass", lambda: Dog(id=1, name="n", breed="b"), bulk=_rename_where(Animal)),
    Mapping(
        "joined, subclass's table",
        lambda: Dog(id=1, name="n", breed="b"),
        change=_set("breed", "changed"),
        bulk=lambda pk: update(Dog).where(Dog.id == pk).values(breed="changed in bulk"),
        sees=("breed", "changed", "changed in bulk"),
    ),
    Mapping("joined, subclass by its base", lambda: Dog(id=1, name="n", breed="b"), asked=Animal),
    Mapping("joined, subclass by the root", lambda: Puppy(id=1, name="n", breed="b", weeks=3), asked=Animal),
    Mapping(
        "joined, subclass by the middle",
        lambda: Puppy(id=1, name="n", breed="b", weeks=3),
        asked=Dog,
        bulk=_rename_where(Animal),
    ),
    Mapping(
        "joined, inline subclass by its base",
        lambda: Cat(id=1, name="n", colour="c"),
        asked=Pet,
        bulk=lambda pk: update(pet).where(pet.c.id == pk).values(name="changed in bulk"),
    ),
    Mapping("joined without a discriminator", lambda: Cafe(id=1, name="n", tables=4), bulk=_rename_where(Place)),
    Mapping("single table, subclass", lambda: Car(id=1, name="n", doors=4)),
    Mapping("single table, subclass by its base", lambda: Car(id=1, name="n", doors=4), asked=Vehicle),
    Mapping("concrete, base", lambda: Shape(id=1, name="n")),
    Mapping("concrete, subclass", lambda: Circle(id=1, name="n", radius=2)),
    Mapping(
        "concrete, subclass of a polymorphic union",
        lambda: Manager(id=1, name="n", budget=3),
        bulk=lambda pk: update(manager).where(manager.c.id == pk).values(name="changed in bulk"),
    ),
    Mapping("abstract base", lambda: OfAbstract(id=1, name="n")),
    Mapping("MappedAsDataclass", lambda: Dataclass(id=1, name="n")),
    Mapping("another name in the database", lambda: Attributes(id=1, name="n", point=Point(2, 3))),
    Mapping(
        "composite()",
        lambda: Attributes(id=1, name="n", point=Point(2, 3)),
        change=_move,
        bulk=lambda pk: update(Attributes).where(Attributes.id == pk).values(x=9, y=8),
        sees=("point", Point(7, 8), Point(9, 8)),
    ),
    Mapping(
        "column_property",
        lambda: Attributes(id=1, name="n", point=Point(2, 3)),
        change=_set("x", 5),
        bulk=lambda pk: update(Attributes).where(Attributes.id == pk).values(x=6),
        sees=("area", 15, 18),
    ),
    Mapping(
        "synonym and hybrid",
        lambda: Attributes(id=1, name="n", point=Point(2, 3)),
        change=_set("title", "changed"),
        sees=("loud", "CHANGED", "CHANGED IN BULK"),
    ),
    Mapping("deferred columns", lambda: Deferred(id=1, name="n", text="t", front="f", back="b", never="r")),
    Mapping(
        "MutableDict and MutableList",
        lambda: Mutables(id=1, name="n", a_dict={"k": 1}, a_list=[1]),
        change=_mutate,
        bulk=lambda pk: update(Mutables).where(Mutables.id == pk).values(a_list=["changed in bulk"]),
        sees=("a_list", [1, "changed"], ["changed in bulk"]),
    ),
    Mapping("version_id_col", lambda: Versioned(id=1, name="n")),
    Mapping(
        "server defaults and computed columns",
        lambda: ServerSide(id=1, name="n"),
        sees=("length", len("changed"), len("changed in bulk")),
    ),
    Mapping("init_on_load", lambda: Reconstructed(id=1, name="n"), sees=("initial", "c", "c")),
    Mapping(
        "several tables, the first",
        lambda: CustomerWithAddress(id=1, name="n", street="s"),
        bulk=lambda pk: update(customer).where(customer.c.id == pk).values(name="changed in bulk"),
    ),
    Mapping(
        "several tables, the second",
        lambda: CustomerWithAddress(id=1, name="n", street="s"),
        change=_set("street", "changed"),
        bulk=lambda pk: update(address).where(address.c.id == pk).values(street="changed in bulk"),
        sees=("street", "changed", "changed in bulk"),
    ),
    Mapping("imperative", lambda: Imperative(1, "n")),
    Mapping("SQLModel", lambda: Hero(id=1, name="n")),
    Mapping(
        "exclude_columns",
        lambda: LeftOut(id=1, name="n", large="l", unknown=Spot(1, 2)),
        left_out=frozenset({"large", "unknown"}),
    ),
    Mapping(
        "a type with a codec",
        lambda: Located(id=1, name="n", spot=Spot(1, 2)),
        change=_set("spot", None),
        bulk=lambda pk: update(Located).where(Located.id == pk).values(spot=None, name="changed in bulk"),
        sees=("spot", None, None),
    ),
    Mapping("pgvector", lambda: Embedded(id=1, name="n", embedding=[1, 2, 3]), databases=("sqlite",)),
]
