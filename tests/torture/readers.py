"""Readers: each version that they get is compared with what was acknowledged before they asked."""

from __future__ import annotations

import asyncio
from itertools import accumulate
from typing import Final

from asynccache import cached_get_many
from tests.torture.ledger import Floor, Floors
from tests.torture.mixes import Fault
from tests.torture.rows import ITEMS, ROW_VICTIMS, TABLE_VICTIMS, Item, Row, Version, is_whole, model_of
from tests.torture.worker import Worker

TASKS: Final = 10
THINK_S: Final = 0.004
"""The mean pause of a reader between two reads."""

HOT: Final = list(accumulate(1 / (2 + rank) for rank in range(len(ITEMS))))
"""How often each item is read: as in most applications, some much more often than others."""


async def read(worker: Worker) -> None:
    await worker.run(*(Reader(worker).go_on() for _ in range(TASKS)))


class Reader:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._random = worker.random
        self._counts = worker.counts

    async def go_on(self) -> None:
        cancels = Fault.CANCEL_READS in self._worker.mix.faults
        while not self._worker.ledger.stopped:
            if cancels and self._random.random() < 0.1:
                await self._read_and_be_cancelled()
            else:
                await self._read_somehow()
            await asyncio.sleep(self._random.expovariate(1 / THINK_S))

    async def _read_and_be_cancelled(self) -> None:
        task = asyncio.create_task(self._read_somehow())
        _, pending = await asyncio.wait([task], timeout=self._random.uniform(0, 0.03))
        if pending:
            self._counts.reads_cancelled += 1
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def _read_somehow(self) -> None:
        try:
            match self._random.random():
                case chance if chance < 0.5:
                    await self._read_one(self._key())
                case chance if chance < 0.55:
                    key = self._key()
                    await asyncio.gather(*(self._read_one(key) for _ in range(5)))
                case chance if chance < 0.6:
                    await self._read_many(self._random.sample(ITEMS, 5))
                case _:
                    await self._read_naively(self._key())
        except Exception as error:
            self._counts.read_errors += 1
            self._worker.tell("error", error=repr(error))

    def _key(self) -> int:
        if Fault.KILL in self._worker.mix.faults and self._random.random() < 0.3:
            return self._random.choice(self._random.choice([ROW_VICTIMS, TABLE_VICTIMS]))
        return self._random.choices(ITEMS, cum_weights=HOT)[0]

    async def _read_one(self, key: int) -> None:
        floors = self._worker.ledger.floors(key)
        async with self._worker.sessions() as session:
            self._check(key, await session.get(model_of(key), key), floors, "get")

    async def _read_many(self, keys: list[int]) -> None:
        floors = {key: self._worker.ledger.floors(key) for key in keys}
        async with self._worker.sessions() as session:
            for key, row in (await cached_get_many(session, Item, keys)).items():
                self._check(key, row, floors[key], "get many")

    async def _read_naively(self, key: int) -> None:
        counts = self._counts
        floors = self._worker.ledger.floors(key)
        version = await self._worker.naive.version_of(key)
        counts.naive_reads += 1
        if version < floors.naive:
            counts.naive_stale += 1
            lag_us = self._worker.ledger.lag_us(key, Floor.NAIVE, version, floors)
            counts.worst_naive_lag_us = max(counts.worst_naive_lag_us, lag_us)

    def _check(self, key: int, row: Row | None, floors: Floors, how: str) -> None:
        counts, ledger = self._counts, self._worker.ledger
        counts.reads += 1
        if row is None or not is_whole(row, key):
            counts.mixed_up += 1
            self._worker.tell("mixed up", key=key, row=repr(row and (row.id, row.version, row.check)))
        elif row.version < floors.secured:
            counts.stale += 1
            lag_us = ledger.lag_us(key, Floor.SECURED, row.version, floors)
            counts.worst_lag_us = max(counts.worst_lag_us, lag_us)
            writer = ledger.owner_of(Floor.SECURED, Version(key, floors.secured))
            read, floor, lag_ms = row.version, floors.secured, lag_us / 1000
            self._worker.tell("stale", key=key, read=read, floor=floor, writer=writer, lag_ms=lag_ms, how=how)
        elif row.version < floors.any:
            counts.unsecured_stale += 1
            lag_us = ledger.lag_us(key, Floor.ANY, row.version, floors)
            counts.worst_unsecured_lag_us = max(counts.worst_unsecured_lag_us, lag_us)
