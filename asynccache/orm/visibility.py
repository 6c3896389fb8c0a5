"""What a transaction sees of others' commits, and others of its statements: its isolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import Pool
from sqlalchemy.util import await_only


class Isolation(NamedTuple):
    """What follows from an isolation level for a cache.

    reads_fresh: each statement sees what was committed before it began. Otherwise a transaction reads from a snapshot:
        one that is older than a commit would store an old row under a lease that was taken after it, and one that
        wants repeatable reads does not want newer rows from a cache.
    commits_statements: each statement may be committed as soon as it is executed, and no rollback undoes it.
    """

    reads_fresh: bool
    commits_statements: bool


READ_COMMITTED = Isolation(reads_fresh=True, commits_statements=False)
AUTOCOMMIT = Isolation(reads_fresh=True, commits_statements=True)
SNAPSHOT = Isolation(reads_fresh=False, commits_statements=False)
UNCLEAR = Isolation(reads_fresh=False, commits_statements=True)

_LEVELS = {"READ COMMITTED": READ_COMMITTED, "AUTOCOMMIT": AUTOCOMMIT}


class _Isolations(WeakKeyDictionary[Pool, Isolation]):
    """A memo: connections of one pool that have no option of their own begin alike, and asking may be a round trip.
    (An application may make an engine of other options for each request; they share one pool.)

    latest: the pool that was asked for last, and its answer. Each hit asks, and an application has one pool.
    """

    latest: tuple[Callable[[], Pool | None], Isolation | None] = (lambda: None), None


_isolations = _Isolations()


def isolation_of(connection: Connection) -> Isolation:
    """The isolation of a connection's transaction."""
    option = connection.get_execution_options().get("isolation_level")
    if option is not None:
        return _isolation_named(option)
    isolation = _isolations.get(connection.engine.pool)
    if isolation is None:
        isolation = _isolations[connection.engine.pool] = _ask(connection)
    return isolation


def expected_isolation(engine: Engine) -> Isolation | None:
    """The isolation of the engine's next connection; None as long as its pool never had one."""
    option = engine.get_execution_options().get("isolation_level")
    if option is not None:
        return _isolation_named(option)
    pool = engine.pool
    latest, isolation = _isolations.latest
    if latest() is not pool:
        isolation = _isolations.get(pool)
        if isolation is not None:
            _isolations.latest = ref(pool), isolation
    return isolation


def _isolation_named(level: str) -> Isolation:
    """As SQLAlchemy reads it: "autocommit" and "READ_COMMITTED" will do."""
    return _LEVELS.get(level.replace("_", " ").upper(), SNAPSHOT)


def _ask(connection: Connection) -> Isolation:
    pooled = connection.connection
    if connection.dialect.name == "sqlite":
        # SQLite calls itself SERIALIZABLE. But as Python's driver uses it by default, it begins no transaction before
        # the first INSERT, UPDATE or DELETE, and until then each SELECT sees what is committed. The other modes are
        # `isolation_level=None`, where the application may emit BEGIN itself, and, since Python 3.12, `autocommit`.
        # aiosqlite does not show `autocommit`.
        driver = pooled.driver_connection
        sqlite = getattr(driver, "_conn", driver)
        try:
            autocommit = getattr(sqlite, "autocommit", -1)
        except connection.dialect.loaded_dbapi.Error:  # of a database in memory: it belongs to aiosqlite's own thread
            autocommit = await_only(driver._execute(getattr, sqlite, "autocommit"))  # type: ignore[union-attr]
        if autocommit != -1:
            return UNCLEAR
        if getattr(sqlite, "isolation_level", None) is not None:
            return READ_COMMITTED
        # What `create_engine(isolation_level=...)` was given shows nowhere else.
        asked = getattr(connection.dialect, "_on_connect_isolation_level", None)
        return AUTOCOMMIT if asked == "AUTOCOMMIT" and not getattr(sqlite, "in_transaction", True) else UNCLEAR
    try:
        if pooled.dbapi_connection is not None and connection.dialect.detect_autocommit_setting(
            pooled.dbapi_connection
        ):
            return AUTOCOMMIT
    except NotImplementedError:
        pass
    return _LEVELS.get(connection.get_isolation_level(), SNAPSHOT)
