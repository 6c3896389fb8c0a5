"""Who is at work, what its calls are to meet with, and what has happened: the decisions and the record of a history."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Actor:
    """An operation at work. What it leaves to be done in the background is done in its name.

    cache, statements, commits: a byte for each of its calls to the cache server, each of its statements and each
        COMMIT, in order; 0, also when there are no more, is a quick answer.
    excuse: what the database has refused it, and why its own error is no wonder.
    """

    name: str
    cache: Iterator[int] = field(default_factory=lambda: iter(b""))
    statements: Iterator[int] = field(default_factory=lambda: iter(b""))
    commits: Iterator[int] = field(default_factory=lambda: iter(b""))
    excuse: str = ""


_actor: ContextVar[Actor] = ContextVar("actor", default=Actor("nobody"))  # noqa: B039 - it has no fates to share


def actor() -> Actor:
    return _actor.get()


def act_as(someone: Actor) -> None:
    """To be run in the context of a new task."""
    _actor.set(someone)


def next_of(fates: Sequence[T], decisions: Iterator[int]) -> T:
    return fates[next(decisions, 0) % len(fates)]


class Event(NamedTuple):
    """Something that happened. text: formatted when somebody reads it, with `args`."""

    at_s: float
    who: str
    text: str
    args: tuple[object, ...]


class Trace(list[Event]):
    """All that happened, in order."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()
        self._now = now

    def note(self, text: str, *args: object) -> None:
        self.append(Event(self._now(), actor().name, text, args))

    def shown(self, show: Callable[[object], str]) -> str:
        """Numbered lines. show: how arguments are written."""
        return "\n".join(
            f"{number:4}  {event.at_s * 1000:9.1f} ms  {event.who:<22} {event.text.format(*map(show, event.args))}"
            for number, event in enumerate(self, 1)
        )


@contextmanager
def controlled(now: Callable[[], float]) -> Generator[None]:
    """Have all clocks show the simulation's time, and all randomness come from a fixed seed."""
    saved = time.monotonic, time.time, time.time_ns, os.urandom, random.getstate()
    chance = random.Random(0)
    epoch_s = 1_800_000_000
    time.monotonic = now
    time.time = lambda: epoch_s + now()
    time.time_ns = lambda: epoch_s * 1_000_000_000 + int(now() * 1_000_000_000)
    os.urandom = chance.randbytes
    random.seed(0)
    try:
        yield
    finally:
        time.monotonic, time.time, time.time_ns, os.urandom = saved[:4]
        random.setstate(saved[4])
