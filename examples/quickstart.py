"""All airports of the world, read by 64 tasks at once: by plain sessions, then by cached ones.

    python examples/quickstart.py
    python examples/quickstart.py --database postgresql+asyncpg://me@localhost/test --cache memcached://localhost

Needs `pip install sqlalchemy-asynccache[sqlite] rich airportsdata`, and `[postgresql]` for the second line. Replaces
the database's table `airport`. Ends with status 1 if anything that it shows is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

import airportsdata
from rich.console import Console
from rich.progress import track
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
    elevation: Mapped[float]
    lat: Mapped[float]
    lon: Mapped[float]
    tz: Mapped[str]


async def quickstart(engine: AsyncEngine, cache_url: str, *, tasks: int, gets: int, herd: int) -> bool:
    async with Cache(cache_url) as cache:
        cache.register(Airport, ttl=300)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)

        codes = await load_airports(engine, sessions)
        await cache.drain()  # a commit lets go of its locks in the background; here, what follows is counted
        meter = Meter(engine, cache)

        async with sessions() as session:
            airport = await session.get(Airport, FRANKFURT)  # not in the cache yet: one SELECT
        async with sessions() as session:
            airport = await cached_get(session, Airport, FRANKFURT)  # the same, in code that says that it is cached

        # That was the library. All below measures and counts what it does.
        facts = [two_sessions_make_one_select(airport, meter)]
        wanted = zipf(codes, gets)
        rows = [
            await measure("plain AsyncSession", async_sessionmaker(engine), wanted, tasks, meter),
            await measure("cached, cold at first", sessions, wanted, tasks, meter),
            await measure("cached, once more", sessions, wanted, tasks, meter),
        ]
        console.print(table_of(rows, tasks))
        facts.append(await herd_makes_one_select(sessions, herd, cache, meter))
        facts.append(await commit_is_seen_at_once(sessions, tasks, cache, meter))
        facts.append(await rollback_is_never_seen(sessions, tasks))
    for fact in facts:
        console.print("[green]yes[/]" if fact.holds else "[bold red]NO[/] ", fact.evidence, soft_wrap=True)
    return all(fact.holds for fact in facts)


FRANKFURT = "EDDF"

Sessions = Callable[[], AsyncSession]

console = Console(highlight=False)


async def load_airports(engine: AsyncEngine, sessions: Sessions) -> list[str]:
    airports = list(airportsdata.load("ICAO").values())
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    # By a session of ours: its commit invalidates what an earlier run has left in memcached.
    async with sessions() as session, session.begin():
        for start in track(range(0, len(airports), 500), f"load {len(airports):,} airports  ", console=console):
            await session.execute(insert(Airport), airports[start : start + 500])
    return [airport["icao"] for airport in airports]


async def get(sessions: Sessions, icao: str) -> Airport:
    """What a web request does: open a session, get a row, close the session."""
    async with sessions() as session:
        return await session.get_one(Airport, icao)


async def get_at_once(sessions: Sessions, icao: str, count: int) -> list[Airport]:
    return await asyncio.gather(*(get(sessions, icao) for _ in range(count)))


# ---------------------------------------------------------------------------------------------------------- the measure


class Meter:
    """Counts the SELECTs that an engine executes, and the gets that a cache serves."""

    def __init__(self, engine: AsyncEngine, cache: Cache) -> None:
        self.selects = 0
        self._cache = cache
        event.listen(engine.sync_engine, "before_cursor_execute", self._count_select)

    def _count_select(self, _connection: Any, _cursor: Any, sql: str, *_: Any) -> None:
        self.selects += sql.startswith("SELECT")

    @property
    def hits(self) -> int:
        return self._cache.stats.hits


class Measurement(NamedTuple):
    name: str
    gets_per_s: float
    latencies_ms: Sequence[float]
    selects: int
    hits: int


async def measure(name: str, sessions: Sessions, wanted: Sequence[str], tasks: int, meter: Meter) -> Measurement:
    latencies_ms: list[float] = []
    remaining = iter(track(wanted, f"{name:<22}", console=console))

    async def work() -> None:
        for icao in remaining:  # shared by all tasks
            began_s = time.perf_counter()
            await get(sessions, icao)
            latencies_ms.append((time.perf_counter() - began_s) * 1000)

    selects, hits, began_s = meter.selects, meter.hits, time.perf_counter()
    await asyncio.gather(*(work() for _ in range(tasks)))
    gets_per_s = len(wanted) / (time.perf_counter() - began_s)
    return Measurement(name, gets_per_s, latencies_ms, meter.selects - selects, meter.hits - hits)


def zipf(codes: Sequence[str], count: int) -> list[str]:
    """Choose as the public does: the second most popular half as often as the first, the third a third as often, …"""
    chance = random.Random("the same in each run")
    by_popularity = chance.sample(codes, len(codes))
    weights = itertools.accumulate(1 / rank for rank in range(1, len(codes) + 1))
    return chance.choices(by_popularity, cum_weights=list(weights), k=count)


def table_of(rows: Sequence[Measurement], tasks: int) -> Table:
    table = Table(caption=f"{tasks} tasks at once; each get opens and closes its own session")
    table.add_column(no_wrap=True)
    for heading in ("gets\nper s", "times\nplain", "median\nms", "p99\nms", "SELECTs", "hit\nrate"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.gets_per_s:,.0f}",
            f"{row.gets_per_s / rows[0].gets_per_s:.1f}",
            f"{median(row.latencies_ms):.1f}",
            f"{quantiles(row.latencies_ms, n=100)[98]:.1f}",
            f"{row.selects:,}",
            f"{row.hits / len(row.latencies_ms):.0%}",
        )
    return table


# ------------------------------------------------------------------------------------------------------------ the facts


class Fact(NamedTuple):
    holds: bool
    evidence: str


def two_sessions_make_one_select(airport: Airport | None, meter: Meter) -> Fact:
    name = airport.name if airport is not None else "nothing"
    return Fact(airport is not None and meter.selects == 1, f"2 sessions got {name}: {meter.selects} SELECT")


async def herd_makes_one_select(sessions: Sessions, tasks: int, cache: Cache, meter: Meter) -> Fact:
    await cache.invalidate(Airport, FRANKFURT)
    before = meter.selects
    airports = await get_at_once(sessions, FRANKFURT, tasks)
    got, selects = len(set(map(id, airports))), meter.selects - before
    return Fact(
        got == tasks and selects == 1,
        f"{tasks:,} tasks asked for one cold airport at once: {got:,} got an instance of their own, {selects:,} SELECT",
    )


async def commit_is_seen_at_once(sessions: Sessions, tasks: int, cache: Cache, meter: Meter, commits: int = 50) -> Fact:
    async def write(elevation: float) -> None:
        async with sessions() as session, session.begin():
            airport = await session.get_one(Airport, FRANKFURT)
            airport.elevation = elevation

    asked = old = hits = 0
    for elevation in range(1, commits + 1):
        # Readers race with the commit, and leave the old row behind in a cache that lets them.
        await asyncio.gather(write(elevation), get_at_once(sessions, FRANKFURT, tasks))
        before = meter.hits
        airports = []
        for _ in range(3):  # while its locks are let go, while the row is stored again, and from the cache
            airports += await get_at_once(sessions, FRANKFURT, tasks)
            await cache.drain()
        hits += meter.hits - before
        asked += len(airports)
        old += sum(airport.elevation != elevation for airport in airports)
    return Fact(
        old == 0 and hits > 0,
        f"{commits} commits amid readers: {asked:,} gets right after them ({hits:,} hits), {old:,} saw an old row",
    )


async def rollback_is_never_seen(sessions: Sessions, tasks: int) -> Fact:
    committed = (await get(sessions, FRANKFURT)).elevation
    async with sessions() as session:
        airport = await session.get_one(Airport, FRANKFURT)
        airport.elevation = -1
        await session.flush()  # executes the UPDATE
        session.expunge_all()  # so that it asks again, too
        own = (await session.get_one(Airport, FRANKFURT)).elevation
        airports = await get_at_once(sessions, FRANKFURT, tasks)
        await session.rollback()
    airports += await get_at_once(sessions, FRANKFURT, tasks)
    saw = sum(airport.elevation != committed for airport in airports)
    return Fact(
        own == -1 and saw == 0,
        f"1 rollback: {own == -1:d} session saw what it wrote, {saw:,} of {len(airports):,} others before and after it",
    )


# ----------------------------------------------------------------------------------------------------- the command line


async def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", metavar="URL", help="with an asyncio driver; default: SQLite in a temporary file")
    parser.add_argument("--cache", metavar="URL", default="memory://", help="default: memory://")
    parser.add_argument("--tasks", type=int, default=64, help="that read at the same time; default: 64")
    parser.add_argument("--gets", type=int, default=8_000, help="in each measurement; default: 8000")
    parser.add_argument("--herd", type=int, default=10_000, help="tasks that ask for one cold row; default: 10000")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # No overflow: connections that come and go would slow the plain sessions down.
        url = options.database or f"sqlite+aiosqlite:///{folder}/airports.db"
        engine = create_async_engine(url, pool_size=15, max_overflow=0)
        try:
            return await quickstart(engine, options.cache, tasks=options.tasks, gets=options.gets, herd=options.herd)
        finally:
            await engine.dispose()


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(main()) else 1)
