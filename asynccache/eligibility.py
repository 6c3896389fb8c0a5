"""Which sessions may read a row from the cache, and which may store what they read."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.session import SessionTransactionState

from asynccache.cache import Cache
from asynccache.orm.entity import Entity
from asynccache.orm.registry import mapper_of
from asynccache.orm.visibility import expected_isolation
from asynccache.sync_session import CachedSession

_ACTIVE = SessionTransactionState.ACTIVE


def whereabouts(sync: CachedSession, cache: Cache, model: Any) -> tuple[Entity, Engine | Connection] | None:
    """The model in the database that the session reads it from, and what the session is bound to for that; None if it
    is not cached there."""
    bind = None if sync.chooses_bind else sync.bind
    if bind is None:
        mapper = mapper_of(model)
        if mapper is None:
            return None
        try:
            bind = sync.get_bind(mapper)
        except Exception:
            return None  # SQLAlchemy will ask for it in other words (by statement, by shard), or say what is wrong
    mapped = entity_of(sync, cache, model, bind if isinstance(bind, Engine) else bind.engine)
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


# Each hit asks for these, and an enumeration looks its members up by a call.
_FLUSH, _ASK, _CONNECT = Step


def why_not(
    cache: Cache, sync: CachedSession, mapped: Entity, bind: Engine | Connection, done: int = 0
) -> str | Step | None:
    """Why this session may read no row of this model from the cache, or what is to be done before that can be told.

    done: the last of the steps that were taken.
    """
    if not cache.reading:
        return "reading is off"
    if mapped.bypass is not None:
        return mapped.bypass
    if not isinstance(bind, Engine):
        return "external connection"
    # The underscores below are what `is_active` and `_is_clean` ask, by four calls each, on every hit.
    begun = sync._transaction
    if begun is not None and begun._state is not _ACTIVE:
        return "inactive transaction"
    # Who listens is told by two attributes, of the class and of the instance; to ask whether there is anybody, or how
    # many there are, would be calls.
    listeners, wary = sync.dispatch, cache.settings.bypass_listeners
    if wary and ((hear := listeners.do_orm_execute).parent_listeners or hear.listeners):
        cache.warn_once(
            "a session has do_orm_execute listeners, which may filter what it reads, and so reads past the cache; "
            "if yours do not, make it Cache(..., bypass_listeners=False)"
        )
        return "do_orm_execute listener"
    if getattr(sync, "execution_options", None):  # SQLAlchemy 2.1
        return "session execution options"
    joined, transaction = None, sync.cached_transaction
    if transaction is not None:
        if transaction.changed_settings:
            return "session settings"
        joined = transaction.joined.get(bind)
        if joined is not None and joined.scope is not mapped.scope:
            return "another database than before it began"
    if done < _FLUSH and sync.autoflush and (sync.identity_map._modified or sync._new or sync._deleted):
        return _FLUSH
    isolation = joined.isolation if joined is not None else expected_isolation(bind)
    if isolation is None and done < _ASK:
        return _ASK
    if joined is None and done < _CONNECT:
        hear = listeners.after_begin
        if len(hear.parent_listeners) > 1 or hear.listeners:  # beside our own
            return _CONNECT
    if isolation is None or not isolation.reads_fresh:
        return "isolation level"
    if wary and ((begin := bind.dispatch.begin).parent_listeners or begin.listeners):
        cache.warn_once(
            "an engine has begin listeners, which may choose what a transaction sees (a schema, a tenant) before "
            "it is heard of, and so its sessions read past the cache; if yours do not, make it "
            "Cache(..., bypass_listeners=False)"
        )
        return "begin listener"
    return None


def may_give(mapped: Entity, held: object) -> bool:
    """Whether what the session itself holds is given as it is. Expired instances, such of another class, and those
    that each get is to refresh are no matter for a cache."""
    return not instance_state(held).expired and isinstance(held, mapped.model) and not mapped.mapper.always_refresh


def may_refresh(sync: CachedSession, mapped: Entity, held: object) -> bool:
    """Whether an expired instance may be refreshed from the cache: if it was the end of a transaction that has expired
    it, and there is nothing of it to be kept, nor anything else to be loaded with it, as is with one of a subclass."""
    state = instance_state(held)
    return (
        state.expired
        and type(held) is mapped.model
        and not state.modified
        and not state.load_options
        and sync.expire_on_commit
        and not sync.was_told_to_expire
    )


def may_fill(sync: CachedSession) -> bool:
    """Whether rows that this session loads now are what everybody would see."""
    transaction = sync.cached_transaction
    return transaction is None or not (
        transaction.writes.any
        or transaction.changed_settings
        or transaction.reads_snapshot
        or transaction.external
        or not all(joined.isolation.reads_fresh for joined in transaction.joined.values())
    )
