"""`asynccache.testing`: what an application's tests are given tells the truth, and says what is wrong."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker

from asynccache import (
    AsyncCachedSession,
    Backend,
    BackendError,
    Cache,
    Change,
    ConfigurationError,
    Key,
    LockNotPlacedError,
    MemoryBackend,
    Write,
    cached_get_many,
    protocol,
)
from asynccache.events import Unlocked
from asynccache.testing import (
    FailingBackend,
    FakeMemcached,
    assert_queries,
    assert_served_from_cache,
    caching_off,
    counting_queries,
    failing,
)
from tests.conftest import Sessions, Statements
from tests.models import Author, Base
from tests.session.slots import name_of

Plain = async_sessionmaker[AsyncSession]


@pytest.fixture
async def ann(plain: Plain, sessions: Sessions, cache: Cache) -> None:
    """Author 1 is in the database and in the cache, author 2 in the database."""
    async with plain.begin() as session:
        session.add_all([Author(id=1, name="Ann"), Author(id=2, name="Ben")])
    await name_of(sessions)
    await cache.drain()


# ------------------------------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize("what", ["engine", "sync engine", "session", "sync session", "scoped session", "connection"])
@pytest.mark.usefixtures("ann")
async def test_statements_are_counted_whatever_leads_to_the_engine(
    what: str, engine: AsyncEngine, sessions: Sessions
) -> None:
    async with sessions() as session, engine.connect() as connection:
        database: dict[str, Any] = {
            "engine": engine,
            "sync engine": engine.sync_engine,
            "session": session,
            "sync session": session.sync_session,
            "scoped session": async_scoped_session(sessions, asyncio.current_task),
            "connection": connection,
        }
        async with assert_queries(database[what], 2) as queries:
            await session.get(Author, 2)
            await session.execute(text("SELECT  1\n AS one"))
        assert queries[0].startswith("SELECT author.id")
        with assert_queries(database[what], 0):
            await session.get(Author, 1)
        assert len(queries) == 2, "nothing is noted after the block"


@pytest.mark.usefixtures("ann")
async def test_a_wrong_number_of_statements_shows_them(engine: AsyncEngine, sessions: Sessions) -> None:
    message = "1 SQL statements were expected, and 2 executed:\n  1. SELECT 1\n  2. SELECT 2 AS two"

    async def execute(*statements: str) -> None:
        async with assert_queries(engine, 1), sessions() as session:
            for statement in statements:
                await session.execute(text(statement))

    with pytest.raises(AssertionError, match=re.escape(message)):
        await execute("SELECT 1", "SELECT 2\n  AS two")
    with pytest.raises(AssertionError, match="1 SQL statements were expected, and 0 executed: none"):
        await execute()


async def test_an_error_of_the_block_goes_first_and_nothing_listens_after_it(engine: AsyncEngine) -> None:
    with pytest.raises(LookupError), assert_queries(engine, 7):
        raise LookupError
    assert not engine.sync_engine.dispatch.before_cursor_execute


async def test_a_session_that_is_bound_to_no_engine_cannot_be_counted() -> None:
    with pytest.raises(ConfigurationError, match="bound to no engine, or to several; give the engine itself"):
        counting_queries(AsyncSession()).__enter__()


# -------------------------------------------------------------------------------------------------------------- served


@pytest.mark.usefixtures("ann")
async def test_what_is_served_from_the_cache_is_found_so(sessions: Sessions, cache: Cache, plain: Plain) -> None:
    async with sessions() as session, assert_served_from_cache(session):
        assert await session.get(Author, 1)
    with assert_served_from_cache(cache):
        await name_of(sessions)
    async with plain() as other, assert_served_from_cache(other, cache):
        await name_of(sessions)
    assert not cache.telemetry.observers


async def nothing(_: AsyncCachedSession) -> None:
    pass


async def a_miss(session: AsyncCachedSession) -> None:
    await session.get(Author, 1)
    await session.get(Author, 2)


async def a_bypass(session: AsyncCachedSession) -> None:
    await session.get(Author, 1)
    await session.get(Author, 2, populate_existing=True)


async def a_select(session: AsyncCachedSession) -> None:
    await session.get(Author, 1)
    await session.execute(text("select count(*) from author"))


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (nothing, "not served from the cache: 0 hits; no get read past it"),
        (a_miss, "1 hits; 1 of Author missed; SELECTs:\n  1. SELECT author.id"),
        (a_bypass, "1 hits; 1 of Author read past it (options); SELECTs:\n  1. SELECT author.id"),
        (a_select, "SELECTs:\n  1. select count(*) from author"),
    ],
)
@pytest.mark.usefixtures("ann")
async def test_what_is_not_served_from_the_cache_is_told(
    read: Callable[[AsyncCachedSession], Any], told: str, sessions: Sessions
) -> None:
    with pytest.raises(AssertionError) as error:
        async with sessions() as session, assert_served_from_cache(session):
            await read(session)
    assert told in str(error.value)


async def test_of_a_cache_alone_the_gets_are_seen(ann: None, sessions: Sessions, cache: Cache) -> None:
    async def read(*ids: int) -> None:
        with assert_served_from_cache(cache):
            for id_ in ids:
                await name_of(sessions, id_)

    await read(1, 1)
    with pytest.raises(AssertionError, match="2 hits; 1 of Author missed; SELECTs: none"):
        await read(1, 1, 2)


async def test_without_a_cache_there_is_nothing_to_be_served_from(plain: Plain, engine: AsyncEngine) -> None:
    for target in (plain(), engine):
        with pytest.raises(ConfigurationError, match="has no cache; give one"):
            assert_served_from_cache(target).__enter__()


# ------------------------------------------------------------------------------------------------------------ switches


@pytest.mark.usefixtures("ann")
async def test_caching_is_off_within_the_block_and_commits_go_on_invalidating(
    sessions: Sessions, cache: Cache, engine: AsyncEngine
) -> None:
    async with caching_off(cache):
        with caching_off(cache), assert_queries(engine, 1):
            assert await name_of(sessions) == "Ann"
        with assert_queries(engine, 1):
            assert await name_of(sessions) == "Ann"
        async with sessions.begin() as session:
            (await session.get_one(Author, 1)).name = "Eve"
    await cache.drain()
    with assert_queries(engine, 1):
        assert await name_of(sessions) == "Eve"


@pytest.mark.parametrize("backend", [MemoryBackend, FakeMemcached])
async def test_a_server_that_fails_breaks_nothing_and_is_repaired_when_it_is_back(
    backend: type[MemoryBackend] | type[FakeMemcached], engine: AsyncEngine
) -> None:
    async with Cache(backend()) as cache:
        cache.register(Base)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        async with sessions.begin() as session:
            session.add(Author(id=1, name="Ann"))
        await name_of(sessions)
        await cache.drain()
        with failing(cache):
            for _ in range(2):
                with assert_queries(engine, 1):
                    assert await name_of(sessions) == "Ann"
            async with asyncio.timeout(cache.settings.lock_timeout_s / 2):  # nobody waits for it
                async with sessions.begin() as session:
                    (await session.get_one(Author, 1)).name = "Eve"
            with pytest.raises(BackendError):
                await cache.invalidate(Author, 1)
        await cache.drain()
        assert (cache.stats.repairs, cache.stats.repairs_failed) == (1, 0)
        assert await name_of(sessions) == "Eve"
        await cache.drain()
        with assert_served_from_cache(cache):
            assert await name_of(sessions) == "Eve"


async def test_a_commit_is_refused_while_the_server_fails_if_it_is_to_be(engine: AsyncEngine) -> None:
    backend = FailingBackend(MemoryBackend(), failing=False)
    async with Cache(backend, on_lock_failure="raise") as cache:
        cache.register(Base)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        backend.failing = True
        with pytest.raises(LockNotPlacedError):
            async with sessions.begin() as session:
                session.add(Author(id=1, name="Ann"))
        backend.failing = False
        async with sessions.begin() as session:
            session.add(Author(id=1, name="Ann"))
        assert await name_of(sessions) == "Ann"


# -------------------------------------------------------------------------------------------------- as a server does it


class Clock:
    now_s = 100.9

    def __call__(self) -> float:
        return self.now_s


KEY = Key(b"key", 0)


def writing(value: bytes, ttl_s: float, *, pinned: bool = False) -> Change:
    return Change(KEY, lambda _: Write(value, ttl_s, pinned))


@pytest.mark.parametrize(
    ("ttl_s", "pinned", "lasts_s"), [(0.3, False, 0.1), (1.0, False, 0.1), (1.2, False, 1.1), (1.0, True, 1.1)]
)
async def test_seconds_are_whole_and_tick_with_the_clock(ttl_s: float, lasts_s: float, *, pinned: bool) -> None:
    """As memcached's: what is stored at 100.9 for a second is gone at 101."""
    clock = Clock()
    server = FakeMemcached(clock=clock)
    await server.apply([writing(b"value", ttl_s, pinned=pinned)])
    clock.now_s = 100.9 + lasts_s - 0.01
    assert await server.get_many([KEY]) == [b"value"]
    clock.now_s = 100.9 + lasts_s + 0.01
    assert await server.get_many([KEY]) == [None]


