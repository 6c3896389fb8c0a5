"""The write path: lock before COMMIT, look once more before the caller is told, unlock in the background.

    lock       E or G: LOCKED(owners + me)      before COMMIT is sent
    COMMIT
    verify     look; what is not LOCKED by me any more is destroyed    before the caller is told
    release    take me off the lock; the last owner opens the slot     in the background

A commit whose outcome is not known (cancelled, cut off) leaves its locks until no COMMIT can be under way any more.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from asynccache import protocol
from asynccache.backends.base import Change, Key, Transition
from asynccache.background import Background
from asynccache.metrics import Stats
from asynccache.settings import Settings
from asynccache.store import Store

logger = logging.getLogger("asynccache")


class Slot(NamedTuple):
    """A slot that a transaction changes: an entity's, or a generation's."""

    key: Key
    is_generation: bool


class WritePath:
    """Locks and unlocks slots for the transactions of one event loop."""

    def __init__(self, store: Store, settings: Settings, stats: Stats, background: Background) -> None:
        self._store = store
        self._settings = settings
        self._stats = stats
        self._background = background

    async def lock(self, slots: Iterable[Slot], owner: bytes) -> bool:
        """Lock these slots for `owner`; False if `lock_timeout` passed before all were confirmed.

        Those that were not confirmed may be locked all the same, now or later: release them too.
        """
        todo = list(slots)
        count = len(todo)
        try:
            async with asyncio.timeout(self._settings.lock_timeout_s):
                retries = self._retries()
                while todo := await self._try_lock(todo, owner):
                    await retries.wait()
        except TimeoutError:
            self._stats.locks_failed += len(todo)
            self._stats.locks += count - len(todo)
            return False
        self._stats.locks += count
        return True

    async def _try_lock(self, slots: Sequence[Slot], owner: bytes) -> list[Slot]:
        transition = protocol.lock(owner, _now_ms(), round(self._settings.lock_ttl_s * 1000))
        applied = await self._store.apply([Change(slot.key, transition) for slot in slots])
        return [
            slot
            for slot, result in zip(slots, applied, strict=True)
            if not (result.confirmed and protocol.is_locked_by(result.after, owner))
        ]

    async def verify(self, slots: Iterable[Slot], owner: bytes) -> None:
        """Look at locked slots once, after COMMIT; destroy what a reader may have put where a lock was lost.

        1. A writer locks the slot; the lock is evicted, or the server is restarted.
        2. A reader takes a lease, reads the old row, and stores it.
        3. The writer's COMMIT is answered. Were the caller told now, it could read the old row from the cache.
        """
        slots = list(slots)
        found = await self._store.read([slot.key for slot in slots])
        lost = [slot for slot, state in zip(slots, found, strict=True) if not protocol.is_locked_by(state, owner)]
        if lost:
            self._stats.locks_lost += len(lost)
            await self._try_release(lost, owner)

    def release(self, slots: Iterable[Slot], owner: bytes, until_s: float) -> None:
        """Unlock these slots in the background, trying for `until_s` seconds.

        Slots where `owner` holds no lock are destroyed, so that this is also the repair of locks never placed.
        """
        self._background.spawn(self._release(list(slots), owner, until_s), "unlock")

    def release_later(self, slots: Iterable[Slot], owner: bytes, until_s: float, *, placed: bool) -> None:
        """The same for a commit whose outcome is not known: once `lock_ttl` has passed, so that it has one.

        placed: all were locked; their locks also end by themselves, so that a cache that is closed leaves them be.
            Otherwise this process reads them no more until then.
        """
        slots = list(slots)
        doubtful = [] if placed else [slot.key for slot in slots]
        self._store.doubt(doubtful)

        async def work() -> None:
            try:
                async with asyncio.timeout(self._settings.lock_ttl_s):
                    await self._background.closing.wait()
            except TimeoutError:
                pass
            else:
                if placed:
                    return
            await self._release(slots, owner, until_s)
            self._store.trust(doubtful)

        self._background.spawn(work(), "unlock after an unknown outcome")

    async def destroy(self, slots: Iterable[Slot]) -> bool:
        """Make sure that nothing that was read before now is served from these slots; False if that failed."""
        todo = list(slots)
        nobody = protocol.fresh_id()
        try:
            async with asyncio.timeout(self._settings.lock_timeout_s):
                retries = self._retries()
                while todo := await self._try_release(todo, nobody):
                    await retries.wait()
        except TimeoutError:
            return False
        return True

    async def _release(self, slots: list[Slot], owner: bytes, until_s: float) -> None:
        give_up_s = time.monotonic() + until_s
        retries = self._retries()
        todo = slots
        while todo := await self._try_release(todo, owner):
            if time.monotonic() > give_up_s or self._background.closing.is_set():
                logger.warning(
                    "%d slots could not be unlocked within %.0f s; the cache did not answer", len(todo), until_s
                )
                break
            await retries.wait(self._background.closing)
        self._stats.unlocks += len(slots) - len(todo)

    async def _try_release(self, slots: Sequence[Slot], owner: bytes) -> list[Slot]:
        now_ms = _now_ms()
        applied = await self._store.apply([Change(slot.key, self._unlock(slot, owner, now_ms)) for slot in slots])
        return [slot for slot, result in zip(slots, applied, strict=True) if not result.confirmed]

    def _unlock(self, slot: Slot, owner: bytes, now_ms: int) -> Transition:
        if slot.is_generation:
            return protocol.unlock_generation(owner, now_ms, protocol.fresh_id())
        return protocol.unlock_entity(owner, now_ms, self._settings.hold_off_s)

    def _retries(self) -> _Retries:
        return _Retries(self._settings.retry_min_s, self._settings.retry_max_s)


class _Retries:
    """The waits between tries: doubling, with jitter."""

    def __init__(self, min_s: float, max_s: float) -> None:
        self._next_s = min_s
        self._max_s = max_s

    async def wait(self, hurry: asyncio.Event | None = None) -> None:
        """Wait until it is time to try again, or until `hurry` is set."""
        delay_s = self._next_s * random.uniform(0.5, 1.5)
        self._next_s = min(self._next_s * 2, self._max_s)
        if hurry is None:
            await asyncio.sleep(delay_s)
            return
        try:
            async with asyncio.timeout(delay_s):
                await hurry.wait()
        except TimeoutError:
            pass


def _now_ms() -> int:
    """The wall clock, since other processes read the deadlines of locks. Theirs may differ by half a lock_ttl."""
    return time.time_ns() // 1_000_000
