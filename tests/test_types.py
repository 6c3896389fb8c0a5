"""What a type checker tells users: this module is read by mypy and pyright, and run so that it stays true."""

from __future__ import annotations

from typing import assert_type

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from asynccache import (
    AsyncCachedSession,
    Cache,
    ConfigurationError,
    cached_get,
    cached_get_by,
    cached_get_many,
    cached_prefetch,
)
from tests.conftest import Sessions
from tests.models import Author, Base, Book, Stock, book


async def test_a_get_gives_the_model_or_none(sessions: Sessions) -> None:
    async with sessions() as session:
        assert_type(session, AsyncCachedSession)
        assert_type(await session.get(Author, 1), Author | None)
        assert_type(await cached_get(session, Author, 1), Author | None)


async def test_a_get_of_one_gives_the_model(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        session.add(Author(id=1, name="Ann"))
    async with sessions() as session:
        assert_type(await session.get_one(Author, 1), Author)


async def test_many_are_found_by_what_was_given(sessions: Sessions) -> None:
    async with sessions() as session:
        assert_type(await cached_get_many(session, Author, [1, 2]), dict[int, Author | None])
        found = await cached_get_many(session, Stock, [(1, "a"), (2, "b")])
        assert_type(found, dict[tuple[int, str], Stock | None])


async def test_a_row_by_a_secondary_key_is_the_model_or_none(sessions: Sessions) -> None:
    async with sessions() as session:
        with pytest.raises(ConfigurationError):  # which Author has none of
            assert_type(await cached_get_by(session, Author, name="Ann"), Author | None)


async def test_what_is_prefetched_has_the_relationship_s_type(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        session.add_all([Author(id=1, name="Ann"), book(1, author_id=1)])
    async with sessions() as session:
        found = await session.get_one(Book, 1)
        assert_type(await cached_prefetch(session, [found], Book.author), list[Author])
        assert found.author is not None


async def test_a_select_has_the_type_that_sqlalchemy_gives_it(sessions: Sessions) -> None:
    async with sessions() as session:
        assert_type((await session.scalars(select(Author))).one_or_none(), Author | None)


async def test_code_that_annotates_an_async_session_may_use_the_functions(sessions: Sessions) -> None:
    async def in_a_service(session: AsyncSession) -> Author | None:
        return await cached_get(session, Author, 1)

    async with sessions() as session:
        assert await in_a_service(session) is None


def test_a_sessionmaker_knows_its_sessions(cache: Cache) -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
    assert_type(sessions, async_sessionmaker[AsyncCachedSession])
    assert_type(sessions(), AsyncCachedSession)


def test_registering_keeps_the_type_of_a_model(cache: Cache) -> None:
    assert_type(cache.register(Author), type[Author])
    assert_type(cache.register(ttl=35)(Author), type[Author])
    assert_type(cache.register(Base, ttl=35), type[Base])
