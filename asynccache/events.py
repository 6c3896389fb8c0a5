"""What a cache tells of what it does: one event for each thing that happened, to whoever listens.

    cache.observe(observer)     # called with each event from here on, in the thread and the turn in which it happens

An observer counts, measures or logs; the adapters in `asynccache.adapters` are observers. It is a plain function, not a
coroutine, and it is called on the way of reads and commits: it must be quick and must not block. One that raises is
logged, once, and breaks nothing. When nobody listens no event is made.

In the manner of stamina's instrumentation hooks (Hynek Schlawack): a callable Protocol, and frozen data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from asynccache.backends.base import NodeChanged, NodeState

__all__ = [
    "BackendFailed",
    "Bypassed",
    "Coalesced",
    "DropReason",
    "Event",
    "FillDropped",
    "Filled",
    "Garbage",
    "Hit",
    "Loaded",
    "LockFailed",
    "LockLost",
    "LockUnverified",
    "Locked",
    "Missed",
    "Model",
    "NodeChanged",
    "NodeState",
    "Observer",
    "RepairFailed",
    "Repaired",
    "RepairsChanged",
    "Unlocked",
]

Model = type[Any]
"""A mapped class. Events of reads name the one that was asked for; events of slots, which all classes of a hierarchy
share, that at the hierarchy's root."""


# --------------------------------------------------------------------------------------------------------------- reads


@dataclass(frozen=True, slots=True)
class Hit:
    """Rows of one look into the cache were served from it.

    missing: what was served is that there are no such rows.
    duration_s: seconds that the look took. It may be one of several, when another process was loading the row.
    """

    model: Model
    rows: int
    missing: bool
    duration_s: float


@dataclass(frozen=True, slots=True)
class Missed:
    """Rows were looked for, and were not there to be served. They are loaded, or taken from another task's load."""

    model: Model
    rows: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """One SELECT has answered misses.

    duration_s: seconds that it took, with the wait for a connection, and with making the instances.
    """

    model: Model
    rows: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Coalesced:
    """A miss was served by another task's load."""

    model: Model
    rows: int


@dataclass(frozen=True, slots=True)
class Filled:
    """Rows that were loaded, or their absence, were stored."""

    model: Model
    rows: int


DropReason = Literal["locked", "invalidated", "lease lost", "refused", "no answer"]
"""Why a row that was loaded was not stored: a commit is under way; its bucket was invalidated meanwhile; a commit has
come and gone, or the lease has expired, was evicted or is another's by now; the server refused the value, for it is too
large or there is no memory; the server did not answer."""


@dataclass(frozen=True, slots=True)
class FillDropped:
    """Rows that were loaded were not stored."""

    model: Model
    rows: int
    reason: DropReason


@dataclass(frozen=True, slots=True)
class Garbage:
    """A value could not be decoded: it is damaged, foreign, or of another schema. It counts as not there."""

    model: Model
    rows: int


@dataclass(frozen=True, slots=True)
class Bypassed:
    """Rows were read past the cache. reason: as `cache.stats.bypassed` names it."""

    model: Model
    rows: int
    reason: str


# -------------------------------------------------------------------------------------------------------------- writes


@dataclass(frozen=True, slots=True)
class Locked:
    """Slots were locked before a COMMIT.

    slots: of rows, or of whole buckets of rows.
    duration_s: seconds that locking took, all slots of the commit together.
    """

    model: Model
    slots: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class LockFailed:
    """Slots could not be locked in time. `on_lock_failure` decides what becomes of the commit."""

    model: Model
    slots: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class LockLost:
    """The locks of slots were gone when COMMIT had been answered: evicted, or the server was restarted."""

    model: Model
    slots: int


@dataclass(frozen=True, slots=True)
class LockUnverified:
    """Slots could not be looked at when COMMIT had been answered: the server went away meanwhile."""

    model: Model
    slots: int


@dataclass(frozen=True, slots=True)
class Unlocked:
    """Slots were unlocked, or destroyed, after a COMMIT, by a repair, or by an invalidation."""

    model: Model
    slots: int


@dataclass(frozen=True, slots=True)
class Repaired:
    """Slots were unlocked or destroyed later than at their commit. They are among the `Unlocked`, too."""

    model: Model
    slots: int


@dataclass(frozen=True, slots=True)
class RepairFailed:
    """Unlocking or destroying slots was given up: `ttl` had passed, or the cache was closed."""

    model: Model
    slots: int


# ------------------------------------------------------------------------------------------------------------- servers


@dataclass(frozen=True, slots=True)
class RepairsChanged:
    """Slots are to be repaired, where there were none; or there are none any more.

    owed: how many; 0 when the last of them was repaired or given up.
    """

    owed: int


@dataclass(frozen=True, slots=True)
class BackendFailed:
    """The cache server gave no answer about so many slots, which may be rows or buckets of any model."""

    slots: int


Event = (
    Hit
    | Missed
    | Loaded
    | Coalesced
    | Filled
    | FillDropped
    | Garbage
    | Bypassed
    | Locked
    | LockFailed
    | LockLost
    | LockUnverified
    | Unlocked
    | Repaired
    | RepairFailed
    | RepairsChanged
    | BackendFailed
    | NodeChanged
)
"""Whatever an observer may be told. There may be more kinds in later versions: leave alone what you do not know."""


class Observer(Protocol):
    """Whoever listens: any callable that takes an `Event`."""

    def __call__(self, event: Event, /) -> object: ...
