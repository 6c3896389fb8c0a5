"""What a cached get costs, counted: SQL statements, and commands to the cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import event, select, update
from sqlalchemy.exc import NoResultFound
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.util import await_only

from asynccache import (
    Applied,
    AsyncCachedSession,
    Backend,
    Cache,
    Change,
    Key,
    MemcachedBackend,
    MemoryBackend,
    Write,
    cached_get,
    cached_get_many,
    protocol,
)
from asynccache.backends.base import UNCONFIRMED, UNREADABLE
from tests.conftest import Sessions, Statements
from tests.models import Author, Base, Secret, Tag
from tests.servers import Memcached

pytestmark = pytest.mark.usefixtures("database_url", "cache_url")


# Two stores that count. Each is shared by all caches of a test, as a server is by all processes.


class CountedMemory(Backend):
    """Memory that counts what it is asked, that can fall silent like a server, and whose clock can be moved."""

    def __init__(self) -> None:
        self.commands = 0
        self.silent = False
        self.passed_s = 0.0
        self._slots = MemoryBackend(clock=lambda: time.monotonic() + self.passed_s)

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        self.commands += 1
        await asyncio.sleep(0)  # a server's answer takes its time, too
        return [UNREADABLE] * len(keys) if self.silent else await self._slots.get_many(keys)

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        self.commands += len(changes)
        await asyncio.sleep(0)
        return [UNCONFIRMED] * len(changes) if self.silent else await self._slots.apply(changes)

    async def aclose(self) -> None:
        pass


CountedBackend = CountedMemory | MemcachedBackend


@pytest.fixture
def new_backend(cache_url: str) -> Callable[[], CountedBackend]:
    """What a further process would make to reach the same slots. Patient, so that a busy machine changes no count."""
    memory = CountedMemory()
    return lambda: memory if cache_url == "memory://" else MemcachedBackend.from_url(cache_url)


@pytest.fixture
def backend(new_backend: Callable[[], CountedBackend]) -> CountedBackend:
    return new_backend()


def registered(backend: Backend, **settings: Any) -> Cache:
    cache = Cache(backend, ttl_jitter=0, **settings)
    cache.register(Base)
    cache.exclude(Secret)
    return cache


@pytest.fixture
async def cache(backend: CountedBackend) -> AsyncIterator[Cache]:
    async with registered(backend) as cache:
        yield cache


@dataclass(slots=True)
class Cost:
    sql: int
    commands: int


class Meter:
    """Counts what a block costs, the work that it leaves to the background included."""

    def __init__(self, cache: Cache, backend: CountedBackend, statements: Statements) -> None:
        self._cache = cache
        self._backend = backend
        self._statements = statements

    @asynccontextmanager
    async def __call__(self) -> AsyncGenerator[Cost]:
        await self._cache.drain()
        sql, commands = len(self._statements), self._backend.commands
        cost = Cost(0, 0)
        yield cost
        await self._cache.drain()
        cost.sql, cost.commands = len(self._statements) - sql, self._backend.commands - commands


@pytest.fixture
async def meter(
    cache: Cache, backend: CountedBackend, statements: Statements, plain: async_sessionmaker[AsyncSession]
) -> Meter:
    """Rows 1 to 9, none of them in the cache."""
    async with plain.begin() as session:
        session.add_all([Author(id=i, name=f"author {i}") for i in range(1, 10)])
        session.add(Tag(id=1, name="tag"))
    return Meter(cache, backend, statements)


class HeldSelect:
    """Stops the next SELECT just before it is sent.

    reached: it is there. release: let it go on. error: what it raises then.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.reached = asyncio.Event()
        self.error: Exception | None = None
        self._released = asyncio.Event()

        def stop(connection: object, cursor: object, sql: str, *rest: object) -> None:
            if sql.startswith("SELECT") and not self.reached.is_set():
                self.reached.set()
                await_only(self._released.wait())
                if self.error is not None:
                    raise self.error

        event.listen(engine.sync_engine, "before_cursor_execute", stop)

    def release(self) -> None:
        self._released.set()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def name_of(sessions: Sessions, pk: int = 1) -> str | None:
    """One request: a session, one get."""
    async with sessions() as session:
        author = await session.get(Author, pk)
        return author.name if author is not None else None


async def warm(sessions: Sessions, cache: Cache) -> None:
    """Have the engine's isolation asked for and the generation of author 1 made."""
    await name_of(sessions)
    await cache.drain()
    await cache.invalidate(Author, 1)


