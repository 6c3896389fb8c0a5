"""Old and new code side by side: two programs whose models differ share a database and a cache.

Each program is a process of its own that does what it is told, line by line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers import Memcached

ROOT = Path(__file__).parents[2]

PROGRAM = """
import asyncio, json, sys
from sqlalchemy import update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from asynccache import AsyncCachedSession, Cache

database, server, is_new = sys.argv[1], sys.argv[2], sys.argv[3] == "new"
cache = Cache(server)


@cache.register
class Base(DeclarativeBase):
    pass


class Person(Base):
    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    if is_new:
        email: Mapped[str | None]


async def get(sessions, name=None, by="session"):
    async with sessions() as session:
        person = await session.get(Person, 1)
        return None if person is None else [person.name, getattr(person, "email", "no such column")]


async def write(sessions, name, by="session"):
    async with sessions.begin() as session:
        if by == "session":
            person = await session.get(Person, 1)
            if person is None:
                session.add(Person(id=1, name=name))
            else:
                person.name = name
        elif by == "key":
            await session.execute(update(Person).where(Person.id == 1).values(name=name))
        else:
            await session.execute(update(Person).values(name=name))


async def main():
    engine = create_async_engine(database)
    sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
    for line in iter(sys.stdin.readline, ""):
        do, *arguments = json.loads(line)
        hits, garbage = cache.stats.hits, cache.stats.garbage
        answer = await {"get": get, "write": write}[do](sessions, *arguments)
        await cache.drain()
        print(json.dumps([answer, cache.stats.hits - hits, cache.stats.garbage - garbage]), flush=True)
    await engine.dispose()
    await cache.aclose()


sys.stdin.reconfigure(line_buffering=True)
asyncio.run(main())
"""


class Program:
    """One of the two, while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _ask(self, *question: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def get(self) -> tuple[Any, int, int]:
        """What it gets, how many hits that was, and how often it found what it cannot read."""
        answer, hits, garbage = self._ask("get")
        return answer, hits, garbage

    def write(self, name: str, by: str) -> None:
        self._ask("write", name, by)


@contextmanager
def running(database: str, server: str, version: str) -> Generator[Program]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, database, server, version]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield Program(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.fixture
async def database(postgres_url: str) -> str:
    """As the new code wants it, and the old one does not mind."""
    engine = create_async_engine(postgres_url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE person (id serial PRIMARY KEY, name text NOT NULL, email text)"))
        await connection.execute(text("INSERT INTO person (name, email) VALUES ('Ann', 'ann@example.com')"))
    await engine.dispose()
    return postgres_url


@pytest.mark.parametrize("by", ["session", "key", "table"])
def test_in_a_rolling_deployment_each_invalidates_what_the_other_reads(
    by: str, database: str, memcached_server: Memcached
) -> None:
    url = f"{memcached_server.url}?timeout=5"
    with running(database, url, "old") as old, running(database, url, "new") as new:
        assert old.get() == (["Ann", "no such column"], 0, 0)
        assert old.get() == (["Ann", "no such column"], 1, 0)
        assert new.get() == (["Ann", "ann@example.com"], 0, 1), "not the old one's row, which lacks a column"
        assert new.get() == (["Ann", "ann@example.com"], 1, 0)
        old.write("Eve", by)
        assert new.get() == (["Eve", "ann@example.com"], 0, 0)
        assert new.get() == (["Eve", "ann@example.com"], 1, 0)
        new.write("Eva", by)
        assert old.get() == (["Eva", "no such column"], 0, 0)
        assert old.get() == (["Eva", "no such column"], 1, 0)


async def test_a_row_that_is_not_there_yet_is_there_for_both_once_either_has_inserted_it(
    database: str, memcached_server: Memcached
) -> None:
    engine = create_async_engine(database)
    async with engine.begin() as connection:
        await connection.execute(text("DELETE FROM person"))
    await engine.dispose()
    url = f"{memcached_server.url}?timeout=5"
    with running(database, url, "old") as old, running(database, url, "new") as new:
        assert (old.get()[0], new.get()[0]) == (None, None)
        old.write("Zoe", "session")
        assert (old.get()[0], new.get()[0]) == (["Zoe", "no such column"], ["Zoe", None])


async def test_after_a_column_was_dropped_and_the_code_was_replaced_no_old_row_is_read(
    database: str, memcached_server: Memcached
) -> None:
    url = f"{memcached_server.url}?timeout=5"
    with running(database, url, "new") as before:
        assert before.get() == (["Ann", "ann@example.com"], 0, 0)
        assert before.get() == (["Ann", "ann@example.com"], 1, 0)
    engine = create_async_engine(database)
    async with engine.begin() as connection:  # by a program that knows nothing of the cache
        await connection.execute(text("ALTER TABLE person DROP COLUMN email"))
        await connection.execute(text("UPDATE person SET name = 'Eve'"))
    await engine.dispose()
    with running(database, url, "old") as after:
        assert after.get() == (["Eve", "no such column"], 0, 1)
        assert after.get() == (["Eve", "no such column"], 1, 0)
