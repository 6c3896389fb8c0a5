"""`cache.watch(engine)`: what an engine commits past our sessions invalidates as well, by the same protocol."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, insert, make_url, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from asynccache import AsyncCachedSession, Cache, CacheClosedError, LockNotPlacedError
from tests.conftest import Sessions
from tests.models import Author, Base
from tests.servers import FaultProxy, Memcached
from tests.session.conftest import on_both
from tests.session.slots import Slots, name_of
from tests.session.test_commit import at_event

Plain = async_sessionmaker[AsyncSession]

RENAME = update(Author).where(Author.id == 1).values(name="Eve")


@pytest.fixture
async def ann(plain: Plain, sessions: Sessions, cache: Cache) -> None:
    """Author 1, in the database and in the cache, and that there is no author 2."""
    async with plain.begin() as session:
        session.add(Author(id=1, name="Ann"))
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Ann", None)
    await cache.drain()


@pytest.fixture
def watched(ann: None, cache: Cache, engine: AsyncEngine) -> AsyncEngine:
    cache.watch(engine)
    return engine


# ------------------------------------------------------------------------------------------------------------ the ways


async def by_core(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(RENAME)


async def by_core_and_commit(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(RENAME)
        await connection.commit()


async def by_core_in_the_second_transaction_of_a_connection(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        async with connection.begin():
            await connection.execute(text("SELECT 1"))
        async with connection.begin():
            await connection.execute(RENAME)


async def by_core_in_a_savepoint(engine: AsyncEngine) -> None:
    async with engine.begin() as connection, connection.begin_nested():
        await connection.execute(RENAME)


async def by_core_in_run_sync(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(lambda sync: sync.execute(RENAME))


async def by_an_engine_with_other_options(engine: AsyncEngine) -> None:
    await by_core(engine.execution_options(stream_results=False))


async def by_a_plain_session(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        (await session.get_one(Author, 1)).name = "Eve"


async def by_a_plain_session_on_a_connection(engine: AsyncEngine) -> None:
    async with engine.begin() as connection, AsyncSession(connection) as session:
        (await session.get_one(Author, 1)).name = "Eve"
        await session.commit()


async def by_a_session_of_ours_without_a_cache(engine: AsyncEngine) -> None:
    async with AsyncCachedSession(engine) as session, session.begin():
        (await session.get_one(Author, 1)).name = "Eve"


WAYS = [
    by_core,
    by_core_and_commit,
    by_core_in_the_second_transaction_of_a_connection,
    by_core_in_a_savepoint,
    by_core_in_run_sync,
    by_an_engine_with_other_options,
    by_a_plain_session,
    by_a_plain_session_on_a_connection,
    by_a_session_of_ours_without_a_cache,
]


@pytest.mark.parametrize("write", WAYS)
@on_both
async def test_a_row_is_locked_when_commit_is_sent_and_unlocked_once_it_was_answered(
    write: Callable[[AsyncEngine], Awaitable[None]],
    watched: AsyncEngine,
    sessions: Sessions,
    cache: Cache,
    slots: Slots,
) -> None:
    at_commit = at_event(watched, "commit", lambda: slots.is_locked(Author, 1))
    await write(watched)
    assert await name_of(sessions) == "Eve"
    assert at_commit[-1] is True
    assert cache.stats.locks == 1
    await cache.drain()
    assert not await slots.is_locked(Author, 1)
    assert await name_of(sessions) == "Eve"
    await cache.drain()
    assert await slots.holds_value(Author, 1)


@pytest.mark.usefixtures("database_url")
async def test_a_session_of_ours_on_a_watched_engine_locks_once(
    watched: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    async with sessions.begin() as session:
        (await session.get_one(Author, 1)).name = "Eve"
    assert cache.stats.locks == 1
    assert cache.stats.bypassed == {}, "to watch an engine does not make its readers wary"
    assert await name_of(sessions) == "Eve"


@pytest.mark.usefixtures("database_url")
async def test_a_transaction_that_is_rolled_back_locks_nothing(
    watched: AsyncEngine, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    async with watched.connect() as connection:
        await connection.execute(RENAME)
        await connection.rollback()
        await connection.execute(insert(Author).values(id=2, name="Ben"))
    assert cache.stats.locks == 0
    assert await slots.holds_value(Author, 1)
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Ann", None)


@pytest.mark.usefixtures("database_url")
async def test_what_a_transaction_of_a_connection_wrote_is_not_locked_by_its_next_one(
    watched: AsyncEngine, cache: Cache
) -> None:
    async with watched.connect() as connection:
        for id_ in (2, 3, 4):
            await connection.execute(insert(Author).values(id=id_, name="new"))
            await (connection.rollback() if id_ == 3 else connection.commit())
    assert cache.stats.locks == 2


@pytest.mark.parametrize("sql", ["update author set name = 'Eve'", "insert into author values (2, 'Ben')"])
@pytest.mark.usefixtures("database_url")
async def test_text_renews_all(sql: str, watched: AsyncEngine, sessions: Sessions, plain: Plain) -> None:
    async with watched.begin() as connection:
        await connection.exec_driver_sql(sql)
    assert [await name_of(sessions, id_) for id_ in (1, 2)] == [await name_of(plain, id_) for id_ in (1, 2)]


@pytest.mark.usefixtures("database_url")
async def test_under_autocommit_each_statement_is_a_commit(
    watched: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    async with watched.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        await connection.execute(RENAME)
        assert await name_of(sessions) == "Eve"
        await connection.execute(insert(Author).values(id=2, name="Ben"))
        assert await name_of(sessions, 2) == "Ben"
        await connection.rollback()
    assert await name_of(sessions) == "Eve"


@pytest.mark.usefixtures("cache_url")
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("prepare", [True, False], ids=["prepared by hand", "prepared by commit"])
async def test_two_phase_locks_before_prepare(
    database_url: str, watched: AsyncEngine, sessions: Sessions, cache: Cache, slots: Slots, *, prepare: bool
) -> None:
    def work(connection: Any) -> None:
        transaction = connection.begin_twophase()
        connection.execute(RENAME)
        if prepare:
            transaction.prepare()
        transaction.commit()

    at_prepare = at_event(watched, "prepare_twophase", lambda: slots.is_locked(Author, 1))
    async with watched.connect() as connection:
        await connection.run_sync(work)
    assert at_prepare == ([True] if prepare else [])
    assert await name_of(sessions) == "Eve"
    assert cache.stats.locks == 1
    await cache.drain()
    assert not await slots.is_locked(Author, 1)


# ------------------------------------------------------------------------------------------------- unknown and refused


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_commit_of_which_nobody_knows_stays_locked_until_it_must_have_ended(
    postgres_url: str, engine: AsyncEngine, plain: Plain, proxy: FaultProxy
) -> None:
    far = create_async_engine(make_url(postgres_url).set(port=proxy.port))
    async with Cache("memory://", lock_ttl=0.6, lock_timeout=0.3) as cache:
        cache.register(Author)
        cache.watch(far)
        slots = Slots(cache, engine)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        assert await name_of(sessions) == "Ann"
        await cache.drain()
        commit = proxy.hold_reply(b"COMMIT")
        writer = asyncio.ensure_future(by_core(far))
        await commit.answered.wait()
        proxy.cut()
        with pytest.raises(Exception, match=r"(?i)connection"):
            await writer
        assert await name_of(plain) == "Eve", "the database did commit"
        assert await slots.is_locked(Author, 1)
        assert await name_of(sessions) == "Eve"
        await cache.drain()
        assert not await slots.is_locked(Author, 1)
    await far.dispose()


@pytest.mark.usefixtures("database_url", "ann")
async def test_a_commit_can_be_refused_and_leaves_no_transaction_open(
    engine: AsyncEngine, memcached_server: Memcached, plain: Plain
) -> None:
    async with Cache(f"{memcached_server.url}?timeout=0.2", lock_timeout=0.3, on_lock_failure="raise") as cache:
        cache.register(Author)
        cache.watch(engine)
        memcached_server.stop()
        async with engine.connect() as connection:
            await connection.execute(RENAME)
            with pytest.raises(LockNotPlacedError):
                await connection.commit()
            await connection.rollback()
            await connection.execute(text("SELECT 1"))
            await connection.commit()
        assert await name_of(plain) == "Ann"


# ---------------------------------------------------------------------------------------------------- several, and none


@pytest.mark.usefixtures("database_url", "ann")
async def test_several_caches_watch_one_engine(engine: AsyncEngine) -> None:
    async with Cache("memory://") as one, Cache("memory://") as two:
        readers = []
        for cache in (one, two):
            cache.register(Author)
            cache.watch(engine)
            readers.append(async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache))
        for name, write in [("Ann", None), ("Eve", by_core), ("Eva", by_a_session_of_the(one))]:
            if write is not None:
                await write(engine)
            for reader in readers:
                assert await name_of(reader) == name
            for cache in (one, two):
                await cache.drain()
        assert (one.stats.locks, two.stats.locks) == (2, 2)


def by_a_session_of_the(cache: Cache) -> Callable[[AsyncEngine], Awaitable[None]]:
    async def write(engine: AsyncEngine) -> None:
        async with AsyncCachedSession(engine, cache=cache) as session:
            (await session.get_one(Author, 1)).name = "Eva"
            await session.commit()

    return write


@pytest.mark.usefixtures("database_url")
async def test_an_engine_that_is_not_watched_any_more_is_left_alone(
    watched: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    async with watched.connect() as connection:
        await connection.execute(RENAME)
        cache.unwatch(watched)
        await connection.commit()
        for _ in range(2):  # it may still be locked at first
            assert await name_of(sessions) == "Eve", "a transaction is followed to its end"
            await cache.drain()
        await connection.execute(RENAME.values(name="Eva"))
        await connection.commit()
    async with watched.begin() as connection:
        await connection.execute(RENAME.values(name="Eva"))
    assert await name_of(sessions) == "Eve"
    assert cache.stats.locks == 1


async def test_a_cache_that_is_closed_leaves_its_engines_to_themselves(engine: AsyncEngine, plain: Plain) -> None:
    cache = Cache("memory://")
    cache.register(Author)
    cache.watch(engine)
    async with engine.connect() as connection:
        await connection.execute(insert(Author).values(id=1, name="Ann"))
        await cache.aclose()
        await connection.commit()
        await connection.execute(RENAME)
        await connection.commit()
    assert await name_of(plain) == "Eve"
    with pytest.raises(CacheClosedError):
        cache.watch(engine)


async def test_watching_keeps_neither_the_cache_nor_the_engine_alive() -> None:
    cache, engine = Cache("memory://"), create_async_engine("sqlite+aiosqlite://")
    cache.watch(engine)
    await engine.dispose()
    refs = ref(cache), ref(engine.sync_engine)
    del cache, engine
    gc.collect()
    assert [each() for each in refs] == [None, None]


# -------------------------------------------------------------------------------------------- engines without asyncio


@pytest.fixture
def sync_engine(sqlite_url: str, cache: Cache) -> Iterator[Engine]:
    engine = create_engine(sqlite_url.replace("+aiosqlite", ""))
    cache.watch(engine)
    yield engine
    engine.dispose()


def rename(engine: Engine) -> None:
    with Session(engine) as session:
        session.get_one(Author, 1).name = "Eve"
        session.add(Author(name="Ben"))
        session.commit()


@pytest.mark.usefixtures("cache_url", "ann")
async def test_another_thread_locks_before_its_commit(
    sync_engine: Engine, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    loop = asyncio.get_running_loop()
    at_commit: list[bool] = []

    def look(_: object) -> None:
        at_commit.append(asyncio.run_coroutine_threadsafe(slots.is_locked(Author, 1), loop).result())

    event.listen(sync_engine, "commit", look)
    await asyncio.to_thread(rename, sync_engine)
    assert at_commit == [True]
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Eve", "Ben")
    await cache.drain()
    assert not await slots.is_locked(Author, 1)
    assert cache.stats.locks == 2


@on_both
async def test_what_a_commit_listener_executes_is_not_taken_for_the_answer(watched: AsyncEngine, slots: Slots) -> None:
    async with watched.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        await connection.execute(RENAME)  # answers of statements are heard from here on
    at_commit: list[bool] = []

    def look(connection: Connection) -> None:
        connection.exec_driver_sql("SELECT 1")
        at_commit.append(await_only(slots.is_locked(Author, 1)))

    event.listen(watched.sync_engine, "commit", look)
    await by_core(watched)
    assert at_commit == [True]


@pytest.mark.parametrize("is_in_thread", [True, False])
@pytest.mark.usefixtures("cache_url", "ann")
async def test_without_asyncio_too_each_statement_is_a_commit_under_autocommit(
    sync_engine: Engine, sessions: Sessions, *, is_in_thread: bool
) -> None:
    def rename_at_once() -> None:
        with sync_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(RENAME)  # and nothing else: no second statement makes up for what is left out of a first

    if is_in_thread:
        await asyncio.to_thread(rename_at_once)
    else:
        rename_at_once()
    assert await name_of(sessions) == "Eve"


@pytest.mark.usefixtures("cache_url", "ann")
async def test_who_blocks_the_event_loop_invalidates_right_after(
    sync_engine: Engine, sessions: Sessions, cache: Cache
) -> None:
    rename(sync_engine)
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Eve", "Ben")
    await cache.drain()
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Eve", "Ben")
    assert (cache.stats.locks, cache.stats.locks_failed) == (0, 2)


@pytest.mark.usefixtures("ann")
async def test_who_blocks_the_event_loop_is_refused_where_a_lock_is_a_must(sqlite_url: str, plain: Plain) -> None:
    engine = create_engine(sqlite_url.replace("+aiosqlite", ""))
    async with Cache("memory://", on_lock_failure="raise") as cache:
        cache.register(Author)
        cache.watch(engine)
        with pytest.raises(LockNotPlacedError, match="another thread"):
            rename(engine)
        await asyncio.to_thread(rename, engine)
    assert await name_of(plain) == "Eve"
    engine.dispose()


def test_a_program_without_an_event_loop_locks_as_well(tmp_path: Path, memcached_url: str) -> None:
    url = f"sqlite:///{tmp_path}/test.db"
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Author(id=1, name="Ann"))
        session.commit()

    async def read() -> tuple[str | None, int]:
        there = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"))
        async with Cache(memcached_url) as cache:
            cache.register(Author)
            name = await name_of(async_sessionmaker(there, class_=AsyncCachedSession, cache=cache))
            await cache.drain()
        await there.dispose()
        return name, cache.stats.hits

    assert asyncio.run(read()) == ("Ann", 0)
    assert asyncio.run(read()) == ("Ann", 1)
    cache = Cache(memcached_url)
    cache.register(Author)
    cache.watch(engine)
    rename(engine)
    assert (cache.stats.locks, cache.stats.locks_failed) == (2, 0)
    assert asyncio.run(read()) == ("Eve", 0)
    asyncio.run(cache.aclose())
    engine.dispose()


def test_threads_without_an_event_loop_take_turns(tmp_path: Path, memcached_url: str) -> None:
    engines = [create_engine(f"sqlite:///{tmp_path}/{number}.db") for number in range(8)]
    cache = Cache(memcached_url)
    cache.register(Author)
    for engine in engines:
        Base.metadata.create_all(engine)
        cache.watch(engine)
    together = threading.Barrier(len(engines))

    def write(engine: Engine) -> None:
        for id_ in range(20):
            together.wait(timeout=20)
            with Session(engine) as session:
                session.add(Author(id=id_, name="Ann"))
                session.commit()

    with ThreadPoolExecutor(len(engines)) as threads:
        for done in [threads.submit(write, engine) for engine in engines]:
            done.result()
    assert (cache.stats.locks, cache.stats.locks_failed) == (8 * 20, 0)
    asyncio.run(cache.aclose())
    for engine in engines:
        engine.dispose()
