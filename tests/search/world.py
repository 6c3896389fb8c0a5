"""Processes, a cache server, a database and their faults: all that can happen next, and what must hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from asynccache import protocol
from asynccache.backends.base import Key
from asynccache.settings import Settings
from tests.search.automaton import Automaton, Node, Step
from tests.search.process import (
    ENTITIES,
    GENERATION,
    LEADS_TO_ROW,
    SETTINGS,
    TICK_MS,
    UNIQUES,
    Actor,
    Call,
    Event,
    Reader,
    Seeker,
    Writer,
)
from tests.search.slots import (
    BLANK,
    FREE,
    HOLD,
    UNASKED,
    UNREAD,
    Content,
    Slot,
    as_bytes,
    deadline_ms,
    is_locked,
    record_of,
    tell,
    version_of,
    why_endless,
)

Promise = Literal[
    "no stale hit",
    "no stale share",
    "no stale value stays",
    "locks end",
    "nobody waits for ever",
    "flights end",
]


class Faults(NamedTuple):
    """How often each of these may happen in one run, at any time.

    evictions: a value, a lease or a generation is evicted, or expires.
    lock_evictions: a lock is lost before its COMMIT was answered. (Once it was, locks may expire at any time.)
    restarts: the server loses everything.
    calm_restarts: the same, while no lock guards a COMMIT.
    silences: it does not answer a call; a change may then still land as long as its slot is as it was found.
    refusals: it is known to be away when a change is to be made, so that it is not asked.
    lock_failures: `lock_timeout` passes.
    cuts: a COMMIT is not answered. It lands later, or never.
    deaths: a process dies in the middle of something.
    cancels: a task is cancelled.
    ticks: half a `lock_ttl` passes while no COMMIT and no call is under way. If 0, dead locks may expire at any time.
    """

    evictions: int = 0
    lock_evictions: int = 0
    restarts: int = 0
    calm_restarts: int = 0
    silences: int = 0
    refusals: int = 0
    lock_failures: int = 0
    cuts: int = 0
    deaths: int = 0
    cancels: int = 0
    ticks: int = 0


NO_FAULTS = Faults()


@dataclass(frozen=True)
class Scenario:
    """A small world.

    reads: whether the slots that one call reads are read at one moment, or one after the other, other things happening
        in between, forwards (an entity, then its generation) or backwards.
    warm: whether the cache holds each row's first version when it begins, and where keys lead to.
    replica: whether SELECTs read from a replica, which lags behind, but for less than `hold_off`.
    """

    name: str
    processes: tuple[tuple[Actor, ...], ...]
    faults: Faults = NO_FAULTS
    settings: Settings = SETTINGS
    reads: Literal["at once", "forwards", "backwards"] = "at once"
    warm: bool = False
    replica: bool = False


Server = Literal["as it is", "writes blindly", "has one connection for gets and another for cas"]
"""How the cache server treats changes that land late.

