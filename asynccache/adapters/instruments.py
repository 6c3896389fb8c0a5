"""What is counted and measured of which event, whichever library does the counting.

A `Counter` grows by what an event says, a `Duration` is observed, a `Level` is set. Each is kept apart by its `labels`,
whose values are the event's fields of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, Literal

from asynccache import events
from asynccache.events import Event, NodeState

Label = Literal["model", "reason", "missing", "node", "state"]

DURATIONS_S: Final = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
"""Upper bounds of histograms: a hit in memory takes 10 µs, one in memcached 0.2 to 1 ms, a SELECT milliseconds, and a
lock at most `lock_timeout`, 1 s."""


@dataclass(frozen=True, slots=True)
class Counter:
    """amount: the field that it grows by; 1 if there is none."""

    name: str
    text: str
    unit: str
    labels: tuple[Label, ...] = ("model",)
    amount: Literal["rows", "slots"] | None = None


@dataclass(frozen=True, slots=True)
class Duration:
    """A histogram of the field `duration_s`."""

    name: str
    text: str
    labels: tuple[Label, ...] = ("model",)


@dataclass(frozen=True, slots=True)
class Level:
    """What is so now."""

    name: str
    text: str
    unit: str
    labels: tuple[Label, ...] = ()


Instrument = Counter | Duration | Level

Open = Callable[[Instrument, Mapping[str, str]], Callable[[float], object]]


def _rows(name: str, text: str, *labels: Label) -> Counter:
    return Counter(name, text, "row", ("model", *labels), "rows")


def _slots(name: str, text: str) -> Counter:
    return Counter(name, text, "slot", ("model",), "slots")


INSTRUMENTS: Final[Mapping[type[Event], Sequence[Instrument]]] = {
    events.Hit: (
        _rows("hits", "Rows that were served from the cache, or (missing) that there is no such row.", "missing"),
        Duration("hit_duration", "How long looks into the cache took that found rows."),
    ),
    events.Missed: (_rows("misses", "Rows that were looked for in the cache and not found."),),
    events.Loaded: (
        Counter("loads", "SELECTs that misses led to.", "select"),
        Duration("load_duration", "How long SELECTs that misses led to took, with the wait for a connection."),
    ),
    events.Coalesced: (_rows("coalesced", "Misses that were served by another task's load."),),
    events.Filled: (_rows("fills", "Rows, or their absence, that were stored."),),
    events.FillDropped: (_rows("fills_dropped", "Rows that were loaded and not stored.", "reason"),),
    events.Garbage: (_rows("garbage", "Values that could not be decoded."),),
    events.Bypassed: (_rows("bypassed", "Rows that were read past the cache.", "reason"),),
    events.Locked: (
        _slots("locks", "Slots that were locked before a COMMIT."),
        Duration("lock_duration", "How long locking took that a COMMIT waited for."),
    ),
    events.LockFailed: (_slots("locks_failed", "Slots that could not be locked in time."),),
    events.LockLost: (_slots("locks_lost", "Slots whose lock was gone when COMMIT had been answered."),),
    events.LockUnverified: (
        _slots("locks_unverified", "Slots that could not be looked at when COMMIT had been answered."),
    ),
    events.Unlocked: (_slots("unlocks", "Slots that were unlocked, or destroyed, after a COMMIT."),),
    events.Repaired: (_slots("repairs", "Slots that were unlocked or destroyed later than at their commit."),),
    events.RepairFailed: (_slots("repairs_failed", "Slots that were given up."),),
    events.RepairsChanged: (
        Level("repairs_owed", "Slots that were owed when repairs began; 0 when all is well.", "slot"),
    ),
    events.BackendFailed: (
        Counter("backend_errors", "Slots that the cache server gave no answer about.", "slot", (), "slots"),
    ),
    events.NodeChanged: (
        Counter("breakers", "How often a server's circuit breaker came into a state.", "change", ("node", "state")),
        Level(
            "node_away",
            "1 while a server's circuit breaker is not closed. There from when it first opened.",
            "node",
            ("node",),
        ),
    ),
}


class Recorders:
    """An observer that hands what events say to a library, one recorder for each instrument and its labels' values.

    open_: makes a recorder, once: it is given the instrument and its labels.
    """

    def __init__(self, open_: Open) -> None:
        self._of = {kind: [_Recorder(each, open_) for each in instruments] for kind, instruments in INSTRUMENTS.items()}

    def __call__(self, event: Event, /) -> None:
        for record in self._of.get(type(event), ()):
            record(event)


class _Recorder:
    def __init__(self, instrument: Instrument, open_: Open) -> None:
        self._instrument = instrument
        self._open = open_
        self._key: Callable[[Event], object] = attrgetter(*instrument.labels) if instrument.labels else _nothing
        self._value = _value_of(instrument)
        self._opened: dict[object, Callable[[float], object]] = {}

    def __call__(self, event: Event) -> None:
        key = self._key(event)
        record = self._opened.get(key)
        if record is None:
            labels: dict[str, str] = {name: _in_words(getattr(event, name)) for name in self._instrument.labels}
            record = self._opened[key] = self._open(self._instrument, labels)
        record(self._value(event))


def _nothing(_: Event) -> None:
    return None


def _value_of(instrument: Instrument) -> Callable[[Event], float]:
    """What an event adds, or shows."""
    match instrument:
        case Counter(amount=amount):
            return (lambda _: 1) if amount is None else attrgetter(amount)
        case Duration():
            return attrgetter("duration_s")
        case Level():
            return lambda event: event.owed if isinstance(event, events.RepairsChanged) else _is_away(event)


def _is_away(event: Event) -> float:
    return float(isinstance(event, events.NodeChanged) and event.state is not NodeState.CLOSED)


def _in_words(value: object) -> str:
    """A class by its qualified name, a state by its own, True and False in lower case."""
    match value:
        case type():
            return value.__qualname__
        case NodeState():
            return value.value
        case bool():
            return str(value).lower()
        case _:
            return str(value)
