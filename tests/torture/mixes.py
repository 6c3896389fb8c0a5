"""What a run consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from asynccache.settings import OnLockFailure


class Fault(StrEnum):
    """What goes wrong, beside loads that are slow in every run."""

    CANCEL_READS = "cancel-reads"
    """Readers are cancelled at any await."""
    DELAY_COMMITS = "delay-commits"
    """COMMIT, or the answer to it, is held on its way."""
    CANCEL_COMMITS = "cancel-commits"
    """The same, and the writer is cancelled meanwhile: it never learns the outcome."""
    KILL = "kill"
    """SIGKILL to a writer whose COMMIT was executed and not answered, on rows that no other process writes."""
    RESTART = "restart"
    """memcached is restarted every second, and is away for a moment in between."""
    EVICT = "evict"
    """memcached has 1 MiB to a size of items, and somebody else fills it."""
    PAUSE = "pause"
    """memcached is frozen (SIGSTOP) for longer than anybody waits for it."""
    CUT = "cut"
    """Connections to memcached end at any byte."""
    LAG = "lag"
    """What memcached answers the readers comes late, each time as late."""
    PARTITION = "partition"
    """Two of the processes lose memcached, which the others still reach. What they sent may arrive later."""


ALL: Final = frozenset(Fault)

LOSES_LOCKS: Final = frozenset({Fault.RESTART, Fault.EVICT})
"""A lock that was placed may be gone before its commit has ended."""

LOSES_SERVER: Final = frozenset({Fault.RESTART, Fault.PAUSE, Fault.CUT, Fault.LAG, Fault.PARTITION})
"""A lock may not be placed, or not be looked at again."""


AVERAGE_S_MIN: Final = 10.0


@dataclass(frozen=True, slots=True)
class Mix:
    """One run.

    mutation: the name of the part of the protocol that is left out.
    until_stale: end as soon as anything stale was read.
    """

    faults: frozenset[Fault] = frozenset()
    on_lock_failure: OnLockFailure = "commit"
    seconds: float = 15.0
    seed: int = 1
    mutation: str = ""
    until_stale: bool = False

    @property
    def name(self) -> str:
        faults = "all" if self.faults == ALL else " + ".join(sorted(self.faults)) or "no fault"
        return f"{faults} ({self.on_lock_failure})" + (f", {self.mutation}" if self.mutation else "")

    @property
    def keeps_locks(self) -> bool:
        """Whether a lock that was placed stays until it is released, or has come to its end."""
        return not self.faults & LOSES_LOCKS

    @property
    def rarity(self) -> int:
        """So many times rarer than alone is what happens to memcached: with all at once it would never be there."""
        return max(1, len(self.faults & (LOSES_SERVER | LOSES_LOCKS)))

    @property
    def protects_locks(self) -> bool:
        """Whether memcached is told to evict nothing that is as short-lived as a lock."""
        return {Fault.EVICT, Fault.KILL} <= self.faults

    @property
    def hits_min(self) -> float:
        """The part of all reads that the cache has to serve, on average: one that never serves is never stale. Of a
        moment of many faults at once there is no average."""
        if self.seconds < AVERAGE_S_MIN and len(self.faults) > 1:
            return 0.0
        return 0.25 if self.faults else 0.5


CATCHES: Final[Mapping[str, frozenset[Fault]]] = {
    "never-lock-generations": frozenset({Fault.KILL}),
    "lock-after-commit": frozenset({Fault.KILL}),
    "fill-blindly": frozenset({Fault.LAG}),
    "share-uncertified": frozenset(),
    "never-verify": frozenset({Fault.EVICT, Fault.DELAY_COMMITS}),
    "unlock-unknown": frozenset({Fault.CANCEL_COMMITS}),
    "unlock-blindly": frozenset({Fault.CANCEL_COMMITS, Fault.DELAY_COMMITS}),
}
"""Each mutation of `mutations.py`, and the faults under which it is caught within seconds.

What locks before COMMIT is made up for by the look after it, unless the writer dies in between: only KILL shows that
the locks are there. A blind fill needs a whole commit between a check and the fill that follows it: LAG.
"""
