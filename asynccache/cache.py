"""`Cache`: a backend, the models that are cached in it, the settings, and the life of all that on an event loop."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypeVar, overload
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import QueryableAttribute, registry
from sqlalchemy.pool import Pool
from sqlalchemy.types import TypeEngine

from asynccache.audit import Audit, Mismatch
from asynccache.backends.base import Backend
from asynccache.backends.memcached import MemcachedBackend, without_password
from asynccache.backends.memory import MemoryBackend
from asynccache.backends.report import NodeReport, lock_life_s, report_unchecked
from asynccache.background import Background
from asynccache.errors import (
    AsyncCacheWarning,
    BackendError,
    CacheClosedError,
    ConfigurationError,
    NotRegisteredError,
    WrongLoopError,
)
from asynccache.events import Observer
from asynccache.inspection import Inspection, inspect
from asynccache.locking import WritePath
from asynccache.metrics import Stats
from asynccache.orm.cacheable import check_cacheable, columns_left_out
from asynccache.orm.forms import TypeCodec
from asynccache.orm.keys import primary_key_of
from asynccache.orm.registry import Hierarchy, Models, mapper_of
from asynccache.orm.unique import Unique, unique_keys
from asynccache.protocol import Slot
from asynccache.reading import ReadPath
from asynccache.repair import Repairs
from asynccache.scopes import Scopes
from asynccache.settings import Duration, OnLockFailure, Policy, Settings, seconds
from asynccache.store import Store
from asynccache.telemetry import Telemetry

M = TypeVar("M", bound="type[Any] | registry")
T = TypeVar("T")

Plain = bool | int | float | str | bytes | list[Any] | dict[str, Any]
"""What a codec may encode values to; lists and dicts of the same, too."""

_DEFAULTS = Settings()

logger = logging.getLogger("asynccache")
_POLICY = _DEFAULTS.policy


@dataclass(frozen=True, slots=True)
class Bound:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    background: Background
    reads: ReadPath
    writes: WritePath
    repairs: Repairs
    _asking: WeakKeyDictionary[Pool, asyncio.Lock] = field(default_factory=WeakKeyDictionary)

    def asking(self, pool: Pool) -> asyncio.Lock:
        """Held by the session that finds out for all others under which isolation the pool's connections begin."""
        return self._asking.setdefault(pool, asyncio.Lock())

    def could_not_ask(self, pool: Pool) -> None:
        """The database did not answer: nobody who waits is to wait in turn for the same to happen to the next."""
        self._asking.pop(pool, None)


