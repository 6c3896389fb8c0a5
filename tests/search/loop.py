"""An event loop that does nothing by itself: what is ready runs to its end, and then it stands still."""

from __future__ import annotations

import asyncio
from asyncio import events
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import Context
from typing import Any


class StillLoop:
    """Runs tasks between two things that come from outside: answers, timers, cancellations. Its clock stands at 0."""

    def __init__(self) -> None:
        self.timers: list[asyncio.TimerHandle] = []
        """Those that were set and neither fired nor cancelled, oldest first; each is due after as long as it says."""
        self.late_s: Counter[asyncio.Task[Any]] = Counter()
        self._all_tasks: list[asyncio.Task[Any]] = []
        self._ready: deque[asyncio.Handle] = deque()

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those that are not done, oldest first."""
        self._all_tasks = [task for task in self._all_tasks if not task.done()]
        return self._all_tasks

    @contextmanager
    def running(self) -> Generator[None]:
        """Within this, callbacks may be called and tasks be made; at its end all that became ready is run."""
        events._set_running_loop(untyped(self))
        try:
            yield
            while self._ready:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
            for task in [task for task in self.late_s if task.done()]:
                del self.late_s[task]
        finally:
            events._set_running_loop(None)

    def fire(self, timer: asyncio.TimerHandle, *, late_s: float) -> None:
        """late_s: how much too late it is, for the task that is woken by it."""
        self.timers.remove(timer)
        woken = [task for task in self.tasks if late_s and untyped(task)._fut_waiter in timer._args]
        self.late_s.update(dict.fromkeys(woken, late_s))
        timer._run()

    def lateness_s(self) -> float:
        """How late it is for the task that is running. The clock of each is its own: no two of them compare times."""
        task = asyncio.current_task(untyped(self))
        return self.late_s[task] if task is not None else 0.0

    def abandon(self) -> None:
        """Throw away what is under way, without running anything but `finally` clauses."""
        events._set_running_loop(untyped(self))
        try:
            while tasks := self.tasks:
                self._all_tasks = []
                for task in tasks:
                    untyped(task)._log_destroy_pending = False
                    coroutine = task.get_coro()
                    assert coroutine is not None
                    coroutine.close()
        finally:
            events._set_running_loop(None)
            self._ready.clear()

    # ------------------------------------------------------------------------------------- what asyncio asks of a loop

    def time(self) -> float:
        return 0.0

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, untyped(self), context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, untyped(self), context)
        self.timers.append(handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        if handle in self.timers:
            self.timers.remove(handle)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=untyped(self))

    def create_task(self, coro: Coroutine[Any, Any, Any], **kwargs: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=untyped(self), **kwargs)
        self._all_tasks.append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise AssertionError(f"unhandled in a callback: {context}")


def untyped(instance: Any) -> Any:
    """For what type checkers do not know: private attributes, and that an event loop need not be one by inheritance."""
    return instance
