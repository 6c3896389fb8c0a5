"""What is cached, and for how long: `Cache.register` and `Cache.exclude`."""

from __future__ import annotations

import enum
import warnings
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any, ClassVar, cast

import pytest
from sqlalchemy import (
    JSON,
    BindParameter,
    ColumnElement,
    Enum,
    Numeric,
    PickleType,
    String,
    func,
    inspect,
    join,
    select,
)
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, registry
from sqlalchemy.types import TypeDecorator

from asynccache import (
    AsyncCachedSession,
    AsyncCacheWarning,
    Cache,
    MemoryBackend,
    NotCacheableError,
    NotRegisteredError,
    cached_get,
    cached_get_many,
)
from tests.conftest import Sessions, Statements


class Clock:
    """Seconds that pass when they are told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def cache(clock: Clock) -> AsyncIterator[Cache]:
    """With nothing registered."""
    async with Cache(MemoryBackend(clock=clock), ttl=100, ttl_jitter=0) as cache:
        yield cache


@pytest.fixture
def base() -> type[DeclarativeBase]:
    class Base(DeclarativeBase):
        pass

    return Base


def new_model(base: type[DeclarativeBase], name: str = "Thing", **attributes: Any) -> type[Any]:
    return type(
        name, (base,), {"__tablename__": name.lower(), "id": mapped_column(String, primary_key=True), **attributes}
    )


class Gets:
    """How a get of a model is answered."""

    def __init__(self, engine: AsyncEngine, cache: Cache) -> None:
        self._engine = engine
        self._cache = cache
        self._sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)

    async def create(self, *models: type[Any]) -> None:
        """Create the table of each, and a row with the key "1"."""
        for model in models:
            async with self._engine.begin() as connection:
                await connection.run_sync(inspect(model).registry.metadata.create_all)
            async with self._sessions.begin() as session:
                session.add(model(id="1"))
        await self._cache.drain()

    async def get(self, model: type[Any]) -> bool:
        """Get the row in a session of its own; whether it came from the cache."""
        hits = self._cache.stats.hits
        async with self._sessions() as session:
            assert type(await session.get(model, "1")) is model
        await self._cache.drain()
        return self._cache.stats.hits == hits + 1

    async def caches(self, model: type[Any]) -> bool:
        await self.get(model)
        return await self.get(model)


@pytest.fixture
def gets(engine: AsyncEngine, cache: Cache) -> Gets:
    return Gets(engine, cache)


# ------------------------------------------------------------------------------------------------------- what is cached


async def test_register_as_a_call(base: type[DeclarativeBase], cache: Cache, gets: Gets) -> None:
    thing = new_model(base)
    assert cache.register(thing) is thing
    await gets.create(thing)
    assert await gets.caches(thing)


async def test_register_as_a_decorator(base: type[DeclarativeBase], cache: Cache, gets: Gets) -> None:
    @cache.register
    class Bare(base):  # type: ignore[valid-type, misc]
        __tablename__ = "bare"
        id: Mapped[str] = mapped_column(primary_key=True)

    @cache.register(ttl=35)
    class Called(base):  # type: ignore[valid-type, misc]
        __tablename__ = "called"
        id: Mapped[str] = mapped_column(primary_key=True)

    await gets.create(Bare, Called)
    assert await gets.caches(Bare)
    assert await gets.caches(Called)


def test_a_decorated_class_stays_what_it_is(cache: Cache) -> None:
    class Base(DeclarativeBase):
        pass

    @cache.register(ttl=35)
    class Thing(Base):
        __tablename__ = "thing"
        id: Mapped[str] = mapped_column(primary_key=True)

    thing: Thing = Thing(id="1")  # which a type checker checks, too
    assert isinstance(Thing, type)
    assert issubclass(Thing, Base)
    assert thing.id == "1"


async def test_a_base_covers_its_subclasses_also_later_ones(
    base: type[DeclarativeBase], cache: Cache, gets: Gets
) -> None:
    earlier = new_model(base, "Earlier")
    cache.register(base)
    later = new_model(base, "Later")
    await gets.create(earlier, later)
    assert await gets.caches(earlier)
    assert await gets.caches(later)
    latest = new_model(base, "Latest")
    await gets.create(latest)
    assert await gets.caches(latest)


async def test_registering_one_model_leaves_its_neighbours_alone(
    base: type[DeclarativeBase], cache: Cache, gets: Gets
) -> None:
    one, other = new_model(base, "One"), new_model(base, "Other")
    cache.register(one)
    await gets.create(one, other)
    assert await gets.caches(one)
    assert not await gets.caches(other)


async def test_a_registry_covers_all_that_it_maps(cache: Cache, gets: Gets) -> None:
    mapped = registry()
    assert cache.register(mapped) is mapped

    @mapped.mapped
    class Thing:
        __tablename__ = "thing"
        id: Mapped[str] = mapped_column(primary_key=True)

    await gets.create(Thing)
    assert await gets.caches(Thing)


async def test_what_is_excluded_is_not_cached(base: type[DeclarativeBase], cache: Cache, gets: Gets) -> None:
    public, private = new_model(base, "Public"), new_model(base, "Private")
    cache.register(base)
    cache.exclude(private)
    await gets.create(public, private)
    assert await gets.caches(public)
    assert not await gets.caches(private)


async def test_the_nearest_class_decides(base: type[DeclarativeBase], cache: Cache, gets: Gets) -> None:
    class Abstract(base):  # type: ignore[valid-type, misc]
        __abstract__ = True

    cache.exclude(Abstract)
    thing, other = new_model(Abstract, "Thing"), new_model(Abstract, "Other")
    cache.register(base)
    cache.register(thing)
    await gets.create(thing, other)
    assert await gets.caches(thing)
    assert not await gets.caches(other)


async def test_excluding_later_ends_the_caching(base: type[DeclarativeBase], cache: Cache, gets: Gets) -> None:
    thing = new_model(base)
    cache.register(thing)
    await gets.create(thing)
    assert await gets.caches(thing)
    cache.exclude(thing)
    assert not await gets.caches(thing)
    cache.register(thing)
    assert await gets.caches(thing)


async def test_what_is_not_registered_is_plain_sqlalchemy(
    base: type[DeclarativeBase], cache: Cache, gets: Gets, sessions: Sessions, statements: Statements
) -> None:
    thing = new_model(base)
    await gets.create(thing)
    statements.clear()
    for _ in range(2):
        assert not await gets.get(thing)
    assert len(statements) == 2
    assert (cache.stats.misses, cache.stats.locks, dict(cache.stats.bypassed)) == (0, 0, {})
    async with sessions() as session:
        for get in (cached_get(session, thing, "1"), cached_get_many(session, thing, ["1"])):
            with pytest.raises(NotRegisteredError, match=r"Thing is not cached; call cache\.register\(Thing\)"):
                await get


# --------------------------------------------------------------------------------------------------------- for how long


@pytest.mark.parametrize("ttl", [35, 35.0, timedelta(seconds=35)])
async def test_a_model_has_a_ttl_of_its_own(
    ttl: float | timedelta, base: type[DeclarativeBase], cache: Cache, gets: Gets, clock: Clock
) -> None:
    short, usual = new_model(base, "Short"), new_model(base, "Usual")
    cache.register(base)
    cache.register(short, ttl=ttl)
    await gets.create(short, usual)
    await gets.get(short)
    await gets.get(usual)
    clock.now_s += 34.9
    assert await gets.get(short)
    assert await gets.get(usual)
    clock.now_s += 0.2
    assert not await gets.get(short)
    assert await gets.get(usual)
    clock.now_s += 65
    assert not await gets.get(usual)


async def test_absence_has_a_ttl_of_its_own(
    base: type[DeclarativeBase], cache: Cache, gets: Gets, clock: Clock, sessions: Sessions
) -> None:
    thing = new_model(base)
    cache.register(thing, ttl=50, negative_ttl=timedelta(seconds=5))
    await gets.create(thing)

    async def get_nothing() -> None:
        async with sessions() as session:
            assert await session.get(thing, "2") is None
        await cache.drain()

    await get_nothing()
    clock.now_s += 4.9
    await get_nothing()
    assert cache.stats.negative_hits == 1
    clock.now_s += 0.2
    await get_nothing()
    assert cache.stats.negative_hits == 1


async def test_jitter_only_shortens_the_ttl(
    base: type[DeclarativeBase], cache: Cache, gets: Gets, clock: Clock
) -> None:
    thing = new_model(base)
    cache.register(thing, ttl=100, ttl_jitter=0.5)
    await gets.create(thing)
    await gets.get(thing)
    clock.now_s += 49.9
    assert await gets.get(thing)
    clock.now_s += 50.2
    assert not await gets.get(thing)


# --------------------------------------------------------------------------------------------------- what is not cached


class Point:
    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y


class Lowered(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def bind_expression(self, bindparam: BindParameter[str]) -> ColumnElement[str]:
        return func.lower(bindparam)


def _pickled(base: type[DeclarativeBase]) -> type[Any]:
    return new_model(base, data=mapped_column(PickleType))


def _collated(base: type[DeclarativeBase]) -> type[Any]:
    return new_model(base, id=mapped_column(String(collation="NOCASE"), primary_key=True))


def _rounded_key(base: type[DeclarativeBase]) -> type[Any]:
    return new_model(base, id=mapped_column(Numeric(10, 2), primary_key=True))


def _lowered_key(base: type[DeclarativeBase]) -> type[Any]:
    return new_model(base, id=mapped_column(Lowered, primary_key=True))


def _json_key(base: type[DeclarativeBase]) -> type[Any]:
    return new_model(base, id=mapped_column(JSON, primary_key=True))


class Suit:
    """SQLAlchemy takes for an enumeration what has members, be they what they like."""

    __members__: ClassVar[dict[str, Suit]] = {}

    def __init__(self, name: str) -> None:
        self.name = name
        self.__members__[name] = self


HEARTS = Suit("hearts")


def _suit_key(base: type[DeclarativeBase]) -> type[Any]:
    return new_model(base, id=mapped_column(Enum(cast("type[enum.Enum]", Suit)), primary_key=True))


def _selected(base: type[DeclarativeBase]) -> type[Any]:
    parent = new_model(base, "Parent")
    return type("Thing", (base,), {"__table__": select(parent).subquery()})


def _joined_at_random(base: type[DeclarativeBase]) -> type[Any]:
    one, other = new_model(base, "One").__table__, new_model(base, "Other").__table__
    table = join(one, other, (one.c.id == other.c.id) & (func.random() > 0))
    return type("Thing", (base,), {"__table__": table, "id": column_property(one.c.id, other.c.id)})


REFUSED = [
    pytest.param(
        _pickled,
        r"Thing\.data cannot be cached: .*pickle.*register\(Thing, exclude_columns=\['data'\]\).*"
        r"codec_for\(PickleType, .*Exclude the model: cache\.exclude\(Thing\)",
        id="PickleType",
    ),
    pytest.param(_collated, r"Thing\.id cannot be cached: .*collation.*Exclude the model", id="collation"),
    pytest.param(_rounded_key, r"Thing\.id cannot be cached: .*Numeric.*primary key", id="Numeric key"),
    pytest.param(_lowered_key, r"Thing\.id cannot be cached: .*Lowered.*bind_expression", id="bind_expression key"),
    pytest.param(_json_key, r"Thing\.id cannot be cached: .*JSON.*primary key", id="JSON key"),
    pytest.param(_suit_key, r"Thing\.id cannot be cached: .*Enum.*primary key", id="no enum.Enum key"),
    pytest.param(_joined_at_random, r"Thing cannot be cached: its join has a condition beyond its tables", id="join"),
    pytest.param(_selected, r"Thing cannot be cached: .*neither a table nor a join", id="select"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_register_refuses_what_cannot_be_cached_and_names_it(
    make: Callable[[type[DeclarativeBase]], type[Any]], message: str, base: type[DeclarativeBase], cache: Cache
) -> None:
    with pytest.raises(NotCacheableError, match=f"(?is){message}"):
        cache.register(make(base))


@pytest.mark.parametrize(("make", "message"), REFUSED)
async def test_a_subclass_that_cannot_be_cached_is_skipped_with_one_warning(
    make: Callable[[type[DeclarativeBase]], type[Any]],
    message: str,
    base: type[DeclarativeBase],
    cache: Cache,
    sessions: Sessions,
    engine: AsyncEngine,
) -> None:
    cache.register(base)
    thing, good = make(base), new_model(base, "Good")
    async with engine.begin() as connection:
        await connection.run_sync(base.metadata.create_all)
    async with sessions() as session:
        with pytest.warns(AsyncCacheWarning, match=f"(?is){message}") as caught:
            assert await session.get(thing, "1") is None
        assert len(caught) == 1
    cache.register(good)  # upon which everything is looked at again
    async with sessions() as session:
        with warnings.catch_warnings(action="error"):
            assert await session.get(thing, "1") is None
            assert await session.get(good, "1") is None
    await cache.drain()
    assert cache.stats.fills == 1
    cache.exclude(thing)


async def test_an_excluded_subclass_warns_of_nothing(base: type[DeclarativeBase], cache: Cache, gets: Gets) -> None:
    cache.register(base)
    thing = new_model(base, data=mapped_column(PickleType))
    cache.exclude(thing)
    await gets.create(thing)
    assert not await gets.caches(thing)
