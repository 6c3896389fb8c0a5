"""Writers: each commit that is acknowledged to them raises the floor under all reads that begin later."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

from sqlalchemy import Table, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from asynccache import AsyncCachedSession, LockNotPlacedError
from tests.servers import FaultProxy
from tests.servers.proxy import Trap
from tests.torture.ledger import Floor
from tests.torture.mixes import Fault
from tests.torture.rows import CHECK, GROUPS, ITEMS, ROW_VICTIMS, Item, Row, RowVictim, TableVictim, Version, model_of
from tests.torture.worker import Commit, Role, Worker, commit_of, database_url_behind

LANES: Final = 2
"""So many transactions of a writing process run at a time, each on a connection of its own."""

THINK_S: Final = 0.06
READS_PER_WRITE: Final = 250
READS_PER_TABLE_WRITE: Final = 2000
"""Nobody begins a transaction before the readers have read so often since the last one: whatever share of the machine
they get, they read much more often than is written. One that locks a whole table costs them most."""

HOLD_S_MAX: Final = 0.2
DEADLOCK: Final = "40P01"

_RowT = TypeVar("_RowT", bound=Row)


@dataclass(slots=True)
class Lane:
    """A writer's connection to PostgreSQL, behind a proxy where COMMITs are to be held."""

    sessions: async_sessionmaker[AsyncCachedSession]
    proxy: FaultProxy | None


@dataclass(slots=True)
class Attempt:
    """One transaction: what it has written so far, and what became of its locks."""

    commit: Commit = field(default_factory=Commit)
    versions: list[Version] = field(default_factory=list)


async def write(worker: Worker) -> None:
    killed = worker.job.role in (Role.ROW_VICTIM, Role.TABLE_VICTIM)
    async with AsyncExitStack() as stack:
        lanes = [await stack.enter_async_context(lane_of(worker)) for _ in range(1 if killed else LANES)]
        await worker.run(*(Writer(worker, lane).go_on() for lane in lanes))


@asynccontextmanager
async def lane_of(worker: Worker) -> AsyncGenerator[Lane]:
    url = worker.job.database_url
    async with AsyncExitStack() as stack:
        proxy = None
        if worker.mix.faults & {Fault.DELAY_COMMITS, Fault.CANCEL_COMMITS, Fault.KILL}:
            upstream = worker.engine.url.host, worker.engine.url.port
            proxy = await stack.enter_async_context(FaultProxy(cast("tuple[str, int]", upstream)))
            url = database_url_behind(worker.job, proxy)
        engine = create_async_engine(url, pool_size=2)
        stack.push_async_callback(engine.dispose)
        yield Lane(async_sessionmaker(engine, class_=AsyncCachedSession, cache=worker.cache), proxy)


