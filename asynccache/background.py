"""Work that outlives the request that caused it: every task is held here, awaited or cancelled here."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from typing import Any

from asynccache.settings import Settings

logger = logging.getLogger("asynccache")


class Background:
    """The tasks of one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closing = asyncio.Event()
        """Set by `aclose`: who waits for a time to come need not wait any longer."""

    def spawn(self, work: Coroutine[Any, Any, object], name: str) -> None:
        """Do this, whoever asked for it goes away. Its errors are logged."""
        _ = self.start(work, name)

    def start(self, work: Coroutine[Any, Any, object], name: str) -> asyncio.Task[object]:
        """The same, for who has to know whether it is done."""
        task = asyncio.get_running_loop().create_task(work, name=f"asynccache: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)

    async def finish(self, work: Coroutine[Any, Any, object], name: str) -> None:
        """Do this here and now, since it waits for nothing, and a task would take longer. Its errors are logged."""
        try:
            await work
        except Exception:
            logger.exception("asynccache: %s failed", name)

    async def drain(self) -> None:
        """Wait until there is no work left, work that this work causes included."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def aclose(self) -> None:
        self.closing.set()
        await self.drain()


class Retries:
    """The waits between tries: doubling, with jitter."""

    def __init__(self, settings: Settings) -> None:
        self._next_s = settings.retry_min_s
        self._max_s = settings.retry_max_s

    async def wait(self, hurry: asyncio.Event | None = None, *, at_least_s: float = 0.0) -> None:
        """Wait until it is time to try again, `at_least_s` seconds, or until `hurry` is set."""
        delay_s = max(self._next_s * random.uniform(0.5, 1.5), at_least_s)
        self._next_s = min(self._next_s * 2, self._max_s)
        if hurry is None:
            await asyncio.sleep(delay_s)
            return
        try:
            async with asyncio.timeout(delay_s):
                await hurry.wait()
        except TimeoutError:
            pass