def slots_of(cache: Cache, engine: AsyncEngine, pk: int = 1) -> tuple[Key, Key]:
    scope = cache.scope_of(engine.sync_engine)
    assert scope is not None
    entity = scope.entity(Author)
    assert entity is not None
    slots = entity.row((pk,))
    assert slots is not None
    return slots


async def put(backend: Backend, key: Key, value: bytes, ttl_s: float = 60) -> None:
    """Overwrite a slot with any bytes, as only somebody else than this library would."""
    (applied,) = await backend.apply([Change(key, lambda _: Write(value, ttl_s))])
    assert applied.after == value


# -------------------------------------------------------------------------------------------------------- hit and miss


async def test_a_second_session_reads_from_the_cache(sessions: Sessions, cache: Cache, meter: Meter) -> None:
    assert await name_of(sessions) == "author 1"
    await cache.drain()
    assert (cache.stats.misses, cache.stats.loads, cache.stats.fills, cache.stats.hits) == (1, 1, 1, 0)
    assert await name_of(sessions) == "author 1"
    assert (cache.stats.misses, cache.stats.loads, cache.stats.fills, cache.stats.hits) == (1, 1, 1, 1)


async def test_a_hit_is_one_command_and_no_sql(sessions: Sessions, meter: Meter) -> None:
    await name_of(sessions)
    async with meter() as cost:
        assert await name_of(sessions) == "author 1"
    assert cost == Cost(sql=0, commands=1)


async def test_a_hit_of_cached_get_costs_the_same(sessions: Sessions, meter: Meter) -> None:
    await name_of(sessions)
    async with meter() as cost, sessions() as session:
        author = await cached_get(session, Author, 1)
        assert author is not None
        assert author.name == "author 1"
    assert cost == Cost(sql=0, commands=1)


async def test_a_miss_is_one_select_and_four_commands(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, meter: Meter
) -> None:
    """Read; take a lease; look at the generation and fill: by `gets` and `cas`, or a step each in memory.

    Two more where the generation has to be made.
    """
    generation = slots_of(cache, engine, 1)[1]
    neighbour = next(pk for pk in range(2, 1000) if slots_of(cache, engine, pk)[1] == generation)
    async with meter() as cost:
        await name_of(sessions, 1)
    assert cost == Cost(sql=1, commands=6)
    async with meter() as cost:
        await name_of(sessions, neighbour)
    assert cost == Cost(sql=1, commands=4)


async def test_that_there_is_no_such_row_is_cached_too(sessions: Sessions, cache: Cache, meter: Meter) -> None:
    assert await name_of(sessions, 404) is None
    async with meter() as cost:
        assert await name_of(sessions, 404) is None
    assert cost == Cost(sql=0, commands=1)
    assert (cache.stats.negative_hits, cache.stats.hits, cache.stats.misses) == (1, 0, 1)


async def test_what_the_session_holds_costs_nothing(sessions: Sessions, meter: Meter) -> None:
    async with sessions() as session:
        author = await session.get(Author, 1)
        async with meter() as cost:
            assert await session.get(Author, 1) is author
            assert await session.get_one(Author, 1) is author
            assert await cached_get(session, Author, 1) is author
            assert await cached_get_many(session, Author, [1]) == {1: author}
    assert cost == Cost(sql=0, commands=0)


async def test_get_one_raises_for_a_missing_row_on_miss_and_hit(sessions: Sessions, cache: Cache, meter: Meter) -> None:
    for _ in range(2):
        async with sessions() as session:
            with pytest.raises(NoResultFound):
                await session.get_one(Author, 404)
            assert (await session.get_one(Author, 1)).name == "author 1"
        await cache.drain()
    assert (cache.stats.negative_hits, cache.stats.hits) == (1, 1)


async def test_populate_existing_reads_past_the_cache(
    sessions: Sessions, plain: async_sessionmaker[AsyncSession], cache: Cache, meter: Meter
) -> None:
    await name_of(sessions)
    async with plain.begin() as session:  # which nobody sees
        await session.execute(update(Author).values(name="changed"))
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        assert author.name == "author 1"
        async with meter() as cost:
            assert await session.get(Author, 1, populate_existing=True) is author
        assert author.name == "changed"
    assert cost == Cost(sql=1, commands=0)
    assert cache.stats.bypassed == {"options": 1}


