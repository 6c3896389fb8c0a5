"""What a commit costs more with the cache: 1 or 100 changed entities, slot by slot or by their generations, in
memcached and in memory; 1 or 100 that are not cached; and none, after a SELECT.

Run it by `nox -s bench-commits`, or `python -m benchmarks.commits [--markdown FILE]` in the root of the project. It
starts a PostgreSQL and a memcached of its own. What is timed is `await session.commit()` with the flush in it, after
the rows were read and changed; what goes on in the background afterwards (unlocking) is waited for outside of that, and
timed by itself. In a round the ways take turns commit by commit, so that the differences and ratios compare what
ran under the same conditions; the table gives medians over all rounds and, behind them, the middle half.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import aiomcache
from rich.progress import track
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asynccache import AsyncCachedSession, Cache
from benchmarks.server import Server
from benchmarks.table import conditions, markdown, memcached_version, print_table, shown
from tests.servers import Memcached, Postgres

ROWS: Final = 100
RAW: Final = "raw"
PLAIN, CACHED, SINGLY, UNREGISTERED = "plain", "cached", "cached, slots_max=200", "not registered"
IN_MEMORY = "cached in memory"


class Base(DeclarativeBase):
    pass


class Row(Base):
    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    stock: Mapped[int]


class Product(Row):
    """Registered."""

    __tablename__ = "product"


class Visit(Row):
    """Not registered."""

    __tablename__ = "visit"


class Way(NamedTuple):
    """A way to commit: on these sessions, rows of this model; cache: whose background work follows."""

    sessions: async_sessionmaker[AsyncSession]
    model: type[Row]
    cache: Cache | None


class Times(NamedTuple):
    """Seconds in a round: medians of `commit()`, and of the work that it leaves in the background."""

    commit_s: float
    background_s: float


Round = dict[str, dict[int, Times]]
"""By way and number of changed rows; `RAW` by 1."""


async def commit(way: Way, rows: int) -> Times:
    async with way.sessions() as session:
        found = list(await session.scalars(select(way.model).where(way.model.id <= max(rows, 1))))
        for each in found[:rows]:
            each.stock += 1
        start_s = time.perf_counter()
        await session.commit()
        done_s = time.perf_counter()
    if way.cache is not None:
        await way.cache.drain()
    return Times(done_s - start_s, time.perf_counter() - done_s)


async def round_trip_s(client: aiomcache.Client, times: int = 100) -> float:
    start_s = time.perf_counter()
    for _ in range(times):
        await client.gets(b"asynccache:bench")
    return (time.perf_counter() - start_s) / times


async def one_round(ways: dict[str, Way], client: aiomcache.Client, commits: dict[int, int]) -> Round:
    found: Round = {RAW: {1: Times(await round_trip_s(client), 0)}}
    for rows, times in commits.items():
        taken: defaultdict[str, list[Times]] = defaultdict(list)
        for turn in range(times):
            names = list(ways) if turn % 2 else list(reversed(ways))  # so that none always comes after the same
            for name in names:
                taken[name].append(await commit(ways[name], rows))
        for name, each in taken.items():
            commit_s, background_s = map(statistics.median, zip(*each, strict=True))
            found.setdefault(name, {})[rows] = Times(commit_s, background_s)
    return found


async def measure(database_url: str, server: Server, rounds: Iterable[int], commits: dict[int, int]) -> list[Round]:
    engine = create_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session:
        for model in (Product, Visit):
            session.add_all(model(id=id_, name=f"name {id_}", stock=0) for id_ in range(1, ROWS + 1))
        await session.commit()
    client = aiomcache.Client(server.host, server.port)
    await client.set(b"asynccache:bench", b"x" * 150)
    found: list[Round] = []
    url = f"{server.url}?timeout=10"  # and, as by default, more patience with a lock than with an answer
    async with (
        Cache(url, namespace="default", lock_timeout=10, lock_ttl=60) as cache,
        Cache(url, namespace="singly", lock_timeout=10, lock_ttl=60, slots_max=2 * ROWS) as singly,
        Cache("memory://") as memory,
    ):

        def sessions(cache: Cache) -> async_sessionmaker[AsyncSession]:
            cache.register(Product)
            return async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache, expire_on_commit=False)

        cached = sessions(cache)
        ways = {
            PLAIN: Way(async_sessionmaker(engine, expire_on_commit=False), Product, None),
            CACHED: Way(cached, Product, cache),
            SINGLY: Way(sessions(singly), Product, singly),
            IN_MEMORY: Way(sessions(memory), Product, memory),
            UNREGISTERED: Way(cached, Visit, cache),
        }
        for number in rounds:
            measured = await one_round(ways, client, commits)
            if number:  # the first round warms up
                found.append(measured)
    await client.close()
    await engine.dispose()
    return found


def cost_s(found: Round, name: str, rows: int) -> float:
    return found[name][rows].commit_s - found[PLAIN][rows].commit_s


HEADINGS: Final = [
    "changed rows",
    "way",
    "commit, ms",
    "/ plain",
    "cost of the cache, ms",
    "in round trips",
    "/ cost of 1",
    "background, ms",
]


def rows_of(found: Sequence[Round]) -> list[list[str]]:
    table = [["", "one raw round trip", shown([each[RAW][1].commit_s * 1e3 for each in found], ".2f"), *[""] * 5]]
    for rows in found[0][PLAIN]:
        for name in (PLAIN, CACHED, SINGLY, IN_MEMORY, UNREGISTERED) if rows else (PLAIN, CACHED):
            line = [str(rows), name, shown([each[name][rows].commit_s * 1e3 for each in found], ".2f")]
            if name == PLAIN:
                table.append([*line, *[""] * 5])
                continue
            costs = [cost_s(each, name, rows) for each in found]
            line.append(shown([each[name][rows].commit_s / each[PLAIN][rows].commit_s for each in found], ".2f"))
            if name == UNREGISTERED or not rows:
                table.append([*line, *[""] * 4])
                continue
            line.append(shown([cost * 1e3 for cost in costs], ".2f"))
            line.append(shown([cost / each[RAW][1].commit_s for cost, each in zip(costs, found, strict=True)], ".1f"))
            of_one = [cost / cost_s(each, CACHED, 1) for cost, each in zip(costs, found, strict=True)]
            line.append(shown(of_one, ".1f") if rows > 1 else "")
            line.append(shown([each[name][rows].background_s * 1e3 for each in found], ".2f"))
            table.append(line)
    return table


async def version_of(database_url: str) -> str:
    engine = create_async_engine(database_url)
    async with engine.connect() as connection:
        version: str = (await connection.exec_driver_sql("SHOW server_version")).scalar_one()
    await engine.dispose()
    return f"PostgreSQL {version.split(maxsplit=1)[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="how often everything is measured (at least 2)")
    parser.add_argument("--commits", type=int, default=60, help="commits of 0 and 1 rows of each way in each round")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the result there, too")
    arguments = parser.parse_args()
    commits = {0: arguments.commits, 1: arguments.commits, ROWS: max(arguments.commits // 4, 1)}
    with Postgres() as postgres, Memcached() as server:
        under = conditions(
            f"SQLAlchemy {importlib.metadata.version('sqlalchemy')}",
            f"{asyncio.run(version_of(postgres.url))} without fsync and memcached {memcached_version(server)} "
            f"on the same machine over loopback; {arguments.rounds} interleaved rounds.",
        )
        rounds = track(range(arguments.rounds + 1), "rounds", transient=True)
        found = rows_of(asyncio.run(measure(postgres.url, Server(server.host, server.port), rounds, commits)))
    print_table(HEADINGS, found, under)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(HEADINGS, found, under, texts=2))


if __name__ == "__main__":
    main()
