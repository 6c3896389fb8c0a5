"""`CachedSession`, and the events by which SQLAlchemy tells of its transactions.

Nothing overrides `commit()`: `session.begin()`, `sessionmaker.begin()` and `run_sync` never call it. The events see
every way to the end of a transaction, and these are the ones used, beside those of `asynccache.engine_events`:

    Session.after_begin             a connection joins the transaction
    Session.after_commit            COMMIT was answered: look at the locks
    Session.after_transaction_end   the end, however it came: unlock
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction

from asynccache.cache import Cache
from asynccache.engine_events import follow, guard
from asynccache.transaction import Transaction


class CachedSession(Session):
    """A session that tells its cache what it writes: the synchronous side of `AsyncCachedSession`.

    To combine it with another session class: `class MySession(CachedSession, TheirSession): ...`, and then
    `sync_session_class=MySession`.

    cache: None makes it a plain session. Everything else is as `sqlalchemy.orm.Session` has it.
    """

    _has_further_binds = False
    """Single models or tables are bound to something else."""
    _has_usual_get_bind = True
    _has_usual_close = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._has_usual_get_bind = cls.get_bind is Session.get_bind
        cls._has_usual_close = cls.close is Session.close

    def __init__(self, *args: Any, cache: Cache | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = cache
        self.cached_transaction: Transaction | None = None
        """What the cache knows of the transaction that is under way; None if it has done nothing yet."""
        if cache is not None:
            _listen_once()

    def _add_bind(self, key: Any, bind: Engine | Connection) -> None:
        # SQLAlchemy's own, to which `binds`, `bind_mapper` and `bind_table` come. What it makes of them has one name
        # in 2.0 and another in 2.1.
        super()._add_bind(key, bind)
        self._has_further_binds = True

    @property
    def only_bind(self) -> Engine | Connection | None:
        """What `get_bind` gives for all models; None if it has to be asked for each."""
        return self.bind if self._has_usual_get_bind and not self._has_further_binds else None

    @property
    def holds_connection(self) -> bool:
        return self.cached_transaction is not None and bool(self.cached_transaction.joined)

    @property
    def closes_at_once(self) -> bool:
        """Whether closing awaits nothing: there is no connection to give back, and nobody listens who might await."""
        listeners = self.dispatch
        return not (
            self.holds_connection
            or not self._has_usual_close
            or listeners.persistent_to_detached
            or listeners.pending_to_transient
            or len(listeners.after_transaction_end) > 1  # our own
        )

    def note(self) -> Transaction:
        """The `cached_transaction`, begun if need be."""
        assert self.cache is not None
        if self.cached_transaction is None:
            self.cached_transaction = Transaction(self.cache)
        return self.cached_transaction


# ----------------------------------------------------------------------------------------------------- session events


def _after_begin(session: Session, transaction: SessionTransaction, connection: object) -> None:
    if not isinstance(session, CachedSession) or session.cache is None:
        return
    if not isinstance(connection, Connection):
        return  # a stand-in, as tests have: it has no events to listen to, and reaches no database
    root = transaction
    while root.parent is not None:
        root = root.parent
    *_, begun_by_session = root._connections[connection]
    session.cached_transaction = follow(connection, session.note(), external=not begun_by_session)


def _after_commit(session: Session) -> None:
    if isinstance(session, CachedSession) and (ours := session.cached_transaction) is not None:
        if ours.joined:
            guard(ours.answered)
        elif not session.in_nested_transaction():
            guard(ours.committed_without_connection)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if isinstance(session, CachedSession) and transaction.parent is None:
        ours, session.cached_transaction = session.cached_transaction, None
        # An external one goes on, but for the COMMIT of a connection that is the session's own.
        if ours is not None and (ours.awaits_answer or not ours.external):
            guard(ours.end)


# ---------------------------------------------------------------------------------------------------------- listening

_LISTENERS: Sequence[tuple[Any, str, Callable[..., None]]] = (
    (CachedSession, "after_begin", _after_begin),
    (CachedSession, "after_commit", _after_commit),
    (CachedSession, "after_transaction_end", _after_transaction_end),
)


def listen() -> None:
    """Have SQLAlchemy tell us. To be called once, or again when something has removed all listeners."""
    for target, name, listener in _LISTENERS:
        if not event.contains(target, name, listener):
            # First of all, to hear what the application's own listeners execute.
            event.listen(target, name, listener, insert=name == "after_begin")


_listen_once = cache(listen)
