"""Gets one row for one session: at once, if it can be, or by whatever there is to be waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Engine

from asynccache import protocol
from asynccache.cache import Cache
from asynccache.eligibility import Step, may_give, may_refresh, whereabouts, why_not
from asynccache.orm.keys import primary_key_of
from asynccache.orm.rows import UnusableRecordError
from asynccache.reader import Reader, Row, load_misses
from asynccache.reading import Ask, ReadPath
from asynccache.sync_session import CachedSession, PlainGet

_USUAL: Mapping[str, tuple[Any, ...]] = {
    "options": (None, (), []),
    "populate_existing": (None, False),
    "with_for_update": (None, False),
    "identity_token": (None,),
    "execution_options": (None, {}),
    "bind_arguments": (None,),
}
"""Arguments of `get()` that ask for nothing special. `async_scoped_session.get` passes them all, so that it is the
values that count; and they differ between SQLAlchemy 2.0 and 2.1."""


@dataclass(slots=True, eq=False)
class Unanswered:
    """A get that has to wait for something, and how far it is.

    row: None if the cache is not asked.
    bind: what the session is bound to for it.
    verdict: see `why_not`.
    reads, found: what reads the row, and what it has read of its slots if the backend answers at once. None if nothing
        was read yet.
    """

    row: Row | None = None
    bind: Engine | Connection | None = None
    verdict: str | Step | None = None
    reads: ReadPath | None = None
    found: Sequence[bytes | None] | None = None


_PAST_CACHE: Final = Unanswered()

Asked = tuple[Any, Any, Mapping[str, Any]]
"""What a `PlainGet` takes: the model, the primary key, and the options that the user gave."""


def get_now(
    sync: CachedSession, cache: Cache, model: Any, ident: Any, options: Mapping[str, Any]
) -> object | Unanswered:
    """Get one row for a session that asks for it as usual, if that waits for nothing: what the session holds, or a hit
    in memory. Else it is for `get_unanswered`.

    This is what an application does most, and so it is written out here with as few objects and calls as it can be.
    """
    if options and any(value not in _USUAL.get(name, ()) for name, value in options.items()):
        if cache.models.caches(model):
            cache.telemetry.bypassed(model, "options")
        return _PAST_CACHE
    where = whereabouts(sync, cache, model)
    if where is None:
        return _PAST_CACHE
    mapped, bind = where
    if isinstance(ident, (tuple, list)):
        primary_key = tuple(ident)
    else:
        primary_key = primary_key_of(mapped.mapper, ident) if isinstance(ident, dict) else (ident,)
    slot = mapped.row(primary_key)
    if slot is None:
        cache.telemetry.bypassed(model, "primary key type")
        return _PAST_CACHE
    identity_key = mapped.identity_key(primary_key)
    held = sync.identity_map.get(identity_key)
    if held is not None and may_give(mapped, held):
        return held
    verdict, reads, found = why_not(cache, sync, mapped, bind), None, None
    if verdict is None and held is None and not mapped.eager and not cache.telemetry.observers:
        transaction = sync.cached_transaction
        if transaction is None or not transaction.writes.cover(mapped.slots, slot):
            reads = cache.bound().reads
            found = reads.store.read_now(slot)
            if found is not None and (record := protocol.hit(*found)):
                if sync._transaction is None:
                    sync._autobegin_t()  # as a SELECT would, so that code behaves alike on hit and miss
                try:
                    instance = mapped.hydrate(sync, identity_key, record)
                except UnusableRecordError:
                    pass  # which is told of when it is looked at again
                else:
                    cache.stats.hits += 1
                    return instance
    return Unanswered(Row(sync, mapped, primary_key, identity_key, slot, held), bind, verdict, reads, found)


async def get_unanswered(
    unanswered: Unanswered, cache: Cache, asked: Asked, plain_get: PlainGet, load: PlainGet | None = None
) -> object | None:
    """Get the row that `get_now` was asked for, and did not give.

    plain_get: what answers where the cache may not be asked, and what loads a row on a miss unless `load` does.
    """
    row, bind, verdict = unanswered.row, unanswered.bind, unanswered.verdict
    if row is None or bind is None:
        return await plain_get(*asked)
    sync, mapped = row.sync, row.mapped
    if verdict is not None:
        verdict = await Reader(sync, cache, mapped, bind).prepare(verdict)
        row.expired = sync.identity_map.get(row.identity_key)  # by the flush, maybe
    held = row.expired
    reason = verdict or row.why_not()
    if reason is not None:
        cache.telemetry.bypassed(mapped.model, reason)
    if reason is not None or (held is not None and not may_refresh(sync, mapped, held)):
        return await plain_get(*asked)
    if sync._transaction is None:
        sync._autobegin_t()  # as above
    reads = unanswered.reads or cache.bound().reads
    if cache.telemetry.observers:
        misses = await reads.look([row])
        miss = misses[0] if misses else None
    else:
        miss = reads.serve(row, *(unanswered.found or await reads.store.read(row.slot)))
    if miss is not None:

        async def load_row(_: Sequence[Ask]) -> list[bytes | None]:
            row.instance = await (load or plain_get)(*asked)
            return [row.record()]

        await load_misses(cache, sync, [miss], load_row)
    if held is not None and row.instance is None:
        return await plain_get(*asked)  # which knows what to do with an instance whose row is gone
    if mapped.eager and row.instance is not None:
        await Reader(sync, cache, mapped, bind).complete([row.instance])
    return row.instance


async def get(
    sync: CachedSession,
    cache: Cache,
    model: Any,
    ident: Any,
    options: Mapping[str, Any],
    plain_get: PlainGet,
    load: PlainGet | None = None,
) -> object | None:
    """Both, for who has no answer to give before it waits."""
    found = get_now(sync, cache, model, ident, options)
    if isinstance(found, Unanswered):
        return await get_unanswered(found, cache, (model, ident, options), plain_get, load)
    return found
