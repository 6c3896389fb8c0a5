"""A hundred products at once: by their keys where a contender can do that, else as the result of one statement."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Final

from benchmarks.contenders import Contender
from benchmarks.contenders.base import expunge
from benchmarks.figures import MICROSECONDS, Figures
from benchmarks.shop import HOT
from benchmarks.stage import Stage

MANY: Final = "100 at once, same session"
AT_ONCE: Final = 100


async def run(stage: Stage) -> None:
    for number, contenders in stage.turns(stage.effort.rounds):
        stage.tell(f"100 at once, round {number} of {stage.effort.rounds}")
        figures = stage.figures if number else Figures()
        for contender in contenders:
            with contender.turn():
                figures.add(MANY, contender.name, MICROSECONDS, await _many_us(contender, stage.effort.gets // 10))


async def _many_us(contender: Contender, times: int) -> float:
    pks = [*HOT[:AT_ONCE]]
    taken_s: list[float] = []
    async with contender.session() as session:
        expunge(session, await contender.get_many(session, pks))
        await contender.settle()
        for _ in range(times):
            start_s = perf_counter()
            found = await contender.get_many(session, pks)
            taken_s.append(perf_counter() - start_s)
            assert len(found) == AT_ONCE
            expunge(session, found)
    return median(taken_s) * 1e6
