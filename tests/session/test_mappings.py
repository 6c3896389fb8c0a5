"""Whatever a class is mapped to, and by: a get of it is served, and sees what was written.

The table of mappings is in `tests/mappings.py`. The tests up here run over all of it, on SQLite and in memory, and on
PostgreSQL and memcached; those below are about what is special to some.
"""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import warnings
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any, ClassVar

import pytest
import sqlmodel
from pgvector.sqlalchemy import Vector
from sqlalchemy import (
    Column,
    DateTime,
    MetaData,
    String,
    Table,
    delete,
    event,
    func,
    insert,
    inspect,
    literal,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.ext.declarative import AbstractConcreteBase, DeferredReflection
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, configure_mappers, mapped_column

from asynccache import AsyncCachedSession, AsyncCacheWarning, Cache, ConfigurationError, NotCacheableError
from asynccache.inspection import key_from_text
from tests.conftest import Sessions, Statements, ddl
from tests.mappings import (
    GUID_1,
    MAPPINGS,
    Animal,
    Attributes,
    Base,
    ByBytes,
    ByCode,
    ByDay,
    ByDecorated,
    ByEnum,
    ByGuid,
    Cafe,
    Car,
    Circle,
    Colour,
    CustomerWithAddress,
    Deferred,
    Dog,
    Embedded,
    Employee,
    Geometry,
    Isbn,
    LeftOut,
    Located,
    Manager,
    Mapping,
    OfAbstract,
    Place,
    Puppy,
    Shape,
    Spot,
    Vehicle,
    Versioned,
    address,
    customer,
    register,
)
from tests.servers import Postgres
from tests.session.slots import Slots

EVERYWHERE = [
    pytest.param(database, mapping, id=f"{mapping.name}-{database}")
    for database in ("sqlite", "postgresql")
    for mapping in MAPPINGS
    if database in mapping.databases
]


def _sql(url: str) -> str:
    metadata = Base.metadata
    if not url.startswith("sqlite"):  # PostgreSQL has no vectors without an extension
        metadata = type(metadata)()
        for table in Base.metadata.tables.values():
            if table is not Embedded.__table__:
                table.to_metadata(metadata)
    return f"{ddl(url, metadata)};{ddl(url, sqlmodel.SQLModel.metadata)}"


@pytest.fixture(scope="session")
def postgres_with_mappings(postgres: Postgres) -> str:
    """One database for all tests, which leave it empty."""
    url = postgres.create_database()
    postgres.execute(_sql(url), url)
    return url


@pytest.fixture
def database() -> str:
    return "sqlite"


@pytest.fixture
async def engine(request: pytest.FixtureRequest, database: str) -> AsyncIterator[AsyncEngine]:
    if database == "postgresql":
        engine = create_async_engine(request.getfixturevalue("postgres_with_mappings"))
    else:
        url = request.getfixturevalue("sqlite_url")
        with closing(sqlite3.connect(str(make_url(url).database))) as connection:
            connection.executescript(_sql("sqlite+aiosqlite://"))
        engine = create_async_engine(url)
    yield engine
    if database == "postgresql":
        names = ", ".join(table.name for table in (*Base.metadata.sorted_tables,) if table.name != "embedded")
        async with engine.begin() as connection:
            await connection.execute(text(f"TRUNCATE {names}, hero RESTART IDENTITY"))
    await engine.dispose()


@pytest.fixture
async def cache(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Cache]:
    url = f"{request.getfixturevalue('memcached_url')}?timeout=5" if database == "postgresql" else "memory://"
    async with Cache(url, lease_ttl=30) as cache:
        register(cache)
        yield cache


@dataclass
class World:
    """A mapping, its row in the database, and two ways to get it."""

    mapping: Mapping
    sessions: Sessions
    plain: async_sessionmaker[AsyncSession]
    cache: Cache
    statements: Statements

    async def warm(self) -> None:
        """Have the row in the cache."""
        await self.cache.drain()
        async with self.sessions() as session:
            await session.get(self.mapping.get, self.mapping.pk)
        await self.cache.drain()

    async def get(self, session: AsyncSession) -> Any:
        """Get the row from the cache."""
        self.statements.clear()
        hits = self.cache.stats.hits
        instance = await session.get(self.mapping.get, self.mapping.pk)
        assert instance is not None
        assert (self.statements, self.cache.stats.hits) == ([], hits + 1)
        return instance

    async def sees(self, value: object) -> None:
        """A get after a write reads the database, and the next one the cache; both see it all."""
        await self.cache.drain()  # its lock is gone
        for served in (False, True):
            async with self.sessions() as session, self.plain() as other:
                loaded = await other.get_one(self.mapping.get, self.mapping.pk)
                instance = await (self.get(session) if served else session.get(self.mapping.get, self.mapping.pk))
                assert getattr(instance, self.mapping.sees[0]) == value
                await are_alike(session, instance, other, loaded)
            await self.cache.drain()


async def are_alike(session: AsyncSession, instance: Any, other: AsyncSession, loaded: Any) -> None:
    """Neither what is there nor what is loaded later tells two instances of a row apart."""
    assert type(instance) is type(loaded)
    mapper = inspect(loaded).mapper
    columns = [each.key for each in mapper.column_attrs if each.instrument]
    for key in (*columns, *mapper.composites.keys(), *mapper.synonyms.keys()):
        if key == "never":  # which is never loaded
            continue
        one = await session.run_sync(read, instance, key)
        another = await other.run_sync(read, loaded, key)
        assert plain_value(one) == plain_value(another), key


def read(_: object, instance: object, key: str) -> object:
    """In `run_sync`, since it may have to be loaded."""
    return getattr(instance, key)


def plain_value(value: object) -> object:
    return (value.x, value.y) if isinstance(value, Spot) else value


@pytest.fixture
async def world(
    mapping: Mapping,
    sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    cache: Cache,
    statements: Statements,
) -> World:
    async with plain.begin() as session:
        session.add(mapping.make())
    world = World(mapping, sessions, plain, cache, statements)
    await world.warm()
    return world


# -------------------------------------------------------------------------------------------------------- all mappings


@pytest.mark.parametrize(("database", "mapping"), EVERYWHERE)
async def test_a_hit_is_what_the_database_gives(world: World, mapping: Mapping) -> None:
    async with world.sessions() as session, world.plain() as other:
        instance = await world.get(session)
        loaded = await other.get_one(mapping.get, mapping.pk)
        assert inspect(instance).unloaded - mapping.left_out == inspect(loaded).unloaded
        assert inspect(instance).unloaded >= mapping.left_out
        assert await session.get(mapping.get, mapping.pk) is instance
        await are_alike(session, instance, other, loaded)


@pytest.mark.parametrize(("database", "mapping"), EVERYWHERE)
async def test_a_hit_by_a_dict(world: World, mapping: Mapping) -> None:
    mapper = inspect(mapping.get)
    names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    values = mapping.pk if isinstance(mapping.pk, tuple) else (mapping.pk,)
    world.statements.clear()
    async with world.sessions() as session:
        instance = await session.get(mapping.get, dict(zip(names, values, strict=True)))
        assert instance is await session.get(mapping.get, mapping.pk)
    assert (world.statements, world.cache.stats.hits) == ([], 1)


@pytest.mark.parametrize(("database", "mapping"), EVERYWHERE)
async def test_each_kind_of_write_is_seen_and_locks_one_row(world: World, mapping: Mapping) -> None:
    locks = world.cache.stats.locks
    async with world.sessions.begin() as session:
        instance = await world.get(session)
        await session.run_sync(lambda _: mapping.change(instance))
    assert world.cache.stats.locks == locks + 1
    await world.sees(mapping.sees[1])

    async with world.sessions.begin() as session:
        await session.execute(mapping.update())
    assert world.cache.stats.locks == locks + 2
    await world.sees(mapping.sees[2])

    async with world.sessions.begin() as session:
        await session.delete(await world.get(session))
    assert world.cache.stats.locks == locks + 3
    for _ in range(2):
        async with world.sessions() as session:
            assert await session.get(mapping.get, mapping.pk) is None
        await world.cache.drain()


# --------------------------------------------------------------------------------------- a row, and who asks for it how


@dataclass
class Gets:
    """Gets in sessions of their own, and what they cost."""

    sessions: Sessions
    cache: Cache
    statements: Statements

    async def __call__(self, model: type[Any], pk: Any = 1) -> tuple[Any, str]:
        await self.cache.drain()
        hits, selects = self.cache.stats.hits + self.cache.stats.negative_hits, len(self.statements)
        async with self.sessions() as session:
            instance = await session.get(model, pk)
            session.expunge_all()
        served = self.cache.stats.hits + self.cache.stats.negative_hits > hits
        assert (len(self.statements) == selects) == served
        await self.cache.drain()
        return instance, "cache" if served else "database"


@pytest.fixture
def gets(sessions: Sessions, cache: Cache, statements: Statements) -> Gets:
    return Gets(sessions, cache, statements)


@pytest.fixture
async def zoo(plain: async_sessionmaker[AsyncSession]) -> None:
    async with plain.begin() as session:
        session.add_all(
            [
                Puppy(id=1, name="Pia", breed="b", weeks=3),
                Animal(id=2, name="Ann"),
                Car(id=1, name="c", doors=4),
                Cafe(id=1, name="p", tables=4),
                Shape(id=1, name="shape"),
                Circle(id=1, name="circle", radius=2),
                Manager(id=1, name="m", budget=3),
            ]
        )


BOTH = pytest.mark.parametrize("database", ["sqlite", "postgresql"])


@BOTH
@pytest.mark.usefixtures("zoo")
async def test_a_row_that_was_loaded_by_its_base_serves_those_who_ask_for_no_more(gets: Gets) -> None:
    assert (await gets(Dog))[1] == "database"
    for model, source in ((Dog, "cache"), (Animal, "cache"), (Puppy, "database")):
        puppy, answered_by = await gets(model)
        assert (type(puppy), answered_by) == (Puppy, source)
    for model in (Dog, Animal, Puppy):  # by now all of the row is there, and it is in one slot
        puppy, answered_by = await gets(model)
        assert answered_by == "cache"
        assert not {"breed", "weeks"} & inspect(puppy).unloaded


@BOTH
@pytest.mark.usefixtures("zoo")
async def test_what_the_base_does_not_load_is_loaded_by_one_select(
    gets: Gets, sessions: Sessions, statements: Statements
) -> None:
    await gets(Animal)
    assert (await gets(Animal))[1] == "cache"
    async with sessions() as session:
        puppy = await session.get_one(Animal, 1)
        assert isinstance(puppy, Puppy)
        assert inspect(puppy).unloaded == {"breed", "weeks"}
        statements.clear()
        assert (await puppy.awaitable_attrs.weeks, puppy.breed) == (3, "b")
        assert len(statements) == 1


@pytest.mark.usefixtures("zoo")
async def test_who_asks_for_the_subclass_while_its_base_loads_the_row_loads_for_himself(
    sessions: Sessions, cache: Cache
) -> None:
    async def get(model: type[Any]) -> Any:
        async with sessions() as session:
            return await session.get(model, 1)

    puppies = await asyncio.gather(*[get(model) for model in (Animal, Puppy, Animal, Puppy)])
    assert [inspect(puppy).unloaded for puppy in puppies] == [{"breed", "weeks"}, set(), {"breed", "weeks"}, set()]
    await cache.drain()


@BOTH
@pytest.mark.usefixtures("zoo")
async def test_a_row_of_another_class_is_none(gets: Gets) -> None:
    for model, pk in ((Puppy, 1), (Animal, 2), (Vehicle, 1)):
        await gets(model, pk)
    assert await gets(Dog, 2) == (None, "cache")
    assert await gets(Puppy, 2) == (None, "cache")
    car, answered_by = await gets(Car)
    assert (car.doors, answered_by) == (4, "database"), "its base has loaded less"
    assert (await gets(Car))[1] == "cache"


@BOTH
@pytest.mark.usefixtures("zoo")
async def test_without_a_discriminator_a_row_is_of_the_class_that_is_asked_for(gets: Gets) -> None:
    for _ in range(2):  # the two are in one slot, and replace each other
        place, _ = await gets(Place)
        cafe, _ = await gets(Cafe)
        assert (type(place), type(cafe), cafe.tables) == (Place, Cafe, 4)
    assert (await gets(Cafe))[1] == "cache"


@BOTH
@pytest.mark.usefixtures("zoo")
async def test_concrete_classes_have_slots_of_their_own(gets: Gets) -> None:
    for source in ("database", "cache"):
        shape, _ = await gets(Shape)
        circle, answered_by = await gets(Circle)
        assert (type(shape), shape.name, type(circle), circle.name) == (Shape, "shape", Circle, "circle")
        assert answered_by == source
    assert (await gets(Shape, 2), await gets(Circle, 2)) == ((None, "database"), (None, "database"))
    assert (await gets(Shape, 2), await gets(Circle, 2)) == ((None, "cache"), (None, "cache"))


@BOTH
@pytest.mark.usefixtures("zoo")
async def test_a_get_of_a_polymorphic_union_reads_the_database(gets: Gets, cache: Cache) -> None:
    for _ in range(2):
        employee, answered_by = await gets(Employee)
        assert (type(employee), employee.budget, answered_by) == (Manager, 3, "database")
    assert cache.stats.bypassed == {"polymorphic union": 2}


async def test_an_abstract_concrete_base_is_refused_and_its_subclasses_are_served(
    sessions: Sessions, cache: Cache, gets: Gets
) -> None:
    class Own(DeclarativeBase):
        pass

    class Worker(AbstractConcreteBase, Own):
        strict_attrs = True

    class Smith(Worker):
        __tablename__ = "of_abstract"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        __mapper_args__ = {"polymorphic_identity": "smith", "concrete": True}

    cache.register(Own)
    configure_mappers()
    with pytest.raises(NotCacheableError, match=r"Worker cannot be cached: .* Register its concrete subclasses"):
        cache.register(Worker)
    async with sessions.begin() as session:
        session.add(Smith(id=1, name="n"))
    for source in ("database", "cache"):
        assert (await gets(Smith))[1] == source
    with pytest.warns(AsyncCacheWarning, match="Worker cannot be cached"):
        worker, answered_by = await gets(Worker)
    assert (type(worker), answered_by) == (Smith, "database")


@BOTH
async def test_a_class_that_is_declared_and_mapped_later_by_reflection(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, gets: Gets
) -> None:
    class Own(DeclarativeBase):
        pass

    class Reflected(DeferredReflection, Own):
        __tablename__ = "of_abstract"

    cache.register(Own)
    async with sessions.begin() as session:
        session.add(OfAbstract(id=1, name="n"))
    async with engine.connect() as connection:
        await connection.run_sync(lambda sync: Reflected.prepare(sync))  # noqa: PLW0108 - typed otherwise
    for source in ("database", "cache"):
        assert (await gets(Reflected))[1] == source
    async with sessions.begin() as session:
        instance: Any = await session.get_one(Reflected, 1)
        instance.name = "changed"
    found, answered_by = await gets(Reflected)
    assert (found.name, answered_by) == ("changed", "database")


@BOTH
async def test_a_row_of_a_join_comes_and_goes_with_each_of_its_tables(
    gets: Gets, sessions: Sessions, cache: Cache
) -> None:
    async with sessions.begin() as session:
        await session.execute(insert(customer).values(id=1, name="n"))
    for source in ("database", "cache"):
        assert await gets(CustomerWithAddress) == (None, source)
    async with sessions.begin() as session:
        await session.execute(insert(address).values(id=1, street="s"))
    for source in ("database", "cache"):
        found, answered_by = await gets(CustomerWithAddress)
        assert (found.street, answered_by) == ("s", source)
    locks = cache.stats.locks
    async with sessions.begin() as session:
        await session.execute(delete(address).where(address.c.street == "s"))
    assert cache.stats.locks == locks + cache.settings.buckets
    assert await gets(CustomerWithAddress) == (None, "database")


# ------------------------------------------------------------------------------------------------------- primary keys


@pytest.mark.parametrize("database", ["postgresql"])
async def test_an_instant_is_one_key_whatever_its_offset(
    engine: AsyncEngine, cache: Cache, sessions: Sessions, gets: Gets
) -> None:
    class Own(DeclarativeBase):
        pass

    class Tick(Own):
        __tablename__ = "tick"
        at: Mapped[datetime] = mapped_column(DateTime(timezone=True), primary_key=True)
        name: Mapped[str]

    cache.register(Tick)
    async with engine.begin() as connection:
        await connection.run_sync(Own.metadata.create_all)
    noon = datetime(2024, 5, 6, 12, tzinfo=UTC)
    in_paris = noon.astimezone(timezone(timedelta(hours=2)))
    async with sessions.begin() as session:
        session.add(Tick(at=noon, name="n"))
    await gets(Tick, noon)
    assert (await gets(Tick, in_paris))[1] == "cache"
    async with sessions.begin() as session:
        await session.execute(update(Tick).where(Tick.at == in_paris).values(name="changed"))
    tick, answered_by = await gets(Tick, noon)
    assert (tick.name, answered_by) == ("changed", "database")
    async with engine.begin() as connection:
        await connection.run_sync(Own.metadata.drop_all)


@BOTH
async def test_a_statement_that_gives_what_is_sent_invalidates_what_was_read_by_a_decorated_key(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, gets: Gets
) -> None:
    """The same table, as code sees it that does not know of the decorator."""
    raw = Table("by_decorated", MetaData(), Column("isbn", String, primary_key=True), Column("name", String))
    async with sessions.begin() as session:
        session.add(ByDecorated(isbn=Isbn("3"), name="n"))
    await gets(ByDecorated, Isbn("3"))
    locks = cache.stats.locks
    async with sessions.begin() as session:
        await session.execute(update(raw).where(raw.c.isbn == "isbn:3").values(name="changed"))
    book, answered_by = await gets(ByDecorated, Isbn("3"))
    assert (book.name, answered_by, cache.stats.locks) == ("changed", "database", locks + 1)
    async with sessions.begin() as session:
        await session.execute(update(ByDecorated).where(ByDecorated.isbn == literal("isbn:3", String)).values(name="x"))
    assert (await gets(ByDecorated, Isbn("3")))[0].name == "x"
    await cache.invalidate(ByDecorated, Isbn("3"))
    assert (await gets(ByDecorated, Isbn("3")))[1] == "database"


@BOTH
async def test_a_key_that_the_database_would_give_back_as_another_is_looked_up_there(
    sessions: Sessions, cache: Cache, gets: Gets
) -> None:
    async with sessions.begin() as session:
        session.add_all([ByGuid(id=GUID_1, name="n"), ByCode(code="DE", name="n")])
    await gets(ByGuid, GUID_1)
    await gets(ByCode, "DE")
    assert (await gets(ByGuid, GUID_1))[1] == (await gets(ByCode, "DE"))[1] == "cache"
    for model, key in ((ByGuid, str(GUID_1)), (ByCode, "DE ")):
        assert (await gets(model, key))[1] == "database"
    assert cache.stats.bypassed == {"primary key type": 2}
    locks = cache.stats.locks
    async with sessions.begin() as session:  # as text, which is what is sent
        await session.execute(update(ByGuid).where(ByGuid.id == str(GUID_1).upper()).values(name="changed"))
    assert cache.stats.locks == locks + 1
    assert (await gets(ByGuid, GUID_1))[0].name == "changed"


@pytest.mark.parametrize("database", ["postgresql"])
async def test_a_process_that_knows_no_database_invalidates_decorated_keys_by_table(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, gets: Gets
) -> None:
    async with sessions.begin() as session:
        session.add(ByGuid(id=GUID_1, name="n"))
    await gets(ByGuid, GUID_1)
    async with Cache(cache._store.backend) as other:
        register(other)
        await other.invalidate(ByGuid, GUID_1, scope=str(engine.url.database))
        assert (await gets(ByGuid, GUID_1))[1] == "database"


# ---------------------------------------------------------------------------------------------------------- attributes


@BOTH
async def test_deferred_columns_are_loaded_alone_or_in_their_group(sessions: Sessions, statements: Statements) -> None:
    async with sessions.begin() as session:
        session.add(Deferred(id=1, name="n", text="t", front="f", back="b", never="r"))
    for _ in range(2):
        async with sessions() as session:
            instance = await session.get_one(Deferred, 1)
            statements.clear()
            assert await instance.awaitable_attrs.text == "t"
            assert (await instance.awaitable_attrs.front, instance.back) == ("f", "b")
            assert len(statements) == 2
            with pytest.raises(InvalidRequestError, match="raiseload"):
                _ = instance.never


@BOTH
async def test_a_column_that_is_left_out_is_loaded_when_it_is_used(
    sessions: Sessions, cache: Cache, gets: Gets, statements: Statements
) -> None:
    async with sessions.begin() as session:
        session.add(LeftOut(id=1, name="n", large="l" * 5000, unknown=Spot(1, 2)))
    await gets(LeftOut)
    record = await Slots(cache, sessions.kw["bind"]).row(LeftOut, 1)
    assert record is not None
    assert b"l" * 100 not in record
    async with sessions.begin() as session:
        instance = await session.get_one(LeftOut, 1)
        statements.clear()
        assert await instance.awaitable_attrs.large == "l" * 5000
        assert instance.unknown is not None
        assert (instance.unknown.x, len(statements)) == (1, 1)
    async with sessions.begin() as session:
        (await session.get_one(LeftOut, 1)).large = "changed"
    await gets(LeftOut)
    async with sessions() as session:
        instance = await session.get_one(LeftOut, 1)
        await session.refresh(instance, ["large"])
        assert instance.large == "changed"


async def test_processes_that_leave_out_other_columns_do_not_read_each_other_s_rows(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, gets: Gets
) -> None:
    async with sessions.begin() as session:
        session.add(LeftOut(id=1, name="n", large="l", unknown=None))
    await gets(LeftOut)
    async with Cache(cache._store.backend) as other:
        other.register(LeftOut, exclude_columns=["unknown"])
        at_other = Gets(async_sessionmaker(engine, class_=AsyncCachedSession, cache=other), other, gets.statements)
        for source in ("database", "cache"):
            found, answered_by = await at_other(LeftOut)
            assert (found.large, answered_by) == ("l", source)
        assert (await gets(LeftOut))[1] == "database"
        async with at_other.sessions.begin() as session:
            (await session.get_one(LeftOut, 1)).name = "changed"
        assert (await gets(LeftOut))[0].name == "changed"


async def test_a_column_property_beyond_its_row_can_be_left_out(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, gets: Gets
) -> None:
    class Own(DeclarativeBase):
        pass

    class Counted(Own):
        __tablename__ = "of_abstract"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        others: Mapped[int] = column_property(select(func.count()).select_from(Animal).scalar_subquery())

    cache.register(Counted)
    async with sessions.begin() as session:
        session.add(Counted(id=1, name="n"))
    for _ in range(2):
        assert (await gets(Counted))[1] == "database"
    assert cache.stats.bypassed == {"column_property beyond its own row": 2}
    cache.register(Counted, exclude_columns=["others"])
    await gets(Counted)
    assert (await gets(Counted))[1] == "cache"


@pytest.mark.parametrize(
    ("model", "attributes", "message"),
    [
        (Base, ["large"], "one mapped class, and .*Base.* is none"),
        (LeftOut, ["larg"], r"LeftOut\.larg cannot be left out: it is no mapped column; there are id, name, large"),
        (LeftOut, [Located.spot], r"Located\.spot cannot be left out of LeftOut: it is of another class"),
        (LeftOut, ["id"], r"LeftOut\.id .*primary key"),
        (Dog, ["id"], r"Dog\.id .*primary key"),
        (Versioned, [Versioned.version], r"Versioned\.version .*the version"),
        (Attributes, ["point"], r"Attributes\.point .*no mapped column"),
    ],
)
def test_what_cannot_be_left_out_is_refused(model: type[Any], attributes: list[Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Cache("memory://").register(model, exclude_columns=attributes)


async def test_a_load_listener_that_loads_more_has_the_row_read_from_the_database(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, gets: Gets
) -> None:
    class Own(DeclarativeBase):
        pass

    class Curious(Own):
        __tablename__ = "deferred"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str] = mapped_column(deferred=True)
        length: ClassVar[int]

    def read_on(curious: Any, _: object) -> None:
        curious.length = len(curious.text)

    event.listen(Curious, "load", read_on, restore_load_context=True)
    cache.register(Curious)
    async with sessions.begin() as session:
        session.add(Deferred(id=1, name="n", text="four", front="f", back="b", never="r"))
    with warnings.catch_warnings(action="ignore"):  # SQLAlchemy 2.1 leaves a coroutine behind that it cannot await
        for _ in range(3):
            curious, answered_by = await gets(Curious)
            assert (curious.length, answered_by) == (4, "database")
        gc.collect()
    assert cache.stats.bypassed == {"load listener": 1}, "once it is known"


# -------------------------------------------------------------------------------------------------------------- codecs


async def test_a_type_without_a_codec_is_refused_and_with_one_it_is_not(cache: Cache) -> None:
    bare = Cache("memory://")
    with pytest.raises(
        NotCacheableError, match=r"Located\.spot .*bind_processor.*exclude_columns=\['spot'\].*codec_for\(Geometry, "
    ):
        bare.register(Located)
    bare.codec_for(Geometry, encode=lambda spot: [spot.x, spot.y], decode=lambda plain: Spot(*plain))
    bare.register(Located)


async def test_a_row_that_another_version_of_a_codec_has_written_is_read_from_the_database(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, gets: Gets
) -> None:
    async with sessions.begin() as session:
        session.add(Located(id=1, name="n", spot=Spot(1, 2)))
    await gets(Located)
    async with Cache(cache._store.backend) as newer:
        newer.codec_for(
            Geometry, encode=lambda spot: [spot.y, spot.x], decode=lambda plain: Spot(*plain[::-1]), version=2
        )
        newer.register(Located)
        at_newer = Gets(async_sessionmaker(engine, class_=AsyncCachedSession, cache=newer), newer, gets.statements)
        for source in ("database", "cache"):
            located, answered_by = await at_newer(Located)
            assert (located.spot.x, located.spot.y, answered_by) == (1, 2, source)
        located, answered_by = await gets(Located)
        assert (located.spot.x, answered_by) == (1, "database")


@pytest.mark.parametrize(
    ("encode", "decode"),
    [
        pytest.param(lambda spot: spot.z, lambda plain: Spot(*plain), id="raises"),
        pytest.param(lambda spot: spot, lambda plain: plain, id="is not plain"),
        pytest.param(lambda spot: [spot.x, 0], lambda plain: plain, id="of another type"),
        pytest.param(lambda spot: [spot.x, spot.y], lambda plain: Spot(*plain[::-1]), id="another value"),
    ],
)
async def test_a_codec_that_does_not_keep_a_value_stores_nothing_and_says_so(
    encode: Any,
    decode: Any,
    engine: AsyncEngine,
    sessions: Sessions,
    gets: Gets,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with sessions.begin() as session:
        session.add(Located(id=1, name="n", spot=Spot(1, 2)))
    async with Cache("memory://") as wrong:
        wrong.codec_for(Geometry, encode=encode, decode=decode)
        wrong.register(Located)
        at_wrong = Gets(async_sessionmaker(engine, class_=AsyncCachedSession, cache=wrong), wrong, gets.statements)
        for _ in range(2):
            located, answered_by = await at_wrong(Located)
            assert (located.spot.x, answered_by) == (1, "database")
    (record,) = caplog.records
    assert record.message.startswith("a row of Located is not cached: ")


@pytest.mark.parametrize(
    ("type_", "message"),
    [(Geometry(), "takes a class of column types"), (str, "takes a class of column types"), (Vector, "has a codec")],
)
def test_a_codec_for_nothing_or_twice_is_refused(type_: Any, message: str, cache: Cache) -> None:
    with pytest.raises(ConfigurationError, match=message):
        cache.codec_for(type_, encode=list, decode=list)


@pytest.mark.parametrize(
    ("model", "typed", "key"),
    [
        (ByGuid, [str(GUID_1)], (GUID_1,)),
        (ByDecorated, ["isbn:3"], (Isbn("3"),)),
        (ByEnum, ["GREEN"], (Colour.GREEN,)),
        (ByDay, ["2024-05-06", "2024-05-06T07:08:09"], (date(2024, 5, 6), datetime(2024, 5, 6, 7, 8, 9))),  # noqa: DTZ001
    ],
)
def test_keys_of_all_types_can_be_typed(model: type[Any], typed: list[str], key: tuple[Any, ...]) -> None:
    assert key_from_text(model, typed) == key
    assert [type(each) for each in key_from_text(model, typed)] == [type(each) for each in key]


@pytest.mark.parametrize(("model", "typed"), [(ByEnum, "BLUE"), (ByGuid, "x"), (ByBytes, "x")])
def test_what_is_no_key_is_refused_when_it_is_typed(model: type[Any], typed: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{typed}' is no .*, as the primary key's"):
        key_from_text(model, [typed])
