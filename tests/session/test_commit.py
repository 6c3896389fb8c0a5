"""Every way to end a transaction: what it changed is locked before COMMIT is sent, and unlocked after the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, event, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from asynccache import AsyncCachedSession, Cache, cached_invalidate
from tests.conftest import Sessions, Statements
from tests.models import Author, Base, Country
from tests.servers import FaultProxy, Memcached
from tests.session.commits import by_commit, by_the_maker_s_begin, rename
from tests.session.conftest import on_both
from tests.session.slots import Slots, name_of


@pytest.fixture
async def ann(sessions: Sessions, cache: Cache) -> None:
    """Author 1, in the database and in the cache, and Author 2 in the database alone."""
    async with sessions.begin() as session:
        session.add_all([Author(id=1, name="Ann"), Author(id=2, name="Ben")])
    await cache.drain()
    async with sessions() as session:
        assert await session.get(Author, 1) is not None
    await cache.drain()
    cache.stats.locks = cache.stats.unlocks = 0


def at_event(engine: AsyncEngine, name: str, look: Callable[[], Awaitable[bool]]) -> list[bool]:
    """What `look` found each time that the engine had this event. To be called after the engine's first session, whose
    listeners are heard first."""
    found: list[bool] = []

    def listener(*args: object) -> None:
        found.append(await_only(look()))

    event.listen(engine.sync_engine, name, listener)
    return found


# ---------------------------------------------------------------------------------------------------- ways to commit


async def by_begin(sessions: Sessions) -> None:
    async with sessions() as session, session.begin():
        await rename(session)


async def by_a_commit_in_run_sync(sessions: Sessions) -> None:
    async with sessions() as session:
        await rename(session)
        await session.run_sync(lambda sync: sync.commit())


async def by_a_begin_in_run_sync(sessions: Sessions) -> None:
    def work(sync: Session) -> None:
        with sync.begin():
            sync.get_one(Author, 1).name = "Eve"

    async with sessions() as session:
        await session.run_sync(work)


async def by_the_transaction(sessions: Sessions) -> None:
    async with sessions() as session:
        await rename(session)
        transaction = session.get_transaction()
        assert transaction is not None
        await transaction.commit()


async def by_a_transaction_begun_by_hand(sessions: Sessions) -> None:
    async with sessions() as session:
        transaction = await session.begin()
        await rename(session)
        await transaction.commit()


async def after_a_savepoint(sessions: Sessions) -> None:
    async with sessions() as session:
        async with session.begin_nested():
            await rename(session)
        await session.commit()


async def by_a_listener_that_dirties_a_row(sessions: Sessions) -> None:
    """What the application's own before_commit listener changes is flushed by the commit itself."""
    async with sessions() as session:
        author = await session.get_one(Author, 1)

        def touch(sync: Session) -> None:
            author.name = "Eve"

        event.listen(session.sync_session, "before_commit", touch)
        await session.commit()


PATHS = [
    by_commit,
    by_begin,
    by_the_maker_s_begin,
    by_a_commit_in_run_sync,
    by_a_begin_in_run_sync,
    by_the_transaction,
    by_a_transaction_begun_by_hand,
    after_a_savepoint,
    by_a_listener_that_dirties_a_row,
]


@pytest.mark.parametrize("commit", PATHS)
@on_both
@pytest.mark.usefixtures("ann")
async def test_a_row_is_locked_when_commit_is_sent_and_unlocked_afterwards(
    commit: Callable[[Sessions], Awaitable[None]], sessions: Sessions, engine: AsyncEngine, cache: Cache, slots: Slots
) -> None:
    at_commit = at_event(engine, "commit", lambda: slots.is_locked(Author, 1))
    await commit(sessions)
    assert at_commit == [True]
    assert await name_of(sessions) == "Eve"
    await cache.drain()
    assert not await slots.is_locked(Author, 1)
    assert (cache.stats.locks, cache.stats.unlocks) == (1, 1)
    assert await name_of(sessions) == "Eve"
    await cache.drain()
    assert await slots.holds_value(Author, 1)


