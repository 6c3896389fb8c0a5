"""Tables that are dropped, emptied and made again leave nothing behind that could be read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import DDL, Connection, Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from asynccache import AsyncCachedSession, Cache
from tests.conftest import Sessions
from tests.models import Author, Base, Country
from tests.session.slots import name_of

AUTHOR = Base.metadata.tables["author"]

Plain = async_sessionmaker[AsyncSession]
Work = Callable[[Connection], None]


@pytest.fixture
async def rows(plain: Plain, sessions: Sessions, cache: Cache) -> None:
    """Author 1 and country "de", in the database and in the cache."""
    async with plain.begin() as session:
        session.add_all([Author(id=1, name="Ann"), Country(code="de", name="Germany")])
    assert await name_of(sessions) == "Ann"
    async with sessions() as session:
        assert await session.get(Country, "de") is not None
    await cache.drain()


def drop_all_and_create_all(connection: Connection) -> None:
    Base.metadata.drop_all(connection)
    Base.metadata.create_all(connection)


def drop_and_create(connection: Connection) -> None:
    for table in (Base.metadata.tables["chapter"], Base.metadata.tables["book_tag"], Base.metadata.tables["book"]):
        table.drop(connection)
    AUTHOR.drop(connection)
    AUTHOR.create(connection)


def truncate(connection: Connection) -> None:
    sqlite = connection.dialect.name == "sqlite"
    connection.execute(text("DELETE FROM author" if sqlite else "TRUNCATE author CASCADE"))


def by_a_ddl_element(connection: Connection) -> None:
    connection.execute(DDL("ALTER TABLE author RENAME TO writer"))
    AUTHOR.create(connection)


CHANGES: list[Work] = [drop_all_and_create_all, drop_and_create, truncate, by_a_ddl_element]


async def through_a_watched_engine(engine: AsyncEngine, cache: Cache, work: Work) -> None:
    cache.watch(engine)
    async with engine.begin() as connection:
        await connection.run_sync(work)


async def through_a_session_s_connection(engine: AsyncEngine, cache: Cache, work: Work) -> None:
    async with AsyncCachedSession(engine, cache=cache) as session:
        await (await session.connection()).run_sync(work)
        await session.commit()


async def in_autocommit(engine: AsyncEngine, cache: Cache, work: Work) -> None:
    cache.watch(engine)
    async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        await connection.run_sync(work)


@pytest.mark.parametrize(
    "through", [through_a_watched_engine, through_a_session_s_connection, in_autocommit], ids=lambda way: way.__name__
)
@pytest.mark.parametrize("work", CHANGES, ids=lambda work: work.__name__)
@pytest.mark.usefixtures("database_url", "rows")
async def test_nothing_of_a_table_that_was_emptied_is_served(
    work: Work,
    through: Callable[[AsyncEngine, Cache, Work], Awaitable[None]],
    engine: AsyncEngine,
    sessions: Sessions,
    plain: Plain,
    cache: Cache,
) -> None:
    await through(engine, cache, work)
    assert await name_of(sessions) is None
    await cache.drain()
    async with plain.begin() as session:
        assert await session.get(Author, 1) is None
    async with sessions.begin() as session:
        session.add(Author(id=1, name="Eve"))
    assert await name_of(sessions) == "Eve"


@pytest.mark.usefixtures("rows")
async def test_what_sqlite_has_dropped_without_a_transaction_is_gone_whether_or_not_anybody_commits(
    engine: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    cache.watch(engine)
    async with engine.connect() as connection:
        await connection.run_sync(drop_all_and_create_all)
        assert await name_of(sessions) is None, "it is gone already"
        await connection.rollback()
    assert await name_of(sessions) is None


@pytest.mark.usefixtures("rows")
async def test_what_sqlite_inserts_by_another_word_than_insert_is_committed_at_once(
    engine: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    assert await name_of(sessions, 2) is None
    await cache.drain()
    cache.watch(engine)
    async with engine.connect() as connection:
        sql = "WITH new(id, name) AS (VALUES (2, 'Ben')) INSERT INTO author (id, name) SELECT id, name FROM new"
        await connection.execute(text(sql))
        assert await name_of(sessions, 2) == "Ben"
        await connection.rollback()
    assert await name_of(sessions, 2) == "Ben"


@pytest.mark.usefixtures("rows")
async def test_a_test_suite_s_sync_engine_may_drop_all_in_the_event_loop(
    sqlite_url: str, sessions: Sessions, cache: Cache
) -> None:
    engine: Engine = create_engine(sqlite_url.replace("+aiosqlite", ""))
    cache.watch(engine)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    assert await name_of(sessions) is None
    engine.dispose()
