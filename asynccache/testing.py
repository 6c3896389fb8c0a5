"""For an application's own tests: count its statements, see that it is served, take the cache away. For any framework.

cache = Cache(FakeMemcached())                     # behaves like a server, and needs none

with assert_queries(engine, 1): ...                # or `async with`; so all of them
with assert_served_from_cache(session): ...
with caching_off(cache): ...
with failing(cache): ...
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session

from asynccache.backends.base import UNREADABLE, UNSENT, Applied, Backend, Change, Key, NodeChanged, Write
from asynccache.backends.memory import MemoryBackend
from asynccache.backends.report import NodeReport, report_unchecked
from asynccache.cache import Cache
from asynccache.errors import ConfigurationError
from asynccache.events import Bypassed, Event, Hit, Missed
from asynccache.session import AsyncCachedSession

P = ParamSpec("P")
T = TypeVar("T")

Database = Engine | Connection | Session | AsyncEngine | AsyncConnection | AsyncSession | async_scoped_session[Any]
"""Whatever leads to an engine."""

SIZE_MAX: Final = 1 << 20
"""A larger value memcached refuses by default."""


class Block(Generic[T]):
    """A `with` block, which may be written `async with` as well."""

    def __init__(self, manager: AbstractContextManager[T]) -> None:
        self._manager = manager

    def __enter__(self) -> T:
        return self._manager.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.__exit__(kind, error, traceback)

    async def __aenter__(self) -> T:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


def _block(generator: Callable[P, Generator[T]]) -> Callable[P, Block[T]]:
    manager = contextmanager(generator)

    @wraps(generator)
    def make(*args: P.args, **kwargs: P.kwargs) -> Block[T]:
        return Block(manager(*args, **kwargs))

    return make


# ---------------------------------------------------------------------------------------------------------- assertions


class Queries(list[str]):
    """The SQL statements that were executed, in order."""

    def __str__(self) -> str:
        return "".join(f"\n  {number}. {' '.join(sql.split())}" for number, sql in enumerate(self, 1)) or " none"


@_block
def counting_queries(database: Database) -> Generator[Queries]:
    """Note the SQL statements that are executed within the block, by anybody, on this database's engine.

    database: an engine, a connection, or a session that is bound to one engine.

    Counted is what goes through a cursor: SAVEPOINT is, BEGIN and COMMIT are not. Raises ConfigurationError for a
    session that is bound to no engine or to several: give it the engine.
    """
    engine, queries = engine_of(database), Queries()

    def note(_connection: Any, _cursor: Any, sql: str, *_: Any) -> None:
        queries.append(sql)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield queries
    finally:
        event.remove(engine, "before_cursor_execute", note)


@_block
def assert_queries(database: Database, count: int) -> Generator[Queries]:
    """Make sure that exactly so many SQL statements are executed within the block.

    database: as for `counting_queries`, which tells what is counted.

    Raises AssertionError with all of them; an error of the block itself goes first.
    """
    with counting_queries(database) as queries:
        yield queries
    if len(queries) != count:
        raise AssertionError(f"{count} SQL statements were expected, and {len(queries)} executed:{queries}")


@_block
def assert_served_from_cache(target: Cache | Database, cache: Cache | None = None) -> Generator[None]:
    """Make sure that the block reads something from the cache, and nothing from the database.

    target: a session with a cache, whose engine must execute no SELECT meanwhile and whose cache must have a hit, and
        neither a miss nor a get that reads past it; or an engine or plain session, together with `cache`; or a cache
        alone, of which only the gets are seen.

    A row that the session holds already is given as it is, and is no hit: use a session for each block.
    Raises AssertionError that tells what was read from where; an error of the block itself goes first.
    """
    cache = cache or (target if isinstance(target, Cache) else _cache_of(target))
    told: list[Event] = []
    cache.observe(told.append)
    try:
        if isinstance(target, Cache):
            queries = Queries()
            yield
        else:
            with counting_queries(target) as queries:
                yield
    finally:
        cache.unobserve(told.append)
    selects = Queries(sql for sql in queries if sql.lstrip().upper().startswith(("SELECT", "WITH")))
    past = [_in_words(each) for each in told if isinstance(each, (Missed, Bypassed))]
    if selects or past or not any(isinstance(each, Hit) for each in told):
        hits = sum(each.rows for each in told if isinstance(each, Hit))
        reads = "; ".join(past) or "no get read past it (a row that the session holds is given as it is)"
        raise AssertionError(f"not served from the cache: {hits} hits; {reads}; SELECTs:{selects}")


def _in_words(told: Missed | Bypassed) -> str:
    name = f"{told.rows} of {told.model.__qualname__}"
    return f"{name} missed" if isinstance(told, Missed) else f"{name} read past it ({told.reason})"


def engine_of(database: Database) -> Engine:
    """The engine on which a session or connection executes. Raises ConfigurationError if there is not just one."""
    match database:
        case async_scoped_session():
            return engine_of(database())
        case AsyncSession():
            return engine_of(database.sync_session)
        case AsyncEngine():
            return database.sync_engine
        case AsyncConnection():
            return database.engine.sync_engine
        case Session():
            if database.bind is None:
                raise ConfigurationError(f"{database!r} is bound to no engine, or to several; give the engine itself")
            return database.bind.engine
        case _:
            return database.engine


def _cache_of(target: Database) -> Cache:
    session = target() if isinstance(target, async_scoped_session) else target
    if not isinstance(session, AsyncCachedSession) or session.cache is None:
        raise ConfigurationError(f"{target!r} has no cache; give one: assert_served_from_cache({target!r}, cache)")
    return session.cache


# ------------------------------------------------------------------------------------------------------------ switches


@_block
def caching_off(cache: Cache) -> Generator[None]:
    """Read everything from the database within the block. Commits go on invalidating, so that nothing is stale after
    it."""
    reading, cache.reading = cache.reading, False
    try:
        yield
    finally:
        cache.reading = reading


@_block
def failing(cache: Cache) -> Generator[FailingBackend]:
    """Have the cache's server be away within the block.

    Reads go to the database; commits go on, or are refused with LockNotPlacedError, as `on_lock_failure` says;
    `cache.invalidate` raises BackendError. What was written meanwhile is repaired in the background after it:
    `await cache.drain()` waits for that.
    """
    store = cache._store
    backend, away = store.backend, FailingBackend(store.backend)
    store.backend = away
    try:
        yield away
    finally:
        store.backend = backend


class FailingBackend(Backend):
    """A backend before another, which can be taken away: `failing` for code that makes its own `Cache`.

    failing: whether the server is away. What is under way when this is set is answered still.
    """

    def __init__(self, backend: Backend, *, failing: bool = True) -> None:
        self.backend = backend
        self.failing = failing
        self.answers_within_s = getattr(backend, "answers_within_s", math.inf)

    def __repr__(self) -> str:
        return f"<FailingBackend {self.backend!r}, {'away' if self.failing else 'answering'}>"

    def observe(self, observer: Callable[[NodeChanged], None]) -> None:
        if hasattr(self.backend, "observe"):
            self.backend.observe(observer)

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        return [UNREADABLE] * len(keys) if self.failing else await self.backend.get_many(keys)

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        return [UNSENT] * len(changes) if self.failing else await self.backend.apply(changes)

    async def check(self, *, lock_ttl_s: float) -> Sequence[NodeReport]:
        if self.failing or not hasattr(self.backend, "check"):
            return [report_unchecked(self)]
        return await self.backend.check(lock_ttl_s=lock_ttl_s)

    async def aclose(self) -> None:
        await self.backend.aclose()


# -------------------------------------------------------------------------------------------------------- a stand-in


class FakeMemcached(Backend):
    """Slots in this process's memory that behave like those in a memcached: `Cache(FakeMemcached())`.

    `memory://` answers at once, so that a hit never awaits and a commit has unlocked what it locked before it returns.
    Here, as with a server, each call awaits, others have their turn meanwhile, and unlocking and storing go on in the
    background: `await cache.drain()` waits for them. Seconds to live are whole ones, rounded up, by a clock that ticks
    once a second. Nothing larger than 1 MiB is stored. A call that is cancelled may have happened.

    latency_s: how long a command travels there, and its answer back, in seconds; 0 is one turn of the event loop each.
    clock: seconds that only go forward; give one of your own to have a ttl pass.

    Caches that are made with the same one share it, as processes share a server.
    """

    answers_within_s = 0.25

    def __init__(self, *, latency_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._latency_s = latency_s
        self._slots = MemoryBackend(value_bytes_max=SIZE_MAX, clock=lambda: float(math.floor(clock())))

    def __repr__(self) -> str:
        return f"<FakeMemcached, {len(self._slots)} slots>"

    def __len__(self) -> int:
        """How many slots are kept, locks and generations included."""
        return len(self._slots)

    async def get_many(self, keys: Sequence[Key]) -> list[bytes | None]:
        await self._travel()
        slots = self._slots.get_many_now(keys)
        await self._travel()
        return slots

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        await self._travel()
        applied = await self._slots.apply([_in_whole_seconds(change) for change in changes])
        await self._travel()
        return applied

    async def check(self, *, lock_ttl_s: float) -> Sequence[NodeReport]:  # noqa: ARG002
        return [report_unchecked(self)]

    async def aclose(self) -> None:
        """As a server does, it goes on when one of its clients is closed."""

    async def _travel(self) -> None:
        await asyncio.sleep(self._latency_s)


def _in_whole_seconds(change: Change) -> Change:
    def transition(found: bytes | None) -> Write | None:
        write = change.transition(found)
        return write and write._replace(ttl_s=float(math.ceil(max(write.ttl_s, 1)) + write.pinned))

    return change._replace(transition=transition)
