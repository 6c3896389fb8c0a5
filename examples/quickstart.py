"""All airports of the world, read by 64 tasks at once: first by plain sessions, then through the cache.

    python examples/quickstart.py
    python examples/quickstart.py --database postgresql+asyncpg://me@localhost/test --cache memcached://localhost

It needs `pip install sqlalchemy-asynccache[sqlite] rich airportsdata`, and for the second line also `[postgresql]`. The
database's table `airport` is replaced. Ends with status 1 if something that it shows is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import airportsdata
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asynccache import AsyncCachedSession, Cache, cached_get


class Base(DeclarativeBase):
    pass


class Airport(Base):
    __tablename__ = "airport"

    icao: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    city: Mapped[str]
    country: Mapped[str]
    elevation: Mapped[float]  # in feet
    lat: Mapped[float]
    lon: Mapped[float]
    tz: Mapped[str]


async def quickstart(engine: AsyncEngine, cache_url: str, tasks: int, gets: int, console: Console) -> bool:
    """Here is the library. Everything below this function only measures what it does."""
    async with Cache(cache_url) as cache:
        cache.register(Airport, ttl=300)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)

        codes = await load_airports(engine, sessions, console)
        selects = Selects(engine)

        async with sessions() as session:
            airport = await session.get(Airport, "EDDF")  # not in the cache yet: one SELECT
        async with sessions() as another_session:
            same = await cached_get(another_session, Airport, "EDDF")  # the same, for code that wants to be explicit
        assert airport and same
        console.print(f"EDDF is {airport.name}. Got twice in two sessions, with {selects.count} SELECT.\n")

        await measure(engine, sessions, cache, selects, zipf(codes, gets), tasks, console)
        facts = [
            await herd_makes_one_select(sessions, cache, selects),
            await commit_is_seen_at_once(sessions, tasks),
            await rollback_is_never_seen(sessions, tasks),
        ]
    for fact in facts:
        console.print("[green]yes[/]" if fact.holds else "[bold red]NO [/]", fact.evidence, highlight=False)
    return all(fact.holds for fact in facts)


Sessions = Callable[[], AsyncSession]


async def get(sessions: Sessions, icao: str) -> Airport | None:
    """What a web request does: open a session, get a row, close the session."""
    async with sessions() as session:
        return await session.get(Airport, icao)


async def load_airports(engine: AsyncEngine, sessions: Sessions, console: Console) -> list[str]:
    airports = list(airportsdata.load("ICAO").values())
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    # Through a session of ours: its commit also invalidates what an earlier run has left in memcached.
    with Progress(console=console) as progress:
        async with sessions() as session, session.begin():
            for start in progress.track(range(0, len(airports), 1000), description="Load "):
                await session.execute(insert(Airport), airports[start : start + 1000])
    return [airport["icao"] for airport in airports]


class Selects:
    """Counts the SELECTs that an engine executes."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.count = 0
        event.listen(engine.sync_engine, "before_cursor_execute", self._count)

    def _count(self, connection: Any, cursor: Any, sql: str, *_: Any) -> None:
        self.count += sql.startswith("SELECT")


# ----------------------------------------------------------------------------------------------------- plain and cached


@dataclass(frozen=True, slots=True)
class Measurement:
    """latencies_s: of each get, from opening its session to having closed it. hits: gets served from the cache."""

    name: str
    elapsed_s: float
    latencies_s: list[float]
    selects: int
    hits: int

    @property
    def gets_per_s(self) -> float:
        return len(self.latencies_s) / self.elapsed_s

    @property
    def median_s(self) -> float:
        return statistics.median(self.latencies_s)

    @property
    def p99_s(self) -> float:
        return statistics.quantiles(self.latencies_s, n=100)[98]


def zipf(codes: Sequence[str], count: int) -> list[str]:
    """Ask for the second most popular airport half as often as for the first, for the third a third as often, …"""
    choice = random.Random(1)
    by_popularity = choice.sample(codes, len(codes))
    weights = [1 / rank for rank in range(1, len(codes) + 1)]
    return choice.choices(by_popularity, cum_weights=list(itertools.accumulate(weights)), k=count)


