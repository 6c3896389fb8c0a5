"""asynccache against SQLAlchemy alone and against the other ways to cache rows, on real servers of its own.

Run it by `nox -s bench`, or `python -m benchmarks` in the root of the project. All contenders do the same work on the
same rows; in a round they take turns, so that ratios compare what ran under the same conditions. Tables give medians
over the rounds and, behind them, the middle half.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import logging
import sys
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from sqlalchemy.exc import SAWarning

from benchmarks.claims import Claims, claims_of
from benchmarks.commits import version_of
from benchmarks.figures import Figures
from benchmarks.report import Report, print_tables, write_docs
from benchmarks.server import Server
from benchmarks.shop import fill, own_rows
from benchmarks.stage import FULL, QUICK, Effort, Stage, on
from benchmarks.table import conditions, memcached_version
from benchmarks.workloads import committing, crowd, fleet, herd, hits, many, misses, size, web
from tests.servers import Memcached, Postgres

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = ROOT / "docs" / "benchmarks.md"
FOLDER: Final = ROOT / "docs" / "benchmarks"

WORKLOADS: Final[Mapping[str, Callable[[Stage], Awaitable[None]]]] = {
    "hits": hits.run,
    "many": many.run,
    "misses": misses.run,
    "crowd": crowd.run,
    "herd": herd.run,
    "fleet": fleet.run,
    "commits": committing.run,
    "size": size.run,
    "web": web.run,
}
PACKAGES: Final = (
    *("sqlalchemy", "asyncpg", "aiosqlite", "aiomcache", "dogpile.cache", "pymemcache", "aiocache", "cashews"),
    *("advanced-alchemy", "sqlacache", "uvicorn", "starlette"),
)


async def measure(
    postgres: Postgres, memcached: Memcached, only: list[str], effort: Effort, tell: Callable[[str], None]
) -> Report:
    server = Server(memcached.host, memcached.port)
    claims: dict[str, Claims] = {}
    with tempfile.TemporaryDirectory(prefix="asynccache-bench-") as folder:
        sqlite_url = f"sqlite+aiosqlite:///{folder}/shop.sqlite"
        tell("filling the databases")
        await fill(postgres.url)
        await fill(sqlite_url)
        async with on(postgres.url, server) as (engine, field):
            stage = Stage(
                effort,
                Figures(),
                postgres_url=postgres.url,
                commits_url=postgres.create_database(),
                sqlite_url=sqlite_url,
                server=server,
                engine=engine,
                field=field,
                tell=tell,
            )
            if "claims" in only:
                for number, contender in enumerate(field.contenders):
                    claims[contender.name] = await claims_of(stage, contender, own_rows(number)[-10:])
            for name, run in WORKLOADS.items():
                if name in only:
                    await run(stage)
    versions = [f"{name} {_version(name)}" for name in PACKAGES if _version(name)]
    under = conditions(
        *versions,
        f"{await version_of(postgres.url)} without fsync and memcached {memcached_version(memcached)} "
        f"on the same machine over loopback; {effort.rounds} interleaved rounds.",
    )
    return Report(under, stage.figures, claims, field.absent)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> int:
    parts = ["claims", *WORKLOADS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="so short that the figures mean little")
    parser.add_argument("--only", choices=parts, action="append", metavar="NAME", help=f"one of {', '.join(parts)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, take these rounds")
    parser.add_argument("--write-docs", action="store_true", help="write tables and pictures into docs/")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a bar is missed")
    arguments = parser.parse_args()
    if arguments.write_docs and (arguments.only or arguments.quick):
        parser.error("--write-docs wants a whole run: without --only and --quick")
    # What the others warn of is theirs: SQLite has no decimals; sqlacache's probe fails on SQLAlchemy 2.1.
    warnings.simplefilter("ignore", SAWarning)
    logging.getLogger("sqlacache").setLevel(logging.ERROR)
    if arguments.from_json:
        report = Report.from_json(arguments.from_json.read_text())
    else:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with (
            Progress(*columns, console=Console(stderr=True), transient=True) as progress,
            Postgres() as postgres,
            Memcached() as memcached,
        ):
            task = progress.add_task("starting")
            effort = QUICK if arguments.quick else FULL
            report = asyncio.run(
                measure(
                    postgres,
                    memcached,
                    arguments.only or parts,
                    effort,
                    lambda doing: progress.update(task, description=doing),
                )
            )
    print_tables(report)
    if arguments.json:
        arguments.json.write_text(report.to_json())
    if arguments.write_docs:
        from benchmarks.plots import draw  # noqa: PLC0415 (the only one that wants matplotlib)

        draw(report.figures, FOLDER)
        (FOLDER / "results.json").write_text(report.to_json())
        write_docs(report, PAGE, FOLDER)
    return int(arguments.strict and not all(bar.holds for bar in report.bars))


if __name__ == "__main__":
    sys.exit(main())
