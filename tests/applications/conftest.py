"""Fixtures: two processes that serve the same application on PostgreSQL and memcached, and who asks them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import asyncpg
import pytest
from sqlalchemy import make_url

from tests.applications.client import Client
from tests.applications.serving import SERVERS, Program
from tests.servers import FaultProxy, Memcached, Postgres

COUNTRIES = ("IS", "AD", "BT", "GI", "KM", "LU", "MC", "MD", "MT", "SM", "VA", "WS")
"""Whose airports are in the database: enough of them, and loaded in no time."""


@dataclass(frozen=True)
class Stage:
    """What the programs of a test share.

    database_url, cache_url: as they take them.
    """

    postgres: Postgres
    database_url: str
    cache_url: str

    def program(self, line: str) -> Program:
        # Asked whether it speaks TLS and cancelled meanwhile, asyncpg leaves a future behind whose error nobody takes.
        return Program(line, database_url=f"{self.database_url}?ssl=disable", cache_url=self.cache_url)

    def run(self, line: str) -> str:
        """Run a program to its end and give what it wrote."""
        with self.program(line) as program:
            status = program.process.wait(30)
            written = program.process.log()
        assert status == 0, written
        return written

    async def fetch(self, sql: str, *arguments: object) -> list[asyncpg.Record]:
        """Ask the database, past everything."""
        async with self._connection() as connection:
            return await connection.fetch(sql, *arguments)

    @asynccontextmanager
    async def locked(self, table: str) -> AsyncGenerator[None]:
        """Have all who read a table wait."""
        async with self._connection() as connection, connection.transaction():
            await connection.execute(f"LOCK TABLE {table}")
            yield

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.database_url.replace("+asyncpg", ""))
        try:
            yield connection
        finally:
            await connection.close()


class Statements:
    """How many statements that begin so the database has executed since this was made, whoever sent them."""

    def __init__(self, stage: Stage, beginning: str) -> None:
        self._stage = stage
        self._beginning = beginning
        self._start = stage.postgres.log_bytes

    def __len__(self) -> int:
        executed = self._stage.postgres.statements(self._stage.database_url, self._start)
        return sum(each.startswith(self._beginning) for each in executed)


@pytest.fixture(scope="module")
def stage(postgres: Postgres, memcached: Memcached) -> Iterator[Stage]:
    """A database in which there are some airports, and an empty cache."""
    memcached.revive()
    url = postgres.create_database()
    stage = Stage(postgres, url, f"{memcached.url}?timeout=5")  # it is to answer, however busy the machine is
    stage.run(f"airports.load {' '.join(COUNTRIES)}")
    postgres.log_statements(url)
    yield stage
    postgres.drop_database(url)


# With `--dist=loadgroup` one worker of pytest-xdist runs all tests of a pair, and starts it once.
@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SERVERS])
def pair(request: pytest.FixtureRequest, stage: Stage) -> Iterator[tuple[Program, Program]]:
    """Two processes that serve the same application; at the end, they must have said nothing of trouble."""
    with ExitStack() as stack:
        one, other = (stack.enter_context(stage.program(SERVERS[request.param])) for _ in range(2))
        one.wait_until_served()
        other.wait_until_served()
        yield one, other
        assert (one.troubles, other.troubles) == ([], [])


@pytest.fixture
async def clients(pair: tuple[Program, Program]) -> AsyncIterator[tuple[Client, Client]]:
    """Who asks the two."""
    one, other = pair
    async with Client(one.url) as asks_one, Client(other.url) as asks_other:
        yield asks_one, asks_other


@dataclass(frozen=True)
class Wire:
    """What stands between a program and its servers."""

    database: FaultProxy
    cache: FaultProxy
    stage: Stage


@pytest.fixture
async def wire(stage: Stage, memcached_server: Memcached) -> AsyncIterator[Wire]:
    async with (
        FaultProxy((stage.postgres.host, stage.postgres.port)) as database,
        FaultProxy((memcached_server.host, memcached_server.port)) as cache,
    ):
        url = make_url(stage.database_url).set(port=database.port).render_as_string(hide_password=False)
        cache_url = f"memcached://{cache.host}:{cache.port}?timeout=5"
        yield Wire(database, cache, replace(stage, database_url=url, cache_url=cache_url))
