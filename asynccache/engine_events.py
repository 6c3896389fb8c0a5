"""What the connections of an engine tell: which statements write, and when a transaction begins to be committed.

    Engine.before_cursor_execute    note what a statement writes
    Engine.after_execute            note which rows it was, if only its answer tells
    Engine.commit, prepare_twophase, commit_twophase    the last moment before COMMIT: lock
    Engine.handle_error             COMMIT was refused
    Dialect.do_commit               COMMIT was answered: look at the locks, and unlock

A session of ours follows the connections that it begins itself, and tells when they were committed. A connection that
was begun elsewhere, by the application or by a session without a cache, is *external*: it is followed from its first
statement on a watched engine, or from when a session of ours joins it, one transaction after the other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, CursorResult, Dialect, Engine, event
from sqlalchemy.engine.interfaces import ExceptionContext, ExecutionContext
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.pool import PoolProxiedConnection

from asynccache.cache import Cache
from asynccache.orm.entity import Scope
from asynccache.orm.statements import UNKNOWN, Effect, effect_of
from asynccache.orm.writes import Writes
from asynccache.threads import LoopIsBlockedError, run_in_loop
from asynccache.transaction import SETTINGS_CHANGED, Transaction

logger = logging.getLogger("asynccache")


@dataclass(frozen=True, slots=True)
class Followed:
    """What a connection's transaction is to one cache.

    external: nothing but the connection itself tells how it ends.
    joined: a session of ours has used the connection, whose next transactions are followed for its sake.
    """

    transaction: Transaction
    external: bool
    joined: bool


_FOLLOWED: Final = "_asynccache_followed"
"""The attribute of a `Connection` that tells what its transaction is to each cache, asked for with each statement. Not
one of its execution options: these are the user's, who may compare them, and listens to their changes."""

_watchers: WeakKeyDictionary[Engine, WeakSet[Cache]] = WeakKeyDictionary()

_committing: WeakKeyDictionary[PoolProxiedConnection, Connection] = WeakKeyDictionary()
"""External connections, by what a dialect knows them by, from when COMMIT is about to be sent until it is answered."""


# ----------------------------------------------------------------------------------------------------------- following


def watch(cache: Cache, engine: Engine) -> None:
    """See `Cache.watch`."""
    root = _root_of(engine)
    listen_to(root)
    _hear_commits(root.dialect)
    _watchers.setdefault(root, WeakSet()).add(cache)


def unwatch(cache: Cache, engine: Engine) -> None:
    """Follow no transaction for this cache any more that begins from here on."""
    _watchers.get(_root_of(engine), WeakSet[Cache]()).discard(cache)


def follow(connection: Connection, ours: Transaction, *, external: bool) -> Transaction:
    """A session of ours uses this connection from here on.

    Gives what is the session's from here on: another one, if the connection's was begun before the session joined it.
    """
    listen_to(connection.engine)
    if external:
        _hear_commits(connection.dialect)
    followed = _followed(connection)
    known = followed.get(ours.cache)
    if known is not None and known.transaction is not ours and not known.transaction.ended:
        if external and ours.joined:  # the session has others as well: to each its own
            return ours
        if external:
            known.transaction.writes.add(ours.writes)
            ours = known.transaction
        else:  # a listener of the application's has executed something before the session came
            ours.writes.add(known.transaction.writes)
    late = known is None and any(
        each.transaction.writes.any and not each.transaction.ended for each in followed.values()
    )
    followed[ours.cache] = Followed(ours, external, joined=True)
    ours.join(connection, external=external)
    if late and (scope := ours.joined[connection.engine].scope) is not None:
        ours.writes.note_effect(scope, UNKNOWN, ())  # what was written was told to other caches, in their terms
    return ours


def _followed(connection: Connection) -> dict[Cache, Followed]:
    followed: dict[Cache, Followed] | None = getattr(connection, _FOLLOWED, None)
    if followed is None:
        followed = {}
        setattr(connection, _FOLLOWED, followed)
    return followed


def _all(connection: Connection) -> Sequence[Followed]:
    """What the connection's transaction is to each cache that follows it. A cache that is closed follows no more what
    is not a session's of its own."""
    followed: Mapping[Cache, Followed] | None = getattr(connection, _FOLLOWED, None)
    if not followed:
        return ()
    return [each for each in followed.values() if not (each.external and each.transaction.cache.closed)]


