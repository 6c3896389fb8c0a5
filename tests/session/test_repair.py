"""What a process owes to a cache that was away: slots that it changed and could not lock, look at or release."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import event, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.util import await_only

from asynccache import AsyncCachedSession, BackendError, Cache, Key, LockNotPlacedError, NodeState
from asynccache.protocol import Slot, fresh_id
from asynccache.repair import Claim
from tests.conftest import Sessions
from tests.models import Author, Base
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
    cache.bound().repairs.owe((Claim(_slot_of(cache, engine, id_), fresh_id()) for id_ in AUTHORS), doubtful=False)
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
    slot = entity.row((id_,))
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
    async with Cache(
        f"memcached://{proxy.host}:{proxy.port}", ttl=0.5, negative_ttl=0.5, lease_ttl=0.5, lock_timeout=0.2
    ) as cache:
        cache.register(Author)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        part(proxy)
        await rename(sessions, 1)
        await cache.drain()
        assert (cache.stats.repairs_failed, len(cache.bound().repairs)) == (1, 0)
    assert "1 slots could not be unlocked or destroyed" in caplog.text


async def fill_up(server: Memcached) -> None:
    """Leave no room for anything small in a server that does not evict."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    for size in range(10, 250, 30):
        line, batch = b"STORED\r\n", range(500)
        while line == b"STORED\r\n":
            for i in batch:
                writer.write(b"set %d:%d 0 0 %d\r\n%b\r\n" % (size, i, size, bytes(size)))
            for _ in batch:
                line = await reader.readline()
            batch = range(batch.stop, batch.stop + 500)
        assert line.startswith(b"SERVER_ERROR out of memory")
    writer.close()
    await writer.wait_closed()


async def test_what_a_full_server_refuses_to_destroy_is_not_done(
    engine: AsyncEngine, plain: async_sessionmaker[AsyncSession]
) -> None:
    """A refusal is an answer, and the old row is still there."""
    with Memcached("-M", "-m", "2") as server:
        async with Cache(f"{server.url}?timeout=5", lock_timeout=0.2) as cache:
            cache.register(Author)
            sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
            async with plain.begin() as session:
                session.add(Author(id=1, name="Ann"))
            assert await name_of(sessions) == "Ann"
            await cache.drain()
            await fill_up(server)
            with pytest.raises(BackendError):
                await cache.invalidate(Author, 1)
            assert await name_of(sessions) == "Ann"
            assert cache.stats.hits == 1
            await rename(sessions, 1)
            assert await name_of(sessions) == "Eve"
            assert len(cache.bound().repairs) == 1


def test_what_one_event_loop_owed_is_settled_on_the_next(sqlite_url: str, memcached_server: Memcached) -> None:
    url = f"{memcached_server.url}?timeout=5"
    cache = Cache(memcached_server.url, lock_ttl=1, lock_timeout=0.2)
    cache.register(Author)

    async def commit_without_lock() -> None:
        engine = create_async_engine(sqlite_url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        async with sessions.begin() as session:
            session.add(Author(id=1, name="Ann"))
        await cache.drain()
        assert await name_of(sessions) == "Ann"
        await cache.drain()
        memcached_server.pause()
        await rename(sessions, 1)
        assert len(cache.bound().repairs) == 1
        await engine.dispose()

    async def settle() -> None:
        engine = create_async_engine(sqlite_url)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        cache.bound()
        await cache.drain()
        async with Cache(url) as other:
            other.register(Author)
            assert await name_of(async_sessionmaker(engine, class_=AsyncCachedSession, cache=other)) == "Eve"
        assert await name_of(sessions) == "Eve"
        assert cache.stats.hits == 1, "it is read from the cache again"
        await cache.aclose()
        await engine.dispose()

    asyncio.run(commit_without_lock())
    memcached_server.resume()
    asyncio.run(settle())


async def test_what_a_generation_owes_is_not_given_up_before_it_is_due() -> None:
    """1. A commit without a lock and without an answer: due when it must have ended. 2. Another: due at once."""
    async with Cache("memory://", ttl=0.1, lease_ttl=0.1, repairs_max=1) as cache:
        cache.register(Author)
        repairs = cache.bound().repairs
        claims = [Claim(Slot(Key(b"row:%d" % i, 0), Key(b"generation", 0)), fresh_id()) for i in range(3)]
        repairs.owe(claims[:2], delay_s=60, doubtful=True)
        repairs.owe(claims[2:], doubtful=True)
        await asyncio.sleep(1.5)
        assert len(repairs) == 2


@pytest.mark.parametrize("longest", ["lease_ttl", "negative_ttl"])
async def test_a_slot_is_doubted_for_as_long_as_anybody_may_put_an_old_row_there(
    longest: str, memcached_server: Memcached
) -> None:
    """Who took a lease before the commit may store the old row for as long as the lease lives."""
    times = {"ttl": 0.1, "negative_ttl": 0.1, "lease_ttl": 0.1} | {longest: 30.0}
    async with Cache(memcached_server.url, **times) as cache:  # type: ignore[arg-type]
        cache.register(Author)
        memcached_server.stop()
        cache.bound().repairs.owe([Claim(Slot(Key(b"row", 0), Key(b"generation", 0)), fresh_id())], doubtful=True)
        await asyncio.sleep(2.5)
        assert len(cache.bound().repairs) == 1


async def test_a_statement_of_which_nobody_knows_is_owed_although_one_before_it_could_not_be_locked(
    engine: AsyncEngine, memcached_server: Memcached
) -> None:
    def be_cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    async with Cache(memcached_server.url, lock_ttl=1, lock_timeout=0.5) as cache:
        cache.register(Author)
        watch = Watch(cache._store.backend)
        async with AsyncCachedSession(autocommit, cache=cache) as session:
            memcached_server.stop()
            await session.execute(update(Author).where(Author.id == 1).values(name="Eve"))
            assert cache.stats.locks_failed == 1
            memcached_server.start()
            await watch.until(NodeState.CLOSED)
            await cache.drain()
            assert len(cache.bound().repairs) == 0
            event.listen(engine.sync_engine, "do_execute", be_cancelled)
            with pytest.raises(asyncio.CancelledError):
                await session.execute(update(Author).where(Author.id == 2).values(name="Eve"))
            event.remove(engine.sync_engine, "do_execute", be_cancelled)
        assert len(cache.bound().repairs) == 1


async def test_closing_at_once_is_no_error(memcached_server: Memcached, caplog: pytest.LogCaptureFixture) -> None:
    async with Cache(memcached_server.url, on_lock_failure="raise") as cache:
        cache.bound()
    assert not caplog.records
