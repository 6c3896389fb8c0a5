"""A bounded mapping from names to bytes that expire, evicted by S3-FIFO.

The policy is that of Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction" (SOSP 2023):

    new ----> small (a tenth) -- was read --> main (the rest) -- not read any more --> gone
                    |                          ^  '-- was read: once more round
                    '-- not read --> ghosts ---'  (only a hash is left; what comes back goes to main)

A scan goes through the small queue and leaves main alone, and a read moves nothing: it counts to three. To that come
pinned entries (locks, generations), which have a queue of their own and are evicted last, and expiry.

Entries are numbers, their fields lie in arrays, the queues are links between numbers ("structure of arrays"). So an
entry has no object of its own that the garbage collector would visit, leaves its queue in constant time, and can be
found by a hand that goes round and drops what has expired.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from math import inf
from typing import Final

from asynccache.backends.base import Key

ENTRY_BYTES: Final = 384
"""What an entry takes beside the characters of its name and value, as the process grows on CPython 3.11: the headers of
two `bytes`, its number, its place in the index and in the arrays (220 bytes together), and a ghost (150)."""

SMALL_SHARE: Final = 0.1
"""The paper's, which found it good on most of 6,594 traces."""

READS_MAX: Final = 3
"""The paper's: two bits. But where the paper lets into main what was read twice, one read does here: what has brought
an entry in was a miss, so that this is the second (0 to 2 % more hits on the traces of docs/memory.md)."""

HOPS_MAX: Final = 64
"""So many entries that were read are spared in a row; then the next goes, read or not. Without this bound one write
could go round all of main three times; with it the hit ratio is the same to a tenth of a percent."""

SWEPT_PER_WRITE: Final = 4
"""So many entries are looked at by each write to see whether they have expired, so that a quarter as many writes as
there are entries drop all that has."""

_SMALL, _MAIN, _PINNED = range(3)
"""The queues; also the numbers of the three entries that stand for their ends."""


