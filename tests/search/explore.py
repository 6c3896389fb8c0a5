"""The search itself: breadth first, so that what is found is told by one of the shortest ways there."""

from __future__ import annotations

import time
from array import array
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from tests.search.world import Broken, Scenario, Server, State, World


@dataclass(frozen=True)
class Found:
    """What a search found. broken: the first promise that does not hold, by one of the shortest ways there."""

    states: int
    local_steps: int
    seconds: float
    broken: Broken | None = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        figures = f"{self.states} states, {self.local_steps} steps of processes, {self.seconds:.1f} s"
        if self.broken is None:
            return f"holds: {figures}"
        steps = (f"{number:3}. {each}" for number, each in enumerate(self.trace, 1))
        return "\n".join([f"broken: {self.broken.promise} ({figures})", *steps, f"     {self.broken.how}"])


def search(scenario: Scenario, server: Server = "as it is", states_max: int = 10_000_000) -> Found:
    """Go through all states of a scenario, until a promise is broken.

    Raises AssertionError if there are more than `states_max`.
    """
    world = World(scenario, server)
    try:
        return _search(world, scenario, states_max)
    finally:
        world.close()


class _States:
    """The states that were reached, by number, and from which other each was first reached.

    They have most of their parts in common: a state is kept as the numbers of its parts.
    """

    def __init__(self, first: State) -> None:
        self._part_numbers: dict[Hashable, int] = {}
        self._parts: list[Hashable] = []
        self._numbers: dict[tuple[int, ...], int] = {}
        self._packed: list[tuple[int, ...]] = []
        self.came_from = array("l")
        _ = self.add(first, -1)

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, number: int) -> State:
        parts: list[Any] = [self._parts[each] for each in self._packed[number]]
        count = len(State._fields) - 1
        return State._make([*parts[:count], tuple(parts[count:])])

    def add(self, state: State, came_from: int) -> int:
        """Give its number; it is the last one if the state is new."""
        packed = tuple([self._part(each) for each in (*state[:-1], *state.processes)])
        number = self._numbers.setdefault(packed, len(self._packed))
        if number == len(self._packed):
            self._packed.append(packed)
            self.came_from.append(came_from)
        return number

    def _part(self, part: Hashable) -> int:
        number = self._part_numbers.setdefault(part, len(self._parts))
        if number == len(self._parts):
            self._parts.append(part)
        return number


def _search(world: World, scenario: Scenario, states_max: int) -> Found:
    began_s = time.perf_counter()
    states = _States(world.canonical(world.start()))
    fair: list[array[int]] = []
    """For each state, where things lead that happen sooner or later."""

    def found(broken: Broken | None = None, last: int = -1) -> Found:
        trace = _trace(world, states, last, broken) if broken is not None else ()
        return Found(len(states), world.local_steps, time.perf_counter() - began_s, broken, trace)

    while len(fair) < len(states):
        number = len(fair)
        state = states[number]
        goes_on = array("l")
        for each in world.nexts(state):
            if isinstance(each.state, Broken):
                return found(each.state, number)
            count = len(states)
            after = states.add(world.canonical(each.state), number)
            if each.fair and after != number:
                goes_on.append(after)
            if after == count:
                broken = world.judge(states[after])
                if broken is not None:
                    return found(broken, after)
        if not goes_on and not world.is_over(state):
            return found(Broken("nobody waits for ever", "nothing more happens"), number)
        fair.append(goes_on)
        assert len(states) <= states_max, f"{scenario.name}: more than {states_max} states"
    stuck = _never_over(world, states, fair)
    if stuck is not None:
        return found(Broken("nobody waits for ever", "from here on nothing leads to an end"), stuck)
    return found()


def _never_over(world: World, states: _States, fair: list[array[int]]) -> int | None:
    """A state from which no end can be reached, though everything happens that does sooner or later."""
    leads_here: list[array[int]] = [array("l") for _ in fair]
    for before, goes_on in enumerate(fair):
        for after in goes_on:
            leads_here[after].append(before)
    ends = [number for number in range(len(states)) if world.is_over(states[number])]
    seen = bytearray(len(states))
    for number in ends:
        seen[number] = True
    while ends:
        for before in leads_here[ends.pop()]:
            if not seen[before]:
                seen[before] = True
                ends.append(before)
    stuck = seen.find(False)
    return stuck if stuck >= 0 else None


def _trace(world: World, states: _States, last: int, broken: Broken) -> tuple[str, ...]:
    """The way there, told with ids that stay the same from step to step."""
    path: list[State] = []
    while last >= 0:
        path.append(states[last])
        last = states.came_from[last]
    world.tells = True
    state, told = world.start(), list[str]()
    for target in path[-2::-1]:
        for each in world.nexts(state):
            if isinstance(each.state, State) and world.canonical(each.state) == target:
                told.append(each.label)
                state = each.state
                break
        else:
            raise AssertionError("the search does not repeat itself")
    told += [each.label for each in world.nexts(state) if each.state == broken][:1]
    return tuple(told)
