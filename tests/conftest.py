"""Fixtures: servers that run for the whole session, and an empty database and cache for each test; and who runs alone.

Servers are owned by plain functions, so that they outlive the event loop of each test. With pytest-xdist every worker
has servers of its own.
"""

from __future__ import annotations

import fcntl
import functools
import os
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import MetaData, create_mock_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from asynccache import AsyncCachedSession, Cache
from tests.models import Base, Secret
from tests.servers import Memcached, Postgres
from tests.servers.process import in_memory


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is of the other version of SQLAlchemy. Nothing else is ever left out or skipped.

    What runs alone comes last: while it runs, the other workers have nothing else to do anyway.
    """
    other = "sqlalchemy_2_1" if sqlalchemy.__version__.startswith("2.0.") else "sqlalchemy_2_0"
    left_out = [item for item in items if item.get_closest_marker(other)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    items.sort(key=is_alone)


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-timeout begins to count
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test marked `alone` while no other worker of pytest-xdist runs one, and the others at once."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    assert item.config.inipath is not None
    with item.config.inipath.open() as workers:  # any file that all of them see
        fcntl.flock(workers, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        return (yield)


# Servers, one each for the session.


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def memcached() -> Iterator[Memcached]:
    with Memcached() as server:
        yield server


# Databases and caches, empty for each test.


@pytest.fixture
def sqlite_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="asynccache-sqlite-", dir=in_memory()) as folder:
        yield f"sqlite+aiosqlite:///{folder}/test.db"


@pytest.fixture(scope="session")
def postgres_with_tables(postgres: Postgres) -> str:
    """A database to copy: that takes a quarter of the time of creating the tables again."""
    url = postgres.create_database()
    postgres.execute(ddl(url), url)
    return url


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[str]:
    """An empty database, or for the fixture `engine` one with all tables."""
    with_tables = "engine" in request.fixturenames
    url = postgres.create_database(request.getfixturevalue("postgres_with_tables") if with_tables else None)
    yield url
    postgres.drop_database(url)


@pytest.fixture
def memcached_server(memcached: Memcached) -> Iterator[Memcached]:
    """The session's memcached, emptied, for a test that stops, pauses or restarts it."""
    memcached.revive()
    yield memcached
    memcached.revive()


@pytest.fixture
def memcached_url(memcached_server: Memcached) -> str:
    return memcached_server.url


# The same test, on everything.


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue({"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]))


@pytest.fixture(params=["memory", "memcached"])
def cache_url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    # It is to answer, however busy the machine is; tests of time-outs set their own.
    return f"{request.getfixturevalue('memcached_url')}?timeout=5"


# Sessions, on SQLite and in memory. A test that also asks for `database_url` or `cache_url` runs on each of them.


@functools.cache
def ddl(url: str, metadata: MetaData = Base.metadata) -> str:
    """Give the SQL that creates all tables in the database of this URL."""
    statements: list[str] = []
    dialect = make_url(url).get_dialect()()
    mock = create_mock_engine(url, lambda each, *_, **__: statements.append(str(each.compile(dialect=dialect))))
    metadata.create_all(mock, checkfirst=False)
    return ";".join(statements)


@pytest.fixture
async def engine(request: pytest.FixtureRequest, sqlite_url: str) -> AsyncIterator[AsyncEngine]:
    url = request.getfixturevalue("database_url") if "database_url" in request.fixturenames else sqlite_url
    if url == sqlite_url:
        with closing(sqlite3.connect(str(make_url(url).database))) as connection:
            connection.executescript(ddl("sqlite+aiosqlite://"))
    engine = create_async_engine(url)
    yield engine
    await engine.dispose()


@pytest.fixture
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[Cache]:
    url = request.getfixturevalue("cache_url") if "cache_url" in request.fixturenames else "memory://"
    async with Cache(url, lease_ttl=30) as cache:  # the longest, so that a busy machine's slow SELECT is stored, too
        cache.register(Base)
        cache.exclude(Secret)
        yield cache


Sessions = async_sessionmaker[AsyncCachedSession]


@contextmanager
def listening(target: Any, name: str, listener: Any) -> Generator[None]:
    """Have SQLAlchemy tell a listener meanwhile."""
    event.listen(target, name, listener)
    yield
    event.remove(target, name, listener)


@pytest.fixture
def sessions(engine: AsyncEngine, cache: Cache) -> Sessions:
    return async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)


@pytest.fixture
def plain(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Sessions that know nothing of the cache."""
    return async_sessionmaker(engine)


class Statements(list[str]):
    """The SQL that was executed, in order."""

    def selects(self) -> list[str]:
        return [each for each in self if each.startswith("SELECT")]


@pytest.fixture
def statements(engine: AsyncEngine) -> Statements:
    executed = Statements()

    def record(connection: Any, cursor: Any, sql: str, *rest: Any) -> None:
        executed.append(sql)

    event.listen(engine.sync_engine, "before_cursor_execute", record)
    return executed
