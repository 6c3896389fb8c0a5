"""`python -m asynccache`: what operators and scripts see."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from asynccache.backends import report
from asynccache.cli import app
from tests.servers import Memcached

pytestmark = pytest.mark.without_sqlalchemy

ROOT = Path(__file__).parent.parent
PATIENT = "?timeout=20"


@pytest.fixture(autouse=True)
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be: how long an answer takes is not what these tests are about."""
    monkeypatch.setattr(report, "ROUND_TRIP_S_MAX", 20.0)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def protected() -> Iterator[Memcached]:
    """A server with nothing to complain about."""
    with Memcached("-o", "temporary_ttl=25") as server:
        yield server


def steady(output: str) -> str:
    """Output without what is never the same."""
    for pattern, instead in ((r"in \d+\.\d ms", "in 0.3 ms"), (r"up for \d+ (s|min)", "up for 3 s")):
        output = re.sub(pattern, instead, output)
    return re.sub(r"\d of 1,\d+\n", "1 of 1,004\n", re.sub(r"1\.\d+\.\d+,", "1.6.18,", output))


def test_the_exit_status_tells_scripts_what_came_out(protected: Memcached) -> None:
    def status(*arguments: str) -> int:
        command = [sys.executable, "-m", "asynccache", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, check=False, capture_output=True, env=environment, timeout=50).returncode

    with Memcached("-C") as disabled:
        assert status("check", protected.url + PATIENT) == 0
        assert status("check", protected.url + PATIENT, disabled.url + PATIENT) == 1
        assert status("check", "memcached://") == 2


def test_a_server_in_good_order_is_a_line_a_topic(protected: Memcached) -> None:
    result = run("check", protected.url + PATIENT)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (
        steady(result.stdout)
        == f"""\
{protected.host}:{protected.port}: usable
  reachable      ok       yes, in 0.3 ms
  version        ok       1.6.18, up for 3 s
  cas            ok       enabled
  locks          ok       not evicted: they live at most 21 s, and temporary_ttl is 25 s
  item size      ok       up to 1 MiB
  memory         ok       0 bytes of 64 MiB used
  evictions      ok       none
  connections    ok       1 of 1,004
"""
    )


def test_what_to_do_stands_below_what_was_found_however_long_it_is(memcached: Memcached) -> None:
    result = run("check", memcached.url + PATIENT)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{memcached.host}:{memcached.port}: usable, 1 warning\n")
    assert (
        """
  locks          warning  may be evicted: temporary_ttl is not set
                          start memcached with -o temporary_ttl=25, so that locks, which live at most 21 s, are not evicted
"""  # noqa: E501
        in result.stdout
    )


def test_all_servers_of_all_urls_are_shown_and_one_that_is_down_counts(protected: Memcached) -> None:
    with Memcached() as other:
        other.stop()
        url = f"memcached://{protected.host}:{protected.port},{other.host}:{other.port}{PATIENT}"
        result = run("check", url, "memory://")
    headlines = [line for line in result.stdout.splitlines() if line and not line.startswith(" ")]
    assert headlines == [
        f"{protected.host}:{protected.port}: usable",
        f"{other.host}:{other.port}: CANNOT BE USED",
        "the memory of this process: usable",
    ]
    assert result.exit_code == 1
    other.start()
    try:
        assert run("check", url, "memory://").exit_code == 0
    finally:
        other.stop()


def test_servers_that_say_nothing_take_one_timeout_together() -> None:
    with Memcached() as one, Memcached() as two:
        one.pause()
        two.pause()
        began_s = time.monotonic()
        bounds = "?connect_timeout=2&timeout=2"
        result = run("check", one.url + bounds, two.url + bounds)
        assert 2 <= time.monotonic() - began_s < 3.9
    assert result.exit_code == 1
    assert result.stdout.count("no answer in time") == 2


