"""Fixtures for tests of sessions: what lies in the slots, and a slow way to the same database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from asynccache import AsyncCachedSession, Cache
from tests.conftest import Sessions
from tests.servers import FaultProxy, Postgres
from tests.session.slots import Slots

Test = TypeVar("Test", bound=Callable[..., Awaitable[None]])


def on_both(test: Test) -> Test:
    """Run a test on SQLite and in memory, and on PostgreSQL and memcached, where all four pairs would show no more."""
    pairs = [("sqlite", "memory"), ("postgresql", "memcached")]
    marked = pytest.mark.usefixtures("database_url", "cache_url")(test)
    both: Test = pytest.mark.parametrize(("database_url", "cache_url"), pairs, indirect=True)(marked)
    return both


class Commands(list[str]):
    """What the backend was asked, in order: "get_many" and "apply"."""


@pytest.fixture
def commands(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Commands:
    asked, backend = Commands(), cache._store.backend

    def counted(command: str, method: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def count(argument: Any) -> Any:
            asked.append(command)
            return method(argument)

        return count

    reads = "get_many_now" if hasattr(backend, "get_many_now") else "get_many"
    for command, name in (("get_many", reads), ("apply", "apply")):
        monkeypatch.setattr(backend, name, counted(command, getattr(backend, name)))
    return asked


@pytest.fixture
def slots(cache: Cache, engine: AsyncEngine) -> Slots:
    return Slots(cache, engine)


@pytest.fixture
async def proxy(postgres: Postgres) -> AsyncIterator[FaultProxy]:
    """Stands before PostgreSQL, for `proxied_sessions` alone."""
    async with FaultProxy((postgres.host, postgres.port)) as proxy:
        yield proxy


@pytest.fixture
async def proxied_sessions(postgres_url: str, proxy: FaultProxy, cache: Cache) -> AsyncIterator[Sessions]:
    """Sessions on the same database and cache as `sessions`, which reach PostgreSQL through the proxy."""
    engine = create_async_engine(make_url(postgres_url).set(port=proxy.port))
    yield async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
    await engine.dispose()
