"""One run from beginning to end: servers, processes, faults, the audit, and the judgement."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests.servers import Memcached, Postgres
from tests.torture import worker
from tests.torture.ledger import Counts, Ledger
from tests.torture.mixes import LOSES_SERVER, Fault, Mix
from tests.torture.rows import KEYS, Base, first_rows
from tests.torture.servers import ServerFaults, memcached_for
from tests.torture.worker import LOCK_S_MAX, TTL_S, Job, Role

FLEET: Final = (
    Role.READER,
    Role.READER,
    Role.READER,
    Role.UNIT_OF_WORK,
    Role.BULK_BY_KEY,
    Role.BULK_BY_TABLE,
    Role.CORE,
    Role.ROLLBACK,
)
VICTIMS: Final = (Role.ROW_VICTIM, Role.TABLE_VICTIM)
REBIRTH_S: Final = {Role.ROW_VICTIM: 0.5, Role.TABLE_VICTIM: LOCK_S_MAX + 2}
"""After so long a killed writer has a successor: one of a whole table later, since nothing of that is cached as long as
its locks last."""

WARM_UP_S: Final = 1.2
"""Victims come when there is something in the cache that they could leave stale."""
TICK_S: Final = 0.02
END_S_MAX: Final = 30.0
READS_MIN: Final = 1_000
EXTRA_S_MAX: Final = 30.0
"""A run goes on for so much longer, at most, if it would prove nothing so far, or has seen little but the misses of its
beginning: the machine may be busy."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.torture.readers", "tests.torture.writers", "tests.torture.auditor"])


@dataclass(frozen=True, slots=True)
class Result:
    """
    events: what was told of single reads and errors.
    broken: the promises that were.
    proves_nothing: why, if this run could not have shown a broken one.
    """

    mix: Mix
    seconds: float
    counts: Counts
    injected: dict[str, int]
    evictions: int
    events: list[dict[str, Any]]
    broken: list[str]
    proves_nothing: list[str]

    @property
    def hit_rate(self) -> float:
        return self.counts.hits / max(self.counts.reads, 1)

    @property
    def status(self) -> int:
        """For the shell: 1 a promise was broken, 2 the run proves nothing."""
        return 1 if self.broken else 2 if self.proves_nothing else 0

    def as_json(self) -> dict[str, Any]:
        mix = {**asdict(self.mix), "faults": sorted(self.mix.faults), "name": self.mix.name}
        rates = {"hit_rate": round(self.hit_rate, 4), "reads_per_second": round(self.counts.reads / self.seconds)}
        return {**asdict(self), "mix": mix, **rates, "status": self.status}


@dataclass(frozen=True, slots=True)
class Progress:
    mix: Mix
    seconds: float
    counts: Counts
    injected: Counter[str]
    evictions: int


def run(mix: Mix, postgres: Postgres, watch: Callable[[Progress], None] = lambda _: None) -> Result:
    """
    watch: called now and then.
    """
    with ExitStack() as stack:
        database_url = postgres.create_database()
        stack.callback(postgres.drop_database, database_url)
        asyncio.run(_set_up(database_url))
        memcached = stack.enter_context(memcached_for(mix))
        folder = stack.enter_context(_folder(postgres))
        fleet = Fleet(mix, database_url, memcached, folder)
        stack.callback(fleet.end)
        return fleet.run(watch)


async def _set_up(database_url: str) -> None:
    engine = create_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session:
        session.add_all(first_rows())
        await session.commit()
    await engine.dispose()


@contextmanager
def _folder(postgres: Postgres) -> Generator[Path]:
    """A folder inside of the database's, which goes with it even if this process is killed."""
    folder = postgres.folder / "torture"
    folder.mkdir()
    try:
        yield folder
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