async def test_rows_and_their_absence_expire(
    sessions: Sessions, cache: Cache, backend: CountedBackend, meter: Meter
) -> None:
    cache.register(Author, ttl=2, negative_ttl=60)
    cache.register(Tag, ttl=60, negative_ttl=2)

    async def get_all() -> None:
        async with sessions() as session:
            for model in (Author, Tag):
                for pk in (1, 404):
                    await session.get(model, pk)

    await get_all()
    async with meter() as cost:
        await get_all()
    assert cost.sql == 0
    if isinstance(backend, CountedMemory):
        backend.passed_s = 2
    else:
        await asyncio.sleep(2.1)  # memcached counts whole seconds: they lasted between one and two
    before = cache.stats.hits, cache.stats.negative_hits
    async with meter() as cost:
        await get_all()
    assert cost.sql == 2
    assert (cache.stats.hits, cache.stats.negative_hits) == (before[0] + 1, before[1] + 1)  # Tag 1 and Author 404


# --------------------------------------------------------------------------------------------- one load for many misses


@pytest.mark.parametrize("tasks", [64, 1000])
async def test_concurrent_misses_of_one_key_are_one_select(
    tasks: int, sessions: Sessions, cache: Cache, meter: Meter
) -> None:
    await warm(sessions, cache)
    async with meter() as cost:
        names = await asyncio.gather(*(name_of(sessions) for _ in range(tasks)))
    assert names == ["author 1"] * tasks
    assert cost.sql == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("cache_url", ["memory"], indirect=True)
async def test_ten_thousand_misses_of_one_key_are_one_select(sessions: Sessions, cache: Cache, meter: Meter) -> None:
    await test_concurrent_misses_of_one_key_are_one_select(10_000, sessions, cache, meter)


async def test_a_process_that_starts_into_a_herd_takes_no_more_than_two_connections(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, meter: Meter
) -> None:
    """Nobody knows the engine's isolation yet: one session connects to ask. It may not be the one that then loads, and
    whoever holds a connection waits for another's load only briefly."""
    held = HeldSelect(engine)
    async with meter() as cost, asyncio.TaskGroup() as group:
        tasks = [group.create_task(name_of(sessions)) for _ in range(200)]
        async with asyncio.timeout(5):
            await until(lambda: cache.stats.misses == len(tasks) and held.reached.is_set())
        assert engine.sync_engine.pool.checkedout() <= 2  # type: ignore[attr-defined]
        held.release()
    assert [task.result() for task in tasks] == ["author 1"] * len(tasks)
    assert 1 <= cost.sql <= 2


async def test_waiters_get_instances_of_their_own(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, meter: Meter
) -> None:
    await warm(sessions, cache)
    held = HeldSelect(engine)
    async with sessions() as one, sessions() as other:
        gets = asyncio.gather(one.get_one(Author, 1), other.get_one(Author, 1))
        await until(lambda: cache.stats.misses == 1 + 2)
        held.release()
        first, second = await gets
        assert first is not second
        assert first in one
        assert second in other
    assert cache.stats.coalesced == 1


async def test_late_askers_share_a_certified_load(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, meter: Meter
) -> None:
    await warm(sessions, cache)
    held = HeldSelect(engine)
    async with meter() as cost, asyncio.TaskGroup() as group:
        group.create_task(name_of(sessions))
        await held.reached.wait()
        late = [group.create_task(name_of(sessions)) for _ in range(10)]
        await until(lambda: cache.stats.misses == 1 + 1 + len(late))
        held.release()
    assert [task.result() for task in late] == ["author 1"] * 10
    assert cost.sql == 1