class Writer:
    def __init__(self, worker: Worker, lane: Lane) -> None:
        self._worker = worker
        self._lane = lane
        self._random = worker.random
        self._counts = worker.counts
        self._role = worker.job.role
        self._last: int | None = None
        """The row that it has written last, and may write once more at once, as users do who save twice: when readers
        are just loading it."""

    async def go_on(self) -> None:
        victim = self._role in (Role.ROW_VICTIM, Role.TABLE_VICTIM)
        reads = READS_PER_TABLE_WRITE if self._role is Role.BULK_BY_TABLE else READS_PER_WRITE
        due = 0 if victim else reads * self._random.random()
        while not self._worker.ledger.stopped:
            await asyncio.sleep(min(self._random.expovariate(1 / THINK_S), 5 * THINK_S))
            if self._last is not None and self._random.random() < 0.5:
                pass
            elif self._worker.ledger.reads() >= due:
                due = self._worker.ledger.reads() + reads
                self._last = None
            else:
                continue
            attempt = Attempt()
            if victim:
                await self._die_in_commit(attempt)
            elif self._role is not Role.ROLLBACK and self._lane.proxy is not None and self._random.random() < 0.2:
                await self._commit_late(attempt, self._lane.proxy)
            else:
                await self._transact(attempt)

    # --------------------------------------------------------------------------------------------------- a transaction

    async def _transact(self, attempt: Attempt) -> None:
        commit_of.set(attempt.commit)
        try:
            async with self._lane.sessions() as session:
                attempt.versions = await self._change(session)
                if self._role is Role.ROLLBACK and self._random.random() < 0.7:
                    await session.rollback()
                    self._counts.rollbacks += 1
                    return
                await session.commit()
        except LockNotPlacedError:
            self._counts.refused += 1
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != DEADLOCK:
                self._failed(error)
        except Exception as error:
            self._failed(error)
        else:
            await self._acknowledge(attempt)

    def _failed(self, error: Exception) -> None:
        self._counts.write_errors += 1
        self._worker.tell("error", error=repr(error))

    async def _acknowledge(self, attempt: Attempt) -> None:
        counts, ledger = self._counts, self._worker.ledger
        if attempt.commit.secured:
            ledger.acknowledge(attempt.versions, Floor.SECURED, Floor.ANY)
        else:
            ledger.acknowledge(attempt.versions, Floor.ANY)
            counts.unlocked += attempt.commit.unlocked
            counts.unverified += not attempt.commit.unlocked
        counts.commits += 1
        await self._read_own(attempt.versions)
        await self._worker.naive.delete([key for key, _ in attempt.versions])
        ledger.acknowledge(attempt.versions, Floor.NAIVE)

    async def _read_own(self, versions: Sequence[Version]) -> None:
        """This process is never served what it has changed, locked or not."""
        async with self._worker.sessions() as session:
            for key, version in versions[:1]:
                row = await session.get(model_of(key), key)
                if row is None or row.version < version:
                    self._counts.own_stale += 1
                    self._worker.tell("own stale", key=key, read=row and row.version, floor=version)

    # --------------------------------------------------------------------------------------------- the ways of writing

    async def _change(self, session: AsyncCachedSession) -> list[Version]:
        match self._role:
            case Role.UNIT_OF_WORK | Role.ROLLBACK:
                return await self._unit_of_work(session, Item, self._key())
            case Role.BULK_BY_KEY:
                keys = sorted({self._key() for _ in range(3)})
                return await self._bulk(session, Item, Item.id.in_(keys))
            case Role.BULK_BY_TABLE:
                return await self._bulk(session, Item, Item.group == self._random.randrange(GROUPS))
            case Role.CORE:
                return await self._core(session, self._key())
            case Role.ROW_VICTIM:
                return await self._unit_of_work(session, RowVictim, self._random.choice(ROW_VICTIMS))
            case Role.TABLE_VICTIM:
                return await self._bulk(session, TableVictim, TableVictim.group != self._random.randrange(GROUPS))
            case _:
                raise AssertionError(self._role)

    def _key(self) -> int:
        if self._last is None or self._role is Role.BULK_BY_KEY:
            self._last = self._random.choice(ITEMS[:5] if self._random.random() < 0.5 else ITEMS)
        return self._last

    async def _unit_of_work(self, session: AsyncSession, model: type[_RowT], key: int) -> list[Version]:
        row = await session.get_one(model, key, with_for_update=True)
        row.version += 1
        row.check += 1
        await session.flush()
        return [Version(key, row.version)]

    async def _bulk(self, session: AsyncSession, model: type[_RowT], where: Any) -> list[Version]:
        statement = update(model).where(where).values(version=model.version + 1, check=model.check + 1)
        await session.execute(statement, execution_options={"synchronize_session": False})
        # Asked for afterwards: by RETURNING the statement would tell its rows, and lock them instead of generations.
        changed = await session.execute(select(model.id, model.version).where(where))
        return [Version(*row) for row in changed.tuples()]

    async def _core(self, session: AsyncSession, key: int) -> list[Version]:
        item = cast("Table", Item.__table__)
        version = item.c.version + 1
        statement = update(item).where(item.c.id == key).values(version=version, check=key * CHECK + version)
        connection = await session.connection()
        changed = await connection.execute(statement.returning(item.c.id, item.c.version))
        return [Version(*row) for row in changed.tuples()]

    # ------------------------------------------------------------------------------------------- what happens to COMMIT

    async def _commit_late(self, attempt: Attempt, proxy: FaultProxy) -> None:
        """The COMMIT or the answer to it is held for a while; perhaps the writer is cancelled meanwhile."""
        faults = self._worker.mix.faults
        cancels = Fault.CANCEL_COMMITS in faults and not (Fault.DELAY_COMMITS in faults and self._random.random() < 0.5)
        hold = self._random.choice([proxy.hold_request, proxy.hold_reply])
        trap = hold(b"COMMIT")
        task = asyncio.create_task(self._transact(attempt))
        try:
            if not await _springs(trap, task):
                return
            self._counts.commits_held += 1
            await asyncio.sleep(self._random.uniform(0, HOLD_S_MAX))
            if cancels and not task.done():
                self._counts.commits_cancelled += 1
                task.cancel()
                await asyncio.wait([task])
                await asyncio.sleep(self._random.uniform(0, HOLD_S_MAX))
        finally:
            trap.released.set()  # also one that nobody has run into lets all through from here on
            await asyncio.wait([task])
        if task.cancelled():
            self._counts.unknown += 1
            await self._find_out(attempt)

    async def _find_out(self, attempt: Attempt) -> None:
        """Look into the database whether a commit has happened that was not answered. No cache can know that, but it
        may serve nothing older once this is known."""
        key, version = attempt.versions[0]
        model = model_of(key)
        async with self._worker.plain() as session:
            # Waits until the transaction has ended that holds the row.
            found = (await session.scalars(select(model.version).where(model.id == key).with_for_update())).one()
        if found >= version and attempt.commit.secured:
            self._landed(attempt)

    def _landed(self, attempt: Attempt) -> None:
        self._counts.landed += 1
        if self._worker.mix.keeps_locks:
            self._worker.ledger.acknowledge(attempt.versions, Floor.SECURED, Floor.ANY)

    async def _die_in_commit(self, attempt: Attempt) -> None:
        """COMMIT was executed, and this process ends before it hears of it."""
        proxy = self._lane.proxy
        assert proxy is not None
        trap = proxy.hold_reply(b"COMMIT")
        task = asyncio.create_task(self._transact(attempt))
        try:
            if await _springs(trap, task) and attempt.commit.secured:
                self._landed(attempt)
                self._counts.kills += 1
                self._worker.ledger.publish()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            trap.released.set()
            await asyncio.wait([task])


async def _springs(trap: Trap, task: asyncio.Task[None]) -> bool:
    """Wait until a COMMIT is held; False if the transaction ended without one."""
    sprung = asyncio.create_task((trap.seen if trap.hold_request else trap.answered).wait())
    try:
        await asyncio.wait({sprung, task}, return_when=asyncio.FIRST_COMPLETED)
        return not task.done()
    finally:
        sprung.cancel()
