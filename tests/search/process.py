"""One process of the library: the real read path and write path, and the sessions of an application."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from unittest.mock import patch

from sqlalchemy.util import greenlet_spawn

from asynccache import background, protocol, reading, repair, transaction
from asynccache.backends.base import Applied, Backend, Change, Key
from asynccache.background import Background
from asynccache.errors import LockNotPlacedError
from asynccache.events import Model
from asynccache.locking import WritePath
from asynccache.lookup import look_up
from asynccache.metrics import Stats
from asynccache.protocol import MISSING, Slot
from asynccache.reading import Ask, CachedModel, Load, Miss, ReadPath
from asynccache.repair import Repairs
from asynccache.settings import Policy, Settings
from asynccache.store import Store
from asynccache.telemetry import Telemetry
from asynccache.transaction import Transaction
from tests.search.freeze import Freezer
from tests.search.loop import StillLoop, untyped
from tests.search.slots import record_of, version_of

GENERATION = Key(b"G", 0)
ENTITIES = (Key(b"E0", 0), Key(b"E1", 0))
UNIQUES = {"a": Key(b"Ua", 0), "b": Key(b"Ub", 0)}
"""The slots of the values of a secondary key."""
LEADS_TO_ROW = b"E0"
"""The record of a key's slot; in what tasks share a colon and the row may follow."""

NOBODY = b"nobody"
"""Who owes a generation in place of rows. No id: it is never in a slot."""

TICK_MS = 5_000
"""A tick of the worlds' clock: half a `lock_ttl`."""

SETTINGS = Settings(lock_ttl_s=2 * TICK_MS / 1000, poll_min_s=0.05, poll_max_s=0.05, retry_min_s=0.1, retry_max_s=0.1)
"""The times only tell one timer from another, and waits that do not grow keep the worlds finite."""

LATE_S = SETTINGS.lease_timeout_s + 0.5
"""How late a timer is that is far too late."""

# -------------------------------------------------------------------------------------------------- who does something


@dataclass(frozen=True, slots=True)
class Reader:
    """A session that gets rows, one `get` after the other.

    rows: those of one get.
    may_fill: False for a session that has written, say.
    stores: False for one that finds out while it loads that it reads from a snapshot, which is as old as the world.
    hurries: it holds a connection, and so waits for others only for `flight_timeout`.
    exists: its rows are there from the beginning; else their first version is that there is none.
    after: as a writer's.
    """

    name: str
    rows: tuple[int, ...] = (0,)
    times: int = 1
    may_fill: bool = True
    stores: bool = True
    hurries: bool = False
    exists: bool = False
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Seeker:
    """A session that gets row 0 by a secondary key, one `cached_get_by` after the other.

    value: that it asks for.
    history: which value each version of the row has; "": there is no such row.
    """

    name: str
    value: str
    history: tuple[str, ...]
    times: int = 1
    rows: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Writer:
    """A session that changes rows and commits, one transaction after the other.

    locks: the slots that its transactions must lock: of its rows, of the values of their secondary keys from then on,
        or the generation.
    after: it begins when row 0 has this version; None: at any time.
    """

    name: str
    rows: tuple[int, ...] = (0,)
    locks: tuple[Key, ...] = (ENTITIES[0],)
    times: int = 1
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Invalidator:
    """Another program changes a row without the library, and then tells this process, which invalidates the slot."""

    name: str
    rows: tuple[int, ...] = (0,)
    locks: tuple[Key, ...] = (ENTITIES[0],)
    times: int = 1


Actor = Reader | Seeker | Writer | Invalidator

# ------------------------------------------------------------------------------------- what a process asks of the world

Kind = Literal["read", "apply", "select", "commit"]


@dataclass(slots=True, eq=False)
class Call:
    """A call that a process has made and that is not answered."""

    kind: Kind
    task: str
    answer: asyncio.Future[Any]
    keys: tuple[Key, ...] = ()
    changes: tuple[Change, ...] = ()
    rows: tuple[int, ...] = ()
    owner: bytes = b""
    fresh: bool = True
    """Whether a SELECT sees what is committed; otherwise it reads from a snapshot."""