@pytest.mark.usefixtures("database_url", "ann")
async def test_the_release_of_a_savepoint_locks_nothing(sessions: Sessions, cache: Cache, slots: Slots) -> None:
    async with sessions() as session:
        async with session.begin_nested():
            await rename(session)
        assert cache.stats.locks == 0
        assert await slots.holds_value(Author, 1)
        await session.rollback()
    await cache.drain()
    assert cache.stats.locks == 0
    assert await name_of(sessions) == "Ann"


@pytest.mark.usefixtures("database_url", "ann")
async def test_what_a_savepoint_rolled_back_may_be_locked_but_is_never_wrong(sessions: Sessions, cache: Cache) -> None:
    async with sessions() as session:
        savepoint = await session.begin_nested()
        await rename(session)
        await session.flush()
        await savepoint.rollback()
        (await session.get_one(Author, 2)).name = "Zoe"
        await session.commit()
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Ann", "Zoe")
    await cache.drain()
    assert cache.stats.locks == cache.stats.unlocks


async def by_rollback(session: AsyncSession) -> None:
    await session.rollback()


async def by_close(session: AsyncSession) -> None:
    await session.close()


async def by_invalidate(session: AsyncSession) -> None:
    await session.invalidate()


@pytest.mark.parametrize("end", [by_rollback, by_close, by_invalidate])
@on_both
@pytest.mark.usefixtures("ann")
async def test_a_transaction_that_is_not_committed_locks_nothing(
    end: Callable[[AsyncSession], Awaitable[None]], sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    async with sessions() as session:
        await rename(session)
        await session.flush()
        session.add(Author(id=3, name="Zoe"))
        await session.flush()
        await end(session)
    await cache.drain()
    assert cache.stats.locks == 0
    assert await slots.holds_value(Author, 1)
    assert (await name_of(sessions, 1), await name_of(sessions, 3)) == ("Ann", None)


@on_both
@pytest.mark.usefixtures("ann")
async def test_a_session_goes_on_after_its_commit_and_each_commit_locks_for_itself(
    sessions: Sessions, cache: Cache
) -> None:
    async with sessions() as session:
        for name in ("Bea", "Cat", "Dan"):
            await rename(session, name)
            await session.commit()
            assert await name_of(sessions) == name
    await cache.drain()
    assert (cache.stats.locks, cache.stats.unlocks) == (3, 3)


@on_both
async def test_whoever_was_told_of_a_commit_reads_it_at_once(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        session.add(Author(id=1, name="0"))
    for n in range(1, 20):
        assert await name_of(sessions) == str(n - 1)
        async with sessions.begin() as session:
            await rename(session, str(n))
        assert await name_of(sessions) == str(n)


# --------------------------------------------------------------------------------------------------------- two-phase


@pytest.mark.parametrize("prepare", [True, False], ids=["prepared by hand", "prepared by commit"])
@pytest.mark.usefixtures("cache_url")
async def test_two_phase_locks_before_prepare(postgres_url: str, cache: Cache, *, prepare: bool) -> None:
    async with database(postgres_url) as engine:
        slots = Slots(cache, engine)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache, twophase=True)
        async with sessions.begin() as session:
            session.add(Author(id=1, name="Ann"))
        assert await name_of(sessions) == "Ann"
        await cache.drain()
        cache.stats.locks = 0
        at_prepare = at_event(engine, "prepare_twophase", lambda: slots.is_locked(Author, 1))
        at_commit = at_event(engine, "commit_twophase", lambda: slots.is_locked(Author, 1))

        async with sessions() as session:
            await rename(session)
            if prepare:
                await session.run_sync(lambda sync: sync.prepare())
                assert await name_of(sessions) == "Ann"
                await cache.drain()
                assert not await slots.holds_value(Author, 1)
            await session.commit()

        assert await name_of(sessions) == "Eve"
        assert (at_prepare, at_commit) == ([True], [True])
        await cache.drain()
        assert not await slots.is_locked(Author, 1)
        assert cache.stats.locks == 1


async def test_a_two_phase_commit_that_comes_late_locks_the_same_rows_again(postgres_url: str) -> None:
    async with database(postgres_url) as engine, Cache("memory://", lock_ttl=1, lock_timeout=0.5) as cache:
        cache.register(Author)
        slots = Slots(cache, engine)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache, twophase=True)
        async with sessions.begin() as session:
            session.add(Author(id=1, name="Ann"))
        await cache.drain()
        at_commit = at_event(engine, "commit_twophase", lambda: slots.is_locked(Author, 1))
        cache.stats.locks = 0

        async with sessions() as session:
            await rename(session)
            await session.run_sync(lambda sync: sync.prepare())
            await asyncio.sleep(2.1)  # 2 * lock_ttl
            assert not await slots.is_locked(Author, 1)
            await session.commit()

        assert at_commit == [True]
        assert cache.stats.locks == 2
        assert await name_of(sessions) == "Eve"


