"""Reads from one memcached: what is asked for in one turn of the event loop is one `get`, pipelined on one connection.

A connection for each read, as a pool of them lends it, costs a command for each read and an await for each line.
Here readers of the same turn share a command, and whole buffers are parsed at a time. It knows nothing but `get`, so
that nothing that goes wrong here can change a slot. Every answer has to name a key that its own command asked for, and
at the first doubt the connection ends, with everything that waits on it `UNREADABLE`.

A turn may be more than one command: at most `KEYS_PER_GET` keys are asked for in each, and the first `READERS_AHEAD`
readers of a turn go ahead while nothing is under way, so that the server works while the others ask.

A reader is never answered by a command that was sent before it asked: the answer could be older than a commit that the
reader knows of.

Time is counted in steps, each in a turn of the loop of its own, and not read from the clock: while the loop stalls, the
answer may be here already, and no server is to blame.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

from asynccache.backends._aiomcache import KEYS_PER_GET, join_keys
from asynccache.backends._endpoint import AuthenticationError, Endpoint, SteppedTimeout, check_authenticated
from asynccache.backends.base import UNREADABLE

READERS_AHEAD: Final = 32
"""So many readers of one turn are not kept waiting for the others while nothing is under way. With fewer, what another
command costs is more than what is won when server and client work at the same time."""

STEPS: Final = 8
"""A read is given up at the end of so many steps, the one in which it asked included."""

# Each begins with the end of what was before it, so that a value that is not as long as it says fits none of them. What
# stands for a key need not look like one: it has to be one that was asked for.
_VALUE: Final = re.compile(rb"\r\nVALUE ([^ ]{1,250}) [0-9]{1,10} ([0-9]{1,9})\r\n")
_VALUE_BEGIN: Final = b"\r\nVALUE "
_END: Final = b"\r\nEND\r\n"
_CRLF: Final = b"\r\n"
_LINE_BYTES_MAX: Final = len(b"\r\nVALUE    \r\n") + 250 + 10 + 9
_BUFFER_BYTES: Final = 1 << 18
_KEYS_MANY: Final = 4  # with so many it is quicker to look for what is expected first

Answer = Mapping[bytes, bytes | None]


class ProtocolError(Exception):
    """What the server sent is no answer to what it was asked."""


@dataclass(slots=True, eq=False)
class Get:
    """One command: its keys with what was found so far, and who waits for it, each with the keys that it asked for.

    asked, sent: the steps in which they asked, and in which it was sent.
    """

    asked: int
    found: dict[bytes, bytes | None]
    readers: list[tuple[asyncio.Future[Answer], Sequence[bytes]]]
    sent: int = 0

    def command(self) -> bytes:
        """Give what to send. Who asked for what is no key is told so now, and not waited for: the keys of all readers
        are checked at once, which takes a fifth of the time."""
        try:
            names = join_keys(self.found)
        except ValueError:
            self._refuse()
            names = join_keys(self.found)
        return b"get %b\r\n" % names

    def answer(self, found: Answer) -> None:
        for reader, _ in self.readers:
            if not reader.done():  # cancelled
                reader.set_result(found)

    def give_up(self) -> None:
        self.answer(dict.fromkeys(self.found, UNREADABLE))
        self.readers.clear()

    def _refuse(self) -> None:
        readers, self.readers, self.found = self.readers, [], {}
        for reader, names in readers:
            try:
                join_keys(names)
            except ValueError as error:
                if not reader.done():
                    reader.set_exception(error)
                    reader.exception()  # who asked for more than a command holds may not look at all of them
            else:
                self.readers.append((reader, names))
                self.found |= dict.fromkeys(names)


class ReadChannel:
    """Reads slots of one server over one connection, made when it is needed.

    endpoint: the server.
    timeout_s: seconds that a read takes at most, whether they go into connecting, sending or the answer; 7/8 of it at
        least before it is given up, and longer while turns of the event loop take more than 1/8 of it. An attempt to
        connect that takes longer goes on for those who come later.

    commands: how many were sent.
    failures: how many there were since the last answer: attempts to connect that failed or took longer than a read may,
        and connections that ended with reads unanswered that were not repeated.
    on_failure: is called after each of them with what was wrong, when those who waited have been given up.
    """

    def __init__(self, endpoint: Endpoint, *, timeout_s: float) -> None:
        self.commands = 0
        self._timeout_s = timeout_s
        self.on_failure: Callable[[Exception], None] = endpoint.report
        self._endpoint = endpoint
        self._closed = False
        self._step = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.start_over()

    def start_over(self) -> None:
        """Begin on another event loop, with no connection. That of the old one ended with it."""
        self._stop_timer()
        self._loop = None
        self.failures = 0
        self._unsent: deque[Get] = deque()
        self._pipeline: Pipeline | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._until_loop_ends: AsyncGenerator[None, None] | None = None

    def ask(self, names: Sequence[bytes]) -> asyncio.Future[Answer]:
        """Ask for 1 to `KEYS_PER_GET` slots; others who ask in this turn share the command and its answer.

        The future fails for nothing but a key that memcached would not read as one, with ValueError: without an answer
        in time all values are `UNREADABLE`. Cancelling it harms nobody.
        """
        loop = self._loop
        if loop is None:  # kept, since to ask for it is a system call in CPython 3.11
            loop = self._loop = asyncio.get_running_loop()
        reader: asyncio.Future[Answer] = loop.create_future()
        unsent, step = self._unsent, self._step
        if unsent and (get := unsent[-1]).asked == step and len(found := get.found) + len(names) <= KEYS_PER_GET:
            for name in names:
                found[name] = None
            get.readers.append((reader, names))
            if len(get.readers) == READERS_AHEAD and self._pipeline is not None and not self._pipeline.in_flight:
                self.flush()
            return reader
        if self._closed:
            reader.set_result(dict.fromkeys(names, UNREADABLE))
            return reader
        get = Get(step, dict.fromkeys(names), [(reader, names)])
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s / STEPS, self._take_step)
        if self._pipeline is not None and self._pipeline.lone and not unsent:
            # Who seems to be alone waits for nobody. Others who come in this turn after all share the next command.
            self._send(self._pipeline, get)
        else:
            if unsent:
                self.flush()  # the last of them is full
            unsent.append(get)
            loop.call_soon(self.flush)  # once all who ask in this turn have asked
        return reader

    def ask_many(self, names: Sequence[bytes]) -> list[asyncio.Future[Answer]]:
        """Ask for any number of slots, in as many commands as that takes, of which each has its own answer."""
        return [self.ask(names[start : start + KEYS_PER_GET]) for start in range(0, len(names), KEYS_PER_GET)]

    async def get_many(self, names: Sequence[bytes]) -> list[bytes | None]:
        """Give each slot's bytes, in the order of `names`: None where it is absent, `UNREADABLE` where there was no
        proper answer in time."""
        found: dict[bytes, bytes | None] = {}
        for asked in self.ask_many(list(dict.fromkeys(names))):  # all are asked before the first is awaited
            found |= await asked
        return [found[name] for name in names]

    async def close(self) -> None:
        """End the connection: who waits for an answer gets `UNREADABLE`, and so does who still asks."""
        self._closed = True
        await self._clear()
        if self._until_loop_ends is not None:
            await self._until_loop_ends.aclose()

    def flush(self) -> None:
        """Send what was asked for, as far as the server takes it; connect first if need be."""
        pipeline = self._pipeline
        if pipeline is None:
            # Done: it was cancelled, with all tasks, before it had begun.
            if self._unsent and (self._connecting is None or self._connecting.done()):
                self._connecting = asyncio.get_running_loop().create_task(self._connect())
            return
        while self._unsent and not pipeline.jammed:
            get = self._unsent.popleft()
            if not all(reader.done() for reader, _ in get.readers):  # else they are all cancelled
                self._send(pipeline, get)

    def _send(self, pipeline: Pipeline, get: Get) -> None:
        command = get.command()
        if get.readers:  # else they were all refused
            get.sent = self._step
            pipeline.send(get, command)
            self.commands += 1

    def lost(self, pipeline: Pipeline, unanswered: Sequence[Get], error: Exception, *, again: bool) -> None:
        """Go on without this connection. `again`: what it left unanswered may be asked on the next one."""
        if pipeline is not self._pipeline:  # it was closed, or ended before it was taken into use
            return
        self._pipeline = None
        self._unsent.extendleft(reversed(unanswered))
        if self._unsent and not again:
            self._give_up(error)
        else:
            self.flush()

    def _give_up(self, error: BaseException) -> None:
        while self._unsent:
            self._unsent.popleft().give_up()
        if isinstance(error, Exception):  # else connecting was cancelled
            self._count_failure(error)

    def _count_failure(self, error: Exception) -> None:
        self.failures += 1
        self.on_failure(error)

    def _take_step(self) -> None:
        # Set anew from now, not from when it was due: a loop that stalled does not make up for steps that it missed.
        # What came meanwhile it has read before it calls a timer.
        self._timer = None
        self._step += 1
        pipeline, unsent = self._pipeline, self._unsent
        in_flight = () if pipeline is None else pipeline.in_flight
        if not in_flight and not unsent:
            return
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s / STEPS, self._take_step)
        late = self._step - STEPS
        error = TimeoutError(f"no answer in {self._timeout_s} s")
        if pipeline is not None and (in_flight[0].sent if in_flight else unsent[0].asked) <= late:
            pipeline.end(error)
            return
        # A connection has a whole time-out to answer. Those whose time went into connecting do not wait for that, and
        # do not end it: where connecting is slow, there would never be one for those who come later.
        overdue = [get for get in in_flight if get.readers and get.asked <= late]
        while unsent and unsent[0].asked <= late:
            overdue.append(unsent.popleft())
        if overdue:
            for get in overdue:
                get.give_up()
            self._count_failure(error)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            if self._until_loop_ends is None:
                self._until_loop_ends = self._clear_at_loop_end()
                await anext(self._until_loop_ends)
            async with SteppedTimeout(self._endpoint.connect_timeout_s):
                _, pipeline = await self._endpoint.open(partial(Pipeline, self, loop))
            if pipeline.ended:
                raise ConnectionResetError("the server closed the connection at once")
        except BaseException as error:
            self._give_up(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._pipeline = pipeline
        finally:
            self._connecting = None
        self.flush()

    async def _clear(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        self._stop_timer()
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            self._unsent.extendleft(reversed(pipeline.abort()))
        while self._unsent:
            self._unsent.popleft().give_up()
        if pipeline is not None:
            await pipeline.closed

    async def _clear_at_loop_end(self) -> AsyncGenerator[None, None]:
        # As in the pool of the writing side: asyncio.run() closes asynchronous generators just before it closes the
        # loop, the last moment at which a connection that nobody closed can be closed.
        try:
            yield
        finally:
            await self._clear()


class Pipeline(asyncio.BufferedProtocol):
    """One connection: commands go out, and their answers come back in the same order.

    in_flight: the commands that were sent and not answered, the oldest first.
    lone: all is answered, and the last command had one reader and was alone on its way.
    jammed: the server does not read: as much as may wait here to be sent does so.
    ended: no command can be sent any more.
    closed: done when the transport has let go of its socket.
    """

    def __init__(self, channel: ReadChannel, loop: asyncio.AbstractEventLoop) -> None:
        self.in_flight: deque[Get] = deque()
        self.lone = False
        self.jammed = False
        self.ended = False
        self.closed: asyncio.Future[None] = loop.create_future()
        self._channel = channel
        self._transport: asyncio.WriteTransport
        # One buffer for all that comes: a new one for each piece costs more than the system call that fills it.
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._parts: list[bytes] = []  # of what cannot be parsed before so many more bytes are there:
        self._missing_bytes = 0
        self._alone = False  # the command that was sent last has one reader, and none was in flight
        self._used = False  # it has answered a command
        self._silent = False  # it has, and since it was last idle nothing came

    def send(self, get: Get, command: bytes) -> None:
        in_flight = self.in_flight
        if not in_flight:
            self._silent = self._used
        self._alone = not in_flight and len(get.readers) == 1
        self.lone = False
        in_flight.append(get)
        self._transport.write(command)

    def end(self, error: Exception, *, again: bool = False) -> None:
        if not self.ended:
            self._channel.lost(self, self.abort(), error, again=again)

    def abort(self) -> Sequence[Get]:
        """End the connection without a word to the channel. Gives what it leaves unanswered."""
        self.ended = True
        self._transport.abort()
        unanswered, self.in_flight = self.in_flight, deque()
        return unanswered

    def _parse(self, data: bytes) -> None:
        """Give the answers in `data`, which begins with a CRLF, to those who wait for them, and keep the rest."""
        at, size = 0, len(data)
        match, in_flight = _VALUE.match, self.in_flight
        while in_flight:
            found = in_flight[0].found
            if len(found) >= _KEYS_MANY:
                at = _take_expected(data, at, found)
            seen = found.get
            while header := match(data, at):
                name, length = header.groups()
                if seen(name, b"") is not None:
                    raise ProtocolError(f"a key that this get did not ask for, or twice: {name!r}")
                begin = header.end()
                end = begin + int(length)
                if size < end:
                    self._keep(data[at:], missing_bytes=end - size)
                    return
                found[name] = data[begin:end]
                at = end
            if not data.startswith(_END, at):
                line = data[at : at + _LINE_BYTES_MAX]
                if not line.startswith(_CRLF[: len(line)]) or b"\n" in line[2:] or len(line) == _LINE_BYTES_MAX:
                    check_authenticated(line.removeprefix(_CRLF))
                    raise ProtocolError(f"not an answer to get: {line!r}")
                self._keep(data[at:], missing_bytes=1)
                return
            at += len(_END) - len(_CRLF)
            self._used = True
            self._channel.failures = 0
            in_flight.popleft().answer(found)
        if (at := at + len(_CRLF)) < size:
            raise ProtocolError(f"bytes that nobody asked for: {data[at : at + _LINE_BYTES_MAX]!r}")
        self.lone = self._alone and not self.jammed

    def _keep(self, part: bytes, *, missing_bytes: int) -> None:
        self._parts = [part]
        self._missing_bytes = missing_bytes

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is none by inheritance

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(self._buffer[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        self._silent = False
        if not self._parts:
            data = _CRLF + data
        else:
            self._parts.append(bytes(data))
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
        self.end(error, again=self._silent or not self.in_flight)

    def pause_writing(self) -> None:
        self.jammed = True

    def resume_writing(self) -> None:
        self.jammed = False
        self._channel.flush()


def _take_expected(data: bytes, at: int, found: dict[bytes, bytes | None]) -> int:
    """Take the values that come as expected, and give where the first other one begins.

    Expected: in the order in which they were asked for, without flags, and with nothing in them that looks like a
    header. So what is as long as it says where the next header begins, ends there. The last value, and all from the
    first unexpected one, are left to be read one by one.
    """
    pieces = data[at:].split(_VALUE_BEGIN, len(found))
    if pieces[0]:
        return at
    names = iter(found)
    for piece in pieces[1:-1]:
        header, _, value = piece.partition(_CRLF)
        for name in names:
            if found[name] is None and header == b"%b 0 %d" % (name, len(value)):
                found[name] = value
                at += len(_VALUE_BEGIN) + len(piece)
                break
    return at
