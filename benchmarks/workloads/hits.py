"""One task that hits: in a session that it keeps, and in a session that it opens and closes for each get.

In the round that warms up the first of them misses, and so brings the rows into the cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Final

import aiomcache

from asynccache import AsyncCachedSession, Cache, Key, MemcachedBackend
from benchmarks.contenders import NAMES, Contender
from benchmarks.contenders.base import expunge
from benchmarks.figures import MICROSECONDS, Figures
from benchmarks.shop import HOT, Product
from benchmarks.stage import Stage, on, rotated

SAME: Final = "hit, same session"
FRESH: Final = "hit, fresh session"
ON_SQLITE: Final = ", SQLite"
RAW: Final = "aiomcache alone: multi_get of the same two keys"

_TRIES_MAX: Final = 100
"""The second get is a hit, where the machine is not so busy that the server takes longer than its time-out."""


async def run(stage: Stage) -> None:
    client = aiomcache.Client(stage.server.host, stage.server.port)
    keys = await _slots(stage)
    for number in range(stage.effort.rounds + 1):
        stage.tell(f"hits, round {number} of {stage.effort.rounds}")
        figures = stage.figures if number else Figures()
        figures.add(SAME, RAW, MICROSECONDS, await _raw_us(client, keys, stage.effort.gets))
        await _round(figures, rotated(stage.contenders, number), stage.effort.gets, "")
    await client.close()
    in_memory = [name for name in NAMES if "memcached" not in name]
    async with on(stage.sqlite_url, stage.server, in_memory) as (_, field):
        for number in range(stage.effort.rounds + 1):
            stage.tell(f"hits on SQLite, round {number} of {stage.effort.rounds}")
            figures = stage.figures if number else Figures()
            await _round(figures, rotated(field.contenders, number), stage.effort.gets, ON_SQLITE)


async def _round(figures: Figures, contenders: Sequence[Contender], gets: int, where: str) -> None:
    for contender in contenders:
        with contender.turn():
            figures.add(SAME + where, contender.name, MICROSECONDS, await _same_session_us(contender, gets))
            figures.add(FRESH + where, contender.name, MICROSECONDS, await _fresh_session_us(contender, gets))


async def _same_session_us(contender: Contender, gets: int) -> float:
    taken_s: list[float] = []
    async with contender.session() as session:
        expunge(session, [await contender.get(session, HOT[0])])  # it has a connection, if it wants one
        for pk in HOT[:gets]:
            start_s = perf_counter()
            found = await contender.get(session, pk)
            taken_s.append(perf_counter() - start_s)
            expunge(session, [found])
    await contender.settle()
    return median(taken_s) * 1e6


async def _fresh_session_us(contender: Contender, gets: int) -> float:
    taken_s: list[float] = []
    for pk in HOT[:gets]:
        start_s = perf_counter()
        async with contender.session() as session:
            await contender.get(session, pk)
        taken_s.append(perf_counter() - start_s)
    return median(taken_s) * 1e6


async def _raw_us(client: aiomcache.Client, keys: Sequence[bytes], gets: int) -> float:
    taken_s: list[float] = []
    for _ in range(gets):
        start_s = perf_counter()
        await client.multi_get(*keys)
        taken_s.append(perf_counter() - start_s)
    return median(taken_s) * 1e6


class _Asked(MemcachedBackend):
    """Remembers what it was asked for last."""

    keys: Sequence[Key] = ()

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        self.keys = keys
        return await super().get_many(keys)


async def _slots(stage: Stage) -> list[bytes]:
    """The two keys that a hit of ours asks for: the row's and its generation's."""
    backend = _Asked.from_url(stage.server.url)
    async with Cache(backend, namespace="raw") as cache:
        cache.register(Product)
        for _ in range(_TRIES_MAX):
            async with AsyncCachedSession(stage.engine, cache=cache) as session:
                await session.get(Product, HOT[0])
            await cache.drain()
            if cache.stats.hits:
                return [key.name for key in backend.keys]
            await asyncio.sleep(0.1)
    raise RuntimeError(f"no hit in {_TRIES_MAX} gets of one row: {cache.stats}")