async def test_what_is_larger_than_a_mebibyte_is_refused() -> None:
    server = FakeMemcached()
    for size, stored in ((1 << 20, True), ((1 << 20) + 1, False)):
        (applied,) = await server.apply([writing(bytes(size), 60)])
        assert applied.confirmed
        assert (applied.after == bytes(size)) is stored


async def test_others_have_their_turn_at_each_call_and_what_is_cancelled_may_have_happened() -> None:
    server = FakeMemcached()
    turns: list[str] = []

    async def call() -> None:
        turns.append("asked")
        await server.get_many([KEY])
        turns.append("answered")

    await asyncio.gather(call(), call())
    assert turns == ["asked", "asked", "answered", "answered"]

    task = asyncio.create_task(server.apply([writing(b"value", 60)]))
    for _ in range(2):  # it is there, and its answer under way
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert await server.get_many([KEY]) == [b"value"]


@pytest.mark.parametrize(("backend", "in_background"), [(FakeMemcached, True), (MemoryBackend, False)])
async def test_unlocking_goes_on_in_the_background(
    backend: Callable[[], Backend], engine: AsyncEngine, *, in_background: bool
) -> None:
    """In memory it is done at once, so that a test that passes there may fail with a server."""
    tasks: list[asyncio.Task[Any] | None] = []
    async with Cache(backend()) as cache:
        cache.register(Base)
        cache.observe(lambda event: tasks.append(asyncio.current_task()) if isinstance(event, Unlocked) else None)
        async with async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache).begin() as session:
            session.add(Author(id=1, name="Ann"))
        await cache.drain()
    (unlocking,) = tasks
    assert unlocking is not None
    assert (unlocking.get_name() == "asynccache: unlock") is in_background


