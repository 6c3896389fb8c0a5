"""A backend that can be stopped at any call, so that a test decides who goes first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from asynccache import Applied, Backend, Cache, Change, Key, NodeChanged

Call = Sequence[Key] | Sequence[Change]


@dataclass
class Gate:
    """Holds the next call that matches, before it reaches the backend."""

    matches: Callable[[Call], bool]
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def pass_through(self) -> None:
        self.reached.set()
        await self.opened.wait()

    def open(self) -> None:
        self.opened.set()


def a_read(call: Call) -> bool:
    return bool(call) and isinstance(call[0], Key)


def a_write(call: Call) -> bool:
    return bool(call) and isinstance(call[0], Change)


class GatedBackend(Backend):
    """Counts the calls that go to another backend, and holds those that a gate matches."""

    @classmethod
    def before(cls, cache: Cache) -> Self:
        """Put one before the backend of a cache, whatever that is: from here on nothing is answered at once."""
        gated = cls(cache._store.backend)
        cache._store.__init__(gated, cache.telemetry)  # type: ignore[misc]
        return gated

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.calls = 0
        self._gates: list[Gate] = []

    def hold(self, matches: Callable[[Call], bool]) -> Gate:
        gate = Gate(matches)
        self._gates.append(gate)
        return gate

    def observe(self, observer: Callable[[NodeChanged], None]) -> None:
        self.backend.observe(observer)

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        await self._pass(keys)
        return await self.backend.get_many(keys)

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        await self._pass(changes)
        return await self.backend.apply(changes)

    async def aclose(self) -> None:
        await self.backend.aclose()

    async def _pass(self, call: Call) -> None:
        self.calls += 1
        for gate in self._gates:
            if not gate.reached.is_set() and gate.matches(call):
                await gate.pass_through()
                return
