"""Everything at once: no answer belongs to another question, no change is lost, nothing hangs, leaks or stalls."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Final

import pytest

from asynccache.backends.base import UNREADABLE, Applied, Change, Key, Transition, Write
from asynccache.backends.memcached import MemcachedBackend
from tests.servers import FaultProxy, Memcached
from tests.watch import Watch

COMMANDS: Final = 34_000
"""Of each of three storms: 100,000 in all."""
CALLERS: Final = 50
STALL_S_MAX: Final = 0.05
STORM_S_MAX: Final = 240.0
"""Seven, and on a busy machine so many."""

pytestmark = [pytest.mark.without_sqlalchemy, pytest.mark.timeout(STORM_S_MAX + 60)]

VALUES: Final = [Key(b"value-%d" % number, number) for number in range(50)]
"""Read only. The last ten are never stored."""
COUNTERS: Final = [Key(b"counter-%d" % number, number) for number in range(40)]


def value_of(key: Key) -> bytes | None:
    """Names its key, and has a size of its own, up to some that take several reads of a socket."""
    number = VALUES.index(key)
    return key.name + b":" + b"END\r\n" * (0, 2, 40, 1_000)[number % 4] if number < 40 else None


def count_of(key: Key, value: bytes | None) -> int:
    """Raises ValueError for a value of another key."""
    name, _, count = (value or key.name + b"=0").partition(b"=")
    if name != key.name:
        raise ValueError(f"{value!r} is not of {key.name!r}")
    return int(count)


def put(value: bytes) -> Transition:
    return lambda _: Write(value, 600)


@dataclass
class Tally:
    """What callers were told. A mixed-up answer ends in `wrong`, where no exception handler of the subject hides it."""

    confirmed: Counter[Key] = field(default_factory=Counter)
    doubtful: Counter[Key] = field(default_factory=Counter)
    """Increments whose outcome nobody was told."""
    counts: set[tuple[Key, int]] = field(default_factory=set)
    """Which numbers were given out: each once."""
    firsts: dict[Key, bytes] = field(default_factory=dict)
    """What was added first, as anybody was told."""
    wrong: list[str] = field(default_factory=list)
    read: int = 0
    unreadable: int = 0
    cancelled: int = 0

    def check(self, key: Key, value: bytes | None) -> None:
        """This came as the answer about this key."""
        if key in VALUES:
            right = value == value_of(key)
        elif key in COUNTERS:
            right = value is None or value.startswith(key.name + b"=")
        else:
            right = value is None or (value.startswith(key.name + b"=") and self.firsts.setdefault(key, value) == value)
        if not right:
            self.wrong.append(f"{key.name!r}: {value!r:.80}")

    def check_increment(self, key: Key, before: bytes | None, after: bytes | None) -> None:
        count = count_of(key, after)
        if count != count_of(key, before) + 1 or (key, count) in self.counts:
            self.wrong.append(f"{key.name!r}: {before!r} to {after!r}")
        self.counts.add((key, count))


class Storm:
    """Callers of one backend, one of ten of whose commands is cancelled at a random point."""

    def __init__(self, backend: MemcachedBackend, dice: random.Random) -> None:
        self.tally = Tally()
        self._backend = backend
        self._watch = Watch(backend)
        self._dice = dice
        self._adds = 0

    async def call(self, commands: int) -> None:
        for _ in range(commands):
            await self._watch.until_used()  # else most commands would not be sent
            command = self._dice.choices((self._read, self._increment, self._add), (7, 1, 2))[0]
            if self._dice.random() < 0.9:
                await command()
            else:
                await self._cancel(asyncio.create_task(command()))

    async def _cancel(self, task: asyncio.Task[None]) -> None:
        if self._dice.random() < 0.5:
            for _ in range(self._dice.randrange(10)):  # after so many turns of the loop
                await asyncio.sleep(0)
        else:
            await asyncio.wait({task}, timeout=self._dice.uniform(0, 0.03))
        self.tally.cancelled += task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def _read(self) -> None:
        keys = self._dice.sample(VALUES + COUNTERS, self._dice.randint(1, 8))
        for key, value in zip(keys, await self._backend.get_many(keys), strict=True):
            if value == UNREADABLE:
                self.tally.unreadable += 1
            else:
                self.tally.read += 1
                self.tally.check(key, value)

    async def _increment(self) -> None:
        keys = self._dice.choices(COUNTERS, k=self._dice.randint(1, 3))
        self.tally.doubtful.update(keys)
        for key, applied in await self._apply(keys, self._incremented, absent=self._dice.random() < 0.5):
            self.tally.doubtful[key] -= 1
            self.tally.confirmed[key] += 1
            self.tally.check_increment(key, applied.before, applied.after)

    async def _add(self) -> None:
        """Some three callers add each of these: who comes later finds what the first has put there."""
        self._adds += 1
        newest = self._adds // 3
        keys = [Key(b"added-%d" % number, number) for number in range(newest, newest + self._dice.randint(1, 3))]
        for key, applied in await self._apply(keys, self._added, absent=True):
            if applied.after is None:
                self.tally.wrong.append(f"{key.name!r} is absent after it was added")

    async def _apply(
        self, keys: Sequence[Key], write: Callable[[Key, bytes | None], bytes | None], *, absent: bool
    ) -> list[tuple[Key, Applied]]:
        """Give what was confirmed."""

        def transition(key: Key) -> Transition:
            def transition(found: bytes | None) -> Write | None:
                self.tally.check(key, found)
                value = write(key, found)
                return Write(value, 600) if value is not None else None

            return transition

        applied = await self._backend.apply([Change(key, transition(key), absent) for key in keys])
        confirmed = [(key, each) for key, each in zip(keys, applied, strict=True) if each.confirmed]
        for key, each in confirmed:
            self.tally.check(key, each.before)
            self.tally.check(key, each.after)
        return confirmed

    def _incremented(self, key: Key, found: bytes | None) -> bytes:
        return b"%b=%d" % (key.name, count_of(key, found) + 1)

    def _added(self, key: Key, found: bytes | None) -> bytes | None:
        return b"%b=%b" % (key.name, self._dice.randbytes(8).hex().encode()) if found is None else None


@asynccontextmanager
async def breaking(proxy: FaultProxy, dice: random.Random) -> AsyncGenerator[None]:
    """Delay, cut and reset at random."""

    async def break_things() -> None:
        while True:
            proxy.delay_s = dice.choice((0, 0, 0.0005, 0.002))
            proxy.cut_after(dice.randrange(200_000), rst=dice.random() < 0.5)
            await asyncio.sleep(dice.uniform(0.005, 0.05))
            if dice.random() < 0.3:
                proxy.cut(rst=dice.random() < 0.5)

    task = asyncio.create_task(break_things())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        proxy.delay_s = 0.0


@dataclass
class Stall:
    """The longest turn of the event loop: what this thread has computed between two calls of a callback that runs in
    every turn. Not the time that passed: a wait for the processor is the machine's, what a turn computes is ours."""

    longest_s: float = 0.0
    turns: int = 0


