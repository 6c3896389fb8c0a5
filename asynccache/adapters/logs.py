"""Lines in a log, by the standard library: one for a change of state, none for what happens all the time.

    cache.observe(LogObserver())

The library itself logs what an operator has to know, whether or not anybody observes: a server that goes away or is
back, slots that were given up, its own mistakes. None of that is said twice. This adds what somebody wants to know who
asks why rows are not served:

    rows of a model are read past the cache          once for each model and reason
    values of a model cannot be decoded              once for each model
    a server refuses to store rows of a model        once for each model
    locks were lost                                  once for each model
    slots are to be repaired; all are repaired       each time, but not more often than every `quiet_s` seconds
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from asynccache.events import Bypassed, Event, FillDropped, Garbage, LockLost, Model, RepairsChanged

logger: Final = logging.getLogger("asynccache")


class LogObserver:
    """An observer that logs changes of state.

    log: where to.
    quiet_s: when repairs have begun less than so many seconds ago, neither a new beginning nor its end is logged: a
        server that comes and goes writes two lines a minute and no more.
    clock: seconds that only go forward.
    """

    def __init__(
        self,
        log: logging.Logger = logger,
        *,
        quiet_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._quiet_s = quiet_s
        self._clock = clock
        self._said: set[tuple[type[Event], Model, str]] = set()
        self._repairs_said_s = float("-inf")
        self._repairing = False

    def __call__(self, event: Event, /) -> None:
        match event:
            case Bypassed(model, _, reason):
                self._once(event, model, reason, logging.INFO, "rows of %s are read past the cache: %s")
            case Garbage(model):
                why = "damaged, or stored by a version with other columns"
                self._once(event, model, why, logging.INFO, "values of %s cannot be decoded, and are loaded anew: %s")
            case FillDropped(model, _, "refused"):
                why = "it is too large, or there is no memory"
                self._once(event, model, why, logging.WARNING, "the cache server refused to store a row of %s: %s")
            case LockLost(model):
                why = "evicted, or the server was restarted; `python -m asynccache check` tells what to do"
                self._once(
                    event, model, why, logging.WARNING, "locks of %s were lost before their COMMIT was answered: %s"
                )
            case RepairsChanged(owed):
                self._repairs(owed)
            case _:
                pass

    def _once(self, event: Event, model: Model, what: str, level: int, message: str) -> None:
        if (said := (type(event), model, what)) not in self._said:
            self._said.add(said)
            self._log.log(level, message, model.__qualname__, what)

    def _repairs(self, owed: int) -> None:
        if owed and self._clock() - self._repairs_said_s >= self._quiet_s:
            self._repairs_said_s = self._clock()
            self._repairing = True
            self._log.warning("%d slots could not be locked or released; they are repaired in the background", owed)
        elif not owed and self._repairing:
            self._repairing = False
            self._log.warning("all slots are repaired, after %.1f s", self._clock() - self._repairs_said_s)