def _external(connection: Connection) -> Sequence[Transaction]:
    return [each.transaction for each in _all(connection) if each.external]


def _about_to_execute(connection: Connection) -> Sequence[Followed]:
    """The same; a transaction that is not followed yet is, if its engine is watched or its last one was joined."""
    watchers = _watchers.get(_root_of(connection.engine), ()) if _watchers else ()
    followed: dict[Cache, Followed] = getattr(connection, _FOLLOWED, None) or {}
    ended = {cache: each.joined for cache, each in followed.items() if each.external and each.transaction.ended}
    for cache in ended:
        del followed[cache]
    for cache in {*watchers, *(cache for cache, joined in ended.items() if joined)}:
        if cache not in followed:
            ours = Transaction(cache)
            ours.join(connection, external=True)
            _followed(connection)[cache] = Followed(ours, external=True, joined=ended.get(cache, False))
    return _all(connection)


def _root_of(engine: Engine) -> Engine:
    # An application may make an engine of other options for each request: they hear what this one tells.
    while (proxied := getattr(engine, "_proxied", None)) is not None:
        engine = proxied
    return engine


# ------------------------------------------------------------------------------------------------------ engine events


def _before_cursor_execute(
    connection: Connection, _cursor: Any, sql: str, parameters: Any, context: ExecutionContext | None, _many: bool
) -> None:
    followed = _about_to_execute(connection)
    if not followed:
        return
    effect = _effect_of(context, sql)
    if effect.commits:
        _hear_answers(connection.engine)
    if context is not None and context.execution_options.get("stream_results"):
        _note_snapshot(connection)
    if effect.settings_last and not _are_local(parameters):
        connection.info[SETTINGS_CHANGED] = True
    for each in followed:
        ours = each.transaction
        if effect.changes_settings:
            ours.changed_settings = True
        if effect.writes_something:
            at_once = _is_committed_at_once(connection, ours, sql)
            _note_effect(ours, ours.writes, connection, effect, context, at_once=at_once)
            if at_once:
                _hear_answers(connection.engine)
                # Locked apart from the transaction's other writes, whose locks were taken and let go with theirs.
                now = Writes(ours.cache.models, ours.cache.settings.slots_max)
                _note_effect(ours, now, connection, effect, context, at_once=True)
                _step(connection, ours, partial(ours.before_statement, list(now.slots())))
    if effect.commits:
        _before_commit(connection)


def _are_local(parameters: Any) -> bool:
    """Whether these are for `set_config(name, value, true)`, whose setting ends with the transaction."""
    values = list(parameters.values() if isinstance(parameters, Mapping) else parameters or ())
    return any(value is True for value in values) and not any(value is False for value in values)


_BEGINS_ON_SQLITE = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(?:insert|update|delete|replace)\b", re.IGNORECASE | re.DOTALL
)


def _is_committed_at_once(connection: Connection, ours: Transaction, sql: str) -> bool:
    """Whether the database commits a write as it executes it: under AUTOCOMMIT, and some on SQLite.

    Python's driver for SQLite begins a transaction before statements that begin with one of four words. Others (DDL,
    WITH ... INSERT) may be executed without one: they are committed then, and no rollback undoes them.
    """
    return ours.joined[connection.engine].isolation.commits_statements or (
        connection.dialect.name == "sqlite" and not _BEGINS_ON_SQLITE.match(sql)
    )


def _after_cursor_execute(
    connection: Connection, _cursor: Any, sql: str, _parameters: Any, context: ExecutionContext | None, _many: bool
) -> None:
    followed = [each.transaction for each in _all(connection) if each.transaction.awaits_answer]
    if not followed:
        return
    effect = _effect_of(context, sql)
    for ours in followed:
        # Any other may come from a listener, between the locks of a COMMIT and the COMMIT.
        if effect.commits or (effect.writes_something and _is_committed_at_once(connection, ours, sql)):
            answered(connection, ours)


