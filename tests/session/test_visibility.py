"""Which sessions read from the cache, and which may fill it: what a transaction sees is what it would see without.

Most tests begin with a row that reads "cached" in the cache and "database" in the database. The library never lets that
happen; it shows from where a get reads.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import pytest
import sqlalchemy
from sqlalchemy import Engine, ForeignKey, delete, event, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    column_property,
    mapped_column,
    selectinload,
    with_loader_criteria,
)

from asynccache import AsyncCachedSession, AsyncCacheWarning, Cache
from asynccache.sync_session import CachedSession
from tests.conftest import Sessions, Statements, listening
from tests.models import Author, Base, Board, Shelf, Tag

Plain = async_sessionmaker[AsyncSession]

T = TypeVar("T", bound=Callable[..., Any])


def on_postgresql(test: T) -> T:
    alone = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
    marked: T = pytest.mark.usefixtures("database_url")(alone(test))
    return marked


def sessions_of(engine: AsyncEngine, cache: Cache, **options: Any) -> Sessions:
    return async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache, **options)


async def name_of(session: AsyncSession, pk: Any = 1, **options: Any) -> str | None:
    author = await session.get(Author, pk, **options)
    return author.name if author is not None else None


async def read(sessions: Sessions, pk: Any = 1) -> str | None:
    """As a request of its own."""
    async with sessions() as session:
        return await name_of(session, pk)


async def fill(sessions: Sessions, cache: Cache, plain: Plain) -> None:
    async with plain.begin() as session:
        session.add_all([Author(id=1, name="cached"), Author(id=2, name="two"), Tag(id=1, name="tag")])
    assert await read(sessions) == "cached"
    await cache.drain()
    async with plain.begin() as session:  # which the cache does not see
        await session.execute(update(Author).where(Author.id == 1).values(name="database"))


@pytest.fixture
async def filled(sessions: Sessions, cache: Cache, plain: Plain) -> None:
    await fill(sessions, cache, plain)


@asynccontextmanager
async def engine_like(engine: AsyncEngine, **options: Any) -> AsyncGenerator[AsyncEngine]:
    """Another engine of the same database."""
    other = create_async_engine(engine.url, **options)
    try:
        yield other
    finally:
        await other.dispose()


# ---------------------------------------------------------------------------------------------------- what is asked for


async def test_a_get_reads_from_the_cache(filled: None, sessions: Sessions, cache: Cache) -> None:
    assert await read(sessions) == "cached"
    assert not cache.stats.bypassed


@pytest.mark.usefixtures("database_url")
@pytest.mark.parametrize(
    "options",
    [
        {"options": [selectinload(Author.books)]},
        {"populate_existing": True},
        {"with_for_update": True},
        {"with_for_update": {"nowait": True}},
        {"execution_options": {"logging_token": "request 7"}},
        {"identity_token": "token"},
    ],
    ids=[
        "loader options",
        "populate_existing",
        "for update",
        "for update nowait",
        "execution options",
        "identity token",
    ],
)
async def test_a_special_request_goes_to_the_database(
    options: dict[str, Any], filled: None, sessions: Sessions, cache: Cache
) -> None:
    async with sessions() as session:
        assert await name_of(session, **options) == "database"
    assert cache.stats.bypassed == {"options": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"options": None, "populate_existing": False, "with_for_update": None, "identity_token": None},
        {"populate_existing": None, "execution_options": {}, "options": []},
    ],
)
async def test_naming_the_defaults_asks_for_nothing_special(
    options: dict[str, Any], filled: None, sessions: Sessions
) -> None:
    async with sessions() as session:
        assert await name_of(session, **options) == "cached"


@pytest.mark.parametrize("pk", ["1", True, 1.0])
async def test_a_key_of_another_type_goes_to_the_database(
    pk: object, filled: None, sessions: Sessions, cache: Cache
) -> None:
    assert await read(sessions, pk) == "database"
    assert cache.stats.bypassed == {"primary key type": 1}


async def test_reading_can_be_turned_off(filled: None, sessions: Sessions, cache: Cache) -> None:
    cache.reading = False
    assert await read(sessions) == "database"
    assert cache.stats.bypassed == {"reading is off": 1}


@on_postgresql
async def test_with_for_update_locks_the_row(filled: None, sessions: Sessions) -> None:
    async with sessions() as one, sessions() as other:
        assert await name_of(one, with_for_update=True) == "database"
        with pytest.raises(DBAPIError, match="could not obtain lock"):
            await name_of(other, with_for_update={"nowait": True})


# ------------------------------------------------------------------------------------------------ what cannot be cached


class Other(DeclarativeBase):
    pass


class Leaf(Other):
    __tablename__ = "leaf"

    id: Mapped[int] = mapped_column(primary_key=True)
    tree_id: Mapped[int] = mapped_column(ForeignKey("tree.id"))


class Tree(Other):
    """What counts other rows changes without a write to its own."""

    __tablename__ = "tree"

    id: Mapped[int] = mapped_column(primary_key=True)


Tree.leaves = column_property(
    select(func.count(Leaf.id)).where(Leaf.tree_id == Tree.id).correlate_except(Leaf).scalar_subquery()
)


class Clock(Other):
    __tablename__ = "clock"

    id: Mapped[int] = mapped_column(primary_key=True)

    __mapper_args__ = {"always_refresh": True}


@pytest.mark.parametrize(("model", "reason"), [(Tree, "column_property beyond its own row"), (Clock, "always_refresh")])
async def test_a_model_whose_rows_are_not_all_of_an_instance(
    model: type[Tree | Clock], reason: str, engine: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    cache.register(Other)
    async with engine.begin() as connection:
        await connection.run_sync(Other.metadata.create_all)
    async with sessions.begin() as session:
        session.add(model(id=1))
    for _ in range(2):
        async with sessions() as session:
            assert await session.get(model, 1) is not None
        await cache.drain()
    assert cache.stats.bypassed == {reason: 2}
    assert cache.stats.fills == 0


async def test_eager_relationships_come_with_the_row(sessions: Sessions, plain: Plain, cache: Cache) -> None:
    async with plain.begin() as session:
        session.add(Shelf(id=1, name="top", boards=[Board(id=1)]))
    for _ in range(2):
        async with sessions() as session:
            shelf = await session.get_one(Shelf, 1)
            assert [board.id for board in shelf.boards] == [1]
        await cache.drain()
    assert (cache.stats.bypassed, cache.stats.hits) == ({}, 1)


# ---------------------------------------------------------------------------------------------------- what a session is


async def test_a_session_on_a_connection_of_the_applications_own(
    filled: None, engine: AsyncEngine, cache: Cache
) -> None:
    async with engine.connect() as connection, AsyncCachedSession(connection, cache=cache) as session:
        assert await name_of(session) == "database"
    assert cache.stats.bypassed == {"external connection": 1}


@pytest.mark.sqlalchemy_2_1
async def test_a_session_with_execution_options(filled: None, engine: AsyncEngine, cache: Cache) -> None:
    sessions = sessions_of(engine, cache, execution_options={"populate_existing": True})
    assert await read(sessions) == "database"
    assert cache.stats.bypassed == {"session execution options": 1}


@pytest.mark.usefixtures("database_url")
async def test_a_session_that_has_changed_its_settings(
    filled: None, sessions: Sessions, cache: Cache, engine: AsyncEngine
) -> None:
    setting = "PRAGMA cache_size = 100" if engine.dialect.name == "sqlite" else "SET LOCAL statement_timeout = 1000"
    async with sessions() as session:
        await session.execute(text(setting))
        assert await name_of(session) == "database"
        assert await name_of(session, 2) == "two"
        assert cache.stats.bypassed == {"session settings": 2}
        await session.rollback()
    await cache.drain()
    assert cache.stats.fills == 1, "that of the fixture"


async def test_a_session_whose_transaction_has_failed_raises_as_ever(
    filled: None, sessions: Sessions, plain: Plain
) -> None:
    for each in (plain, sessions):
        async with each() as session:
            session.add(Author(id=1, name="again"))
            with pytest.raises(IntegrityError):
                await session.flush()
            # The failed flush has rolled back; until the session is told, it may not go on.
            await session.rollback()
            await session.execute(select(Tag))
            session.add(Author(id=1, name="again"))
            with pytest.raises(IntegrityError):
                await session.get(Author, 2)


async def test_an_inactive_transaction_reads_nothing_from_the_cache(filled: None, sessions: Sessions) -> None:
    async with sessions() as session:
        savepoint = await session.begin_nested()
        session.add(Author(id=9))  # without its name
        with pytest.raises(IntegrityError):
            await session.flush()
        with pytest.raises(PendingRollbackError):
            await name_of(session)
        await savepoint.rollback()
        assert await name_of(session) == "cached"


# --------------------------------------------------------------------------------------------- do_orm_execute listeners


@pytest.fixture
def soft_deletes() -> Callable[[AsyncSession], None]:
    def hide_deleted(execution: ORMExecuteState) -> None:
        if execution.is_select:
            execution.statement = execution.statement.options(
                with_loader_criteria(Author, Author.name.not_like("deleted %"))
            )

    return lambda session: event.listen(session.sync_session, "do_orm_execute", hide_deleted)


async def test_what_a_listener_hides_does_not_come_from_the_cache(
    soft_deletes: Callable[[AsyncSession], None], sessions: Sessions, cache: Cache
) -> None:
    async with sessions.begin() as session:
        session.add(Author(id=1, name="deleted yesterday"))
    assert await read(sessions) == "deleted yesterday"
    await cache.drain()
    async with sessions() as session:
        soft_deletes(session)
        with pytest.warns(AsyncCacheWarning, match=r"do_orm_execute listeners.*bypass_listeners=False"):
            assert await name_of(session) is None
    async with sessions() as session:  # warned of once
        soft_deletes(session)
        assert await name_of(session) is None
    await cache.drain()
    assert cache.stats.bypassed == {"do_orm_execute listener": 2}
    assert await read(sessions) == "deleted yesterday"


async def test_listeners_that_hide_nothing_can_be_declared_harmless(engine: AsyncEngine, plain: Plain) -> None:
    async with Cache("memory://", bypass_listeners=False) as cache:
        cache.register(Base)
        sessions = sessions_of(engine, cache)
        await fill(sessions, cache, plain)
        async with sessions() as session:
            event.listen(session.sync_session, "do_orm_execute", lambda _: None)
            assert await name_of(session) == "cached"
        assert not cache.stats.bypassed


class Listened(CachedSession):
    pass


def holds_connection(session: AsyncSession) -> bool:
    return cast("CachedSession", session.sync_session).holds_connection


WHERE_THEY_LISTEN: dict[str, Callable[[AsyncCachedSession], Any]] = {
    "a session": lambda session: session.sync_session,
    "a class of sessions": lambda _: Listened,
    "all sessions": lambda _: Session,
}


@pytest.mark.parametrize("name", ["do_orm_execute", "after_begin"])
@pytest.mark.parametrize("where", WHERE_THEY_LISTEN)
@pytest.mark.filterwarnings("ignore:a session has do_orm_execute listeners")
async def test_a_listener_is_found_wherever_it_listens(
    name: str, where: str, filled: None, engine: AsyncEngine, cache: Cache, statements: Statements
) -> None:
    """What SQLAlchemy says of its listeners is asked for by names that it does not document."""
    sessions = sessions_of(engine, cache, sync_session_class=Listened)
    statements.clear()
    async with sessions() as session:
        assert await name_of(session) == "cached"
        session.expunge_all()
        with listening(WHERE_THEY_LISTEN[where](session), name, lambda *_: None):
            assert await name_of(session) == ("database" if name == "do_orm_execute" else "cached")
            # An `after_begin` listener is given its connection before it is known what the session may read.
            assert holds_connection(session)
    async with sessions() as session:
        assert await name_of(session) == "cached"
        assert not holds_connection(session)


@pytest.mark.parametrize("of", ["the engine", "the engine with options", "all engines"])
@pytest.mark.filterwarnings("ignore:an engine has begin listeners")
async def test_a_listener_to_begin_is_found_wherever_it_listens(
    of: str, filled: None, engine: AsyncEngine, cache: Cache
) -> None:
    with_options = engine.execution_options(answer=42)
    target = {
        "the engine": engine.sync_engine,
        "the engine with options": with_options.sync_engine,
        "all engines": Engine,
    }
    with listening(target[of], "begin", lambda _: None):
        assert await read(sessions_of(with_options, cache)) == "database"
        if of == "the engine with options":
            assert await read(sessions_of(engine, cache)) == "cached"
    assert await read(sessions_of(with_options, cache)) == "cached"


# ------------------------------------------------------------------------------------------------------------ isolation


class Isolated:
    """Opens sessions of an isolation level, by one of the ways to ask for it."""

    def __init__(self, way: str, engine: AsyncEngine, cache: Cache) -> None:
        self.way = way
        self._engine = engine
        self._cache = cache

    @asynccontextmanager
    async def session(self, level: str) -> AsyncGenerator[AsyncSession]:
        options: dict[str, Any] = {}
        if self.way == "engine":
            options["isolation_level"] = level
        elif self.way == "server default":
            options["connect_args"] = {"server_settings": {"default_transaction_isolation": level.lower()}}
        async with engine_like(self._engine, **options) as engine:
            bind = engine.execution_options(isolation_level=level) if self.way == "engine options" else engine
            async with AsyncCachedSession(bind, cache=self._cache) as session:
                if self.way == "connection":
                    _ = await session.connection(execution_options={"isolation_level": level})
                yield session


WAYS = ["engine", "engine options", "server default", "connection"]


@pytest.fixture(params=WAYS)
def isolated(request: pytest.FixtureRequest, engine: AsyncEngine, cache: Cache) -> Isolated:
    return Isolated(request.param, engine, cache)


@on_postgresql
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_snapshot_reads_past_the_cache(level: str, filled: None, isolated: Isolated, cache: Cache) -> None:
    async with isolated.session(level) as session:
        assert await name_of(session) == "database"
        assert await name_of(session, 2) == "two"
    await cache.drain()
    assert cache.stats.bypassed == {"isolation level": 2}
    assert cache.stats.fills == 1, "that of the fixture"


@on_postgresql
@pytest.mark.parametrize(
    ("level", "isolated"),
    [("READ COMMITTED", way) for way in WAYS] + [("AUTOCOMMIT", way) for way in WAYS if way != "server default"],
    indirect=["isolated"],
)
async def test_who_sees_every_commit_reads_and_fills(
    level: str, filled: None, isolated: Isolated, cache: Cache, sessions: Sessions
) -> None:
    async with isolated.session(level) as session:
        assert await name_of(session) == "cached"
        assert await name_of(session, 2) == "two"
    await cache.drain()
    assert not cache.stats.bypassed
    assert cache.stats.fills == 2
    hits = cache.stats.hits
    assert await read(sessions, 2) == "two"
    assert cache.stats.hits == hits + 1


async def test_autocommit_on_sqlite_reads_and_fills(engine: AsyncEngine, filled: None, cache: Cache) -> None:
    async with engine_like(engine, isolation_level="AUTOCOMMIT") as autocommit:
        sessions = sessions_of(autocommit, cache)
        assert await read(sessions) == "cached"
        assert await read(sessions, 2) == "two"
    await cache.drain()
    assert cache.stats.fills == 2


@on_postgresql
async def test_an_old_snapshot_never_fills(isolated: Isolated, sessions: Sessions, cache: Cache) -> None:
    """1. A reader's snapshot is taken. 2. A commit is acknowledged. 3. The reader gets the row, and has the old one."""
    async with sessions.begin() as session:
        session.add(Author(id=1, name="old"))
    async with isolated.session("REPEATABLE READ") as reader:
        await reader.execute(select(Tag))
        async with sessions.begin() as writer:
            (await writer.get_one(Author, 1)).name = "new"
        await cache.drain()
        assert await name_of(reader) == "old"
        await cache.drain()
    assert await read(sessions) == "new"


