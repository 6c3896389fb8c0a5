"""`CachedSession`, and the events by which SQLAlchemy tells it what is read, written and committed.

Nothing overrides `commit()`: `session.begin()`, `sessionmaker.begin()` and `run_sync` never call it. The events see
every way to the end of a transaction, and these are the ones used:

    Session.after_begin             a connection joins the transaction
    Mapper.after_insert/update/delete   the unit of work has written an instance
    Engine.before_cursor_execute    everything else that is executed on the session's connections
    Engine.commit, prepare_twophase, commit_twophase    the last moment before COMMIT: lock
    Engine.handle_error             COMMIT was refused
    Session.after_commit            COMMIT was answered: look at the locks
    Session.after_transaction_end   the end, however it came: unlock
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.interfaces import ExceptionContext, ExecutionContext
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import InstanceState, Mapper, Session, SessionTransaction

from asynccache.cache import Cache
from asynccache.orm.entity import Scope
from asynccache.orm.footprint import NOTHING, Footprint, footprint_of
from asynccache.orm.statements import UNKNOWN, Effect, effect_of
from asynccache.orm.writes import Writes
from asynccache.transaction import Transaction

logger = logging.getLogger("asynccache")

_TRANSACTION = "_asynccache_transaction"
"""The attribute of a `Connection` that tells which transaction of ours it runs, asked for with each statement and each
flushed row. Not one of its execution options: these are the user's, who may compare them, and listens to their
changes."""


class CachedSession(Session):
    """A session that tells its cache what it writes: the synchronous side of `AsyncCachedSession`.

    To combine it with another session class: `class MySession(CachedSession, TheirSession): ...`, and then
    `sync_session_class=MySession`.

    cache: None makes it a plain session. Everything else is as `sqlalchemy.orm.Session` has it.
    """

    _in_bulk = False
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

    @property
    def only_bind(self) -> Engine | Connection | None:
        """What `get_bind` gives for all models; None if it has to be asked for each."""
        return self.bind if not self.binds and self._has_usual_get_bind else None

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

    def is_external(self, connection: Connection) -> bool:
        """Whether this connection was begun outside of the session, which was bound to it."""
        return connection is self.bind or connection in self.binds.values()

    def note(self) -> Transaction:
        """The `cached_transaction`, begun if need be."""
        assert self.cache is not None
        if self.cached_transaction is None:
            self.cached_transaction = Transaction(self.cache, self)
        return self.cached_transaction

    # The legacy bulk operations use the machinery of a flush, but none of its mapper events.

    def bulk_save_objects(self, *args: Any, **kwargs: Any) -> None:
        with self._bulk():
            super().bulk_save_objects(*args, **kwargs)

    def bulk_insert_mappings(self, *args: Any, **kwargs: Any) -> None:
        with self._bulk():
            super().bulk_insert_mappings(*args, **kwargs)

    def bulk_update_mappings(self, *args: Any, **kwargs: Any) -> None:
        with self._bulk():
            super().bulk_update_mappings(*args, **kwargs)

    @contextmanager
    def _bulk(self) -> Generator[None]:
        self._in_bulk = True
        try:
            yield
        finally:
            self._in_bulk = False

    def is_unit_of_work(self, context: ExecutionContext) -> bool:
        """Whether a statement is the flush's own, whose instances the mapper events tell. Core statements inside of
        mapper events are not: only the former bring the mapper's own cache for compiled statements."""
        if not self._flushing or self._in_bulk:
            return False
        # The connection's own option, if it has one, says nothing of a statement.
        inherited = context.root_connection.get_execution_options().get("compiled_cache")
        return context.execution_options.get("compiled_cache") is not inherited


def transaction_of(connection: Connection) -> Transaction | None:
    ours: Transaction | None = getattr(connection, _TRANSACTION, None)
    return ours


# ----------------------------------------------------------------------------------------------------- session events


def _after_begin(session: Session, _transaction: SessionTransaction, connection: object) -> None:
    if not isinstance(session, CachedSession) or session.cache is None:
        return
    if not isinstance(connection, Connection):
        return  # a stand-in, as tests have: it has no events to listen to, and reaches no database
    _listen_to_engine(connection.engine)
    external = session.is_external(connection)
    ours = transaction_of(connection) if external else None
    if ours is None or ours.ended or ours.cache is not session.cache:
        ours = session.note()
    else:
        # What earlier sessions wrote on this connection is still to be committed.
        if session.cached_transaction is not None:
            ours.writes.add(session.cached_transaction.writes)
        ours.run_for(session)
        session.cached_transaction = ours
    ours.join(connection, external=external)
    setattr(connection, _TRANSACTION, ours)


def _after_commit(session: Session) -> None:
    if isinstance(session, CachedSession) and (ours := session.cached_transaction) is not None:
        if ours.joined:
            _guard(ours.answered)
        elif not session.in_nested_transaction():
            _guard(ours.committed_without_connection)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if isinstance(session, CachedSession) and transaction.parent is None:
        ours, session.cached_transaction = session.cached_transaction, None
        if ours is not None:
            _guard(ours.end)


