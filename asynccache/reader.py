"""Reads rows of one model for one session: may it use the cache, and how does what it finds get into the session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.util import greenlet_spawn

from asynccache.cache import Cache
from asynccache.orm.entity import Entity, PrimaryKey, UnusableRecordError
from asynccache.orm.hydrate import IdentityKey
from asynccache.orm.registry import mapper_of
from asynccache.orm.select import select_many
from asynccache.orm.visibility import expected_isolation
from asynccache.protocol import MISSING, Slot
from asynccache.reading import Ask, Load, Miss
from asynccache.settings import Policy
from asynccache.sync_session import CachedSession

PlainGet = Callable[[AsyncSession, Any, Any, Mapping[str, Any]], Awaitable[object | None]]
"""`AsyncSession.get`: of this session, model and primary key, with the options that the user gave."""


@dataclass(slots=True, eq=False)
class _Row:
    """An `Ask`: one row that a session wants, and what it got."""

    sync: CachedSession
    mapped: Entity
    primary_key: PrimaryKey
    identity_key: IdentityKey
    slot: Slot
    instance: object | None = None

    @property
    def policy(self) -> Policy:
        return self.mapped.policy

    def serve(self, record: bytes) -> bool:
        # The world may have changed since this was asked: the session may hold the row by now.
        instance = self.sync.identity_map.get(self.identity_key)
        if instance is not None:
            self.instance = instance if isinstance(instance, self.mapped.model) else None
        elif record != MISSING:
            try:
                self.instance = self.mapped.hydrate(self.sync, self.identity_key, record)
            except UnusableRecordError:
                return False
        return True

    def why_not(self) -> str | None:
        """Why this very row may not be read from the cache."""
        transaction = self.sync.cached_transaction
        if transaction is not None and transaction.writes.cover(self.mapped.slots, self.slot):
            return "own writes"
        return None

    def record(self) -> bytes | None:
        """What to store and share of a row that was just loaded."""
        if not _may_fill(self.sync):
            return None
        if self.instance is None:
            # That there is no such row of a subclass does not mean that there is no such row.
            return MISSING if self.mapped.is_root else None
        return self.mapped.encode(self.instance, self.identity_key)


async def get(
    session: AsyncSession, cache: Cache, model: Any, ident: Any, options: Mapping[str, Any], plain_get: PlainGet
) -> object | None:
    """Get one row for a session that asks for it as usual. What is written out here is the way of a hit; it is what an
    application does most, so that it makes as few objects and calls as it can. All else is left to `Reader`."""
    sync: CachedSession = session.sync_session  # type: ignore[assignment]
    if isinstance(ident, dict) or (where := whereabouts(sync, cache, model)) is None:
        return await plain_get(session, model, ident, options)
    mapped, bind = where
    primary_key = tuple(ident) if isinstance(ident, (tuple, list)) else (ident,)
    slot = mapped.slots.row(primary_key)
    if slot is None:
        cache.stats.bypassed["primary key type"] += 1
        return await plain_get(session, model, ident, options)
    row = _Row(sync, mapped, primary_key, mapped.identity_key(primary_key), slot)
    held = sync.identity_map.get(row.identity_key)
    if held is not None and _may_give(mapped, held):
        return held
    verdict = why_not(cache, sync, mapped, bind)
    if verdict is not None:
        verdict = await Reader(session, cache, mapped, bind).prepare(verdict)
        held = sync.identity_map.get(row.identity_key)  # by the flush, maybe
    reason = verdict or row.why_not()
    if reason is not None:
        cache.stats.bypassed[reason] += 1
    if reason is not None or held is not None:
        return await plain_get(session, model, ident, options)
    if not sync.in_transaction():
        sync._autobegin_t()  # as a SELECT would, so that code behaves alike on hit and miss
    reads = cache.bound().reads
    entity, generation = await reads.store.read(slot)
    miss = reads.serve(row, entity, generation)
    if miss is not None:

        async def load(_: Sequence[Ask]) -> list[bytes | None]:
            row.instance = await plain_get(session, model, ident, options)
            return [row.record()]

        await _load(cache, sync, [miss], load)
    return row.instance


def whereabouts(sync: CachedSession, cache: Cache, model: Any) -> tuple[Entity, Engine | Connection] | None:
    """The model in the database that the session reads it from, and what the session is bound to for that; None if it
    is not cached there."""
    bind = sync.only_bind
    if bind is None:
        mapper = mapper_of(model)
        if mapper is None:
            return None
        try:
            bind = sync.get_bind(mapper)
        except Exception:
            return None  # SQLAlchemy will ask for it in other words (by statement, by shard), or say what is wrong
    mapped = entity_of(sync, cache, model, bind.engine)
    return (mapped, bind) if mapped is not None else None


def entity_of(sync: CachedSession, cache: Cache, model: Any, engine: Engine) -> Entity | None:
    """The model in the database that the session's transaction uses, or would use; None if it is not cached there."""
    transaction = sync.cached_transaction
    joined = transaction.joined.get(engine) if transaction is not None else None
    scope = joined.scope if joined is not None else cache.scope_of(engine)
    return scope.entity(model) if scope is not None else None


