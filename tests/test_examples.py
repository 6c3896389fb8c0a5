"""The examples run, and what they show is so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
