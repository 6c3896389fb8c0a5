"""What SQLAlchemy's own test suite found, run with our sessions in the place of its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import Mock

import pytest
from sqlalchemy import ForeignKey, event, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import (
    Composite,
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    WriteOnlyMapped,
    composite,
    mapped_column,
    relationship,
)
from sqlalchemy.util import await_only

from asynccache import AsyncCachedSession, Cache
from asynccache.backends.base import Applied, Change
from asynccache.backends.memory import MemoryBackend
from asynccache.sync_session import CachedSession
from tests.conftest import Sessions, Statements
from tests.models import Author, Stock

Plain = async_sessionmaker[AsyncSession]


async def test_a_connection_has_the_execution_options_that_were_asked_for(sessions: Sessions) -> None:
    async with sessions() as session:
        connection = await session.connection(execution_options={"stream_results": True})
        assert connection.sync_connection is not None
        assert connection.sync_connection.get_execution_options() == {"stream_results": True}


async def test_a_listener_for_execution_options_hears_of_the_users_own_only(
    engine: AsyncEngine, sessions: Sessions
) -> None:
    heard: list[object] = []
    event.listen(engine.sync_engine, "set_connection_execution_options", lambda _, options: heard.append(options))

    async with sessions() as session:
        await session.execute(text("SELECT 1"))

    assert heard == []


async def test_a_stand_in_for_a_connection_executes(cache: Cache) -> None:
    engine = Mock()
    engine.connect.return_value = connection = Mock(engine=engine)
    connection.in_transaction.return_value = False

    with CachedSession(engine, cache=cache) as session:
        session.execute(text("SELECT 1"))

    connection.execute.assert_called_once()


class Found(DeclarativeBase):
    pass


class Rate(Found):
    """Each get reads it again, whether the session holds it or not."""

    __tablename__ = "rate"
    __mapper_args__ = {"always_refresh": True}

    id: Mapped[int] = mapped_column(primary_key=True)
    percent: Mapped[int]


class Zone(Found):
    __tablename__ = "zone"

    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[int] = mapped_column(unique=True)
    tiles: WriteOnlyMapped[Tile] = relationship()


@dataclass(frozen=True)
class Point:
    x: int
    y: int


class Tile(Found):
    __tablename__ = "tile"

    x: Mapped[int] = mapped_column(primary_key=True)
    y: Mapped[int] = mapped_column(primary_key=True)
    zone: Mapped[int | None] = mapped_column(ForeignKey("zone.code", onupdate="CASCADE"))
    at: Composite[Point] = composite("x", "y")


@pytest.fixture
async def more(engine: AsyncEngine, cache: Cache) -> None:
    """The models above, in the database and in the cache."""
    async with engine.begin() as connection:
        await connection.run_sync(Found.metadata.create_all)
    cache.register(Found)


async def test_always_refresh_refreshes_what_the_session_holds(more: None, sessions: Sessions, plain: Plain) -> None:
    async with plain.begin() as session:
        session.add(Rate(id=1, percent=1))
    async with sessions() as session:
        rate = await session.get(Rate, 1)
        assert rate is not None
        async with plain.begin() as other:
            await other.execute(update(Rate).values(percent=2))

        assert await session.get(Rate, 1) is rate
        assert rate.percent == 2


async def test_a_composite_is_a_primary_key(more: None, sessions: Sessions) -> None:
    async with sessions.begin() as session:
        session.add(Tile(at=Point(1, 2)))
    async with sessions() as session:
        tile = await session.get(Tile, Point(1, 2))
        assert tile is not None
        assert tile.at == Point(1, 2)


async def test_a_row_of_a_result_is_a_primary_key(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        session.add_all([Author(id=1, name="one"), Stock(shop=1, isbn="2", copies=3)])
    async with sessions() as session:
        author = await session.get(Author, (await session.execute(select(Author.id))).one())
        assert author is not None
        stock = await session.get(Stock, (await session.execute(select(Stock.shop, Stock.isbn))).one())
        assert stock is not None


async def test_a_flush_executes_what_it_would_without_a_cache(
    more: None, sessions: Sessions, plain: Plain, statements: Statements
) -> None:
    async def executed(session: AsyncSession, pk: int) -> list[str]:
        session.add(zone := Zone(id=pk, code=pk))
        zone.tiles.add(tile := Tile(x=pk, y=0))
        await session.commit()
        zone.tiles.remove(tile)  # both are expired
        statements.clear()
        await session.flush()
        return list(statements)

    async with sessions() as cached_session:
        ours = await executed(cached_session, 1)
    async with plain() as session:
        assert ours == await executed(session, 2)


async def test_a_key_that_was_set_to_an_expression_is_followed_to_who_refers_to_it(
    more: None, sessions: Sessions, cache: Cache
) -> None:
    async with sessions.begin() as session:
        session.add(Zone(id=1, code=7))
        session.add(Tile(x=1, y=2, zone=7))
    async with sessions() as session:
        await session.get(Tile, (1, 2))
    await cache.drain()

    async with sessions.begin() as session:
        zone = await session.get_one(Zone, 1)
        zone.code = Zone.code + 1
    await cache.drain()

    hits = cache.stats.hits
    async with sessions() as session:
        await session.get(Tile, (1, 2))
    assert cache.stats.hits == hits, "the database may have changed the tile"


class LateUnlocks(MemoryBackend):
    """Unlocks no slot until it is told to."""

    answers_within_s = math.inf

    def __init__(self) -> None:
        super().__init__()
        self.let = asyncio.Event()
        self.unlocked = asyncio.Event()

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        task = asyncio.current_task()
        if task is None or "unlock" not in task.get_name():
            return await super().apply(changes)
        await self.let.wait()
        applied = await super().apply(changes)
        self.unlocked.set()
        return applied


async def test_a_late_unlock_leaves_the_lock_of_the_next_statement_alone(engine: AsyncEngine) -> None:
    async with Cache(backend := LateUnlocks()) as cache:
        cache.register(Author)
        autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        async with AsyncCachedSession(autocommit, cache=cache) as session:
            await session.execute(insert(Author).values(id=1, name="one"))

            def unlock_the_first(*_: object) -> None:
                backend.let.set()
                await_only(backend.unlocked.wait())

            event.listen(engine.sync_engine, "before_cursor_execute", unlock_the_first, once=True)
            await session.execute(update(Author).where(Author.id == 1).values(name="two"))

    assert backend.unlocked.is_set()
    assert cache.stats.locks == 2
    assert cache.stats.locks_lost == 0


@pytest.mark.sqlalchemy_2_1  # sessions have execution options since then
@pytest.mark.filterwarnings("ignore::asynccache.AsyncCacheWarning")
async def test_what_a_get_says_is_told_to_listeners(engine: AsyncEngine, cache: Cache) -> None:
    options = {"populate_existing": True}
    told: list[object] = []

    def listen(context: ORMExecuteState) -> None:
        told.append(context.execution_options["populate_existing"])

    async with AsyncCachedSession(engine, cache=cache, execution_options=options) as session:
        event.listen(session.sync_session, "do_orm_execute", listen)
        await session.get(Author, 1, populate_existing=False)

    assert told == [False]


@pytest.mark.sqlalchemy_2_1  # sessions have execution options since then
async def test_a_session_whose_options_say_not_to_flush_does_not(engine: AsyncEngine, cache: Cache) -> None:
    async with AsyncCachedSession(engine, cache=cache, execution_options={"autoflush": False}) as session:
        session.add(author := Author(id=1, name="pending"))
        assert await session.get(Author, 1) is None
        assert author in session.new