class Step(IntEnum):
    """What has to be done, in this order, before it is known whether a session may read from the cache."""

    FLUSH = 1
    """What is pending is flushed, as by a SELECT."""
    ASK = 2
    """The pool's first connection tells under which isolation all others begin."""
    CONNECT = 3
    """The application listens to the begin of transactions, and may change what they see: another schema or role."""


def why_not(
    cache: Cache, sync: CachedSession, mapped: Entity, bind: Engine | Connection, done: int = 0
) -> str | Step | None:
    """Why this session may read no row of this model from the cache, or what is to be done before that can be told.

    done: the last of the steps that were taken.
    """
    engine, transaction = bind.engine, sync.cached_transaction
    if not cache.reading:
        return "reading is off"
    if mapped.bypass is not None:
        return mapped.bypass
    if engine is not bind:
        return "external connection"
    if not sync.is_active:
        return "inactive transaction"
    listeners, wary = sync.dispatch, cache.settings.bypass_listeners
    if wary and listeners.do_orm_execute:
        cache.warn_once(
            "a session has do_orm_execute listeners, which may filter what it reads, and so reads past the cache; "
            "if yours do not, make it Cache(..., bypass_listeners=False)"
        )
        return "do_orm_execute listener"
    if getattr(sync, "execution_options", None):  # SQLAlchemy 2.1
        return "session execution options"
    joined = None
    if transaction is not None:
        if transaction.changed_settings:
            return "session settings"
        joined = transaction.joined.get(engine)
        if joined is not None and joined.scope is not mapped.scope:
            return "another database than before it began"
    if done < Step.FLUSH and sync.autoflush and not sync._is_clean():
        return Step.FLUSH
    isolation = joined.isolation if joined is not None else expected_isolation(engine)
    if isolation is None and done < Step.ASK:
        return Step.ASK
    if joined is None and done < Step.CONNECT and len(listeners.after_begin) > 1:  # our own
        return Step.CONNECT
    if isolation is None or not isolation.reads_fresh:
        return "isolation level"
    if wary and engine.dispatch.begin:
        cache.warn_once(
            "an engine has begin listeners, which may choose what a transaction sees (a schema, a tenant) before "
            "it is heard of, and so its sessions read past the cache; if yours do not, make it "
            "Cache(..., bypass_listeners=False)"
        )
        return "begin listener"
    return None


async def _load(cache: Cache, sync: CachedSession, misses: Sequence[Miss], load: Load) -> None:
    flight_timeout_s = cache.settings.flight_timeout_s
    await cache.bound().reads.load(
        misses,
        load,
        may_fill=_may_fill(sync),
        patience=lambda: flight_timeout_s if sync.holds_connection else None,
    )


def _may_give(mapped: Entity, held: object) -> bool:
    """Whether what the session itself holds is given as it is. Expired instances, such of another class, and those
    that each get is to refresh are no matter for a cache."""
    return not instance_state(held).expired and isinstance(held, mapped.model) and not mapped.mapper.always_refresh


