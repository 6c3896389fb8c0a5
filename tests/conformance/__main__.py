"""Run SQLAlchemy's own tests with its sessions and with ours, and compare: `nox -s conformance`.

The exit status is 1 if a test ends otherwise with our sessions and nothing explains it, or if the library logged an
error meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import sqlalchemy
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.conformance.explained import reason_for
from tests.conformance.sessions import Mode

PROJECT: Final = Path(__file__).parents[2]

TESTS: Final = (
    "ext/asyncio",
    "ext/test_horizontal_shard.py",
    "ext/test_mutable.py",
    "orm/dml",
    "orm/inheritance",
    "orm/test_bind.py",
    "orm/test_cascade.py",
    "orm/test_composites.py",
    "orm/test_deferred.py",
    "orm/test_events.py",
    "orm/test_expire.py",
    "orm/test_lazy_relations.py",
    "orm/test_merge.py",
    "orm/test_naturalpks.py",
    "orm/test_query.py::GetTest",
    "orm/test_session.py",
    "orm/test_transaction.py",
    "orm/test_unitofwork.py",
    "orm/test_unitofworkv2.py",
    "orm/test_versioning.py",
)
"""What sessions, transactions, the unit of work and loading promise, under SQLAlchemy's `test/`."""

OWN_OPTIONS: Final = "-q --tb=short --maxfail=0 -p warnings -p logging --strict-markers -p no:cacheprovider"
"""Instead of SQLAlchemy's own, which stop at the 250th failure and name each test."""

OURS: Final = "-p no:asyncio -p no:timeout -p no:xdist"
"""Plugins that our own tests need, and that these know nothing of."""


@dataclass(frozen=True, slots=True)
class Run:
    """How the tests ended in one mode, by test, and what the cache did."""

    mode: Mode
    outcomes: Mapping[str, str]
    errors: Mapping[str, str]
    counts: Counter[str]
    logged: Mapping[str, Sequence[str]]

    @property
    def passed(self) -> int:
        return sum(outcome == "passed" for outcome in self.outcomes.values())

    def differences(self, base: Run) -> Mapping[str, str]:
        """Tests that end otherwise than in the base run, and how."""
        return {
            test: f"{before} before, {self.outcomes.get(test, 'not run')} now"
            for test, before in base.outcomes.items()
            if self.outcomes.get(test) != before
        }


class RunFailedError(Exception):
    """Raised when SQLAlchemy's tests could not be run at all."""


def run(source: Path, mode: Mode, tests: Sequence[str]) -> Run:
    """Run tests in a copy of their own, since some leave databases behind in their folder."""
    with TemporaryDirectory() as folder:
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        outcomes = root / "outcomes.json"
        done = subprocess.run(
            [
                # -s: the SQLAlchemy that is installed, not the one in the source's own folder
                *(sys.executable, "-s", "-m", "pytest", "-o", f"addopts={OWN_OPTIONS}", *OURS.split()),
                # On an asyncio driver SQLAlchemy runs all tests in a greenlet and an event loop, which a cache needs.
                *("-p", "tests.conformance.plugin", "--db", "aiosqlite", "--sessions", mode),
                *("--outcomes", str(outcomes), *(f"test/{test}" for test in tests)),
            ],
            check=False,  # 1 says that tests have failed
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode not in (0, 1):
            raise RunFailedError(f"{mode}: pytest ended with {done.returncode}:\n{done.stdout[-4000:]}")
        found = json.loads(outcomes.read_text())
    return Run(mode, found["outcomes"], found["errors"], Counter(found["counts"]), found["logged"])


def table_of(runs: Sequence[Run]) -> Table:
    table = Table(title=f"The tests of SQLAlchemy {sqlalchemy.__version__}")
    headings = ("sessions", "passed", "failed", "skipped", "hits", "misses", "fills", "forced", "locks", "locks lost")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "sessions" else "right")
    for each in runs:
        ends, counts = Counter(each.outcomes.values()), each.counts
        numbers = [ends["passed"], ends["failed"], ends["skipped"], counts["hits"] + counts["negative_hits"]]
        numbers += [counts[name] for name in ("misses", "fills", "forced", "locks", "locks_lost")]
        table.add_row(each.mode, *(f"{number:,}" for number in numbers))
    return table


def verdict(console: Console, base: Run, other: Run, *, verbose: bool) -> int:
    """Show what differs; how much of it is not explained."""
    unexplained = 0
    for test, how in other.differences(base).items():
        reason = reason_for(test, other.mode)
        console.print(f"[{'yellow' if reason else 'red'}]{other.mode}: {escape(test)}: {how}[/]")
        console.print(f"    {reason or 'not explained'}", highlight=False)
        if verbose or not reason:
            unexplained += not reason
            console.print(escape(other.errors.get(test, "")), highlight=False)
    shown: set[str] = set()
    for test, messages in other.logged.items():
        unexplained += 1
        console.print(f"[red]{other.mode}: {escape(test)}: logged[/]")
        for message in dict.fromkeys(messages):
            if message not in shown:  # many tests may show the same mistake
                shown.add(message)
                console.print(escape(message), highlight=False)
    return unexplained


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.conformance", description=__doc__)
    parser.add_argument("source", type=Path, help="SQLAlchemy's source distribution, of the version that is installed")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="below `test/`")
    parser.add_argument("--modes", nargs="+", type=Mode, choices=[Mode.SWAPPED, Mode.FORCED], default=[*Mode][1:])
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--verbose", action="store_true", help="show the errors of explained differences, too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    if sqlalchemy.__version__ not in options.source.name:
        console.print(f"{options.source} is not of SQLAlchemy {sqlalchemy.__version__}, which is installed")
        return 2
    with ThreadPoolExecutor(options.processes) as pool:
        runs = [pool.submit(run, options.source, mode, options.tests) for mode in (Mode.BASE, *options.modes)]
        for each in as_completed(runs):
            ended = each.result()
            console.print(f"{ended.mode}: {ended.passed:,} of {len(ended.outcomes):,} passed")
    base, *others = (each.result() for each in runs)
    unexplained = sum(verdict(console, base, each, verbose=options.verbose) for each in others)
    console.print(table_of([base, *others]))
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