async def test_an_old_snapshot_of_sqlite_never_fills(engine: AsyncEngine, cache: Cache, sessions: Sessions) -> None:
    """SQLAlchemy's recipe for serializable transactions has the application emit BEGIN."""
    async with sessions.begin() as session:
        session.add(Author(id=1, name="old"))
        await session.flush()
    async with engine_like(engine) as serializable:

        def connected(connection: Any, record: object) -> None:
            connection.isolation_level = None  # the driver emits no BEGIN
            connection.cursor().execute("PRAGMA journal_mode=WAL")

        def begin(connection: sqlalchemy.Connection) -> None:
            connection.exec_driver_sql("BEGIN")

        event.listen(serializable.sync_engine, "connect", connected)
        event.listen(serializable.sync_engine, "begin", begin)
        async with sessions_of(serializable, cache)() as reader:
            await reader.execute(select(Tag))
            async with sessions.begin() as writer:
                (await writer.get_one(Author, 1)).name = "new"
            await cache.drain()
            assert await name_of(reader) == "old"
            await cache.drain()
    assert await read(sessions) == "new"
    assert cache.stats.bypassed["isolation level"] == 1


# ----------------------------------------------------------------------------------------------------------- own writes


async def _by_the_unit_of_work(session: AsyncSession) -> None:
    (await session.get_one(Author, 1)).name = "mine"
    await session.flush()


