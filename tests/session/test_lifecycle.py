"""A cache from its making to its end: event loops, closing, and the sessions around it."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import uvloop
from sqlalchemy import inspect, update
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)

from asynccache import (
    Applied,
    AsyncCachedSession,
    Cache,
    CacheClosedError,
    Change,
    Key,
    MemoryBackend,
    WrongLoopError,
    cached_get,
)
from tests.conftest import Sessions, Statements
from tests.models import Author, Base, Secret, Tag
from tests.servers import FaultProxy, Memcached

Plain = async_sessionmaker[AsyncSession]


async def name_of(sessions: Callable[[], AsyncSession], pk: int = 1) -> str | None:
    async with sessions() as session:
        author = await session.get(Author, pk)
        return author.name if author is not None else None


@pytest.fixture
async def rows(plain: Plain) -> None:
    async with plain.begin() as session:
        session.add_all([Author(id=1, name="Ann"), Tag(id=1, name="new"), Secret(id=1, value="x")])


# ---------------------------------------------------------------------------------------------------------- event loops


def new_cache(url: str) -> Cache:
    cache = Cache(url)
    cache.register(Author)
    return cache


async def run(cache: Cache, database_url: str) -> str | None:
    """Write and read, by an engine that lives as long as the loop."""
    engine = create_async_engine(database_url)
    sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with sessions.begin() as session:
        author = await session.get(Author, 1)
        if author is None:
            session.add(Author(id=1, name="x"))
        else:
            author.name += "x"
    await cache.drain()
    for _ in range(2):
        await name_of(sessions)
        await cache.drain()
    name = await name_of(sessions)
    await cache.drain()
    await engine.dispose()
    return name


def test_a_cache_is_made_before_any_loop_and_serves_one_after_the_other(database_url: str, cache_url: str) -> None:
    cache = new_cache(cache_url)
    for count in (1, 2, 3):
        assert asyncio.run(run(cache, database_url)) == "x" * count
    assert cache.stats.hits >= 3 * 2
    assert cache.stats.backend_errors == 0
    asyncio.run(cache.aclose())


def test_a_hit_in_the_next_loop(sqlite_url: str, cache_url: str) -> None:
    cache = new_cache(cache_url)

    async def get() -> str | None:
        engine = create_async_engine(sqlite_url)
        try:
            return await name_of(async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache))
        finally:
            await engine.dispose()

    asyncio.run(run(cache, sqlite_url))
    hits = cache.stats.hits
    assert asyncio.run(get()) == "x"
    assert cache.stats.hits == hits + 1
    asyncio.run(cache.aclose())


def test_it_works_on_uvloop(database_url: str, cache_url: str) -> None:
    cache = new_cache(cache_url)

    async def scenario() -> None:
        async with cache:
            await run(cache, database_url)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
    assert cache.stats.hits >= 2
    assert cache.stats.backend_errors == 0


@pytest.mark.usefixtures("cache_url")
async def test_another_loop_that_runs_at_the_same_time_is_refused(
    rows: None, sessions: Sessions, cache: Cache, sqlite_url: str
) -> None:
    assert await name_of(sessions) == "Ann"

    async def elsewhere() -> None:
        engine = create_async_engine(sqlite_url)
        theirs = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        try:
            with pytest.raises(WrongLoopError, match="make one Cache for each loop"):
                await name_of(theirs)
            async with theirs() as session:
                session.add(Author(id=2, name="Bob"))
                with pytest.raises(WrongLoopError, match="make one Cache for each loop"):
                    await session.commit()
        finally:
            await engine.dispose()

    await asyncio.to_thread(asyncio.run, elsewhere())
    assert await name_of(sessions) == "Ann"
    assert await name_of(sessions, 2) is None, "nothing was committed"


def test_a_fork_while_a_loop_runs_is_refused_in_the_child_and_before_that_loop_begins_it_is_not() -> None:
    program = """
import asyncio, os
from asynccache import Cache, WrongLoopError

unused, used = Cache("memory://"), Cache("memory://")

async def main():
    await used.check()
    if child := os.fork():
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    asyncio.run(unused.check())
    try:
        asyncio.run(used.check())
    except WrongLoopError:
        os._exit(7)
    os._exit(1)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (7, "")


# -------------------------------------------------------------------------------------------------------------- closing


@pytest.mark.usefixtures("cache_url")
async def test_a_closed_cache_says_so(rows: None, sessions: Sessions, plain: Plain, cache: Cache) -> None:
    await name_of(sessions)
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        await cache.aclose()
        author.name = "changed"
        with pytest.raises(CacheClosedError, match="is closed; make a new Cache"):
            await session.commit()
        await session.rollback()
    with pytest.raises(CacheClosedError, match="is closed; make a new Cache"):
        await name_of(sessions)
    for invalidation in (cache.invalidate(Author, 1), cache.invalidate_all(Author)):
        with pytest.raises(CacheClosedError):
            await invalidation
    assert await name_of(plain) == "Ann", "nothing was written"
    assert "closed" in repr(cache)