class Reader:
    """Reads rows of one model for one session."""

    def __init__(self, session: AsyncSession, cache: Cache, mapped: Entity, bind: Engine | Connection) -> None:
        self._session = session
        self._sync = cast("CachedSession", session.sync_session)
        self._cache = cache
        self._mapped = mapped
        self._bind = bind
        self._engine = bind.engine

    async def get_many(self, primary_keys: Sequence[PrimaryKey]) -> Mapping[PrimaryKey, object]:
        mapped, sync, cache = self._mapped, self._sync, self._cache
        verdict = why_not(cache, sync, mapped, self._bind)
        if verdict is not None and (reason := await self.prepare(verdict)) is not None:
            cache.stats.bypassed[reason] += len(primary_keys)
            return await select_many(self._session, mapped.mapper, primary_keys)
        found: dict[PrimaryKey, object] = {}
        rows: list[_Row] = []
        past_cache: list[PrimaryKey] = []
        row_slot, identity_key = mapped.slots.row, mapped.identity_key
        for primary_key in primary_keys:
            slot = row_slot(primary_key)
            if slot is None:
                cache.stats.bypassed["primary key type"] += 1
                past_cache.append(primary_key)
                continue
            row = _Row(sync, mapped, primary_key, identity_key(primary_key), slot)
            held = sync.identity_map.get(row.identity_key)
            if held is not None and _may_give(mapped, held):
                found[primary_key] = held
            elif (reason := row.why_not()) is not None or held is not None:
                if reason is not None:
                    cache.stats.bypassed[reason] += 1
                past_cache.append(primary_key)
            else:
                rows.append(row)

        async def load(asks: Sequence[Ask]) -> list[bytes | None]:
            misses = cast("Sequence[_Row]", asks)
            # In one SELECT with those that the cache may not be asked for.
            keys = [row.primary_key for row in misses] + past_cache
            past_cache.clear()
            selected = await select_many(self._session, mapped.mapper, keys)
            found.update(selected)
            for row in misses:
                row.instance = selected.get(row.primary_key)
            return [row.record() for row in misses]

        if rows:
            if not sync.in_transaction():
                sync._autobegin_t()  # as above
            misses = await cache.bound().reads.look(rows)
            if misses:
                await _load(cache, sync, misses, load)
        if past_cache:
            await load([])
        found.update([(row.primary_key, row.instance) for row in rows if row.instance is not None])
        return found

    async def prepare(self, verdict: str | Step) -> str | None:
        """Take the step that this verdict asks for, and those that follow; give the last verdict."""
        latest: str | Step | None = verdict
        while isinstance(latest, Step):
            match latest:
                case Step.FLUSH:
                    await greenlet_spawn(self._sync._autoflush)
                case Step.ASK:
                    await self._ask_isolation()
                case Step.CONNECT:
                    await self._connect()
            latest = why_not(self._cache, self._sync, self._mapped, self._bind, done=latest)
        return latest

    async def _ask_isolation(self) -> None:
        # One session alone takes the connection: a herd that meets a new process is to wait for the row without
        # holding all connections of the pool.
        bound, pool = self._cache.bound(), self._engine.pool
        async with (asking := bound.asking(pool)):
            if expected_isolation(self._engine) is None and bound.asking(pool) is asking:
                try:
                    await self._connect()
                except Exception:
                    bound.could_not_ask(pool)
                    raise
        if expected_isolation(self._engine) is None:
            await self._connect()

    async def _connect(self) -> None:
        _ = await self._session.connection(bind_arguments={"mapper": self._mapped.mapper})


def _may_fill(sync: CachedSession) -> bool:
    """Whether rows that this session loads now are what everybody would see."""
    transaction = sync.cached_transaction
    return transaction is None or not (
        transaction.writes.any
        or transaction.changed_settings
        or transaction.reads_snapshot
        or transaction.external
        or not all(joined.isolation.reads_fresh for joined in transaction.joined.values())
    )