class Wire(Backend):
    """The cache server and the database, as one process sees them: calls go out, answers come or do not come."""

    def __init__(self, loop: StillLoop) -> None:
        self.calls: list[Call] = []
        self._loop = loop

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        return list(await self._call("read", keys=tuple(keys)))

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        return list(await self._call("apply", keys=tuple(each.key for each in changes), changes=tuple(changes)))

    async def aclose(self) -> None:
        raise AssertionError("nobody closes it")

    async def select(self, rows: tuple[int, ...], *, fresh: bool) -> list[int]:
        return list(await self._call("select", rows=rows, fresh=fresh))

    async def commit(self, rows: tuple[int, ...], owner: bytes) -> list[int]:
        return list(await self._call("commit", rows=rows, owner=owner))

    async def _call(self, kind: Kind, **about: Any) -> Iterable[Any]:
        task = asyncio.current_task()
        assert task is not None
        call = Call(kind, task.get_name(), self._loop.create_future(), **about)
        self.calls.append(call)
        try:
            return cast("Iterable[Any]", await call.answer)
        finally:
            self.calls.remove(call)


# ------------------------------------------------------------------------------------------------------- the process

Event = (
    tuple[Literal["begin"], int, int]
    | tuple[Literal["answer"], int, tuple[Any, ...], int, int]
    | tuple[Literal["fail"], int, int]
    | tuple[Literal["timer"], int, bool, int]
    | tuple[Literal["cancel"], int, int]
    | tuple[Literal["lapse"], int]
)
"""What can come to a process, and the clock's ticks by then:
begin(actor), answer(call, results, actor that is cancelled in the same turn or -1), fail(call), timer(which, whether it
is far too late), cancel(actor), lapse: `lock_ttl` has passed for what is owed later."""


@dataclass(frozen=True, slots=True)
class _Model:
    """A `CachedModel`."""

    model: Model = object
    policy: Policy = SETTINGS.policy


MODEL = _Model()


@dataclass(frozen=True, slots=True)
class _Ask:
    reader: Reader
    row: int
    served: list[tuple[str, int, int]]
    mapped: CachedModel = MODEL

    @property
    def slot(self) -> Slot:
        return Slot(ENTITIES[self.row], GENERATION)

    def serve(self, record: bytes) -> bool:
        self.served.append((self.reader.name, self.row, version_of(record)))
        return True

    def certain(self, record: bytes) -> bytes:
        return record


@dataclass(slots=True, eq=False)
class SoughtRow:
    """A `RowAsk`: the row that a key has led to."""

    seeker: Seeker
    version: int = -1
    matches: bool = False
    was_loaded: bool = False
    mapped: CachedModel = MODEL

    @property
    def slot(self) -> Slot:
        return Slot(ENTITIES[0], GENERATION)

    def serve(self, record: bytes) -> bool:
        self.version = version_of(record)
        self.matches = record != MISSING and self.seeker.history[self.version] == self.seeker.value
        return True

    def certain(self, record: bytes) -> bytes:
        return record

    def loaded(self, version: int) -> bytes | None:
        self.was_loaded = True
        self.matches = self.seeker.history[version] == self.seeker.value
        self.version = version if self.matches else -1
        return record_of(version, exists=True) if self.matches else None


@dataclass(slots=True, eq=False)
class Sought:
    """A `KeyAsk`: what a value of the key leads to."""

    seeker: Seeker
    version: int = -1
    row: SoughtRow | None = None
    record: bytes = b""
    mapped: CachedModel = MODEL

    @property
    def slot(self) -> Slot:
        return Slot(UNIQUES[self.seeker.value], GENERATION)

    def serve(self, record: bytes) -> bool:
        self.row, self.record, self.version = None, record, -1
        key, _, row = record.partition(b":")
        if row:
            self.version = version_of(row)
        elif key != MISSING:
            self.row = SoughtRow(self.seeker)
        return True

    def certain(self, record: bytes) -> bytes:
        return record.partition(b":")[0]

    def loaded(self, version: int) -> bytes | None:
        self.row, self.version = None, -1
        if self.seeker.history[version] != self.seeker.value:
            return MISSING
        self.version = version
        return LEADS_TO_ROW + b":" + record_of(version, exists=True)


@dataclass(slots=True)
class _Writes:
    """What `asynccache.orm.writes` would have noted."""

    locks: tuple[Key, ...]

    def slots(self) -> Iterator[Slot]:
        for key in self.locks:
            yield Slot(key, GENERATION)


