"""Sessions as applications make and use them: scoped, subclassed, with several databases, with expired instances."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert, update
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, SessionTransaction, UOWTransaction

from asynccache import AsyncCachedSession, Cache, CachedSession, cached_get, cached_get_many
from tests.conftest import Sessions
from tests.models import Author, Base, Book, Country, book
from tests.session.slots import Slots, name_of

Plain = async_sessionmaker[AsyncSession]
Write = Callable[[AsyncEngine, AsyncEngine, Cache, str], Awaitable[None]]


@pytest.fixture
async def ann(plain: Plain, sessions: Sessions, cache: Cache) -> None:
    """Author 1, in the database and in the cache."""
    async with plain.begin() as session:
        session.add(Author(id=1, name="Ann"))
    assert await name_of(sessions) == "Ann"
    await cache.drain()


async def rename_past_the_cache(plain: Plain, name: str = "Eve") -> None:
    """Who reads this name has read the database; who reads the old one, the cache."""
    async with plain.begin() as session:
        await session.execute(update(Author).where(Author.id == 1).values(name=name))


# -------------------------------------------------------------------------------------------------------------- scoped


@pytest.mark.usefixtures("database_url", "ann")
async def test_a_scoped_session_reads_and_invalidates(engine: AsyncEngine, cache: Cache, sessions: Sessions) -> None:
    scoped = async_scoped_session(sessions, scopefunc=asyncio.current_task)
    assert (await scoped.get_one(Author, 1)).name == "Ann"
    assert cache.stats.hits == 1
    (await scoped.get_one(Author, 1)).name = "Eve"
    await scoped.commit()
    await scoped.remove()
    assert cache.stats.locks == 1
    assert await name_of(sessions) == "Eve"


# --------------------------------------------------------------------------------------------------- several databases


async def test_each_model_has_its_database(tmp_path: Path, cache: Cache) -> None:
    one, two = (create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/{name}.db") for name in ("one", "two"))
    for engine in (one, two):
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Author).values(id=1, name=engine.url.database or ""))
            await connection.execute(insert(Country).values(code="de", name=engine.url.database or ""))
    sessions = async_sessionmaker(binds={Author: one, Country: two}, class_=AsyncCachedSession, cache=cache)
    crossed = async_sessionmaker(binds={Author: two, Country: one}, class_=AsyncCachedSession, cache=cache)

    async def names(sessions: Sessions) -> list[str]:
        async with sessions() as session:
            found = [(await session.get_one(Author, 1)).name, (await session.get_one(Country, "de")).name]
        await cache.drain()
        return [Path(name).stem for name in found]

    for _ in range(2):
        assert await names(sessions) == ["one", "two"]
        assert await names(crossed) == ["two", "one"]
    assert cache.stats.hits == 4
    async with sessions.begin() as session:
        (await session.get_one(Author, 1)).name = "new"
    assert await names(sessions) == ["new", "two"]
    assert await names(crossed) == ["two", "one"]
    for engine in (one, two):
        await engine.dispose()


@pytest.mark.usefixtures("database_url", "ann")
async def test_an_identity_token_goes_to_the_database(sessions: Sessions, plain: Plain, cache: Cache) -> None:
    await rename_past_the_cache(plain)
    async with sessions() as session:
        author = await session.get(Author, 1, identity_token="shard")  # noqa: S106
        assert author is not None
        assert author.name == "Eve"
        assert cache.stats.bypassed == {"options": 1}
        assert (await session.get_one(Author, 1)).name == "Ann", "another instance, which has no token"


@pytest.mark.usefixtures("ann")
async def test_a_tenant_s_writes_invalidate_what_the_tenant_reads(tmp_path: Path, cache: Cache) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/tenants.db")

    @event.listens_for(engine.sync_engine, "connect")
    def attach(connection: Any, _: object) -> None:
        connection.execute(f"ATTACH '{tmp_path}/tenant.db' AS tenant")

    tenant = engine.execution_options(schema_translate_map={None: "tenant"})
    for each in (engine, tenant):
        async with each.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Author).values(id=1, name="Ann"))
    cache.watch(engine)
    main, theirs = (async_sessionmaker(each, class_=AsyncCachedSession, cache=cache) for each in (engine, tenant))
    ways: list[Write] = [by_session, by_core, by_core_with_options]
    for before, after, write in zip(["Ann", "Eve", "Eva"], ["Eve", "Eva", "Zoe"], ways, strict=True):
        assert (await name_of(main), await name_of(theirs)) == ("Ann", before)
        await cache.drain()
        await write(engine, tenant, cache, after)
        assert (await name_of(main), await name_of(theirs)) == ("Ann", after)
    await engine.dispose()


async def by_session(_engine: AsyncEngine, tenant: AsyncEngine, cache: Cache, name: str) -> None:
    async with AsyncCachedSession(tenant, cache=cache) as session:
        (await session.get_one(Author, 1)).name = name
        await session.commit()


async def by_core(_engine: AsyncEngine, tenant: AsyncEngine, _cache: Cache, name: str) -> None:
    async with tenant.begin() as connection:
        await connection.execute(update(Author).values(name=name))


async def by_core_with_options(engine: AsyncEngine, _tenant: AsyncEngine, _cache: Cache, name: str) -> None:
    async with engine.begin() as connection:
        options = {"schema_translate_map": {None: "tenant"}}
        await connection.execute(update(Author).where(Author.id == 1).values(name=name), execution_options=options)


# -------------------------------------------------------------------------------------------- refreshed, merged, locked


@pytest.mark.usefixtures("database_url", "ann")
async def test_without_expiry_an_instance_stays_as_it_was(engine: AsyncEngine, plain: Plain, cache: Cache) -> None:
    async with AsyncCachedSession(engine, cache=cache, expire_on_commit=False) as session:
        author = await session.get_one(Author, 1)
        await session.commit()
        await rename_past_the_cache(plain)
        assert (await session.get_one(Author, 1)) is author
        assert author.name == "Ann"


@pytest.mark.usefixtures("database_url", "ann")
async def test_refresh_reads_the_database(sessions: Sessions, plain: Plain) -> None:
    await rename_past_the_cache(plain)
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        assert author.name == "Ann"
        await session.refresh(author)
        assert author.name == "Eve"


@pytest.mark.usefixtures("database_url", "ann")
async def test_merge_compares_with_the_database_and_writes_what_differs(
    sessions: Sessions, plain: Plain, cache: Cache
) -> None:
    async with sessions.begin() as session:
        merged = await session.merge(Author(id=1, name="Eve"))
        added = await session.merge(Author(id=2, name="Ben"))
        assert (merged.name, added.name) == ("Eve", "Ben")
    assert cache.stats.locks == 2
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Eve", "Ben")
    await cache.drain()
    cache.stats.locks = 0
    async with sessions.begin() as session:
        _ = await session.merge(Author(id=1, name="Eve"))
    assert cache.stats.locks == 0, "nothing differs"


@pytest.mark.usefixtures("database_url", "ann")
async def test_with_for_update_reads_the_database(sessions: Sessions, plain: Plain, cache: Cache) -> None:
    await rename_past_the_cache(plain)
    async with sessions() as session:
        author = await session.get(Author, 1, with_for_update=True)
        assert author is not None
        assert author.name == "Eve"
    assert cache.stats.bypassed == {"options": 1}


@pytest.mark.usefixtures("database_url", "ann")
async def test_within_no_autoflush_a_get_flushes_nothing(sessions: Sessions, cache: Cache) -> None:
    async with sessions() as session:
        session.add(pending := Author(id=2, name="Ben"))
        with session.no_autoflush:
            assert (await session.get_one(Author, 1)).name == "Ann"
            assert await session.get(Author, 2) is None
        assert pending in session.new
        assert await session.get(Author, 2) is pending


# ---------------------------------------------------------------------------------------- a flush that changes nothing


@pytest.mark.usefixtures("database_url", "ann")
async def test_a_flush_locks_just_the_rows_that_it_updates(sessions: Sessions, plain: Plain, cache: Cache) -> None:
    async with plain.begin() as session:
        session.add(book(1, author_id=None))
    async with sessions.begin() as session:
        author = await session.get_one(Author, 1)
        author.name = "Eve"
        author.name = "Ann"  # as it was
        await session.flush()
        assert cache.stats.locks == 0
        (await author.awaitable_attrs.books).append(await session.get_one(Book, 1))
    assert cache.stats.locks == 1, "the book, which has a foreign key and a version, and not the author"
    async with sessions() as session:
        one = await session.get_one(Book, 1)
        assert (one.author_id, one.version) == (1, 2)


# -------------------------------------------------------------------------------------------- the application's events


@pytest.mark.usefixtures("database_url", "ann")
async def test_what_listeners_of_a_session_write_is_invalidated(sessions: Sessions, plain: Plain, cache: Cache) -> None:
    async with plain.begin() as session:
        session.add_all([Country(code=code, name="old") for code in ("bf", "af", "bc", "ab")])

    def of(code: str) -> Any:
        return update(Country).where(Country.code == code).values(name="new")

    def before_flush(session: Session, _context: UOWTransaction, _instances: object) -> None:
        session.get_one(Country, "bf").name = "new"

    def after_flush(session: Session, _context: UOWTransaction) -> None:
        session.connection().execute(of("af"))

    def before_commit(session: Session) -> None:
        session.execute(of("bc"))

    def after_begin(_session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
        connection.execute(of("ab"))

    async def names() -> list[str]:
        async with sessions() as session:
            found = await cached_get_many(session, Country, ["bf", "af", "bc", "ab"])
        await cache.drain()
        return [country.name for country in found.values() if country is not None]

    assert await names() == ["old"] * 4
    assert cache.stats.locks == 0
    async with sessions() as session:
        sync = session.sync_session
        for listener in (before_flush, after_flush, before_commit, after_begin):
            event.listen(sync, listener.__name__, listener)
        (await session.get_one(Author, 1)).name = "Eve"
        await session.commit()
    assert cache.stats.locks == 5
    assert await names() == ["new"] * 4


# ---------------------------------------------------------------------------------------------------------- subclasses


class OurSession(AsyncCachedSession):
    """One that is derived from ours."""


class TheirSession(AsyncSession):
    """One that knows nothing of caches."""

    greeted = 0

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        self.greeted += 1
        return await super().get(*args, **kwargs)


class Mixed(AsyncCachedSession, TheirSession):
    """Ours first, so that theirs sees the gets that go to the database."""


class TheirsFirst(TheirSession, AsyncCachedSession):
    """Theirs sees all gets."""


class TheirSyncSession(Session):
    executed = 0

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        self.executed += 1
        return super().execute(*args, **kwargs)


class SyncMixed(CachedSession, TheirSyncSession):
    pass


class WithSyncClass(AsyncCachedSession):
    sync_session_class = SyncMixed


@pytest.mark.parametrize("class_", [OurSession, Mixed, TheirsFirst, WithSyncClass])
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_session_class_of_the_application_s_own(
    class_: type[AsyncCachedSession], engine: AsyncEngine, cache: Cache, slots: Slots
) -> None:
    sessions = async_sessionmaker(engine, class_=class_, cache=cache)
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        assert author.name == "Ann"
        assert await cached_get(session, Author, 1) is await session.get(Author, 1) is author
    assert cache.stats.hits == 1
    async with sessions.begin() as session:
        (await session.get_one(Author, 1)).name = "Eve"
        await session.execute(insert(Author).values(id=2, name="Ben"))
        if isinstance(session, TheirSession):
            assert session.greeted == (0 if class_ is Mixed else 1)
        if isinstance(session.sync_session, TheirSyncSession):
            assert session.sync_session.executed == 1
    assert cache.stats.locks == 2
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Eve", "Ben")