async def test_caches_share_it_as_processes_share_a_server(engine: AsyncEngine) -> None:
    server = FakeMemcached(latency_s=0.001)
    async with Cache(server) as one, Cache(server) as other:
        makers = []
        for cache in (one, other):
            cache.register(Base)
            makers.append(async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache))
        async with makers[0].begin() as session:
            session.add(Author(id=1, name="Ann"))
        await one.drain()
        assert await name_of(makers[0]) == "Ann"
        await one.drain()
        with assert_served_from_cache(other):
            assert await name_of(makers[1]) == "Ann"
        async with makers[1].begin() as session:
            (await session.get_one(Author, 1)).name = "Eve"
        assert await name_of(makers[0]) == "Eve"
        await one.aclose()
        assert await name_of(makers[1]) == "Eve"


@pytest.fixture
async def fake(engine: AsyncEngine) -> AsyncIterator[Sessions]:
    async with Cache(FakeMemcached()) as cache:
        cache.register(Base)
        yield async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)


async def test_a_herd_makes_one_select(plain: Plain, fake: Sessions, statements: Statements) -> None:
    async with plain.begin() as session:
        session.add_all([Author(id=id_, name="Ann") for id_ in range(1, 4)])
    statements.clear()

    async def read() -> None:
        async with fake() as session:
            assert len(await cached_get_many(session, Author, [1, 2, 3])) == 3

    await asyncio.gather(*(read() for _ in range(50)))
    assert len(statements.selects()) == 1


def test_a_lease_is_a_lease_there_too() -> None:
    """Transitions are the protocol's own: nothing is made simpler but the wire."""
    server, lease = FakeMemcached(), protocol.Lease(protocol.fresh_id(), protocol.fresh_id())

    async def take_twice() -> list[bool]:
        taken = [
            (await server.apply([Change(KEY, protocol.take_lease(each, 3))]))[0].after == each.encoded()
            for each in (lease, protocol.Lease(protocol.fresh_id(), lease.nonce))
        ]
        (filled,) = await server.apply([Change(KEY, protocol.fill(lease, b"row", 60))])
        return [*taken, filled.after == protocol.opened(lease.nonce) + b"row"]

    assert asyncio.run(take_twice()) == [True, False, True]


def test_it_imports_no_test_framework() -> None:
    program = "import sys, asynccache.testing; print({'pytest', 'unittest', 'hypothesis'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=50)
    assert done.stdout.strip() == "set()"