class _Models:
    def hierarchies(self) -> dict[Any, Any]:
        return {}


@dataclass(slots=True)
class _Cache:
    """As much of a `Cache` as a `Transaction` needs."""

    settings: Settings
    writes: WritePath
    background: Background
    models: _Models = field(default_factory=_Models)

    def bound(self) -> _Cache:
        return self


def may_leave(reader: Reader) -> bool:
    """Whether what this session has loaded may be stored and shared."""
    return reader.stores


class Process:
    """The library in one process, and the application's sessions there."""

    running: Process
    """That whose turn it is: ids and times are its own."""

    def __init__(self, actors: Sequence[Actor], settings: Settings) -> None:
        self.loop = StillLoop()
        self.wire = Wire(self.loop)
        self.notices: list[tuple[Any, ...]] = []
        self.guards: list[bytes] = []
        self._served: list[tuple[str, int, int]] = []
        self._found: list[tuple[str, int]] = []
        self._actors = actors
        self._ids = itertools.count()
        self._ticks = 0
        self._stats = Stats()
        self._lock_ttl_s = settings.lock_ttl_s
        self.lapsed_s = 0.0
        Process.running = self
        telemetry = Telemetry(self._stats)
        parts = (Store(self.wire, telemetry), settings, telemetry, Background())
        self.store, *_, tasks = parts
        self.reads = ReadPath(*parts)
        # Nothing is given up in the worlds, in which nothing expires with its ttl either.
        self.repairs = Repairs(*parts, ttl_max_s=lambda: math.inf)
        untyped(self.repairs)._nobody = NOBODY
        self._cache = _Cache(settings, WritePath(*parts, self.repairs), tasks)

    # The application: what it calls, and SQLAlchemy's events in the order in which it sends them.

    async def _get(self, reader: Reader) -> None:
        async def load(asks: Sequence[Ask]) -> list[bytes | None]:
            versions = await self.wire.select(tuple(ENTITIES.index(ask.slot.key) for ask in asks), fresh=reader.stores)
            return [record_of(version, exists=reader.exists) if may_leave(reader) else None for version in versions]

        asks = [_Ask(reader, row, self._served) for row in reader.rows]
        patience_s = SETTINGS.flight_timeout_s if reader.hurries else None
        if len(asks) == 1:  # as `asynccache.get.get_unanswered` does
            miss = self.reads.serve(asks[0], *await self.reads.store.read(asks[0].slot))
            misses = [miss] if miss is not None else []
        else:
            misses = await self.reads.look(asks)
        if misses:
            await self.reads.load(misses, load, may_fill=reader.may_fill, patience=lambda: patience_s)

    async def _seek(self, seeker: Seeker) -> None:
        async def load(asks: Sequence[Ask]) -> list[bytes | None]:
            (version,) = await self.wire.select(seeker.rows, fresh=True)
            return [cast("Sought | SoughtRow", ask).loaded(version) for ask in asks]

        async def load_misses(misses: Sequence[Miss], load: Load) -> None:
            await self.reads.load(misses, load, may_fill=True, patience=lambda: None)

        ask = Sought(seeker)
        if not await look_up(ask, self.reads, load_misses, load):
            _ = await load([ask])
        self._found.append((seeker.name, (ask.row or ask).version))

    async def _commit(self, writer: Writer) -> None:
        ours = Transaction(cast("Any", self._cache))
        untyped(ours).writes = _Writes(writer.locks)
        owner = untyped(ours)._owner
        try:
            self.guards.append(owner)
            try:
                await greenlet_spawn(ours.before_commit)
                versions = await self.wire.commit(writer.rows, owner)
            finally:
                self.guards.remove(owner)
            placed = not self._doubts(owner)
            await greenlet_spawn(ours.answered)
            self.notices.append(("acknowledged", writer.rows, tuple(versions), placed))
        except (LockNotPlacedError, ConnectionError):
            pass
        finally:
            ours.end()

    def _doubts(self, owner: bytes) -> bool:
        """Whether a lock of this transaction could not be placed, so that what it has changed is owed."""
        debts = untyped(self.repairs)._debts.items()
        return any(debt.doubtful and claim.owner in (owner, NOBODY) for claim, debt in debts)

    async def _invalidate(self, invalidator: Invalidator) -> None:
        versions = await self.wire.commit(invalidator.rows, b"")
        slots = [Slot(key, GENERATION) for key in invalidator.locks]
        if await self._cache.writes.destroy(slots):
            self.notices.append(("acknowledged", invalidator.rows, tuple(versions), True))

    # The world acts on it.

    def feed(self, event: Event) -> None:
        """Let this happen, and all that follows from it at once."""
        Process.running = self
        self._ticks = event[-1]
        hits = self._stats.hits + self._stats.negative_hits
        with self.loop.running():
            match event:
                case "begin", actor, _:
                    self._begin(self._actors[actor])
                case "answer", call, results, cancelled, _:
                    self.wire.calls[call].answer.set_result(results)
                    if cancelled >= 0:
                        self._cancel(self._actors[cancelled])
                case "fail", call, _:
                    self.wire.calls[call].answer.set_exception(ConnectionError())
                case "timer", which, late, _:
                    self.loop.fire(self.loop.timers[which], late_s=LATE_S * late)
                case "cancel", actor, _:
                    self._cancel(self._actors[actor])
                case "lapse", _:
                    self.lapsed_s += self._lock_ttl_s
        how = "hit" if self._stats.hits + self._stats.negative_hits > hits else "share"
        self.notices += (("served", how, *each) for each in self._served)
        self.notices += (("found", how, *each) for each in self._found)
        self._served.clear()
        self._found.clear()

    def _begin(self, actor: Actor) -> None:
        if isinstance(actor, Reader):
            work = self._get(actor)
        elif isinstance(actor, Seeker):
            work = self._seek(actor)
        elif isinstance(actor, Writer):
            work = self._commit(actor)
        else:
            work = self._invalidate(actor)
        _ = self.loop.create_task(work, name=actor.name)

    def _cancel(self, actor: Actor) -> None:
        for task in self.loop.tasks:
            if task.get_name() == actor.name:
                task.cancel()

    def fresh_id(self) -> bytes:
        return b"id%010d" % next(self._ids)

    def monotonic(self) -> float:
        return self.loop.lateness_s()

    @property
    def owes_later(self) -> bool:
        """Whether something that it owes is not due yet."""
        return any(debt.due_s > self.lapsed_s for debt in untyped(self.repairs)._debts.values())

    def time_ns(self) -> int:
        return self._ticks * TICK_MS * 1_000_000

    def frozen(self) -> tuple[Hashable, Hashable, list[bytes]]:
        """What all its tasks share, what each is in the middle of, and its ids in the order of their appearance."""
        unspoken = (Process, Wire, _Cache, _Writes, Reader, Seeker, Writer, Invalidator)
        freezer = Freezer(unspoken, now_s=self.lapsed_s)
        shared = freezer.freeze((self.reads, self.store, self.repairs, self._cache.writes))
        rest = freezer.freeze((self.loop.timers, self.wire.calls, self.loop.tasks, self.loop.late_s))
        return shared, rest, list(freezer.names)


def _fresh_id() -> bytes:
    return Process.running.fresh_id()


class _Time:
    """Stands in for the module `time`."""

    def monotonic(self) -> float:
        return Process.running.monotonic()

    def time_ns(self) -> int:
        return Process.running.time_ns()


class _RepairTime(_Time):
    """The same for what is owed: it only matters whether `lock_ttl` has passed since."""

    def monotonic(self) -> float:
        return Process.running.lapsed_s


class _NoChance:
    """Stands in for the module `random`."""

    def uniform(self, low: float, high: float) -> float:  # noqa: ARG002
        return high

    def random(self) -> float:
        return 0.0


@contextmanager
def simulated() -> Generator[None]:
    """Ids, times and chance are those of the search."""
    with ExitStack() as stack:
        for module, name, stand_in in (
            (protocol, "fresh_id", _fresh_id),
            (reading, "time", _Time()),
            (repair, "time", _RepairTime()),
            (transaction, "time", _Time()),
            (reading, "random", _NoChance()),
            (background, "random", _NoChance()),
        ):
            stack.enter_context(patch.object(module, name, stand_in))
        yield
