"""For code without an event loop: a cache's steps, taken on the loop that the cache serves, or on a short one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakSet

from sqlalchemy.util import greenlet_spawn

from asynccache.cache import Cache

_one_at_a_time = threading.Lock()
"""A cache serves one event loop at a time, so that threads without one take turns."""

_short_loops: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
"""Those that were run here for one step. They end with it, and with all that another thread has handed to them."""


class LoopIsBlockedError(Exception):
    """The event loop that would have to take the step waits for this very thread."""


def run_in_loop(cache: Cache, step: Callable[[], None]) -> None:
    """Take a step that may await, and wait for it.

    Raises what the step raises; LoopIsBlockedError in the thread of the event loop that the cache serves.
    """
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    serving = cache.loop or here
    if serving is None or serving in _short_loops:
        with _one_at_a_time:
            serving = cache.loop or here  # there is no short one now, but another may have come
            if serving is None:
                asyncio.run(_alone(cache, step))
                return
    if serving is here:
        raise LoopIsBlockedError
    asyncio.run_coroutine_threadsafe(greenlet_spawn(step), serving).result()


async def _alone(cache: Cache, step: Callable[[], None]) -> None:
    _short_loops.add(asyncio.get_running_loop())
    await greenlet_spawn(step)
    # What goes on in the background ends with this loop; what is not done by then is left to locks that expire.
    with suppress(TimeoutError):
        async with asyncio.timeout(cache.settings.lock_timeout_s):
            await cache.drain()
