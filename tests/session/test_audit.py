"""`Cache.audit`: what the cache would serve, against what the database holds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import delete, insert, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from asynccache import AsyncCachedSession, Cache, ConfigurationError, Mismatch, NotRegisteredError
from tests.conftest import Sessions, Statements
from tests.gates import GatedBackend, a_read
from tests.models import Author, Secret, Stock
from tests.session.conftest import on_both
from tests.session.slots import name_of

Plain = async_sessionmaker[AsyncSession]


async def audit(cache: Cache, sessions: Sessions, **arguments: Any) -> list[Mismatch]:
    async with sessions() as session:
        found = [mismatch async for mismatch in cache.audit(session, Author, **arguments)]
    return sorted(found, key=lambda mismatch: mismatch.primary_key)


@pytest.fixture
async def authors(sessions: Sessions, cache: Cache) -> None:
    """Authors 1 to 5 are in the database, 1 to 4 of them and the absence of 6 in the cache."""
    async with sessions.begin() as session:
        session.add_all([Author(id=id_, name="Ann") for id_ in range(1, 6)])
    await cache.drain()
    for id_ in (1, 2, 3, 4, 6):
        await name_of(sessions, id_)
    await cache.drain()


@on_both
async def test_what_others_have_changed_is_found_and_what_they_have_not_is_not(
    sessions: Sessions, cache: Cache, plain: Plain, authors: None
) -> None:
    assert await audit(cache, sessions) == []
    async with plain.begin() as session:
        await session.execute(update(Author).where(Author.id.in_([2, 5])).values(name="Eve"))
        await session.execute(insert(Author).values(id=6, name="Zoe"))
    differs, exists = Mismatch(Author, (2,), "differs", ("name",)), Mismatch(Author, (6,), "exists")
    assert await audit(cache, sessions) == await audit(cache, sessions, sample=None) == [differs, exists]
    assert cache.stats.audit_mismatches == 4
    assert cache.stats.audited == 5 + 6 + 6
    assert cache.stats.hits == 0, "an audit serves nobody"

    for mismatch in (differs, exists):
        await cache.invalidate(mismatch.model, mismatch.primary_key)
    assert await audit(cache, sessions) == []


async def test_rows_that_were_deleted_are_found_by_their_keys(
    sessions: Sessions, cache: Cache, plain: Plain, authors: None
) -> None:
    async with plain.begin() as session:
        await session.execute(delete(Author).where(Author.id == 3))
    assert await audit(cache, sessions) == [], "the database has no such key to begin with"
    assert await audit(cache, sessions, pks=range(1, 1000), rows_per_second=1e6) == [Mismatch(Author, (3,), "is gone")]
    assert cache.stats.audited == 4 + 999


async def test_a_row_is_compared_while_its_key_is_still_there(
    sessions: Sessions, cache: Cache, plain: Plain, engine: AsyncEngine, authors: None
) -> None:
    """It is deleted between the look at the database's keys and the look at its rows."""
    backend = GatedBackend.before(cache)
    gate = backend.hold(a_read)
    auditing = asyncio.create_task(audit(cache, sessions))
    await gate.reached.wait()
    async with plain.begin() as session:
        await session.execute(delete(Author).where(Author.id == 3))
    gate.open()
    assert await auditing == [Mismatch(Author, (3,), "is gone")]


async def test_a_commit_in_between_is_no_mismatch(
    sessions: Sessions, cache: Cache, plain: Plain, authors: None
) -> None:
    """The cache is read; a session of ours commits; the database is read, and differs from what was read before."""
    backend = GatedBackend.before(cache)
    answered, go_on = asyncio.Event(), asyncio.Event()
    get_many = backend.get_many

    async def read_then_wait(keys: Any) -> Any:
        found = await get_many(keys)
        if not answered.is_set():
            answered.set()
            await go_on.wait()
        return found

    backend.get_many = read_then_wait  # type: ignore[method-assign]
    auditing = asyncio.create_task(audit(cache, sessions))
    await answered.wait()
    async with sessions.begin() as session:
        (await session.get_one(Author, 2)).name = "Eve"
    await cache.drain()
    assert await name_of(sessions, 2) == "Eve"
    go_on.set()
    assert await auditing == []


async def test_a_sample_is_as_large_as_it_says_and_every_row_comes_once(
    sessions: Sessions, cache: Cache, plain: Plain, statements: Statements
) -> None:
    async with sessions.begin() as session:
        session.add_all([Author(id=id_, name="Ann") for id_ in range(1, 251)])
    await cache.drain()
    await audit(cache, sessions, sample=120, rows_per_second=1e6)
    assert cache.stats.audited == 120
    await audit(cache, sessions, sample=None, rows_per_second=1e6)
    assert cache.stats.audited == 120 + 250


async def test_it_goes_no_faster_than_it_may(sessions: Sessions, cache: Cache, authors: None) -> None:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    await audit(cache, sessions, rows_per_second=10)
    assert loop.time() - began_s > 5 / 10 * 0.9


async def test_composite_keys_are_walked_in_order(sessions: Sessions, cache: Cache, engine: AsyncEngine) -> None:
    async with sessions.begin() as session:
        session.add_all([Stock(shop=shop, isbn=str(isbn), copies=1) for shop in range(15) for isbn in range(15)])
    await cache.drain()
    async with sessions() as session:
        assert [each async for each in cache.audit(session, Stock, sample=None, rows_per_second=1e6)] == []
    assert cache.stats.audited == 225


async def test_what_cannot_be_audited_is_named(sessions: Sessions, cache: Cache, engine: AsyncEngine) -> None:
    async with sessions() as session:
        with pytest.raises(NotRegisteredError, match="Secret is not cached"):
            await anext(cache.audit(session, Secret))
        with pytest.raises(ConfigurationError, match="sample"):
            await anext(cache.audit(session, Author, sample=0))
        with pytest.raises(ConfigurationError, match="rows_per_second"):
            await anext(cache.audit(session, Author, rows_per_second=0))
    async with engine.connect() as connection, AsyncCachedSession(connection, cache=cache) as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(ConfigurationError, match="engine"):
            await anext(cache.audit(session, Author))
