"""Reads rows of one model for one session: may it use the cache, and how does what it finds get into the session."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.util import greenlet_spawn

from asynccache.cache import Cache
from asynccache.orm.entity import Entity, PrimaryKey, UnusableRecordError
from asynccache.orm.hydrate import IdentityKey
from asynccache.orm.select import select_many
from asynccache.orm.visibility import Isolation, expected_isolation
from asynccache.protocol import MISSING, Slot
from asynccache.reading import Ask
from asynccache.settings import Policy
from asynccache.sync_session import CachedSession
from asynccache.transaction import Joined

PlainGet = Callable[[], Awaitable[object | None]]
"""`AsyncSession.get`, with the arguments that the user gave."""


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

    def record(self) -> bytes | None:
        """What to store and share of a row that was just loaded."""
        if not _may_fill(self.sync):
            return None
        if self.instance is None:
            # That there is no such row of a subclass does not mean that there is no such row.
            return MISSING if self.mapped.is_root else None
        return self.mapped.encode(self.instance, self.identity_key)


def entity_of(sync: CachedSession, cache: Cache, mapper: Mapper[Any], bind: Engine | Connection) -> Entity | None:
    """The model in the database that the session's transaction uses, or would use; None if it is not cached there."""
    joined = sync.cached_transaction.joined.get(bind.engine) if sync.cached_transaction is not None else None
    scope = joined.scope if joined is not None else cache.scope_of(bind.engine)
    return scope.entity(mapper.class_) if scope is not None else None


