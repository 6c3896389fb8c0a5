"""Commits whose end nobody hears of, and cancellation at every await: never a stale row, never a lock that stays."""

from __future__ import annotations

import asyncio
import itertools
import time
import types
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from sqlalchemy import ForeignKey, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asynccache import AsyncCachedSession, Cache, cached_get_many
from asynccache.engine_events import _is_refusal
from tests.conftest import Sessions, Statements
from tests.models import Author
from tests.servers import FaultProxy, Memcached
from tests.servers.proxy import Trap
from tests.session.commits import by_commit, by_the_maker_s_begin, rename
from tests.session.conftest import on_both
from tests.session.slots import Slots, name_of

LOCK_TTL_S = 0.6

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
on_memcached = pytest.mark.parametrize("cache_url", ["memcached"], indirect=True)


@pytest.fixture
async def cache(cache_url: str) -> AsyncIterator[Cache]:
    # lease_ttl: the longest; memcached ends one of a second within two tenths, which a busy machine's SELECT may take.
    async with Cache(cache_url, lock_ttl=LOCK_TTL_S, lock_timeout=LOCK_TTL_S / 2, lease_ttl=30) as cache:
        cache.register(Author)
        yield cache


@pytest.fixture
async def ann(sessions: Sessions, cache: Cache) -> None:
    """Author 1, in the database and in the cache."""
    async with sessions.begin() as session:
        session.add(Author(id=1, name="Ann"))
    await cache.drain()
    assert await name_of(sessions) == "Ann"
    await cache.drain()
    cache.stats.locks = 0


# ------------------------------------------------------------------------------------ COMMIT is not answered, or late


async def by_commit_with_rollback_and_close(sessions: Sessions) -> None:
    session = sessions()
    try:
        await rename(session)
        await session.commit()
    except BaseException:
        await session.rollback()
        raise
    finally:
        await session.close()


SHAPES = [by_commit, by_the_maker_s_begin, by_commit_with_rollback_and_close]


async def lose_the_answer(
    how: str, shape: Callable[[Sessions], Awaitable[None]], sessions: Sessions, proxy: FaultProxy
) -> None:
    """Commit, and be cancelled or cut off when the database has committed but the answer is not there yet."""
    commit = proxy.hold_reply(b"COMMIT")
    writer = asyncio.ensure_future(shape(sessions))
    await commit.answered.wait()
    if how == "cancelled":
        writer.cancel()
        commit.released.set()
        with pytest.raises(asyncio.CancelledError):
            await writer
    else:
        proxy.cut()
        with pytest.raises(Exception, match=r"(?i)connection"):
            await writer


@pytest.mark.parametrize(
    ("how", "shape"),
    [
        (how, shape)
        for how in ("cancelled", "cut off")
        for shape in SHAPES
        if (how, shape) != ("cancelled", by_the_maker_s_begin)
    ],
)
@on_postgresql
@on_memcached
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_commit_of_which_nobody_knows_stays_locked_until_it_must_have_ended(
    how: str,
    shape: Callable[[Sessions], Awaitable[None]],
    sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    proxied_sessions: Sessions,
    proxy: FaultProxy,
    cache: Cache,
    slots: Slots,
    statements: Statements,
) -> None:
    await lose_the_answer(how, shape, proxied_sessions, proxy)
    ended_s = time.monotonic()
    assert await name_of(plain) == "Eve", "the database did commit"
    statements.clear()
    assert [await name_of(sessions) for _ in range(3)] == ["Eve"] * 3
    assert len(statements.selects()) == 3
    assert await slots.is_locked(Author, 1)

    await cache.drain()
    assert LOCK_TTL_S * 0.5 < time.monotonic() - ended_s < LOCK_TTL_S * 2
    assert not await slots.is_locked(Author, 1)
    assert await name_of(sessions) == "Eve"
    await cache.drain()
    assert await slots.holds_value(Author, 1)


