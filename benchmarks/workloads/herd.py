"""Everybody wants one row that nobody has yet: how many SELECTs that is, and how long until all have it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Final

from benchmarks.contenders import OURS, OURS_MEMCACHED, Contender
from benchmarks.figures import FAILED, SECONDS, SELECTS
from benchmarks.shop import COLDEST, HOT, counted
from benchmarks.stage import Stage

HERD: Final = "a herd in one process"


async def run(stage: Stage) -> None:
    for number in range(stage.effort.herds):
        for contender in measured_in(number, stage.contenders):
            stage.tell(f"a herd in one process, {number + 1} of {stage.effort.herds}: {contender.name}")
            with contender.turn():
                await all_at_once(contender, [HOT[0]])  # connections are there
                async with counted(contender.engine) as selects:
                    taken_s, failed = await all_at_once(contender, [COLDEST[number]] * stage.effort.herd_tasks)
                stage.figures.add(HERD, contender.name, SELECTS, selects.count)
                stage.figures.add(HERD, contender.name, FAILED, failed)
                stage.figures.add(HERD, contender.name, SECONDS, taken_s)


def measured_in(number: int, contenders: Sequence[Contender]) -> list[Contender]:
    """All in the first round, ours in each."""
    return [each for each in contenders if not number or each.name in (OURS, OURS_MEMCACHED)]


async def all_at_once(contender: Contender, pks: list[int]) -> tuple[float, int]:
    """Get each in a task and a session of its own. Give the seconds until all were answered, and how many gets
    failed: aiocache's lock raises KeyError where another process has released it. Ours must not."""

    async def get(pk: int) -> None:
        async with contender.session() as session:
            if await contender.get(session, pk) is None:
                raise RuntimeError(f"{contender.name} did not find {pk}, which is there")

    start_s = perf_counter()
    answers = await asyncio.gather(*map(get, pks), return_exceptions=True)
    taken_s = perf_counter() - start_s
    errors = [answer for answer in answers if answer is not None]
    if errors and contender.name in (OURS, OURS_MEMCACHED):
        raise errors[0]
    await contender.settle()
    return taken_s, len(errors)
