"""What this process owes to the cache: slots that its commits have changed and that could not be locked, looked at or
released, because the server was away. They are unlocked or destroyed when it is back, and until then not read.

    owe      noted here; a slot that may hold an old value is doubted: this process reads the database instead
    settle   once due, again and again: take the owner off the lock, or destroy what is there
    settled  no longer doubted; or given up when nothing that the slot may have held can be served any more

There is room for `repairs_max` slots. Beyond that a row's debt is owed by its generation, of which there are few: a new
generation makes every row of its bucket invalid.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from asynccache import protocol
from asynccache.backends.base import Applied, Change, Transition
from asynccache.background import Background, Retries
from asynccache.protocol import Slot
from asynccache.settings import Settings
from asynccache.store import Store
from asynccache.telemetry import Telemetry

BATCH_SLOTS = 256
"""So many are settled at once: few enough for a server to answer in time."""

logger = logging.getLogger("asynccache")


class Claim(NamedTuple):
    """A lock that a transaction may hold on a slot. What is there without it is destroyed."""

    slot: Slot
    owner: bytes


@dataclass(frozen=True, slots=True)
class Debt:
    """A claim that is still to be settled.

    due_s, give_up_s: when to begin and when to end trying, by the monotonic clock.
    doubtful: the slot may hold an old value.
    """

    due_s: float
    give_up_s: float
    doubtful: bool

    def is_due(self, *, is_last: bool) -> bool:
        """Whether to try now. is_last: there is no later; a lock that is in place ends by itself."""
        return self.due_s <= time.monotonic() or (is_last and self.doubtful)


class Repairs:
    """The debts of one event loop, and the one task that settles them.

    ttl_max_s: tells the longest that anything in the cache is served from when it is stored, in seconds.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        telemetry: Telemetry,
        background: Background,
        ttl_max_s: Callable[[], float],
    ) -> None:
        self._store = store
        self._settings = settings
        self._telemetry = telemetry
        self._background = background
        self._ttl_max_s = ttl_max_s
        self._debts: dict[Claim, Debt] = {}
        self._nobody = protocol.fresh_id()
        self._working: asyncio.Task[object] | None = None

    def __len__(self) -> int:
        return len(self._debts)

    async def settle(self, claims: Sequence[Claim]) -> list[Claim]:
        """Try once; give those that are not known to be done."""
        changes = list(self._unlocks(claims))
        applied = await self._store.apply(changes)
        done: list[Slot] = []
        failed: list[Claim] = []
        for claim, change, result in zip(claims, changes, applied, strict=True):
            if _is_done(change.transition, result):
                done.append(claim.slot)
            else:
                failed.append(claim)
        self._telemetry.unlocked(done)
        return failed

    def owe(self, claims: Iterable[Claim], *, delay_s: float = 0.0, doubtful: bool) -> None:
        """Settle these in the background, `delay_s` seconds from now, until it is done or nothing
        that a reader may have put there can be served any more: for a lease's life and then a row's.

        doubtful: this process reads them no more until then.
        """
        due_s = time.monotonic() + delay_s
        # A lease that was taken before this may be filled for as long as it lives; and servers round up to seconds.
        debt = Debt(due_s, due_s + self._settings.lease_ttl_s + self._ttl_max_s() + 1.0, doubtful)
        owed = len(self._debts)
        for claim in claims:
            self._note(claim, debt)
        if self._debts and not owed:
            self._telemetry.repairs_changed(len(self._debts))
        self._begin()

    def take_over(self, ended: Repairs) -> None:
        """Owe what these owed, whose event loop has ended. What they doubted is doubted still."""
        self._debts.update(ended._debts)
        ended._debts.clear()
        self._begin()

    def forget(self, claims: Iterable[Claim]) -> None:
        """These were settled."""
        if not self._debts:
            return
        for claim in claims:
            debt = self._debts.pop(claim, None)
            if debt is not None and debt.doubtful:
                self._store.trust(claim.slot.key)
        if not self._debts:
            self._telemetry.repairs_changed(0)

    def _begin(self) -> None:
        if not self._debts:
            return
        if self._working is None or self._working.done():  # cancelled, by somebody who ended all tasks and goes on
            self._working = self._background.start(self._work(), "repair")

    def _note(self, claim: Claim, debt: Debt) -> None:
        known = self._debts.get(claim)
        if known is None and len(self._debts) >= self._settings.repairs_max:
            claim = Claim(Slot(claim.slot.generation, claim.slot.generation), self._nobody)
            known = self._debts.get(claim)
            if known is not None:  # of another row: it has to be new after both
                due_s, give_up_s = max(debt.due_s, known.due_s), max(debt.give_up_s, known.give_up_s)
                debt = replace(debt, due_s=due_s, give_up_s=give_up_s)
        if known is not None and known.doubtful:
            debt = replace(debt, doubtful=True)
        elif debt.doubtful:
            self._store.doubt(claim.slot.key)
        self._debts[claim] = debt

    async def _work(self) -> None:
        closing = self._background.closing
        retries = Retries(self._settings)
        while self._debts:
            is_last = closing.is_set()
            due = [claim for claim, debt in self._debts.items() if debt.is_due(is_last=is_last)]
            for start in range(0, len(due), BATCH_SLOTS):
                await self._try(due[start : start + BATCH_SLOTS])
            self._give_up(is_last=is_last)
            if not due:
                retries = Retries(self._settings)
            if self._debts:
                await retries.wait(closing, at_least_s=self._idle_s())
        self._working = None

    def _idle_s(self) -> float:
        """How long there is nothing to do; at most as long as between two tries, since more may be owed meanwhile."""
        earliest_s = min(debt.due_s for debt in self._debts.values()) - time.monotonic()
        return max(0.0, min(earliest_s, self._settings.retry_max_s))

    async def _try(self, claims: Sequence[Claim]) -> None:
        tried = {claim: self._debts[claim] for claim in claims if claim in self._debts}
        failed = set(await self.settle(list(tried)))
        # What was owed once more meanwhile has changed since: it stays.
        done = [claim for claim, debt in tried.items() if claim not in failed and self._debts.get(claim) is debt]
        self._telemetry.repaired([claim.slot for claim in done])
        self.forget(done)

    def _give_up(self, *, is_last: bool) -> None:
        now_s = time.monotonic()
        over = [claim for claim, debt in self._debts.items() if is_last or debt.give_up_s < now_s]
        lost = [claim.slot for claim in over if self._debts[claim].is_due(is_last=is_last)]
        if lost:
            self._telemetry.repairs_failed(lost)
            logger.warning("%d slots could not be unlocked or destroyed: the cache did not answer", len(lost))
        self.forget(over)

    def _unlocks(self, claims: Iterable[Claim]) -> Iterator[Change]:
        now_ms, hold_off_s = wall_clock_ms(), self._settings.hold_off_s
        of_rows: dict[bytes, Transition] = {}  # the same for all rows of an owner
        for slot, owner in claims:
            if slot.is_generation:
                transition = protocol.unlock_generation(owner, now_ms, protocol.fresh_id(), hold_off_s)
            elif owner in of_rows:
                transition = of_rows[owner]
            else:
                transition = of_rows[owner] = protocol.unlock_entity(owner, now_ms, hold_off_s)
            yield Change(slot.key, transition)


def _is_done(transition: Transition, result: Applied) -> bool:
    """Whether the slot is as it is to be. A server without memory refuses even this, and leaves an old value there."""
    wanted = transition(result.after) if result.confirmed else None
    return result.confirmed and (wanted is None or wanted.value == result.after)


def wall_clock_ms() -> int:
    """The wall clock, since other processes read the deadlines of locks. Theirs may differ by half a lock_ttl."""
    return time.time_ns() // 1_000_000
