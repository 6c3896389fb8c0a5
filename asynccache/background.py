"""Work that outlives the request that caused it: every task is held here, awaited or cancelled here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger("asynccache")


class Background:
    """The tasks of one event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closing = asyncio.Event()
        """Set by `aclose`: who waits for a time to come need not wait any longer."""

    def spawn(self, work: Coroutine[Any, Any, object], name: str) -> None:
        """Do this, whoever asked for it goes away."""
        _ = self._start(work, name)

    async def see_through(self, work: Coroutine[Any, Any, object], name: str) -> None:
        """Do this and wait for it; if the wait is cancelled, it goes on. Its errors are logged, not raised."""
        await asyncio.wait([self._start(work, name)])  # which cancels nothing when it is cancelled

    def _start(self, work: Coroutine[Any, Any, object], name: str) -> asyncio.Task[object]:
        task = asyncio.get_running_loop().create_task(work, name=f"asynccache: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)

    async def drain(self) -> None:
        """Wait until there is no work left, work that this work causes included."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def aclose(self) -> None:
        self.closing.set()
        await self.drain()