async def test_a_closed_cache_is_none_of_the_business_of_other_models(
    rows: None, sessions: Sessions, cache: Cache
) -> None:
    await cache.aclose()
    async with sessions.begin() as session:
        (await session.get_one(Secret, 1)).value = "changed"


@pytest.mark.usefixtures("cache_url")
async def test_closing_twice_is_closing_once(rows: None, sessions: Sessions, cache: Cache) -> None:
    await name_of(sessions)
    await asyncio.gather(cache.aclose(), cache.aclose())
    await cache.aclose()


class SlowMemory(MemoryBackend):
    """Once armed, it answers the look that a commit takes at its locks, and then writes nothing until it is told to.

    reached: something waits to be written.
    """

    answers_within_s = math.inf

    def __init__(self) -> None:
        super().__init__()
        self.armed = False
        self.reached = asyncio.Event()
        self.released = asyncio.Event()
        self._held = False

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        self._held = self.armed
        return await super().get_many(keys)

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        if self._held:
            self.reached.set()
            await self.released.wait()
        return await super().apply(changes)


@pytest.mark.parametrize("wait", [Cache.drain, Cache.aclose], ids=["drain", "aclose"])
async def test_work_in_the_background_is_waited_for(
    wait: Callable[[Cache], Coroutine[Any, Any, None]], rows: None, engine: AsyncEngine
) -> None:
    backend = SlowMemory()
    cache = Cache(backend)
    cache.register(Base)
    async with AsyncCachedSession(engine, cache=cache) as session:
        (await session.get_one(Author, 1)).name = "changed"
        await cache.drain()
        backend.armed = True
        await session.commit()  # does not wait for the unlocking
        await backend.reached.wait()
        waiting = asyncio.create_task(wait(cache))
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
        assert (cache.stats.locks, cache.stats.unlocks) == (1, 0)
        backend.released.set()
        await waiting
        assert cache.stats.unlocks == 1
    await cache.aclose()


async def test_closing_leaves_no_task_and_no_connection(
    rows: None, engine: AsyncEngine, memcached_server: Memcached
) -> None:
    tasks = asyncio.all_tasks()
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        proxy_tasks = asyncio.all_tasks() - tasks
        async with Cache(f"memcached://{proxy.host}:{proxy.port}") as cache:
            cache.register(Base)
            sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
            await asyncio.gather(*(name_of(sessions) for _ in range(50)))
            async with sessions.begin() as session:
                (await session.get_one(Author, 1)).name = "changed"
            assert proxy.open >= 1
        await proxy.until(lambda: proxy.open == 0)
        await _until(lambda: asyncio.all_tasks() - tasks <= proxy_tasks)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def test_reading_can_be_turned_off_and_on_again(
    rows: None, sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    await name_of(sessions)
    await cache.drain()
    cache.reading = False
    assert await name_of(sessions) == "Ann"
    async with sessions.begin() as session:
        await session.execute(update(Author).values(name="changed"))
    assert await name_of(sessions) == "changed"
    cache.reading = True
    assert await name_of(sessions) == "changed"
    await cache.drain()
    statements.clear()
    assert await name_of(sessions) == "changed"
    assert not statements


# ------------------------------------------------------------------------------------------------------------- sessions


async def test_without_a_cache_it_is_a_plain_session(rows: None, engine: AsyncEngine, statements: Statements) -> None:
    sessions = async_sessionmaker(engine, class_=AsyncCachedSession)
    for _ in range(2):
        assert await name_of(sessions) == "Ann"
    assert len(statements) == 2
    async with sessions.begin() as session:
        assert session.cache is None
        (await session.get_one(Author, 1)).name = "changed"
    assert await name_of(sessions) == "changed"


async def test_a_session_is_made_without_a_sessionmaker(rows: None, engine: AsyncEngine, cache: Cache) -> None:
    for hits in (0, 1):
        async with AsyncCachedSession(engine, cache=cache, expire_on_commit=False) as session:
            author = await session.get_one(Author, 1)
            await session.commit()
            assert not inspect(author).expired
        await cache.drain()
        assert cache.stats.hits == hits


async def test_scoped_sessions(rows: None, sessions: Sessions, cache: Cache) -> None:
    scoped = async_scoped_session(sessions, scopefunc=asyncio.current_task)
    for hits in (0, 1):
        author = await scoped.get(Author, 1)
        assert author is not None
        assert await scoped.get_one(Author, 1) is author
        assert await cached_get(scoped, Author, 1) is author  # type: ignore[arg-type]  # no AsyncSession, but it does
        await scoped.remove()
        await cache.drain()
        assert cache.stats.hits == hits
    assert not cache.stats.bypassed