def _after_execute(
    connection: Connection, _statement: Any, _multi: Any, _parameters: Any, _options: Any, result: object
) -> None:
    for each in _all(connection):
        ours = each.transaction
        if ours.writes.awaits_answers and isinstance(result, CursorResult):
            context = result.context
            note = partial(
                ours.writes.note_answer,
                effect=_effect_of(context, context.statement or ""),
                statement=context,
                result=result,
            )
            _note(ours, connection, note, context.execution_options)


def _effect_of(context: ExecutionContext | None, sql: str) -> Effect:
    try:
        return effect_of(context.compiled if context is not None else None, sql)
    except Exception:
        logger.exception("cannot tell what this statement writes; all that is cached is invalidated with it: %s", sql)
        return UNKNOWN


def _note_effect(
    ours: Transaction,
    writes: Writes,
    connection: Connection,
    effect: Effect,
    context: ExecutionContext | None,
    *,
    at_once: bool,
) -> None:
    parameter_sets = getattr(context, "compiled_parameters", None) or ()
    options = context.execution_options if context is not None else connection.get_execution_options()
    note = partial(
        writes.note_effect,
        effect=effect,
        parameter_sets=parameter_sets,
        statement=None if at_once else context,
    )
    _note(ours, connection, note, options)


def _note(ours: Transaction, connection: Connection, note: Callable[[Scope], None], options: Mapping[str, Any]) -> None:
    """Note a write. What cannot be understood invalidates everything, rather than break the user's statement.

    options: of the statement, which may have a schema_translate_map of its own.
    """
    ours.writes.any = True
    scope = ours.joined[connection.engine].scope
    try:
        scope = ours.cache.scope_of(connection.engine, options)
        if scope is not None:
            note(scope)
    except Exception:
        logger.exception("cannot tell which rows were written; all that is cached is invalidated with them")
        if scope is not None:
            ours.writes.note_effect(scope, UNKNOWN, ())


def _note_snapshot(connection: Connection, _name: object = None) -> None:
    if connection.dialect.name == "sqlite":
        for each in _all(connection):
            each.transaction.reads_snapshot = True


def _before_options(connection: Connection, options: Mapping[str, Any]) -> None:
    for each in _all(connection):
        each.transaction.set_options(connection, {**connection.get_execution_options(), **options})


def _before_commit(connection: Connection) -> None:
    followed = _all(connection)
    try:
        for each in followed:
            _step(connection, each.transaction, each.transaction.before_commit)
    except BaseException:
        # SQLAlchemy takes this for a COMMIT that has failed in the database, which ends a transaction, and would
        # return the connection to its pool with the transaction open: the next one to use it would commit it.
        connection._rollback_impl()
        raise
    if any(each.external for each in followed):
        _committing[connection.connection] = connection


_REFUSALS: Final = ("23", "40", "P0")
"""Classes of SQLSTATE by which a server says that it has rolled back: a constraint, a conflict of transactions, or a
trigger that raised. Others may come from drivers and proxies, or from a server that is going down."""

_COMPLETION_UNKNOWN: Final = "40003"


def _after_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None:
        return
    refused = [each.transaction for each in _all(connection) if each.transaction.awaits_answer]
    if not refused or context.is_disconnect or not _is_refusal(context.sqlalchemy_exception, context.dialect.name):
        return
    if context.statement is None:
        # SQLite keeps a transaction open whose COMMIT it has refused, and SQLAlchemy would return the connection to its
        # pool with it: the next one to use it would commit it.
        guard(connection._rollback_impl)
    for ours in refused:
        answered(connection, ours)


def _is_refusal(error: BaseException | None, dialect_name: str) -> bool:
    """Whether the database itself has refused what it was to commit, so that nothing is under way any more."""
    if not isinstance(error, DBAPIError):
        return False
    if isinstance(error, IntegrityError) or dialect_name == "sqlite":  # which is no server
        return True
    sqlstate: str = getattr(error.orig, "sqlstate", None) or ""
    return sqlstate.startswith(_REFUSALS) and sqlstate != _COMPLETION_UNKNOWN


def _before_prepare(connection: Connection, _xid: object) -> None:
    for each in _all(connection):
        _step(connection, each.transaction, each.transaction.before_prepare)


