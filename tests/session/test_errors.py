"""Every mistake is answered with what is wrong and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

import asynccache
from asynccache import (
    AsyncCachedSession,
    AsyncCacheError,
    Cache,
    CachedSession,
    ConfigurationError,
    NotRegisteredError,
    cached_get,
    cached_get_many,
    cached_invalidate,
)
from tests.conftest import Sessions
from tests.models import Author, Base, Secret, Stock

# ------------------------------------------------------------------------------------------------------- making a cache


@pytest.mark.parametrize(
    "url", ["", "memory", "memory://here", "redis://localhost", "memcache://localhost", "http://a"]
)
def test_an_unknown_url(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"use memory://, memcached://host:port") as caught:
        Cache(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize("url", ["memcached://", "memcached://host:port", "memcached://a/b", "memcached://a?timeut=1"])
def test_a_memcached_url_that_says_nothing(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"bad memcached URL.*Give memcached://host:port") as caught:
        Cache(url)
    assert repr(url) in str(caught.value)


NO_TIMES = [0, -1, -0.5, "5", None, True, math.nan, math.inf, timedelta(0), timedelta(seconds=-1)]
TIMES = ["ttl", "negative_ttl", "lease_ttl", "lease_timeout", "lock_ttl", "lock_timeout", "flight_timeout"]


@pytest.mark.parametrize("value", NO_TIMES, ids=repr)
@pytest.mark.parametrize("name", TIMES)
def test_a_time_that_is_not_positive(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name} must be .*seconds.*, not ") as caught:
        Cache("memory://", **{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [each for each in NO_TIMES if each is not None], ids=repr)
@pytest.mark.parametrize("name", ["ttl", "negative_ttl"])
def test_a_models_time_that_is_not_positive(name: str, value: Any, cache: Cache) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name} must be .*seconds.*, not ") as caught:
        cache.register(Author, **{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buckets": 0}, "buckets must be at least 1, not 0"),
        ({"buckets": -3}, "buckets must be at least 1, not -3"),
        ({"on_lock_failure": "ignore"}, 'on_lock_failure must be "commit" or "raise", not \'ignore\''),
        ({"ttl_jitter": 1}, "ttl_jitter must be at least 0 and below 1, not 1"),
        ({"ttl_jitter": -0.1}, "ttl_jitter must be at least 0 and below 1, not -0.1"),
        ({"hold_off": -1}, "hold_off must be 0 or more seconds, not -1"),
        ({"lock_ttl": 2, "lock_timeout": 1.5}, r"lock_timeout \(1.5 s\) must be at most half of lock_ttl \(2.0 s\)"),
    ],
)
def test_a_setting_that_makes_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Cache("memory://", **settings)


# --------------------------------------------------------------------------------------------------------------- models


def _register(cache: Cache, model: Any) -> None:
    cache.register(model)


def _exclude(cache: Cache, model: Any) -> None:
    cache.exclude(model)


@pytest.mark.parametrize("add", [_register, _exclude])
@pytest.mark.parametrize("model", [int, "Author", Author(id=1, name="Ann"), Author.__table__], ids=type)
def test_something_that_is_no_mapped_class(add: Callable[[Cache, Any], None], model: Any, cache: Cache) -> None:
    with pytest.raises(ConfigurationError, match="is not a mapped class; register a mapped class") as caught:
        add(cache, model)
    assert repr(model) in str(caught.value)


Ask = Callable[[AsyncSession, Any, Any], Any]


async def _get(session: AsyncSession, model: Any, pk: Any) -> None:
    await cached_get(session, model, pk)


async def _get_many(session: AsyncSession, model: Any, pk: Any) -> None:
    await cached_get_many(session, model, [pk])


async def _invalidate(session: AsyncSession, model: Any, pk: Any) -> None:
    cached_invalidate(session, model, pk)


async def _session_get(session: AsyncSession, model: Any, pk: Any) -> None:
    await session.get(model, pk)


async def _session_get_one(session: AsyncSession, model: Any, pk: Any) -> None:
    await session.get_one(model, pk)


FUNCTIONS = [_get, _get_many, _invalidate]


NOT_CACHED = pytest.mark.parametrize(
    ("model", "message"),
    [
        (Secret, r"^Secret is not cached; call cache\.register\(Secret\)"),
        (int, r"^int is not a mapped class; ask for one that was registered"),
        ("Author", r"^'Author' is not a mapped class; ask for one that was registered"),
        (Base, r"^Base is not a mapped class; ask for one that was registered"),
    ],
)


@NOT_CACHED
@pytest.mark.parametrize("ask", FUNCTIONS)
async def test_a_model_that_is_not_cached(ask: Ask, model: Any, message: str, sessions: Sessions) -> None:
    async with sessions() as session:
        with pytest.raises(NotRegisteredError, match=message):
            await ask(session, model, 1)


@NOT_CACHED
async def test_invalidating_a_model_that_is_not_cached(
    model: Any, message: str, cache: Cache, engine: AsyncEngine
) -> None:
    for invalidation in (cache.invalidate(model, 1, scope=engine), cache.invalidate_all(model, scope=engine)):
        with pytest.raises(NotRegisteredError, match=message):
            await invalidation


async def test_invalidating_before_any_database_is_known(cache: Cache) -> None:
    for invalidation in (cache.invalidate(Author, 1), cache.invalidate_all(Author)):
        with pytest.raises(ConfigurationError, match=r"used no database.*scope=engine"):
            await invalidation


@pytest.mark.parametrize("ask", [*FUNCTIONS, _session_get, _session_get_one])
@pytest.mark.parametrize(
    ("model", "pk"), [(Author, (1, 2)), (Author, ()), (Stock, 1), (Stock, (1,)), (Stock, (1, "a", 2))], ids=repr
)
async def test_a_wrong_number_of_key_values_is_told_in_sqlalchemys_words(
    ask: Ask, model: Any, pk: Any, sessions: Sessions, plain: async_sessionmaker[AsyncSession]
) -> None:
    async with plain() as session:
        with pytest.raises(InvalidRequestError) as theirs:
            await session.get(model, pk)
    async with sessions() as session:
        with pytest.raises(InvalidRequestError) as ours:
            await ask(session, model, pk)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("ident", [{"shop": 1}, {"shop": 1, "isbn": "x", "shelf": 2}, {"shop": 1, "shelf": 2}], ids=str)
@pytest.mark.parametrize("ask", [_session_get, _get])
async def test_wrong_names_of_key_values_are_told_in_sqlalchemys_words(
    ask: Ask, ident: dict[str, object], sessions: Sessions, plain: async_sessionmaker[AsyncSession]
) -> None:
    async with plain() as session:
        with pytest.raises(InvalidRequestError) as theirs:
            await session.get(Stock, ident)
    async with sessions() as session:
        with pytest.raises(InvalidRequestError) as ours:
            await ask(session, Stock, ident)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("model", [int, "Author"])
async def test_a_get_of_something_that_is_not_mapped_is_told_in_sqlalchemys_words(
    model: Any, sessions: Sessions, plain: async_sessionmaker[AsyncSession]
) -> None:
    async with plain() as session:
        with pytest.raises(Exception, match=r".+") as theirs:
            await session.get(model, 1)
    async with sessions() as session:
        with pytest.raises(type(theirs.value)) as ours:
            await session.get(model, 1)
    assert str(ours.value) == str(theirs.value)


# ------------------------------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("ask", FUNCTIONS)
@pytest.mark.parametrize("make", [AsyncSession, AsyncCachedSession])
async def test_a_session_without_a_cache(ask: Ask, make: type[AsyncSession], engine: AsyncEngine, cache: Cache) -> None:
    async with make(engine) as session:
        with pytest.raises(
            ConfigurationError, match=r"has no cache; make it by .*class_=AsyncCachedSession, cache=cache"
        ):
            await ask(session, Author, 1)


async def test_a_session_class_that_cannot_tell_what_it_writes(engine: AsyncEngine, cache: Cache) -> None:
    """And the way out that the message gives."""

    class Audited(Session):
        commits = 0

        def commit(self) -> None:
            self.commits += 1
            super().commit()

    with pytest.raises(ConfigurationError, match=r"class MyAudited\(CachedSession, Audited\): .*MyAudited"):
        AsyncCachedSession(engine, cache=cache, sync_session_class=Audited)
    AsyncCachedSession(engine, sync_session_class=Audited)  # without a cache nobody asks

    class MyAudited(CachedSession, Audited): ...

    for _ in range(2):
        async with AsyncCachedSession(engine, cache=cache, sync_session_class=MyAudited) as session:
            if await session.get(Author, 1) is None:
                session.add(Author(id=1, name="Ann"))
            await session.commit()
            sync_session = session.sync_session
            assert isinstance(sync_session, MyAudited)
            assert sync_session.commits == 1
        await cache.drain()
    assert cache.stats.locks == 1


def test_all_errors_have_one_base() -> None:
    errors = [
        each
        for name, each in vars(asynccache).items()
        if isinstance(each, type) and issubclass(each, Exception) and name.endswith("Error")
    ]
    assert len(errors) > 5
    assert all(issubclass(each, AsyncCacheError) for each in errors)
