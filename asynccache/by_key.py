"""Reads one row for one session by a secondary key: what `asynccache.lookup` asks for, and gets into the session."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.util import greenlet_spawn

from asynccache.cache import Cache
from asynccache.eligibility import may_fill, may_give, may_refresh, whereabouts, why_not
from asynccache.lookup import look_up
from asynccache.orm.entity import Entity
from asynccache.orm.registry import UniqueKey
from asynccache.orm.rows import UnusableRecordError
from asynccache.orm.select import select_by
from asynccache.orm.slots import KeySlots
from asynccache.protocol import MISSING, Slot
from asynccache.reader import Reader, Row, load_misses
from asynccache.reading import Ask
from asynccache.sync_session import CachedSession


@dataclass(slots=True, eq=False)
class _LedTo:
    """A `RowAsk`: the row that a key has led to, and what it is to have.

    knows_all: that a SELECT of the model finds no row means that there is none in the key's table.
    """

    asked: Row
    values: Mapping[str, Any]
    knows_all: bool
    matches: bool = False
    was_loaded: bool = False

    @property
    def mapped(self) -> Entity:
        return self.asked.mapped

    @property
    def slot(self) -> Slot:
        return self.asked.slot

    def serve(self, record: bytes) -> bool:
        try:
            # Not the instance that the session may hold: that is as old as the session.
            self.matches = record != MISSING and self.asked.mapped.has(record, self.values)
        except UnusableRecordError:
            return False
        return not self.matches or self.asked.serve(record)

    def certain(self, record: bytes) -> bytes:
        return record

    def loaded(self, instance: object | None, held: Collection[Any]) -> bytes | None:
        self.was_loaded, self.asked.instance = True, instance
        if instance is not None:
            self.matches = instance_state(instance).key == self.asked.identity_key
        else:
            self.matches = not self.knows_all  # it may be of another class
        if instance is None or self.asked.identity_key in held or not may_fill(self.asked.sync):
            return None
        return self.asked.mapped.encode(instance, self.asked.identity_key)


@dataclass(slots=True, eq=False)
class _ByKey:
    """A `KeyAsk`: the row with these values, for one session.

    knows_all: as above.
    past_cache: the session holds the row, expired, in part or of another class: it is SQLAlchemy's to look into that.
    """

    sync: CachedSession
    mapped: Entity
    slots: KeySlots
    slot: Slot
    values: Mapping[str, Any]
    knows_all: bool
    row: _LedTo | None = None
    record: bytes = b""
    instance: object | None = None
    past_cache: bool = False

    def serve(self, record: bytes) -> bool:
        self.row, self.instance = None, None
        if record == MISSING:
            return True
        try:
            primary_key, row = self.slots.decode(record)
        except UnusableRecordError:
            return False
        slot = self.mapped.row(primary_key)
        if slot is None:
            return False
        asked = Row(self.sync, self.mapped, primary_key, self.mapped.identity_key(primary_key), slot)
        held = self.sync.identity_map.get(asked.identity_key)
        if held is not None and not may_give(self.mapped, held):
            asked.expired = held
        if asked.expired is not None and not may_refresh(self.sync, self.mapped, asked.expired):
            self.past_cache = True
        elif held is not None and asked.expired is None and not self.mapped.is_whole(held):
            self.past_cache = True  # a SELECT loads what is not loaded of it
        elif not row:
            self.row, self.record = _LedTo(asked, self.values, self.knows_all), record
        elif asked.serve(row):
            self.instance = asked.instance
        else:
            return False
        return True

    def certain(self, record: bytes) -> bytes:
        return self.slots.without_row(record)

    def loaded(self, instance: object | None, held: Collection[Any]) -> bytes | None:
        self.row, self.instance = None, instance
        if not may_fill(self.sync):
            return None
        if instance is None:
            return MISSING if self.knows_all else None
        identity_key = instance_state(instance).key
        assert identity_key is not None, "loaded"
        row = None if identity_key in held else self.mapped.encode(instance, identity_key)
        return self.slots.encode(tuple(identity_key[1]), row or b"")


async def get_by(
    sync: CachedSession, cache: Cache, model: type[Any], key: UniqueKey, values: Mapping[str, Any]
) -> object | None:
    """Get the row with these values, whose attributes are those of the key."""

    async def select() -> object | None:
        with sync.past_cache():
            return await greenlet_spawn(select_by, sync, model, values)

    where = whereabouts(sync, cache, model)
    if where is None:
        return await select()
    mapped, bind = where
    reader = Reader(sync, cache, mapped, bind)
    slots = mapped.scope.key_slots(mapped.hierarchy, key)
    in_order = [values[name] for name in key.attributes]
    slot = slots.asked(in_order)
    reason: str | None
    if slot is None:
        reason = "null in a secondary key" if None in in_order else "secondary key type"
    elif (reason := mapped.why_not_by(key)) is None:
        verdict = why_not(cache, sync, mapped, bind)
        reason = await reader.prepare(verdict) if verdict is not None else None
        transaction = sync.cached_transaction
        if reason is None and transaction is not None and transaction.writes.touch(mapped.slots):
            reason = "own writes"
    if slot is None or reason is not None:
        cache.telemetry.bypassed(model, reason or "")
        return await select()
    if not sync.in_transaction():
        sync._autobegin_t()  # as a SELECT would, so that code behaves alike on hit and miss
    ask = _ByKey(sync, mapped, slots, slot, values, mapped.has_all_of(key.table))

    async def load(asks: Sequence[Ask]) -> list[bytes | None]:
        held = set(sync.identity_map.keys())  # whose attributes no SELECT changes
        instance = await select()
        return [each.loaded(instance, held) for each in asks if isinstance(each, (_ByKey, _LedTo))]

    answered = await look_up(ask, cache.bound().reads, partial(load_misses, cache, sync), load)
    found = ask.row.asked if ask.row is not None else None
    instance = found.instance if found is not None else ask.instance
    if not answered or ask.past_cache or (found is not None and found.expired is not None and instance is None):
        return await select()
    if mapped.eager and instance is not None:
        await reader.complete([instance])
    return instance
