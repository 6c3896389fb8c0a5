"""How fast slots are read from memcached: stock aiomcache, the hardened client that writes, the channel that reads.

Run it by `nox -s bench-memcached`, or `python -m benchmarks.memcached [--markdown FILE]` in the root of the project. It
starts a memcached of its own. A round measures every client once, right after each other, so that the ratios compare
what ran under the same conditions; the table gives medians over all rounds and, behind them, the middle half. The last
column is the client's processor time: on a machine that others use, too, waits for the processor are not in it.

On Linux, `--cores one` keeps server and clients on one core and `--cores two` on one each. It is worth choosing: the
system moves them between the two, whose ratios are far apart.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import aiomcache
from rich.progress import track

from asynccache import Change, Key, MemcachedBackend, Write
from asynccache.backends._aiomcache import Client
from asynccache.backends._endpoint import Address, Endpoint
from benchmarks.table import conditions, markdown, memcached_version, print_table, shown
from tests.servers import Memcached

ENTITIES: Final = 1_000
GENERATIONS: Final = 16
TASKS: Final = (1, 32, 64, 256)
PAIR_TASKS: Final = (1, 64)
AT_ONCE: Final = 100
POOL_SIZE: Final = 8
TIMEOUT_S: Final = 10.0
STOCK, HARDENED, CHANNEL = "stock aiomcache", "hardened aiomcache", "read channel"

Read = Callable[[int], Awaitable[object]]


class Case(NamedTuple):
    """What is measured: so many tasks that each read so often, with the clients that do it."""

    name: str
    tasks: int
    reads: int
    clients: dict[str, Read]


# Made beforehand: what it costs to name a slot is not what is measured.
KEYS: Final = [Key(b"asynccache:bench:E:%d" % number, 0) for number in range(ENTITIES + AT_ONCE)]
GENERATION_KEYS: Final = [Key(b"asynccache:bench:G:%d" % number, 0) for number in range(GENERATIONS)]


def entity(number: int) -> Key:
    return KEYS[number % ENTITIES]


def generation(number: int) -> Key:
    return GENERATION_KEYS[number % GENERATIONS]


def pair(number: int) -> list[Key]:
    return [entity(number), generation(number)]


def many(number: int) -> list[Key]:
    return KEYS[number % ENTITIES :][:AT_ONCE]


class Cost(NamedTuple):
    """What a read takes, in microseconds: of time, and of the client's processor."""

    elapsed_us: float
    processor_us: float


async def cost_of(case: Case, read: Read) -> Cost:
    async def work(task: int) -> None:
        for turn in range(case.reads):
            await read(task * 7 + turn * 13)

    start_s, start_processor_s = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for task in range(case.tasks):
            group.create_task(work(task))
    us_per_read = 1e6 / (case.tasks * case.reads)
    return Cost((time.perf_counter() - start_s) * us_per_read, (time.process_time() - start_processor_s) * us_per_read)


