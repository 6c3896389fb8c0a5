"""What a cached get is: the counts of I/O, and that everything else is as SQLAlchemy has it."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from asynccache import Cache, MemcachedBackend, cached_get, cached_get_many
from tests.conftest import Sessions, Statements
from tests.models import Author

pytestmark = pytest.mark.usefixtures("database_url", "cache_url")


async def test_a_second_session_reads_from_the_cache(sessions: Sessions, cache: Cache, statements: Statements) -> None:
    async with sessions.begin() as session:
        session.add(Author(id=1, name="Ann"))
    await cache.drain()
    statements.clear()

    async with sessions() as session:
        first = await session.get(Author, 1)
        assert first is not None and first.name == "Ann"
    await cache.drain()
    assert len(statements) == 1

    async with sessions() as session:
        second = await session.get(Author, 1)
        assert second is not None and second.name == "Ann" and second is not first
    assert len(statements) == 1
    assert (cache.stats.misses, cache.stats.loads, cache.stats.fills, cache.stats.hits) == (1, 1, 1, 1)
