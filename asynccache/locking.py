"""The write path: lock before COMMIT, look once more before the caller is told, unlock in the background.

    lock       E or G: LOCKED(owners + me)      before COMMIT is sent
    COMMIT
    verify     look; what is not LOCKED by me any more is destroyed    before the caller is told
    release    take me off the lock; the last owner opens the slot     in the background

A commit whose outcome is not known (cancelled, cut off) leaves its locks until no COMMIT can be under way any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress

from asynccache import protocol
from asynccache.backends.base import UNREADABLE, Change
from asynccache.background import Background, Retries
from asynccache.protocol import Slot
from asynccache.repair import BATCH_SLOTS, Claim, Repairs, wall_clock_ms
from asynccache.settings import Settings
from asynccache.store import Store
from asynccache.telemetry import Telemetry


class WritePath:
    """Locks and unlocks slots for the transactions of one event loop.

    unlocks_at_once: the backend answers at once, so that `settle` does at the price of `verify` what `release` would do
        after it.
    """

    def __init__(
        self, store: Store, settings: Settings, telemetry: Telemetry, background: Background, repairs: Repairs
    ) -> None:
        self._store = store
        self._settings = settings
        self._telemetry = telemetry
        self._background = background
        self._repairs = repairs
        self.unlocks_at_once = store.answers_at_once
        self._to_release: list[Claim] = []
        self._releasing: asyncio.Task[object] | None = None

    async def lock(self, slots: Iterable[Slot], owner: bytes) -> bool:
        """Lock these slots for `owner`; False if not all were confirmed before `lock_timeout` passed, or as soon as
        only such are left whose server is known to be away.

        Those that were not confirmed may be locked all the same, now or later: release them too.
        """
        todo = wanted = list(slots)
        away: list[Slot] = []
        began_s = self._telemetry.began_s()
        timeout_s = self._settings.lock_timeout_s
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            async with nullcontext() if self._store.answers_within_s <= timeout_s else asyncio.timeout_at(deadline_s):
                todo, away = await self._try_lock(todo, owner)
            if todo and not self.unlocks_at_once:  # which would give the same answer again
                async with asyncio.timeout_at(deadline_s):
                    retries = Retries(self._settings)
                    while todo:
                        await retries.wait()
                        todo, unreachable = await self._try_lock(todo, owner)
                        away += unreachable
        except TimeoutError:
            pass
        failed = [*todo, *away]
        self._telemetry.locked(wanted, failed, self._telemetry.since(began_s))
        return not failed

    async def _try_lock(self, slots: Sequence[Slot], owner: bytes) -> tuple[list[Slot], list[Slot]]:
        """Give the slots whose lock was not confirmed: to be tried again, and not worth it now."""
        transition = protocol.lock(owner, wall_clock_ms(), round(self._settings.lock_ttl_s * 1000))
        applied = await self._store.apply([Change(slot.key, transition) for slot in slots])
        again: list[Slot] = []
        away: list[Slot] = []
        for slot, result in zip(slots, applied, strict=True):
            if not (result.confirmed and protocol.is_locked_by(result.after, owner)):
                (again if result.sent else away).append(slot)
        return again, away

    async def verify(self, slots: Iterable[Slot], owner: bytes) -> None:
        """Look at locked slots once, after COMMIT; destroy what a reader may have put where a lock was lost.

        1. A writer locks the slot; the lock is evicted, or the server is restarted.
        2. A reader takes a lease, reads the old row, and stores it.
        3. The writer's COMMIT is answered. Were the caller told now, it could read the old row from the cache.
        """
        unseen = await self._destroy_lost(list(slots), owner)
        if unseen and self._settings.on_lock_failure == "raise":
            # The commit cannot be refused any more, so that it is worth waiting for the server to be back.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.lock_timeout_s):
                    retries = Retries(self._settings)
                    while unseen:
                        await retries.wait()
                        unseen = await self._destroy_lost(unseen, owner)
        if unseen:
            self._telemetry.locks_unverified(unseen)
            self._repairs.owe((Claim(slot, owner) for slot in unseen), doubtful=True)

    async def _destroy_lost(self, slots: Sequence[Slot], owner: bytes) -> list[Slot]:
        """Destroy what is there in place of a lock; give the slots of which that is not known to be done."""
        found = await self._store.read([slot.key for slot in slots])
        seen = {slot: state for slot, state in zip(slots, found, strict=True) if state != UNREADABLE}
        lost = [slot for slot, state in seen.items() if not protocol.is_locked_by(state, owner)]
        self._telemetry.locks_lost(lost)
        failed = await self._repairs.settle([Claim(slot, owner) for slot in lost]) if lost else []
        return [*(slot for slot in slots if slot not in seen), *(claim.slot for claim in failed)]

    async def settle(self, slots: Iterable[Slot], owner: bytes) -> None:
        """Destroy what is in these slots, or take `owner` off their locks. Where that fails this process reads them
        no more until it was done in the background."""
        await self._settle([Claim(slot, owner) for slot in slots], doubtful=True)

    def release(self, slots: Iterable[Slot], owner: bytes) -> None:
        """Unlock these slots in the background, together with those of other transactions that ended meanwhile.

        Slots where `owner` holds no lock are destroyed, so that this is also the repair of locks never placed.
        """
        self._to_release += [Claim(slot, owner) for slot in slots]
        if self._releasing is None or self._releasing.done():  # cancelled, by somebody who ended all tasks and goes on
            self._releasing = self._background.start(self._release_all(), "unlock")

    async def _release_all(self) -> None:
        while claims := self._to_release[:BATCH_SLOTS]:
            del self._to_release[:BATCH_SLOTS]
            await self._settle(claims, doubtful=False)
        self._releasing = None

    async def _settle(self, claims: Sequence[Claim], *, doubtful: bool) -> None:
        failed = await self._repairs.settle(claims)
        self._repairs.forget(set(claims).difference(failed) if failed else claims)
        if failed:
            self._repairs.owe(failed, doubtful=doubtful)

    def repair(self, slots: Iterable[Slot], owner: bytes) -> None:
        """The same for slots that nobody has looked at after their COMMIT: until it is done this process reads them no
        more."""
        self._repairs.owe((Claim(slot, owner) for slot in slots), doubtful=True)

    def release_later(self, slots: Iterable[Slot], owner: bytes, *, placed: bool) -> None:
        """The same for a commit whose outcome is not known: once `lock_ttl` has passed, so that it has one.

        placed: all were locked. Otherwise this process reads them no more until then.
        """
        claims = (Claim(slot, owner) for slot in slots)
        self._repairs.owe(claims, delay_s=self._settings.lock_ttl_s, doubtful=not placed)

    async def destroy(self, slots: Iterable[Slot]) -> bool:
        """Make sure that nothing that was read before now is served from these slots; False if that failed."""
        nobody = protocol.fresh_id()
        todo = [Claim(slot, nobody) for slot in slots]
        try:
            async with asyncio.timeout(self._settings.lock_timeout_s):
                retries = Retries(self._settings)
                while todo := await self._repairs.settle(todo):
                    await retries.wait()
        except TimeoutError:
            return False
        return True