as it is: they are refused unless the slot is as it was found (`add`, `cas`), and none survives a restart.
writes blindly: they are never refused, as if they were a `set`.
has one connection for gets and another for cas: a `cas` may survive a restart, after which versions begin again.
"""


class Late(NamedTuple):
    """A change under way for which nobody waits any more.

    onto: on what it may land: on nothing, on what its `gets` found, on anything that is there, on whatever.
    """

    slot: int
    onto: Literal["nothing", "found", "anything", "whatever"]
    content: Slot


class Underway(NamedTuple):
    """A COMMIT under way of which nobody will hear."""

    rows: tuple[int, ...]
    owner: int
    process: int


class ProcessState(NamedTuple):
    """node: of its automaton; -1 if it is dead.
    ids: the ids that it holds, for the numbers in its node.
    results: for each call that it waits for, what came of it so far.
    floors: for each actor, for each row the version below which it must not be given any; () if it asks for nothing.
    left: for each actor, how often it will still do what it does.
    acknowledged: for each row, the latest version of which this process has told somebody.
    """

    node: int
    ids: tuple[int, ...]
    results: tuple[tuple[Any, ...], ...]
    floors: tuple[tuple[int, ...], ...]
    left: tuple[int, ...]
    acknowledged: tuple[int, ...]


class State(NamedTuple):
    """rows: the version of each row that is committed.
    selectable: that which a SELECT sees; the same but for a lagging replica.
    acknowledged: the latest versions of which everybody may know that they were committed.
    ids: how many ids there are; they are numbered from 0.
    """

    slots: tuple[Content, ...]
    rows: tuple[int, ...]
    selectable: tuple[int, ...]
    acknowledged: tuple[int, ...]
    late: tuple[Late, ...]
    underway: tuple[Underway, ...]
    faults: Faults
    ticks: int
    ids: int
    processes: tuple[ProcessState, ...]


class Broken(NamedTuple):
    """A promise that does not hold."""

    promise: Promise
    how: str


class Next(NamedTuple):
    """Something that can happen. fair: it happens sooner or later unless something else does; faults are not."""

    label: str
    fair: bool
    state: State | Broken


class World:
    """All that can happen in a scenario."""

    def __init__(self, scenario: Scenario, server: Server) -> None:
        self._scenario = scenario
        self._server = server
        shared: dict[tuple[Actor, ...], Automaton] = {}
        self._automata = [
            shared.setdefault(actors, Automaton(actors, scenario.settings)) for actors in scenario.processes
        ]
        actors = [actor for process in scenario.processes for actor in process]
        count = 1 + max(row for actor in actors for row in actor.rows)
        self._seekers = {actor.name: actor for actor in actors if isinstance(actor, Seeker)}
        sought = {actor.value for actor in self._seekers.values()}
        locked = {key for actor in actors if isinstance(actor, Writer) for key in actor.locks}
        uniques = [key for value, key in UNIQUES.items() if value in sought or key in locked]
        self._keys: list[Key] = [*ENTITIES[:count], *uniques, GENERATION]
        self._rows = range(count)
        self.tells = False
        """Whether labels are made; they cost time."""

    def start(self) -> State:
        none = tuple(0 for _ in self._rows)
        processes = tuple(
            ProcessState(
                node=0,
                ids=(),
                results=(),
                floors=tuple(() for _ in actors),
                left=tuple(actor.times for actor in actors),
                acknowledged=none,
            )
            for actors in self._scenario.processes
        )
        slots: tuple[Content, ...] = tuple(None for _ in self._keys)
        if self._scenario.warm:
            generation = Slot(protocol.opened(BLANK), (0,))
            rows = [record_of(0, exists=bool(self._seekers))] * len(self._rows)
            had = {UNIQUES[each.value] for each in self._seekers.values() if each.history[0] == each.value}
            leads = [LEADS_TO_ROW if key in had else protocol.MISSING for key in self._keys[len(rows) : -1]]
            values = [generation._replace(shape=generation.shape + record) for record in rows + leads]
            slots = (*values, generation)
        ids = int(self._scenario.warm)
        return State(slots, none, none, none, (), (), self._scenario.faults, 0, ids, processes)

    def close(self) -> None:
        for automaton in self._automata:
            automaton.close()

    @property
    def local_steps(self) -> int:
        return sum(len(node.steps) for automaton in set(self._automata) for node in automaton.nodes)

    # ---------------------------------------------------------------------------------------------------- what happens

    def nexts(self, state: State) -> Iterator[Next]:
        for number in range(len(state.processes)):
            if state.processes[number].node >= 0:
                yield from self._process_acts(state, number)
        yield from self._database_acts(state)
        yield from self._server_acts(state)

    def _process_acts(self, state: State, number: int) -> Iterator[Next]:
        process, node = state.processes[number], self._node(state, number)
        for at, call in enumerate(node.calls):
            if len(process.results[at]) < self._size(node, at):
                yield from self._proceed(state, number, at)
                if call.kind in ("read", "apply") and state.faults.silences:
                    yield from self._silence(state, number, at)
                if call.kind == "apply" and state.faults.refusals and not process.results[at]:
                    yield from self._refuse(state, number, at)
                if call.kind == "commit" and state.faults.cuts:
                    yield from self._cut(state, number, at)
            else:
                yield from self._answer(state, number, at)
        for at, delay_s in enumerate(node.timers):
            yield from self._time_passes(state, number, at, delay_s)
        if self._may_lapse(state, number):
            label = f"for {self._names(number)} {self._scenario.settings.lock_ttl_s:.3g} s pass" if self.tells else ""
            yield from self._step(state, number, ("lapse", state.ticks), label)
        actors = self._scenario.processes[number]
        for at, actor in enumerate(actors):
            if self._may_begin(state, number, at) and actor.name not in node.tasks:
                yield from self._begin(state, number, at)
            if state.faults.cancels and actor.name in node.tasks:
                spent = _spend(state, cancels=1)
                label = f"{actor.name} is cancelled" if self.tells else ""
                yield from self._step(spent, number, ("cancel", at, state.ticks), label, fair=False)
        if state.faults.deaths and node.tasks:
            yield from self._die(state, number)

    def _may_begin(self, state: State, number: int, at: int) -> bool:
        """Whether there is something left to do, and the row is as it is to be for that."""
        actor = self._scenario.processes[number][at]
        is_its_turn = not isinstance(actor, (Reader, Writer)) or actor.after in (None, state.rows[0])
        return state.processes[number].left[at] > 0 and is_its_turn

    def _begin(self, state: State, number: int, at: int) -> Iterator[Next]:
        process, actor = state.processes[number], self._scenario.processes[number][at]
        floor = tuple(map(max, state.acknowledged, process.acknowledged))
        begun = process._replace(
            left=_put(process.left, at, process.left[at] - 1),
            floors=_put(process.floors, at, floor) if isinstance(actor, (Reader, Seeker)) else process.floors,
        )
        verb = "asks" if isinstance(actor, (Reader, Seeker)) else "begins"
        label = f"{actor.name} {verb}" if self.tells else ""
        for each in self._step(_put_process(state, number, begun), number, ("begin", at, state.ticks), label):
            if isinstance(actor, (Reader, Seeker)) and isinstance(each.state, State):
                # Its look into the cache at once: to have asked earlier only means to be content with older rows.
                node = self._node(each.state, number)
                for look in self._proceed(each.state, number, len(node.calls) - 1):
                    yield look._replace(label=look.label.replace(" reads", " asks and reads", 1))
                if state.faults.silences:
                    yield from self._silence(each.state, number, len(node.calls) - 1)
            else:
                yield each

    def _proceed(self, state: State, number: int, at: int) -> Iterator[Next]:
        """A call gets on: the server or the database does what it asks for, or the next part of it."""
        process, node = state.processes[number], self._node(state, number)
        call, done = node.calls[at], process.results[at]
        results: tuple[Any, ...]
        label = ""
        if call.kind == "read":
            order = range(len(call.keys)) if self._scenario.reads != "backwards" else range(len(call.keys))[::-1]
            part = order if self._scenario.reads == "at once" else order[len(done) : len(done) + 1]
            results = (*done, *(state.slots[self._keys.index(call.keys[each])] for each in part))
            if self.tells:
                slots = [self._keys.index(call.keys[each]) for each in part]
                seen = ", ".join(self._tell(slot, state.slots[slot]) for slot in slots)
                label = f"{self._who(number, call)} reads {seen}"
        elif call.kind == "apply":
            slot = self._keys.index(call.keys[len(done)])
            found = state.slots[slot]
            content = self._changed(state, number, at, len(done), found)
            results = (*done, content)
            label = f"{self._who(number, call)} {self._tell_change(slot, found, content)}" if self.tells else ""
            if content != found:
                wrong = why_endless(found, content, process.ids, state.ticks * TICK_MS)
                if wrong is not None:
                    yield Next(label, True, Broken("locks end", wrong))
                    return
                state = _write(state, slot, content)
        else:
            state = self._commit(state, call.rows)
            results = tuple(state.rows[row] for row in call.rows)
            label = f"{self._who(number, call)} COMMITs {', '.join(map(_version, results))}" if self.tells else ""
        process = process._replace(results=_put(process.results, at, results))
        state = _put_process(state, number, process)
        if len(results) == self._size(node, at) and self._may_hurry(state, number, at):
            yield from self._answer(state, number, at, label)
        else:
            yield Next(label, True, state)

    def _may_hurry(self, state: State, number: int, at: int) -> bool:
        """Whether an answer may come at once, since nothing that can come to the process before it makes a difference.

        Either nothing can, or what the answer leads to is a matter of its own task: nobody else's, and no call.
        """
        process, node = state.processes[number], self._node(state, number)
        if state.faults.cancels:
            return False
        if self._may_lapse(state, number):
            return False
        if any(self._matters(state, number, at, delay_s) for at, delay_s in enumerate(node.timers)):
            return False
        actors = zip(process.left, self._scenario.processes[number], strict=True)
        if len(node.calls) == 1 and not any(left and actor.name not in node.tasks for left, actor in actors):
            return True
        step, _ = self._take(state, number, ("answer", at, process.results[at], -1, state.ticks))
        return len(step.calls) < len(node.calls) and self._automata[number].nodes[step.node].shared == node.shared

    def _answer(self, state: State, number: int, at: int, label: str = "") -> Iterator[Next]:
        node = self._node(state, number)
        call, results = node.calls[at], state.processes[number].results[at]
        label = label or (self._tell_answer(number, call, results) if self.tells else "")
        yield from self._step(state, number, ("answer", at, results, -1, state.ticks), label)
        if state.faults.cancels:
            spent = _spend(state, cancels=1)
            for who, actor in enumerate(self._scenario.processes[number]):
                if actor.name in node.tasks:
                    told = f"{label}; in the same moment {actor.name} is cancelled" if self.tells else ""
                    yield from self._step(spent, number, ("answer", at, results, who, state.ticks), told, fair=False)

    def _silence(self, state: State, number: int, at: int) -> Iterator[Next]:
        process, node = state.processes[number], self._node(state, number)
        call, done = node.calls[at], process.results[at]
        spent = _spend(state, silences=1)
        known = () if call.kind == "read" else done
        results = (*known, *(UNREAD,) * (len(call.keys) - len(known)))
        label = f"{self._who(number, call)} gets no answer ({call.kind})" if self.tells else ""
        event: Event = ("answer", at, results, -1, state.ticks)
        yield from self._step(spent, number, event, label, fair=False)
        late = self._late(state, number, at)
        if late is not None:
            label = f"{label}; its change of {self._tell(late.slot, late.content)} is under way" if self.tells else ""
            yield from self._step(_add_late(spent, late), number, event, label, fair=False)

    def _refuse(self, state: State, number: int, at: int) -> Iterator[Next]:
        call = self._node(state, number).calls[at]
        label = f"{self._who(number, call)} is told that the server is away" if self.tells else ""
        event: Event = ("answer", at, (UNASKED,) * len(call.keys), -1, state.ticks)
        yield from self._step(_spend(state, refusals=1), number, event, label, fair=False)

    def _cut(self, state: State, number: int, at: int) -> Iterator[Next]:
        call = self._node(state, number).calls[at]
        cut = self._lose(_spend(state, cuts=1), number, at)
        label = f"{self._who(number, call)} is cut off from the database, its COMMIT under way" if self.tells else ""
        yield from self._step(cut, number, ("fail", at, state.ticks), label, fair=False, answered=at)

    def _time_passes(self, state: State, number: int, at: int, delay_s: float) -> Iterator[Next]:
        if not self._may_pass(state, delay_s):
            return
        what = f"for {self._names(number)} {delay_s:.3g} s pass"
        settings = self._scenario.settings
        if delay_s == settings.lock_timeout_s:
            spent = _spend(state, lock_failures=1)
            yield from self._step(spent, number, ("timer", at, False, state.ticks), what, fair=False)
            return
        yield from self._step(state, number, ("timer", at, False, state.ticks), what)
        if delay_s == settings.poll_max_s * 1.5:
            told = f"{what}; it has waited long enough" if self.tells else ""
            yield from self._step(state, number, ("timer", at, True, state.ticks), told)

    def _may_pass(self, state: State, delay_s: float) -> bool:
        settings = self._scenario.settings
        if delay_s == settings.lock_timeout_s:
            return state.faults.lock_failures > 0
        return True

    def _matters(self, state: State, number: int, at: int, delay_s: float) -> bool:
        """Whether a timer can change anything: what is owed is looked at again and again, due or not."""
        if not self._may_pass(state, delay_s):
            return False
        node = self._node(state, number)
        step, _ = self._take(state, number, ("timer", at, False, state.ticks))
        return step.node != state.processes[number].node or step.ids != tuple(range(len(node.ids)))

    def _may_lapse(self, state: State, number: int) -> bool:
        """Whether `lock_ttl` may pass, by when each COMMIT of this process has an outcome."""
        node = self._node(state, number)
        return node.owes_later and not node.guards and all(each.process != number for each in state.underway)

    def _die(self, state: State, number: int) -> Iterator[Next]:
        process, node = state.processes[number], self._node(state, number)
        state = _spend(state, deaths=1)
        for at in range(len(node.calls)):
            state = self._lose(state, number, at)
        dead = ProcessState(-1, (), (), tuple(() for _ in process.floors), tuple(0 for _ in process.left), ())
        name = self._scenario.processes[number][0].name
        yield Next(f"the process of {name} dies", False, _put_process(state, number, dead))

    def _database_acts(self, state: State) -> Iterator[Next]:
        for at, each in enumerate(state.underway):
            rest = state._replace(underway=state.underway[:at] + state.underway[at + 1 :])
            yield Next("the COMMIT under way lands", True, self._commit(rest, each.rows))
            yield Next("the COMMIT under way is lost", True, rest)

        if state.selectable != state.rows:
            yield Next("the replica catches up", True, state._replace(selectable=state.rows))

    def _commit(self, state: State, rows: Iterable[int]) -> State:
        committed = tuple(version + (row in rows) for row, version in enumerate(state.rows))
        return state._replace(rows=committed, selectable=state.selectable if self._scenario.replica else committed)

    def _server_acts(self, state: State) -> Iterator[Next]:
        guards = self._guards(state)
        for slot, content in enumerate(state.slots):
            if content is None:
                continue
            told = self._tell(slot, content) if self.tells else ""
            if (is_locked(content) or content.shape == HOLD) and state.selectable != state.rows:
                continue  # both outlive the lag of replicas
            if is_locked(content):
                emptied = _write(state, slot, None)
                if self._scenario.faults.ticks:
                    if deadline_ms(content) <= state.ticks * TICK_MS:
                        yield Next(f"{told} expires", True, emptied)
                elif not guards.intersection(content.ids):
                    yield Next(f"{told} expires", True, emptied)
                if state.faults.lock_evictions and guards.intersection(content.ids):
                    yield Next(f"{told} is EVICTED", False, _spend(emptied, lock_evictions=1))
            elif content.shape == HOLD:
                yield Next(f"{told} expires", True, _write(state, slot, None))
            elif state.faults.evictions and content.shape != FREE:
                emptied = _write(state, slot, None)
                yield Next(f"{told} is evicted", False, _spend(emptied, evictions=1))
        if any(state.slots):
            late = tuple(each._replace(onto="anything") for each in state.late if each.onto == "found")
            if self._server != "has one connection for gets and another for cas":
                late = ()
            empty = state._replace(slots=tuple(None for _ in state.slots), late=late)
            if state.faults.restarts:
                yield Next("the server is restarted", False, _spend(empty, restarts=1))
            if state.faults.calm_restarts and not guards:
                yield Next("the server is restarted", False, _spend(empty, calm_restarts=1))
        for at, each in enumerate(state.late):
            found = state.slots[each.slot]
            if each.onto == "whatever" or (each.onto == "nothing") == (found is None):
                rest = state._replace(late=state.late[:at] + state.late[at + 1 :])
                told = f"late, the change to {self._tell(each.slot, each.content)} lands" if self.tells else ""
                yield Next(told, False, _write(rest, each.slot, each.content))
        if state.faults.ticks and not guards and not any(process.results for process in state.processes):
            yield Next("half a lock_ttl passes", True, _spend(state, ticks=1)._replace(ticks=state.ticks + 1))

    # ----------------------------------------------------------------------------------------------- steps of processes

    def _step(
        self,
        state: State,
        number: int,
        event: Event,
        label: str,
        *,
        fair: bool = True,
        answered: int = -1,
    ) -> Iterator[Next]:
        """Something comes to a process; what it was waiting for before and does no more goes on without it."""
        process, node = state.processes[number], self._node(state, number)
        step, names = self._take(state, number, event)
        answered = event[1] if event[0] == "answer" else answered
        ids = tuple(names[each] if each >= 0 else state.ids - 1 - each for each in step.ids)
        target = self._automata[number].nodes[step.node]
        moved = process._replace(
            node=step.node,
            ids=ids,
            results=tuple(
                process.results[each] if each >= 0 else self._at_once(state, call)
                for each, call in zip(step.calls, target.calls, strict=True)
            ),
            floors=tuple(
                floor if actor.name in target.tasks else ()
                for floor, actor in zip(process.floors, self._scenario.processes[number], strict=True)
            ),
        )
        dropped = [at for at in range(len(node.calls)) if at != answered and at not in step.calls]
        after = state
        for at in dropped:
            after = self._lose(after, number, at)
        after = _put_process(after, number, moved)._replace(ids=state.ids + sum(each < 0 for each in step.ids))
        told = self._take_notice(after, process, number, step)
        yield Next(label, fair, told)
        for at in dropped:
            late = self._late(state, number, at) if state.faults.silences else None
            if late is not None and isinstance(told, State):
                spent = _spend(_add_late(told, late), silences=1)
                label = (
                    f"{label}; its change to {self._tell(late.slot, late.content)} is under way" if self.tells else ""
                )
                yield Next(label, False, spent)

    def _take(self, state: State, number: int, event: Event) -> tuple[Step, list[int]]:
        """What a process does, and the ids that it knows then, those that came with the event last."""
        process = state.processes[number]
        numbers = {name: at for at, name in enumerate(process.ids)}
        if event[0] == "answer":
            results = event[2]
            if self._scenario.reads == "backwards" and self._node(state, number).calls[event[1]].kind == "read":
                results = results[::-1]
            event = ("answer", event[1], tuple(_renumber(each, numbers) for each in results), *event[3:])
        return self._automata[number].step(process.node, event, len(numbers)), list(numbers)

    def _take_notice(self, state: State, before: ProcessState, number: int, step: Step) -> State | Broken:
        names = [actor.name for actor in self._scenario.processes[number]]
        for notice in step.notices:
            match notice:
                case "served", how, name, row, version:
                    floor = before.floors[names.index(name)]
                    if version < floor[row]:
                        asked = f"{name} asked after v{floor[row]} was acknowledged, and gets v{version}"
                        if how == "hit":
                            return Broken("no stale hit", f"{asked} from the cache")
                        return Broken("no stale share", f"{asked} from another task")
                case "found", how, name, version:
                    wrong = self._why_wrong(state, self._seekers[name], before.floors[names.index(name)][0], version)
                    if wrong is not None:
                        return Broken("no stale hit" if how == "hit" else "no stale share", wrong)
                case "acknowledged", rows, versions, everywhere:
                    latest = dict(zip(rows, versions, strict=True))
                    process = state.processes[number]
                    own = tuple(max(each, latest.get(row, 0)) for row, each in enumerate(process.acknowledged))
                    state = _put_process(state, number, process._replace(acknowledged=own))
                    if everywhere:
                        all_ = tuple(max(each, latest.get(row, 0)) for row, each in enumerate(state.acknowledged))
                        state = state._replace(acknowledged=all_)
                case _:
                    raise AssertionError(notice)
        return state

    def _why_wrong(self, state: State, seeker: Seeker, floor: int, version: int) -> str | None:
        """What is wrong with this version of the row as the answer to a seeker; -1: that there is no such row."""
        asked = f"{seeker.name} asked for {seeker.value!r} after v{floor} was acknowledged, and gets"
        if version < 0:
            could_be = any(each != seeker.value for each in seeker.history[floor : state.rows[0] + 1])
            return None if could_be else f"{asked} nothing"
        if version < floor or seeker.history[version] != seeker.value:
            return f"{asked} v{version}, which has {seeker.history[version]!r}"
        return None

    def _lose(self, state: State, number: int, at: int) -> State:
        """Nobody waits for this call any more."""
        node, process = self._node(state, number), state.processes[number]
        call, owner = node.calls[at], node.owners[at]
        if call.kind == "commit" and not process.results[at]:
            lost = Underway(call.rows, process.ids[owner] if owner is not None else -1, number)
            state = state._replace(underway=tuple(sorted((*state.underway, lost))))
        return state

    def _at_once(self, state: State, call: Call) -> tuple[int, ...]:
        """A SELECT reads as soon as it is sent: what it would read later is only newer. Other calls take their time."""
        if call.kind != "select":
            return ()
        return tuple(state.selectable[row] if call.fresh else 0 for row in call.rows)

    def _late(self, state: State, number: int, at: int) -> Late | None:
        """The change that this call was about to make when nobody waited for it any more."""
        call, done = self._node(state, number).calls[at], state.processes[number].results[at]
        if call.kind != "apply" or len(done) == len(call.changes):
            return None
        slot = self._keys.index(call.keys[len(done)])
        found = state.slots[slot]
        content = self._changed(state, number, at, len(done), found)
        if content is None or content == found:
            return None
        if self._server == "writes blindly":
            return Late(slot, "whatever", content)
        return Late(slot, "nothing" if found is None else "found", content)

    def _changed(self, state: State, number: int, at: int, change: int, found: Content) -> Content:
        process = state.processes[number]
        numbers = {name: at for at, name in enumerate(process.ids)}
        content = self._automata[number].write(process.node, at, change, _renumber(found, numbers))
        names = list(numbers)
        return Slot(content.shape, tuple(names[each] for each in content.ids)) if content is not None else None

    def _size(self, node: Node, at: int) -> int:
        call = node.calls[at]
        return len(call.keys) or len(call.rows)

    def _node(self, state: State, number: int) -> Node:
        return self._automata[number].nodes[state.processes[number].node]

    def _guards(self, state: State) -> set[int]:
        """The owners of locks whose COMMIT may still land."""
        guards = {each.owner for each in state.underway}
        for number, process in enumerate(state.processes):
            if process.node >= 0:
                guards.update(process.ids[each] for each in self._node(state, number).guards)
        return guards

    # ------------------------------------------------------------------------------------------------- what must hold

    def is_over(self, state: State) -> bool:
        return not state.underway and all(
            process.node < 0
            or not (
                self._node(state, number).tasks
                or any(self._may_begin(state, number, at) for at in range(len(process.left)))
            )
            for number, process in enumerate(state.processes)
        )

    def judge(self, state: State) -> Broken | None:
        """What must hold in every state that is reached."""
        if self._is_quiet(state):
            generation = as_bytes(state.slots[-1])
            for row in self._rows:
                verdict = protocol.judge(as_bytes(state.slots[row]), generation)
                if isinstance(verdict, protocol.Hit) and (version := version_of(verdict.record)) < state.rows[row]:
                    told = f"{_version(version)} is served while the database holds {_version(state.rows[row])}"
                    return Broken("no stale value stays", f"all writers have ended, and {told}")
            for seeker in self._seekers.values():
                unique = state.slots[self._keys.index(UNIQUES[seeker.value])]
                verdict = protocol.judge(as_bytes(unique), generation)
                if verdict == protocol.Hit(protocol.MISSING) and seeker.history[state.rows[0]] == seeker.value:
                    told = f"it is served that no row has {seeker.value!r}, and the database holds one"
                    return Broken("no stale value stays", f"all writers have ended, and {told}")
        for number, process in enumerate(state.processes):
            if process.node >= 0:
                node = self._node(state, number)
                if node.has_flights and not node.tasks:
                    return Broken("flights end", "a flight is left in the table, and nobody leads it")
        return None

    def _is_quiet(self, state: State) -> bool:
        """Whether no write is under way, neither its COMMIT nor the end of its locks."""
        if state.underway:
            return False
        for number, process in enumerate(state.processes):
            if process.node < 0:
                continue
            actors = self._scenario.processes[number]
            readers = {actor.name for actor in actors if isinstance(actor, (Reader, Seeker))}
            if not readers.union(_BY_READERS).issuperset(self._node(state, number).tasks):
                return False
        return True

    def canonical(self, state: State) -> State:
        """The same with ids numbered by appearance, and without what can matter to nobody."""
        numbers: dict[int, int] = {}
        slots = tuple(_renumber(each, numbers) for each in state.slots)
        asks = any(
            left and isinstance(actor, (Reader, Seeker))
            for process, actors in zip(state.processes, self._scenario.processes, strict=True)
            for left, actor in zip(process.left, actors, strict=True)
        )
        processes = tuple(
            process._replace(
                ids=tuple(numbers.setdefault(each, len(numbers)) for each in process.ids),
                results=tuple(tuple(_renumber(each, numbers) for each in results) for results in process.results),
                acknowledged=process.acknowledged if asks else (),
            )
            for process in state.processes
        )
        late = tuple(each._replace(content=_renumber(each.content, numbers)) for each in state.late)
        underway = tuple(
            each._replace(owner=numbers.setdefault(each.owner, len(numbers)) if each.owner >= 0 else -1)
            for each in state.underway
        )
        return state._replace(
            slots=slots,
            processes=processes,
            late=late,
            underway=underway,
            acknowledged=state.acknowledged if asks else (),
            ids=len(numbers),
        )

    def _who(self, number: int, call: Call) -> str:
        if not call.task.startswith("asynccache: "):
            return call.task
        return f"{self._names(number)}'s {call.task.removeprefix('asynccache: ')}"

    def _names(self, number: int) -> str:
        return "+".join(actor.name for actor in self._scenario.processes[number])

    def _tell_answer(self, number: int, call: Call, results: tuple[Any, ...]) -> str:
        who = self._who(number, call)
        if call.kind == "select":
            return f"{who}'s SELECT, begun right after its last step, gives {', '.join(map(_version, results))}"
        return f"{who} gets the answer"

    def _tell(self, slot: int, content: Content) -> str:
        return f"{self._keys[slot].name.decode()} {tell(content, is_generation=slot == len(self._keys) - 1)}"

    def _tell_change(self, slot: int, found: Content, content: Content) -> str:
        done = "leaves it" if content == found else f"makes it {self._tell(slot, content)}"
        return f"finds {self._tell(slot, found)}: {done}"


_BY_READERS = ("asynccache: fill", "asynccache: give back a lease")


def _put(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _put_process(state: State, number: int, process: ProcessState) -> State:
    return state._replace(processes=_put(state.processes, number, process))


def _spend(state: State, **what: int) -> State:
    ((name, count),) = what.items()
    return state._replace(faults=state.faults._replace(**{name: getattr(state.faults, name) - count}))


def _write(state: State, slot: int, content: Content) -> State:
    """Change a slot; late changes of what was there before are refused from now on, by their version."""
    late = tuple(each for each in state.late if each.slot != slot or each.onto != "found")
    return state._replace(slots=_put(state.slots, slot, content), late=late)


def _add_late(state: State, late: Late) -> State:
    return state._replace(late=tuple(sorted((*state.late, late))))


def _renumber(content: Any, numbers: dict[int, int]) -> Any:
    """content: a slot; what is none stays as it is."""
    if not isinstance(content, Slot) or not content.ids:
        return content
    return Slot(content.shape, tuple(numbers.setdefault(each, len(numbers)) for each in content.ids))


def _version(version: int) -> str:
    return f"v{version}"
