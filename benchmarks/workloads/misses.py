"""What a miss costs: a row that nobody has asked for, read in a session that is opened and closed for it."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Final

from benchmarks.contenders import Contender
from benchmarks.figures import MICROSECONDS, Figures
from benchmarks.shop import COLD
from benchmarks.stage import Stage

MISS: Final = "miss, fresh session"


async def run(stage: Stage) -> None:
    misses = stage.effort.misses
    for number, contenders in stage.turns(stage.effort.rounds):
        stage.tell(f"misses, round {number} of {stage.effort.rounds}")
        figures = stage.figures if number else Figures()
        pks = COLD[number * misses :][:misses]
        for contender in contenders:
            with contender.turn():
                figures.add(MISS, contender.name, MICROSECONDS, await _miss_us(contender, pks))


async def _miss_us(contender: Contender, pks: range) -> float:
    taken_s: list[float] = []
    for pk in pks:
        start_s = perf_counter()
        async with contender.session() as session:
            await contender.get(session, pk)
        taken_s.append(perf_counter() - start_s)
        await contender.settle()  # what it stores in the background is not in anybody's way then
    return median(taken_s) * 1e6
