"""One process of the fleet: its cache, its ways to the servers, and its end."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import random
import signal
import traceback
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from asynccache import AsyncCachedSession, Cache, MemcachedBackend
from asynccache.locking import WritePath
from asynccache.protocol import Slot
from asynccache.repair import Claim, Repairs
from tests.servers import FaultProxy
from tests.torture.ledger import Counts, Ledger
from tests.torture.mixes import LOSES_SERVER, Fault, Mix
from tests.torture.mutations import MUTATIONS
from tests.torture.naive import NaiveCache
from tests.torture.rows import Base

TTL_S: Final = 8.0
LOCK_TTL_S: Final = 2.0
LOCK_TIMEOUT_S: Final = 0.5
LOCK_S_MAX: Final = 2 * LOCK_TTL_S + 2
"""How long a lock is in memcached at most, whose seconds are whole: two more than its deadline."""
DRAIN_S_MAX: Final = 15.0
LOAD_S_MAX: Final = 0.06
"""A SELECT takes up to this, at random, with its row long read."""


class Role(StrEnum):
    READER = "reader"
    UNIT_OF_WORK = "unit of work"
    BULK_BY_KEY = "bulk by key"
    BULK_BY_TABLE = "bulk by table"
    CORE = "core"
    ROLLBACK = "rollback"
    ROW_VICTIM = "killed by row"
    TABLE_VICTIM = "killed by table"
    AUDITOR = "auditor"


PARTITIONED: Final = frozenset({0, 3})
"""The numbers of the processes that lose memcached: one that reads, one that writes."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a process is told when it starts. number: its place in the ledger."""

    role: Role
    number: int
    processes: int
    attempt: int
    mix: Mix
    database_url: str
    memcached: tuple[str, int]
    folder: Path


@dataclass(slots=True)
class Commit:
    """What became of the locks of one commit.

    unlocked: not all could be placed.
    doubted: or not be looked at after COMMIT.
    """

    unlocked: bool = False
    doubted: bool = False

    @property
    def secured(self) -> bool:
        return not (self.unlocked or self.doubted)


commit_of: ContextVar[Commit] = ContextVar("commit_of")
"""That of the transaction under way, in its task and in those that the library makes for it."""


def _watch_locks() -> None:
    """Note what the library finds out about the locks of each commit."""
    owe, release_later = Repairs.owe, WritePath.release_later

    def noting_owe(self: Repairs, claims: Iterator[Claim], *, delay_s: float = 0.0, doubtful: bool) -> None:
        claims_ = list(claims)
        commit = commit_of.get(None)
        if doubtful and claims_ and commit is not None:
            commit.doubted = True
        owe(self, claims_, delay_s=delay_s, doubtful=doubtful)

    def noting_release_later(self: WritePath, slots: Iterator[Slot], owner: bytes, *, placed: bool) -> None:
        commit = commit_of.get(None)
        if not placed and commit is not None:
            commit.unlocked = True
        release_later(self, slots, owner, placed=placed)

    Repairs.owe = noting_owe  # type: ignore[method-assign, assignment]
    WritePath.release_later = noting_release_later  # type: ignore[method-assign, assignment]


@dataclass(slots=True)
class Worker:
    """What readers, writers and the auditor use.

    engine, sessions: PostgreSQL, directly.
    """

    job: Job
    ledger: Ledger
    cache: Cache
    engine: AsyncEngine
    sessions: async_sessionmaker[AsyncCachedSession]
    plain: async_sessionmaker[AsyncSession]
    naive: NaiveCache
    random: random.Random
    memcached: FaultProxy | None

    @property
    def counts(self) -> Counts:
        return self.ledger.counts

    @property
    def mix(self) -> Mix:
        return self.job.mix

    def tell(self, kind: str, **what: object) -> None:
        """Something to read about afterwards."""
        with (self.job.folder / f"events-{self.job.number}").open("a") as file:
            file.write(
                json.dumps({"kind": kind, "by": self.job.role, "at_s": self.ledger.now_us() / 1e6, **what}) + "\n"
            )

    def lost_error(self, context: dict[str, Any]) -> None:
        """What nobody was told: a task or a future that nobody holds has failed."""
        error = context.get("exception")
        if isinstance(error, ConnectionError):
            return  # asyncpg lets a future of a connection go that was cut off
        self.counts.lost_errors += 1
        self.tell("error", error=f"{context['message']}: {error!r}")

    async def publish_now_and_then(self) -> None:
        while True:
            self._count()
            await asyncio.sleep(0.1)

    def _count(self) -> None:
        if self.job.role is Role.READER:
            self.counts.hits = self.cache.stats.hits
            self.counts.naive_hits = self.naive.hits
        self.counts.locks_lost = self.cache.stats.locks_lost
        self.ledger.publish()

    async def fail_now_and_then(self) -> None:
        """The faults of this process's own way to memcached."""
        proxy, faults = self.memcached, self.mix.faults
        if proxy is None:
            return
        cuts = Fault.CUT in faults
        lags = Fault.LAG in faults and self.job.role is Role.READER
        parted = Fault.PARTITION in faults and self.job.number in PARTITIONED
        try:
            while True:
                await asyncio.sleep(self.random.uniform(0.02, 0.3) * self.mix.rarity)
                if cuts and self.random.random() < 0.5:
                    self._cut(proxy)
                if lags:
                    self.counts.lags += 1
                    proxy.delay_s = self.random.choice([0.0, 0.005, 0.03, 0.08])
                if parted and self.random.random() < 0.25:
                    await self._part(proxy)
        finally:
            proxy.delay_s = 0.0

    def _cut(self, proxy: FaultProxy) -> None:
        self.counts.cuts += 1
        rst = self.random.random() < 0.5
        if self.random.random() < 0.5:
            proxy.cut(rst=rst)
        else:
            proxy.cut_after(self.random.randrange(1, 2000), rst=rst)

    async def _part(self, proxy: FaultProxy) -> None:
        self.counts.partitions += 1
        duration_s = self.random.uniform(0.2, 1.5)
        if self.random.random() < 0.5:
            proxy.refuse()
            proxy.cut()
            try:
                await asyncio.sleep(duration_s)
            finally:
                await proxy.accept()
        else:  # nothing arrives, until all of it does
            proxy.forward_requests.clear()
            try:
                await asyncio.sleep(duration_s)
            finally:
                proxy.forward_requests.set()

    async def run(self, *work: Coroutine[Any, Any, None]) -> None:
        """Do this until the run is over; then let the cache finish what it has to."""
        others = [asyncio.create_task(each) for each in (self.publish_now_and_then(), self.fail_now_and_then())]
        try:
            async with asyncio.TaskGroup() as group:
                for each in work:
                    group.create_task(each)
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        try:
            async with asyncio.timeout(DRAIN_S_MAX):
                await self.cache.drain()
            self.counts.drained = 1
        except TimeoutError:
            self.tell("error", error=f"the cache had work left after {DRAIN_S_MAX} s: {self.cache.stats}")
        self._count()


