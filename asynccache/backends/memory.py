"""Slots in this process's memory: for one process, for tests, and for applications without a cache server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Self
from urllib.parse import parse_qsl, urlsplit

from asynccache.backends._s3fifo import S3Fifo
from asynccache.backends.base import Applied, Backend, Change, Key
from asynccache.backends.report import MemoryStats, NodeReport, report_on_memory
from asynccache.errors import ConfigurationError

ENTRIES_MAX: Final = 100_000
BYTES_MAX: Final = 128 << 20
"""100,000 rows whose encoded values have 900 bytes on the average. Most have 100 to 300, and take half of it."""

BYTES_MAX_MIN: Final = 4096
"""Less has no room for the locks of a commit."""

_OPTIONS: Final = ("entries_max", "bytes_max", "value_bytes_max")


class MemoryBackend(Backend):
    """A bounded mapping, evicted by S3-FIFO (`_s3fifo`): a scan does not drive out what is read again and again.

    entries_max: how many slots to keep.
    bytes_max: how much memory they may take, with their keys and all that keeping them costs.
    value_bytes_max: a larger value is refused, as memcached does by default; and so is one larger than `bytes_max`.
    clock: seconds that only go forward.

    Rows, and what stands in for them, make room for each other and for locks and generations. A lock or a generation is
    evicted only when nothing else is left, the one that was written longest ago first; `stats` counts these. What has
    expired is dropped when it is met, and each write looks for some.

    Everything is one step under a lock that is held for microseconds: any number of event loops in any number of
    threads may share one. A `Cache` serves one event loop at a time; make one for each, on the same `MemoryBackend`.

    Raises ConfigurationError for a bound that makes no sense.
    """

    answers_within_s = 0.0

    def __init__(
        self,
        *,
        entries_max: int = ENTRIES_MAX,
        bytes_max: int = BYTES_MAX,
        value_bytes_max: int = 1 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, bound, least in (
            ("entries_max", entries_max, 1),
            ("bytes_max", bytes_max, BYTES_MAX_MIN),
            ("value_bytes_max", value_bytes_max, 1),
        ):
            if bound < least:
                raise ConfigurationError(f"{name} must be at least {least}, not {bound!r}")
        self._value_bytes_max = min(value_bytes_max, bytes_max)
        self._clock = clock
        self._lock = threading.Lock()
        self._slots = S3Fifo(entries_max, bytes_max)
        self._refusals = 0

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one from `memory://` or `memory://?entries_max=100000&bytes_max=134217728`.

        `value_bytes_max` can be set there, too. Raises ConfigurationError with the URL and the accepted form.
        """
        try:
            return cls(**_options_of(url))
        except (ValueError, ConfigurationError) as error:
            raise ConfigurationError(
                f"bad memory URL {url!r}: {error}. Give memory://?entries_max={ENTRIES_MAX}&bytes_max={BYTES_MAX}, "
                "or leave these defaults out"
            ) from error

    def __repr__(self) -> str:
        return f"<MemoryBackend {len(self)} of {self._slots.entries_max} entries>"

    def __len__(self) -> int:
        """How many slots are kept, locks and generations included."""
        return len(self._slots)

    @property
    def stats(self) -> MemoryStats:
        """What is kept now, and what was dropped since this was made."""
        with self._lock:
            slots = self._slots
            return MemoryStats(
                entries=len(slots),
                entries_max=slots.entries_max,
                pinned=slots.pinned,
                bytes_used=slots.bytes_used,
                bytes_max=slots.bytes_max,
                value_bytes_max=self._value_bytes_max,
                evictions=slots.evictions,
                pinned_evictions=slots.pinned_evictions,
                expirations=slots.expirations,
                refusals=self._refusals,
            )

    def get_many_now(self, keys: Sequence[Key]) -> list[bytes | None]:
        """The same as `get_many`, for who would rather not wait for a coroutine that never waits."""
        now_s = self._clock()
        with self._lock:
            return self._slots.get_many(keys, now_s)

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        return self.get_many_now(keys)

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        now_s = self._clock()
        with self._lock:
            return [self._apply(change, now_s) for change in changes]

    def _apply(self, change: Change, now_s: float) -> Applied:
        name, slots = change.key.name, self._slots
        (before,) = slots.get_many([change.key], now_s)
        write = change.transition(before)
        if write is None:
            return Applied(before, before)
        if len(write.value) > self._value_bytes_max or slots.size_of(name, write.value) > slots.bytes_max:
            self._refusals += 1
            return Applied(before, before)
        slots.put(name, write.value, now_s + write.ttl_s, pinned=write.pinned, now_s=now_s)
        return Applied(before, write.value)

    async def check(self, *, lock_ttl_s: float) -> Sequence[NodeReport]:  # noqa: ARG002
        return [report_on_memory(self.stats)]

    async def aclose(self) -> None:
        with self._lock:
            self._slots = S3Fifo(self._slots.entries_max, self._slots.bytes_max)


def _options_of(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(urlsplit(url).query, keep_blank_values=True, strict_parsing=True):
        if name not in _OPTIONS or name in options:
            raise ValueError(f"parameter {name!r} is not one of {', '.join(_OPTIONS)}, or is there twice")
        try:
            options[name] = int(value)
        except ValueError:
            raise ValueError(f"{name} must be a whole number, not {value!r}") from None
    return options