def _before_commit_prepared(connection: Connection, _xid: object, is_prepared: bool) -> None:
    if is_prepared:
        for each in _all(connection):
            _step(connection, each.transaction, each.transaction.before_commit_prepared)
    else:
        _before_commit(connection)


def _before_rollback(connection: Connection, *_: object) -> None:
    for ours in _external(connection):
        end(connection, ours)


def answered(connection: Connection, ours: Transaction) -> None:
    """COMMIT was answered, or a statement that was one."""
    if ours.awaits_answer:
        guard(partial(_step, connection, ours, ours.answered))


def end(connection: Connection, ours: Transaction) -> None:
    """An external transaction is over, and so is what its locks guard, unless nobody knows."""
    ours.ended = True
    if ours.holds_locks:
        guard(partial(_step, connection, ours, ours.end))


def _step(connection: Connection, ours: Transaction, step: Callable[[], None]) -> None:
    """Take a step that may await: in the greenlet of an asyncio engine, or in another thread than the event loop's."""
    if connection.dialect.is_async:
        step()
        return
    if not ours.holds_locks and not any(True for _ in ours.writes.slots()):
        return  # the loop need not be bothered
    try:
        run_in_loop(ours.cache, step)
    except LoopIsBlockedError:
        ours.lock_too_late()


def guard(step: Callable[[], None]) -> None:
    """An exception that escaped here would leave the session in a state that it cannot get out of."""
    try:
        step()
    except Exception:
        logger.exception("slots stay locked until their locks expire")


# --------------------------------------------------------------------------------------------------- hearing of COMMIT


def _hear_commits(dialect: Dialect) -> None:
    """SQLAlchemy tells that it is about to commit, but not that it has, unless to sessions. Its dialect's methods are
    the one place that all commits pass, their answers too."""
    if "do_commit" in vars(dialect):
        return
    do_commit, do_commit_twophase = dialect.do_commit, dialect.do_commit_twophase

    def commit(dbapi_connection: PoolProxiedConnection) -> None:
        with _external_commit(_committing.pop(dbapi_connection, None)):
            do_commit(dbapi_connection)

    def commit_twophase(connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False) -> None:
        with _external_commit(connection):
            do_commit_twophase(connection, xid, is_prepared, recover)

    vars(dialect).update(do_commit=commit, do_commit_twophase=commit_twophase)


@contextmanager
def _external_commit(connection: Connection | None) -> Generator[None]:
    if connection is None:  # a session's own, which tells itself
        yield
        return
    transactions = _external(connection)
    try:
        yield
        for ours in transactions:
            answered(connection, ours)
    finally:
        for ours in transactions:
            end(connection, ours)


# ---------------------------------------------------------------------------------------------------------- listening

_LISTENERS: Sequence[tuple[str, Callable[..., None]]] = (
    ("before_cursor_execute", _before_cursor_execute),
    ("after_execute", _after_execute),
    ("savepoint", _note_snapshot),
    ("handle_error", _after_error),
    ("set_connection_execution_options", _before_options),
    ("commit", _before_commit),
    ("rollback", _before_rollback),
    ("prepare_twophase", _before_prepare),
    ("commit_twophase", _before_commit_prepared),
    ("rollback_twophase", _before_rollback),
)


def listen_to(engine: Engine) -> None:
    root = _root_of(engine)
    if not _hears(root, *_LISTENERS[-1]):  # as it does all the others
        for name, listener in _LISTENERS:
            _hear(root, name, listener)


def _hear_answers(engine: Engine) -> None:
    """Hear when statements were executed, once there is one that commits something: hardly ever."""
    _hear(_root_of(engine), "after_cursor_execute", _after_cursor_execute)


def _hear(engine: Engine, name: str, listener: Callable[..., None]) -> None:
    if not _hears(engine, name, listener):
        event.listen(engine, name, listener)


def _hears(engine: Engine, name: str, listener: Callable[..., None]) -> bool:
    # Not `event.contains`, which knows engines by their addresses:
    # 1. An engine is gone; one of its connections is still held by somebody, and with it what listened to the engine.
    # 2. Another engine is made at the same address. It is taken for the first, and nothing that it does is heard.
    heard = engine.dialect if name == "handle_error" else engine  # where `event.listen` puts it
    return listener in getattr(heard.dispatch, name)