# ------------------------------------------------------------------------------------------------------ mapper events


# Heard for each row of each class that is flushed: with its state, and without a wrapper (`raw`, `retval`).


def _after_insert(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    _note_flushed(Footprint.note_write, mapper, connection, state)


def _before_update(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    # When what was set to an SQL expression is not yet expired.
    _note_flushed(Footprint.note_key_update, mapper, connection, state)


def _after_update(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    # When the application's own `before_update` has changed its part.
    _note_flushed(Footprint.note_update, mapper, connection, state)


def _after_delete(mapper: Mapper[Any], connection: Connection, state: InstanceState[Any]) -> None:
    _note_flushed(Footprint.note_delete, mapper, connection, state)


def _note_flushed(
    note: Callable[[Footprint, Writes, InstanceState[Any]], None],
    mapper: Mapper[Any],
    connection: Connection,
    state: InstanceState[Any],
) -> None:
    ours = transaction_of(connection)
    if ours is None:
        return
    joined = ours.joined[connection.engine]
    try:
        footprint = joined.footprints.get(mapper)
        if footprint is None:
            footprint = joined.footprints[mapper] = _footprint(ours, joined.scope, mapper)
        if footprint is not NOTHING:
            note(footprint, ours.writes, state)
    except Exception as error:
        _invalidate_all(ours, joined.scope, error)


def _footprint(ours: Transaction, scope: Scope | None, mapper: Mapper[Any]) -> Footprint:
    ours.writes.any = True
    return footprint_of(mapper, scope, ours.cache.models.hierarchies()) if scope is not None else NOTHING


# ------------------------------------------------------------------------------------------------------ engine events


def _before_cursor_execute(
    connection: Connection, _cursor: Any, sql: str, _parameters: Any, context: ExecutionContext | None, _many: bool
) -> None:
    ours = transaction_of(connection)
    if ours is None:
        return
    at_once = ours.joined[connection.engine].isolation.commits_statements
    session = ours.session()
    if context is not None and isinstance(session, CachedSession) and session.is_unit_of_work(context) and not at_once:
        return
    if context is not None and context.execution_options.get("stream_results"):
        _note_snapshot(connection)
    effect = _effect_of(context, sql)
    if effect.changes_settings:
        ours.changed_settings = True
    if effect.commits or (at_once and effect.writes_something):
        _hear_answers(connection.engine)
    if effect.writes_something:
        if at_once:
            # Noted apart from the transaction's other writes, whose locks were taken and let go with their statements.
            now = Writes(ours.cache.models.hierarchies(), ours.cache.settings.slots_max)
            _note_effect(ours, now, connection, effect, context)
            ours.before_statement(now.slots())
        _note_effect(ours, ours.writes, connection, effect, context)
    if effect.commits:
        _before_commit(connection)


def _after_cursor_execute(
    connection: Connection, _cursor: Any, _sql: str, _parameters: Any, _context: ExecutionContext | None, _many: bool
) -> None:
    ours = transaction_of(connection)
    if ours is not None and ours.awaits_answer:  # of a statement that was a commit
        _guard(ours.answered)


def _effect_of(context: ExecutionContext | None, sql: str) -> Effect:
    try:
        return effect_of(context.compiled if context is not None else None, sql)
    except Exception:
        logger.exception("cannot tell what this statement writes; all that is cached is invalidated with it: %s", sql)
        return UNKNOWN


def _note_effect(
    ours: Transaction, writes: Writes, connection: Connection, effect: Effect, context: ExecutionContext | None
) -> None:
    parameter_sets = getattr(context, "compiled_parameters", None) or ()
    options = context.execution_options if context is not None else connection.get_execution_options()
    _note(ours, connection, partial(writes.note_effect, effect=effect, parameter_sets=parameter_sets), options)


def _note_snapshot(connection: Connection, _name: object = None) -> None:
    ours = transaction_of(connection)
    if ours is not None and connection.dialect.name == "sqlite":
        ours.reads_snapshot = True


def _before_options(connection: Connection, options: Mapping[str, Any]) -> None:
    ours = transaction_of(connection)
    if ours is not None:
        ours.set_options(connection, {**connection.get_execution_options(), **options})


def _before_commit(connection: Connection) -> None:
    ours = transaction_of(connection)
    if ours is not None:
        try:
            ours.before_commit()
        except BaseException:
            # SQLAlchemy takes this for a COMMIT that has failed in the database, which ends a transaction, and would
            # return the connection to its pool with the transaction open: the next one to use it would commit it.
            connection._rollback_impl()
            raise


_REFUSALS = ("23", "40", "P0")
"""Classes of SQLSTATE by which a server says that it has rolled back: a constraint, a conflict of transactions, or a
trigger that raised. Others may come from drivers and proxies, or from a server that is going down."""

_COMPLETION_UNKNOWN = "40003"


def _after_error(context: ExceptionContext) -> None:
    connection = context.connection
    ours = transaction_of(connection) if connection is not None else None
    if connection is None or ours is None or not ours.awaits_answer:
        return
    if context.is_disconnect or not _is_refusal(context.sqlalchemy_exception, context.dialect.name):
        return

    def settle() -> None:
        if context.statement is None:
            # SQLite keeps a transaction open whose COMMIT it has refused, and SQLAlchemy would return the connection
            # to its pool with it: the next one to use it would commit it.
            connection._rollback_impl()
        ours.answered()

    _guard(settle)


def _is_refusal(error: BaseException | None, dialect_name: str) -> bool:
    """Whether the database itself has refused what it was to commit, so that nothing is under way any more."""
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error, IntegrityError) or dialect_name == "sqlite":  # which is no server
        return True
    sqlstate: str = getattr(error.orig, "sqlstate", None) or ""
    return sqlstate.startswith(_REFUSALS) and sqlstate != _COMPLETION_UNKNOWN


def _before_prepare(connection: Connection, _xid: object) -> None:
    ours = transaction_of(connection)
    if ours is not None:
        ours.before_prepare()


def _before_commit_prepared(connection: Connection, _xid: object, is_prepared: bool) -> None:
    ours = transaction_of(connection)
    if not is_prepared:
        _before_commit(connection)
    elif ours is not None:
        ours.before_commit_prepared()


def _before_rollback(connection: Connection) -> None:
    ours = transaction_of(connection)
    if ours is not None and ours.external:
        ours.ended = True


def _guard(step: Callable[[], None]) -> None:
    """An exception that escaped here would leave the session in a state that it cannot get out of."""
    try:
        step()
    except Exception:
        logger.exception("slots stay locked until their locks expire")


# ------------------------------------------------------------------------------------------------------------- noting


def _note(
    ours: Transaction,
    connection: Connection,
    note: Callable[[Scope], None],
    options: Mapping[str, Any] | None = None,
) -> None:
    """Note a write. What cannot be understood invalidates everything, rather than break the user's statement."""
    ours.writes.any = True
    scope = ours.joined[connection.engine].scope
    try:
        if options is not None:  # a statement may have a schema_translate_map of its own
            scope = ours.cache.scope_of(connection.engine, options)
        if scope is not None:
            note(scope)
    except Exception as error:
        _invalidate_all(ours, scope, error)


def _invalidate_all(ours: Transaction, scope: Scope | None, error: Exception) -> None:
    logger.error("cannot tell which rows were written; all that is cached is invalidated with them", exc_info=error)
    if scope is not None:
        ours.writes.note_effect(scope, UNKNOWN, ())


# ---------------------------------------------------------------------------------------------------------- listening

_SESSION_LISTENERS: Sequence[tuple[str, Callable[..., None]]] = (
    ("after_begin", _after_begin),
    ("after_commit", _after_commit),
    ("after_transaction_end", _after_transaction_end),
)

_MAPPER_LISTENERS: Sequence[tuple[str, Callable[..., None]]] = (
    ("after_insert", _after_insert),
    ("before_update", _before_update),
    ("after_update", _after_update),
    ("after_delete", _after_delete),
)

_ENGINE_LISTENERS: Sequence[tuple[str, Callable[..., None]]] = (
    ("before_cursor_execute", _before_cursor_execute),
    ("savepoint", _note_snapshot),
    ("handle_error", _after_error),
    ("set_connection_execution_options", _before_options),
    ("commit", _before_commit),
    ("rollback", _before_rollback),
    ("prepare_twophase", _before_prepare),
    ("commit_twophase", _before_commit_prepared),
)


def listen() -> None:
    """Have SQLAlchemy tell us. To be called once, or again when something has removed all listeners.

    Mapper events are heard for all classes: one that is not cached itself may be mapped to a table that is.
    """
    for name, listener in _SESSION_LISTENERS:
        if not event.contains(CachedSession, name, listener):
            # First of all, to hear what the application's own listeners execute.
            event.listen(CachedSession, name, listener, insert=name == "after_begin")
    for name, listener in _MAPPER_LISTENERS:
        if not event.contains(Mapper, name, listener):
            event.listen(Mapper, name, listener, raw=True, retval=True)


_listen_once = cache(listen)


def _listen_to_engine(engine: Engine) -> None:
    engine = _proxied(engine)
    if event.contains(engine, *_ENGINE_LISTENERS[-1]):  # as are all the others
        return
    for name, listener in _ENGINE_LISTENERS:
        if not event.contains(engine, name, listener):
            event.listen(engine, name, listener)


def _hear_answers(engine: Engine) -> None:
    """Hear when statements were executed, once there is one that commits something: hardly ever."""
    engine = _proxied(engine)
    if not event.contains(engine, "after_cursor_execute", _after_cursor_execute):
        event.listen(engine, "after_cursor_execute", _after_cursor_execute)


def _proxied(engine: Engine) -> Engine:
    """An application may make an engine of other options for each request: they hear what this one tells."""
    while (proxied := getattr(engine, "_proxied", None)) is not None:
        engine = proxied
    return engine
