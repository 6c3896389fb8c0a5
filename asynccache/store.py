"""The backend as the protocol sees it: it answers or it does not, but it never raises, and every silence is counted."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence, Set

from asynccache.backends.base import UNCONFIRMED, UNREADABLE, Applied, Backend, Change, Key
from asynccache.errors import BackendError, CacheClosedError
from asynccache.telemetry import Telemetry

logger = logging.getLogger("asynccache")


class Store:
    """A guard around a backend, so that no bug in one, ours or a user's own, can break an application."""

    def __init__(self, backend: Backend, telemetry: Telemetry) -> None:
        self.backend = backend
        self.answers_within_s: float = getattr(backend, "answers_within_s", math.inf)
        self.answers_at_once = not self.answers_within_s  # a subclass of a backend in memory may wait all the same
        self._reads_at_once = self.answers_at_once and hasattr(backend, "get_many_now")
        self._telemetry = telemetry
        self._doubtful: Counter[Key] = Counter()

    def doubt(self, key: Key) -> None:
        """Read this slot no more, until it is trusted again as often: this process has changed its row without locking
        it, and when the server is back it may still hold the old one."""
        self._doubtful[key] += 1

    def trust(self, key: Key) -> None:
        """The slot was destroyed, or nothing that it may have held is served any more."""
        self._doubtful[key] -= 1
        if not self._doubtful[key]:
            del self._doubtful[key]

    def doubts(self, keys: Sequence[Key]) -> bool:
        """Whether one of these is not to be read, or its row stored."""
        return bool(self._doubtful) and not self._doubtful.keys().isdisjoint(keys)

    def read_now(self, keys: Sequence[Key]) -> list[bytes | None] | None:
        """What `read` gives, without a coroutine, if the backend answers at once; None if it has to be awaited."""
        if not self._reads_at_once:
            return None
        try:
            slots: list[bytes | None] = self.backend.get_many_now(keys)  # type: ignore[attr-defined]
            if self._doubtful or len(slots) != len(keys) or UNREADABLE in slots:  # hardly ever
                slots = self._checked(keys, slots)
            return slots
        except CacheClosedError:
            raise
        except Exception as error:
            return self._unreadable(keys, error)

    async def read(self, keys: Sequence[Key]) -> list[bytes | None]:
        if self._reads_at_once and (slots := self.read_now(keys)) is not None:
            return slots
        # What is asked for now may be answered when the slot is trusted again, with what was there before.
        doubtful = self._doubtful.keys() & keys if self._doubtful else None
        try:
            slots = await self.backend.get_many(keys)
            if doubtful or self._doubtful or len(slots) != len(keys) or UNREADABLE in slots:  # hardly ever
                slots = self._checked(keys, slots, doubtful)
            return slots
        except CacheClosedError:
            raise
        except Exception as error:
            return self._unreadable(keys, error)

    def _checked(
        self, keys: Sequence[Key], slots: list[bytes | None], doubtful: Set[Key] | None = None
    ) -> list[bytes | None]:
        if len(slots) != len(keys):
            raise BackendError(f"{len(slots)} slots for {len(keys)} keys")
        if UNREADABLE in slots:
            self._telemetry.backend_failed(slots.count(UNREADABLE))
        if self._doubtful or doubtful:
            doubtful = (doubtful or set[Key]()) | (self._doubtful.keys() & keys)
            slots = [UNREADABLE if key in doubtful else slot for key, slot in zip(keys, slots, strict=True)]
        return slots

    def _unreadable(self, keys: Sequence[Key], error: Exception) -> list[bytes | None]:
        logger.error("%r failed to read", self.backend, exc_info=error)
        self._telemetry.backend_failed(len(keys))
        return [UNREADABLE] * len(keys)

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        try:
            applied = await self.backend.apply(changes)
            if len(applied) != len(changes):
                raise BackendError(f"{len(applied)} answers to {len(changes)} changes")
        except CacheClosedError:
            raise
        except Exception:
            logger.exception("%r failed to write", self.backend)
            applied = [UNCONFIRMED] * len(changes)
        self._telemetry.backend_failed(len([each for each in applied if not each.confirmed]))
        return applied
