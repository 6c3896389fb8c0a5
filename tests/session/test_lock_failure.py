"""What happens when the cache is down while something is committed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import event, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from asynccache import AsyncCachedSession, Cache, LockNotPlacedError, cached_get_many, cached_invalidate
from tests.conftest import Sessions
from tests.models import Author, Secret
from tests.servers import Memcached
from tests.session.slots import Slots, name_of
from tests.watch import Watch

LOCK_TTL_S = 1.0
LOCK_TIMEOUT_S = 0.4
READ_S_MAX = 0.5
"""How long a get may take when the cache does not answer: its time-out of 0.25 s, and the SELECT."""


@pytest.fixture
async def cache(memcached_url: str) -> AsyncIterator[Cache]:
    async with Cache(memcached_url, lock_ttl=LOCK_TTL_S, lock_timeout=LOCK_TIMEOUT_S) as cache:
        cache.register(Author)
        yield cache


@pytest.fixture
async def strict(engine: AsyncEngine, memcached_url: str) -> AsyncIterator[Sessions]:
    """Sessions that rather refuse a commit than leave an old row in the cache for a while."""
    url = memcached_url
    async with Cache(url, lock_ttl=LOCK_TTL_S, lock_timeout=LOCK_TIMEOUT_S, on_lock_failure="raise") as cache:
        cache.register(Author)
        yield async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)


@pytest.fixture
async def ann(sessions: Sessions, cache: Cache) -> None:
    """Author 1, in the database and in the cache; Author 2 in the database alone."""
    async with sessions.begin() as session:
        session.add_all([Author(id=1, name="Ann"), Author(id=2, name="Ben")])
    await cache.drain()
    assert await name_of(sessions) == "Ann"
    await cache.drain()


async def rename(sessions: async_sessionmaker[Any], name: str = "Eve") -> None:
    async with sessions.begin() as session:
        (await session.get_one(Author, 1)).name = name


Trouble = tuple[Callable[[Memcached], None], Callable[[Memcached], None]]

DOWN: Trouble = Memcached.stop, Memcached.start
"""Connections are refused, and it comes back empty."""

SILENT: Trouble = Memcached.pause, Memcached.resume
"""It takes connections and never answers, and comes back with what it held."""

in_trouble = pytest.mark.parametrize("trouble", [DOWN, SILENT], ids=["down", "silent"])


@in_trouble
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_commit_that_cannot_lock_commits_in_a_bounded_time_and_repairs_the_cache_afterwards(
    trouble: Trouble,
    sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    memcached_server: Memcached,
    cache: Cache,
    slots: Slots,
) -> None:
    fail, recover = trouble
    fail(memcached_server)
    began_s = time.monotonic()
    await rename(sessions)
    assert time.monotonic() - began_s < 2 * READ_S_MAX + LOCK_TIMEOUT_S + 0.5
    assert cache.stats.locks_failed == 1
    assert cache.stats.locks_unverified == 0, "nobody looked for what is doubted anyway"
    assert await name_of(plain) == "Eve"

    recover(memcached_server)
    for _ in range(5):
        assert await name_of(sessions) == "Eve", "this process does not read what it could not lock"
    await cache.drain()
    assert await name_of(sessions) == "Eve"
    await cache.drain()
    assert await slots.holds_value(Author, 1), "and it is read from the cache again"


@in_trouble
@pytest.mark.usefixtures("ann")
async def test_a_table_that_could_not_be_locked_is_not_read_from_the_cache_either(
    trouble: Trouble, sessions: Sessions, memcached_server: Memcached, cache: Cache
) -> None:
    fail, recover = trouble
    fail(memcached_server)
    async with sessions.begin() as session:
        await session.execute(update(Author).values(name="Eve"))
    recover(memcached_server)
    async with sessions() as session:
        found = await cached_get_many(session, Author, [1, 2])
    assert [author and author.name for author in found.values()] == ["Eve", "Eve"]
    await cache.drain()
    assert [await name_of(sessions, id_) for id_ in (1, 2)] == ["Eve", "Eve"]


@pytest.mark.usefixtures("ann")
async def test_other_processes_may_read_an_old_row_until_it_is_repaired_and_not_longer(
    engine: AsyncEngine, sessions: Sessions, memcached_server: Memcached, memcached_url: str, cache: Cache
) -> None:
    async with Cache(memcached_url) as elsewhere:
        elsewhere.register(Author)
        there = async_sessionmaker(engine, class_=AsyncCachedSession, cache=elsewhere)
        assert await name_of(there) == "Ann"
        memcached_server.pause()
        await rename(sessions)
        memcached_server.resume()
        await cache.drain()
        assert await name_of(there) == "Eve"


@in_trouble
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_commit_can_be_refused_when_it_cannot_lock(
    trouble: Trouble,
    strict: Sessions,
    sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    memcached_server: Memcached,
) -> None:
    fail, recover = trouble
    watch = Watch(strict.kw["cache"]._store.backend)
    assert await name_of(strict) == "Ann"
    fail(memcached_server)
    async with strict() as session:
        (await session.get_one(Author, 1)).name = "Eve"
        with pytest.raises(LockNotPlacedError, match=r"1 slots .* nothing was committed"):
            await session.commit()
        await session.rollback()
        assert await name_of(plain) == "Ann"

        recover(memcached_server)
        await watch.until_used()
        assert (await session.get_one(Author, 1)).name == "Ann"
        (await session.get_one(Author, 1)).name = "Zoe"
        await session.commit()
    assert await name_of(plain) == "Zoe"
    assert await name_of(sessions) == "Zoe"


@pytest.mark.parametrize("roll_back", [False, True], ids=["closed", "rolled back"])
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_commit_that_was_refused_leaves_no_transaction_open_on_its_connection(
    engine: AsyncEngine,
    strict: Sessions,
    plain: async_sessionmaker[AsyncSession],
    memcached_server: Memcached,
    *,
    roll_back: bool,
) -> None:
    """The next one that got it from the pool would see what was refused, and commit it."""
    memcached_server.pause()
    async with strict() as session:
        (await session.get_one(Author, 1)).name = "Eve"
        with pytest.raises(LockNotPlacedError):
            await session.commit()
        if roll_back:
            await session.rollback()
    async with plain() as session:
        (await session.get_one(Author, 2)).name = "Bob"
        await session.commit()
    await engine.dispose()
    assert (await name_of(plain, 1), await name_of(plain, 2)) == ("Ann", "Bob")


@pytest.mark.usefixtures("database_url", "ann")
async def test_an_external_commit_can_be_refused_too(
    engine: AsyncEngine,
    memcached_server: Memcached,
    memcached_url: str,
    plain: async_sessionmaker[AsyncSession],
) -> None:
    url = memcached_url
    async with Cache(url, lock_ttl=LOCK_TTL_S, lock_timeout=LOCK_TIMEOUT_S, on_lock_failure="raise") as cache:
        cache.register(Author)
        memcached_server.pause()
        async with engine.connect() as connection:
            outer = await connection.begin()
            async with AsyncCachedSession(connection, cache=cache) as session:
                (await session.get_one(Author, 1)).name = "Eve"
                await session.flush()
            with pytest.raises(LockNotPlacedError):
                await outer.commit()
            await outer.rollback()
        assert await name_of(plain) == "Ann"


@in_trouble
@pytest.mark.usefixtures("ann")
async def test_reads_go_to_the_database_in_a_bounded_time(
    trouble: Trouble, sessions: Sessions, memcached_server: Memcached
) -> None:
    fail, _ = trouble
    fail(memcached_server)
    began_s = time.monotonic()
    assert await asyncio.gather(*(name_of(sessions, id_) for id_ in (1, 2, 1, 2, 3))) == [
        "Ann",
        "Ben",
        "Ann",
        "Ben",
        None,
    ]
    assert time.monotonic() - began_s < 3 * READ_S_MAX


@in_trouble
@pytest.mark.usefixtures("ann")
async def test_a_commit_that_changes_nothing_cached_does_not_ask_the_cache(
    trouble: Trouble, sessions: Sessions, memcached_server: Memcached, cache: Cache
) -> None:
    fail, _ = trouble
    fail(memcached_server)
    began_s = time.monotonic()
    async with sessions.begin() as session:
        session.add(Secret(id=1, value="new"))
        await session.flush()
        await session.execute(update(Secret).values(value="newer"))
    assert time.monotonic() - began_s < 0.2
    assert cache.stats.backend_errors == cache.stats.locks_failed == 0


@pytest.mark.usefixtures("ann")
async def test_a_lock_that_was_placed_is_released_when_the_cache_is_back(
    engine: AsyncEngine, sessions: Sessions, memcached_server: Memcached, cache: Cache, slots: Slots
) -> None:
    event.listen(engine.sync_engine, "commit", lambda _: memcached_server.pause())
    await rename(sessions)
    assert cache.stats.locks_failed == 0
    memcached_server.resume()
    await cache.drain()
    assert not await slots.is_locked(Author, 1)
    assert await name_of(sessions) == "Eve"


@pytest.mark.usefixtures("ann")
async def test_cached_invalidate_alone_is_made_up_for_when_the_cache_is_back(
    sessions: Sessions, memcached_server: Memcached, cache: Cache, plain: async_sessionmaker[AsyncSession]
) -> None:
    await rename(plain)
    memcached_server.pause()
    async with sessions() as session:
        cached_invalidate(session, Author, 1)
        await session.commit()
    memcached_server.resume()
    await cache.drain()
    assert await name_of(sessions) == "Eve"


@pytest.mark.usefixtures("ann")
async def test_a_cache_can_be_closed_while_it_is_down(
    sessions: Sessions, memcached_server: Memcached, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    memcached_server.pause()
    await rename(sessions)
    began_s = time.monotonic()
    with caplog.at_level(logging.WARNING, "asynccache"):
        await cache.aclose()
    assert time.monotonic() - began_s < LOCK_TTL_S + 1
    assert "could not be unlocked" in caplog.text