async def _by_an_orm_update(session: AsyncSession) -> None:
    await session.execute(update(Author).where(Author.id == 1).values(name="mine"))


async def _by_a_core_update(session: AsyncSession) -> None:
    await session.execute(update(Author.__table__).where(Author.__table__.c.id == 1).values(name="mine"))  # type: ignore[arg-type]


async def _by_text(session: AsyncSession) -> None:
    await session.execute(text("UPDATE author SET name = 'mine' WHERE id = 1"))


async def _on_the_connection(session: AsyncSession) -> None:
    await (await session.connection()).exec_driver_sql("UPDATE author SET name = 'mine'")


async def _in_a_savepoint(session: AsyncSession) -> None:
    async with session.begin_nested():
        await _by_the_unit_of_work(session)


WRITES = [_by_the_unit_of_work, _by_an_orm_update, _by_a_core_update, _by_text, _on_the_connection, _in_a_savepoint]


@pytest.mark.usefixtures("database_url")
@pytest.mark.parametrize("write", WRITES)
async def test_a_transaction_sees_its_own_writes_and_nobody_else_does(
    write: Any, filled: None, sessions: Sessions, cache: Cache
) -> None:
    async with sessions() as session:
        await write(session)
        session.expunge_all()
        assert await name_of(session) == "mine"
        assert await read(sessions) == "cached"
        await session.rollback()
        assert await name_of(session) == "cached", "nothing was committed, so that nothing was invalidated"
    assert cache.stats.bypassed == {"own writes": 1}


