"""Does anything cost more with more entries in memory? And what does one take?

Each number of entries has a process of its own, so that its memory is nobody else's; they take turns. A few hundred
rows come there through sessions. The others are copies of the bytes of one of them, under names as long, since to read
a million rows from a database takes half an hour.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import count
from statistics import median
from time import perf_counter
from typing import Final, NamedTuple

import psutil
from sqlalchemy.ext.asyncio import async_sessionmaker

from asynccache import AsyncCachedSession, Cache, Change, Key, MemoryBackend, Write
from asynccache.backends.base import Applied
from benchmarks.contenders.base import expunge
from benchmarks.figures import BYTES, MICROSECONDS, Figures
from benchmarks.shop import HOT, Product, engine_of
from benchmarks.stage import Stage

HIT: Final = "hit among so many entries"
STORE: Final = "storing one more entry"
SIZE: Final = "an entry in memory"
PAYLOAD: Final = "its bytes alone"


def entries_of(number: int) -> str:
    return f"{number:,} entries"


async def run(stage: Stage) -> None:
    effort, loop = stage.effort, asyncio.get_running_loop()
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        processes = {n: stack.enter_context(ProcessPoolExecutor(1, spawn)) for n in effort.entries}
        for entries, process in processes.items():
            stage.tell(f"filling a cache with {entries:,} entries")
            size = await loop.run_in_executor(process, _fill, stage.sqlite_url, entries)
            stage.figures.add(SIZE, entries_of(entries), BYTES, size.entry)
            stage.figures.add(SIZE, PAYLOAD, BYTES, size.payload)
        for number in range(effort.rounds + 1):
            stage.tell(f"hits among many, round {number} of {effort.rounds}")
            figures = stage.figures if number else Figures()
            for entries, process in processes.items():
                hit_us, store_us = await loop.run_in_executor(process, _round, 5 * effort.gets)
                figures.add(HIT, entries_of(entries), MICROSECONDS, hit_us)
                figures.add(STORE, entries_of(entries), MICROSECONDS, store_us)
        for process in processes.values():
            await loop.run_in_executor(process, _close)


class Size(NamedTuple):
    """Bytes: what an entry takes of the process's memory, and what is stored in it."""

    entry: float
    payload: float


class _Watched(MemoryBackend):
    """Tells what was stored last."""

    last: tuple[Key, bytes]

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        applied = await super().apply(changes)
        for change, each in zip(changes, applied, strict=True):
            if each.after is not None and each.after != each.before:
                self.last = (change.key, each.after)
        return applied


class _Filled:
    """A cache with so many entries, and a session that hits."""

    def __init__(self, url: str, entries: int) -> None:
        self._engine = engine_of(url)
        self._backend = MemoryBackend(entries_max=entries, bytes_max=1 << 40)
        self._entries = entries
        self._numbers = count(10_000_000)
        self.cache, self.sessions = self._cached(self._backend)

    async def fill(self) -> Size:
        self._key, self._value = await self._example()
        await self._hits()
        gc.collect()
        before = psutil.Process().memory_info().rss
        copies = self._entries - len(HOT)
        for first in range(0, copies, 1_000):
            await self._backend.apply([self._copy() for _ in range(min(1_000, copies - first))])
        gc.collect()
        return Size((psutil.Process().memory_info().rss - before) / copies, len(self._value))

    async def round(self, times: int) -> tuple[float, float]:
        """Microseconds for a hit, and for storing one more entry, for which the oldest has to go."""
        await self._hits()
        hit_s: list[float] = []
        async with self.sessions() as session:
            for turn in range(times):
                start_s = perf_counter()
                found = await session.get(Product, HOT[turn % len(HOT)])
                hit_s.append(perf_counter() - start_s)
                expunge(session, [found])
        copies = [[self._copy()] for _ in range(times)]
        store_s: list[float] = []
        for copy in copies:
            start_s = perf_counter()
            await self._backend.apply(copy)
            store_s.append(perf_counter() - start_s)
        return median(hit_s) * 1e6, median(store_s) * 1e6

    async def aclose(self) -> None:
        await self.cache.aclose()
        await self._engine.dispose()

    async def _hits(self) -> None:
        async with self.sessions() as session:
            for pk in HOT:
                await session.get(Product, pk)
        await self.cache.drain()

    def _cached(self, backend: MemoryBackend) -> tuple[Cache, async_sessionmaker[AsyncCachedSession]]:
        cache = Cache(backend)
        cache.register(Product)
        return cache, async_sessionmaker(self._engine, class_=AsyncCachedSession, cache=cache)

    async def _example(self) -> tuple[Key, bytes]:
        watched = _Watched()
        cache, sessions = self._cached(watched)
        async with cache, sessions() as session:
            await session.get(Product, HOT[0])
            await cache.drain()
            return watched.last

    def _copy(self) -> Change:
        number = b"%d" % next(self._numbers)
        key = Key(self._key.name[: -len(number)] + number, self._key.route)
        value = self._value[:-1] + self._value[-1:]  # bytes of its own
        return Change(key, lambda _: Write(value, 3600.0))


# What a process keeps between two turns.
_runner = asyncio.Runner()
_filled: _Filled | None = None


def _fill(url: str, entries: int) -> Size:
    global _filled  # noqa: PLW0603
    _filled = _Filled(url, entries)
    return _runner.run(_filled.fill())


def _round(times: int) -> tuple[float, float]:
    assert _filled is not None
    return _runner.run(_filled.round(times))


def _close() -> None:
    assert _filled is not None
    _runner.run(_filled.aclose())
    _runner.close()
