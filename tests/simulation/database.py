"""A database of one table under READ COMMITTED, and a SQLAlchemy dialect by which real sessions use it.

Each statement sees what was committed when it is executed, and its own transaction's changes. Who changes a row waits
for the other who has. COMMIT is executed whether or not anybody waits for its answer still.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import AdaptedConnection
from sqlalchemy.dialects import registry
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import await_only

from tests.simulation.chance import Trace, actor, next_of

ROW_LOCK_TIMEOUT_S = 1.0
"""So long a statement waits for another's change of a row to be committed or rolled back."""

Value = int | None
"""What a row holds; None: there is no such row."""


class Version(NamedTuple):
    """What a commit has made of a row."""

    value: Value
    writer: str


class Database:
    """All versions of each row that were ever committed, in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, trace: Trace, rows: Mapping[int, Value]) -> None:
        self.loop = loop
        self.trace = trace
        self.versions = {key: [Version(value, "the beginning")] for key, value in rows.items()}
        self.selects = 0
        self._row_locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    def committed(self, key: int) -> Value:
        return self.versions[key][-1].value

    def commit(self, changes: Mapping[int, Value]) -> None:
        for key, value in changes.items():
            self.versions[key].append(Version(value, actor().name))
        if changes:
            self.trace.note("is committed: {}", dict(changes))

    def row_lock(self, key: int) -> asyncio.Lock:
        return self._row_locks[key]


class StatementFate(NamedTuple):
    """there_ms, back_ms: how long a statement and its answer travel. is_cut: the connection is lost before."""

    there_ms: int
    back_ms: int
    is_cut: bool = False


class CommitFate(NamedTuple):
    """executed_ms: when COMMIT is executed, None: never. ends_ms: when its caller hears something, or of a cut."""

    executed_ms: int | None
    ends_ms: int
    is_cut: bool = False


STATEMENTS = (
    StatementFate(1, 1),
    StatementFate(1, 6),
    StatementFate(6, 1),
    StatementFate(30, 1),
    StatementFate(1, 30),
    StatementFate(1, 700),
    StatementFate(1, 3500),  # longer than a lease lasts
    StatementFate(1, 1, is_cut=True),
)

COMMITS = (
    CommitFate(1, 2),
    CommitFate(5, 10),
    CommitFate(30, 31),
    CommitFate(1, 40),
    CommitFate(400, 1200),
    CommitFate(None, 2, is_cut=True),
    CommitFate(1, 2, is_cut=True),
    CommitFate(2000, 5, is_cut=True),
)


# --------------------------------------------------------------------------------------------------------- connections


class Error(Exception):
    """The base of the errors that PEP 249 asks for."""


class DatabaseError(Error):
    pass


class OperationalError(DatabaseError):
    pass


class IntegrityError(DatabaseError):
    pass


_KEYS = re.compile(r"WHERE item\.id (?:=|IN) \(?((?::\w+(?:, )?)+)\)?$")
_BY_VALUE = re.compile(r"WHERE item\.value = :(\w+)$")
_ADDED_TO_ID = re.compile(r"SET value=\(:(\w+) \+ item\.id\)")


class Session:
    """The server's side of one connection."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.is_lost = False
        self._changes: dict[int, Value] = {}
        self._savepoints: list[dict[int, Value]] = []
        self._locked: list[asyncio.Lock] = []
        self._begun = False
        self._committing = False

    async def execute(self, sql: str, parameters: Mapping[str, Any]) -> tuple[list[tuple[Any, ...]], int]:
        """Give the rows, and how many were found or changed."""
        self._check()
        self._begun = True
        fate = next_of(STATEMENTS, actor().statements)
        await asyncio.sleep(fate.there_ms / 1000)
        if fate.is_cut:
            self._lose("lost before a statement")
        answer = await self._executed(sql, parameters)
        await asyncio.sleep(fate.back_ms / 1000)
        return answer

    async def _executed(self, sql: str, parameters: Mapping[str, Any]) -> tuple[list[tuple[Any, ...]], int]:
        match sql.split(" ", 3):
            case ["SAVEPOINT", *_]:
                self._savepoints.append(dict(self._changes))
                return [], 0
            case ["ROLLBACK", "TO", *_]:
                self._changes = self._savepoints.pop()
                return [], 0
            case ["RELEASE", *_]:
                self._savepoints.pop()
                return [], 0
            case ["INSERT", *_]:
                return [], await self._insert(parameters["id"], parameters["value"])
            case ["SELECT", *_]:
                self.database.selects += 1
                rows = [(key, value) for key in self._keys(sql, parameters) if (value := self._seen(key)) is not None]
                self.database.trace.note("SELECTs {}", rows)
                return rows, len(rows)
            case ["UPDATE" | "DELETE" as verb, *_]:
                changed = 0
                added = _ADDED_TO_ID.search(sql)
                for key in self._keys(sql, parameters):
                    await self._lock(key)
                    if self._seen(key) is not None:
                        value = parameters[added[1]] + key if added is not None else parameters.get("value")
                        self._changes[key] = value if verb == "UPDATE" else None
                        changed += 1
                self.database.trace.note("has changed {} rows, {}", changed, dict(self._changes))
                return [], changed
            case _:
                raise NotImplementedError(sql)

    def _keys(self, sql: str, parameters: Mapping[str, Any]) -> Sequence[int]:
        if "WHERE" not in sql:
            return sorted(self.database.versions)
        if (found := _BY_VALUE.search(sql)) is not None:
            return [key for key in self.database.versions if self._seen(key) == parameters[found[1]]]
        found = _KEYS.search(sql)
        if found is None:
            raise NotImplementedError(sql)
        return [parameters[name] for name in re.findall(r":(\w+)", found[1])]

    def _seen(self, key: int) -> Value:
        return self._changes[key] if key in self._changes else self.database.committed(key)

    async def _insert(self, key: int, value: int) -> int:
        await self._lock(key)
        if self._seen(key) is not None:
            actor().excuse = "there is such a row"
            raise IntegrityError(f"there is an item {key}")
        self._changes[key] = value
        self.database.trace.note("has inserted {}", {key: value})
        return 1

    async def _lock(self, key: int) -> None:
        lock = self.database.row_lock(key)
        if lock in self._locked:
            return
        try:
            async with asyncio.timeout(ROW_LOCK_TIMEOUT_S):
                _ = await lock.acquire()
        except TimeoutError:
            actor().excuse = "row lock"
            raise OperationalError(f"item {key} is locked for too long") from None
        self._locked.append(lock)

    async def commit(self) -> None:
        self._check()
        if not self._begun:
            return
        fate = next_of(COMMITS, actor().commits)
        self.database.trace.note("sends COMMIT")
        self._committing = fate.executed_ms is not None
        if fate.executed_ms is not None:
            self.database.loop.call_later(fate.executed_ms / 1000, self._commit)
        await asyncio.sleep(fate.ends_ms / 1000)
        if fate.is_cut:
            self._lose("lost in COMMIT")
        self.database.trace.note("COMMIT is answered")

    def _commit(self) -> None:
        self.database.commit(self._changes)
        self._end()

    async def rollback(self) -> None:
        self._check()
        if self._begun:
            await asyncio.sleep(0.001)
            self._end()

    def close(self) -> None:
        """The client is gone. What it had not committed is rolled back."""
        self.is_lost = True
        if not self._committing:
            self._end()

    def _end(self) -> None:
        self._changes, self._savepoints, self._begun, self._committing = {}, [], False, False
        for lock in self._locked:
            lock.release()
        self._locked = []

    def _lose(self, how: str) -> None:
        self.database.trace.note("its connection is {}", how)
        self.close()
        self._check()

    def _check(self) -> None:
        if self.is_lost:
            actor().excuse = "connection"
            raise OperationalError("connection lost")