@on_postgresql
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_begin_block_that_is_cancelled_goes_on_with_its_commit(
    sessions: Sessions, proxied_sessions: Sessions, proxy: FaultProxy, slots: Slots
) -> None:
    """SQLAlchemy shields the end of such a block, so that its outcome is known after all."""
    commit = proxy.hold_reply(b"COMMIT")
    writer = asyncio.create_task(by_the_maker_s_begin(proxied_sessions))
    await commit.answered.wait()
    writer.cancel()
    assert await name_of(sessions) == "Eve"
    assert await slots.is_locked(Author, 1)

    commit.released.set()
    with pytest.raises(asyncio.CancelledError):
        await writer
    async with asyncio.timeout(LOCK_TTL_S / 2):
        while await slots.is_locked(Author, 1):
            await asyncio.sleep(0.001)
    assert await name_of(sessions) == "Eve"


@pytest.mark.parametrize("how", ["cancelled", "cut off"])
@on_postgresql
@on_memcached
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_commit_of_which_nobody_knows_and_that_could_not_lock_is_repaired(
    how: str,
    sessions: Sessions,
    proxied_sessions: Sessions,
    proxy: FaultProxy,
    memcached_server: Memcached,
    cache: Cache,
    slots: Slots,
) -> None:
    memcached_server.pause()
    await lose_the_answer(how, by_commit, proxied_sessions, proxy)
    assert cache.stats.locks_failed == 1
    memcached_server.resume()
    assert await slots.holds_value(Author, 1), "the old row"
    assert await name_of(sessions) == "Eve", "this process knows better than to read it"
    await cache.drain()
    assert not await slots.holds_value(Author, 1)
    assert await name_of(sessions) == "Eve"


@on_postgresql
@on_memcached
@pytest.mark.usefixtures("database_url", "ann")
async def test_an_old_row_that_was_stored_while_the_outcome_was_not_known_is_destroyed(
    sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    proxied_sessions: Sessions,
    proxy: FaultProxy,
    memcached_server: Memcached,
    cache: Cache,
    slots: Slots,
) -> None:
    """1. COMMIT is on its way; its lock is lost. 2. A reader stores the old row. 3. COMMIT lands; nobody is told."""
    commit = proxy.hold_request(b"COMMIT")
    writer = asyncio.ensure_future(by_commit(proxied_sessions))
    await commit.seen.wait()
    memcached_server.flush()
    while not await slots.holds_value(Author, 1):  # on a busy machine a fill may be dropped
        assert await name_of(sessions) == "Ann"
        await cache.drain()
    proxy.forward_replies.clear()
    commit.released.set()
    while await name_of(plain) != "Eve":
        await asyncio.sleep(0.001)
    writer.cancel()
    proxy.forward_replies.set()
    with pytest.raises(asyncio.CancelledError):
        await writer
    await cache.drain()
    assert not await slots.holds_value(Author, 1)
    assert await name_of(sessions) == "Eve"


# ------------------------------------------------------------------------------------------------- COMMIT is refused

REFUSAL_LOCK_TTL_S = 60.0
"""Nobody waits that long for a COMMIT of which the database has said that it did not happen."""


@pytest.fixture
async def patient(engine: AsyncEngine, cache_url: str) -> AsyncIterator[Sessions]:
    async with Cache(cache_url, lock_ttl=REFUSAL_LOCK_TTL_S) as cache:
        cache.register(Author)
        yield async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)


async def once_each_name(engine: AsyncEngine) -> None:
    """Have the database check at COMMIT that no two authors have one name."""
    async with engine.begin() as connection:
        await connection.execute(
            text("ALTER TABLE author ADD CONSTRAINT once UNIQUE (name) DEFERRABLE INITIALLY DEFERRED")
        )