async def test_a_prepared_transaction_that_is_rolled_back_unlocks(postgres_url: str, cache: Cache) -> None:
    async with database(postgres_url) as engine:
        slots = Slots(cache, engine)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache, twophase=True)
        async with sessions.begin() as session:
            session.add(Author(id=1, name="Ann"))
        async with sessions() as session:
            await rename(session)
            await session.run_sync(lambda sync: sync.prepare())
            await session.rollback()
        await cache.drain()
        assert not await slots.is_locked(Author, 1)
        assert await name_of(sessions) == "Ann"


# --------------------------------------------------------------------------------------------------- several databases


@asynccontextmanager
async def database(url: str, **options: Any) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(url, **options)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    try:
        yield engine
    finally:
        await engine.dispose()


async def test_all_is_locked_before_the_first_of_several_databases_commits(
    sqlite_url: str, postgres_url: str, cache: Cache
) -> None:
    async with database(sqlite_url) as one, database(postgres_url) as two:
        binds: dict[Any, AsyncEngine] = {Author: one, Country: two}
        sessions = async_sessionmaker(binds=binds, class_=AsyncCachedSession, cache=cache)
        async with sessions.begin() as session:
            session.add_all([Author(id=1, name="Ann"), Country(code="de", name="DE")])
        async with sessions() as session:
            await session.get_one(Author, 1)
            await session.get_one(Country, "de")
        await cache.drain()

        async def both_locked() -> bool:
            return await Slots(cache, one).is_locked(Author, 1) and await Slots(cache, two).is_locked(Country, "de")

        seen = [at_event(engine, "commit", both_locked) for engine in (one, two)]
        async with sessions.begin() as session:
            (await session.get_one(Author, 1)).name = "Eve"
            (await session.get_one(Country, "de")).name = "Germany"
        assert seen == [[True], [True]]
        async with sessions() as session:
            assert (await session.get_one(Author, 1)).name == "Eve"
            assert (await session.get_one(Country, "de")).name == "Germany"


async def test_two_databases_of_other_names_share_no_slots(
    sqlite_url: str, postgres_url: str, cache: Cache, statements: Statements
) -> None:
    async with database(sqlite_url) as one, database(postgres_url) as two:
        makers = [async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache) for engine in (one, two)]
        for name, sessions in zip(("Ann", "Ben"), makers, strict=True):
            async with sessions.begin() as session:
                session.add(Author(id=1, name=name))
        assert [await name_of(sessions) for sessions in makers] == ["Ann", "Ben"]
        await cache.drain()
        async with makers[0].begin() as session:
            await rename(session)
        assert await Slots(cache, two).holds_value(Author, 1)
        assert [await name_of(sessions) for sessions in makers] == ["Eve", "Ben"]


# --------------------------------------------------------------------------------------------------------- AUTOCOMMIT


@pytest.fixture
def autocommit(engine: AsyncEngine) -> AsyncEngine:
    return engine.execution_options(isolation_level="AUTOCOMMIT")


async def flush_a_new_name(session: AsyncSession) -> None:
    await rename(session)
    await session.flush()


async def execute_by_primary_key(session: AsyncSession) -> None:
    await session.execute(update(Author).where(Author.id == 1).values(name="Eve"))