class Reader:
    """Reads rows of one model for one session."""

    def __init__(self, session: AsyncSession, cache: Cache, mapped: Entity, bind: Engine | Connection) -> None:
        self._session = session
        self._sync = cast("CachedSession", session.sync_session)
        self._cache = cache
        self._mapped = mapped
        self._bind = bind

    @classmethod
    def of(cls, session: AsyncSession, cache: Cache, mapper: Mapper[Any]) -> Reader | None:
        """None if the model is not cached in the database that the session would read it from."""
        sync = cast("CachedSession", session.sync_session)
        try:
            bind = sync.get_bind(mapper)
        except Exception:
            return None  # SQLAlchemy will ask for it in other words (by statement, by shard), or say what is wrong
        mapped = entity_of(sync, cache, mapper, bind)
        return cls(session, cache, mapped, bind) if mapped is not None else None

    async def get(self, primary_key: PrimaryKey, plain_get: PlainGet) -> object | None:
        slot = self._mapped.slots.row(primary_key)
        if slot is None:
            return await self._get_past_cache(plain_get, "primary key type")
        row = self._row(primary_key, slot)
        instance = self._present(row)
        if instance is not None:
            return instance
        reason = await self._prepare() or self._why_not_row(row)
        if reason is not None:
            return await self._get_past_cache(plain_get, reason)
        if row.identity_key in self._sync.identity_map:  # by the flush
            return await plain_get()

        async def load(_: Sequence[Ask]) -> list[bytes | None]:
            row.instance = await plain_get()
            return [row.record()]

        await self._read([row], load)
        return row.instance

    async def get_many(self, primary_keys: Sequence[PrimaryKey]) -> Mapping[PrimaryKey, object]:
        reason = await self._prepare()
        if reason is not None:
            self._cache.stats.bypassed[reason] += len(primary_keys)
            return await select_many(self._session, self._mapped.mapper, primary_keys)
        found: dict[PrimaryKey, object] = {}
        rows: list[_Row] = []
        past_cache: list[PrimaryKey] = []
        for primary_key in primary_keys:
            slot = self._mapped.slots.row(primary_key)
            if slot is None:
                self._cache.stats.bypassed["primary key type"] += 1
                past_cache.append(primary_key)
                continue
            row = self._row(primary_key, slot)
            instance = self._present(row)
            if instance is not None:
                found[primary_key] = instance
            elif (reason := self._why_not_row(row)) is not None or row.identity_key in self._sync.identity_map:
                if reason is not None:
                    self._cache.stats.bypassed[reason] += 1
                past_cache.append(primary_key)
            else:
                rows.append(row)

        async def load(asks: Sequence[Ask]) -> list[bytes | None]:
            misses = cast("Sequence[_Row]", asks)
            # In one SELECT with those that the cache may not be asked for.
            keys = [row.primary_key for row in misses] + past_cache
            past_cache.clear()
            selected = await select_many(self._session, self._mapped.mapper, keys)
            found.update(selected)
            for row in misses:
                row.instance = selected.get(row.primary_key)
            return [row.record() for row in misses]

        if rows:
            await self._read(rows, load)
        if past_cache:
            await load([])
        found.update((row.primary_key, row.instance) for row in rows if row.instance is not None)
        return found

    async def _read(
        self, rows: Sequence[_Row], load: Callable[[Sequence[Ask]], Awaitable[Sequence[bytes | None]]]
    ) -> None:
        sync = self._sync
        if not sync.in_transaction():
            sync._autobegin_t()  # as a SELECT would, so that code behaves alike on hit and miss
        flight_timeout_s = self._cache.settings.flight_timeout_s
        await self._cache.bound().reads.read(
            rows,
            load,
            may_fill=_may_fill(sync),
            patience=lambda: flight_timeout_s if sync.holds_connection else None,
        )

    def _row(self, primary_key: PrimaryKey, slot: Slot) -> _Row:
        return _Row(self._sync, self._mapped, primary_key, self._mapped.identity_key(primary_key), slot)

    def _present(self, row: _Row) -> object | None:
        """What the session itself has loaded, as it is. Expired instances, such of another class, and those that each
        get is to refresh are no matter for a cache."""
        if self._mapped.mapper.always_refresh:
            return None
        instance = self._sync.identity_map.get(row.identity_key)
        if instance is None or instance_state(instance).expired or not isinstance(instance, self._mapped.model):
            return None
        return instance

    async def _get_past_cache(self, plain_get: PlainGet, reason: str) -> object | None:
        self._cache.stats.bypassed[reason] += 1
        return await plain_get()

    # ------------------------------------------------------------------------------------------------------ visibility

    async def _prepare(self) -> str | None:
        """Flush what is pending, as a SELECT would; find out whether this session may read from the cache, and say
        why if it may not."""
        sync = self._sync
        reason = self._why_not()
        if reason is None and sync.autoflush and not sync._is_clean():
            await greenlet_spawn(sync._autoflush)
            reason = self._why_not()
        if reason is None and self._isolation() is None:
            # The pool's first connection tells under which isolation all others begin. One session alone takes it:
            # a herd that meets a new process is to wait for the row without holding all connections of the pool.
            bound, pool = self._cache.bound(), self._bind.engine.pool
            async with (asking := bound.asking(pool)):
                if self._isolation() is None and bound.asking(pool) is asking:
                    try:
                        await self._connect()
                    except Exception:
                        bound.could_not_ask(pool)
                        raise
            if self._isolation() is None:
                await self._connect()
            reason = self._why_not()
        if reason is None and self._joined() is None and len(self._sync.dispatch.after_begin) > 1:
            # The application listens too, and may change what the transaction sees: another schema, another role.
            await self._connect()
            reason = self._why_not()
        if reason is not None:
            return reason
        isolation = self._isolation()
        if isolation is None or not isolation.reads_fresh:
            return "isolation level"
        if self._cache.settings.bypass_listeners and self._bind.engine.dispatch.begin:
            self._cache.warn_once(
                "an engine has begin listeners, which may choose what a transaction sees (a schema, a tenant) before "
                "it is heard of, and so its sessions read past the cache; if yours do not, make it "
                "Cache(..., bypass_listeners=False)"
            )
            return "begin listener"
        return None

    async def _connect(self) -> None:
        _ = await self._session.connection(bind_arguments={"mapper": self._mapped.mapper})

    def _joined(self) -> Joined | None:
        transaction = self._sync.cached_transaction
        return transaction.joined.get(self._bind.engine) if transaction is not None else None

    def _isolation(self) -> Isolation | None:
        joined = self._joined()
        return joined.isolation if joined is not None else expected_isolation(self._bind.engine)

    def _why_not(self) -> str | None:
        """Why this session may read no row of this model from the cache."""
        cache, sync, transaction = self._cache, self._sync, self._sync.cached_transaction
        if not cache.reading:
            return "reading is off"
        if self._mapped.bypass is not None:
            return self._mapped.bypass
        if isinstance(self._bind, Connection):
            return "external connection"
        if not sync.is_active:
            return "inactive transaction"
        if cache.settings.bypass_listeners and sync.dispatch.do_orm_execute:
            cache.warn_once(
                "a session has do_orm_execute listeners, which may filter what it reads, and so reads past the cache; "
                "if yours do not, make it Cache(..., bypass_listeners=False)"
            )
            return "do_orm_execute listener"
        if getattr(sync, "execution_options", None):  # SQLAlchemy 2.1
            return "session execution options"
        if transaction is not None and transaction.changed_settings:
            return "session settings"
        if (joined := self._joined()) is not None and joined.scope is not self._mapped.scope:
            return "another database than before it began"
        return None

    def _why_not_row(self, row: _Row) -> str | None:
        transaction = self._sync.cached_transaction
        if transaction is not None and transaction.writes.cover(self._mapped.slots, row.slot):
            return "own writes"
        return None


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
