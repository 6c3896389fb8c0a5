"""What the processes tell each other, in a file that all of them have mapped into memory.

No locks are needed, nor would they survive SIGKILL: every cell is 8 bytes, which are written at once, and belongs to
one process at a time, or to one version of one row, which one process has committed.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import astuple, dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

from tests.torture.rows import KEYS, Version

RING: Final = 64
"""Of so many versions of a row the time of their acknowledgement is kept."""

_TIME_BITS: Final = 40


@dataclass(slots=True)
class Counts:
    """What one process did, or all of them. Names that begin with `worst` are maxima; `reads` has to be the first."""

    reads: int = 0
    hits: int = 0
    stale: int = 0
    worst_lag_us: int = 0
    unsecured_stale: int = 0
    worst_unsecured_lag_us: int = 0
    own_stale: int = 0
    mixed_up: int = 0
    read_errors: int = 0
    lost_errors: int = 0
    reads_cancelled: int = 0
    naive_reads: int = 0
    naive_hits: int = 0
    naive_stale: int = 0
    worst_naive_lag_us: int = 0
    commits: int = 0
    rollbacks: int = 0
    refused: int = 0
    unlocked: int = 0
    unverified: int = 0
    locks_lost: int = 0
    unknown: int = 0
    landed: int = 0
    write_errors: int = 0
    commits_held: int = 0
    commits_cancelled: int = 0
    kills: int = 0
    cuts: int = 0
    lags: int = 0
    partitions: int = 0
    forever_stale: int = 0
    killed_forever_stale: int = 0
    naive_forever_stale: int = 0
    audited: int = 0
    drained: int = 0

    def add(self, other: Counts) -> None:
        for name in COUNTED:
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, max(mine, theirs) if name.startswith("worst") else mine + theirs)


COUNTED: Final = tuple(field.name for field in fields(Counts))


class Floor(IntEnum):
    """Which commits a floor counts."""

    SECURED = 0
    """Those that were acknowledged under locks that had been placed and looked at; and such of unknown outcome that
    were seen in the database, where no lock can get lost."""
    ANY = 1
    """Also those that were acknowledged although a lock could not be placed, or not be looked at again."""
    NAIVE = 2
    """All that were acknowledged, once they were deleted from the naive cache."""


class Floors(NamedTuple):
    """The least version that a read which begins now has to give, by `Floor`."""

    began_us: int
    secured: int
    any: int
    naive: int


class Ledger:
    """
    path: the file, made by `create`.
    processes: how many there are.
    me: the number of this one.
    """

    def __init__(self, path: Path, processes: int, me: int) -> None:
        self._processes = processes
        self._me = me
        self.counts = Counts()
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._cells = memoryview(self._map).cast("q")
        self._floors_at = 2 + processes * len(COUNTED)
        self._rings_at = self._floors_at + KEYS * len(Floor) * processes
        self.counts = self.counts_of(me)  # of the one that was killed in this place

    @classmethod
    def create(cls, path: Path, processes: int) -> Ledger:
        cells = 2 + processes * len(COUNTED) + KEYS * len(Floor) * processes + KEYS * len(Floor) * RING
        path.write_bytes(bytes(8 * cells))
        ledger = cls(path, processes, 0)
        ledger._cells[1] = time.monotonic_ns() // 1000
        return ledger

    def close(self) -> None:
        self._cells.release()
        self._map.close()

    # --------------------------------------------------------------------------------------------------------- the run

    @property
    def stopped(self) -> bool:
        return bool(self._cells[0])

    def stop(self) -> None:
        """Tell all processes to come to an end."""
        self._cells[0] = 1

    def now_us(self) -> int:
        """The time since the ledger was made, the same in all processes."""
        return time.monotonic_ns() // 1000 - self._cells[1]

    # ---------------------------------------------------------------------------------------------------------- counts

    def publish(self) -> None:
        """Let the others see what this process has counted."""
        for at, count in enumerate(astuple(self.counts), self._counts_at(self._me)):
            self._cells[at] = count

    def counts_of(self, process: int) -> Counts:
        at = self._counts_at(process)
        return Counts(*self._cells[at : at + len(COUNTED)])

    def total(self) -> Counts:
        total = Counts()
        for process in range(self._processes):
            total.add(self.counts_of(process))
        return total

    def reads(self) -> int:
        """How many reads there were in all; a little less, since they are published now and then."""
        return sum(self._cells[self._counts_at(process)] for process in range(self._processes))

    def _counts_at(self, process: int) -> int:
        return 2 + process * len(COUNTED)

    # ---------------------------------------------------------------------------------------------------------- floors

    def acknowledge(self, versions: list[Version], *floors: Floor) -> None:
        """From now on nobody may read less."""
        for floor in floors:
            for key, version in versions:
                at = self._floor_at(key, floor) + self._me
                self._cells[at] = max(self._cells[at], version)
                self._cells[self._ring_at(key, floor, version)] = version << _TIME_BITS | self.now_us()

    def floors(self, key: int) -> Floors:
        at = self._floor_at(key, Floor.SECURED)
        step = self._processes
        secured, any_, naive = (max(self._cells[at + i * step : at + (i + 1) * step]) for i in range(len(Floor)))
        return Floors(self.now_us(), secured, any_, naive)

    def owner_of(self, floor: Floor, version: Version) -> int:
        """Which process has raised the floor of a row so far."""
        at = self._floor_at(version.key, floor)
        row = self._cells[at : at + self._processes].tolist()
        return max(range(self._processes), key=row.__getitem__)

    def lag_us(self, key: int, floor: Floor, read: int, floors: Floors) -> int:
        """How long before this read began the first version was acknowledged that is newer than what it got."""
        began = [
            cell & ((1 << _TIME_BITS) - 1)
            for version in range(max(read + 1, floors[1 + floor] - RING + 1), floors[1 + floor] + 1)
            if (cell := self._cells[self._ring_at(key, floor, version)]) >> _TIME_BITS == version
        ]
        return max(floors.began_us - min(began, default=floors.began_us), 0)

    def _floor_at(self, key: int, floor: Floor) -> int:
        return self._floors_at + (key * len(Floor) + floor) * self._processes

    def _ring_at(self, key: int, floor: Floor, version: int) -> int:
        return self._rings_at + (key * len(Floor) + floor) * RING + version % RING
