"""What the README and the documents show is true: their code runs, and their links lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asynccache import AsyncCachedSession, Cache
from tests.models import Author

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def code_of(page: Path) -> CodeType:
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    code: CodeType = compile(block, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    return code


async def test_the_code_of_the_first_screen_runs(sqlite_url: str) -> None:
    class Base(DeclarativeBase):
        pass

    engine = create_async_engine(sqlite_url)
    async with engine.begin() as connection:
        await connection.exec_driver_sql("CREATE TABLE airport (code VARCHAR PRIMARY KEY, name VARCHAR NOT NULL)")
        await connection.exec_driver_sql("INSERT INTO airport VALUES ('EDDF', 'Frankfurt')")
    names: dict[str, Any] = {
        "Base": Base,
        "Mapped": Mapped,
        "async_sessionmaker": async_sessionmaker,
        "engine": engine,
        "mapped_column": mapped_column,
        "__name__": __name__,
    }
    await eval(code_of(ROOT / "README.md"), names)  # noqa: S307

    async with names["Session"]() as session:
        assert (await session.scalars(select(names["Airport"].name))).all() == ["Rhein-Main"]
        assert (await session.get(names["Airport"], "EDDF")).name == "Rhein-Main"
    await names["cache"].aclose()
    await engine.dispose()


async def test_the_code_of_the_audit_runs(
    sessions: async_sessionmaker[AsyncCachedSession], cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    async with sessions.begin() as session:
        session.add(Author(id=1, name="old"))
    await cache.drain()
    async with sessions() as session:
        await session.get(Author, 1)
    await cache.drain()
    async with AsyncSession(sessions.kw["bind"]) as session:
        await session.execute(update(Author).values(name="new"))
        await session.commit()
    for printed in (f"{Author} (1,) differs ('name',)\n", ""):
        names: dict[str, Any] = {"Session": sessions, "cache": cache, "Airport": Author}
        await eval(code_of(ROOT / "docs" / "guarantees.md"), names)  # noqa: S307
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