class S3Fifo:
    """At most `entries_max` entries, which take at most `bytes_max` bytes as `size_of` counts them."""

    def __init__(self, entries_max: int, bytes_max: int) -> None:
        self.entries_max = entries_max
        self.bytes_max = bytes_max
        self.evictions = self.pinned_evictions = self.expirations = 0
        self._index: dict[bytes, int] = {}
        self._names = [b"", b"", b""]
        self._values = [b"", b"", b""]
        self._expires_s = array("d", [inf, inf, inf])
        self._reads = bytearray(3)
        self._queues = bytearray((_SMALL, _MAIN, _PINNED))
        self._next = array("q", (_SMALL, _MAIN, _PINNED))
        self._previous = array("q", (_SMALL, _MAIN, _PINNED))
        self._unused: list[int] = []
        self._entries_in = [0, 0, 0]
        self._bytes_in = [0, 0, 0]
        self._ghosts: set[int] = set()
        self._ghosts_by_age: deque[int] = deque()
        self._hand = 0

    def __len__(self) -> int:
        return len(self._index)

    @property
    def pinned(self) -> int:
        return self._entries_in[_PINNED]

    @property
    def bytes_used(self) -> int:
        return sum(self._bytes_in)

    @staticmethod
    def size_of(name: bytes, value: bytes) -> int:
        """How many bytes an entry counts for."""
        return ENTRY_BYTES + len(name) + len(value)

    def get_many(self, keys: Sequence[Key], now_s: float) -> list[bytes | None]:
        # The hit path of the library: written out, a call less for each key is a third less time.
        index, expires_s, reads, values = self._index, self._expires_s, self._reads, self._values
        found: list[bytes | None] = []
        for key in keys:
            entry = index.get(key.name)
            if entry is None:
                found.append(None)
            elif expires_s[entry] <= now_s:
                self._expire(entry)
                found.append(None)
            else:
                if reads[entry] < READS_MAX:
                    reads[entry] += 1
                found.append(values[entry])
        return found

    def put(self, name: bytes, value: bytes, expires_s: float, *, pinned: bool, now_s: float) -> None:
        """Store a value whose size is at most `bytes_max`, and drop others for it.

        Entries that are not pinned make room first, this one included; then the pinned ones that were written longest
        ago.
        """
        entry = self._index.get(name)
        if entry is not None and not pinned and self._queues[entry] != _PINNED:  # it keeps its place
            self._bytes_in[self._queues[entry]] += len(value) - len(self._values[entry])
            self._values[entry] = value
        else:
            if entry is None:
                entry = self._new(name)
            else:
                self._leave(entry)
            self._values[entry] = value
            self._link(entry, _PINNED if pinned else self._queue_of_newcomer(name))
        self._expires_s[entry] = expires_s
        self._reads[entry] = 0  # those of a lease that was looked after say nothing about the row that it is for
        self._sweep(now_s)
        self._make_room()

    # --------------------------------------------------------------------------------------------- eviction and expiry

    def _make_room(self) -> None:
        while len(self._index) > self.entries_max:
            self._evict(self._entries_in)
        while sum(self._bytes_in) > self.bytes_max:
            self._evict(self._bytes_in)

    def _evict(self, sizes_of: list[int]) -> None:
        """Drop one entry. `sizes_of` the queues are counted in what there is too much of."""
        hops = 0
        while True:
            small, main, _ = sizes_of
            queue = _SMALL if small > SMALL_SHARE * (small + main) else _MAIN if main else _PINNED
            entry = self._next[queue]
            if queue == _PINNED or not self._reads[entry] or hops == HOPS_MAX:
                break
            hops += 1
            self._reads[entry] -= 1
            self._unlink(entry)
            self._link(entry, _MAIN)
        self.evictions += 1
        if queue == _PINNED:
            self.pinned_evictions += 1
        elif queue == _SMALL:
            self._remember(self._names[entry])
        self._unlink(entry)
        self._free(entry)

    def _sweep(self, now_s: float) -> None:
        expires_s, entry = self._expires_s, self._hand
        for _ in range(SWEPT_PER_WRITE):
            entry = entry + 1 if entry + 1 < len(expires_s) else 0
            if expires_s[entry] <= now_s:
                self._expire(entry)
        self._hand = entry

    def _expire(self, entry: int) -> None:
        self.expirations += 1
        self._leave(entry)
        self._free(entry)

    def _queue_of_newcomer(self, name: bytes) -> int:
        ghost = hash(name)
        if ghost not in self._ghosts:
            return _SMALL
        self._ghosts.remove(ghost)
        return _MAIN

    def _remember(self, name: bytes) -> None:
        ghost = hash(name)
        self._ghosts.add(ghost)
        self._ghosts_by_age.append(ghost)
        if len(self._ghosts_by_age) > len(self._index):
            # It may have come back and gone again: then it is forgotten early, which costs one more round in small.
            self._ghosts.discard(self._ghosts_by_age.popleft())

    # ------------------------------------------------------------------------------------------------ entries and links

    def _new(self, name: bytes) -> int:
        if self._unused:
            entry = self._unused.pop()
            self._names[entry] = name
        else:
            entry = len(self._names)
            self._names.append(name)
            self._values.append(b"")
            self._expires_s.append(inf)
            self._reads.append(0)
            self._queues.append(_SMALL)
            self._next.append(entry)
            self._previous.append(entry)
        self._index[name] = entry
        return entry

    def _free(self, entry: int) -> None:
        del self._index[self._names[entry]]
        self._names[entry] = self._values[entry] = b""
        self._expires_s[entry] = inf
        self._unused.append(entry)

    def _leave(self, entry: int) -> None:
        """Leave the queue for another reason than want of room: what comes back to main from a commit, or after its
        `ttl`, need not prove itself again."""
        if self._queues[entry] == _MAIN:
            self._remember(self._names[entry])
        self._unlink(entry)

    def _link(self, entry: int, queue: int) -> None:
        last = self._previous[queue]
        self._next[last] = self._previous[queue] = entry
        self._previous[entry], self._next[entry] = last, queue
        self._queues[entry] = queue
        self._entries_in[queue] += 1
        self._bytes_in[queue] += self.size_of(self._names[entry], self._values[entry])

    def _unlink(self, entry: int) -> None:
        before, after, queue = self._previous[entry], self._next[entry], self._queues[entry]
        self._next[before], self._previous[after] = after, before
        self._entries_in[queue] -= 1
        self._bytes_in[queue] -= self.size_of(self._names[entry], self._values[entry])
