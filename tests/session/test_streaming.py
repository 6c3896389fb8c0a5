"""SQLite reads from a snapshot as long as a result is being streamed on the connection."""

from __future__ import annotations

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from asynccache import Cache
from tests.conftest import Sessions
from tests.models import Author


@pytest.fixture
async def authors(engine: AsyncEngine, sessions: Sessions) -> None:
    async with engine.connect() as connection:
        await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    async with sessions.begin() as session:
        session.add_all(Author(id=id_, name="old") for id_ in range(1, 1_001))


@pytest.mark.usefixtures("authors")
async def test_a_row_read_while_streaming_is_not_stored(sessions: Sessions, cache: Cache) -> None:
    """
    1. A session begins to stream, and with that a snapshot.
    2. Another commits.
    3. The first misses a row, takes a lease after the commit, and reads the old row from its snapshot.
    """
    async with sessions() as reader:
        streamed = await reader.stream(select(Author.id).execution_options(yield_per=10))
        assert await streamed.fetchone() == (1,)
        async with sessions.begin() as writer:
            await writer.execute(update(Author).where(Author.id == 1).values(name="new"))
        await cache.drain()

        author = await reader.get(Author, 1)
        assert author is not None
        assert author.name == "old"
        await streamed.close()
    await cache.drain()

    async with sessions() as session:
        author = await session.get(Author, 1)
        assert author is not None
        assert author.name == "new"
