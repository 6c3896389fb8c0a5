"""An event loop whose time is a number, and whose ready callbacks run in the order that a history chooses."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Iterator
from typing import Any


class StuckError(AssertionError):
    """Raised out of the loop when nothing can happen any more, or too much happens."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs one callback at a time. There is no I/O and there are no threads.

    choices: which of the ready callbacks runs next, each modulo their number; 0, also when there are no more, is the
        first in line, as on any other event loop.
    steps_max, time_max_s: beyond so many callbacks, or so late, it raises `StuckError`.
    """

    def __init__(self, choices: bytes, *, steps_max: int = 50_000, time_max_s: float = 600.0) -> None:
        super().__init__()
        self.now_s = 0.0
        self._choices: Iterator[int] = iter(choices)
        self._steps_max = steps_max
        self._time_max_s = time_max_s
        self._steps = 0
        self._cancellations: dict[asyncio.Task[Any], int] = {}
        self._ready: deque[asyncio.Handle]  # asyncio's own, as `_scheduled` is
        self._scheduled: list[asyncio.TimerHandle]

    def time(self) -> float:
        return self.now_s

    def cancel_at(self, task: asyncio.Task[Any], moment: int) -> None:
        """Cancel a task at one of its steps: with 2n just before the nth, with 2n + 1 just after it.

        Before: what it waits for is there already. After: it has just begun to wait for something else.
        """
        self._cancellations[task] = moment

    def _run_once(self) -> None:
        self._enqueue_due()
        if not self._ready:
            if self._stopping:  # type: ignore[attr-defined]
                return
            self._jump()
        handle = self._take_one()
        if handle.cancelled():
            return
        self._steps += 1
        if self._steps > self._steps_max:
            raise StuckError(f"{self._steps} steps, and no end")
        task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
        if isinstance(task, asyncio.Task) and task in self._cancellations:
            self._run_and_cancel(handle, task)
        else:
            handle._run()

    def _run_and_cancel(self, step: asyncio.Handle, task: asyncio.Task[Any]) -> None:
        moment = self._cancellations.pop(task)
        if moment == 0:
            task.cancel()
        step._run()
        if moment == 1:
            task.cancel()
        elif moment > 1:
            self._cancellations[task] = moment - 2

    def _take_one(self) -> asyncio.Handle:
        if len(self._ready) > 1 and (choice := next(self._choices, 0) % len(self._ready)):
            handle = self._ready[choice]
            del self._ready[choice]
            return handle
        return self._ready.popleft()

    def _enqueue_due(self) -> None:
        while self._scheduled and (self._scheduled[0].cancelled() or self._scheduled[0].when() <= self.now_s):
            timer = heapq.heappop(self._scheduled)
            timer._scheduled = False  # type: ignore[attr-defined]
            if not timer.cancelled():
                self._ready.append(timer)

    def _jump(self) -> None:
        if not self._scheduled:
            raise StuckError("nothing is ready, and nobody waits for a time to come")
        self.now_s = self._scheduled[0].when()
        if self.now_s > self._time_max_s:
            raise StuckError(f"it is {self.now_s:.0f} s, and no end")
        self._enqueue_due()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass  # asyncio's own count of them, for a clean-up that `_enqueue_due` does anyway

    def _process_events(self, event_list: object) -> None:
        raise NotImplementedError("there is no I/O here")

    def _write_to_self(self) -> None:
        raise NotImplementedError("there are no threads here")
