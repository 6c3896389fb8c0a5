"""Plays a history: processes with real caches over the simulated servers, and the checks of what they promise."""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
from collections.abc import Mapping, Sequence
from contextvars import copy_context

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm.exc import StaleDataError

from asynccache import BackendError, LockNotPlacedError, protocol
from tests.simulation import operations
from tests.simulation.backend import Server
from tests.simulation.chance import Actor, Trace, act_as, actor, controlled
from tests.simulation.database import Database, Value
from tests.simulation.fleet import PROCESSES, ROWS, Item, Process
from tests.simulation.history import History, Operation
from tests.simulation.loop import SimulatedLoop, StuckError

PATIENCE_S = 60.0
"""So long an operation may take, whatever happens to it, and so long it may take to clear up after all of them."""


LATE_S = 5.0
"""After so long no command is on its way any more, and whole seconds are over."""


class ViolationError(AssertionError):
    """A promise was broken. Its text tells which, and what happened before."""


_fleet: list[Process] = []
"""The processes of the histories so far. One that went wrong leaves none behind."""


def play(history: History) -> World:
    """Play a history from beginning to end. Raises ViolationError."""
    processes = list(_fleet) or [Process.start(number) for number in range(PROCESSES)]
    _fleet.clear()
    world = World(history, processes)
    world.play()
    _fleet[:] = processes
    return world


def forget_the_fleet() -> None:
    """Have the next history played by new processes."""
    _fleet.clear()


