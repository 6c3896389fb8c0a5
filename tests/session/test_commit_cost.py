"""What a commit costs, counted: commands to the cache, the round trips that it waits for, and what each row adds."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
from sqlalchemy import event, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session

import asynccache
from asynccache import AsyncCachedSession, Cache, MemcachedBackend, MemoryBackend
from tests.conftest import Sessions
from tests.gates import Call, GatedBackend, a_write
from tests.models import Author, Secret
from tests.servers import FaultProxy, Memcached

ROWS = 100
BUCKETS = 16


@pytest.fixture(autouse=True)
async def rows(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(insert(Author), [{"id": n, "name": str(n)} for n in range(ROWS)])
        await connection.execute(insert(Secret), [{"id": n, "value": str(n)} for n in range(ROWS)])


@pytest.fixture
async def proxy(memcached_server: Memcached) -> AsyncIterator[FaultProxy]:
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        yield proxy


@pytest.fixture
def backend(proxy: FaultProxy) -> MemcachedBackend:
    return MemcachedBackend([f"{proxy.host}:{proxy.port}"], timeout_s=5)


@dataclass(frozen=True)
class Cost:
    """commands, round_trips: before the caller is told. later: those that go on in the background."""

    commands: int = 0
    round_trips: int = 0
    commands_later: int = 0
    round_trips_later: int = 0


Write = Callable[[AsyncCachedSession], Awaitable[object]]


async def nothing(session: AsyncCachedSession) -> None:
    await session.scalars(select(Author))


async def rows_that_are_not_cached(session: AsyncCachedSession) -> None:
    for each in await session.scalars(select(Secret)):
        each.value += "."
    await session.execute(update(Secret).values(value="new"))


async def one_row(session: AsyncCachedSession) -> None:
    (await session.get_one(Author, 1)).name += "."


async def all_rows(session: AsyncCachedSession) -> None:
    for each in await session.scalars(select(Author)):
        each.name += "."


async def the_table(session: AsyncCachedSession) -> None:
    await session.execute(update(Author).values(name="new"))


@pytest.mark.parametrize(
    ("write", "slots_max", "cost"),
    [
        (nothing, ROWS, Cost()),
        (rows_that_are_not_cached, ROWS, Cost()),
        # Locking reads the slot, then changes it; the look after COMMIT reads it; unlocking reads and changes it.
        (one_row, ROWS, Cost(3, 3, 2, 2)),
        (all_rows, ROWS, Cost(1 + ROWS + 1, 3, 1 + ROWS, 2)),
        (all_rows, ROWS - 1, Cost(1 + BUCKETS + 1, 3, 1 + BUCKETS, 2)),
        (the_table, ROWS, Cost(1 + BUCKETS + 1, 3, 1 + BUCKETS, 2)),
    ],
)
async def test_a_commit_waits_for_three_round_trips_however_many_rows_it_changes(
    write: Write, slots_max: int, cost: Cost, engine: AsyncEngine, backend: MemcachedBackend, proxy: FaultProxy
) -> None:
    async with Cache(backend, slots_max=slots_max) as cache:
        cache.register(Author)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)

        async def commit() -> Cost:
            def counts() -> tuple[int, int]:
                return backend.commands, proxy.round_trips

            async with sessions() as session:
                await write(session)
                await cache.drain()
                told: list[tuple[int, int]] = []
                event.listen(session.sync_session, "after_commit", lambda _: told.append(counts()))
                before = counts()
                await session.commit()
            await cache.drain()
            (now,), later = told, counts()
            return Cost(now[0] - before[0], now[1] - before[1], later[0] - now[0], later[1] - now[1])

        await commit()  # which may have to connect
        assert await commit() == cost


def an_unlock(call: Call) -> bool:
    task = asyncio.current_task()
    return a_write(call) and task is not None and "unlock" in task.get_name()


async def test_what_ends_while_others_are_being_unlocked_is_unlocked_together(engine: AsyncEngine) -> None:
    async with Cache(backend := GatedBackend(MemoryBackend())) as cache:
        cache.register(Author)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)

        async def commit(id_: int) -> None:
            async with sessions() as session:
                await session.execute(update(Author).where(Author.id == id_).values(name="new"))
                await session.commit()

        first = backend.hold(an_unlock)
        await commit(1)
        await first.reached.wait()
        for id_ in (2, 3, 4):
            await commit(id_)
        calls = backend.calls
        first.open()
        await cache.drain()
        assert backend.calls == calls + 1
        assert (cache.stats.locks, cache.stats.unlocks) == (4, 4)


async def test_in_memory_nothing_is_left_to_the_background(engine: AsyncEngine) -> None:
    async with Cache(MemoryBackend()) as cache:
        cache.register(Author)
        async with AsyncCachedSession(engine, cache=cache) as session:
            await one_row(session)
            await cache.drain()
            tasks = asyncio.all_tasks()
            event.listen(session.sync_session, "after_commit", lambda _: tasks.update(asyncio.all_tasks()))
            before = len(tasks)
            await session.commit()
        assert len(tasks) == before
        assert (cache.stats.locks, cache.stats.unlocks) == (1, 1)


# ------------------------------------------------------------------------------------------------- what each row adds

PACKAGE = str(Path(asynccache.__file__).parent)


def calls_in_flush(session: Session) -> int:
    """How many functions of the library a flush calls."""
    calls = 0

    def count(frame: FrameType, what: str, _about: object) -> None:
        nonlocal calls
        calls += what == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(count)
    try:
        session.flush()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(("model", "calls_per_row"), [(Secret, 6), (Author, 17)])
async def test_a_flushed_row_costs_a_few_calls(
    model: type[Author | Secret], calls_per_row: int, sessions: Sessions
) -> None:
    async def flush(rows: int) -> int:
        async with sessions() as session:
            for each in (await session.scalars(select(model).limit(rows))).all():
                setattr(each, "name" if model is Author else "value", "new")
            return await session.run_sync(calls_in_flush)

    await flush(1)
    assert await flush(41) - await flush(1) <= 40 * calls_per_row
