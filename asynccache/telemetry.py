"""Counts what happened, in `Stats`, and tells it to who listens: one call at each place where something happens."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from asynccache.events import (
    BackendFailed,
    Bypassed,
    Coalesced,
    DropReason,
    Event,
    FillDropped,
    Filled,
    Garbage,
    Hit,
    Loaded,
    Locked,
    LockFailed,
    LockLost,
    LockUnverified,
    Missed,
    Model,
    NodeChanged,
    Observer,
    Repaired,
    RepairFailed,
    RepairsChanged,
    Unlocked,
)
from asynccache.metrics import Stats
from asynccache.protocol import Slot

logger: Final = logging.getLogger("asynccache")

_SlotEvent = Callable[[Model, int], Event]


class Telemetry:
    """The counters of one cache, and its observers.

    model_of: names the model at the root of a slot's hierarchy. Asked only if somebody listens.

    observers is empty when nobody listens, and replaced, not changed: who tells an event goes on with those that he
    began with.
    """

    def __init__(self, stats: Stats, model_of: Callable[[Slot], Model] = lambda _: object) -> None:
        self.stats = stats
        self.observers: tuple[Observer, ...] = ()
        self._model_of = model_of
        self._faulty: list[Observer] = []

    def tell(self, event: Event) -> None:
        for observer in self.observers:
            try:
                observer(event)
            except Exception:
                if observer not in self._faulty:
                    self._faulty.append(observer)
                    logger.exception(
                        "%r failed at %r; it is called as before, but this is not logged again", observer, event
                    )

    def began_s(self) -> float:
        """The time at which something begins, for `since`; no look at the clock if nobody listens."""
        return time.perf_counter() if self.observers else 0.0

    def since(self, began_s: float) -> float:
        """The seconds since then; 0 if nobody listened when it began."""
        return time.perf_counter() - began_s if began_s else 0.0

    # ----------------------------------------------------------------------------------------------------------- reads

    def hits(self, model: Model, rows: int, missing_rows: int, duration_s: float) -> None:
        """Tell of hits. They were counted where each was served."""
        if rows:
            self.tell(Hit(model, rows, missing=False, duration_s=duration_s))
        if missing_rows:
            self.tell(Hit(model, missing_rows, missing=True, duration_s=duration_s))

    def missed(self, model: Model, rows: int) -> None:
        self.stats.misses += rows
        if self.observers:
            self.tell(Missed(model, rows))

    def loaded(self, model: Model, rows: int, duration_s: float) -> None:
        """Tell of a load. It was counted when it began, for it may fail."""
        if self.observers:
            self.tell(Loaded(model, rows, duration_s))

    def coalesced(self, model: Model) -> None:
        self.stats.coalesced += 1
        if self.observers:
            self.tell(Coalesced(model, 1))

    def filled(self, model: Model) -> None:
        self.stats.fills += 1
        if self.observers:
            self.tell(Filled(model, 1))

    def fill_dropped(self, model: Model, reason: DropReason) -> None:
        self.stats.fills_dropped += 1
        if self.observers:
            self.tell(FillDropped(model, 1, reason))

    def garbage(self, model: Model) -> None:
        self.stats.garbage += 1
        if self.observers:
            self.tell(Garbage(model, 1))

    def bypassed(self, model: Model, reason: str, rows: int = 1) -> None:
        self.stats.bypassed[reason] += rows
        if self.observers:
            self.tell(Bypassed(model, rows, reason))

    # ---------------------------------------------------------------------------------------------------------- writes

    def locked(self, slots: Sequence[Slot], failed: Sequence[Slot], duration_s: float) -> None:
        """failed: those of them that could not be locked."""
        self.stats.locks += len(slots) - len(failed)
        self.stats.locks_failed += len(failed)
        if self.observers:
            self._tell(lambda model, count: Locked(model, count, duration_s), set(slots).difference(failed))
            self._tell(lambda model, count: LockFailed(model, count, duration_s), failed)

    def locks_lost(self, slots: Sequence[Slot]) -> None:
        self.stats.locks_lost += len(slots)
        self._tell(LockLost, slots)

    def locks_unverified(self, slots: Sequence[Slot]) -> None:
        self.stats.locks_unverified += len(slots)
        self._tell(LockUnverified, slots)

    def unlocked(self, slots: Sequence[Slot]) -> None:
        self.stats.unlocks += len(slots)
        self._tell(Unlocked, slots)

    def repaired(self, slots: Sequence[Slot]) -> None:
        self.stats.repairs += len(slots)
        self._tell(Repaired, slots)

    def repairs_failed(self, slots: Sequence[Slot]) -> None:
        self.stats.repairs_failed += len(slots)
        self._tell(RepairFailed, slots)

    def repairs_changed(self, owed: int) -> None:
        if self.observers:
            self.tell(RepairsChanged(owed))

    def _tell(self, kind: _SlotEvent, slots: Iterable[Slot]) -> None:
        """One event for each model."""
        if self.observers:
            for model, count in Counter(map(self._model_of, slots)).items():
                self.tell(kind(model, count))

    # --------------------------------------------------------------------------------------------------------- servers

    def backend_failed(self, slots: int) -> None:
        self.stats.backend_errors += slots
        if slots and self.observers:
            self.tell(BackendFailed(slots))

    def node_changed(self, change: NodeChanged) -> None:
        self.stats.breakers[change.state.value] += 1
        self.tell(change)