@pytest.mark.usefixtures("database_url")
@pytest.mark.parametrize("write", WRITES)
async def test_a_session_that_has_written_fills_nothing(
    write: Any, filled: None, sessions: Sessions, cache: Cache
) -> None:
    fills = cache.stats.fills
    async with sessions() as session:
        await write(session)
        assert await name_of(session, 2) == ("two" if write is not _on_the_connection else "mine")
        assert await session.get(Tag, 1) is not None
        await cache.drain()
        assert cache.stats.fills == fills
        await session.rollback()


async def test_a_session_that_has_deleted_sees_no_row(filled: None, sessions: Sessions) -> None:
    async with sessions() as session:
        await session.execute(delete(Author).where(Author.id == 1))
        session.expunge_all()
        assert await name_of(session) is None
        assert await read(sessions) == "cached"


async def test_a_session_that_has_inserted_sees_the_row(filled: None, sessions: Sessions, cache: Cache) -> None:
    assert await read(sessions, 9) is None
    await cache.drain()
    async with sessions() as session:
        await session.execute(insert(Author).values(id=9, name="nine"))
        assert await name_of(session, 9) == "nine"
        assert await read(sessions, 9) is None


async def test_a_row_that_others_have_written_is_read_from_the_cache_meanwhile(
    filled: None, sessions: Sessions, cache: Cache
) -> None:
    async with sessions() as session:
        await session.execute(update(Author).where(Author.id == 2).values(name="mine"))
        assert await name_of(session) == "cached"
        assert not cache.stats.bypassed