class World:
    """One history at play."""

    def __init__(self, history: History, processes: Sequence[Process]) -> None:
        self.history = history
        self.processes = processes
        self.loop = SimulatedLoop(history.choices)
        self.trace = Trace(self.loop.time)
        self.server = Server(self.loop, self.trace)
        self.database = Database(self.loop, self.trace, ROWS)
        self.slots = {key: processes[0].slot(key) for key in ROWS}
        self.violations: list[str] = []
        self._owed: set[int] = set()
        """Rows that another program has changed and that still have to be invalidated."""
        self._floors = [dict.fromkeys(ROWS, 0) for _ in processes]
        self._unprotected: list[tuple[Process, int, int]] = []
        self._seen = dict.fromkeys(ROWS, 0)
        self._may_go_back = any(each.kind.startswith("foreign") for each in history.operations)
        self._next_value = 1000
        self._attempted: dict[str, list[int]] = {}
        for process in processes:
            process.enter(history, self.server, self.database)

    # --------------------------------------------------------------------------------------------------------- promises

    def fresh_value(self) -> int:
        """A value that no row has had."""
        value, self._next_value = self._next_value, self._next_value + 10
        # A statement that changes all rows adds the rows' keys, so that no two have the same.
        self._attempted.setdefault(actor().name, []).extend(value + key for key in ROWS)
        return value

    def values_to_ask_for(self, key: int) -> Sequence[int]:
        """The last two values of a row, and the next that any will have."""
        latest = [each.value for each in self.database.versions[key][-2:]]
        return [*(value for value in latest if value is not None), self._next_value]

    def floor(self, process: Process, key: int) -> int:
        """The oldest version of a row that a read in this process may give that begins now.

        A commit counts for every process as soon as it is acknowledged; one whose lock was not placed or may have got
        lost unseen counts for its own process at once, and for the others as soon as that has destroyed the slot.
        """
        for claim in list(self._unprotected):
            committer, row, version = claim
            if not self._doubts(committer, row, version):
                self._unprotected.remove(claim)
                self._raise_floor(self.processes, row, version)
        floor = self._floors[process.number][key]
        return floor if self._goes_back else max(floor, self._seen[key])

    def _doubts(self, process: Process, key: int, version: int) -> bool:
        """Whether a process knows that there may be something older in the cache than this version of a row."""
        value = self.database.versions[key][version].value
        of_value = value is not None and process.doubts(process.slot_of_value(value))
        return of_value or process.doubts(self.slots[key])

    @property
    def _goes_back(self) -> bool:
        """Whether a read may give an older version than a read before it, of a commit that nobody was told of yet."""
        self._may_go_back = (
            self._may_go_back or self.server.lost_a_lock or any(process.has_doubts for process in self.processes)
        )
        return self._may_go_back

    def _raise_floor(self, processes: Sequence[Process], key: int, version: int) -> None:
        for process in processes:
            floors = self._floors[process.number]
            floors[key] = max(floors[key], version)

    def acknowledged(self, process: Process) -> None:
        """The actor was told that it has committed."""
        self.trace.note("is acknowledged")
        for key, versions in self.database.versions.items():
            version = max((i for i, each in enumerate(versions) if each.writer == actor().name), default=0)
            self._raise_floor([process], key, version)
            if self._doubts(process, key, version):
                self._unprotected.append((process, key, version))
            else:
                self._raise_floor(self.processes, key, version)

    def has_read(self, key: int, value: Value, floor: int) -> None:
        """A read that began when this was its floor."""
        self.trace.note("reads row {}: {}", key, value)
        allowed = self.database.versions[key][floor:]
        for version, each in enumerate(allowed, floor):
            if each.value == value:
                self._seen[key] = max(self._seen[key], version)
                return
        self.violate(f"{actor().name} reads row {key} as {value}, when it may be {[each.value for each in allowed]}")

    def has_not_found(self, value: int, floors: Mapping[int, int]) -> None:
        """A read that found no row with this value, and began when these were the rows' floors."""
        self.trace.note("finds no row with {}", value)
        for key, floor in floors.items():
            if all(each.value == value for each in self.database.versions[key][floor:]):
                self.violate(f"{actor().name} finds no row with {value}, which row {key} has")

    def violate(self, what: str) -> None:
        self.trace.note("VIOLATION")
        self.violations.append(what)

    def write_elsewhere(self, keys: Sequence[int]) -> Mapping[int, Value]:
        """Another program changes these rows, if they are there. Gives what they have then."""
        rows = [key for key in keys if self.database.committed(key) is not None]
        values = {key: self.fresh_value() for key in rows}
        self.database.commit(values)
        self._owed.update(keys)
        return {key: values.get(key) for key in keys}

    def invalidated(self, process: Process, keys: Sequence[int]) -> None:
        """The actor was told that what was read before is served no more."""
        self._owed.difference_update(keys)
        self.acknowledged(process)

    # ------------------------------------------------------------------------------------------------------------- play

    def play(self) -> None:
        """Play the history to its end. Raises ViolationError."""
        logger = logging.getLogger("asynccache")
        log = _Log(self)
        self.loop.set_exception_handler(lambda _, context: self.violate(f"asyncio: {context}"))
        gc_was_enabled = gc.isenabled()
        gc.disable()  # when it runs is not decided by the history
        logger.addHandler(log)
        was_propagated, logger.propagate = logger.propagate, False
        try:
            with controlled(self.loop.time):
                self.loop.run_until_complete(self._play())
        except StuckError as error:
            self.violate(str(error))
        finally:
            logger.removeHandler(log)
            logger.propagate = was_propagated
            if gc_was_enabled:
                gc.enable()
            self.loop.close()
        if self.violations:
            raise ViolationError("\n".join(["", *self.violations, "", repr(self.history), "", self.shown()]))

    async def _play(self) -> None:
        if self.history.warm:
            for process in self.processes:
                async with process.engine.connect():
                    pass
        tasks: list[asyncio.Task[None]] = []
        for number, operation in enumerate(self.history.operations):
            if operation.pause_ms:
                await asyncio.sleep(operation.pause_ms / 1000)
            name = f"{number}: {operation.kind} by {operation.process}"
            context = copy_context()
            decisions = iter(operation.cache), iter(operation.statements), iter(operation.commits)
            context.run(act_as, Actor(name, *decisions))
            tasks.append(self.loop.create_task(self._perform(operation), context=context, name=name))
            if operation.cancelled_at is not None:
                self.loop.cancel_at(tasks[-1], operation.cancelled_at)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=PATIENCE_S)
            for task in late:
                self.violate(f"{task.get_name()} has taken {PATIENCE_S} s")
            if late:
                return
        await self._become_quiet()
        self._check_what_is_left()

    async def _perform(self, operation: Operation) -> None:
        self.trace.note("begins with rows {}", operation.keys)
        process = self.processes[operation.process]
        try:
            await operations.perform(self, process, operation)
        except asyncio.CancelledError:
            self.trace.note("is cancelled")
            if operation.cancelled_at is None:
                self.violate(f"{actor().name} was cancelled by nobody")
        except LockNotPlacedError:
            self.trace.note("is refused")
            committed = {each.value for versions in self.database.versions.values() for each in versions}
            if self.history.on_lock_failure != "raise" or committed.intersection(self._attempted.get(actor().name, ())):
                self.violate(f"{actor().name} was refused, and wrongly so, or too late")
        except BackendError:
            self.trace.note("is told that the cache server is away")
        except (SQLAlchemyError, OSError) as error:
            self.trace.note("fails: {}", error)
            excused = actor().excuse or operation.cancelled_at is not None or isinstance(error, StaleDataError)
            if isinstance(error, PoolTimeoutError) or not excused:
                self.violate(f"{actor().name} fails without a cause in the database: {error!r}")
        except Exception as error:
            self.violate(f"{actor().name} fails: {''.join(traceback.format_exception(error))}")

    async def _become_quiet(self) -> None:
        self.trace.note("all is well again")
        self.server.away_until_s.clear()
        for key in sorted(self._owed):
            await self.processes[0].cache.invalidate(Item, key, scope=self.processes[0].engine)
        for process in self.processes:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await process.cache.drain()
            except TimeoutError:
                self.violate(f"process {process.number} has work after {PATIENCE_S} s")
        # Locks of which nobody knows, such as came late, end by themselves.
        await asyncio.sleep(2 * self.processes[0].cache.settings.lock_ttl_s + LATE_S)

    def _check_what_is_left(self) -> None:
        for process in self.processes:
            self.violations += process.leftovers
        self.violations += [f"a task is left: {task!r}" for task in asyncio.all_tasks() - {asyncio.current_task()}]
        for key, slot in self.slots.items():
            found = [self.server.find(name) for name in (slot.key.name, slot.generation.name)]
            entity, generation = [item and item.value for item in found]
            if protocol.owners_of(entity) or protocol.owners_of(generation):
                self.violate(f"row {key} is locked for ever")
            verdict = protocol.judge(entity, generation)
            if isinstance(verdict, protocol.Hit) and (
                value := self.processes[0].value_of(verdict.record)
            ) != self.database.committed(key):
                self.violate(f"row {key} is cached as {value}, and is {self.database.committed(key)}")

        for key, versions in self.database.versions.items():
            for value in {each.value for each in versions if each.value is not None}:
                slot = self.processes[0].slot_of_value(value)
                found = [self.server.find(name) for name in (slot.key.name, slot.generation.name)]
                unique, generation = [item and item.value for item in found]
                if protocol.owners_of(unique):
                    self.violate(f"value {value} is locked for ever")
                is_missing = protocol.judge(unique, generation) == protocol.Hit(protocol.MISSING)
                if is_missing and self.database.committed(key) == value:
                    self.violate(f"it is cached that no row has {value}, which row {key} has")

    # ------------------------------------------------------------------------------------------------------------- show

    def shown(self) -> str:
        """All that has happened, line by line."""
        return self.trace.shown(self._shown)

    def _shown(self, value: object) -> str:
        names = {slot.key.name: f"E{key}" for key, slot in self.slots.items()}
        names |= {slot.generation.name: f"G of {key}" for key, slot in self.slots.items()}
        if isinstance(value, bytes):
            return names.get(value) or _slot_shown(value)
        if isinstance(value, list):
            return ", ".join(map(self._shown, value))
        return str(value)


class _Log(logging.Handler):
    """An error that the library logs is one that it did not foresee."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._world.violate(f"the library logs: {record.getMessage()}: {error!r}")


def _slot_shown(slot: bytes) -> str:
    """A slot's state, with enough of its random parts to tell them apart."""
    if (owners := protocol.owners_of(slot)) is not None:
        return f"LOCKED({', '.join(owner.hex()[:4] for owner in owners)})"
    kind, ids = slot[1:2], slot[2:]
    match kind:
        case b"V" if len(ids) == protocol.ID_BYTES:
            return f"OPEN({ids.hex()[:4]})"  # or, as an entity, "there is no such row"
        case b"V":
            return f"VALUE({ids.hex()[:4]}, …{ids.hex()[-6:]})"
        case b"T":
            return f"LEASE({ids.hex()[:4]}, {ids[protocol.ID_BYTES :].hex()[:4]})"
        case b"H":
            return "HOLD"
        case b"F":
            return "FREE"
        case _:
            return "UNREADABLE"