@contextmanager
def watched(loop: asyncio.AbstractEventLoop) -> Generator[Stall]:
    stall = Stall()
    last_s = time.thread_time()
    handle: asyncio.Handle

    def beat() -> None:
        nonlocal last_s, handle
        now_s = time.thread_time()
        stall.longest_s = max(stall.longest_s, now_s - last_s)
        stall.turns += 1
        last_s = now_s
        handle = loop.call_soon(beat)

    handle = loop.call_soon(beat)
    try:
        yield stall
    finally:
        handle.cancel()


@contextmanager
def frozen_heap() -> Generator[None]:
    """Keep what was there before from the collector: a full collection of all that pytest and other tests have
    imported may itself take longer than a stall may. What the storm allocates is collected as ever."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def at_rest(server: Memcached, keys: Sequence[Key]) -> dict[Key, bytes | None]:
    """What really lies there, past the proxy."""
    backend = MemcachedBackend([f"{server.host}:{server.port}"], timeout_s=20)
    try:
        return dict(zip(keys, await backend.get_many(keys), strict=True))
    finally:
        await backend.aclose()


async def prepare(server: Memcached) -> None:
    backend = MemcachedBackend([f"{server.host}:{server.port}"], timeout_s=20)
    values = [(key, value) for key in VALUES if (value := value_of(key)) is not None]
    for applied in await backend.apply([Change(key, put(value)) for key, value in values]):
        assert applied.confirmed
    await backend.aclose()


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_storm_mixes_no_answers_loses_no_change_strands_nobody_and_leaks_nothing(
    memcached_server: Memcached, seed: int
) -> None:
    dice = random.Random(seed)
    await prepare(memcached_server)
    tasks_before = asyncio.all_tasks()
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        backend = MemcachedBackend([f"{proxy.host}:{proxy.port}"], timeout_s=5, pool_size=8)
        storm = Storm(backend, dice)
        with frozen_heap(), watched(asyncio.get_running_loop()) as stall:
            async with breaking(proxy, dice), asyncio.timeout(STORM_S_MAX):
                await asyncio.gather(*(storm.call(COMMANDS // CALLERS) for _ in range(CALLERS)))
        await backend.aclose()
        await proxy.until(lambda: proxy.open == 0)
        assert proxy.accepted > 10
    assert asyncio.all_tasks() == tasks_before

    tally = storm.tally
    assert not tally.wrong
    final = await at_rest(memcached_server, [*COUNTERS, *tally.firsts])
    for key in COUNTERS:
        confirmed = tally.confirmed[key]
        assert confirmed <= count_of(key, final[key]) <= confirmed + tally.doubtful[key]
    assert all(final[key] == value for key, value in tally.firsts.items())

    # It was one.
    assert tally.read > tally.unreadable > 0
    assert 4 * tally.confirmed.total() > tally.doubtful.total() > 0
    assert len(tally.firsts) > COMMANDS / 100
    assert tally.cancelled > COMMANDS / 20
    assert stall.turns > 1_000
    assert stall.longest_s < STALL_S_MAX
