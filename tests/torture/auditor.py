"""The auditor: when all writers have ended, a process of its own compares what is served with what is there."""

from __future__ import annotations

from sqlalchemy import select

from tests.torture.rows import ITEMS, KEYS, model_of
from tests.torture.worker import Worker


async def audit(worker: Worker) -> None:
    counts = worker.counts
    for key in range(KEYS):
        model = model_of(key)
        async with worker.plain() as session:
            version = (await session.scalars(select(model.version).where(model.id == key))).one()
        async with worker.sessions() as session:
            row = await session.get_one(model, key)
        counts.audited += 1
        if row.version != version:
            if key in ITEMS:
                counts.forever_stale += 1
            else:
                counts.killed_forever_stale += 1
            worker.tell("stale for ever", key=key, read=row.version, version=version)
        counts.naive_forever_stale += await worker.naive.version_of(key) != version
