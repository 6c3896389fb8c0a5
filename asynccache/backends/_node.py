"""One memcached server: reads through its channel, changes through its client, a circuit breaker before both.

closed      asked as ever; every answer sets the count of failures back
open        after `FAILURES_MAX` failures in a row: nothing is sent, nobody waits, whoever asks is told so at once
half-open   a probe is on its way, in the background: it tries what reads need and what writes need
closed      once both were answered; else open again, for twice as long
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Sequence, Set
from typing import Final

from aiomcache.exceptions import ClientException

from asynccache.backends._aiomcache import (
    ABSENT,
    TROUBLE,
    Client,
    Connection,
    Outcome,
    Swap,
    join_keys,
)
from asynccache.backends._endpoint import CasDisabledError, RefusedError, SteppedTimeout, is_permanent
from asynccache.backends._read_channel import ReadChannel
from asynccache.backends.base import UNCONFIRMED, UNREADABLE, UNSENT, Applied, Change, NodeChanged, NodeState, Write
from asynccache.backends.report import NodeReport, report_cas_disabled, report_failure, report_on

FAILURES_MAX: Final = 3
"""So many failures in a row, of reads or of writes, open the breaker. What fails together is one."""

PROBE_MIN_S: Final = 0.1
PROBE_MAX_S: Final = 2.0
"""Between these, doubling with jitter, a server that was found away is probed."""

ROUNDS_MAX: Final = 16
"""How often `apply` reads a slot again because somebody else was faster. In every round somebody wins."""

_PROBE: Final = b"asynccache:probe"  # a key that nobody writes
_RELATIVE_S_MAX: Final = 30 * 24 * 3600  # memcached reads more than that as a date
_DATE_MAX: Final = 2**31 - 1  # it refuses a later one, and would execute the value as commands

_CLOSED: Final = (
    NodeState.CLOSED
)  # each read compares with it, and to look it up in its Enum takes CPython 3.11 a while
_log = logging.getLogger("asynccache")


class Node:
    """One server. Its trouble ends here, as `UNREADABLE`, `UNCONFIRMED` or `UNSENT`.

    timeout_s: seconds that a call takes at most.
    tell: called with every change of `state`.
    """

    def __init__(
        self, client: Client, channel: ReadChannel, *, timeout_s: float, tell: Callable[[NodeChanged], None]
    ) -> None:
        self.client = client
        self.channel = channel
        self.state = NodeState.CLOSED
        self._timeout_s = timeout_s
        self._tell = tell
        self._probing: asyncio.Task[None] | None = None
        self._writes_failed = 0
        self._write_failed_s = -math.inf
        self._ended = False
        channel.on_failure = self._read_failed

    def __repr__(self) -> str:
        return f"<Node {self.name}, {self.state.value}>"

    @property
    def name(self) -> str:
        return str(self.client.endpoint.address)

    @property
    def is_closed(self) -> bool:
        """Whether the server is asked."""
        if self.state is _CLOSED:
            return True
        if self._probing is not None and self._probing.done():  # cancelled, by somebody who ended all tasks and goes on
            self._begin_probing()
        return False

    def start_over(self) -> None:
        """Begin on another event loop. What was known of the server is forgotten, for it has been a while."""
        self.client.start_over()
        self.channel.start_over()
        self.state = NodeState.CLOSED
        self._probing = None
        self._writes_failed = 0

    async def close(self) -> None:
        self._ended = True  # what is under way fails with it, and nobody is left to end another probe
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        await asyncio.gather(self.client.close(), self.channel.close())

    async def apply(self, changes: Sequence[Change]) -> list[Applied]:
        if not self.is_closed:
            return [UNSENT] * len(changes)
        join_keys([change.key.name for change in changes])
        settled: dict[int, Applied] = {}
        began_s = time.monotonic()
        try:
            async with SteppedTimeout(self._timeout_s):
                conn = await self.client.acquire()
                try:
                    await self._settle(conn, changes, settled)
                finally:
                    self.client.release(conn)
        except TROUBLE as error:
            # What was under way at the last failure failed with it: a server that restarts cuts off all at once, and
            # those who wait behind a call that hangs have nothing against the server themselves.
            if began_s > self._write_failed_s:
                self._write_failed_s = time.monotonic()
                self._writes_failed += 1
                self._failed(self._writes_failed, error)
        else:
            self._writes_failed = 0
        return [settled.get(i, UNCONFIRMED) for i in range(len(changes))]

    async def check(self, lock_ttl_s: float) -> NodeReport:
        """Ask the server how it is, whatever the breaker says."""
        node = self.name
        try:
            async with self.client.connection(self._timeout_s) as conn:
                began_s = time.perf_counter()
                settings = await self.client.server_stats(conn, b"settings")
                between_s = time.perf_counter()
                stats = await self.client.server_stats(conn)
                round_trip_s = min(between_s - began_s, time.perf_counter() - between_s)
        except TimeoutError:
            return report_failure(node, "no answer in time", reachable=False)
        except CasDisabledError:
            return report_cas_disabled(node)
        except EOFError:
            return report_failure(node, "it closed the connection", reachable=False)
        except TROUBLE as error:
            return report_failure(node, str(error), reachable=isinstance(error, (ClientException, RefusedError)))
        return report_on(node, stats, settings, round_trip_s=round_trip_s, lock_ttl_s=lock_ttl_s)

    async def _settle(self, conn: Connection, changes: Sequence[Change], settled: dict[int, Applied]) -> None:
        """Fill `settled` as answers come in, so that whatever interrupts leaves in it what is known.

        A round reads the slots in one command, then sends all that the transitions want in one write. It takes the
        first open change of each slot. Those that lost a race, and those behind them, are left to the next round.
        """
        waiting: Sequence[int] = range(len(changes))
        for attempt in range(ROUNDS_MAX):
            turn: dict[bytes, int] = {}
            for i in waiting:
                turn.setdefault(changes[i].key.name, i)
            unread: Set[bytes] = frozenset()
            if attempt == 0:
                unread = {name for name, i in turn.items() if changes[i].absent and changes[i].transition(None)}
            found = await self.client.gets_many(conn, [name for name in turn if name not in unread])
            now_s = time.time()
            swaps: dict[int, Swap] = {}
            for name, i in turn.items():
                slot = found.get(name, ABSENT)
                write = changes[i].transition(slot.value)
                if write is None:
                    settled[i] = Applied(slot.value, slot.value)
                else:
                    swaps[i] = Swap(name, write.value, exptime_of(write, now_s), slot)
            self.client.send_swaps(conn, list(swaps.values()))
            outcomes: list[Outcome] = []
            try:
                await self.client.read_outcomes(conn, outcomes)
            finally:
                for (i, swap), outcome in zip(swaps.items(), outcomes, strict=False):  # some may not be known
                    if outcome is Outcome.STORED:
                        settled[i] = Applied(swap.found.value, swap.value)
                    elif outcome is Outcome.REFUSED and swap.key not in unread:  # else it is not known what is there
                        settled[i] = Applied(swap.found.value, swap.found.value)
            waiting = [i for i in waiting if i not in settled]
            if not waiting:
                return

    def _read_failed(self, error: Exception) -> None:
        self._failed(self.channel.failures, error)

    def _failed(self, in_a_row: int, error: Exception) -> None:
        self.client.endpoint.report(error)
        if self.state is NodeState.CLOSED and not self._ended and (in_a_row >= FAILURES_MAX or is_permanent(error)):
            if not is_permanent(error):  # which was reported
                _log.warning("memcached at %s is not used until it answers again: %s", self.name, _reason(error))
            self._change(NodeState.OPEN, error)
            self._begin_probing()

    def _begin_probing(self) -> None:
        if not self._ended:
            self._probing = asyncio.get_running_loop().create_task(self._probe_until_it_answers())

    def _change(self, state: NodeState, error: Exception | None = None) -> None:
        self.state = state
        self._tell(NodeChanged(self.name, state, _reason(error) if error is not None else ""))

    async def _probe_until_it_answers(self) -> None:
        since_s = time.monotonic()
        delay_s = PROBE_MIN_S
        # A connection that was made when all was well proves nothing. One that an earlier probe has begun does: where
        # connecting takes longer than a probe may, no probe would ever be answered without.
        self.client.drop_idle()
        while True:
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.5))
            self._change(NodeState.HALF_OPEN)
            try:
                await self._probe()
            except Exception as error:  # whatever it is: a breaker that nobody closes any more would be the worst
                self._change(NodeState.OPEN, error)
                delay_s = min(2 * delay_s, PROBE_MAX_S)
            else:
                self._writes_failed = 0
                self._change(NodeState.CLOSED)
                away_s = time.monotonic() - since_s
                _log.warning("memcached at %s is used again, after %.1f s", self.name, away_s)
                return

    async def _probe(self) -> None:
        """Ask as writes and as reads do. Raises one of `TROUBLE`."""
        async with self.client.connection(self._timeout_s) as conn:
            await self.client.gets_many(conn, [_PROBE])
        if await self.channel.get_many([_PROBE]) == [UNREADABLE]:
            raise ConnectionError("it answers on one connection and not on another")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def exptime_of(write: Write, now_s: float) -> int:
    """Give memcached's expiration time: whole seconds or, above 30 days, a date; never 0, which is for ever.

    Its clock ticks once a second, so that a second may last next to nothing: pinned slots get one more.
    """
    ttl_s = math.ceil(min(max(write.ttl_s, 1), _DATE_MAX)) + write.pinned
    if ttl_s <= _RELATIVE_S_MAX:
        return ttl_s
    return min(math.ceil(now_s) + ttl_s, _DATE_MAX)
