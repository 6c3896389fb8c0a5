"""64 tasks on keys as a shop's visitors choose them (Zipf), some of them changing what they choose.

A read is stale when it gives an older price than one whose change was acknowledged before the read began: the writer
had been told that it is committed, and had done everything that its cache's documentation asks of it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from decimal import Decimal
from itertools import accumulate, cycle
from time import perf_counter
from typing import Final, NamedTuple

from benchmarks.contenders import Contender
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


DRAWN: Final = 1_000
"""So many operations each task draws beforehand; then it begins again. Drawing is no part of what is measured."""


class Operation(NamedTuple):
    pk: int
    writes: bool


class Crowd:
    """The tasks of one contender. Its keys stay its own for the whole run, and so do the prices that they have."""

    def __init__(self, contender: Contender, pks: range) -> None:
        self.contender = contender
        self._pks = random.Random(len(pks)).sample(pks, len(pks))
        self._weights = [*accumulate(1 / rank for rank in range(1, len(pks) + 1))]
        self._prices = dict.fromkeys(self._pks, Decimal(0))
        self.reads = self.stale = self.done = 0

    async def work(self, mix: Mix, seconds: float) -> float:
        """Give the operations per second."""
        self.reads = self.stale = self.done = 0
        drawn = [self._draw(random.Random(task), mix.writes) for task in range(TASKS)]
        work = self._keep_reading if mix.kept else self._write_and_read if mix.writes else self._read
        start_s = perf_counter()
        async with asyncio.TaskGroup() as group:
            for operations in drawn:
                group.create_task(work(cycle(operations), start_s + seconds))
        return self.done / (perf_counter() - start_s)

    async def fill(self) -> None:
        for pk in self._pks:
            async with self.contender.session() as session:
                await self.contender.get(session, pk)
        await self.contender.settle()

    def _draw(self, chance: random.Random, writes: float) -> list[Operation]:
        pks = chance.choices(self._pks, cum_weights=self._weights, k=DRAWN)
        return [Operation(pk, chance.random() < writes) for pk in pks]

    async def _keep_reading(self, operations: Iterator[Operation], until_s: float) -> None:
        get = self.contender.get
        async with self.contender.session() as session:
            for pk, _ in operations:
                await get(session, pk)  # which nobody keeps, so that it leaves the session at once
                if session.sync_session.identity_map:  # but while it is still being stored somewhere
                    session.expunge_all()
                self.done += 1
                if perf_counter() > until_s:  # a timer would not be heard by who never waits
                    break

    async def _read(self, operations: Iterator[Operation], until_s: float) -> None:
        get, new_session = self.contender.get, self.contender.session
        for pk, _ in operations:
            async with new_session() as session:
                await get(session, pk)
            self.done += 1
            if perf_counter() > until_s:
                break

    async def _write_and_read(self, operations: Iterator[Operation], until_s: float) -> None:
        for pk, writes in operations:
            if writes:
                price = await self.contender.change(pk)
                self._prices[pk] = max(self._prices[pk], price)
            else:
                acknowledged = self._prices[pk]
                async with self.contender.session() as session:
                    found = await self.contender.get(session, pk)
                self.stale += Decimal(self.contender.price(found)) < acknowledged
                self.reads += 1
            self.done += 1
            if perf_counter() > until_s:
                break


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
                    if mix.kept:
                        # What the round before has changed. A session that misses holds a connection from then on, and
                        # whoever waits for another's load with the last one in hand waits for ever.
                        await crowd.fill()
                    rate = await crowd.work(mix, stage.effort.crowd_s)
                    await contender.settle()
                figures.add(workload, contender.name, PER_SECOND, rate)
                if mix.writes:
                    figures.add(workload, contender.name, READS, crowd.reads)
                    figures.add(workload, contender.name, STALE, crowd.stale)
