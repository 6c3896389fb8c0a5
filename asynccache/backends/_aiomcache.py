"""aiomcache's client and pool, made safe to cancel, to time out and to lose the server; and batches in one round trip.

What aiomcache 0.8.2 leaves open, and what closes it here:

- A cancelled command puts its connection back with the reply unread, and the next command takes it for its own.
  `Connection.unread` counts what the server owes; only a connection that owes nothing goes back.
- A server that closes in the middle of a reply makes it loop without awaiting. The end of the stream is an error here.
- A connection that dies strands those who wait for it, and a cold pool opens one for each caller. `Pool` makes up for
  what dies, and never has more than it may.
- A key that the server finds too long, or a `cas` without its id, makes the server refuse the command and then
  *execute the value that follows*. Keys are counted in bytes, ids must be there.

Its private fields are read here and nowhere else, hence the narrow range of versions in pyproject.toml.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from enum import Enum, auto
from functools import partial
from typing import Final, NamedTuple

import aiomcache
from aiomcache import constants
from aiomcache import pool as aiomcache_pool
from aiomcache.exceptions import ClientException

from asynccache.backends._endpoint import CasDisabledError, Endpoint, SteppedTimeout, check_authenticated

KEYS_PER_GET: Final = 128
"""More keys than this are asked for in several commands, so that no line, and no wait for one, grows without bound."""

STATS_MAX: Final = 10_000
"""More lines than this are no answer to `stats`. A server with many slab classes gives some two thousand."""

_KEY = re.compile(rb"[\x21-\x7e]{1,250}")
_KEYS = re.compile(rb"[\x21-\x7e]{1,250}+(?: [\x21-\x7e]{1,250}+)*+")
_FOUND = re.compile(rb"VALUE ([\x21-\x7e]{1,250}) \d{1,10} (\d{1,9}) (\d{1,20})\r\n")
_LINE_BYTES_MAX = len(b"VALUE    \r\n") + 250 + 10 + 9 + 20
_CRLF = b"\r\n"
_END = b"END\r\n"
_READ_BYTES_MAX = 1 << 16
_STAT = re.compile(rb"STAT ([\x21-\x7e]+) ?(.*)\r\n")
_UNKNOWN = (b"ERROR\r\n", b"CLIENT_ERROR ")

_Values = tuple[dict[bytes, bytes | None], dict[bytes, int | None]]

TROUBLE = (OSError, EOFError, asyncio.LimitOverrunError, ClientException)
"""What a server, or the way to it, can raise. (asyncio's TimeoutError is an OSError.)"""


class Found(NamedTuple):
    """A slot as `gets` shows it: its bytes, and the id for the `cas` that replaces it. Both None where it is absent."""

    value: bytes | None
    cas: int | None


ABSENT = Found(None, None)


class Swap(NamedTuple):
    """A compare-and-swap: `cas` on what was found, or `add` where nothing was."""

    key: bytes
    value: bytes
    exptime: int
    found: Found


class Outcome(Enum):
    """What the server said to a `Swap`."""

    STORED = auto()
    RACED = auto()  # the slot is no longer what was found
    REFUSED = auto()  # too large, or no memory: the slot stays as it was


_OUTCOMES = {
    constants.STORED: Outcome.STORED,
    constants.NOT_STORED: Outcome.RACED,
    constants.EXISTS: Outcome.RACED,
    constants.NOT_FOUND: Outcome.RACED,
}


def check_key(key: bytes) -> bytes:
    """Give the key back, or raise ValueError where memcached would not read it as one key."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"not a memcached key: {key!r}; give 1 to 250 bytes of printable ASCII without spaces")
    return key


def join_keys(keys: Collection[bytes]) -> bytes:
    """Give the keys as a command names them. Raises ValueError as `check_key` does."""
    line = b" ".join(keys)
    if keys and (not _KEYS.fullmatch(line) or line.count(b" ") != len(keys) - 1):
        for key in keys:
            check_key(key)
    return line


class Connection(aiomcache_pool.Connection):
    """A connection that knows how many replies the server still owes on it."""

    unread: int = 0
    ahead: bytes = b""
    """What was read and belongs to the next reply; or was never asked for."""

    def send(self, request: bytes, replies: int) -> None:
        # No drain(): replies are read while the request goes out, so that neither side waits for the other.
        self.writer.write(request)
        self.unread = replies

    def abort(self) -> None:
        self.writer.transport.abort()  # not close(), which would first send what a cancelled command had written

    @property
    def usable(self) -> bool:
        reader = self.reader
        # Bytes that nobody asked for would be taken for the next answer. Only the buffer tells that they are there.
        unasked = self.ahead or reader._buffer  # type: ignore[attr-defined]
        return not (self.unread or unasked or reader.at_eof() or reader.exception() or self.writer.is_closing())


class Pool:
    """At most `size` connections, made when they are needed.

    Tasks of the pool's own make them, as in Go's database/sql: who needs one takes the first that is there, be it new
    or given back. A caller that gives up leaves the attempt alone, and the next one finds it done. A connection that
    dies never leaves its waiters behind: for each of them there is an attempt under way, or no room for one. `acquire`,
    `release` and `clear` are what aiomcache's client asks of a pool.

    greet: what is said on a new connection before it is lent. The connection is not used if it raises.
    """

    def __init__(self, endpoint: Endpoint, greet: Callable[[Connection], Awaitable[None]], *, size: int) -> None:
        self._endpoint = endpoint
        self._greet = greet
        self._size = size
        self._idle: list[Connection] = []
        self._in_use: set[Connection] = set()
        self._attempts: set[asyncio.Task[Connection]] = set()
        self._waiters: OrderedDict[asyncio.Future[Connection], None] = OrderedDict()  # a queue that one may leave
        self._closed = False
        self._until_loop_ends: AsyncGenerator[None, None] | None = None

    async def acquire(self) -> Connection:
        """Take a connection. Raises what an attempt to make one has raised, one of `TROUBLE`."""
        if self._closed:
            raise ConnectionAbortedError("the pool was closed")
        if self._until_loop_ends is None:
            self._until_loop_ends = self._clear_at_loop_end()
            await anext(self._until_loop_ends)
        conn = self._take_idle()
        if conn is None:
            conn = await self._wait()
        self._in_use.add(conn)
        conn.unread = 1  # presumed, until a command says what it waits for: aiomcache's `stats` never does
        return conn

    def release(self, conn: Connection) -> None:
        self._in_use.discard(conn)
        if conn.usable and not self._closed:
            self._give(conn)
        else:
            conn.abort()
            self._make_missing()

    def drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    async def clear(self) -> None:
        """Close every connection, also those in use: whoever waits on one, or for one, sees it end."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(ConnectionAbortedError("the pool was closed while this command waited"))
        self._waiters.clear()
        for attempt in self._attempts:
            attempt.cancel()
        # One may have succeeded in this very turn, and `_attempted` is only about to be told.
        made = await asyncio.gather(*self._attempts, return_exceptions=True)
        doomed = [*self._in_use, *self._idle, *(conn for conn in made if isinstance(conn, Connection))]
        self._idle.clear()
        for conn in doomed:
            conn.abort()
        await asyncio.gather(*(conn.writer.wait_closed() for conn in doomed), return_exceptions=True)

    async def close(self) -> None:
        self._closed = True
        await self.clear()
        if self._until_loop_ends is not None:
            await self._until_loop_ends.aclose()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            conn = self._idle.pop()
            if conn.usable:
                return conn
            conn.abort()
        return None

    async def _wait(self) -> Connection:
        waiter: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        self._make_missing()
        try:
            return await waiter
        except asyncio.CancelledError:
            # 1. The waiter is given a connection, or an error. 2. Before its task goes on, the task is cancelled.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(waiter.result())
            raise
        finally:
            self._waiters.pop(waiter, None)

    def _give(self, conn: Connection) -> None:
        waiter = self._next_waiter()
        if waiter is None:
            self._idle.append(conn)
        else:
            self._in_use.add(conn)
            waiter.set_result(conn)

    def _make_missing(self) -> None:
        """Begin an attempt for each waiter that has none, as far as there is room."""
        room = self._size - len(self._in_use) - len(self._idle) - len(self._attempts)
        for _ in range(min(room, len(self._waiters) - len(self._attempts))):
            attempt = asyncio.get_running_loop().create_task(self._make())
            self._attempts.add(attempt)
            attempt.add_done_callback(self._attempted)

    def _next_waiter(self) -> asyncio.Future[Connection] | None:
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():  # cancelled
                return waiter
        return None

    async def _make(self) -> Connection:
        async with SteppedTimeout(self._endpoint.connect_timeout_s):
            conn = Connection(*await self._endpoint.open_streams())
            try:
                await self._greet(conn)
                if not conn.usable:
                    raise ConnectionError("it said more than it was asked, or closed the connection after its greeting")
            except BaseException:
                conn.abort()
                raise
            return conn

    def _attempted(self, attempt: asyncio.Task[Connection]) -> None:
        self._attempts.discard(attempt)
        if attempt.cancelled():  # by `clear`, or with all tasks at the end of the loop
            return
        error = attempt.exception()
        if error is None:
            self.release(attempt.result())
        elif (waiter := self._next_waiter()) is not None:
            waiter.set_exception(error)
        else:
            self._endpoint.report(error)
        self._make_missing()

    async def _clear_at_loop_end(self) -> AsyncGenerator[None, None]:
        # asyncio.run() and its like close asynchronous generators just before they close the loop: the last moment at
        # which a connection that nobody closed can be closed. Later its transport can only complain.
        try:
            yield
        finally:
            await self.clear()


class Client(aiomcache.Client):
    """aiomcache's client over one `Pool`: its own commands made safe, and batches of `gets`, `add` and `cas`.

    endpoint: the server.
    pool_size: connections at most.

    commands: how many commands were sent, for tests that count them; a `gets` of many keys is one. What is asked about
        the server itself does not count.
    settings: what the server said of its settings (`stats settings`) when the last connection was made.
    """

    _pool: Pool  # type: ignore[assignment]  # in place of aiomcache's own

    def __init__(self, endpoint: Endpoint, *, pool_size: int) -> None:
        super().__init__(endpoint.address.host, endpoint.address.port or 0, pool_size=pool_size)
        self.endpoint = endpoint
        self.commands = 0
        self.settings: Mapping[str, str] = {}
        self._new_pool = partial(Pool, endpoint, self._greet, size=pool_size)
        self.start_over()

    def start_over(self) -> None:
        """Begin on another event loop, with no connections. Those of the old one ended with it."""
        self._pool = self._new_pool()

    @asynccontextmanager
    async def connection(self, timeout_s: float) -> AsyncGenerator[Connection, None]:
        """Lend a connection for `timeout_s` seconds, which include the wait for it.

        Raises TimeoutError when the time is over. The connection survives only if all that it was asked was answered;
        one that is still being made then is for the next who needs one.
        """
        async with SteppedTimeout(timeout_s):
            conn = await self.acquire()
            try:
                yield conn
            finally:
                self.release(conn)

    async def acquire(self) -> Connection:
        """Lend a connection for as long as it takes, until it is given to `release`: what `connection` consists of, for
        whom microseconds count."""
        return await self._pool.acquire()

    def release(self, conn: Connection) -> None:
        self._pool.release(conn)

    async def server_stats(self, conn: Connection, *arguments: bytes) -> dict[str, str]:
        """Give what the server says of itself: `stats`, or `stats settings` and its like by `arguments`.

        Empty where the server does not know the question, as proxies do not. Raises one of `TROUBLE`.
        """
        conn.send(b" ".join((b"stats", *arguments)) + b"\r\n", replies=1)
        stats: dict[str, str] = {}
        for _ in range(STATS_MAX):
            line = await conn.reader.readuntil(b"\r\n")
            if line == b"END\r\n" or (not stats and line.startswith(_UNKNOWN)):
                check_authenticated(line)
                conn.unread -= 1
                return stats
            stat = _STAT.fullmatch(line)
            if stat is None:
                raise ClientException("not an answer to stats", line)
            stats[stat[1].decode()] = stat[2].decode(errors="replace")
        raise ClientException("an answer to stats without an end", *arguments)

    async def _greet(self, conn: Connection) -> None:
        try:
            self.settings = await self.server_stats(conn, b"settings")
        except (EOFError, ConnectionResetError) as error:
            raise ConnectionResetError(
                "it closed the connection before its first answer: it is going down, or it speaks TLS (memcacheds://)"
            ) from error
        if self.settings.get("cas_enabled") == "no":
            raise CasDisabledError("it gives no versions to compare; start it without -C")

    async def gets_many(self, conn: Connection, keys: Sequence[bytes]) -> dict[bytes, Found]:
        """Give what the slots hold, without those that are absent. Raises one of `TROUBLE`."""
        commands = [keys[start : start + KEYS_PER_GET] for start in range(0, len(keys), KEYS_PER_GET)]
        self._send(conn, [b"gets %b\r\n" % join_keys(command) for command in commands])
        found: dict[bytes, Found] = {}
        for command in commands:
            await _read_slots(conn, frozenset(command), found)
        return found

    def send_swaps(self, conn: Connection, swaps: Sequence[Swap]) -> None:
        """Send all swaps in one write. Raises ValueError as `check_key` does, before anything is sent."""
        join_keys([swap.key for swap in swaps])
        self._send(conn, [_encode(swap) for swap in swaps])

    async def read_outcomes(self, conn: Connection, outcomes: list[Outcome]) -> None:
        """Read what became of the swaps that were sent, in the same order, into `outcomes`: what is known stays known
        when the connection ends among the answers. Raises one of `TROUBLE`; it is not known of the others then."""
        data, at = conn.ahead, 0
        while conn.unread:
            end = data.find(_CRLF, at)
            if end < 0:
                if len(data) - at > _READ_BYTES_MAX:
                    raise ClientException("not an answer to add or cas", data[at : at + _LINE_BYTES_MAX])
                data, at = data[at:] + await _read(conn), 0
                continue
            line = data[at:end]
            outcome = Outcome.REFUSED if line.startswith(b"SERVER_ERROR ") else _OUTCOMES.get(line)
            if outcome is None:
                raise ClientException("not an answer to add or cas", line)
            outcomes.append(outcome)
            conn.unread -= 1
            at = end + len(_CRLF)
        conn.ahead = data[at:]

    def drop_idle(self) -> None:
        """Close the connections that are not in use."""
        self._pool.drop_idle()

    async def close(self) -> None:
        """Close all connections, also those in use."""
        await self._pool.close()

    def _send(self, conn: Connection, commands: Sequence[bytes]) -> None:
        self.commands += len(commands)
        conn.send(b"".join(commands), replies=len(commands))

    # What the commands of the base class rest on.

    def _validate_key(self, key: bytes) -> bytes:
        return check_key(key)

    async def _execute_simple_command(self, conn: Connection, raw_command: bytes) -> bytes:  # type: ignore[override]
        self._send(conn, [raw_command])
        line = await conn.reader.readuntil(b"\r\n")
        conn.unread -= 1
        return line[:-2]

    async def _multi_get(self, conn: Connection, *keys: bytes, **_: bool) -> _Values:  # type: ignore[override]
        found = await self.gets_many(conn, list(dict.fromkeys(keys)))
        return {key: slot.value for key, slot in found.items()}, {key: slot.cas for key, slot in found.items()}

    async def _storage_command(  # type: ignore[override]
        self, conn: Connection, command: bytes, key: bytes, value: bytes, exptime: int = 0, cas: int | None = None
    ) -> bool:
        if command == b"cas" and not cas:
            raise ValueError(f"cas of {key!r} needs the version that gets gave, not {cas!r}; where it gave None, add")
        return await super()._storage_command(conn, command, key, value, exptime, cas)


def _encode(swap: Swap) -> bytes:
    key, value, exptime, found = swap
    if found.cas is None:
        return b"add %b 0 %d %d\r\n%b\r\n" % (key, exptime, len(value), value)
    return b"cas %b 0 %d %d %d\r\n%b\r\n" % (key, exptime, len(value), found.cas, value)


async def _read(conn: Connection) -> bytes:
    """Read what is there, or what comes next: to parse it at once costs far less than to await each of its lines."""
    data = await conn.reader.read(_READ_BYTES_MAX)
    if not data:
        raise EOFError("the server closed the connection")
    return data


async def _read_slots(conn: Connection, asked: Set[bytes], found: dict[bytes, Found]) -> None:
    """Read the answer to one `gets`."""
    data, at = conn.ahead, 0
    while not data.startswith(_END, at):
        header = _FOUND.match(data, at)
        if header is None:
            line = data[at : at + _LINE_BYTES_MAX]
            if b"\n" in line or len(line) == _LINE_BYTES_MAX:
                raise ClientException("not an answer to this gets", line)
        else:
            key, length, version = header.groups()
            begin = header.end()
            end = begin + int(length)
            if key not in asked:
                raise ClientException("not an answer to this gets", header[0])
            if len(data) >= end + len(_CRLF):
                if not data.startswith(_CRLF, end):
                    raise ClientException("a value that is not as long as it says", header[0])
                cas = int(version)
                if cas == 0:
                    raise CasDisabledError("it gives no versions to compare; start it without -C")
                found[key] = Found(data[begin:end], cas)
                at = end + len(_CRLF)
                continue
        data, at = data[at:] + await _read(conn), 0
    conn.unread -= 1
    conn.ahead = data[at + len(_END) :]
