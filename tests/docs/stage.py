"""What the code of a page may take for granted: an application with airports, in a database and a cache of its own."""

from __future__ import annotations

import ast
import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from doctest import ELLIPSIS, OutputChecker
from pathlib import Path
from types import CodeType
from typing import Any

import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import asynccache
from asynccache import AsyncCachedSession, Cache
from tests.docs.pages import ROOT, Block

IMPORTS = {
    sqlalchemy: ["bindparam", "func", "insert", "select", "text", "update"],
    sqlalchemy.ext.asyncio: ["AsyncSession", "async_sessionmaker", "create_async_engine"],
    sqlalchemy.orm: ["DeclarativeBase", "Mapped", "mapped_column"],
    asynccache: asynccache.__all__,
}
"""What a reader imports without being told, in pages that show a few lines."""


@asynccontextmanager
async def airports(url: str) -> AsyncGenerator[dict[str, Any]]:
    """The names that the code of a page begins with: imports, and the application around it.

    `Base` has no models yet: a page may map its own. `Airport` is of another.
    """

    class Base(DeclarativeBase):
        pass

    class Mine(DeclarativeBase):
        pass

    class Airport(Mine):
        __tablename__ = "airport"

        code: Mapped[str] = mapped_column(primary_key=True)
        name: Mapped[str]

    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Mine.metadata.create_all)
        await connection.exec_driver_sql("INSERT INTO airport VALUES ('EDDF', 'Frankfurt'), ('EGLL', 'Heathrow')")
    async with Cache("memory://") as cache:
        cache.register(Airport)
        names: dict[str, Any] = {name: getattr(module, name) for module, all_ in IMPORTS.items() for name in all_}
        names |= {"__name__": "page", "asyncio": asyncio, "Base": Base, "Airport": Airport, "engine": engine}
        names |= {"cache": cache, "Session": async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)}
        yield names
        if names["cache"] is not None:
            await names["cache"].aclose()
    await engine.dispose()


async def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block as a program would that has an event loop: it may await."""
    lines = "\n" * block.line + block.text  # so that a traceback leads to the page
    code: CodeType = compile(lines, str(block.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    result = eval(code, names)  # noqa: S307
    if result is not None:  # it awaits
        await result


class Folder:
    """A folder in which a page's files are written and its commands typed, one after the other.

    instead: what stands in the page -> what is there in truth.
    """

    def __init__(self, path: Path, instead: dict[str, str]) -> None:
        self._path = path
        self._instead = instead
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(path)]),
            "PYTHONDONTWRITEBYTECODE": "1",  # a file that is written twice in a second is not taken for its first form
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }

    def write(self, block: Block) -> None:
        assert block.title is not None
        file = self._path / block.title
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text)

    def type(self, block: Block) -> None:
        """Type each line that begins with `$`, and compare what it prints with the lines that follow."""
        for command, expected in session_of(block.text):
            for written, true in self._instead.items():
                command = command.replace(written, true)  # noqa: PLW2901
            if command.startswith("pip "):
                continue  # the tests have what it would install
            if command.startswith("export "):
                name, _, value = command.removeprefix("export ").partition("=")
                self._environment[name] = value
                continue
            done = subprocess.run(
                ["sh", "-c", command],
                check=False,
                capture_output=True,
                text=True,
                cwd=self._path,
                env=self._environment,
            )
            assert done.returncode == 0, f"{block.where}: {command}\n{done.stdout}{done.stderr}"
            same = OutputChecker().check_output(expected, done.stdout, ELLIPSIS)
            assert same, f"{block.where}: {command} printed\n{done.stdout}and not\n{expected}"


def session_of(text: str) -> Sequence[tuple[str, str]]:
    """The commands of a terminal session, each with what it printed."""
    commands: list[tuple[str, str]] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            commands.append((line[2:].strip(), ""))
        else:
            command, printed = commands[-1]
            commands[-1] = (command, printed + line)
    return commands
