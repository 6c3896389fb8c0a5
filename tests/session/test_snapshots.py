"""SQLite reads from a snapshot while a savepoint is open, and while a result is streamed. The isolation level does not
tell; and a row that is read from an old snapshot must not be stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from asynccache import Cache
from tests.conftest import Sessions
from tests.models import Author


@pytest.fixture
async def authors(engine: AsyncEngine, sessions: Sessions) -> None:
    async with engine.connect() as connection:
        await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    async with sessions.begin() as session:
        session.add_all(Author(id=id_, name="old") for id_ in range(1, 1_001))


@asynccontextmanager
async def a_stream(session: AsyncSession) -> AsyncGenerator[None]:
    streamed = await session.stream(select(Author.id).execution_options(yield_per=10))
    assert await streamed.fetchone() == (1,)
    yield
    await streamed.close()


@asynccontextmanager
async def a_savepoint(session: AsyncSession) -> AsyncGenerator[None]:
    async with session.begin_nested():
        assert await session.scalar(select(Author.name).where(Author.id == 2)) == "old"
        yield


@asynccontextmanager
async def a_begin(session: AsyncSession) -> AsyncGenerator[None]:
    await session.execute(text("BEGIN"))
    assert await session.scalar(select(Author.name).where(Author.id == 2)) == "old"
    yield


@pytest.mark.usefixtures("authors")
@pytest.mark.parametrize("snapshot", [a_stream, a_savepoint, a_begin])
async def test_a_row_that_is_read_from_a_snapshot_is_not_stored(
    sessions: Sessions, cache: Cache, snapshot: Callable[[AsyncSession], AbstractAsyncContextManager[None]]
) -> None:
    """
    1. A session begins to read from a snapshot.
    2. Another commits.
    3. The first misses a row, takes a lease after the commit, and reads the old row.
    """
    async with sessions() as reader, snapshot(reader):
        async with sessions.begin() as writer:
            await writer.execute(update(Author).where(Author.id == 1).values(name="new"))
        await cache.drain()

        author = await reader.get(Author, 1)
        assert author is not None
        assert author.name == "old"
    await cache.drain()

    async with sessions() as session:
        author = await session.get(Author, 1)
        assert author is not None
        assert author.name == "new"
