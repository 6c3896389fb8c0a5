"""Which rows stay: hit ratios of the memory backend's policy and of libraries that might have taken its place.

Run it by `nox -s bench-eviction`, or `python -m benchmarks.eviction` in the root of the project. There is no session
and no database. The traces are drawn here, and are the same for all. A hit is a hit on a busy machine, too. A miss
does as the read path does: it stores a lease, looks after it, and stores the row if the lease is still there; in
brackets, it just stores the row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final, Protocol

import cachebox
import cachetools
import moka_py
import theine
from rich.console import Console
from rich.table import Table

from asynccache.backends._s3fifo import S3Fifo
from asynccache.backends.base import Key

ROWS: Final = 50_000
READS: Final = 300_000
SIZES: Final = (500, 5000)

Trace = Sequence[tuple[bytes, bool]]
"""Which row is read, and whether that counts: what a scan reads does not."""


class Policy(Protocol):
    def get(self, name: bytes) -> bytes | None: ...

    def set(self, name: bytes, value: bytes) -> None: ...


class Ours:
    def __init__(self, size: int) -> None:
        self._slots = S3Fifo(size, 1 << 60)

    def get(self, name: bytes) -> bytes | None:
        (value,) = self._slots.get_many([Key(name, 0)], 0.0)
        return value

    def set(self, name: bytes, value: bytes) -> None:
        self._slots.put(name, value, 1.0, pinned=False, now_s=0.0)


class Mapping:
    def __init__(self, mapping: cachetools.Cache | cachebox.LRUCache | cachebox.LFUCache) -> None:
        self.get = mapping.get
        self.set = mapping.__setitem__


class Theine:
    def __init__(self, size: int) -> None:
        self._cache = theine.Cache(size)
        self.set = self._cache.set

    def get(self, name: bytes) -> bytes | None:
        return self._cache.get(name)[0]


POLICIES: Final[dict[str, Callable[[int], Policy]]] = {
    "ours (S3-FIFO)": Ours,
    "cachetools LRU": lambda size: Mapping(cachetools.LRUCache(size)),
    "cachetools LFU": lambda size: Mapping(cachetools.LFUCache(size)),
    "cachebox LRU": lambda size: Mapping(cachebox.LRUCache(size)),
    "cachebox LFU": lambda size: Mapping(cachebox.LFUCache(size)),
    "moka-py": moka_py.Moka,
    "theine": Theine,
}


def zipf(exponent: float) -> list[bytes]:
    weights = list(accumulate(1 / rank**exponent for rank in range(1, ROWS + 1)))
    return [b"row-%d" % row for row in random.Random(1).choices(range(ROWS), cum_weights=weights, k=READS)]


def with_scans(names: Sequence[bytes]) -> Iterator[tuple[bytes, bool]]:
    """After each 20,000 reads, 10,000 rows that are read once."""
    for number, name in enumerate(names):
        if number % 20_000 == 0:
            yield from ((b"scan-%d-%d" % (number, each), False) for each in range(10_000))
        yield name, True


def drifting(names: Sequence[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each row is out of fashion after 50,000 reads of all, and another one is in its place."""
    for number, name in enumerate(names):
        yield b"%b-%d" % (name, (number + 1000 * (sum(name) % 50)) // 50_000), True


def traces(size: int) -> Iterator[tuple[str, Trace]]:
    yield "Zipf 0.8", [(name, True) for name in zipf(0.8)]
    yield "Zipf 1.0", [(name, True) for name in zipf(1.0)]
    yield "Zipf 1.0, scans", list(with_scans(zipf(1.0)))
    yield "Zipf 1.0, drifting", list(drifting(zipf(1.0)))
    yield "a loop of 1.2 × the size", [(b"%d" % (number % (size * 6 // 5)), True) for number in range(100_000)]


def hit_ratio(policy: Policy, trace: Trace, *, leases: bool) -> float:
    hits = 0
    for name, counts in trace:
        if policy.get(name) is not None:
            hits += counts
            continue
        if leases:
            policy.set(name, b"lease")
        if not leases or policy.get(name) is not None:
            policy.set(name, b"row")
    return hits / sum(counts for _, counts in trace)


def main() -> None:
    table = Table("reads", "entries", *POLICIES)
    for size in SIZES:
        for title, trace in traces(size):
            table.add_row(
                title,
                f"{size:,}",
                *(
                    f"{hit_ratio(make(size), trace, leases=True):.1%} "
                    f"({hit_ratio(make(size), trace, leases=False):.1%})"
                    for make in POLICIES.values()
                ),
            )
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
