"""What reading costs, where that does not depend on the machine: commands, statements, tasks, switches, and one ratio.

    a hit                           1 command, 0 statements; in memory also 0 tasks and 0 turns of the event loop
    100 hits of cached_get_many     1 command, 0 statements
    a miss                          4 commands, 1 statement: read E and G, lease E; look at G and fill E (gets, cas)

`tests/session/test_reading.py` counts what else can happen to a miss.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import greenlet  # type: ignore[import-untyped]
import pytest
from sqlalchemy import Table, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from asynccache import AsyncCachedSession, Cache, MemcachedBackend, cached_get_many
from asynccache.sync_session import _ASKED_FOR_BY_A_GET, CachedSession
from tests.conftest import Sessions, Statements
from tests.models import Account, Author, account

ROWS = 100

Test = TypeVar("Test", bound=Callable[..., Awaitable[None]])


async def fill(sessions: Sessions, cache: Cache) -> None:
    async with sessions.begin() as session:
        session.add_all([account(number) for number in range(ROWS)])
    await cache.drain()  # its locks are gone
    async with sessions() as session:
        await cached_get_many(session, Account, range(ROWS))
    await cache.drain()


@pytest.fixture
async def filled(sessions: Sessions, cache: Cache) -> None:
    await fill(sessions, cache)


@contextmanager
def counting_tasks() -> Generator[list[str]]:
    """The coroutines that are made into tasks meanwhile."""
    loop, started = asyncio.get_running_loop(), list[str]()

    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        started.append(work.__qualname__)
        return asyncio.Task(work, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        yield started
    finally:
        loop.set_task_factory(None)


@contextmanager
def counting_switches() -> Generator[list[str]]:
    """The switches between greenlets meanwhile."""
    switches: list[str] = []
    greenlet.settrace(lambda happened, _: switches.append(happened))
    try:
        yield switches
    finally:
        greenlet.settrace(None)


async def one(session: AsyncCachedSession) -> object:
    return await session.get(Account, 7)


async def many(session: AsyncCachedSession) -> object:
    return await cached_get_many(session, Account, range(ROWS))


Read = Callable[[AsyncCachedSession], Coroutine[Any, Any, object]]
READS = pytest.mark.parametrize("read", [one, many])


# ------------------------------------------------------------------------------------------------- memory: no machinery


@READS
async def test_a_hit_in_memory_makes_no_task_and_switches_no_greenlet(
    read: Read, filled: None, sessions: Sessions, statements: Statements
) -> None:
    with counting_tasks() as tasks, counting_switches() as switches:
        async with sessions() as session:
            assert await read(session)
    assert (tasks, switches, statements) == ([], [], [])


@READS
async def test_a_hit_in_memory_never_waits(read: Read, filled: None, sessions: Sessions) -> None:
    async with sessions() as session:
        with pytest.raises(StopIteration):  # it is through at the first step, and the event loop has had no turn
            read(session).send(None)


async def test_what_a_miss_in_memory_loads_is_stored_at_once(cache: Cache, filled: None, sessions: Sessions) -> None:
    await cache.invalidate_all(Account)
    before = cache.stats.fills
    async with sessions() as session:
        with counting_tasks() as tasks:
            assert await session.get(Account, 7)
        assert (tasks, cache.stats.fills) == ([], before + 1)


async def test_listeners_are_not_looked_for_one_by_one(
    filled: None, sessions: Sessions, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a session has to look for the first time costs a call of Python's, nine times for a get."""
    dispatch, looked_for = event.base._Dispatch, list[str]()
    look_for = dispatch.__getattr__

    def look(self: Any, name: str) -> Any:
        if self._instance_cls is not None and issubclass(self._instance_cls, Session):
            looked_for.append(name)
        return look_for(self, name)

    monkeypatch.setattr(dispatch, "__getattr__", look)
    async with sessions() as session:
        assert await session.get(Account, 7)
    assert not looked_for
    async with AsyncSession(engine) as plain:
        assert await plain.get(Account, 7)
    assert set(looked_for) >= set(_ASKED_FOR_BY_A_GET)


async def test_close_makes_no_task_either(filled: None, sessions: Sessions) -> None:
    session = sessions()
    assert await session.get(Account, 7)
    with counting_tasks() as tasks, counting_switches() as switches:
        await session.close()
    assert (tasks, switches) == ([], [])
    assert not session.in_transaction()


@pytest.mark.parametrize("name", ["after_transaction_end", "persistent_to_detached", "pending_to_transient"])
@pytest.mark.parametrize("way", ["close", "async with"])
async def test_a_listener_may_await_when_a_session_closes(
    name: str, way: str, filled: None, engine: AsyncEngine, cache: Cache
) -> None:
    class Listened(CachedSession):
        pass

    heard = asyncio.Event()

    async def hear() -> None:
        await asyncio.sleep(0)
        heard.set()

    event.listen(Listened, name, lambda *_: await_only(hear()))
    session = AsyncCachedSession(engine, cache=cache, sync_session_class=Listened)
    assert await session.get(Account, 7)
    session.add(Author(name="pending"))
    with session.no_autoflush:
        kept = await session.get(Account, 8)  # else there would be nothing to detach
    await (session.close() if way == "close" else session.__aexit__(None, None, None))
    assert heard.is_set()
    assert kept


class OwnSyncClose(CachedSession):
    def close(self) -> None:
        await_only(asyncio.sleep(0))
        self.info["closed"] = True
        super().close()


