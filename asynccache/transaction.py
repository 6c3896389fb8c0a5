"""One transaction of a session, as the cache sees it: what it wrote, which slots it has locked, how it ended.

SQLAlchemy tells its story by events (`asynccache.engine_events`, `asynccache.sync_session`); here is what each of them
means for the cache. All this runs in SQLAlchemy's greenlets, in which `await_only` awaits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.util import await_only

from asynccache import protocol
from asynccache.cache import Cache
from asynccache.errors import LockNotPlacedError
from asynccache.orm.entity import Scope
from asynccache.orm.visibility import Isolation, isolation_of
from asynccache.orm.writes import Writes
from asynccache.protocol import Slot
from asynccache.repair import Claim

SETTINGS_CHANGED: Final = "asynccache_settings_changed"
"""In the `info` of a connection, which lasts as long as that to the database: what a `SET` has changed on it stays when
its transaction is committed, and the pool gives it to others like that."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A connection that a transaction uses. scope: None if nothing tells which database it is."""

    scope: Scope | None
    isolation: Isolation


class Transaction:
    """From the first statement, or the first note of a write, to the end of the outermost transaction.

    external: it runs on a connection that was begun outside of the session, and will be committed there.
    ended: an external transaction was committed or rolled back; the connection's next one is another.
    reads_snapshot: its SELECTs may see less than what is committed. On SQLite a savepoint begins a transaction with a
        snapshot of its own, and so does a result that is streamed, until it is read to its end.
    awaits_answer: a COMMIT was sent and not yet answered; the outcome is not known.
    changed_settings: it may see other rows than its engine's settings tell (search path, role, isolation).
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.writes = Writes(cache.models, cache.settings.slots_max)
        self.joined: dict[Engine, Joined] = {}
        self.external = False
        self.ended = False
        self.reads_snapshot = False
        self.changed_settings = False
        self.awaits_answer = False
        self._owner = protocol.fresh_id()
        self._locked: set[Slot] = set()
        """What this transaction may hold locks on; noted before they are asked for, since an answer may get lost."""
        self._unplaced: set[Slot] = set()
        """Those of which it is not known that they were locked in time: owed, and doubted, from there on."""
        self._locked_at_s = 0.0
        self._cancelled = False
        """A cancellation came where it could not be raised."""

    @property
    def holds_locks(self) -> bool:
        return bool(self._locked)

    def join(self, connection: Connection, *, external: bool) -> None:
        """The session uses this connection from here on."""
        engine, options = connection.engine, connection.get_execution_options()
        own = options is engine.get_execution_options()  # nearly always, and then it is known
        scope = self.cache.scope_of(engine, None if own else options)
        self.joined[engine] = Joined(scope, isolation_of(connection))
        self.external = self.external or external
        self.changed_settings = self.changed_settings or SETTINGS_CHANGED in connection.info

    def set_options(self, connection: Connection, options: Mapping[str, Any]) -> None:
        """The connection gets other execution options within the transaction; its schemas may be translated by them."""
        scope = self.cache.scope_of(connection.engine, options)
        self.joined[connection.engine] = Joined(scope, self.joined[connection.engine].isolation)

    # --------------------------------------------------------------------------------------------------- before COMMIT

    def before_commit(self) -> None:
        """The last moment before COMMIT is sent: lock what it will change.

        Raises LockNotPlacedError if that fails and `on_lock_failure` is "raise".
        """
        # Some may be locked by now: for the COMMIT in another of the session's databases.
        held = self._locked if self._locked and self._locks_are_fresh else ()
        self._lock(slot for slot in self.writes.slots() if slot not in held)
        self.awaits_answer = True

    def before_prepare(self) -> None:
        """Two-phase: from PREPARE on the commit can no longer be refused."""
        self._lock(self.writes.slots())

    def before_commit_prepared(self) -> None:
        """Two-phase: time may have passed since PREPARE, and locks do not last."""
        self.awaits_answer = True
        if not self._locks_are_fresh:
            self._lock(self.writes.slots(), refusable=False)

    def before_statement(self, slots: Iterable[Slot]) -> None:
        """A statement that is committed as it is executed, and the slots that it changes."""
        self._lock(slots)
        self.awaits_answer = True

    def lock_too_late(self) -> None:
        """Who commits blocks the event loop, so that nothing can be locked before. What was written is destroyed as
        soon as the loop goes on: COMMIT has been answered by then. Until then this process does not read it.

        Raises LockNotPlacedError if `on_lock_failure` is "raise".
        """
        if slots := list(self.writes.slots()):
            self.cache.telemetry.locked(slots, failed=slots, duration_s=0.0)
            if self.cache.settings.on_lock_failure == "raise":
                raise LockNotPlacedError(
                    f"{len(slots)} slots of {self.cache!r} could not be locked: its event loop is blocked by this very "
                    "COMMIT; commit in another thread (asyncio.to_thread), or use an asyncio driver"
                )
            nobody = protocol.fresh_id()
            self.cache.bound().repairs.owe((Claim(slot, nobody) for slot in slots), doubtful=True)

    @property
    def _locks_are_fresh(self) -> bool:
        return time.monotonic() - self._locked_at_s <= self.cache.settings.lock_ttl_s / 4

    def _lock(self, slots: Iterable[Slot], *, refusable: bool = True) -> None:
        wanted = list(slots)
        if not wanted:
            return
        settings = self.cache.settings
        writes = self.cache.bound().writes
        self._locked.update(wanted)
        self._locked_at_s = time.monotonic()
        placed = await_only(writes.lock(wanted, self._owner))
        # The loop may have been busy: no COMMIT goes out under a lock that may end before it.
        placed = placed and time.monotonic() - self._locked_at_s < settings.lock_ttl_s / 2
        if placed:
            return
        if refusable and settings.on_lock_failure == "raise":
            raise LockNotPlacedError(
                f"{len(wanted)} slots of {self.cache!r} could not be locked, "
                f"and lock_timeout is {settings.lock_timeout_s} s; nothing was committed: roll back and try again"
            )
        # However this ends, and whether anybody hears of it: the slots are destroyed once it has ended.
        self._unplaced.update(wanted)
        writes.release_later(wanted, self._owner, placed=False)

    # --------------------------------------------------------------------------------------------------- after COMMIT

    def answered(self) -> None:
        """The database has answered COMMIT, or a statement that it committed; the caller is not told yet."""
        if not self.awaits_answer:
            return  # a savepoint, or a transaction that is committed elsewhere
        self.awaits_answer = False
        if not self._locked:
            return
        writes = self.cache.bound().writes
        if writes.unlocks_at_once:
            self._settle()
        # What is doubted is not read: there is no more to find out about it.
        elif self._was_done(writes.verify(self._locked - self._unplaced, self._owner)):
            self._release()
        else:
            self._repair()

    def committed_without_connection(self) -> None:
        """A commit that had nothing to send, of a session that has noted a write made elsewhere."""
        self._locked.update(self.writes.slots())
        if self._locked:
            self._settle()

    def _settle(self) -> None:
        if self._was_done(self.cache.bound().writes.settle(self._locked, self._owner)):
            self._let_go()
        else:
            self._repair()

    def end(self) -> None:
        """The outermost transaction is over: committed, rolled back, or nobody knows."""
        if not self._locked:
            return
        if self.awaits_answer:
            self._release_unknown()
        else:
            self._release()

    def _release(self) -> None:
        self.cache.bound().writes.release(self._locked, self._owner)
        self._let_go()

    def _repair(self) -> None:
        self.cache.bound().writes.repair(self._locked, self._owner)
        self._let_go()

    def _release_unknown(self) -> None:
        # COMMIT may have been sent and lost, or be under way still: cancelled, cut off, or answered to somebody else.
        # Also of what could not be locked, which stays doubted. The rest of the transaction may hold locks.
        if self._locked:
            self.cache.bound().writes.release_later(self._locked, self._owner, placed=True)
        self._let_go()

    def _let_go(self) -> None:
        """What is locked from here on has another owner, since the unlocking goes on in the background.

        1. Under AUTOCOMMIT a statement has changed a row; its lock is being released.
        2. The next statement locks the same row.
        3. The release comes late, and would take away the second lock, were it the same owner's.
        """
        self._locked = set()
        self._unplaced = set()
        self._owner = protocol.fresh_id()

    def _was_done(self, work: Coroutine[Any, Any, None]) -> bool:
        """Await this in an event of SQLAlchemy that no exception may escape from, not even a cancellation.

        A cancellation that comes meanwhile ends the work, and is delivered at the task's next await.
        """

        async def wait() -> bool:
            try:
                await work
            except asyncio.CancelledError as error:
                self._cancelled = True
                current = asyncio.current_task()
                if current is not None:
                    # Counted once, as `asyncio.timeout` expects of a cancellation that it caused, and with the message
                    # by which anyio knows its own.
                    current.uncancel()
                    current.cancel(*error.args)
                return False
            return True

        return await_only(wait())

    def deliver_cancellation(self) -> None:
        """Await once more where an exception may escape again, if a cancellation is due.

        1. `async with asyncio.timeout(1)` around a commit cancels it while it looks at its locks.
        2. All that is left to do awaits nothing, and the block ends.
        3. The cancellation is raised at the next await, by which the time-out does not know it any more.
        """
        if self._cancelled:
            self._cancelled = False
            await_only(asyncio.sleep(0))
