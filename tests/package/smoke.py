"""The wheel, installed where nothing else is, does its work: `python -I smoke.py EXTRAS`. `nox -s package` runs it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import asynccache
from asynccache import AsyncCachedSession, Cache, cached_get

cache = Cache("memory://")


@cache.register
class Base(DeclarativeBase):
    pass


class Airport(Base):
    __tablename__ = "airport"

    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


async def main(folder: str) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{folder}/airports.db")
    statements: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
    async with cache:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with sessions.begin() as session:
            session.add(Airport(code="EDDF", name="Frankfurt"))
        for name, selects in (("Frankfurt", 1), ("Frankfurt", 0)):
            statements.clear()
            async with sessions() as session:
                airport = await cached_get(session, Airport, "EDDF")
            check(airport is not None and airport.name == name, f"the row is {airport and airport.name!r}")
            check(len(statements) == selects, f"{statements} instead of {selects} statements")
        async with sessions.begin() as session:
            (await session.get_one(Airport, "EDDF")).name = "Rhein-Main"
        async with sessions() as session:
            check((await session.get_one(Airport, "EDDF")).name == "Rhein-Main", "an old row was served")
    await engine.dispose()


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-m", "asynccache", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def check(so: bool, otherwise: str) -> None:
    if not so:
        sys.exit(otherwise)


if __name__ == "__main__":
    check("site-packages" in asynccache.__file__, f"{asynccache.__file__} is not what was installed")
    check(Path(str(files("asynccache") / "py.typed")).is_file(), "py.typed is missing")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))
    answer = command_line("--help")
    if "cli" in sys.argv[1].split(","):
        check(answer.returncode == 0 and "check" in answer.stdout, f"no help: {answer}")
        check(command_line("check", "memory://").returncode == 0, "check does not work")
    else:
        check(answer.returncode == 2 and "sqlalchemy-asynccache[cli]" in answer.stderr, f"no way out: {answer}")
    print(f"sqlalchemy-asynccache {version('sqlalchemy-asynccache')} with [{sys.argv[1]}]: works")  # noqa: T201
