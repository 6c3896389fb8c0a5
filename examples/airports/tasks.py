"""Work as plain functions, as Celery calls them, in forked processes: `python -m airports.tasks BIKF BIRK`."""

import asyncio
import multiprocessing
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from airports.database import Sessions, open_sessions
from airports.worker import rate_airport

runner = asyncio.Runner()  # one event loop, for the life of a process: made by the first `run`
resources = AsyncExitStack()
sessions: Sessions


def start() -> None:
    """When a process begins: Celery's `worker_process_init`."""
    global sessions
    sessions = runner.run(resources.enter_async_context(open_sessions()))


def rate(icao: str) -> None:
    """A task."""
    runner.run(rate_and_drain(icao))


async def rate_and_drain(icao: str) -> None:
    async with sessions.begin() as session:
        await rate_airport(session, icao)
    await sessions.kw["cache"].drain()  # between tasks the event loop stands still, and unlocks nothing


def stop() -> None:
    """When a process ends: Celery's `worker_process_shutdown`."""
    runner.run(resources.aclose())
    runner.close()


def work(icaos: Sequence[str]) -> None:
    start()
    for icao in icaos:
        rate(icao)
    stop()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(sys.argv[first::2],)) for first in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
