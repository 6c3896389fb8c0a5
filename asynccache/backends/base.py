"""The backend contract: read many slots, apply a transition to each of many.

There is no `set` and no `delete`. A blind write is how a stale value gets in, so that every write is a pure function
of what it finds, applied atomically: compare-and-set on memcached, a function call in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from asynccache.backends.report import NodeReport, report_unchecked

UNREADABLE = b"\xac?"
"""What `Backend.get_many` gives for a slot that it could not read: no kind of slot that any version writes, which the
protocol treats as locked (read the database, store nothing)."""


class Key(NamedTuple):
    """The address of a slot.

    name: 1 to 250 bytes of printable ASCII without spaces, made by this library alone.
    route: keys with the same route live on the same server, so that a slot and its generation are one round trip.
    """

    name: bytes
    route: int


class Write(NamedTuple):
    """What a transition wants to store: the bytes, seconds to live, and whether it may be evicted like a value.

    ttl_s: more than 0. A server that counts whole seconds rounds it up, and pinned ones by one second more.
    pinned: locks, holds and generations, which a bounded store evicts last.
    """

    value: bytes
    ttl_s: float
    pinned: bool = False


Transition = Callable[[bytes | None], Write | None]
"""What was found (None: absent) -> what replaces it (None: leave it). Pure; may be called more than once."""


class Change(NamedTuple):
    """A transition to apply to one slot.

    absent: a hint that the slot was just seen absent, so that an `add` may be tried before reading it again.
    """

    key: Key
    transition: Transition
    absent: bool = False


class Applied(NamedTuple):
    """What became of a `Change`: the slot before and after, as far as the backend knows.

    confirmed: False when the answer never came. The change may still have happened, now or a little later;
        `before` and `after` are then `UNREADABLE`.
    sent: False when the server is known to be away, so that it was not asked and it is not worth asking again at once.
    """

    before: bytes | None
    after: bytes | None
    confirmed: bool = True
    sent: bool = True


UNCONFIRMED = Applied(UNREADABLE, UNREADABLE, confirmed=False)
UNSENT = Applied(UNREADABLE, UNREADABLE, confirmed=False, sent=False)


class NodeState(Enum):
    """Whether a server is asked: a circuit breaker (Nygard, "Release It!", 2007) stands before each."""

    CLOSED = "closed"
    """It answers, and is asked."""
    OPEN = "open"
    """It did not answer several times in a row. It is not asked, and nobody waits for it."""
    HALF_OPEN = "half-open"
    """One probe is on its way to it, and nothing else."""


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A server was found to be away, is probed, or is back.

    node: its name, as the backend writes it; never a password.
    reason: the error that it was found away with, as text; empty when it is back.
    """

    node: str
    state: NodeState
    reason: str = ""


class Backend(Protocol):
    """A place for slots. Implementations must be usable before any event loop runs, connect on first use, and notice
    by themselves that they are used on another event loop than before (the old one has ended).

    answers_within_s: seconds in which each call has ended, whatever happens. Who has more patience than that sets no
        timer; and where it is 0, what could be left to the background is done at once.

    Where it is 0 there may also be `get_many_now`, which gives what `get_many` does without being awaited, and is then
    called instead.
    """

    answers_within_s: float = math.inf

    def observe(self, observer: Callable[[NodeChanged], None]) -> None:
        """Tell this observer, which does not raise, of servers that go away and come back. A backend that has no
        servers leaves it as it is here."""
        _ = observer

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        """Give each slot's bytes, in the order of `keys`: None where absent, `UNREADABLE` where the server that holds
        it did not answer in time. Trouble with a server is not raised."""
        ...

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        """Apply each transition atomically to what its slot holds, calling it again when somebody else was faster;
        all in one batch, each on its own. Trouble with a server is `UNCONFIRMED`, not raised. A value that the server
        refuses (too large) leaves the slot as it was, confirmed."""
        ...

    def node_of(self, key: Key) -> str:  # noqa: ARG002
        """The name of the server that holds this slot; never a password."""
        return repr(self)

    async def check(self, *, lock_ttl_s: float) -> Sequence[NodeReport]:  # noqa: ARG002
        """Ask each server how it is, and say what that means where locks live as long as `lock_ttl_s` has them live.
        Trouble with a server is in its report, not raised. What does not define this says that it cannot tell."""
        return [report_unchecked(self)]

    async def aclose(self) -> None:
        """Let go of connections. Cannot be used afterwards."""
        ...
