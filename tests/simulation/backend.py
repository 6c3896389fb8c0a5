"""A memcached, and the clients by which processes reach it.

A command takes time to get there and its answer takes time to get back; it is executed whether or not anybody waits for
the answer still. Slots have versions and times to live. They are evicted, and a restart forgets them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from asynccache import protocol
from asynccache.backends._node import FAILURES_MAX, ROUNDS_MAX, exptime_of
from asynccache.backends.base import UNCONFIRMED, UNREADABLE, UNSENT, Applied, Backend, Change, Key, Write
from tests.simulation.chance import Trace, actor, next_of

T = TypeVar("T")

TIMEOUT_S = 0.5
"""So long a client waits for an answer."""

AWAY_S = 2.0
"""So long a process that is cut off cannot reach the server."""


class Item(NamedTuple):
    value: bytes
    version: int
    expires_s: float


class Server:
    """What the clients share.

    away_until_s: how long a process, by number, cannot reach it.
    lost_a_lock: whether a slot was locked when it was evicted, or when the server was restarted.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, trace: Trace) -> None:
        self.loop = loop
        self.trace = trace
        self.items: dict[bytes, Item] = {}
        self.away_until_s: dict[int, float] = {}
        self.lost_a_lock = False
        self.boots = 0
        self._version = 0

    def find(self, name: bytes) -> Item | None:
        item = self.items.get(name)
        return item if item is not None and item.expires_s > self.loop.time() else None

    def store(self, name: bytes, found: Item | None, write: Write) -> bool:
        """`add` if nothing was found, else `cas`; False if somebody else was faster."""
        now = self.find(name)
        if (now and now.version) != (found and found.version):
            self.trace.note("loses the race for {}", name)
            return False
        self._version += 1
        expires_s = self.loop.time() + exptime_of(write, self.loop.time())
        self.items[name] = Item(write.value, self._version, expires_s)
        self.trace.note("{}: {} becomes {}", name, found and found.value, write.value)
        return True

    def evict(self, name: bytes) -> None:
        item = self.items.pop(name, None)
        if item is not None:
            self.lost_a_lock = self.lost_a_lock or protocol.owners_of(item.value) is not None
            self.trace.note("{} is evicted: it was {}", name, item.value)

    def restart(self) -> None:
        """Forget all. Versions begin again, and what is under way on a connection is lost with it."""
        self.trace.note("the cache server is restarted")
        self.lost_a_lock = self.lost_a_lock or any(protocol.owners_of(each.value) for each in self.items.values())
        self.items.clear()
        self.boots += 1
        self._version = 0

    def cut_off(self, process: int) -> None:
        """Have this process not reach it for a while."""
        self.trace.note("process {} is cut off from the cache server", process)
        self.away_until_s[process] = self.loop.time() + AWAY_S


class Fate(NamedTuple):
    """What becomes of a batch of commands.

    there_ms, back_ms: how long it and its answer travel; beyond `TIMEOUT_S` nobody waits any more.
    arriving: how many of its commands arrive, before the connection is cut off; None: all.
    evicts: the slots that it is about are evicted just before it arrives.
    """

    there_ms: int
    back_ms: int
    arriving: int | None = None
    evicts: bool = False


FATES = (
    Fate(1, 1),
    Fate(2, 3),
    Fate(7, 1),
    Fate(1, 20),
    Fate(150, 1),
    Fate(1, 300),
    Fate(1, 1, evicts=True),
    Fate(1, 900),  # executed, and never answered
    Fate(700, 1),  # executed when nobody waits any more
    Fate(2500, 1),
    Fate(1, 1, arriving=0),
    Fate(1, 1, arriving=1),
)


class _UnansweredError(Exception):
    """Nobody knows whether it was executed."""


class _AwayError(Exception):
    """The server is known to be away: nothing was sent."""


