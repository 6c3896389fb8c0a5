"""Slots in this process's memory: for one process, for tests, and for applications without a cache server."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from asynccache.backends.base import Applied, Backend, Change, Key, Write
from asynccache.backends.report import NodeReport, report_on_memory
from asynccache.errors import ConfigurationError

_Item = tuple[bytes, float]
"""A slot's bytes, and when it expires by the clock."""


class MemoryBackend(Backend):
    """A bounded mapping, least recently read out first; locks and generations are never evicted for entities.

    entries_max: how many entities to keep.
    value_bytes_max: a larger value is refused, as memcached does by default.
    clock: seconds that only go forward.

    An `apply` is one step of the event loop, and so needs no compare-and-set.
    """

    answers_within_s = 0.0

    def __init__(
        self,
        *,
        entries_max: int = 100_000,
        value_bytes_max: int = 1 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if entries_max < 1:
            raise ConfigurationError(f"entries_max must be at least 1, not {entries_max!r}")
        self._entries_max = entries_max
        self._value_bytes_max = value_bytes_max
        self._clock = clock
        self._values: OrderedDict[bytes, _Item] = OrderedDict()
        self._pinned: dict[bytes, _Item] = {}

    def __repr__(self) -> str:
        return f"<MemoryBackend {len(self._values)} of {self._entries_max} entries>"

    def __len__(self) -> int:
        """How many slots are kept, locks and generations included."""
        return len(self._values) + len(self._pinned)

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        now_s = self._clock()
        return [self._get(key.name, now_s) for key in keys]

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        now_s = self._clock()
        applied = []
        for change in changes:
            name = change.key.name
            before = self._get(name, now_s)
            write = change.transition(before)
            if write is None or len(write.value) > self._value_bytes_max:
                applied.append(Applied(before, before))
            else:
                self._put(name, write, now_s)
                applied.append(Applied(before, write.value))
        return applied

    async def check(self, *, lock_ttl_s: float) -> Sequence[NodeReport]:  # noqa: ARG002
        entries = len(self._values)
        return [report_on_memory(entries, entries_max=self._entries_max, value_bytes_max=self._value_bytes_max)]

    async def aclose(self) -> None:
        self._values.clear()
        self._pinned.clear()

    def _get(self, name: bytes, now_s: float) -> bytes | None:
        item = self._values.get(name)
        if item is not None:
            if item[1] > now_s:
                self._values.move_to_end(name)
                return item[0]
            del self._values[name]
            return None
        item = self._pinned.get(name)
        if item is None:
            return None
        if item[1] > now_s:
            return item[0]
        del self._pinned[name]
        return None

    def _put(self, name: bytes, write: Write, now_s: float) -> None:
        self._values.pop(name, None)
        self._pinned.pop(name, None)
        item = (write.value, now_s + write.ttl_s)
        if write.pinned:
            self._pinned[name] = item
            return
        self._values[name] = item
        if len(self._values) > self._entries_max:
            self._values.popitem(last=False)