async def execute_on_the_connection(session: AsyncSession) -> None:
    author = Base.metadata.tables["author"]
    await (await session.connection()).execute(update(author).where(author.c.id == 1).values(name="Eve"))


async def save_in_bulk(session: AsyncSession) -> None:
    await session.execute(update(Author), [{"id": 1, "name": "Eve"}])


@pytest.mark.parametrize("write", [flush_a_new_name, execute_by_primary_key, execute_on_the_connection, save_in_bulk])
@on_both
@pytest.mark.usefixtures("ann")
async def test_under_autocommit_each_statement_is_a_commit(
    write: Callable[[AsyncSession], Awaitable[None]],
    engine: AsyncEngine,
    autocommit: AsyncEngine,
    sessions: Sessions,
    cache: Cache,
    slots: Slots,
) -> None:
    at_once = async_sessionmaker(autocommit, class_=AsyncCachedSession, cache=cache)
    assert await name_of(at_once, 2) == "Ben"
    locked = at_event(engine, "before_cursor_execute", lambda: slots.is_locked(Author, 1))
    async with at_once() as session:
        await write(session)
        assert locked[-1]
        assert await name_of(sessions) == "Eve"
        await cache.drain()
        assert not await slots.is_locked(Author, 1)
        assert await name_of(sessions) == "Eve"
        await session.rollback()
    assert await name_of(sessions) == "Eve"
    assert cache.stats.locks == 1
    await cache.drain()
    assert await slots.holds_value(Author, 1)


