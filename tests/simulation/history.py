"""A history as plain data. Its `repr` is Python that plays it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "get",  # one row
    "get many",  # `cached_get_many` of all keys
    "get by",  # `cached_get_by` of a value that a row has, had, or may get next
    "get connected",  # by a session that holds a connection already
    "save",  # by the unit of work: update the rows, or insert those that are not there
    "delete",  # by the unit of work
    "update where",  # one statement for each key, which names it
    "update all",  # a statement that names none
    "savepoint",  # change the rows, change them again in a savepoint that is rolled back, and commit
    "rollback",  # change the rows, and think better of it
    "foreign",  # another program writes; then `cache.invalidate`
    "foreign in session",  # another program writes; then `cached_invalidate` in a session that commits
    "evict",  # the cache server evicts the rows' slots
    "evict generations",
    "restart",  # the cache server
    "cut off",  # the process cannot reach the cache server for a while
]


@dataclass(frozen=True, slots=True)
class Operation:
    """What one task does.

    process: by number; the processes share nothing but the cache server and the database.
    keys: of the rows that it is about. Rows 0 and 1 are there at the beginning, row 2 is not.
    pause_ms: how long after the operation before it it begins.
    cache, statements, commits: what happens to its calls: positions in `backend.FATES`, `database.STATEMENTS` and
        `database.COMMITS`, see `chance.Actor`.
    cancelled_at: at which moment it is cancelled, see `SimulatedLoop.cancel_at`; None: not at all.
    """

    kind: Kind
    process: int = 0
    keys: tuple[int, ...] = (0,)
    pause_ms: int = 0
    cache: bytes = b""
    statements: bytes = b""
    commits: bytes = b""
    cancelled_at: int | None = None


@dataclass(frozen=True, slots=True)
class History:
    """All that is decided.

    choices: which ready callback is next, see `SimulatedLoop`.
    warm: whether each process has had a connection before.
    The rest are settings of the caches.
    """

    operations: tuple[Operation, ...]
    choices: bytes = b""
    warm: bool = True
    hold_off_s: float = 0.0
    on_lock_failure: Literal["commit", "raise"] = "commit"
    slots_max: int = 64
    repairs_max: int = 10_000