def test_lock_ttl_is_the_applications(protected: Memcached) -> None:
    assert "usable\n" in run("check", "--lock-ttl", "12", protected.url + PATIENT).stdout
    assert "temporary_ttl=30" in run("check", "--lock-ttl", "13", protected.url + PATIENT).stdout
    assert run("check", "--lock-ttl", "0.5", protected.url + PATIENT).exit_code == 0


def test_json_has_everything_for_machines(memcached: Memcached) -> None:
    result = run("check", "--json", memcached.url + PATIENT, "memcached+unix:///nowhere")
    assert result.exit_code == 1
    up, down = json.loads(result.stdout)
    assert (up["node"], up["usable"], up["temporary_ttl_s"], up["locks_protected"]) == (
        f"{memcached.host}:{memcached.port}",
        True,
        0,
        False,
    )
    assert [finding["topic"] for finding in up["findings"] if finding["level"] == "warning"] == ["locks"]
    assert (down["node"], down["usable"], down["reachable"], down["version"]) == ("/nowhere", False, False, None)
    assert "No such file" in down["error"]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://host", "'redis://host' is no cache; use memory://, memcached://host:port"),
        ("memcached://host:0", "bad memcached URL 'memcached://host:0'"),
        ("memcached://host?color=red", "parameter 'color' is not one of"),
        ("127.0.0.1:11211", "'127.0.0.1:11211' is no cache"),
    ],
)
def test_a_bad_url_is_told_and_nothing_is_asked(url: str, told: str, protected: Memcached) -> None:
    result = run("check", protected.url, url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("scheme", ["memcached", "redis"])
def test_a_password_is_never_shown(scheme: str) -> None:
    result = run("check", f"{scheme}://name:secret@host:0")
    assert result.exit_code == 2
    assert "***@host" in result.output
    assert "secret" not in result.output


@pytest.mark.parametrize("login", ["ann:wrong@", ""], ids=["wrong password", "no password"])
def test_a_server_that_lets_nobody_in_cannot_be_used(login: str) -> None:
    with Memcached(users={"ann": "secret"}) as server:
        right = run("check", f"memcached://ann:secret@{server.host}:{server.port}{PATIENT}")
        refused = run("check", f"memcached://{login}{server.host}:{server.port}{PATIENT}")
    assert right.exit_code == 0
    assert refused.exit_code == 1
    assert "CANNOT BE USED" in refused.output
    assert "password" in refused.output
    assert "wrong" not in refused.output
    assert "secret" not in right.output


def test_a_time_that_makes_no_sense_is_told() -> None:
    result = run("check", "--lock-ttl", "-1", "memory://")
    assert result.exit_code == 2
    assert "lock_ttl must be more than 0 seconds, not -1.0" in result.stderr


def test_help_is_given_for_each_command() -> None:
    assert "check" in run("--help").stdout
    for command in ("check", "audit", "inspect"):
        assert "exit status" in run(command, "--help").stdout
    assert "nothing is decrypted" in run("inspect", "--help").stdout


def test_without_typer_it_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "asynccache", "check", "memory://"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=50)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "The command line needs typer: pip install 'sqlalchemy-asynccache[cli]'\n"


# audit

SHOP = """
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from asynccache import Cache

class Base(DeclarativeBase): pass

class Product(Base):
    __tablename__ = "product"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]

cache = Cache("{url}?timeout=20")
cache.register(Base)
engine = create_async_engine("sqlite+aiosqlite:///{database}")
"""

FILL = """
import asyncio, sys
import shop
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker
from asynccache import AsyncCachedSession

async def main():
    sessions = async_sessionmaker(shop.engine, class_=AsyncCachedSession, cache=shop.cache)
    async with shop.engine.begin() as connection:
        await connection.run_sync(shop.Base.metadata.create_all)
    async with shop.cache:
        async with sessions.begin() as session:
            session.add_all([shop.Product(id=id_, name="old") for id_ in (1, 2)])
        await shop.cache.drain()
        for id_ in (1, 2):
            async with sessions() as session:
                await session.get(shop.Product, id_)
        await shop.cache.drain()
    if "change" in sys.argv:
        async with shop.engine.begin() as connection:
            await connection.execute(text("UPDATE product SET name = 'new' WHERE id = 2"))
    await shop.engine.dispose()

asyncio.run(main())
"""


