"""The examples run, and what they show is so.

How the applications of `examples/airports` behave on real servers is shown by `tests/applications`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.applications.client import Client
from tests.applications.serving import SERVERS, Program

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("database", "cache"), [("sqlite_url", "memory://"), ("postgres_url", "memcached_url")], ids=["smallest", "servers"]
)
def test_quickstart_shows_only_what_is_so(database: str, cache: str, request: pytest.FixtureRequest) -> None:
    few = ["--tasks", "8", "--gets", "400", "--herd", "200"]
    urls = ["--database", request.getfixturevalue(database)]
    urls += ["--cache", cache if "://" in cache else request.getfixturevalue(cache)]
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *urls, *few]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "NO" not in done.stdout
    assert done.stdout.count("\nyes ") == 4


def on_smallest(line: str, database_url: str) -> Program:
    return Program(line, database_url=database_url, cache_url="memory://")


@pytest.fixture(scope="module")
def airports(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with some airports, and its URL."""
    url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('airports')}/airports.db"
    with on_smallest("airports.load IS", url) as program:
        assert program.process.wait() == 0, program.process.log()
    return url


@pytest.mark.parametrize("server", ["fastapi-uvicorn", "litestar-uvicorn", "aiohttp"])
async def test_each_application_runs_with_nothing_but_a_file_and_memory(server: str, airports: str) -> None:
    with on_smallest(SERVERS[server], airports) as program:
        await asyncio.to_thread(program.wait_until_served)
        async with Client(program.url) as client:
            await client.rename("BIKF", server)
            await client.until_hit("/airports/BIKF")
            review = await client.add_review("BIKF", stars=4)
            assert (await client.review(review))["airport"]["name"] == server
        assert program.troubles == []


@pytest.mark.parametrize("framework", ["fastapi", "litestar", "aiohttp"])
def test_an_application_has_less_than_80_lines(framework: str) -> None:
    assert len((ROOT / "examples" / "airports" / f"app_{framework}.py").read_text().splitlines()) < 80
