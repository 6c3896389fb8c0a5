"""All that one process can do: each of its steps is run once, and remembered."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from asynccache.backends.base import UNCONFIRMED, UNREADABLE, UNSENT, Applied
from asynccache.settings import Settings
from tests.search.loop import untyped
from tests.search.process import Actor, Call, Event, Process
from tests.search.slots import UNASKED, UNREAD, Content, decode, encode


class Step(NamedTuple):
    """What a process does when something comes to it.

    node: what it is in the middle of then.
    ids: which ids it holds then: by number among those that it held and those that came, or -1, -2, ... for new ones.
    calls: for each call that is then under way, its number before, or -1 if it is new.
    notices: what sessions were given, and which commits were acknowledged.
    """

    node: int
    ids: tuple[int, ...]
    calls: tuple[int, ...]
    notices: tuple[tuple[Any, ...], ...]


@dataclass(slots=True)
class Node:
    """What a process may be in the middle of.

    shared: what its tasks share: the flights, the doubts, the debts.
    owners: for each call that is a COMMIT, the owner of its locks, by number.
    guards: the owners of locks under which a COMMIT is still to be answered.
    came_from: one way to get there: a node, and what came then.
    """

    shared: Hashable
    ids: list[bytes]
    calls: list[Call]
    owners: list[int | None]
    guards: list[int]
    timers: list[float]
    tasks: list[str]
    has_flights: bool
    owes_later: bool
    came_from: tuple[int, Event] | None
    live: Process | None
    steps: dict[Event, Step] = field(default_factory=dict)
    writes: dict[tuple[int, int, Content], Content] = field(default_factory=dict)


class Automaton:
    """All that one process can do, found out as the search goes on."""

    def __init__(self, actors: Sequence[Actor], settings: Settings) -> None:
        self.actors = actors
        self._settings = settings
        self._strangers = itertools.count()
        self._numbers: dict[Hashable, int] = {}
        self.nodes: list[Node] = []
        self._node_of(Process(actors, settings), None)

    def step(self, number: int, event: Event, count: int) -> Step:
        """What this node does when this comes.

        event: the slots in it number their ids: those that the node holds first, then those that are new to it.
        count: how many ids these are in all.
        """
        node = self.nodes[number]
        step = node.steps.get(event)
        if step is None:
            step = node.steps[event] = self._run(number, event, count)
        return step

    def write(self, number: int, call: int, change: int, found: Content) -> Content:
        """What a change of an `apply` makes of a slot; the ids are numbered as for `step`. `found` itself: nothing."""
        node = self.nodes[number]
        key = (call, change, found)
        if key not in node.writes:
            names = [*node.ids, *self._names(len(found.ids) if found is not None else 0)]
            write = node.calls[call].changes[change].transition(decode(found, names))
            numbers = {name: at for at, name in enumerate(names)}
            node.writes[key] = encode(write.value, numbers) if write is not None else found
        return node.writes[key]

    def close(self) -> None:
        """Let go of what was left under way."""
        for node in self.nodes:
            if node.live is not None:
                node.live.loop.abandon()
                node.live = None

    def _names(self, count: int) -> list[bytes]:
        return [b"id9%09d" % next(self._strangers) for _ in range(count)]

    def _run(self, number: int, event: Event, count: int) -> Step:
        node = self.nodes[number]
        process, node.live = node.live or self._replay(number), None
        names = [*node.ids, *self._names(count - len(node.ids))]
        if event[0] == "answer":
            call = node.calls[event[1]]
            event = ("answer", event[1], tuple(_result(call, each, names) for each in event[2]), *event[3:])
        before = list(process.wire.calls)
        process.notices.clear()
        process.feed(event)
        target, ids = self._node_of(process, (number, event))
        numbers = {name: at for at, name in enumerate(names)}
        sources: list[int] = []
        for each in ids:
            sources.append(numbers.setdefault(each, -1 - sum(source < 0 for source in sources)))
        calls = tuple(before.index(each) if each in before else -1 for each in process.wire.calls)
        notices = tuple(process.notices)
        if self.nodes[target].live is not process:
            process.loop.abandon()
        return Step(target, tuple(sources), calls, notices)

    def _replay(self, number: int) -> Process:
        events: list[Event] = []
        at = self.nodes[number].came_from
        while at is not None:
            events.append(at[1])
            at = self.nodes[at[0]].came_from
        process = Process(self.actors, self._settings)
        for event in reversed(events):
            process.feed(event)
        return process

    def _node_of(self, process: Process, came_from: tuple[int, Event] | None) -> tuple[int, list[bytes]]:
        shared, rest, ids = process.frozen()
        number = self._numbers.get((shared, rest))
        if number is None:
            number = self._numbers[shared, rest] = len(self.nodes)
            numbers = {name: at for at, name in enumerate(ids)}
            calls = list(process.wire.calls)
            self.nodes.append(
                Node(
                    shared=shared,
                    ids=ids,
                    calls=calls,
                    owners=[numbers.get(call.owner) for call in calls],
                    guards=[numbers[owner] for owner in process.guards if owner in numbers],
                    timers=[timer.when() for timer in process.loop.timers],
                    tasks=[task.get_name() for task in process.loop.tasks],
                    has_flights=bool(untyped(process.reads)._flights.flights),
                    owes_later=process.owes_later,
                    came_from=came_from,
                    live=process,
                )
            )
        return number, ids


def _result(call: Call, result: Any, names: Sequence[bytes]) -> Any:
    if call.kind == "read":
        return decode(result, names)
    if call.kind == "apply":
        if result in (UNREAD, UNASKED):
            return UNCONFIRMED if result == UNREAD else UNSENT
        return Applied(UNREADABLE, decode(result, names))  # nobody asks what a slot was before
    return result
