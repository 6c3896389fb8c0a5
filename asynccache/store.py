"""The backend as the protocol sees it: it answers or it does not, but it never raises, and every silence is counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from asynccache.backends.base import UNCONFIRMED, UNREADABLE, Applied, Backend, Change, Key
from asynccache.errors import BackendError, CacheClosedError
from asynccache.metrics import Stats

logger = logging.getLogger("asynccache")


class Store:
    """A guard around a backend, so that no bug in one, ours or a user's own, can break an application."""

    def __init__(self, backend: Backend, stats: Stats) -> None:
        self.backend = backend
        self._stats = stats

    async def read(self, keys: Sequence[Key]) -> list[bytes | None]:
        slots: list[bytes | None]
        try:
            slots = await self.backend.get_many(keys)
            if len(slots) != len(keys):
                raise BackendError(f"{len(slots)} slots for {len(keys)} keys")
        except CacheClosedError:
            raise
        except Exception:
            logger.exception("%r failed to read", self.backend)
            slots = [UNREADABLE] * len(keys)
        if UNREADABLE in slots:
            self._stats.backend_errors += slots.count(UNREADABLE)
        return slots

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
        self._stats.backend_errors += sum(not each.confirmed for each in applied)
        return applied