@pytest.mark.parametrize("obstacle", ["locked", "silent"])
async def test_without_a_lease_many_misses_are_at_most_two_selects(
    obstacle: str,
    request: pytest.FixtureRequest,
    sessions: Sessions,
    cache: Cache,
    backend: CountedBackend,
    engine: AsyncEngine,
    meter: Meter,
) -> None:
    await warm(sessions, cache)
    if obstacle == "locked":
        lock = protocol.lock(protocol.fresh_id(), time.time_ns() // 1_000_000, 10_000)
        await backend.apply([Change(slots_of(cache, engine)[0], lock)])
    elif isinstance(backend, CountedMemory):
        backend.silent = True
    else:
        server: Memcached = request.getfixturevalue("memcached_server")
        server.stop()
    held = HeldSelect(engine)
    async with meter() as cost, asyncio.TaskGroup() as group:
        tasks = [group.create_task(name_of(sessions)) for _ in range(64)]
        await until(lambda: cache.stats.misses == 1 + len(tasks))
        held.release()
    assert [task.result() for task in tasks] == ["author 1"] * len(tasks)
    assert 1 <= cost.sql <= 2
    assert cache.stats.fills == 1, "that of the warm-up"


async def test_two_processes_make_one_select_in_all(
    engine: AsyncEngine,
    sessions: Sessions,
    cache: Cache,
    new_backend: Callable[[], CountedBackend],
    meter: Meter,
) -> None:
    async with registered(new_backend()) as other:
        others = async_sessionmaker(engine, class_=AsyncCachedSession, cache=other)
        await warm(sessions, cache)
        held = HeldSelect(engine)
        async with meter() as cost, asyncio.TaskGroup() as group:
            tasks = [group.create_task(name_of(each)) for each in (sessions, others) for _ in range(32)]
            await until(lambda: cache.stats.misses == 1 + 32 and other.stats.misses == 32)
            held.release()
        assert [task.result() for task in tasks] == ["author 1"] * 64
        assert cost.sql == 1
        await other.drain()
        assert cache.stats.fills + other.stats.fills == 1 + 1


# ---------------------------------------------------------------------------- cancelled, failed, short of connections


async def test_a_cancelled_leader_hands_over_to_a_waiter(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, meter: Meter
) -> None:
    await warm(sessions, cache)
    held = HeldSelect(engine)
    async with meter() as cost:
        leader = asyncio.create_task(name_of(sessions))
        await held.reached.wait()
        waiters = [asyncio.create_task(name_of(sessions)) for _ in range(10)]
        await until(lambda: cache.stats.misses == 1 + 1 + len(waiters))
        leader.cancel()
        assert await asyncio.gather(*waiters) == ["author 1"] * 10
        with pytest.raises(asyncio.CancelledError):
            await leader
    assert cost.sql == 2, "the one that was cancelled, and one more"
    assert cache.stats.fills == 2, "the lease was handed over"


async def test_a_cancelled_leader_that_nobody_waits_for_leaves_no_lease(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, meter: Meter
) -> None:
    await warm(sessions, cache)
    held = HeldSelect(engine)
    leader = asyncio.create_task(name_of(sessions))
    await held.reached.wait()
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    await cache.drain()
    async with asyncio.timeout(cache.settings.lease_ttl_s / 2):
        assert await name_of(sessions) == "author 1"
    await cache.drain()
    assert cache.stats.fills == 2


async def test_a_cancelled_waiter_disturbs_nobody(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, meter: Meter
) -> None:
    await warm(sessions, cache)
    held = HeldSelect(engine)
    async with meter() as cost:
        leader = asyncio.create_task(name_of(sessions))
        await held.reached.wait()
        waiters = [asyncio.create_task(name_of(sessions)) for _ in range(10)]
        await until(lambda: cache.stats.misses == 1 + 1 + len(waiters))
        cancelled = waiters.pop(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        held.release()
        assert await asyncio.gather(leader, *waiters) == ["author 1"] * 10
    assert cost.sql == 1


async def test_a_failed_load_raises_in_its_own_caller_only(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, meter: Meter
) -> None:
    await warm(sessions, cache)
    held = HeldSelect(engine)
    held.error = RuntimeError("the load failed")
    async with meter() as cost:
        leader = asyncio.create_task(name_of(sessions))
        await held.reached.wait()
        waiters = [asyncio.create_task(name_of(sessions)) for _ in range(10)]
        await until(lambda: cache.stats.misses == 1 + 1 + len(waiters))
        held.release()
        with pytest.raises(RuntimeError, match="the load failed"):
            await leader
        assert await asyncio.gather(*waiters) == ["author 1"] * 10
    assert cost.sql == 2, "the one that failed, and one more"


@pytest.fixture
async def narrow(engine: AsyncEngine, new_backend: Callable[[], CountedBackend]) -> AsyncIterator[Sessions]:
    """Sessions that share a single connection. Who holds it waits briefly for those who do not."""
    narrow = create_async_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=10)
    async with registered(new_backend(), flight_timeout=0.02) as cache:
        yield async_sessionmaker(narrow, class_=AsyncCachedSession, cache=cache)
    await narrow.dispose()


async def _get(session: AsyncCachedSession) -> None:
    assert await session.get(Author, 1) is not None


async def _get_forwards(session: AsyncCachedSession) -> None:
    assert None not in (await cached_get_many(session, Author, [1, 2])).values()


async def _get_backwards(session: AsyncCachedSession) -> None:
    assert None not in (await cached_get_many(session, Author, [2, 1])).values()


async def _get_while_holding_the_connection(session: AsyncCachedSession) -> None:
    await session.execute(select(Tag))
    assert await session.get(Author, 1) is not None
    assert await session.get(Author, 2) is not None


READERS = [_get, _get_forwards, _get_backwards, _get_while_holding_the_connection]


@pytest.mark.parametrize("first", range(len(READERS)))
async def test_one_connection_is_enough_for_any_mix_of_readers(first: int, narrow: Sessions, meter: Meter) -> None:
    order = READERS[first:] + READERS[:first]

    async def request(read: Callable[[AsyncCachedSession], Awaitable[None]]) -> None:
        async with narrow() as session:
            await read(session)

    async with asyncio.timeout(5):
        await asyncio.gather(*(request(read) for read in order * 10))


# ------------------------------------------------------------------------------------- what else is in the cache server

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def _swap_schema(value: bytes) -> bytes:
    return value[:14] + b"schema##" + value[22:]


FOREIGN: dict[str, tuple[Callable[[bytes], bytes], bool]] = {
    "nothing": (lambda _: b"", False),
    "text": (lambda _: b"<html>", False),
    "a pickle": (lambda _: b"\x80\x04N.", False),
    "our magic byte alone": (lambda value: value[:1], False),
    "cut in the nonce": (lambda value: value[:9], False),
    "another nonce": (lambda value: value[:2] + bytes(12) + value[14:], False),
    "cut in the schema": (lambda value: value[:17], True),
    "cut in the row": (lambda value: value[:-3], True),
    "more than the row": (lambda value: value + b"\x00", True),
    "another schema": (_swap_schema, True),
    "a damaged row": (lambda value: value[:-4] + b"\xff\xff\xff\xff", True),
}


@on_sqlite
@pytest.mark.parametrize("what", FOREIGN)
async def test_bytes_that_are_no_row_are_a_miss_and_are_replaced(
    what: str, sessions: Sessions, cache: Cache, backend: CountedBackend, engine: AsyncEngine, meter: Meter
) -> None:
    mutate, looks_like_a_value = FOREIGN[what]
    await name_of(sessions)
    await cache.drain()
    entity, _ = slots_of(cache, engine)
    (value,) = await backend.get_many([entity])
    assert value is not None
    await put(backend, entity, mutate(value))
    async with meter() as cost:
        assert await name_of(sessions) == "author 1"
    assert cost.sql == 1
    assert cache.stats.garbage == looks_like_a_value
    async with meter() as cost:
        assert await name_of(sessions) == "author 1"
    assert cost == Cost(sql=0, commands=1)


@on_sqlite
@pytest.mark.parametrize("bytes_", [b"", b"<html>", b"\xacV", b"\xacVtoo short"])
async def test_a_generation_that_is_none_is_replaced(
    bytes_: bytes, sessions: Sessions, cache: Cache, backend: CountedBackend, engine: AsyncEngine, meter: Meter
) -> None:
    await name_of(sessions)
    await cache.drain()
    await put(backend, slots_of(cache, engine)[1], bytes_)
    async with meter() as cost:
        assert await name_of(sessions) == "author 1"
    assert cost.sql == 1
    async with meter() as cost:
        assert await name_of(sessions) == "author 1"
    assert cost == Cost(sql=0, commands=1)


@on_sqlite
async def test_a_kind_of_slot_from_a_later_version_is_left_alone(
    sessions: Sessions, cache: Cache, backend: CountedBackend, engine: AsyncEngine, meter: Meter
) -> None:
    entity, _ = slots_of(cache, engine)
    await put(backend, entity, b"\xac~of a later version")
    for _ in range(2):
        async with meter() as cost:
            assert await name_of(sessions) == "author 1"
        assert cost.sql == 1
    assert await backend.get_many([entity]) == [b"\xac~of a later version"]


@on_sqlite
async def test_a_value_that_is_too_large_is_not_cached_and_leaves_no_lease(
    sessions: Sessions, plain: async_sessionmaker[AsyncSession], cache: Cache, backend: CountedBackend, meter: Meter
) -> None:
    large = "x" * (1 << 20)
    async with plain.begin() as session:
        session.add(Author(id=100, name=large))
    for count in (1, 2):
        async with asyncio.timeout(cache.settings.lease_ttl_s / 2):
            assert await name_of(sessions, 100) == large
        await cache.drain()
        assert (cache.stats.fills, cache.stats.fills_dropped) == (0, count)


@pytest.fixture(autouse=True)
def _nothing_in_the_background_failed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