class Fleet:
    """The processes of one run, and what happens to them."""

    def __init__(self, mix: Mix, database_url: str, memcached: Memcached, folder: Path) -> None:
        self._mix = mix
        self._database_url = database_url
        self._memcached = memcached
        self._folder = folder
        self._roles = FLEET + (VICTIMS if Fault.KILL in mix.faults else ())
        self._size = len(self._roles) + 1  # the auditor
        self._ledger = Ledger.create(folder / "ledger", self._size)
        self._faults = ServerFaults(memcached, mix)
        self._running: dict[int, ForkServerProcess] = {}
        self._reborn_at_s: dict[int, float] = {}
        self._attempts: Counter[int] = Counter()
        self._crashed: list[str] = []
        self._began_s = time.monotonic()

    def end(self) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.join()
            process.close()
        self._ledger.close()

    def run(self, watch: Callable[[Progress], None]) -> Result:
        mix = self._mix
        for number, role in enumerate(self._roles):
            if role in VICTIMS:
                self._reborn_at_s[number] = self._began_s + WARM_UP_S
            else:
                self._start(number, role)
        while (counts := self._ledger.total()).reads == 0 and self._elapsed_s < END_S_MAX:
            time.sleep(TICK_S)
        self._faults = ServerFaults(self._memcached, mix)
        self._began_s = time.monotonic()
        while not (self._crashed or self._is_over(counts)):
            self._faults.go_on()
            self._look_after_processes()
            counts = self._ledger.total()
            watch(self._progress(counts))
            if mix.until_stale and counts.stale:
                break
            time.sleep(TICK_S)
        seconds = self._elapsed_s
        self._ledger.stop()
        self._faults.heal()
        self._join(END_S_MAX)
        if not (mix.until_stale and counts.stale):
            self._audit()
        counts = self._ledger.total()
        events = self._events()
        return Result(
            mix,
            round(seconds, 2),
            counts,
            dict(self._progress(counts).injected),
            self._faults.evictions,
            events,
            self._broken(counts, events),
            self._proves_nothing(counts),
        )

    def _is_over(self, counts: Counts) -> bool:
        if self._elapsed_s < self._mix.seconds:
            return False
        if self._elapsed_s > self._mix.seconds + EXTRA_S_MAX:
            return True
        return counts.hits >= self._mix.hits_min * counts.reads and not self._proves_nothing(counts)

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    # ------------------------------------------------------------------------------------------------------- processes

    def _start(self, number: int, role: Role) -> None:
        memcached = self._memcached.host, self._memcached.port
        job = Job(
            role,
            number,
            self._size,
            self._attempts[number],
            self._mix,
            self._database_url,
            memcached,
            self._folder,
        )
        self._attempts[number] += 1
        process = self._running[number] = _processes.Process(target=worker.main, args=(job,), name=role, daemon=True)
        process.start()

    def _look_after_processes(self) -> None:
        for number, process in list(self._running.items()):
            if not process.is_alive():
                self._bury(number, process)
        for number, due_s in list(self._reborn_at_s.items()):
            if due_s <= time.monotonic():
                del self._reborn_at_s[number]
                self._start(number, self._roles[number])

    def _bury(self, number: int, process: ForkServerProcess) -> None:
        del self._running[number]
        role = self._roles[number] if number < len(self._roles) else Role.AUDITOR
        if role in VICTIMS and process.exitcode == -signal.SIGKILL:
            self._reborn_at_s[number] = time.monotonic() + REBIRTH_S[role]
        elif process.exitcode != 0 or not self._ledger.stopped:
            self._crashed.append(f"process {number} ({role}) ended with status {process.exitcode}")
        process.close()

    def _join(self, seconds_max: float) -> None:
        until_s = time.monotonic() + seconds_max
        for number, process in list(self._running.items()):
            process.join(max(0.0, until_s - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
                self._crashed.append(f"process {number} did not end in {seconds_max} s")
            self._bury(number, process)

    def _audit(self) -> None:
        self._start(self._size - 1, Role.AUDITOR)
        self._join(END_S_MAX)

    # --------------------------------------------------------------------------------------------------- what was found

    def _progress(self, counts: Counts) -> Progress:
        injected: Counter[str] = Counter({str(fault): count for fault, count in self._faults.injected.items()})
        injected += Counter(
            {
                Fault.CANCEL_READS: counts.reads_cancelled,
                Fault.CANCEL_COMMITS: counts.commits_cancelled,
                Fault.DELAY_COMMITS: counts.commits_held,
                Fault.KILL: counts.kills,
                Fault.CUT: counts.cuts,
                Fault.LAG: counts.lags,
                Fault.PARTITION: counts.partitions,
            }
        )
        return Progress(self._mix, self._elapsed_s, counts, injected, self._faults.evictions)

    def _events(self) -> list[dict[str, Any]]:
        files = sorted(self._folder.glob("events-*"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def _broken(self, counts: Counts, events: Sequence[dict[str, Any]]) -> list[str]:
        mix = self._mix
        whole = not (mix.until_stale and counts.stale)
        checks = {
            f"{counts.stale} reads were older than a commit acknowledged before them": counts.stale,
            f"{counts.own_stale} processes read an older row than they had committed": counts.own_stale,
            f"{counts.mixed_up} rows were mixed up": counts.mixed_up,
            f"{counts.forever_stale} rows were stale at the end": counts.forever_stale,
            f"{counts.killed_forever_stale} rows of killed writers were stale at the end": (
                mix.keeps_locks and counts.killed_forever_stale
            ),
            f"{counts.unlocked} commits went on without a lock": mix.on_lock_failure == "raise" and counts.unlocked,
            f"{counts.unsecured_stale} stale reads of commits whose locks had not been looked at": (
                mix.on_lock_failure == "raise" and counts.unsecured_stale
            ),
            f"{counts.unsecured_stale} stale reads, although memcached was there": (
                mix.on_lock_failure == "commit" and not mix.faults & LOSES_SERVER and counts.unsecured_stale
            ),
            f"a row that could not be locked was served after {counts.worst_unsecured_lag_us / 1e6:.1f} s": (
                counts.worst_unsecured_lag_us > 1e6 * (TTL_S + 1)
            ),
            f"{counts.read_errors} reads and {counts.write_errors} writes failed": (
                counts.read_errors or counts.write_errors
            ),
            f"{counts.lost_errors} errors that nobody was told": counts.lost_errors,
            f"hits are {counts.hits / max(counts.reads, 1):.0%} of the reads, below {mix.hits_min:.0%}": (
                whole and counts.hits < mix.hits_min * counts.reads
            ),
            f"{counts.audited} rows of {KEYS} were audited": whole and counts.audited != KEYS,
        }
        crashes = [f"{each}: {_last_error(events)}" for each in self._crashed]
        return [what for what, is_broken in checks.items() if is_broken] + crashes

    def _proves_nothing(self, counts: Counts) -> list[str]:
        missing = [fault for fault in self._mix.faults if not self._progress(counts).injected[fault]]
        found = [f"{fault} never happened" for fault in sorted(missing)]
        if counts.reads < READS_MIN:
            found.append(f"only {counts.reads} reads")
        if not counts.naive_stale:
            found.append(f"the naive cache was not stale in {counts.naive_reads} reads")
        if Fault.EVICT in self._mix.faults and not self._faults.evictions:
            found.append("memcached evicted nothing")
        return found


def _last_error(events: Sequence[dict[str, Any]]) -> str:
    errors = [str(event["error"]) for event in events if event["kind"] == "error"]
    return errors[-1].strip() if errors else "it left no word"