@pytest.mark.usefixtures("database_url")
async def test_a_get_flushes_what_is_pending(filled: None, sessions: Sessions, statements: Statements) -> None:
    async with sessions() as session:
        added = Author(id=9, name="nine")
        session.add(added)
        assert await session.get(Author, 9) is added
        session.add(Tag(id=9, name="nine"))
        statements.clear()
        assert await name_of(session) == "cached"
        assert [each.split()[0] for each in statements] == ["INSERT"]


async def test_a_get_flushes_nothing_without_autoflush(filled: None, engine: AsyncEngine, cache: Cache) -> None:
    async with sessions_of(engine, cache, autoflush=False)() as session:
        session.add(Author(id=9, name="nine"))
        assert await session.get(Author, 9) is None
        assert await name_of(session) == "cached"
        with session.no_autoflush:
            assert await session.get(Author, 2) is not None
        assert session.new


# ----------------------------------------------------------------------------------------------------------- whose rows


@on_postgresql
@pytest.mark.parametrize("on", ["engine", "connection"])
async def test_tenants_never_see_each_others_rows(on: str, engine: AsyncEngine, cache: Cache) -> None:
    tenants = ["blue", "green"]
    for tenant in tenants:
        async with engine.begin() as connection:
            await connection.execute(text(f"CREATE SCHEMA {tenant}"))
            _ = await connection.execution_options(schema_translate_map={None: tenant})
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Author).values(id=1, name=tenant))

    @asynccontextmanager
    async def session_of(tenant: str) -> AsyncGenerator[AsyncSession]:
        options = {"schema_translate_map": {None: tenant}}
        bind = engine.execution_options(**options) if on == "engine" else engine
        async with AsyncCachedSession(bind, cache=cache) as session:
            if on == "connection":
                _ = await session.connection(execution_options=options)
            yield session

    for hits in (0, 2):
        for tenant in tenants:
            async with session_of(tenant) as session:
                assert await name_of(session) == tenant
            await cache.drain()
        assert cache.stats.hits == hits
    async with session_of("blue") as session:
        (await session.get_one(Author, 1)).name = "navy"
        await session.commit()
    await cache.drain()
    async with session_of("blue") as blue, session_of("green") as green:
        assert [await name_of(blue), await name_of(green)] == ["navy", "green"]


