"""64 tasks on keys as a shop's visitors choose them (Zipf), some of them changing what they choose.

A read is stale when it gives an older price than one whose change was acknowledged before the read began: the writer
had been told that it is committed, and had done everything that its cache's documentation asks of it.
"""

from __future__ import annotations

import asyncio
import random
from itertools import accumulate
from time import perf_counter
from typing import Any, Final, NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.contenders import Contender
from benchmarks.contenders.base import expunge
from benchmarks.figures import PER_SECOND, READS, STALE, Figures
from benchmarks.shop import own_rows
from benchmarks.stage import Stage


class Mix(NamedTuple):
    """What part of the operations are writes; whether tasks keep a session, or open and close one for each get."""

    writes: float = 0.0
    kept: bool = False


TASKS: Final = 64
KEPT: Final = "64 tasks that keep their sessions"
READING: Final = "64 tasks, 0 % writes"
OFTEN: Final = "64 tasks, 10 % writes"
MIXES: Final = {KEPT: Mix(kept=True), READING: Mix(), "64 tasks, 1 % writes": Mix(0.01), OFTEN: Mix(0.1)}


class Crowd:
    """The tasks of one contender. Its keys stay its own for the whole run, and so do the prices that they have."""

    def __init__(self, contender: Contender, pks: range) -> None:
        self.contender = contender
        self._pks = random.Random(len(pks)).sample(pks, len(pks))
        self._weights = [*accumulate(1 / rank for rank in range(1, len(pks) + 1))]
        self._prices = dict.fromkeys(self._pks, 0.0)
        self.reads = self.stale = self.done = 0

    async def work(self, mix: Mix, seconds: float) -> float:
        """Give the operations per second."""
        self.reads = self.stale = self.done = 0
        start_s = perf_counter()
        async with asyncio.TaskGroup() as group:
            for task in range(TASKS):
                visitor = self._regular if mix.kept else self._visitor
                group.create_task(visitor(random.Random(task), mix.writes, start_s + seconds))
        return self.done / (perf_counter() - start_s)

    async def fill(self) -> None:
        for pk in self._pks:
            async with self.contender.session() as session:
                await self.contender.get(session, pk)
        await self.contender.settle()

    async def _visitor(self, chance: random.Random, writes: float, until_s: float) -> None:
        while perf_counter() < until_s:
            (pk,) = chance.choices(self._pks, cum_weights=self._weights)
            if chance.random() < writes:
                price = float(await self.contender.change(pk))
                self._prices[pk] = max(self._prices[pk], price)
            else:
                await self._read(pk)
            self.done += 1

    async def _regular(self, chance: random.Random, _writes: float, until_s: float) -> None:
        async with self.contender.session() as session:
            while perf_counter() < until_s:
                (pk,) = chance.choices(self._pks, cum_weights=self._weights)
                expunge(session, [await self._get(session, pk)])
                self.done += 1

    async def _read(self, pk: int) -> None:
        async with self.contender.session() as session:
            await self._get(session, pk)

    async def _get(self, session: AsyncSession, pk: int) -> Any:
        acknowledged = self._prices[pk]
        found = await self.contender.get(session, pk)
        self.stale += float(self.contender.price(found)) < acknowledged
        self.reads += 1
        return found


async def run(stage: Stage) -> None:
    keys = stage.effort.crowd_keys
    crowds = {each.name: Crowd(each, own_rows(number)[:keys]) for number, each in enumerate(stage.contenders)}
    for crowd in crowds.values():
        stage.tell(f"64 tasks: filling {crowd.contender.name}")
        with crowd.contender.turn():
            await crowd.fill()
    for number, contenders in stage.turns(stage.effort.crowd_rounds):
        figures = stage.figures if number else Figures()
        for workload, mix in MIXES.items():
            stage.tell(f"{workload}, round {number} of {stage.effort.crowd_rounds}")
            for contender in contenders:
                crowd = crowds[contender.name]
                with contender.turn():
                    rate = await crowd.work(mix, stage.effort.crowd_s)
                    await contender.settle()
                figures.add(workload, contender.name, PER_SECOND, rate)
                figures.add(workload, contender.name, READS, crowd.reads)
                figures.add(workload, contender.name, STALE, crowd.stale)
