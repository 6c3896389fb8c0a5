"""The herd in several processes at once, which have nothing in common but the database and memcached."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Final

from benchmarks.contenders import PLAIN, Store
from benchmarks.figures import FAILED, SECONDS, SELECTS
from benchmarks.server import Server
from benchmarks.shop import COLDEST, HOT, counted
from benchmarks.stage import Stage, on
from benchmarks.workloads.herd import all_at_once, measured_in

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

FLEET: Final = "a herd in several processes"

_together: Barrier | None = None


def _start(barrier: Barrier) -> None:
    global _together  # noqa: PLW0603 (how a pool of processes hands something to its workers)
    _together = barrier


async def run(stage: Stage) -> None:
    effort = stage.effort
    loop = asyncio.get_running_loop()
    field = [each for each in stage.contenders if each.store is Store.MEMCACHED or each.name == PLAIN]
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(effort.fleet_processes)
    with ProcessPoolExecutor(effort.fleet_processes, spawn, _start, (barrier,)) as processes:
        for number in range(effort.herds):
            for name in [each.name for each in measured_in(number, field)]:
                stage.tell(f"a herd in {effort.fleet_processes} processes, {number + 1} of {effort.herds}: {name}")
                pk = COLDEST[-1 - number]
                asked = (name, stage.postgres_url, stage.server, pk, effort.fleet_tasks)
                found = await asyncio.gather(
                    *(loop.run_in_executor(processes, _herd, *asked) for _ in range(effort.fleet_processes))
                )
                stage.figures.add(FLEET, name, SELECTS, sum(selects for selects, _, _ in found))
                stage.figures.add(FLEET, name, SECONDS, max(taken_s for _, taken_s, _ in found))
                stage.figures.add(FLEET, name, FAILED, sum(failed for _, _, failed in found))


def _herd(name: str, url: str, server: Server, pk: int, tasks: int) -> tuple[int, float, int]:
    """One process's part: how many SELECTs it made, how long it took, and how many of its gets failed."""
    return asyncio.run(_herd_of(name, url, server, pk, tasks))


async def _herd_of(name: str, url: str, server: Server, pk: int, tasks: int) -> tuple[int, float, int]:
    assert _together is not None
    async with on(url, server, [name]) as (engine, field):
        (contender,) = field.contenders
        with contender.turn():
            await all_at_once(contender, [HOT[0]])  # connections are there
            async with counted(engine) as selects:
                await asyncio.to_thread(_together.wait, 60)  # all processes are here
                taken_s, failed = await all_at_once(contender, [pk] * tasks)
    return selects.count, taken_s, failed
