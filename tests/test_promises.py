"""The promises of the README, each with the smallest scenario that would break it.

The details have tests of their own beside this file; these are the ones to read first.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import inspect, update
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import attributes

from asynccache import AsyncCachedSession, Cache, Change, Key, MemoryBackend, Transition, Write, protocol
from asynccache.backends.base import UNREADABLE
from tests.conftest import Sessions, Statements
from tests.gates import GatedBackend, a_write
from tests.models import Author, Base
from tests.servers import Memcached


async def name_of(sessions: Sessions, id_: int = 1) -> str | None:
    async with sessions() as session:
        author = await session.get(Author, id_)
        return author.name if author is not None else None


async def rename(sessions: Sessions, name: str, id_: int = 1) -> None:
    async with sessions.begin() as session:
        author = await session.get(Author, id_)
        assert author is not None
        author.name = name


@pytest.fixture
async def gated(engine: AsyncEngine) -> AsyncIterator[tuple[Sessions, GatedBackend, Cache]]:
    """Sessions over a backend whose calls a test can hold, with one author in the database."""
    backend = GatedBackend(MemoryBackend())
    async with Cache(backend) as cache:
        cache.register(Base)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        async with sessions.begin() as session:
            session.add(Author(id=1, name="old"))
        await cache.drain()
        yield sessions, backend, cache


async def test_1_a_cached_get_returns_a_real_persistent_instance(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    async with sessions.begin() as session:
        session.add(Author(id=1, name="old"))
    await name_of(sessions)
    await cache.drain()
    statements.clear()

    async with sessions.begin() as session:
        author = await session.get(Author, 1)
        assert author is not None
        assert cache.stats.hits == 1
        assert statements == []
        assert inspect(author).persistent
        assert author in session
        assert not session.dirty
        author.name = "new"
        assert attributes.get_history(author, "name").deleted == ["old"]
    assert len(statements) == 1
    assert statements[0].startswith("UPDATE author SET name=")
    assert await name_of(sessions) == "new"


@pytest.mark.parametrize("processes", [1, 2])
async def test_2_concurrent_misses_make_one_select_in_the_whole_fleet(
    engine: AsyncEngine, statements: Statements, memcached_url: str, processes: int
) -> None:
    # Two caches share nothing but memcached, as two processes do. It is to answer, however busy the machine is.
    fleet = [Cache(memcached_url + "?timeout=5") for _ in range(processes)]
    for cache in fleet:
        cache.register(Base)
    makers = [async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache) for cache in fleet]
    async with makers[0].begin() as session:
        session.add(Author(id=1, name="one"))
    await fleet[0].drain()
    statements.clear()

    names = await asyncio.gather(*(name_of(maker) for maker in makers for _ in range(200)))
    assert set(names) == {"one"}
    assert len(statements.selects()) == 1
    for cache in fleet:
        await cache.aclose()


async def test_2_without_the_cache_server_they_make_at_most_two_in_each_process(
    engine: AsyncEngine, statements: Statements, memcached_server: Memcached
) -> None:
    async with Cache(memcached_server.url) as cache:
        cache.register(Base)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        async with sessions.begin() as session:
            session.add(Author(id=1, name="one"))
        await cache.drain()
        memcached_server.stop()
        statements.clear()

        names = await asyncio.gather(*(name_of(sessions) for _ in range(200)))
        assert set(names) == {"one"}
        assert len(statements.selects()) <= 2


@pytest.mark.parametrize("step", ["lease", "fill"])
async def test_3_a_row_read_before_a_commit_is_never_stored_after_it(
    gated: tuple[Sessions, GatedBackend, Cache], step: str
) -> None:
    """
    1. A reader misses (and, at "fill", takes its lease and reads the old row).
    2. A writer commits a new row.
    3. The reader goes on.
    """
    sessions, backend, cache = gated
    await name_of(sessions)
    await cache.drain()
    await cache.invalidate(Author, 1)  # so that the slot is empty, and its generation there
    writes = 0

    def last_write(call: object) -> bool:
        nonlocal writes
        writes += a_write(call)  # type: ignore[arg-type]
        return writes == 2

    gate = backend.hold({"lease": a_write, "fill": last_write}[step])
    reader = asyncio.create_task(name_of(sessions))
    await gate.reached.wait()
    async with sessions.begin() as session:  # without a get, which would wait for the reader
        await session.execute(update(Author).where(Author.id == 1).values(name="new"))
    gate.open()
    assert await reader in ("old", "new")
    await cache.drain()
    assert await name_of(sessions) == "new"


async def test_4_no_hit_is_stale_after_a_commit_is_acknowledged(gated: tuple[Sessions, GatedBackend, Cache]) -> None:
    """
    1. The old row is in the cache.
    2. A writer commits; the unlocking that follows is held, as if the writer's process had died there.
    """
    sessions, backend, cache = gated
    await name_of(sessions)
    await cache.drain()
    assert await name_of(sessions) == "old"
    assert cache.stats.hits > 0

    hits = cache.stats.hits
    held = [backend.hold(a_write), backend.hold(a_write)]
    held[0].open()  # the lock
    await rename(sessions, "new")
    await held[1].reached.wait()
    assert await name_of(sessions) == "new"
    assert await name_of(sessions) == "new"
    assert cache.stats.hits == hits + 1  # the writer's own, before it wrote
    held[1].open()


@pytest.mark.parametrize("trouble", ["stopped", "hangs"])
async def test_5_a_cache_that_is_down_never_breaks_the_application(
    engine: AsyncEngine, memcached_server: Memcached, trouble: str
) -> None:
    async with Cache(memcached_server.url + "?timeout=0.1", lock_timeout=0.2) as cache:
        cache.register(Base)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        async with sessions.begin() as session:
            session.add(Author(id=1, name="old"))
        await cache.drain()
        (memcached_server.stop if trouble == "stopped" else memcached_server.pause)()

        began_s = time.monotonic()
        assert await name_of(sessions) == "old"
        await rename(sessions, "new")
        assert await name_of(sessions) == "new"
        assert time.monotonic() - began_s < 10
        assert cache.stats.backend_errors > 0


async def test_6_a_transaction_sees_its_own_writes_and_nobody_sees_them_before_it_commits(
    sessions: Sessions, cache: Cache, database_url: str
) -> None:
    async with sessions.begin() as session:
        session.add(Author(id=1, name="old"))
    await name_of(sessions)
    await cache.drain()

    async with sessions() as session:
        await session.execute(update(Author).where(Author.id == 1).values(name="new"))
        session.expunge_all()
        author = await session.get(Author, 1)
        assert author is not None
        assert author.name == "new"
        assert await name_of(sessions) == "old"
        await session.rollback()
    await cache.drain()
    assert await name_of(sessions) == "old"


def put(value: bytes) -> Transition:
    return lambda _: Write(value, 60)


class Bomb:
    """What a pickle can do to whoever loads it."""

    exploded = False

    @classmethod
    def explode(cls) -> None:
        cls.exploded = True

    def __reduce__(self) -> tuple[object, ...]:
        return self.explode, ()


async def test_7_nothing_that_comes_from_the_cache_server_can_run_code(
    gated: tuple[Sessions, GatedBackend, Cache],
) -> None:
    sessions, backend, cache = gated
    await name_of(sessions)
    await cache.drain()
    assert isinstance(backend.backend, MemoryBackend)
    (entity,) = (name for name in backend.backend._slots._index if b"#" not in name)  # which generations have
    (value,) = await backend.get_many([Key(entity, 0)])
    assert value is not None
    body = value[protocol.ID_BYTES + 2 + 8 :]
    bomb = pickle.dumps(Bomb())

    for forged in (bomb, value.replace(body, bomb), value + bomb, UNREADABLE + bomb, value[:20]):
        await backend.apply([Change(Key(entity, 0), put(forged))])
        assert await name_of(sessions) == "old"
        await cache.drain()
    assert not Bomb.exploded
