"""Instances that the end of a transaction has expired: a get refreshes them from the cache, as SQLAlchemy does from the
database. Those that were expired on request, or hold what is to be kept, are SQLAlchemy's to refresh.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import delete, event, inspect, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import selectinload
from sqlalchemy.orm.exc import StaleDataError

from asynccache import AsyncCachedSession, Cache, cached_get_many
from tests.conftest import Sessions, Statements
from tests.models import Author, Book, Editor, Note, Printer, Size, Tag, book
from tests.session.conftest import Commands, on_both

Plain = async_sessionmaker[AsyncSession]


@pytest.fixture(autouse=True)
async def rows(plain: Plain, sessions: Sessions, cache: Cache) -> None:
    """In the database and in the cache."""
    async with plain.begin() as session:
        session.add_all(
            [Author(id=1, name="Ann"), book(1), Editor(id=1, name="Eve", language="en"), Note(title="dear")]
        )
    async with sessions() as session:
        for model in (Author, Book, Editor, Note):
            assert await session.get(model, 1) is not None
    await cache.drain()


async def rename_past_the_cache(plain: Plain, name: str = "Eve") -> None:
    """Who reads this name has read the database; who reads the old one, the cache."""
    async with plain.begin() as session:
        await session.execute(update(Author).where(Author.id == 1).values(name=name))


@pytest.mark.parametrize("end", ["commit", "rollback"])
@on_both
async def test_a_get_refreshes_it_from_the_cache(
    end: str, sessions: Sessions, statements: Statements, commands: Commands, cache: Cache
) -> None:
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        await getattr(session, end)()
        assert inspect(author).expired
        commands.clear()
        assert await session.get(Author, 1) is author
        state = inspect(author)
        assert (state.expired, state.modified, state.unloaded) == (False, False, {"books"})
        assert author.name == "Ann"
        assert await session.get(Author, 1) is author
        assert (statements, commands) == ([], ["get_many"])
        assert session.in_transaction()
        author.name = "Eve"
        await session.commit()
        assert len([each for each in statements if each.startswith("UPDATE")]) == 1
    assert cache.stats.hits == 2


async def test_what_was_changed_is_loaded_and_stored_once(
    sessions: Sessions, statements: Statements, cache: Cache
) -> None:
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        author.name = "Eve"
        await session.commit()
        await cache.drain()  # its lock is gone
        statements.clear()
        for _ in range(2):
            assert await session.get(Author, 1) is author
            assert author.name == "Eve"
            await cache.drain()
            await session.commit()
    assert len(statements) == 1


async def test_many_are_refreshed_in_one_read(
    sessions: Sessions, statements: Statements, commands: Commands, plain: Plain
) -> None:
    async with plain.begin() as session:
        session.add_all([Author(id=i, name=f"author {i}") for i in range(2, 11)])
    async with sessions() as session:
        held = await cached_get_many(session, Author, range(1, 11))
        await session.commit()
        statements.clear()
        commands.clear()
        found = await cached_get_many(session, Author, range(1, 12))
        assert [found[pk] is held[pk] for pk in range(1, 11)] == [True] * 10
        assert [each.name for each in found.values() if each is not None][:2] == ["Ann", "author 2"]
        assert found[11] is None
    assert commands[0] == "get_many"
    assert len(statements) <= 1, "those that were not there yet, and were not stored in time"


async def test_a_lazy_many_to_one_refreshes_it(sessions: Sessions, statements: Statements, cache: Cache) -> None:
    async with sessions() as session:
        one = await session.get_one(Book, 1)
        one.author_id = 1
        await session.commit()
    await cache.drain()
    async with sessions() as session:
        author, one = await session.get_one(Author, 1), await session.get_one(Book, 1)
        await session.commit()
        await cache.drain()
        assert await session.get(Book, 1) is one
        statements.clear()
        assert await one.awaitable_attrs.author is author
        assert author.name == "Ann"
    assert statements == []


async def test_mutable_values_composites_versions_and_expressions(sessions: Sessions, statements: Statements) -> None:
    async with sessions() as session:
        one = await session.get_one(Book, 1)
        await session.commit()
        assert await session.get(Book, 1) is one
        assert (one.size, one.girth, one.version, one.notes) == (Size(130, 200), 330, 1, {"k": 1})
        assert statements == []
        one.notes["k"] = 2  # of which the instance hears
        assert one in session.dirty
        await session.commit()
        assert "version" in next(each for each in statements if each.startswith("UPDATE"))


async def test_an_old_version_from_the_cache_is_refused_as_ever(sessions: Sessions, plain: Plain) -> None:
    async with sessions() as session:
        one = await session.get_one(Book, 1)
        await session.commit()
        async with plain.begin() as other:
            await other.execute(update(Book).values(version=7))
        assert await session.get(Book, 1) is one
        one.title = "changed"
        with pytest.raises(StaleDataError):
            await session.commit()


@pytest.mark.parametrize("model", [Author, Book, Editor, Note])
@pytest.mark.parametrize("cached", [True, False])
async def test_events_fire_as_ever(model: type[Any], cached: bool, sessions: Sessions, cache: Cache) -> None:
    heard: list[tuple[str, object]] = []
    async with sessions() as session:
        instance = await session.get_one(model, 1)
        cache.reading = cached
        event.listen(model, "refresh", lambda _, _context, names: heard.append(("refresh", set(names or ()))))
        event.listen(model, "load", lambda *_: heard.append(("load", None)))
        await session.commit()
        assert await session.get(model, 1) is instance
    columns = {each.key for each in inspect(model).column_attrs if not each.deferred}
    assert len(heard) == 1
    name, names = heard[0]
    assert name == "refresh"
    assert isinstance(names, set)
    assert columns <= names


async def test_within_run_sync(sessions: Sessions, statements: Statements) -> None:
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        await session.commit()
        assert await session.run_sync(lambda sync: sync.get(Author, 1)) is author
        assert author.name == "Ann"
    assert statements == []


# ------------------------------------------------------------------------------------------------------- the database's

Make = Callable[[AsyncCachedSession, Author], Awaitable[None]]


async def expire(session: AsyncCachedSession, author: Author) -> None:
    session.expire(author)


async def expire_all(session: AsyncCachedSession, _author: Author) -> None:
    session.expire_all()


async def commit_and_expire(session: AsyncCachedSession, author: Author) -> None:
    await session.commit()
    session.expire(author)


async def write_and_roll_back_to_a_savepoint(session: AsyncCachedSession, author: Author) -> None:
    savepoint = await session.begin_nested()
    author.name = "mine"
    await session.flush()
    await savepoint.rollback()


@pytest.mark.parametrize("make", [expire, expire_all, commit_and_expire, write_and_roll_back_to_a_savepoint])
async def test_it_is_refreshed_from_the_database(make: Make, sessions: Sessions, plain: Plain) -> None:
    await rename_past_the_cache(plain)
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        assert author.name == "Ann"
        await make(session, author)
        assert await session.get(Author, 1) is author
        assert author.name == "Eve"


async def test_what_was_assigned_since_stays(sessions: Sessions, statements: Statements) -> None:
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        await session.commit()
        author.name = "mine"
        with session.no_autoflush:
            assert await session.get(Author, 1) is author
        assert (author.id, author.name) == (1, "mine")
        assert author in session.dirty
        assert await session.get(Author, 1) is author
        assert (author.id, author.name) == (1, "mine")
    assert [each.split()[0] for each in statements] == ["SELECT"]


async def test_a_request_to_expire_ends_with_the_transaction(sessions: Sessions, plain: Plain) -> None:
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        session.expire(author)
        await session.commit()
        await rename_past_the_cache(plain)
        assert await session.get(Author, 1) is author
        assert author.name == "Ann"


async def test_without_expire_on_commit_it_was_on_request(engine: AsyncEngine, cache: Cache, plain: Plain) -> None:
    async with AsyncCachedSession(engine, cache=cache, expire_on_commit=False) as session:
        author = await session.get_one(Author, 1)
        session.expire(author)
        await session.commit()
        await rename_past_the_cache(plain)
        assert await session.get(Author, 1) is author
        assert author.name == "Eve"


async def test_one_that_was_loaded_with_options_is_loaded_with_them_again(
    sessions: Sessions, plain: Plain, statements: Statements
) -> None:
    async with sessions() as session:
        query = select(Author).options(selectinload(Author.books))
        author = (await session.scalars(query)).one()
        await session.commit()
        await rename_past_the_cache(plain)
        assert await session.get(Author, 1) is author
        assert (author.name, author.books) == ("Eve", [])


@pytest.mark.parametrize("cached", [True, False])
async def test_one_whose_row_is_gone_is_gone(
    cached: bool, sessions: Sessions, plain: Plain, cache: Cache, engine: AsyncEngine
) -> None:
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        await session.commit()
        async with plain.begin() as other:
            await other.execute(delete(Author))
        await cache.invalidate(Author, 1, scope=engine)
        if cached:
            async with sessions() as other:
                assert await other.get(Author, 1) is None
            await cache.drain()
        assert await session.get(Author, 1) is None
        assert author not in session
        assert (await cached_get_many(session, Author, [1])) == {1: None}


async def test_own_writes_are_seen(sessions: Sessions) -> None:
    async with sessions() as session:
        author = await session.get_one(Author, 1)
        await session.commit()
        await session.execute(update(Author).values(name="mine").execution_options(synchronize_session=False))
        assert await session.get(Author, 1) is author
        assert author.name == "mine"


async def test_another_class_under_the_same_key_is_none_of_its_business(sessions: Sessions) -> None:
    async with sessions() as session:
        editor = await session.get_one(Editor, 1)
        session.add(Tag(id=1, name="tag"))
        await session.commit()
        assert await session.get(Tag, 1) is not None
        assert await session.get(Editor, 1) is editor


@on_both
async def test_a_get_of_another_class_is_none_and_refreshes_nothing(sessions: Sessions, statements: Statements) -> None:
    async with sessions() as session:
        editor = await session.get_one(Editor, 1)
        await session.commit()
        assert await session.get(Printer, 1) is None
        assert await cached_get_many(session, Printer, [1]) == {1: None}
        assert await session.get(Editor, 1) is editor
        assert editor.language == "en"
