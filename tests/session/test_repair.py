"""What a process owes to a cache that was away: slots that it changed and could not lock, look at or release."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import event, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.util import await_only

from asynccache import AsyncCachedSession, Cache, LockNotPlacedError, NodeState, protocol
from asynccache.protocol import Slot
from asynccache.repair import Claim
from tests.conftest import Sessions
from tests.models import Author
from tests.servers import FaultProxy, Memcached
from tests.session.slots import Slots, name_of
from tests.watch import Watch

REPAIRS_MAX = 3
AUTHORS = range(1, 9)


@pytest.fixture
async def proxy(memcached_server: Memcached) -> AsyncIterator[FaultProxy]:
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        yield proxy


@pytest.fixture
async def cache(proxy: FaultProxy) -> AsyncIterator[Cache]:
    """Behind the proxy, so that it can lose a server that others still reach."""
    async with Cache(
        f"memcached://{proxy.host}:{proxy.port}", lock_ttl=1, lock_timeout=0.5, repairs_max=REPAIRS_MAX
    ) as cache:
        cache.register(Author)
        yield cache


@pytest.fixture
async def elsewhere(engine: AsyncEngine, memcached_url: str) -> AsyncIterator[Sessions]:
    """Sessions of another process, which reaches the server always."""
    async with Cache(memcached_url) as cache:
        cache.register(Author)
        yield async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)


@pytest.fixture
async def watch(cache: Cache) -> Watch:
    return Watch(cache._store.backend)


@pytest.fixture
async def authors(sessions: Sessions, cache: Cache) -> None:
    """Eight authors, all called Ann, in the database and in the cache."""
    async with sessions.begin() as session:
        session.add_all([Author(id=id_, name="Ann") for id_ in AUTHORS])
    await cache.drain()
    assert await names(sessions) == ["Ann"] * 8
    await cache.drain()


async def names(sessions: async_sessionmaker[AsyncCachedSession]) -> list[str | None]:
    return [await name_of(sessions, id_) for id_ in AUTHORS]


async def rename(sessions: async_sessionmaker[AsyncCachedSession], id_: int) -> None:
    async with sessions.begin() as session:
        (await session.get_one(Author, id_)).name = "Eve"


def part(proxy: FaultProxy) -> None:
    """The server is there, and this process cannot reach it."""
    proxy.refuse()
    proxy.cut()


@pytest.mark.usefixtures("authors")
async def test_more_than_can_be_remembered_is_owed_by_its_generations(
    sessions: Sessions, elsewhere: Sessions, cache: Cache, proxy: FaultProxy, slots: Slots, watch: Watch
) -> None:
    assert await names(elsewhere) == ["Ann"] * 8
    generations = await slots.generations(Author)
    part(proxy)
    for id_ in AUTHORS:
        await rename(sessions, id_)
        assert len(cache.bound().repairs) <= REPAIRS_MAX + 16
    assert await names(sessions) == ["Eve"] * 8, "this process reads from the database what it could not lock"

    await proxy.accept()
    await watch.until(NodeState.CLOSED)
    assert await names(sessions) == ["Eve"] * 8
    await cache.drain()
    assert await names(elsewhere) == ["Eve"] * 8, "others read it now, at the latest"
    assert cache.stats.repairs_failed == len(cache.bound().repairs) == 0
    renewed = sum(new != old for new, old in zip(await slots.generations(Author), generations, strict=True))
    assert 1 <= renewed <= len(AUTHORS) - REPAIRS_MAX, "some, and not one for each row that there was room for"


@pytest.mark.usefixtures("authors")
async def test_so_is_what_many_bulk_writers_could_not_lock(
    sessions: Sessions, elsewhere: Sessions, cache: Cache, proxy: FaultProxy, watch: Watch
) -> None:
    assert await names(elsewhere) == ["Ann"] * 8
    part(proxy)
    for _ in range(10):
        async with sessions.begin() as session:
            await session.execute(update(Author).values(name="Eve"))
        assert len(cache.bound().repairs) <= REPAIRS_MAX + 16
    await proxy.accept()
    await watch.until(NodeState.CLOSED)
    assert await names(sessions) == ["Eve"] * 8
    await cache.drain()
    assert await names(elsewhere) == ["Eve"] * 8


@pytest.mark.usefixtures("authors")
async def test_nothing_is_forgotten_because_it_is_not_doubted(
    engine: AsyncEngine, sessions: Sessions, plain: async_sessionmaker[AsyncSession], cache: Cache
) -> None:
    """As after commits whose outcome is not known, and whose locks were lost meanwhile."""
    async with plain.begin() as session:
        await session.execute(update(Author).values(name="Eve"))
    assert await names(sessions) == ["Ann"] * 8
    cache.bound().repairs.owe(
        (Claim(_slot_of(cache, engine, id_), protocol.fresh_id()) for id_ in AUTHORS), doubtful=False
    )
    assert len(cache.bound().repairs) <= REPAIRS_MAX + 16
    await cache.drain()
    assert await names(sessions) == ["Eve"] * 8


def lose_lock_and_server(engine: AsyncEngine, cache: Cache, elsewhere: Sessions, proxy: FaultProxy) -> None:
    """At the next COMMIT: when the lock is placed it is lost, another process stores the old row, and this one is cut
    off before the COMMIT is sent."""
    happened = False

    def at_commit(_: object) -> None:
        nonlocal happened
        if not happened:
            happened = True
            await_only(refill())
            part(proxy)

    async def refill() -> None:
        reader, writer = await asyncio.open_connection(*proxy.upstream)
        writer.write(b"delete %b\r\n" % _slot_of(cache, engine, 1).key.name)
        assert await reader.readline() == b"DELETED\r\n"
        writer.close()
        await writer.wait_closed()
        assert await name_of(elsewhere) == "Ann"
        await elsewhere.kw["cache"].drain()

    event.listen(engine.sync_engine, "commit", at_commit)


@pytest.mark.usefixtures("authors")
async def test_a_commit_that_may_not_leave_an_old_row_waits_to_look_at_its_locks_again(
    engine: AsyncEngine, elsewhere: Sessions, proxy: FaultProxy
) -> None:
    url = f"memcached://{proxy.host}:{proxy.port}"
    async with Cache(url, lock_timeout=30, lock_ttl=60, on_lock_failure="raise") as cache:
        cache.register(Author)
        watch = Watch(cache._store.backend)
        lose_lock_and_server(engine, cache, elsewhere, proxy)
        renaming = asyncio.create_task(rename(async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache), 1))
        await watch.until(NodeState.OPEN)
        await proxy.accept()
        await renaming
        assert (cache.stats.locks_lost, cache.stats.locks_unverified) == (1, 0)
        assert await name_of(elsewhere) == "Eve", "as soon as the commit is acknowledged"


@pytest.mark.usefixtures("authors")
async def test_a_lock_that_could_not_be_looked_at_again_is_not_trusted(
    engine: AsyncEngine, sessions: Sessions, elsewhere: Sessions, proxy: FaultProxy, cache: Cache, watch: Watch
) -> None:
    lose_lock_and_server(engine, cache, elsewhere, proxy)
    await rename(sessions, 1)
    assert cache.stats.locks_unverified == 1
    assert cache.stats.locks == 9, "it was placed (and eight when the authors were made)"
    assert await name_of(sessions) == "Eve"
    await proxy.accept()
    await watch.until_used()
    assert await name_of(sessions) == "Eve", "although the old row lies in the cache"
    await cache.drain()
    assert await name_of(elsewhere) == "Eve"


def _slot_of(cache: Cache, engine: AsyncEngine, id_: int) -> Slot:
    scope = cache.scope_of(engine.sync_engine)
    assert scope is not None
    entity = scope.entity(Author)
    assert entity is not None
    slot = entity.slots.row((id_,))
    assert slot is not None
    return slot


@pytest.mark.usefixtures("authors")
async def test_a_commit_does_not_wait_for_a_server_that_is_known_to_be_away(
    sessions: Sessions, proxy: FaultProxy, cache: Cache, watch: Watch
) -> None:
    part(proxy)
    await names(sessions)
    assert watch.states[0] is NodeState.OPEN
    commands = proxy.bytes_up
    began_s = time.monotonic()
    await rename(sessions, 1)
    assert time.monotonic() - began_s < 0.4, "less than lock_timeout"
    assert (cache.stats.locks_failed, proxy.bytes_up) == (1, commands)


@pytest.mark.usefixtures("authors")
async def test_and_is_refused_at_once_if_it_is_to_be(
    engine: AsyncEngine, proxy: FaultProxy, plain: async_sessionmaker[AsyncSession]
) -> None:
    async with Cache(f"memcached://{proxy.host}:{proxy.port}", lock_timeout=5, on_lock_failure="raise") as cache:
        cache.register(Author)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        part(proxy)
        began_s = time.monotonic()
        with pytest.raises(LockNotPlacedError):
            await rename(sessions, 1)
        assert time.monotonic() - began_s < 2, "less than lock_timeout"
    assert await name_of(plain) == "Ann"


@pytest.mark.usefixtures("authors")
async def test_what_is_owed_for_longer_than_anything_is_served_is_given_up(
    engine: AsyncEngine, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    async with Cache(f"memcached://{proxy.host}:{proxy.port}", ttl=0.5, lock_timeout=0.2) as cache:
        cache.register(Author)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        part(proxy)
        await rename(sessions, 1)
        await cache.drain()
        assert (cache.stats.repairs_failed, len(cache.bound().repairs)) == (1, 0)
    assert "1 slots could not be unlocked or destroyed" in caplog.text
