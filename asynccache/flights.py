"""One load per key and process: who leads, who waits, who may share the leader's row.

A flight is one load of one row. Its leader runs the SELECT on its own session; those who miss the same key meanwhile
wait. The rule of sharing makes the whole linearizable: **who asks after a commit never gets a row that was read
before it**. A waiter may be given the row if

- it asked before the SELECT began (an *early* waiter), or
- the leader's lease survived until the fill was checked (the row was *certified*: nobody committed a change since).

Without the second rule a herd that arrives during one long SELECT would need a second one; without the first a herd
would need one each whenever the cache is down or the slot is locked.

Waiters that may not share move on together, in one step, into the key's next flight, before its SELECT begins. One by
one they would be a convoy of SELECTs, or starve behind newcomers. Who is refused a second time loads for itself.

Plain data and synchronous steps, so that the code that runs in production is the code that is searched exhaustively:
a waiter is told its answer by a callable, which is `Future.set_result` in production. The idea of a flight is that of
Go's `singleflight`; from there also: take out of the table only what is yours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from asynccache.protocol import Lease

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Share:
    """Here is the row's record."""

    record: bytes


@dataclass(frozen=True, slots=True)
class Lead(Generic[K]):
    """Run this flight: its leader was cancelled, or there was none yet."""

    flight: Flight[K]


@dataclass(frozen=True, slots=True)
class ReadAgain:
    """The flight ended without a load, since somebody else's value appeared in the cache: read it."""


@dataclass(frozen=True, slots=True)
class LoadAlone:
    """Nobody's row may be shared with you a second time: load for yourself."""


Answer = Share | Lead[K] | ReadAgain | LoadAlone


@dataclass(slots=True, eq=False)
class Waiter(Generic[K]):
    """One who waits. `answer` is called exactly once, unless the waiter leaves first."""

    answer: Callable[[Answer[K]], None]
    flight: Flight[K] | None = None
    refused: bool = False

    def leave(self) -> None:
        """Stop waiting (cancelled, or out of patience)."""
        if self.flight is not None:
            self.flight.forget(self)


@dataclass(slots=True, eq=False)
class Flight(Generic[K]):
    """One load under way. Made and ended by `FlightTable`."""

    key: K
    table: FlightTable[K]
    early: dict[Waiter[K], None] = field(default_factory=dict)
    late: dict[Waiter[K], None] = field(default_factory=dict)
    loading: bool = False
    lease: Lease | None = None
    """Set by the leader once it holds one; a leader that takes over inherits it."""

    def join(self, waiter: Waiter[K]) -> None:
        waiter.flight = self
        (self.late if self.loading else self.early)[waiter] = None

    def forget(self, waiter: Waiter[K]) -> None:
        self.early.pop(waiter, None)
        self.late.pop(waiter, None)

    def begin_load(self) -> None:
        """The SELECT begins now: who joins from here on is late."""
        self.loading = True

    def share_early(self, record: bytes) -> None:
        """The row is there, read after the early waiters asked."""
        early, self.early = self.early, {}
        for waiter in early:
            waiter.answer(Share(record))

    def close(self) -> None:
        """Admit nobody any more. To be called before the certification is sent.

        1. The leader sends the check of its lease; it is answered "intact".
        2. A writer locks, commits, and is acknowledged.
        3. A newcomer asks. If it could still join, the certified row would be stale for it.
        """
        if self.table.flights.get(self.key) is self:
            del self.table.flights[self.key]

    def land(self, certified: bytes | None) -> None:
        """End the flight: with the record for all who wait if it was certified, else they move to the next one."""
        self.close()
        waiters = self._take_waiters()
        if certified is not None:
            for waiter in waiters:
                waiter.answer(Share(certified))
        else:
            self.table.move_on(self.key, waiters)

    def call_off(self) -> None:
        """End the flight without a load: what everybody waits for has appeared in the cache."""
        self.close()
        for waiter in self._take_waiters():
            waiter.answer(ReadAgain())

    def hand_over(self) -> bool:
        """The leader is cancelled: the next waiter leads, with the lease but without the row. False if nobody waits."""
        waiters = self._take_waiters()
        if not waiters:
            self.close()
            return False
        self.loading = False
        for waiter in waiters[1:]:
            self.join(waiter)
        waiters[0].answer(Lead(self))
        return True

    def _take_waiters(self) -> list[Waiter[K]]:
        waiters = [*self.early, *self.late]
        self.early, self.late = {}, {}
        return waiters


@dataclass(slots=True, eq=False)
class FlightTable(Generic[K]):
    """The flights of one process that can still be joined, by key."""

    flights: dict[K, Flight[K]] = field(default_factory=dict)

    def lead(self, key: K) -> Flight[K]:
        """Start a flight. The key must have none."""
        assert key not in self.flights, f"a second flight for {key!r}"
        flight = self.flights[key] = Flight(key, self)
        return flight

    def move_on(self, key: K, waiters: list[Waiter[K]]) -> None:
        """Put the refused into the key's next flight, all in one step; those refused before load for themselves."""
        moving = []
        for waiter in waiters:
            if waiter.refused:
                waiter.answer(LoadAlone())
            else:
                waiter.refused = True
                moving.append(waiter)
        if not moving:
            return
        flight = self.flights.get(key)
        if flight is not None:
            for waiter in moving:
                flight.join(waiter)
            return
        flight = self.lead(key)
        for waiter in moving[1:]:
            flight.join(waiter)
        moving[0].answer(Lead(flight))