async def measure(server: Memcached, rounds: int, reads: int) -> dict[str, dict[str, list[Cost]]]:
    """Give what a read cost in each case, with each client, in each round."""
    stock = aiomcache.Client(server.host, server.port, pool_size=POOL_SIZE)
    hardened = Client(Endpoint(Address(server.host, server.port), connect_timeout_s=TIMEOUT_S), pool_size=POOL_SIZE)
    backend = MemcachedBackend([f"{server.host}:{server.port}"], timeout_s=TIMEOUT_S)
    await backend.apply([Change(key, lambda _: Write(b"x" * 150, 3600)) for key in KEYS + GENERATION_KEYS])

    async def read_hardened(names: Sequence[bytes]) -> object:
        async with hardened.connection(TIMEOUT_S) as connection:
            return await hardened.gets_many(connection, names)

    def gets(number: int) -> Awaitable[object]:
        return stock.gets(entity(number).name)

    async def one_by_one(number: int) -> object:
        return [await stock.gets(key.name) for key in pair(number)]

    def ours(slots: Callable[[int], Sequence[Key]]) -> dict[str, Read]:
        return {
            HARDENED: lambda number: read_hardened([key.name for key in slots(number)]),
            CHANNEL: lambda number: backend.get_many(slots(number)),
        }

    def multi_get(slots: Callable[[int], Sequence[Key]]) -> Read:
        return lambda number: stock.multi_get(*[key.name for key in slots(number)])

    one = {STOCK: gets, **ours(lambda number: [entity(number)])}
    two = {STOCK: multi_get(pair), **ours(pair)}
    two_gets = {STOCK: one_by_one, **ours(pair)}
    hundred = {STOCK: multi_get(many), **ours(many)}
    cases = [Case(f"1 slot, {tasks} task{'s' * (tasks > 1)}", tasks, max(reads // tasks, 1), one) for tasks in TASKS]
    for tasks in PAIR_TASKS:
        name = f"2 slots, {tasks} task{'s' * (tasks > 1)}"
        cases.append(Case(f"{name}; stock by `multi_get`", tasks, max(reads // tasks, 1), two))
        cases.append(Case(f"{name}; stock by two `gets`", tasks, max(reads // tasks, 1), two_gets))
    cases.append(Case(f"{AT_ONCE} slots, 1 task", 1, max(reads // 20, 1), hundred))
    costs: dict[str, dict[str, list[Cost]]] = {case.name: {name: [] for name in case.clients} for case in cases}
    for number in track(range(rounds + 1), "rounds", transient=True):
        for case in cases:
            for name, read in case.clients.items():
                cost = await cost_of(case, read)
                if number:  # the first round warms up
                    costs[case.name][name].append(cost)
    await asyncio.gather(stock.close(), hardened.close(), backend.aclose())
    return costs


def rows(costs: dict[str, dict[str, list[Cost]]]) -> list[list[str]]:
    found: list[list[str]] = []
    for case, by_client in costs.items():
        rates = [shown([1e6 / cost.elapsed_us for cost in each], ",.0f") for each in by_client.values()]
        rounds = list(zip(by_client[STOCK], by_client[CHANNEL], strict=True))
        faster = shown([stock.elapsed_us / ours.elapsed_us for stock, ours in rounds], ".2f")
        stock_us, ours_us = (
            statistics.median(cost.processor_us for cost in each) for each in zip(*rounds, strict=True)
        )
        cheaper = shown([stock.processor_us / ours.processor_us for stock, ours in rounds], ".2f")
        found.append([case, *rates, faster, f"{stock_us:.1f} / {ours_us:.1f} = {cheaper}"])
    return found


HEADINGS: Final = [
    "reads per second",
    STOCK,
    HARDENED,
    CHANNEL,
    "channel / stock",
    "processor of the client, µs a read: stock / channel",
]
CORES: Final = {"any": "wherever the system puts it", "one": "on the client's core", "two": "on a core of its own"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="how often everything is measured (at least 2)")
    parser.add_argument("--reads", type=int, default=4_000, help="reads of each client in each round and case")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--cores", choices=CORES, default="any", help="where server and clients run")
    arguments = parser.parse_args()
    where: str = arguments.cores
    cores = [] if where == "any" else sorted(os.sched_getaffinity(0))
    if where == "two" and len(cores) < 2:
        parser.error("--cores two needs two cores")
    if cores:
        os.sched_setaffinity(0, {cores[-1 if where == "two" else 0]})  # the server inherits it
    with Memcached() as server:
        if cores:
            os.sched_setaffinity(0, {cores[0]})
        under = conditions(
            f"memcached {memcached_version(server)} on the same machine over loopback",
            CORES[where],
            f"aiomcache {importlib.metadata.version('aiomcache')} with {POOL_SIZE} connections; "
            f"{arguments.rounds} interleaved rounds, values of 150 bytes.",
        )
        found = rows(asyncio.run(measure(server, arguments.rounds, arguments.reads)))
    print_table(HEADINGS, found, under)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(HEADINGS, found, under))


if __name__ == "__main__":
    main()