class Cache:
    """A second-level cache for SQLAlchemy's asyncio sessions.

    It may be made at import time, before any event loop runs; it connects on first use, and serves one event loop at a
    time. `async with cache:` closes it at the end.

    backend: `memory://`, `memory://?entries_max=100000&bytes_max=134217728`, `memcached://host:port[,host:port...]`,
        `memcacheds://` for TLS, `memcached+unix:///path`, or a `Backend`.
    ttl: how long a row is served. All times are seconds or a `timedelta`.
    ttl_jitter: each ttl is shortened at random by up to this fraction.
    negative_ttl: how long "there is no such row" is served.
    namespace: a prefix of all keys, for applications that share a server, or after the list of servers has changed.
    on_lock_failure: "commit" although a slot could not be locked, and go on destroying it in the background until that
        is done or `ttl` has passed; or "raise" `LockNotPlacedError` before COMMIT.
    lease_ttl, lease_timeout, lock_ttl, lock_timeout, flight_timeout, hold_off, buckets, slots_max,
    repairs_max, bypass_listeners, rewrite_pk_selects: see `Settings`.

    Raises ConfigurationError for a URL or a setting that makes no sense.
    """

    def __init__(
        self,
        backend: str | Backend,
        *,
        ttl: Duration = _POLICY.ttl_s,
        ttl_jitter: float = _POLICY.ttl_jitter,
        negative_ttl: Duration = _POLICY.negative_ttl_s,
        namespace: str = "",
        on_lock_failure: OnLockFailure = _DEFAULTS.on_lock_failure,
        lease_ttl: Duration = _DEFAULTS.lease_ttl_s,
        lease_timeout: Duration = _DEFAULTS.lease_timeout_s,
        lock_ttl: Duration = _DEFAULTS.lock_ttl_s,
        lock_timeout: Duration = _DEFAULTS.lock_timeout_s,
        flight_timeout: Duration = _DEFAULTS.flight_timeout_s,
        hold_off: Duration = _DEFAULTS.hold_off_s,
        buckets: int = _DEFAULTS.buckets,
        slots_max: int = _DEFAULTS.slots_max,
        repairs_max: int = _DEFAULTS.repairs_max,
        bypass_listeners: bool = _DEFAULTS.bypass_listeners,
        rewrite_pk_selects: bool = _DEFAULTS.rewrite_pk_selects,
    ) -> None:
        self.settings = Settings(
            policy=Policy(seconds("ttl", ttl), ttl_jitter, seconds("negative_ttl", negative_ttl)),
            lease_ttl_s=seconds("lease_ttl", lease_ttl),
            lease_timeout_s=seconds("lease_timeout", lease_timeout),
            lock_ttl_s=seconds("lock_ttl", lock_ttl),
            lock_timeout_s=seconds("lock_timeout", lock_timeout),
            flight_timeout_s=seconds("flight_timeout", flight_timeout),
            hold_off_s=seconds("hold_off", hold_off, zero=True),
            buckets=buckets,
            slots_max=slots_max,
            repairs_max=repairs_max,
            on_lock_failure=on_lock_failure,
            bypass_listeners=bypass_listeners,
            rewrite_pk_selects=rewrite_pk_selects,
        )
        self.reading = True
        """Set to False, gets read past the cache, while commits go on invalidating it: nothing stale is left when it
        is set back."""
        self.models = Models()
        self._scopes = Scopes(self.models, namespace=namespace, buckets=buckets, warn_once=self.warn_once)
        self.scope_of = self._scopes.of
        """Each get asks for it."""
        self.stats = Stats()
        self.telemetry = Telemetry(self.stats, self._scopes.model_of)
        self._store = Store(_backend_of(backend) if isinstance(backend, str) else backend, self.telemetry)
        if hasattr(self._store.backend, "observe"):  # else it has all that the protocol needs, and no more
            self._store.backend.observe(self.telemetry.node_changed)
        self._bound: Bound | None = None
        self._closed = False
        self._checked = False
        self._watched: WeakSet[Engine] = WeakSet()
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<Cache {self._store.backend!r}{', closed' if self._closed else ''}>"

    # ------------------------------------------------------------------------------------------------------- observers

    def observe(self, observer: Observer) -> None:
        """Call this with each event from here on: `asynccache.events` has them all.

        observer: a callable that is quick and does not await; what it raises is logged once. Twice is once.
        """
        if observer not in self.telemetry.observers:
            self.telemetry.observers = (*self.telemetry.observers, observer)

    def unobserve(self, observer: Observer) -> None:
        """Call this no more."""
        self.telemetry.observers = tuple(each for each in self.telemetry.observers if each != observer)

    # ------------------------------------------------------------------------------------------------------- lifecycle

    def bound(self) -> Bound:
        """What serves the running event loop. Raises CacheClosedError and WrongLoopError."""
        loop = asyncio.get_running_loop()
        bound = self._bound
        if bound is not None and bound.loop is loop and not self._closed:
            return bound
        if self._closed:
            raise CacheClosedError(f"{self!r} is closed; make a new Cache, or close it later than its last session")
        if bound is not None and bound.loop.is_running():
            raise WrongLoopError(
                f"{self!r} serves another event loop, which is still running; make one Cache for each loop"
            )
        background = Background()
        parts = (self._store, self.settings, self.telemetry, background)
        repairs = Repairs(*parts, ttl_max_s=lambda: self.models.ttl_max_s)
        if bound is not None:
            repairs.take_over(bound.repairs)
        self._bound = Bound(loop, background, ReadPath(*parts), WritePath(*parts, repairs), repairs)
        if self.settings.on_lock_failure == "raise" and not self._checked:
            self._checked = True
            background.spawn(self._warn_of_evictable_locks(), "check the servers")
        return self._bound

    async def _warn_of_evictable_locks(self) -> None:
        """Who wants a commit refused rather than a stale read has to know what else can cause one."""
        reports: Sequence[NodeReport] = []
        with suppress(CacheClosedError):  # at once after its first use
            reports = await self.check()
        for report in reports:
            if report.locks_protected is False:
                logger.warning(
                    "%s may evict locks, so that a writer that dies may leave an old row behind although "
                    'on_lock_failure="raise". Start memcached with -o temporary_ttl=%d',
                    report.node,
                    lock_life_s(self.settings.lock_ttl_s),
                )

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that this cache serves, while it runs."""
        bound = self._bound
        return bound.loop if bound is not None and bound.loop.is_running() else None

    async def check(self) -> Sequence[NodeReport]:
        """Ask each server of the backend how it is: whether it can be used, and what could be better, with a way out.

        Trouble with a server is in its report, not raised; the answer takes no longer than the backend's time-outs.
        `python -m asynccache check URL` shows the same. Raises CacheClosedError and WrongLoopError.
        """
        self.bound()
        backend = self._store.backend
        if not hasattr(backend, "check"):  # as above
            return [report_unchecked(backend)]
        return await backend.check(lock_ttl_s=self.settings.lock_ttl_s)

    async def drain(self) -> None:
        """Wait for the work that goes on in the background: fills, and unlocking what commits have locked.

        After a commit whose outcome is not known this takes up to `lock_ttl`.
        """
        if self._bound is not None and self._bound.loop is asyncio.get_running_loop():
            await self._bound.background.drain()

    async def aclose(self) -> None:
        """Finish the work in the background and let go of the connections. The cache cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        for engine in list(self._watched):
            self.unwatch(engine)
        try:
            if self._bound is not None and self._bound.loop is asyncio.get_running_loop():
                await self._bound.background.aclose()
        finally:
            await self._store.backend.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    # ---------------------------------------------------------------------------------------------------- registration

    @overload
    def register(
        self,
        model: M,
        *,
        ttl: Duration | None = None,
        ttl_jitter: float | None = None,
        negative_ttl: Duration | None = None,
        exclude_columns: Iterable[str | QueryableAttribute[Any]] = (),
        unique: Unique = (),
    ) -> M: ...

    @overload
    def register(
        self,
        *,
        ttl: Duration | None = None,
        ttl_jitter: float | None = None,
        negative_ttl: Duration | None = None,
        exclude_columns: Iterable[str | QueryableAttribute[Any]] = (),
        unique: Unique = (),
    ) -> Callable[[M], M]: ...

    def register(
        self,
        model: M | None = None,
        *,
        ttl: Duration | None = None,
        ttl_jitter: float | None = None,
        negative_ttl: Duration | None = None,
        exclude_columns: Iterable[str | QueryableAttribute[Any]] = (),
        unique: Unique = (),
    ) -> M | Callable[[M], M]:
        """Cache the rows of a model.

        model: a mapped class, a declarative base or a `registry`. A base covers its subclasses, those that are mapped
            later included; one that cannot be cached is skipped with a warning when it is first met. Left out, this
            is a decorator: `@cache.register(ttl=35)`.
        ttl, ttl_jitter, negative_ttl: instead of the cache's own.
        exclude_columns: attributes of a mapped class, by name or as `Model.attribute`, that are not stored. A get that
            is answered from the cache leaves them to be loaded when they are first used, as deferred columns are.
        unique: secondary keys, for `cached_get_by`: names of attributes, or tuples of them, `["email", ("tenant_id",
            "slug")]`. The database has to hold them unique, by a constraint or an index that the table knows.

        Register the same models in every process that shares a cache, with the same secondary keys: one that does not
        know that a table is cached does not invalidate it.

        Raises ConfigurationError for something else than a model, a time that is not positive, a column that cannot be
        left out, or a key that is not unique; NotCacheableError, naming model and column, for a mapped class that
        cannot be cached.
        """
        excluded = tuple(exclude_columns)
        default = self.settings.policy
        usual = Policy(
            ttl_s=default.ttl_s if ttl is None else seconds("ttl", ttl),
            ttl_jitter=default.ttl_jitter if ttl_jitter is None else ttl_jitter,
            negative_ttl_s=default.negative_ttl_s if negative_ttl is None else seconds("negative_ttl", negative_ttl),
        )

        def add(target: M) -> M:
            policy = replace(usual, exclude_columns=columns_left_out(target, excluded)) if excluded else usual
            mapper = mapper_of(target)
            if mapper is not None:
                check_cacheable(mapper, policy, self.models.codecs)
            self.models.add(target, policy, unique_keys(target, unique))
            self._scopes.forget()
            return target

        return add if model is None else add(model)

    def exclude(self, model: type[Any]) -> None:
        """Do not cache this class and its subclasses, although a base of it is registered.

        Raises ConfigurationError for something that is no mapped class.
        """
        self.models.exclude(model)
        self._scopes.forget()

    def codec_for(
        self,
        type_: type[TypeEngine[T]],
        *,
        encode: Callable[[T], Plain],
        decode: Callable[[Any], T],
        version: int | str = 1,
    ) -> None:
        """Say how values of a column type are stored: one that the library does not know, or knows otherwise.

        type_: a class of column types, which stands for its subclasses, too. It may be within an ARRAY or below a
            TypeDecorator.
        encode: a value -> what is stored, of plain types. Not called for None.
        decode: the way back, to a value of the same type that is encoded to the same. It is given what the cache server
            has, so that it must not run what that could choose: no pickle.
        version: change it when what is stored changes. Processes read only rows that are stored as they store them.

        Call it before the models with such columns are registered, in every process. Where a value does not come back
        as said, its row is not cached, which is logged.

        Raises ConfigurationError for something else than a class of column types, or one that has a codec already.
        """
        if not (isinstance(type_, type) and issubclass(type_, TypeEngine)):
            raise ConfigurationError(f"codec_for takes a class of column types, such as JSON, and not {type_!r}")
        if type_ in self.models.codecs:
            raise ConfigurationError(f"{type_.__qualname__} has a codec already; say once how its values are stored")
        self.models.codecs[type_] = TypeCodec(encode, decode, f"{type_.__qualname__}, version {version}")
        self._scopes.forget()

    # ---------------------------------------------------------------------------------------------------- invalidation

    def watch(self, engine: Engine | AsyncEngine) -> None:
        """Have all that is committed through an engine invalidate this cache: Core statements, plain sessions, DDL.

        Sessions of ours need no watching. What a transaction has written is locked before its COMMIT is sent, and
        unlocked once it was answered, as these do it.

        engine: with an asyncio driver, or with another one, for code that runs in threads of its own or without an
            event loop. Where such code blocks the event loop itself, nothing can be locked before COMMIT, and what
            was written is invalidated right after it.

        From the next transaction on, until `unwatch` or `aclose`; twice is once. Raises CacheClosedError.
        """
        if self._closed:
            raise CacheClosedError(f"{self!r} is closed; make a new Cache, or watch engines before")
        with suppress(RuntimeError):  # no event loop runs
            self.bound()
        from asynccache import engine_events  # noqa: PLC0415 - which stands above

        engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        self._watched.add(engine)
        engine_events.watch(self, engine)

    def unwatch(self, engine: Engine | AsyncEngine) -> None:
        """Transactions that begin on this engine from here on are none of the cache's business."""
        from asynccache import engine_events  # noqa: PLC0415 - which stands above

        engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        self._watched.discard(engine)
        engine_events.unwatch(self, engine)

    async def invalidate(
        self,
        model: type[Any],
        pk: Any,
        *,
        values: Mapping[str, Any] | None = None,
        scope: str | Engine | AsyncEngine | None = None,
    ) -> None:
        """Make sure that nothing read before now is served for one row, for code outside of a session.

        pk: as for `Session.get`.
        values: for a model with secondary keys, what their attributes are by now, `{"email": "eve@example.com"}`: that
            there is no row with these values is served no more. Without them all rows of the model are invalidated.
        scope: the database: an engine, or a name as `execution_options(cache_scope=...)` or the URL gives it. None:
            every database that this process has used with this cache.

        Raises NotRegisteredError; BackendError if the cache server did not answer; ConfigurationError if no database
        is known yet; SQLAlchemy's InvalidRequestError for a wrong number of values.
        """
        mapper = mapper_of(model)
        slots: list[Slot] = []
        for each in await self._scopes.meant_by(scope):
            entity = each.entity(model)
            if entity is None or mapper is None:
                raise self.not_registered(model)
            slots += entity.slots_of(primary_key_of(mapper, pk), values or {}) or entity.slots.generations
        await self._destroy(slots, f"{model.__qualname__} {pk!r}")

    async def invalidate_all(self, model: type[Any], *, scope: str | Engine | AsyncEngine | None = None) -> None:
        """The same for all rows of a model, and of the other models that share its root table."""
        mapper = mapper_of(model)
        hierarchy = Hierarchy.of(mapper) if mapper is not None else None
        if hierarchy is None or self.models.policy_of(model) is None:
            raise self.not_registered(model)
        scopes = await self._scopes.meant_by(scope)
        slots = [slot for each in scopes for slot in each.slots_of(hierarchy).generations]
        await self._destroy(slots, f"all of {model.__qualname__}")

    async def audit(
        self,
        session: AsyncSession,
        model: type[Any],
        *,
        pks: Iterable[Any] | None = None,
        sample: int | None = 1000,
        rows_per_second: float = 500.0,
    ) -> AsyncGenerator[Mismatch, None]:
        """Compare what the cache would serve with what the database holds: `async for mismatch in cache.audit(...)`.

        It finds what no cache can prevent: rows that programs past this library have changed, or triggers. It reads
        only; `invalidate` mends what it finds. A race with a commit is told from a mismatch by looking again.

        session: tells the database. It is not used itself; each look is a short transaction of another.
        pks: look at these rows alone, each as for `Session.get`. Only so are rows found that were deleted past this
            library: nobody else knows their keys.
        sample: so many rows at random, which makes the database look at all its keys; None for every row, in the
            order of their keys.
        rows_per_second: how fast to go at most.

        Raises NotRegisteredError; ConfigurationError for a sample or rate of nothing, a session on a connection, or a
        database without a name; SQLAlchemy's InvalidRequestError for a key with a wrong number of values.
        """
        if (sample is not None and sample < 1) or not rows_per_second > 0:
            raise ConfigurationError(
                f"sample and rows_per_second must be more than 0, not {sample!r} and {rows_per_second!r}"
            )
        mapper = mapper_of(model)
        if mapper is None or self.models.policy_of(model) is None:
            raise self.not_registered(model)
        given = None if pks is None else [primary_key_of(mapper, pk) for pk in pks]
        engine = session.get_bind(mapper)
        if not isinstance(engine, Engine):
            raise ConfigurationError("an audit needs a session that is bound to an engine, not to a connection")
        for scope in await self._scopes.meant_by(AsyncEngine(engine)):
            entity = scope.entity(model)
            if entity is None:
                raise self.not_registered(model)
            self.bound()
            audit = Audit(self._store, self.stats, entity, engine)
            async with aclosing(audit.run(given, sample, rows_per_second)) as mismatches:
                async for mismatch in mismatches:
                    yield mismatch

    async def inspect(
        self, model: type[Any], pk: Any, *, scope: str | Engine | AsyncEngine | None = None
    ) -> Sequence[Inspection]:
        """Look at what the cache has of one row, without reading it: one answer for each database.

        pk, scope: as for `invalidate`.
        `python -m asynccache inspect` shows the same. Raises NotRegisteredError; ConfigurationError if no database is
        known yet, or for a primary key that no row is cached under, as its values are not exactly of the columns'
        types; SQLAlchemy's InvalidRequestError for a wrong number of values.
        """
        mapper = mapper_of(model)
        found: list[Inspection] = []
        for each in await self._scopes.meant_by(scope):
            entity = each.entity(model)
            if entity is None or mapper is None:
                raise self.not_registered(model)
            self.bound()
            inspection = await inspect(self._store, entity, primary_key_of(mapper, pk))
            if inspection is None:
                columns = ", ".join(f"{column.name} {column.type!r}" for column in mapper.primary_key)
                raise ConfigurationError(f"no row is cached under {pk!r}; the primary key has exactly: {columns}")
            found.append(inspection)
        return found

    async def _destroy(self, slots: Sequence[Slot], what: str) -> None:
        if not await self.bound().writes.destroy(slots):
            raise BackendError(
                f"{what} could not be invalidated: {self._store.backend!r} did not answer, or refused; try again"
            )

    def not_registered(self, model: object) -> NotRegisteredError:
        name = getattr(model, "__qualname__", repr(model))
        if mapper_of(model) is None:
            return NotRegisteredError(f"{name} is not a mapped class; ask for one that was registered")
        return NotRegisteredError(f"{name} is not cached; call cache.register({name}) before it is used")

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, AsyncCacheWarning, stacklevel=2)


def _backend_of(url: str) -> Backend:
    scheme = url.partition("://")[0]
    if url == "memory://" or url.startswith("memory://?"):
        return MemoryBackend.from_url(url)
    if scheme in ("memcached", "memcacheds", "memcached+unix"):
        return MemcachedBackend.from_url(url)
    raise ConfigurationError(
        f"{without_password(url)!r} is no cache; use memory://, memcached://host:port[,host:port...], "
        "memcacheds:// for TLS, memcached+unix:///path, or a Backend"
    )
