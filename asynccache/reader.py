"""Reads rows of one model for one session: from the cache, if it may, or by a SELECT that fills it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import instance_dict, set_committed_value
from sqlalchemy.util import greenlet_spawn

from asynccache.cache import Cache
from asynccache.eligibility import Step, may_fill, may_give, may_refresh, whereabouts, why_not
from asynccache.orm.entity import Entity
from asynccache.orm.hydrate import IdentityKey
from asynccache.orm.keys import PrimaryKey
from asynccache.orm.relationships import ManyToOne
from asynccache.orm.rows import UnusableRecordError
from asynccache.orm.select import select_many
from asynccache.orm.visibility import expected_isolation
from asynccache.protocol import MISSING, Slot
from asynccache.reading import Ask, Load, Miss
from asynccache.sync_session import CachedSession


@dataclass(slots=True, eq=False)
class Row:
    """An `Ask`: one row that a session wants, and what it got."""

    sync: CachedSession
    mapped: Entity
    primary_key: PrimaryKey
    identity_key: IdentityKey
    slot: Slot
    expired: object | None = None
    """What the session holds of it, if that is to be refreshed."""
    instance: object | None = None

    def serve(self, record: bytes) -> bool:
        # The world may have changed since this was asked: the session may hold the row by now.
        instance = self.sync.identity_map.get(self.identity_key)
        if instance is not None and (instance is not self.expired or not may_refresh(self.sync, self.mapped, instance)):
            self.instance = instance if isinstance(instance, self.mapped.model) else None
        elif record != MISSING:
            try:
                self.instance = self.mapped.hydrate(self.sync, self.identity_key, record, instance)
            except UnusableRecordError:
                return False
        return True

    def certain(self, record: bytes) -> bytes:
        return record

    def why_not(self) -> str | None:
        """Why this very row may not be read from the cache."""
        transaction = self.sync.cached_transaction
        if transaction is not None and transaction.writes.cover(self.mapped.slots, self.slot):
            return "own writes"
        return None

    def record(self) -> bytes | None:
        """What to store and share of a row that was just loaded."""
        if not may_fill(self.sync):
            return None
        if self.instance is None:
            # That there is no such row of a subclass does not mean that there is no such row.
            return MISSING if self.mapped.is_root else None
        return self.mapped.encode(self.instance, self.identity_key)


async def get_many(
    sync: CachedSession, cache: Cache, mapper: Mapper[Any], primary_keys: Sequence[PrimaryKey]
) -> Mapping[PrimaryKey, object]:
    """Get many rows of one class, those that there are."""
    where = whereabouts(sync, cache, mapper.class_)
    if where is None:
        return await greenlet_spawn(select_many, sync, mapper, primary_keys)
    return await Reader(sync, cache, *where).get_many(primary_keys)


async def prefetch(
    sync: CachedSession, cache: Cache, parent: ManyToOne, instances: Sequence[object]
) -> Sequence[object]:
    """Load this many-to-one of these instances, where it is not loaded: one read for all. Gives what it leads to."""
    unloaded = [each for each in instances if not parent.is_loaded(each)]
    if unloaded and not sync._is_clean():
        await greenlet_spawn(sync._autoflush)  # a key may be the database's to make
    if any(not parent.knows_key(each) for each in unloaded):  # deferred, or expired
        await greenlet_spawn(lambda: [parent.key_of(each) for each in unloaded])
    keys = [parent.key_of(each) for each in unloaded]
    wanted = list(dict.fromkeys(key for key in keys if None not in key))
    found = await get_many(sync, cache, parent.target, wanted) if wanted else {}
    for instance, key in zip(unloaded, keys, strict=True):
        # The world may have changed meanwhile.
        if not parent.is_loaded(instance) and parent.knows_key(instance) and parent.key_of(instance) == key:
            set_committed_value(instance, parent.key, found.get(key))
    loaded = (instance_dict(each).get(parent.key) for each in instances)
    return list({id(each): each for each in loaded if each is not None}.values())


async def load_misses(cache: Cache, sync: CachedSession, misses: Sequence[Miss], load: Load) -> None:
    flight_timeout_s = cache.settings.flight_timeout_s
    await cache.bound().reads.load(
        misses,
        load,
        may_fill=may_fill(sync),
        patience=lambda: flight_timeout_s if sync.holds_connection else None,
    )


class Reader:
    """Reads rows of one model for one session."""

    def __init__(self, sync: CachedSession, cache: Cache, mapped: Entity, bind: Engine | Connection) -> None:
        self._sync = sync
        self._cache = cache
        self._mapped = mapped
        self._bind = bind
        self._engine = bind.engine

    async def get_many(self, primary_keys: Sequence[PrimaryKey]) -> Mapping[PrimaryKey, object]:
        mapped, sync, cache = self._mapped, self._sync, self._cache
        verdict = why_not(cache, sync, mapped, self._bind)
        reason = await self.prepare(verdict) if verdict is not None else None
        if any(each.selected for each in mapped.eager.values()):
            reason = reason or "eager relationship"  # one SELECT for all of them, instead of one for each
        if reason is not None:
            cache.telemetry.bypassed(mapped.model, reason, len(primary_keys))
            return await self._select(primary_keys)
        found: dict[PrimaryKey, object] = {}
        rows: list[Row] = []
        past_cache: list[PrimaryKey] = []
        row_slot, identity_key, in_session = mapped.row, mapped.identity_key, sync.identity_map.get
        may_have_written = sync.cached_transaction is not None
        for primary_key in primary_keys:
            slot = row_slot(primary_key)
            if slot is None:
                cache.telemetry.bypassed(mapped.model, "primary key type")
                past_cache.append(primary_key)
                continue
            row = Row(sync, mapped, primary_key, identity_key(primary_key), slot)
            held = in_session(row.identity_key)
            if held is not None and may_give(mapped, held):
                found[primary_key] = held
            elif may_have_written and (reason := row.why_not()) is not None:
                cache.telemetry.bypassed(mapped.model, reason)
                past_cache.append(primary_key)
            elif held is not None and not may_refresh(sync, mapped, held):
                past_cache.append(primary_key)
            else:
                row.expired = held
                rows.append(row)

        async def load(asks: Sequence[Ask]) -> list[bytes | None]:
            misses = cast("Sequence[Row]", asks)
            # In one SELECT with those that the cache may not be asked for.
            keys = [row.primary_key for row in misses] + past_cache
            past_cache.clear()
            selected = await self._select(keys)
            found.update(selected)
            for row in misses:
                row.instance = selected.get(row.primary_key)
            return [row.record() for row in misses]

        if rows:
            if not sync.in_transaction():
                sync._autobegin_t()  # as above
            misses = await cache.bound().reads.look(rows)
            if misses:
                await load_misses(cache, sync, misses, load)
        past_cache += [row.primary_key for row in rows if row.expired is not None and row.instance is None]
        if past_cache:
            await load([])
        found.update([(row.primary_key, row.instance) for row in rows if row.instance is not None])
        if mapped.eager:
            await self.complete(list(found.values()))
        return found

    async def complete(self, instances: Sequence[object]) -> None:
        """Load the eager relationships of what came from the cache; SQLAlchemy has loaded those of the others."""
        for model, eager in self._mapped.eager.items():
            ours = [each for each in instances if type(each) is model]
            for parent in eager.parents:
                await prefetch(self._sync, self._cache, parent, ours)
            unloaded = [(each, key) for each in ours for key in eager.selected if key not in instance_dict(each)]
            if unloaded:
                await greenlet_spawn(lambda each=unloaded: [getattr(*pair) for pair in each])

    async def _select(self, primary_keys: Sequence[PrimaryKey]) -> dict[PrimaryKey, object]:
        with self._sync.past_cache():
            return await greenlet_spawn(select_many, self._sync, self._mapped.mapper, primary_keys)

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
        await greenlet_spawn(self._sync.connection, {"mapper": self._mapped.mapper})
