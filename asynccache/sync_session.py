"""`CachedSession`, and the events by which SQLAlchemy tells it what is read, written and committed.

Nothing overrides `commit()`: `session.begin()`, `sessionmaker.begin()` and `run_sync` never call it. The events see
every way to the end of a transaction, and these are the ones used:

    Session.after_begin             a connection joins the transaction
    Mapper.after_insert/update/delete   the unit of work has written an instance
    Engine.before_cursor_execute    everything else that is executed on the session's connections
    Engine.commit, prepare_twophase, commit_twophase    the last moment before COMMIT: lock
    Session.after_commit            COMMIT was answered: look at the locks
    Session.after_transaction_end   the end, however it came: unlock
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Connection, Engine, Table, event
from sqlalchemy.engine.interfaces import ExecutionContext
from sqlalchemy.orm import Mapper, Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state

from asynccache.cache import Cache
from asynccache.orm.entity import Scope
from asynccache.orm.statements import UNKNOWN, Effect, effect_of
from asynccache.orm.writes import Writes, referenced_columns
from asynccache.transaction import Transaction

logger = logging.getLogger("asynccache")

_transactions: WeakKeyDictionary[Connection, Transaction] = WeakKeyDictionary()
"""Which transaction of ours a connection runs. Not one of its execution options: these are the user's, who may compare
them, and listens to their changes."""


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
    return _transactions.get(connection)


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
    _transactions[connection] = ours


def _after_commit(session: Session) -> None:
    if isinstance(session, CachedSession) and (ours := session.cached_transaction) is not None:
        if ours.joined:
            _answered(ours)
        elif not session.in_nested_transaction():
            _guard(ours.committed_without_connection)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if isinstance(session, CachedSession) and transaction.parent is None:
        ours, session.cached_transaction = session.cached_transaction, None
        if ours is not None:
            _guard(ours.end)


# ------------------------------------------------------------------------------------------------------ mapper events


def _note_instance(mapper: Mapper[Any], connection: Connection, target: object) -> None:
    ours = transaction_of(connection)
    if ours is not None:
        if not ours.writes.concern(mapper):
            ours.writes.any = True
            return
        state = instance_state(target)
        keys = [] if state.key is None else [tuple(state.key[1])]
        attributes = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        # Differs if the primary key was changed. One that is expired was not; asking for it would be a SELECT.
        if not keys or all(attribute in state.dict for attribute in attributes):
            values = tuple([state.dict.get(attribute) for attribute in attributes])
            # The same objects, since equal ones may be different keys (1 and True).
            if not (keys and all(map(is_, values, keys[0]))):
                keys.append(values)
        _note(ours, connection, lambda scope: ours.writes.note_instance(scope, mapper, keys))


def _note_key_updates(mapper: Mapper[Any], connection: Connection, target: object) -> None:
    ours = transaction_of(connection)
    if ours is not None:
        referenced = [(table, columns) for table in _tables_of(mapper) if (columns := referenced_columns(table))]
        if not referenced:  # nearly always
            return
        changed = {
            column.name
            for key in instance_state(target).committed_state
            if key in mapper.column_attrs
            for column in mapper.column_attrs[key].columns
            if isinstance(column, Column)
        }
        for table, columns in referenced:
            if changed & columns:
                _note(ours, connection, partial(ours.writes.note_cascades, table=table, rule="onupdate"))


def _note_deletes(mapper: Mapper[Any], connection: Connection, _target: object) -> None:
    ours = transaction_of(connection)
    if ours is not None:
        for table in _tables_of(mapper):
            _note(ours, connection, partial(ours.writes.note_cascades, table=table, rule="ondelete"))


def _tables_of(mapper: Mapper[Any]) -> Iterator[Table]:
    return (table for table in mapper.tables if isinstance(table, Table))


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
    if ours is not None:
        _answered(ours)  # of a statement that was a commit; of others nothing is awaited


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


def _answered(ours: Transaction) -> None:
    _guard(ours.answered)


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
    except Exception:
        logger.exception("cannot tell which rows were written; all that is cached is invalidated with them")
        if scope is not None:
            ours.writes.note_effect(scope, UNKNOWN, ())


# ---------------------------------------------------------------------------------------------------------- listening

_LISTENERS: Sequence[tuple[Any, str, Callable[..., None]]] = (
    (CachedSession, "after_begin", _after_begin),
    (CachedSession, "after_commit", _after_commit),
    (CachedSession, "after_transaction_end", _after_transaction_end),
    (Mapper, "after_insert", _note_instance),
    (Mapper, "after_update", _note_instance),
    (Mapper, "before_update", _note_key_updates),  # when what was set to an SQL expression is not yet expired
    (Mapper, "after_update", _note_key_updates),  # when the application's own `before_update` has changed its part
    (Mapper, "after_delete", _note_instance),
    (Mapper, "after_delete", _note_deletes),
)

_ENGINE_LISTENERS: Sequence[tuple[str, Callable[..., None]]] = (
    ("before_cursor_execute", _before_cursor_execute),
    ("after_cursor_execute", _after_cursor_execute),
    ("savepoint", _note_snapshot),
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
    for target, name, listener in _LISTENERS:
        if not event.contains(target, name, listener):
            # First of all, to hear what the application's own listeners execute.
            event.listen(target, name, listener, insert=name == "after_begin")


_listen_once = cache(listen)


def _listen_to_engine(engine: Engine) -> None:
    # An application may make an engine of other options for each request: they hear what this one tells.
    while (proxied := getattr(engine, "_proxied", None)) is not None:
        engine = proxied
    for name, listener in _ENGINE_LISTENERS:
        if not event.contains(engine, name, listener):
            event.listen(engine, name, listener)