async def by_constraint(engine: AsyncEngine, sessions: Sessions) -> None:
    await once_each_name(engine)
    async with sessions() as session:
        await rename(session, "Ben")
        with pytest.raises(IntegrityError, match="once"):
            await session.commit()


async def by_constraint_in_a_block(engine: AsyncEngine, sessions: Sessions) -> None:
    await once_each_name(engine)
    with pytest.raises(IntegrityError, match="once"):
        async with sessions.begin() as session:
            await rename(session, "Ben")


async def by_trigger(engine: AsyncEngine, sessions: Sessions) -> None:
    async with engine.begin() as connection:
        await connection.exec_driver_sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no Ben'; END $$"
        )
        await connection.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON author DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW WHEN (NEW.name = 'Ben') EXECUTE FUNCTION refuse()"
        )
    async with sessions() as session:
        await rename(session, "Ben")
        with pytest.raises(DBAPIError, match="no Ben"):
            await session.commit()


async def by_conflict(engine: AsyncEngine, sessions: Sessions) -> None:
    """Write skew, which PostgreSQL finds when the second of two serializable transactions commits."""
    serializable = engine.execution_options(isolation_level="SERIALIZABLE")
    everybody = select(func.count()).select_from(Author)
    async with sessions(bind=serializable) as session, AsyncSession(serializable) as other:
        for each in (session, other):
            await each.scalar(everybody)
        (await session.get_one(Author, 1)).name = "Ben"
        await session.flush()
        other.add(Author(id=3, name="Zoe"))
        await other.commit()
        with pytest.raises(DBAPIError, match="could not serialize access"):
            await session.commit()


@pytest.mark.parametrize("refuse", [by_constraint, by_constraint_in_a_block, by_trigger, by_conflict])
@on_postgresql
@on_memcached
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_commit_that_the_database_refuses_is_unlocked_at_once(
    refuse: Callable[[AsyncEngine, Sessions], Awaitable[None]],
    engine: AsyncEngine,
    sessions: Sessions,
    patient: Sessions,
    slots: Slots,
) -> None:
    async with sessions.begin() as session:
        session.add(Author(id=2, name="Ben"))
    cache: Cache = patient.kw["cache"]
    await refuse(engine, patient)
    assert cache.stats.locks == 1
    async with asyncio.timeout(REFUSAL_LOCK_TTL_S / 2):
        await cache.drain()
    assert not await slots.is_locked(Author, 1)
    assert await name_of(patient) == "Ann"
    await cache.drain()
    assert await slots.holds_value(Author, 1)


@on_postgresql
@on_memcached
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_server_that_ends_a_connection_has_refused_nothing(
    engine: AsyncEngine, sessions: Sessions, proxied_sessions: Sessions, proxy: FaultProxy, slots: Slots
) -> None:
    """It may say so, with an error like any other, after it has committed."""
    commit = proxy.hold_request(b"COMMIT")
    writer = asyncio.ensure_future(by_commit(proxied_sessions))
    await commit.seen.wait()
    async with engine.connect() as connection:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        await connection.exec_driver_sql(f"{others} AND datname = current_database() AND state LIKE 'idle in %'")
    commit.released.set()
    with pytest.raises(DBAPIError):
        await writer
    assert await slots.is_locked(Author, 1)


@pytest.mark.parametrize(
    ("sqlstate", "is_refusal"),
    [
        ("23505", True),  # unique_violation
        ("40001", True),  # serialization_failure
        ("40P01", True),  # deadlock_detected
        ("P0001", True),  # raise_exception
        ("40003", False),  # statement_completion_unknown
        ("08003", False),  # connection_does_not_exist, which asyncpg says itself
        ("57P01", False),  # admin_shutdown
        ("XX000", False),  # internal_error
        (None, False),
    ],
)
def test_only_what_says_that_it_was_rolled_back_was_refused(sqlstate: str | None, *, is_refusal: bool) -> None:
    class DriverError(Exception):
        def __init__(self, sqlstate: str | None) -> None:
            self.sqlstate = sqlstate

    cause = DriverError(sqlstate)
    assert _is_refusal(DBAPIError("COMMIT", None, cause), "postgresql") == is_refusal
    assert not _is_refusal(cause, "postgresql")


