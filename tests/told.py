"""What a cache tells its observers, and a check that it tells exactly what it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TypeVar

from asynccache import Cache, Stats
from asynccache.events import (
    BackendFailed,
    Bypassed,
    Coalesced,
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
    NodeChanged,
    Repaired,
    RepairFailed,
    RepairsChanged,
    Unlocked,
)

E = TypeVar("E", bound=Event)


class Told(list[Event]):
    """Listens to a cache from its first moment on."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self._cache = cache
        cache.observe(self._note)

    def _note(self, event: Event, /) -> None:
        self.append(event)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self if isinstance(event, kind)]

    def check(self) -> None:
        """Fail unless all that was counted was told, and the other way round."""
        counted = asdict(self._cache.stats) | {"audited": 0, "audit_mismatches": 0}
        assert asdict(counted_from(self)) == counted


def counted_from(events: list[Event]) -> Stats:
    """The counters that these events amount to."""
    stats = Stats()
    for event in events:
        match event:
            case Hit(rows=rows, missing=missing):
                stats.hits += 0 if missing else rows
                stats.negative_hits += rows if missing else 0
            case Missed(rows=rows):
                stats.misses += rows
            case Loaded():
                stats.loads += 1
            case Coalesced(rows=rows):
                stats.coalesced += rows
            case Filled(rows=rows):
                stats.fills += rows
            case FillDropped(rows=rows):
                stats.fills_dropped += rows
            case Garbage(rows=rows):
                stats.garbage += rows
            case Bypassed(rows=rows, reason=reason):
                stats.bypassed += Counter({reason: rows})
            case Locked(slots=slots):
                stats.locks += slots
            case LockFailed(slots=slots):
                stats.locks_failed += slots
            case LockLost(slots=slots):
                stats.locks_lost += slots
            case LockUnverified(slots=slots):
                stats.locks_unverified += slots
            case Unlocked(slots=slots):
                stats.unlocks += slots
            case Repaired(slots=slots):
                stats.repairs += slots
            case RepairFailed(slots=slots):
                stats.repairs_failed += slots
            case BackendFailed(slots=slots):
                stats.backend_errors += slots
            case NodeChanged(state=state):
                stats.breakers[state.value] += 1
            case RepairsChanged():
                pass
    return stats