# ------------------------------------------------------------------------------------------------------------- dialect


class _Cursor:
    """PEP 249 for SQLAlchemy, which calls it in a greenlet."""

    arraysize = 1
    lastrowid = None

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: list[tuple[Any, ...]] = []
        self.rowcount = -1
        self.description: Sequence[tuple[Any, ...]] | None = None

    def execute(self, sql: str, parameters: Mapping[str, Any] | None = None) -> None:
        self._rows, self.rowcount = await_only(self._session.execute(sql, parameters or {}))
        names = ("item_id", "item_value") if sql.startswith("SELECT") else ()
        self.description = [(name, *[None] * 6) for name in names] or None

    def executemany(self, sql: str, parameter_sets: Sequence[Mapping[str, Any]]) -> None:
        count = 0
        for parameters in parameter_sets:
            self.execute(sql, parameters)
            count += self.rowcount
        self.rowcount = count

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._rows.pop(0) if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[tuple[Any, ...]]:
        count = size or self.arraysize
        fetched, self._rows = self._rows[:count], self._rows[count:]
        return fetched

    def fetchall(self) -> list[tuple[Any, ...]]:
        fetched, self._rows = self._rows, []
        return fetched

    async def _async_soft_close(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Connection(AdaptedConnection):
    __slots__ = ("session",)

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def driver_connection(self) -> Session:
        return self.session

    def cursor(self) -> _Cursor:
        return _Cursor(self.session)

    def commit(self) -> None:
        await_only(self.session.commit())

    def rollback(self) -> None:
        await_only(self.session.rollback())

    def close(self) -> None:
        self.session.close()


class _Driver:
    """The module that PEP 249 asks for."""

    apilevel = "2.0"
    paramstyle = "named"
    Error, DatabaseError, OperationalError, IntegrityError = Error, DatabaseError, OperationalError, IntegrityError
    InterfaceError = DataError = InternalError = ProgrammingError = NotSupportedError = DatabaseError

    def connect(self, client: Client) -> _Connection:
        return await_only(client.connect())


class Client:
    """How a process reaches the database. database: to be set for each history."""

    database: Database

    async def connect(self) -> _Connection:
        fate = next_of(STATEMENTS, actor().statements)
        await asyncio.sleep(fate.there_ms / 1000)
        if fate.is_cut:
            actor().excuse = "no connection"
            raise OperationalError("connection lost")
        return _Connection(Session(self.database))


class SimulatedDialect(DefaultDialect):
    """`simulated:///name`, with `connect_args={"client": ...}`."""

    name = "simulated"
    driver = "simulated"
    is_async = True
    has_terminate = True
    poolclass = AsyncAdaptedQueuePool
    supports_statement_cache = True
    supports_native_boolean = True
    default_paramstyle = "named"
    default_schema_name = "main"  # known before the first connection, so that no history is the first

    @classmethod
    def import_dbapi(cls) -> Any:
        return _Driver()

    def create_connect_args(self, url: object) -> Any:  # noqa: ARG002
        return (), {}

    def initialize(self, connection: object) -> None:  # noqa: ARG002
        self.default_isolation_level = "READ COMMITTED"

    def get_isolation_level(self, dbapi_connection: object) -> Any:  # noqa: ARG002
        return "READ COMMITTED"

    def get_driver_connection(self, connection: Any) -> Any:
        return connection.driver_connection

    def is_disconnect(self, e: BaseException, connection: object, cursor: object) -> bool:  # noqa: ARG002
        return "connection lost" in str(e)

    def do_terminate(self, dbapi_connection: Any) -> None:
        dbapi_connection.close()


registry.register("simulated", __name__, "SimulatedDialect")