async def test_a_commit_that_sqlite_refuses_is_rolled_back_on_its_connection(engine: AsyncEngine) -> None:
    """SQLite keeps the transaction open, and the next one on the connection would commit what was refused."""

    class Chapters(DeclarativeBase):
        pass

    class Chapter(Chapters):
        __tablename__ = "next_chapter"

        id: Mapped[int] = mapped_column(primary_key=True)
        after_id: Mapped[int | None] = mapped_column(
            ForeignKey("next_chapter.id", deferrable=True, initially="DEFERRED")
        )

    await engine.dispose()
    event.listen(engine.sync_engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"))
    async with engine.begin() as connection:
        await connection.run_sync(Chapters.metadata.create_all)
    async with Cache("memory://", lock_ttl=REFUSAL_LOCK_TTL_S) as cache:
        cache.register(Chapter)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        async with sessions() as session:
            session.add(Chapter(id=1, after_id=9))
            with pytest.raises(IntegrityError, match="FOREIGN KEY"):
                await session.commit()
        async with asyncio.timeout(REFUSAL_LOCK_TTL_S / 2):
            await cache.drain()
        async with sessions.begin() as session:
            session.add(Chapter(id=9))
        async with sessions() as session:
            assert (await session.scalars(select(Chapter.id))).all() == [9]


# --------------------------------------------------------------------------------- cancelled while the cache is asked


@pytest.fixture
async def cache_proxy(memcached_server: Memcached) -> AsyncIterator[FaultProxy]:
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        yield proxy


@pytest.fixture
async def far_cache(cache_proxy: FaultProxy) -> AsyncIterator[Cache]:
    """The same cache, reached through the proxy, and with more patience than it needs."""
    url = f"memcached://{cache_proxy.host}:{cache_proxy.port}?timeout=5"
    async with Cache(url, lock_ttl=10, lock_timeout=5) as cache:
        cache.register(Author)
        yield cache


@pytest.fixture
def far_sessions(engine: AsyncEngine, far_cache: Cache) -> Sessions:
    return async_sessionmaker(engine, class_=AsyncCachedSession, cache=far_cache)


@on_memcached
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_commit_that_is_cancelled_while_it_locks_commits_nothing(
    sessions: Sessions,
    far_sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    cache_proxy: FaultProxy,
    far_cache: Cache,
    slots: Slots,
) -> None:
    lock = cache_proxy.hold_reply(b"cas ")

    async def work() -> None:
        async with far_sessions() as session:
            await rename(session)
            with pytest.raises(asyncio.CancelledError):
                await session.commit()
            await session.rollback()
            assert await name_of(plain) == "Ann"
            await rename(session, "Zoe")
            await session.commit()

    writer = asyncio.create_task(work())
    await lock.answered.wait()
    assert await slots.is_locked(Author, 1)
    writer.cancel()
    await writer
    assert await name_of(sessions) == "Zoe"
    await far_cache.drain()
    assert not await slots.is_locked(Author, 1)
    assert await name_of(sessions) == "Zoe"


@on_memcached
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_cancellation_during_the_look_after_commit_is_delivered_once_and_changes_nothing(
    engine: AsyncEngine,
    sessions: Sessions,
    far_sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    cache_proxy: FaultProxy,
    far_cache: Cache,
    slots: Slots,
) -> None:
    assert await name_of(far_sessions) == "Ann"
    looks = []
    event.listen(engine.sync_engine, "commit", lambda _: looks.append(cache_proxy.hold_reply(b"get ")))
    cancelled = []

    async def work() -> None:
        async with far_sessions() as session:
            await rename(session)
            for step in (session.commit, _pause, _pause):
                try:
                    await step()
                except asyncio.CancelledError:
                    cancelled.append(step.__name__)
            looks[0].released.set()
            assert (await session.get_one(Author, 1)).name == "Eve"

    writer = asyncio.create_task(work())
    while not looks:
        await _pause()
    await looks[0].answered.wait()
    writer.cancel()
    await writer
    assert len(cancelled) == 1
    assert await name_of(plain) == "Eve"
    assert await name_of(sessions) == "Eve"
    await far_cache.drain()
    assert not await slots.is_locked(Author, 1)
    assert await name_of(sessions) == "Eve"


@asynccontextmanager
async def cancelled_by_asyncio() -> AsyncGenerator[Callable[[], None]]:
    with suppress(TimeoutError):
        async with asyncio.timeout(None) as block:
            yield lambda: block.reschedule(0)


@asynccontextmanager
async def cancelled_by_anyio() -> AsyncGenerator[Callable[[], None]]:
    with anyio.CancelScope() as block:  # which cancels again, at each await
        yield block.cancel


@on_memcached
@pytest.mark.parametrize("cancelled", [cancelled_by_asyncio, cancelled_by_anyio])
@pytest.mark.usefixtures("database_url", "ann")
async def test_a_block_that_is_cancelled_during_the_look_after_commit_is_the_only_thing_that_is(
    cancelled: Callable[[], AbstractAsyncContextManager[Callable[[], None]]],
    engine: AsyncEngine,
    sessions: Sessions,
    far_sessions: Sessions,
    cache_proxy: FaultProxy,
) -> None:
    assert await name_of(far_sessions) == "Ann"
    looks: list[Trap] = []
    event.listen(engine.sync_engine, "commit", lambda _: looks.append(cache_proxy.hold_reply(b"get ")))
    cancels: list[Callable[[], None]] = []

    async def work() -> int:
        async with far_sessions() as session:
            async with cancelled() as cancel:
                cancels.append(cancel)
                await rename(session)
                await session.commit()
                pytest.fail("it was not cancelled")
            await _pause()
            looks[0].released.set()
            assert (await session.get_one(Author, 1)).name == "Eve"
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    writer = asyncio.create_task(work())
    while not looks:
        await _pause()
    await looks[0].answered.wait()
    cancels[0]()
    assert await writer == 0
    assert await name_of(sessions) == "Eve"


async def _pause() -> None:
    await asyncio.sleep(0.001)


# ------------------------------------------------------------------------------------------ cancelled at every await


@dataclass
class Interruption:
    """Cancels a task when it suspends for the n-th time: while it waits, or just when what it waits for is there.

    In the second case the answer is lost on the way to whom it was for.
    """

    n: int
    answered: bool
    happened: bool = False

    @types.coroutine
    def of(self, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        task = asyncio.current_task()
        assert task is not None
        step: Callable[[Any], Any] = work.send
        value: Any = None
        for count in itertools.count():
            try:
                awaited = step(value)
            except StopIteration:
                return
            if count == self.n:
                self.happened = True
                if self.answered and awaited is not None:
                    awaited.add_done_callback(lambda _: task.cancel())
                else:
                    task.cancel()
            try:
                step, value = work.send, (yield awaited)
            except BaseException as error:
                step, value = work.throw, error


AWAITS_MAX = 150


Work = Callable[[int], Coroutine[Any, Any, None]]


async def interrupt_each_await(work: Work, *, answered: bool) -> AsyncIterator[int]:
    """Run `work(n)` for n = 0, 1, 2, … and cancel it at its n-th await, until it has no more. Gives n after each."""
    for n in range(AWAITS_MAX):
        interruption = Interruption(n, answered)

        async def run(interruption: Interruption = interruption, n: int = n) -> None:
            await interruption.of(work(n))

        try:
            await asyncio.create_task(run())
        except asyncio.CancelledError:
            assert interruption.happened
        yield n
        if not interruption.happened:
            assert n > 3, "it does await"
            return
    pytest.fail(f"more than {AWAITS_MAX} awaits")


sweep = pytest.mark.parametrize("answered", [False, True], ids=["waiting", "answered"])


@pytest.fixture
async def many(engine: AsyncEngine) -> None:
    """Two authors for each await, named by their numbers."""
    if engine.dialect.name == "sqlite":
        # A SELECT that was cancelled may keep its cursor open: without a write-ahead log, that stops all COMMITs.
        async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    async with engine.begin() as connection:
        await connection.execute(insert(Author), [{"id": n, "name": str(n)} for n in range(2 * AWAITS_MAX)])


def assert_no_flights(cache: Cache) -> None:
    assert not cache.bound().reads._flights.flights


@sweep
@on_both
@pytest.mark.usefixtures("database_url", "many")
async def test_a_get_can_be_cancelled_at_every_await(
    sessions: Sessions, cache: Cache, slots: Slots, *, answered: bool
) -> None:
    waiters: list[asyncio.Task[str | None]] = []

    async def work(n: int) -> None:
        waiters.append(asyncio.create_task(name_of(sessions, n)))  # which may lead instead, or inherit the flight
        assert await name_of(sessions, n) == str(n)

    async for n in interrupt_each_await(work, answered=answered):
        assert await waiters.pop() == str(n)
        await cache.drain()
        assert_no_flights(cache)
        async with sessions.begin() as session:
            (await session.get_one(Author, n)).name = "new"
        assert await name_of(sessions, n) == "new"
        await cache.drain()
        assert await name_of(sessions, n) == "new"
        assert not await slots.is_locked(Author, n)


@sweep
@on_both
@pytest.mark.usefixtures("database_url", "many")
async def test_a_get_of_many_can_be_cancelled_at_every_await(
    sessions: Sessions, cache: Cache, slots: Slots, *, answered: bool
) -> None:
    async def pair(n: int) -> None:
        async with sessions() as session:
            found = await cached_get_many(session, Author, [2 * n, 2 * n + 1])
            assert [author and author.name for author in found.values()] == [str(2 * n), str(2 * n + 1)]

    waiters: list[asyncio.Task[str | None]] = []

    async def work(n: int) -> None:
        waiters.append(asyncio.create_task(name_of(sessions, 2 * n + 1)))
        await pair(n)

    async for n in interrupt_each_await(work, answered=answered):
        assert await waiters.pop() == str(2 * n + 1)
        await cache.drain()
        assert_no_flights(cache)
        await pair(n)
        async with sessions.begin() as session:
            (await session.get_one(Author, 2 * n)).name = "new"
        assert await name_of(sessions, 2 * n) == "new"
        assert await name_of(sessions, 2 * n + 1) == str(2 * n + 1)


@sweep
@on_both
@pytest.mark.usefixtures("database_url", "many")
async def test_a_commit_can_be_cancelled_at_every_await(
    sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    cache: Cache,
    slots: Slots,
    *,
    answered: bool,
) -> None:
    async def work(n: int) -> None:
        async with sessions() as session:
            (await session.get_one(Author, n)).name = "new"
            await session.commit()

    async with sessions() as session:
        await cached_get_many(session, Author, range(AWAITS_MAX))
    await cache.drain()
    done = 0
    async for n in interrupt_each_await(work, answered=answered):
        truth = await name_of(plain, n)
        assert truth in ("new", str(n))
        assert await name_of(sessions, n) == truth
        done = n
    began_s = time.monotonic()
    await cache.drain()
    assert time.monotonic() - began_s < LOCK_TTL_S * 1.5
    assert_no_flights(cache)
    for n in range(done + 1):
        assert not await slots.is_locked(Author, n)
        assert await name_of(sessions, n) == await name_of(plain, n)