async def measure(
    engine: AsyncEngine,
    sessions: Sessions,
    cache: Cache,
    selects: Selects,
    codes: Sequence[str],
    tasks: int,
    console: Console,
) -> None:
    async def run(name: str, sessions: Sessions) -> Measurement:
        latencies_s: list[float] = []
        remaining = iter(progress.track(codes, description=f"{name:<22}"))

        async def work() -> None:
            for icao in remaining:  # which all tasks share
                began_s = time.perf_counter()
                await get(sessions, icao)
                latencies_s.append(time.perf_counter() - began_s)

        selects_before, hits_before, began_s = selects.count, cache.stats.hits, time.perf_counter()
        await asyncio.gather(*(work() for _ in range(tasks)))
        elapsed_s = time.perf_counter() - began_s
        return Measurement(
            name, elapsed_s, latencies_s, selects.count - selects_before, cache.stats.hits - hits_before
        )

    with Progress(console=console) as progress:
        plain = await run("plain AsyncSession", async_sessionmaker(engine))
        cold = await run("cached, cold at first", sessions)
        warm = await run("cached, once more", sessions)
    console.print(table_of([plain, cold, warm]))


def table_of(measurements: Sequence[Measurement]) -> Table:
    table = Table("", "gets/s", "median", "p99", "SELECTs", "hit rate")
    for each in measurements:
        table.add_row(each.name, f"{each.gets_per_s:,.0f}", f"{each.median_s*1e3:.2f}", f"{each.p99_s*1e3:.2f}", f"{each.selects}", f"{each.hits/len(each.latencies_s):.1%}")
    return table


# ---------------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True, slots=True)
class Fact:
    holds: bool
    evidence: str


async def herd_makes_one_select(sessions: Sessions, cache: Cache, selects: Selects) -> Fact:
    await cache.invalidate(Airport, "EDDF")
    before = selects.count
    got = await asyncio.gather(*(get(sessions, "EDDF") for _ in range(10_000)))
    made = selects.count - before
    found = sum(airport is not None and airport.icao == "EDDF" for airport in got)
    return Fact(
        found == 10_000 and made == 1, f"10,000 tasks ask for one cold airport at once: {found:,} get it, {made:,} SELECT"
    )


async def read_elevations(sessions: Sessions, times: int) -> list[float | None]:
    airports = await asyncio.gather(*(get(sessions, "EDDF") for _ in range(times)))
    return [airport.elevation if airport else None for airport in airports]


async def commit_is_seen_at_once(sessions: Sessions, tasks: int) -> Fact:
    commits, old = 50, 0

    async def write(elevation: float) -> None:
        async with sessions() as session, session.begin():
            airport = await session.get_one(Airport, "EDDF")
            airport.elevation = elevation

    for elevation in range(1000, 1000 + commits):
        await asyncio.gather(write(elevation), read_elevations(sessions, tasks))
        old += sum(seen != elevation for seen in await read_elevations(sessions, tasks))
    return Fact(old == 0, f"{commits} commits, {commits * tasks:,} gets right after: {old} old")


async def rollback_is_never_seen(sessions: Sessions, tasks: int) -> Fact:
    async with sessions() as session:
        airport = await session.get_one(Airport, "EDDF")
        airport.elevation = -1
        await session.flush()
        seen = await read_elevations(sessions, tasks)
        await session.rollback()
    seen += await read_elevations(sessions, tasks)
    return Fact(-1 not in seen, f"1 rollback: {len(seen)}, {seen.count(-1)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--database")
    parser.add_argument("--cache", default="memory://")
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--gets", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.database or f"sqlite+aiosqlite:///{folder}/airports.db"

        async def run() -> bool:
            engine = create_async_engine(url)
            try:
                return await quickstart(engine, options.cache, options.tasks, options.gets, Console())
            finally:
                await engine.dispose()

        sys.exit(0 if asyncio.run(run()) else 1)


if __name__ == "__main__":
    main()
