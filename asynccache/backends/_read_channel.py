"""Reads from one memcached: what is asked for in one turn of the event loop is one `get`, pipelined on one connection.

A connection for each read, as a pool of them lends it, costs a command for each read and an await for each line.
Here readers of the same turn share a command, and whole buffers are parsed at a time. It knows nothing but `get`, so
that nothing that goes wrong here can change a slot. Every answer has to name a key that its own command asked for, and
at the first doubt the connection ends, with everything that waits on it `UNREADABLE`.

A reader is never answered by a command that was sent before it asked: the answer could be older than a commit that the
reader knows of.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, cast

from asynccache.backends._endpoint import AuthenticationError, Endpoint, SteppedTimeout, check_authenticated
from asynccache.backends.base import UNREADABLE

KEYS_PER_GET: Final = 128
"""At most so many keys are asked for in one command, so that no line and no wait for it grows without bound."""

_VALUE: Final = re.compile(rb"VALUE ([\x21-\x7e]{1,250}) \d{1,10} (\d{1,9})\r\n")
_END: Final = b"END\r\n"
_LINE_BYTES_MAX: Final = len(b"VALUE    \r\n") + 250 + 10 + 9

Answer = Mapping[bytes, bytes | None]


class ProtocolError(Exception):
    """What the server sent is no answer to what it was asked."""


@dataclass(slots=True, eq=False)
class Get:
    """One command: its keys with what was found so far, and those who wait for it.

    asked_s: when its first reader asked, by the loop's clock. The time that connecting took is added to it.
    """

    asked_s: float
    found: dict[bytes, bytes | None] = field(default_factory=dict)
    readers: list[asyncio.Future[Answer]] = field(default_factory=list)

    def answer(self, found: Answer) -> None:
        for reader in self.readers:
            if not reader.done():  # cancelled
                reader.set_result(found)

    def give_up(self) -> None:
        self.answer(dict.fromkeys(self.found, UNREADABLE))


class ReadChannel:
    """Reads slots of one server over one connection, made when it is needed.

    endpoint: the server.
    timeout_s: seconds that a read takes at most, beside connecting.

    commands: how many were sent.
    failures: connections in a row that were lost with reads unanswered, or could not be made.
    on_failure: called after each of them.
    """

    def __init__(self, endpoint: Endpoint, *, timeout_s: float) -> None:
        self.commands = 0
        self.failures = 0
        self.on_failure: Callable[[Exception], None] = lambda _: None
        self.timeout_s = timeout_s
        self._endpoint = endpoint
        self._closed = False
        self.start_over()

    def start_over(self) -> None:
        """Begin on another event loop, with no connection. That of the old one ended with it."""
        self._unsent: deque[Get] = deque()
        self._pipeline: Pipeline | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._until_loop_ends: AsyncGenerator[None, None] | None = None

    def ask(self, names: Sequence[bytes]) -> asyncio.Future[Answer]:
        """Ask for at most `KEYS_PER_GET` slots; others who ask in this turn share the command and its answer.

        The future never fails: without an answer in time all values are `UNREADABLE`. Cancelling it harms nobody.
        """
        loop = asyncio.get_running_loop()
        reader: asyncio.Future[Answer] = loop.create_future()
        if self._closed:
            reader.set_result(dict.fromkeys(names, UNREADABLE))
            return reader
        unsent = self._unsent
        if not unsent or len((get := unsent[-1]).found) + len(names) > KEYS_PER_GET:
            unsent.append(get := Get(loop.time()))
            loop.call_soon(self.flush)  # once all who ask in this turn have asked
        found = get.found
        for name in names:
            found[name] = None
        get.readers.append(reader)
        return reader

    async def get_many(self, names: Sequence[bytes]) -> list[bytes | None]:
        """Give each slot's bytes, in the order of `names`, which memcached must be able to read: None where it is
        absent, `UNREADABLE` where there was no proper answer in time."""
        distinct = list(dict.fromkeys(names))
        shares = [distinct[start : start + KEYS_PER_GET] for start in range(0, len(distinct), KEYS_PER_GET)]
        found: dict[bytes, bytes | None] = {}
        for answer in [self.ask(share) for share in shares]:  # all are asked before the first is awaited
            found |= await answer
        return [found[name] for name in names]

    async def close(self) -> None:
        """End the connection: who waits for an answer gets `UNREADABLE`, and so does who still asks."""
        self._closed = True
        await self._clear()
        if self._until_loop_ends is not None:
            await self._until_loop_ends.aclose()

    def flush(self) -> None:
        """Send what was asked for, as far as the server takes it; connect first if need be."""
        if self._pipeline is None:
            if self._unsent and self._connecting is None:
                self._connecting = asyncio.get_running_loop().create_task(self._connect())
            return
        while self._unsent and not self._pipeline.jammed:
            get = self._unsent.popleft()
            if not all(reader.done() for reader in get.readers):  # else they are all cancelled
                self._pipeline.send(get)
                self.commands += 1

    def lost(self, pipeline: Pipeline, unanswered: Sequence[Get], error: Exception, *, again: bool) -> None:
        """Go on without this connection. `again`: what it left unanswered may be asked on the next one."""
        if pipeline is not self._pipeline:  # it was closed, or ended before it was taken into use
            return
        self._pipeline = None
        self._unsent.extendleft(reversed(unanswered))
        if again:
            self.flush()
        else:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._give_up()
        self.failures += 1
        self.on_failure(error)

    def _give_up(self) -> None:
        while self._unsent:
            self._unsent.popleft().give_up()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            if self._until_loop_ends is None:
                self._until_loop_ends = self._clear_at_loop_end()
                await anext(self._until_loop_ends)
            async with SteppedTimeout(self._endpoint.connect_timeout_s):
                _, pipeline = await self._endpoint.open(partial(Pipeline, self, loop))
            if pipeline.ended:
                raise ConnectionResetError("the server closed the connection at once")
        except Exception as error:
            self._fail(error)
        except BaseException:
            self._give_up()
            raise
        else:
            self._pipeline = pipeline
            connected_s = loop.time()
            for get in self._unsent:
                get.asked_s += connected_s - max(began_s, get.asked_s)
        finally:
            self._connecting = None
        self.flush()

    async def _clear(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        if self._pipeline is not None:
            pipeline = self._pipeline
            pipeline.end(ConnectionAbortedError("this side closed the connection"))
            await pipeline.closed
        self._give_up()

    async def _clear_at_loop_end(self) -> AsyncGenerator[None, None]:
        # As in the pool of the writing side: asyncio.run() closes asynchronous generators just before it closes the
        # loop, the last moment at which a connection that nobody closed can be closed.
        try:
            yield
        finally:
            await self._clear()


class Pipeline(asyncio.Protocol):
    """One connection: commands go out, and their answers come back in the same order.

    jammed: the server does not read: as much as may wait here to be sent does so.
    ended: no command can be sent any more.
    closed: done when the transport has let go of its socket.
    """

    def __init__(self, channel: ReadChannel, loop: asyncio.AbstractEventLoop) -> None:
        self.jammed = False
        self.ended = False
        self.closed: asyncio.Future[None] = loop.create_future()
        self._channel = channel
        self._loop = loop
        self._transport: asyncio.WriteTransport
        self._timer: asyncio.TimerHandle | None = None
        self._in_flight: deque[Get] = deque()
        self._parts: list[bytes] = []  # of what cannot be parsed before so many more bytes are there:
        self._missing_bytes = 0
        self._used = False  # it has answered a command
        self._silent = False  # it has, and since it was last idle nothing came

    def send(self, get: Get) -> None:
        if not self._in_flight:
            self._silent = self._used
        self._in_flight.append(get)
        self._transport.write(b"get %b\r\n" % b" ".join(get.found))
        if self._timer is None:
            self._timer = self._loop.call_at(get.asked_s + self._channel.timeout_s, self._check_time)

    def end(self, error: Exception, *, again: bool = False) -> None:
        if self.ended:
            return
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._transport.abort()
        unanswered, self._in_flight = self._in_flight, deque()
        self._channel.lost(self, unanswered, error, again=again)

    def _check_time(self) -> None:
        # One timer for all commands, not one for each: the first of them has the least time left. It is not set anew
        # with every answer, but looks when it comes.
        self._timer = None
        if self._in_flight:
            deadline_s = self._in_flight[0].asked_s + self._channel.timeout_s
            if deadline_s <= self._loop.time():
                self.end(TimeoutError(f"no answer in {self._channel.timeout_s} s"))
            else:
                self._timer = self._loop.call_at(deadline_s, self._check_time)

    def _parse(self, data: bytes) -> None:
        """Give the answers in `data` to those who wait for them, and keep the rest."""
        at, size = 0, len(data)
        match = _VALUE.match
        while self._in_flight:
            found = self._in_flight[0].found
            while header := match(data, at):
                name, length = header.groups()
                if found.get(name, b"") is not None:
                    raise ProtocolError(f"a key that this get did not ask for, or twice: {name!r}")
                begin = header.end()
                end = begin + int(length)
                if size < end + 2:
                    self._keep(data, at, missing_bytes=end + 2 - size)
                    return
                if data[end : end + 2] != b"\r\n":
                    raise ProtocolError(f"a value that is not as long as it says: {header[0]!r}")
                found[name] = data[begin:end]
                at = end + 2
            if not data.startswith(_END, at):
                line = data[at : at + _LINE_BYTES_MAX]
                if b"\n" in line or len(line) == _LINE_BYTES_MAX:
                    check_authenticated(line)
                    raise ProtocolError(f"not an answer to get: {line!r}")
                self._keep(data, at, missing_bytes=1)
                return
            at += len(_END)
            self._used = True
            self._channel.failures = 0
            self._in_flight.popleft().answer(found)
        if at < size:
            raise ProtocolError(f"bytes that nobody asked for: {data[at : at + _LINE_BYTES_MAX]!r}")

    def _keep(self, data: bytes, at: int, *, missing_bytes: int) -> None:
        if at < len(data):
            self._parts = [data[at:]]
            self._missing_bytes = missing_bytes

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._silent = False
        if self._parts:
            self._parts.append(data)
            self._missing_bytes -= len(data)
            if self._missing_bytes > 0:
                return
            data = b"".join(self._parts)
            self._parts = []
        try:
            self._parse(data)
        except (ProtocolError, AuthenticationError) as error:
            self.end(error)

    def eof_received(self) -> None:
        self.connection_ended(EOFError("the server closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection_ended(exc or EOFError("the connection was closed"))
        if not self.closed.done():
            self.closed.set_result(None)

    def connection_ended(self, error: Exception) -> None:
        # A connection that had ended while it was idle (the server was restarted) may not have told so before the next
        # command was sent. To ask again is safe, and happens once: the next connection has not been used.
        self.end(error, again=self._silent or not self._in_flight)

    def pause_writing(self) -> None:
        self.jammed = True

    def resume_writing(self) -> None:
        self.jammed = False
        self._channel.flush()