def slow_down(engine: AsyncEngine, seconds_max: float) -> None:
    """Make SELECTs take a while after they have read their row, as a busy database does."""

    def add_sleep(
        _connection: object, _cursor: object, sql: str, parameters: object, _context: object, _many: bool
    ) -> tuple[str, object]:
        if sql.startswith("SELECT") and "WHERE" in sql:
            sql += f" AND pg_sleep(random() * {seconds_max}) IS NOT NULL"
        return sql, parameters

    event.listen(engine.sync_engine, "before_cursor_execute", add_sleep, retval=True)


@asynccontextmanager
async def worker_of(job: Job) -> AsyncGenerator[Worker]:
    mix = job.mix
    ledger = Ledger(job.folder / "ledger", job.processes, job.number)
    auditor = job.role is Role.AUDITOR
    needs_proxy = not auditor and mix.faults & {Fault.CUT, Fault.LAG, Fault.PARTITION}
    proxy = FaultProxy(job.memcached) if needs_proxy else None
    if proxy is not None:
        await proxy.__aenter__()
    host, port = (proxy.host, proxy.port) if proxy is not None else job.memcached
    timeout_s = 0.25 if mix.faults & LOSES_SERVER and not auditor else 2.0
    url = f"memcached://{host}:{port}?timeout={timeout_s}"
    cache = Cache(url, ttl=TTL_S, lock_ttl=LOCK_TTL_S, lock_timeout=LOCK_TIMEOUT_S, on_lock_failure=mix.on_lock_failure)
    cache.register(Base)
    engine = create_async_engine(job.database_url, pool_size=24, max_overflow=0)
    if job.role is Role.READER:
        slow_down(engine, LOAD_S_MAX)
    naive_backend = MemcachedBackend.from_url(url)
    plain = async_sessionmaker(engine)
    try:
        yield Worker(
            job,
            ledger,
            cache,
            engine,
            async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache),
            plain,
            NaiveCache(naive_backend, plain, TTL_S),
            random.Random(f"{mix.seed} {job.number} {job.attempt}"),
            proxy,
        )
    finally:
        await cache.aclose()
        await naive_backend.aclose()
        await engine.dispose()
        if proxy is not None:
            await proxy.__aexit__(None, None, None)
        ledger.publish()


def database_url_behind(job: Job, proxy: FaultProxy) -> str:
    return make_url(job.database_url).set(port=proxy.port).render_as_string(hide_password=False)


def main(job: Job) -> None:
    """What the process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    logging.disable(logging.WARNING)
    if job.mix.mutation:
        MUTATIONS[job.mix.mutation]()
    _watch_locks()
    try:
        asyncio.run(_live(job))
    except BaseException:
        with (job.folder / f"events-{job.number}").open("a") as file:
            file.write(json.dumps({"kind": "error", "by": job.role, "error": traceback.format_exc()}) + "\n")
        raise


async def _live(job: Job) -> None:
    # Imported here, since they import this.
    from tests.torture import auditor, readers, writers  # noqa: PLC0415

    parent = multiprocessing.parent_process()
    assert parent is not None
    loop = asyncio.get_running_loop()
    loop.add_reader(parent.sentinel, os._exit, 1)
    async with worker_of(job) as worker:
        loop.set_exception_handler(lambda _, context: worker.lost_error(context))
        if job.role is Role.READER:
            await readers.read(worker)
        elif job.role is Role.AUDITOR:
            await auditor.audit(worker)
        else:
            await writers.write(worker)
