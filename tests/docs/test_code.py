"""The code that the pages show runs, and prints what they say.

The blocks of Python of a page are one program: each is run where the last one ended, with what `stage` has ready. A
block that has a title is a file; of a page with files, the terminal sessions are typed as well. A block that is taken
from a file of this repository is run by that file's own tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests.docs.pages import PAGES, ROOT, Block, blocks_of, name_of
from tests.docs.stage import Folder, airports, run
from tests.servers import Memcached


def code_of(page: Path) -> list[Block]:
    """The blocks that are run one after the other."""
    blocks = [block for block in blocks_of(page) if block.language == "python" and block.title is None]
    return [block for block in blocks if block.reason is None and block.source is None]


WITH_CODE = [page for page in PAGES if code_of(page)]
WITH_FILES = [page for page in PAGES if any(block.title for block in blocks_of(page))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pages find in the current folder."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("application")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "client.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "client.key")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
async def tenants_url(postgres_url: str) -> str:
    """A database with a schema for each of two tenants."""
    engine = create_async_engine(postgres_url)
    async with engine.begin() as connection:
        for tenant, name in (("north", "Nordholz"), ("south", "Memmingen")):
            await connection.execute(text(f"CREATE SCHEMA {tenant}"))
            await connection.execute(text(f"CREATE TABLE {tenant}.airport (code VARCHAR PRIMARY KEY, name VARCHAR)"))
            await connection.execute(text(f"INSERT INTO {tenant}.airport VALUES ('EDDF', '{name}')"))
    await engine.dispose()
    return postgres_url


@pytest.fixture
def database(page: Path, request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue("tenants_url" if name_of(page) == "docs/tenants.md" else "sqlite_url")
    return url


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
@pytest.mark.usefixtures("folder")
async def test_the_code_of_a_page_runs(page: Path, database: str) -> None:
    async with airports(database) as names:
        for block in code_of(page):
            await run(block, names)


@pytest.mark.once
@pytest.mark.timeout(300)  # it starts Python once for each command
@pytest.mark.parametrize("page", WITH_FILES, ids=name_of)
def test_files_and_terminal_sessions_of_a_page_do_what_it_says(
    page: Path, tmp_path: Path, memcached_server: Memcached
) -> None:
    address = f"{memcached_server.host}:{memcached_server.port}"
    folder = Folder(tmp_path, {"127.0.0.1:11211": f"{address}?timeout=5"})
    typed = 0
    for block in blocks_of(page):
        if block.reason is not None:
            continue
        if block.title is not None:
            folder.write(block)
        elif block.language == "console":
            folder.type(block)
            typed += 1
    assert typed, "files that nobody uses"


def test_what_is_taken_from_a_file_stands_there_as_it_is() -> None:
    taken = [block for page in PAGES for block in blocks_of(page) if block.source is not None]
    assert [block.where for block in taken if block.text not in (ROOT / str(block.source)).read_text()] == []


def test_what_is_not_run_says_why() -> None:
    not_run = [block for page in PAGES for block in blocks_of(page) if block.reason is not None]
    assert [block.where for block in not_run if len(str(block.reason)) < 10 or block.language != "python"] == []


async def test_the_first_screen_changes_the_row_for_everybody(sqlite_url: str) -> None:
    async with airports(sqlite_url) as names:
        for block in code_of(ROOT / "README.md"):
            await run(block, names)
        async with names["Session"]() as session:
            assert (await session.scalars(select(names["Airport"].name))).all() == ["Rhein-Main", "Heathrow"]
            assert (await session.get(names["Airport"], "EDDF")).name == "Rhein-Main"
        assert names["cache"].stats.loads == 2, "one for each name"


async def test_the_audit_of_the_guarantees_finds_and_mends(sqlite_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with airports(sqlite_url) as names:
        airport = names["Airport"]
        async with names["Session"]() as session:
            await session.get(airport, "EDDF")
        async with AsyncSession(names["engine"]) as session:
            await session.execute(update(airport).where(airport.code == "EDDF").values(name="new"))
            await session.commit()
        for printed in (f"{airport} ('EDDF',) differs ('name',)\n", ""):
            for block in code_of(ROOT / "docs" / "guarantees.md"):
                await run(block, names)
            assert capsys.readouterr().out == printed


async def test_each_tenant_of_the_page_gets_its_own_row(tenants_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with airports(tenants_url) as names:
        for hits in (0, 2):
            await run(code_of(ROOT / "docs" / "tenants.md")[0], names)
            assert capsys.readouterr().out == "north Nordholz\nsouth Memmingen\n"
            await names["cache"].drain()
            assert names["cache"].stats.hits == hits