class SimulatedMemcached(Backend):
    """One process's client."""

    server: Server

    def __init__(self, process: int) -> None:
        self._process = process

    def start_over(self, server: Server) -> None:
        """Begin a history."""
        self.server = server
        self._failures = 0

    def __repr__(self) -> str:
        return f"<SimulatedMemcached of process {self._process}>"

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        server = self.server
        names = [key.name for key in keys]
        try:
            found = await self._ask([partial(server.find, name) for name in names], names, server.boots)
        except (_UnansweredError, _AwayError):
            server.trace.note("cannot read {}", names)
            return [UNREADABLE] * len(keys)
        if len(found) < len(names):
            return [UNREADABLE] * len(keys)
        values = [item and item.value for item in found]
        server.trace.note("has read {}: {}", names, values)
        return values

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        settled: dict[int, Applied] = {}
        silence = UNCONFIRMED
        try:
            await self._settle(changes, settled)
        except _UnansweredError:
            self.server.trace.note("is not answered about {}", [change.key.name for change in changes])
        except _AwayError:
            silence = UNSENT
        return [settled.get(i, silence) for i in range(len(changes))]

    async def aclose(self) -> None:
        pass

    async def _settle(self, changes: Sequence[Change], settled: dict[int, Applied]) -> None:
        server, boots = self.server, self.server.boots
        # By name, since the order of what comes out of a set differs from one Python process to the next.
        waiting = sorted(range(len(changes)), key=lambda i: changes[i].key.name)
        for attempt in range(ROUNDS_MAX):
            turn: dict[bytes, int] = {}
            for i in waiting:
                turn.setdefault(changes[i].key.name, i)
            to_read = [name for name, i in turn.items() if attempt or not changes[i].absent]
            found: dict[bytes, Item | None] = {}
            if to_read:
                read = await self._ask([partial(server.find, name) for name in to_read], to_read, boots)
                found = dict(zip(to_read, read, strict=False))
                if len(found) < len(to_read):
                    raise _UnansweredError
            stores: list[tuple[int, Item | None, Write]] = []
            for name, i in turn.items():
                item = found.get(name)
                write = changes[i].transition(item and item.value)
                if write is None:
                    settled[i] = Applied(item and item.value, item and item.value)
                else:
                    stores.append((i, item, write))
            if stores:
                names = [changes[i].key.name for i, _, _ in stores]
                commands = [
                    partial(server.store, name, item, write)
                    for name, (_, item, write) in zip(names, stores, strict=True)
                ]
                outcomes = await self._ask(commands, names, boots)
                for (i, item, write), stored in zip(stores, outcomes, strict=False):
                    if stored:
                        settled[i] = Applied(item and item.value, write.value)
                if len(outcomes) < len(stores):
                    raise _UnansweredError
            waiting = [i for i in waiting if i not in settled]
            if not waiting:
                return

    async def _ask(self, commands: Sequence[Callable[[], T]], names: Sequence[bytes], boots: int) -> list[T]:
        """Have the server execute these on one connection, which was made when it had been booted so often.

        Gives the answers, fewer if the connection was cut off in the middle.
        """
        server, loop = self.server, self.server.loop
        away = server.away_until_s.get(self._process, 0.0) > loop.time()
        if away and self._failures >= FAILURES_MAX:
            raise _AwayError  # the circuit breaker is open
        if boots != server.boots:
            raise _UnansweredError
        fate = next_of(FATES, actor().cache)
        answer: asyncio.Future[list[T]] = loop.create_future()

        def arrive() -> None:
            if boots != server.boots:
                return
            if fate.evicts:
                for name in names:
                    server.evict(name)
            answers = [command() for command in commands[: fate.arriving]]
            loop.call_later(fate.back_ms / 1000, deliver, answers)

        def deliver(answers: list[T]) -> None:
            if not answer.done():
                answer.set_result(answers)

        if not away:
            loop.call_later(fate.there_ms / 1000, arrive)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answers = await answer
        except TimeoutError:
            self._failures += 1
            raise _UnansweredError from None
        self._failures = 0
        return answers
