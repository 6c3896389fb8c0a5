"""Sessions on a connection or a transaction of the application's own, as test suites use them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

import pytest
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from asynccache import AsyncCachedSession, Cache, cached_invalidate
from tests.conftest import Sessions
from tests.models import Author, Country
from tests.session.slots import Slots, name_of

Plain = async_sessionmaker[AsyncSession]
Mode = Literal["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]

MODES: list[Mode] = ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
in_each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
async def ann(plain: Plain, sessions: Sessions, cache: Cache) -> None:
    """Author 1, in the database and in the cache, and that there is no author 2."""
    async with plain.begin() as session:
        session.add(Author(id=1, name="Ann"))
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Ann", None)
    await cache.drain()


@pytest.fixture
async def connection(ann: None, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection in a transaction, which is rolled back at the end."""
    async with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            # As SQLAlchemy's documentation has it, so that SAVEPOINT works.
            await connection.exec_driver_sql("BEGIN")
        else:
            _ = await connection.begin()
        yield connection


async def write(session: AsyncSession) -> None:
    (await session.get_one(Author, 1)).name = "Eve"
    session.add(Author(id=2, name="Ben"))


async def names(sessions: async_sessionmaker[AsyncCachedSession] | Plain) -> tuple[str | None, str | None]:
    return await name_of(sessions, 1), await name_of(sessions, 2)


@in_each_mode
@pytest.mark.usefixtures("database_url")
async def test_nothing_leaks_out_of_an_outer_transaction_that_is_rolled_back(
    mode: Mode, connection: AsyncConnection, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    async with AsyncCachedSession(connection, cache=cache, join_transaction_mode=mode) as session:
        await write(session)
        await session.flush()
        assert await session.get(Author, 2) is not None
        if mode != "control_fully":
            await session.commit()
        session.expunge_all()
        assert (await session.get_one(Author, 1)).name == "Eve"
    await connection.rollback()
    assert cache.stats.locks == 0
    await cache.drain()
    assert await slots.holds_value(Author, 1)
    assert await names(sessions) == ("Ann", None)


@in_each_mode
@pytest.mark.usefixtures("database_url")
async def test_what_an_outer_transaction_commits_is_invalidated(
    mode: Mode, connection: AsyncConnection, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    async with AsyncCachedSession(connection, cache=cache, join_transaction_mode=mode) as session:
        await write(session)
        await session.commit()
    if mode != "control_fully":
        assert cache.stats.locks == 0, "nothing is committed yet"
        assert await slots.holds_value(Author, 1)
        await connection.commit()
    assert cache.stats.locks == 2
    assert await names(sessions) == ("Eve", "Ben")
    await cache.drain()
    assert not await slots.is_locked(Author, 1)


@in_each_mode
@pytest.mark.usefixtures("database_url")
async def test_after_the_session_s_rollback_the_outer_transaction_commits_what_is_left(
    mode: Mode, connection: AsyncConnection, sessions: Sessions, plain: Plain, cache: Cache
) -> None:
    async with AsyncCachedSession(connection, cache=cache, join_transaction_mode=mode) as session:
        await write(session)
        await session.flush()
        await session.rollback()
    if connection.in_transaction():
        await connection.execute(update(Author).values(name="Eva"))
        await connection.commit()
    assert await names(sessions) == await names(plain)


@pytest.mark.usefixtures("database_url")
async def test_a_connection_that_a_session_was_handed_later_is_external_too_and_in_savepoints(
    connection: AsyncConnection, engine: AsyncEngine, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    async with AsyncCachedSession(engine, cache=cache) as session:
        bind = {"bind": connection.sync_connection}
        await session.execute(update(Author).where(Author.id == 1).values(name="Eve"), bind_arguments=bind)
        async with session.begin_nested():
            session.add(Author(id=2, name="Ben"))
        await session.commit()
    assert cache.stats.locks == 0
    assert await slots.holds_value(Author, 1)
    await connection.commit()
    assert await names(sessions) == ("Eve", "Ben")
    await cache.drain()
    assert not await slots.is_locked(Author, 1)


@pytest.mark.parametrize("commits", [True, False], ids=["committed", "rolled back"])
@pytest.mark.usefixtures("database_url")
async def test_core_statements_on_a_connection_that_a_session_has_used_are_followed(
    connection: AsyncConnection, sessions: Sessions, plain: Plain, cache: Cache, *, commits: bool
) -> None:
    async with AsyncCachedSession(connection, cache=cache) as session:
        await session.execute(text("SELECT 1"))
    for name in ("Eve", "Eva"):  # in one transaction and in the next
        await connection.execute(update(Author).values(name=name))
        await (connection.commit() if commits else connection.rollback())
        assert await names(sessions) == await names(plain)
        await cache.drain()


@pytest.mark.usefixtures("database_url")
async def test_two_caches_on_one_connection_are_both_followed(
    connection: AsyncConnection, engine: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    async with Cache("memory://") as other:
        other.register(Author)
        theirs = async_sessionmaker(engine, class_=AsyncCachedSession, cache=other)
        assert await names(theirs) == ("Ann", None)
        await other.drain()
        async with AsyncCachedSession(connection, cache=cache) as session:
            (await session.get_one(Author, 1)).name = "Eve"
            await session.commit()
        async with AsyncCachedSession(connection, cache=other) as session:
            session.add(Author(id=2, name="Ben"))
            await session.commit()
        await connection.commit()
        assert await names(sessions) == await names(theirs) == ("Eve", "Ben")
        assert (cache.stats.locks, other.stats.locks) == (2, 16), "the other one came too late to be told which rows"
        await other.drain()

        async with AsyncCachedSession(connection, cache=cache) as session:
            (await session.get_one(Author, 1)).name = "Eva"
            await session.commit()
        await connection.commit()
        assert await names(sessions) == await names(theirs) == ("Eva", "Ben")


@pytest.mark.usefixtures("database_url")
async def test_a_cache_that_joins_a_watched_connection_knows_what_was_written_before(
    ann: None, engine: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    cache.watch(engine)
    async with engine.begin() as connection:
        await connection.execute(update(Author).values(name="Eve"))
        async with AsyncCachedSession(connection, cache=cache) as session:
            session.add(Author(id=2, name="Ben"))
            await session.commit()
    assert await names(sessions) == ("Eve", "Ben")


@pytest.mark.usefixtures("database_url")
async def test_cached_invalidate_takes_effect_when_the_outer_transaction_commits(
    connection: AsyncConnection, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    async with AsyncCachedSession(connection, cache=cache) as session:
        await session.execute(text("SELECT 1"))
        cached_invalidate(session, Author, 1)
        await session.commit()
    assert await slots.holds_value(Author, 1)
    await connection.commit()
    assert cache.stats.locks == 1


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # SQLite has one writer at a time
@pytest.mark.usefixtures("database_url")
async def test_a_session_may_have_an_engine_and_a_connection(
    connection: AsyncConnection, engine: AsyncEngine, sessions: Sessions, plain: Plain, cache: Cache
) -> None:
    binds: dict[Any, Any] = {Author: connection, Country: engine}
    async with AsyncCachedSession(binds=binds, cache=cache) as session:
        await write(session)
        session.add(Country(code="de", name="Germany"))
        await session.commit()
    assert await names(plain) == ("Ann", None)
    await connection.commit()
    assert await names(sessions) == ("Eve", "Ben")
    async with sessions() as session:
        assert await session.get(Country, "de") is not None
