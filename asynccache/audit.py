"""Compares what the cache would serve with what the database holds, and tells a mismatch from a race.

1. Read the slots of some rows. Those that would be served are looked at further.
2. SELECT these rows, in a transaction of its own.
3. Where the two differ, read the slots again. If they are as before, they were served all the time while the database
   held something else: every commit through the library would have locked them first. If not, somebody was at work.

It finds what no cache can prevent: rows that other programs, triggers or hands have changed. It begins with the keys
that the database has, or with keys that it is given: of a row that was deleted nobody else knows the key.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import Engine, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from asynccache import protocol
from asynccache.metrics import Stats
from asynccache.orm.entity import Entity
from asynccache.orm.keys import PrimaryKey
from asynccache.orm.select import select_many
from asynccache.protocol import MISSING, Slot
from asynccache.store import Store

BATCH_ROWS: Final = 100

LOOKS_MAX: Final = 3
"""A row that somebody is at work on each time is left alone after so many looks."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A row that the cache would serve otherwise than the database has it.

    kind: "differs"; "exists", though the cache has it that there is no such row; or "is gone", though the cache has it.
    attributes: those that differ. Values are not told: some may be secret.
    """

    model: type[Any]
    primary_key: tuple[Any, ...]
    kind: Literal["differs", "exists", "is gone"]
    attributes: tuple[str, ...] = ()


class Audit:
    """One audit of one model in one database."""

    def __init__(self, store: Store, stats: Stats, entity: Entity, engine: Engine) -> None:
        self._store = store
        self._stats = stats
        self._entity = entity
        self._engine = AsyncEngine(engine)

    async def run(
        self, given: Sequence[PrimaryKey] | None, sample: int | None, rows_per_second: float
    ) -> AsyncGenerator[Mismatch, None]:
        loop = asyncio.get_running_loop()
        next_s = loop.time()
        async for keys in self._batches(given, sample):
            for mismatch in await self._compare(keys):
                self._stats.audit_mismatches += 1
                yield mismatch
            self._stats.audited += len(keys)
            next_s = max(next_s, loop.time() - 1) + len(keys) / rows_per_second
            await asyncio.sleep(next_s - loop.time())

    async def _batches(
        self, given: Sequence[PrimaryKey] | None, sample: int | None
    ) -> AsyncIterator[Sequence[PrimaryKey]]:
        columns = self._entity.mapper.primary_key
        keys = select(*columns).select_from(self._entity.mapper)
        if given is None and sample is not None:
            given = await self._execute(keys.order_by(func.random()).limit(sample))
        if given is not None:
            for start in range(0, len(given), BATCH_ROWS):
                yield given[start : start + BATCH_ROWS]
            return
        keys = keys.order_by(*columns).limit(BATCH_ROWS)
        found = await self._execute(keys)
        while found:
            yield found
            last = columns[0] > found[-1][0] if len(columns) == 1 else tuple_(*columns) > found[-1]
            found = await self._execute(keys.where(last))

    async def _execute(self, statement: Any) -> list[PrimaryKey]:
        async with AsyncSession(self._engine) as session:
            return [tuple(row) for row in await session.execute(statement)]

    async def _compare(self, keys: Sequence[PrimaryKey]) -> list[Mismatch]:
        found: list[Mismatch] = []
        todo = {key: slot for key in keys if (slot := self._entity.row(key)) is not None}
        for _ in range(LOOKS_MAX):
            before = await self._read(todo)
            records = {
                key: verdict.record
                for key, slots in before.items()
                if isinstance(verdict := protocol.judge(*slots), protocol.Hit)
            }
            if not records:
                break
            suspects = await self._suspects(records)
            after = await self._read({mismatch.primary_key: todo[mismatch.primary_key] for mismatch in suspects})
            moved = {key for key, slots in after.items() if slots != before[key]}
            found += [mismatch for mismatch in suspects if mismatch.primary_key not in moved]
            todo = {key: todo[key] for key in moved}
        return found

    async def _read(self, rows: Mapping[PrimaryKey, Slot]) -> dict[PrimaryKey, tuple[bytes | None, bytes | None]]:
        """What lies in the slots of these rows and of their generations."""
        if not rows:
            return {}
        keys = list({key for slot in rows.values() for key in slot})
        found = dict(zip(keys, await self._store.read(keys), strict=True))
        return {primary_key: (found[slot.key], found[slot.generation]) for primary_key, slot in rows.items()}

    async def _suspects(self, records: Mapping[PrimaryKey, bytes]) -> list[Mismatch]:
        """Compare these records with their rows."""
        model = self._entity.model
        found: list[Mismatch] = []
        async with AsyncSession(self._engine) as session:
            rows = await session.run_sync(select_many, self._entity.mapper, list(records))
            for key, record in records.items():
                row = rows.get(key)
                if row is None:
                    if record != MISSING and self._entity.is_root:
                        found.append(Mismatch(model, key, "is gone"))
                elif record == MISSING:
                    found.append(Mismatch(model, key, "exists"))
                elif attributes := self._entity.differences(record, row):
                    found.append(Mismatch(model, key, "differs", attributes))
        return found