@pytest.mark.usefixtures("database_url", "ann")
async def test_under_autocommit_a_statement_that_names_no_rows_locks_its_table(
    engine: AsyncEngine, autocommit: AsyncEngine, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    at_once = async_sessionmaker(autocommit, class_=AsyncCachedSession, cache=cache)
    assert await name_of(at_once, 2) == "Ben"
    locked = at_event(engine, "before_cursor_execute", lambda: slots.are_generations_locked(Author))
    async with at_once() as session:
        await session.execute(update(Author).values(name="Eve"), execution_options={"synchronize_session": False})
        assert locked == [True]
        await cache.drain()
        assert not await slots.are_generations_locked(Author)
        assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Eve", "Eve")


@pytest.mark.usefixtures("database_url", "ann")
async def test_under_autocommit_a_statement_that_failed_leaves_no_lock_behind_its_time(
    engine: AsyncEngine,
) -> None:
    async with Cache("memory://", lock_ttl=0.4, lock_timeout=0.2) as cache:
        cache.register(Author)
        autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        at_once = async_sessionmaker(autocommit, class_=AsyncCachedSession, cache=cache)
        async with at_once() as session:
            session.add(Author(id=1, name="there is one already"))
            with pytest.raises(IntegrityError):
                await session.flush()
        assert await name_of(at_once) == "Ann"
        await cache.drain()
        assert not await Slots(cache, engine).is_locked(Author, 1)
        assert await name_of(at_once) == "Ann"


# ------------------------------------------------------------------------------------------------ external transactions


@on_both
@pytest.mark.usefixtures("ann")
async def test_an_external_transaction_locks_when_it_is_committed_and_not_before(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    async with engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncCachedSession(connection, cache=cache, join_transaction_mode="create_savepoint") as session:
            await rename(session)
            await session.commit()
        assert cache.stats.locks == 0
        assert await slots.holds_value(Author, 1)
        assert await name_of(sessions) == "Ann"

        at_commit = at_event(engine, "commit", lambda: slots.is_locked(Author, 1))
        await outer.commit()
        assert at_commit == [True]
    assert await name_of(sessions) == "Eve"
    assert cache.stats.locks == 1


@on_both
@pytest.mark.usefixtures("ann")
async def test_an_external_transaction_is_unlocked_once_its_commit_was_answered(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    async with engine.begin() as connection, AsyncCachedSession(connection, cache=cache) as session:
        await rename(session)
        await session.flush()
    assert await name_of(sessions) == "Eve"
    await cache.drain()
    assert not await slots.is_locked(Author, 1)
    assert await name_of(sessions) == "Eve"
    await cache.drain()
    assert await slots.holds_value(Author, 1)


@pytest.mark.usefixtures("database_url", "ann")
async def test_nothing_of_an_external_transaction_that_is_rolled_back_is_kept(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    async with engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncCachedSession(connection, cache=cache) as session:
            await rename(session)
            session.add(Author(id=3, name="Zoe"))
            await session.flush()
            assert await session.get(Author, 3) is not None
        await outer.rollback()
        assert cache.stats.locks == 0
        assert (await name_of(sessions, 1), await name_of(sessions, 3)) == ("Ann", None)

        outer = await connection.begin()
        async with AsyncCachedSession(connection, cache=cache) as session:
            (await session.get_one(Author, 2)).name = "Bob"
            await session.flush()
        await outer.commit()
        assert cache.stats.locks == 1, "of the second transaction, not of the first"
        assert not await slots.is_locked(Author, 1)
    assert await name_of(sessions, 2) == "Bob"


@pytest.mark.usefixtures("database_url", "ann")
async def test_an_external_commit_locks_what_one_session_after_another_wrote(
    engine: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    assert await name_of(sessions, 2) == "Ben"
    await cache.drain()
    async with engine.connect() as connection:
        async with connection.begin():
            for id_, name in ((1, "Eve"), (2, "Bob")):
                async with AsyncCachedSession(connection, cache=cache) as session:
                    author = await session.get_one(Author, id_)
                    author.name = name
                    await session.flush()
        assert cache.stats.locks == 2
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Eve", "Bob")


# --------------------------------------------------------------------------------------------------- cached_invalidate


async def write_past_the_library(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("update author set name = 'Eve' where id = 1"))


@on_both
@pytest.mark.usefixtures("ann")
async def test_cached_invalidate_takes_effect_at_commit(
    engine: AsyncEngine, sessions: Sessions, cache: Cache, slots: Slots
) -> None:
    await write_past_the_library(engine)
    assert await name_of(sessions) == "Ann"
    async with sessions() as session:
        cached_invalidate(session, Author, 1)
        assert await slots.holds_value(Author, 1)
        await session.commit()
    assert not await slots.holds_value(Author, 1)
    assert await name_of(sessions) == "Eve"


@on_both
@pytest.mark.usefixtures("ann")
async def test_cached_invalidate_locks_with_the_other_work_of_its_transaction(
    engine: AsyncEngine, sessions: Sessions, slots: Slots
) -> None:
    await write_past_the_library(engine)
    at_commit = at_event(engine, "commit", lambda: slots.is_locked(Author, 1))
    async with sessions.begin() as session:
        cached_invalidate(session, Author, 1)
        (await session.get_one(Author, 2)).name = "Bob"
    assert at_commit == [True]
    assert (await name_of(sessions, 1), await name_of(sessions, 2)) == ("Eve", "Bob")


@pytest.mark.usefixtures("database_url", "ann")
async def test_cached_invalidate_makes_its_own_session_read_past_the_cache(
    engine: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    await write_past_the_library(engine)
    async with sessions() as session:
        cached_invalidate(session, Author, 1)
        assert (await session.get_one(Author, 1)).name == "Eve"
    assert cache.stats.bypassed["own writes"] == 1


@pytest.mark.usefixtures("database_url", "ann")
async def test_rollback_and_close_forget_cached_invalidate(sessions: Sessions, cache: Cache, slots: Slots) -> None:
    async with sessions() as session:
        cached_invalidate(session, Author, 1)
        await session.rollback()
        await session.commit()
    async with sessions() as session:
        cached_invalidate(session, Author, 1)
    await cache.drain()
    assert cache.stats.locks == cache.stats.unlocks == 0
    assert await slots.holds_value(Author, 1)


# ---------------------------------------------------------------------------------------- while COMMIT is under way


on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@on_postgresql
@pytest.mark.usefixtures("database_url", "cache_url", "ann")
async def test_while_commit_is_under_way_readers_get_the_old_row_and_store_nothing(
    sessions: Sessions,
    proxied_sessions: Sessions,
    proxy: FaultProxy,
    cache: Cache,
    slots: Slots,
    statements: Statements,
) -> None:
    commit = proxy.hold_request(b"COMMIT")
    writer = asyncio.create_task(by_commit(proxied_sessions))
    await commit.seen.wait()
    assert await slots.is_locked(Author, 1)
    statements.clear()
    assert [await name_of(sessions) for _ in range(3)] == ["Ann"] * 3
    assert len(statements.selects()) == 3
    await cache.drain()
    assert await slots.is_locked(Author, 1)

    commit.released.set()
    await writer
    assert await name_of(sessions) == "Eve"
    await cache.drain()
    assert not await slots.is_locked(Author, 1)


@on_both
@pytest.mark.usefixtures("ann")
async def test_a_row_that_was_read_before_a_commit_is_not_stored_after_it(
    engine: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    was_read, go_on = asyncio.Event(), asyncio.Event()

    def hold(connection: Connection, cursor: Any, sql: str, *rest: object) -> None:
        if sql.startswith("SELECT") and not was_read.is_set():
            was_read.set()
            await_only(go_on.wait())

    event.listen(engine.sync_engine, "after_cursor_execute", hold)
    reader = asyncio.create_task(name_of(sessions, 2))
    await was_read.wait()
    async with sessions.begin() as session:
        await session.execute(update(Author).where(Author.id == 2).values(name="Bob"))
    await cache.drain()
    go_on.set()
    assert await reader == "Ben"
    await cache.drain()
    assert cache.stats.fills_dropped == 1
    assert await name_of(sessions, 2) == "Bob"


@pytest.mark.parametrize("table", [False, True], ids=["a row", "a table"])
@on_postgresql
@pytest.mark.parametrize("cache_url", ["memcached"], indirect=True)
@pytest.mark.usefixtures("database_url", "cache_url", "ann")
async def test_an_old_row_that_was_stored_after_a_lock_was_lost_is_destroyed_before_the_caller_is_told(
    sessions: Sessions,
    proxied_sessions: Sessions,
    proxy: FaultProxy,
    memcached_server: Memcached,
    cache: Cache,
    slots: Slots,
    *,
    table: bool,
) -> None:
    async def write() -> None:
        async with proxied_sessions() as session:
            if table:
                await session.execute(update(Author).values(name="Eve"))
            else:
                await rename(session)
            await session.commit()

    commit = proxy.hold_request(b"COMMIT")
    writer = asyncio.create_task(write())
    await commit.seen.wait()
    memcached_server.flush()
    assert await name_of(sessions) == "Ann"
    await cache.drain()
    assert await slots.holds_value(Author, 1), "nothing hinders a reader any more"

    commit.released.set()
    await writer
    assert not await slots.holds_value(Author, 1)
    assert await name_of(sessions) == "Eve"
    assert cache.stats.locks_lost >= 1


@on_postgresql
@pytest.mark.usefixtures("database_url", "cache_url", "ann")
async def test_a_slot_stays_locked_until_the_last_of_its_writers_is_done(
    sessions: Sessions, engine: AsyncEngine, proxied_sessions: Sessions, proxy: FaultProxy, cache: Cache, slots: Slots
) -> None:
    """Two transactions that both invalidate a row, of which the database lets both go on."""
    commit = proxy.hold_request(b"COMMIT")

    async def slow() -> None:
        async with proxied_sessions() as session:
            cached_invalidate(session, Author, 1)
            await rename(session)
            await session.commit()

    writer = asyncio.create_task(slow())
    await commit.seen.wait()
    async with sessions.begin() as session:
        cached_invalidate(session, Author, 1)
        (await session.get_one(Author, 2)).name = "Bob"
    await cache.drain()
    assert await slots.is_locked(Author, 1)
    assert not await slots.is_locked(Author, 2)

    commit.released.set()
    await writer
    await cache.drain()
    assert not await slots.is_locked(Author, 1)
    assert await name_of(sessions) == "Eve"