class OwnClose(AsyncCachedSession):
    async def close(self) -> None:
        await asyncio.sleep(0)
        self.info["closed"] = True
        await super().close()


@pytest.mark.parametrize("way", ["close", "async with"])
@pytest.mark.parametrize(
    ("session_class", "sync_session_class"), [(AsyncCachedSession, OwnSyncClose), (OwnClose, CachedSession)]
)
async def test_a_close_of_ones_own_is_called(
    session_class: type[AsyncCachedSession],
    sync_session_class: type[CachedSession],
    way: str,
    filled: None,
    engine: AsyncEngine,
    cache: Cache,
) -> None:
    session = session_class(engine, cache=cache, sync_session_class=sync_session_class)
    assert await session.get(Account, 7)
    await (session.close() if way == "close" else session.__aexit__(None, None, None))
    assert session.info["closed"]


async def test_a_get_bind_of_ones_own_is_asked_for_each_model(
    filled: None, engine: AsyncEngine, cache: Cache, statements: Statements
) -> None:
    asked: list[object] = []

    class Routing(CachedSession):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            asked.append(mapper)
            return super().get_bind(mapper, **options)

    async with AsyncCachedSession(engine, cache=cache, sync_session_class=Routing) as session:
        assert await session.get(Account, 7)
    assert (asked, statements) == ([Account.__mapper__], [])


@pytest.mark.parametrize("way", ["binds", "bind_mapper", "bind_table"])
async def test_a_model_is_read_from_what_it_is_bound_to(
    way: str, filled: None, engine: AsyncEngine, cache: Cache, statements: Statements
) -> None:
    class Theirs(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            if way == "binds":
                options["binds"] = {Account: engine.sync_engine}
            super().__init__(*args, **options)

    class Bound(CachedSession, Theirs):
        pass

    nowhere = create_async_engine("sqlite+aiosqlite://")
    async with AsyncCachedSession(nowhere, cache=cache, sync_session_class=Bound) as session:
        if way == "bind_mapper":
            session.sync_session.bind_mapper(Account, engine.sync_engine)
        elif way == "bind_table":
            session.sync_session.bind_table(cast("Table", Account.__table__), engine.sync_engine)
        assert await session.get(Account, 7)
    assert statements == []


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def memcached_backend(cache: Cache) -> MemcachedBackend:
    backend = cache._store.backend
    assert isinstance(backend, MemcachedBackend)
    return backend


class Cost:
    """The commands and statements of what is done in a `with` block."""

    def __init__(self, backend: MemcachedBackend, statements: Statements) -> None:
        self._backend, self._statements = backend, statements

    def __enter__(self) -> Cost:
        self._before = self._backend.commands, len(self._statements)
        return self

    def __exit__(self, *_: object) -> None:
        commands, statements = self._before
        self.commands = self._backend.commands - commands
        self.statements = len(self._statements) - statements


@pytest.fixture
def cost(memcached_backend: MemcachedBackend, statements: Statements) -> Cost:
    return Cost(memcached_backend, statements)


def on_memcached(test: Test) -> Test:
    marked = pytest.mark.usefixtures("cache_url")(test)
    of_one: Test = pytest.mark.parametrize("cache_url", ["memcached"], indirect=True)(marked)
    return of_one


@on_memcached
@READS
async def test_a_hit_is_one_command(read: Read, filled: None, sessions: Sessions, cost: Cost) -> None:
    async with sessions() as session:
        with cost:
            assert await read(session)
    assert (cost.commands, cost.statements) == (1, 0)


@on_memcached
async def test_a_hit_makes_no_task(filled: None, sessions: Sessions) -> None:
    with counting_tasks() as tasks, counting_switches() as switches:
        async with sessions() as session:
            assert await session.get(Account, 7)
    assert (tasks, switches) == ([], [])


@on_memcached
async def test_a_miss_is_four_commands_and_one_statement(
    filled: None, sessions: Sessions, plain: async_sessionmaker[AsyncSession], cache: Cache, cost: Cost
) -> None:
    async with plain.begin() as session:  # which leaves no trace in its slot
        session.add(account(ROWS))
    async with sessions() as session:
        with cost:
            assert await session.get(Account, ROWS)
            await cache.drain()
    assert (cost.commands, cost.statements) == (4, 1)


# ------------------------------------------------------------------------------------------------------------ one ratio


async def cpu_s(work: Callable[[], Awaitable[object]], times: int) -> float:
    """The processor time that this takes in this process, whatever else the machine is busy with."""
    start_s = time.process_time()
    for _ in range(times):
        await work()
    return (time.process_time() - start_s) / times


@pytest.mark.usefixtures("database_url")
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_hit_in_memory_is_worth_it(
    filled: None, sessions: Sessions, plain: async_sessionmaker[AsyncSession]
) -> None:
    """A get from PostgreSQL takes about 90 times as long as a hit, half of it in this process. So much is asked of a
    machine that is busy with other things."""

    async def ask() -> None:
        async with plain() as session:
            assert await session.get(Account, 7)

    async with sessions() as session:

        async def hit() -> None:
            assert await session.get(Account, 7)  # which nobody holds, so that each get is a hit

        hits, asks = [], []
        for _ in range(20):
            asks.append(await cpu_s(ask, 5))
            hits.append(await cpu_s(hit, 50))
    assert min(asks) / min(hits) > 15