@pytest.mark.parametrize("change", [False, True], ids=["in order", "changed behind its back"])
def test_an_audit_prints_a_line_for_each_row_that_is_wrong(
    tmp_path: Path, memcached_server: Memcached, *, change: bool
) -> None:
    (tmp_path / "shop.py").write_text(SHOP.format(url=memcached_server.url, database=tmp_path / "shop.db"))
    (tmp_path / "fill.py").write_text(FILL)

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=50,
        )

    filled = python("fill.py", *(["change"] if change else []))
    assert filled.returncode == 0, filled.stderr
    names = ["shop:Product", "--cache", "shop:cache", "--engine", "shop:engine"]
    audited = python("-m", "asynccache", "audit", *names)
    assert audited.stderr == ""
    expected = ["differs   Product (2,)  name"] if change else []
    assert audited.stdout.splitlines() == [*expected, f"2 rows looked at, {len(expected)} found wrong"]
    assert audited.returncode == len(expected)


def test_an_inspection_shows_a_row_in_words_and_exits_by_whether_it_is_served(
    tmp_path: Path, memcached_server: Memcached, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.py").write_text(SHOP.format(url=memcached_server.url, database=tmp_path / "shop.db"))
    (tmp_path / "fill.py").write_text(FILL)
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "fill.py"], env=environment, check=True, timeout=50)

    def inspect(*key: str) -> Result:
        sys.modules.pop("shop", None)  # a command has a process of its own, and closes the cache
        names = ["shop:Product", "--cache", "shop:cache", "--engine", "shop:engine"]
        return run("inspect", *names, *key)

    found = inspect("2")
    assert (found.exit_code, found.stderr) == (0, "")
    assert (
        re.sub("[0-9a-f]{16,24}", "…", found.stdout)
        == f"""\
Product (2,): served
  verdict        the row
  database       {tmp_path / "shop.db"}
  node           {memcached_server.host}:{memcached_server.port}
  row            a row, of generation …
                 {key_of(found.stdout, "product:2")}
  generation     open, of generation …
                 {key_of(found.stdout, "product#")}
  schema         …, that of this application
  id             2
  name           'old'
"""
    )
    plain = json.loads(inspect("2", "--json").stdout)
    assert (plain["model"], plain["primary_key"], plain["served"]) == ("Product", [2], True)
    assert plain["columns"] == {"id": 2, "name": "old"}
    assert plain["row"]["nonce"] == plain["generation"]["nonce"]
    for typed, key in ((["3"], 3), (["--", "-3"], -3)):
        absent = inspect(*typed)
        assert (absent.exit_code, absent.stderr) == (1, "")
        assert absent.stdout.startswith(f"Product ({key},): NOT SERVED\n")
    for wrong, told in ((["two"], "'two' is no int"), (["2", "3"], "Incorrect number of values in identifier")):
        refused = inspect(*wrong)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert told in refused.stderr
    sys.modules.pop("shop", None)


def key_of(output: str, part: str) -> str:
    (key,) = [line.strip() for line in output.splitlines() if part in line]
    return key


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["nowhere:Model", "--cache", "tests.test_cli:app", "--engine", "x:y"], "is no Cache"),
        (["nowhere:Model", "--cache", "no_module:cache", "--engine", "x:y"], "'no_module:cache' leads nowhere"),
        (["nowhere:Model", "--cache", "no_colon", "--engine", "x:y"], "'no_colon' leads nowhere"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(names: list[str], told: str) -> None:
    result = run("audit", *names)
    assert (result.exit_code, told in result.output) == (2, True)