@pytest.mark.usefixtures("database_url")
async def test_two_databases_never_share_rows(
    request: pytest.FixtureRequest, filled: None, engine: AsyncEngine, sessions: Sessions, cache: Cache
) -> None:
    if engine.dialect.name == "sqlite":
        url = f"{engine.url}.other"
    else:
        server = request.getfixturevalue("postgres")
        url = server.create_database()
    other = create_async_engine(url)
    async with other.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    others = sessions_of(other, cache)
    assert await read(others) is None
    await cache.drain()
    assert await read(sessions) == "cached"
    await other.dispose()


async def test_two_databases_in_memory_never_share_rows(cache: Cache) -> None:
    for name in ("one", "two"):
        engine = create_async_engine("sqlite+aiosqlite://")
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Author).values(id=1, name=name))
        for _ in range(2):
            assert await read(sessions_of(engine, cache)) == name
            await cache.drain()
        await engine.dispose()
    assert cache.stats.hits == 2


async def test_two_engines_of_one_database_share_rows(filled: None, engine: AsyncEngine, cache: Cache) -> None:
    async with engine_like(engine) as replica:
        assert await read(sessions_of(replica, cache)) == "cached"


async def test_cache_scope_tells_databases_apart(filled: None, engine: AsyncEngine, cache: Cache) -> None:
    async with engine_like(engine, execution_options={"cache_scope": "shard 7"}) as shard:
        assert await read(sessions_of(shard, cache)) == "database"
        await cache.drain()
        async with engine_like(engine, execution_options={"cache_scope": "shard 7"}) as replica:
            hits = cache.stats.hits
            assert await read(sessions_of(replica, cache)) == "database"
            assert cache.stats.hits == hits + 1


@on_postgresql
async def test_a_database_without_a_name_is_not_cached(filled: None, engine: AsyncEngine, cache: Cache) -> None:
    nameless = create_async_engine(engine.url.set(database=""), connect_args={"database": engine.url.database})
    sessions = sessions_of(nameless, cache)
    with pytest.warns(AsyncCacheWarning, match=r"does not name its database.*cache_scope"):
        assert await read(sessions) == "database"
    assert await read(sessions) == "database"
    await nameless.dispose()


# -------------------------------------------------------------------------------------------------------- as SQLAlchemy


async def test_a_hit_begins_a_transaction_as_a_miss_does(
    filled: None, sessions: Sessions, plain: Plain, cache: Cache
) -> None:
    hits = cache.stats.hits
    for each in (plain, sessions):
        async with each() as session:
            assert not session.in_transaction()
            await session.get(Author, 1)
            assert session.in_transaction()
            with pytest.raises(InvalidRequestError, match="A transaction is already begun"):
                _ = await session.begin()
            await session.rollback()
            assert not session.in_transaction()
            async with session.begin():
                await session.get(Author, 1)
    assert cache.stats.hits == hits + 2


async def test_a_hit_takes_no_connection(filled: None, sessions: Sessions, engine: AsyncEngine) -> None:
    async with sessions() as session:
        assert await name_of(session) == "cached"
        assert engine.sync_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
