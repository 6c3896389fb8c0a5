"""A TCP proxy for the faults that a network has: slow, silent, cut in the middle, refusing."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from tests.servers.process import HOST, free_port, give_back_port

CHUNK_BYTES = 65536
LINGER_0_S = struct.pack("ii", 1, 0)  # on, 0 seconds: closing sends RST in place of FIN


@dataclass(slots=True, eq=False)
class Trap:
    """A request that is waited for, once, on any connection.

    seen: its bytes were received from the client.
    answered: the server's reply to it is in the proxy's hands: the server has done what was asked.
    released: whoever holds the trap sets this to let go of what is held.
    """

    pattern: bytes
    hold_request: bool
    seen: asyncio.Event = field(default_factory=asyncio.Event)
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class Link:
    """A client's connection: the task that serves it, the trap that it has run into, and whose turn it is."""

    client: asyncio.StreamWriter
    task: asyncio.Task[None] = field(init=False)
    trap: Trap | None = None
    asks: bool = False


class FaultProxy:
    """Stands before a server for as long as the `async with` block; its faults can be changed while connections run.

    upstream: host and port of the server.

    host, port: where it listens.
    delay_s: waits so long before it forwards each chunk of a reply.
    forward_requests, forward_replies: `clear()` one and that direction goes silent; `set()` it and what was held flows.
    accepted, open: connections so far, and now.
    bytes_up, chunks_up: received from clients so far, held ones included.
    round_trips: how often a client has asked after it was answered, or for the first time.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.host = HOST
        self.port = free_port()
        self.delay_s = 0.0
        self.forward_requests = asyncio.Event()
        self.forward_requests.set()
        self.forward_replies = asyncio.Event()
        self.forward_replies.set()
        self.accepted = self.bytes_up = self.chunks_up = self.round_trips = 0
        self.upstream = upstream
        self._links: set[Link] = set()
        self._traps: list[Trap] = []
        self._bytes_before_cut: int | None = None
        self._cut_with_rst = False
        self._changed = asyncio.Event()
        self._listening: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        tasks = [link.task for link in self._links]
        self.cut(rst=True)  # does not wait for a client that has stopped reading
        await asyncio.gather(*tasks, return_exceptions=True)
        give_back_port(self.port)

    @property
    def open(self) -> int:
        return len(self._links)

    @property
    def unsent_bytes(self) -> int:
        """Replies that the clients have not made room for."""
        return sum(link.client.transport.get_write_buffer_size() for link in self._links)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition over the counters holds, like `lambda: proxy.chunks_up >= 3`."""
        while not condition():
            await self._changed.wait()

    async def accept(self) -> None:
        """Take connections, as it does from the start."""
        self._listening = await asyncio.start_server(self._take, self.host, self.port)

    def refuse(self) -> None:
        """Refuse new connections until `accept`. Those that are open stay open."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def cut(self, *, rst: bool = False) -> None:
        """End all connections now, with FIN or RST."""
        for link in self._links:
            _end(link.client, rst=rst)
            link.task.cancel()

    def cut_after(self, reply_bytes: int, *, rst: bool = False) -> None:
        """End the connection on which the reply byte of this number from now on arrives, once it is forwarded."""
        self._bytes_before_cut, self._cut_with_rst = reply_bytes, rst

    def hold_request(self, pattern: bytes) -> Trap:
        """Keep the next request that contains `pattern` from the server, until it is released."""
        return self._set_trap(Trap(pattern, hold_request=True))

    def hold_reply(self, pattern: bytes) -> Trap:
        """Keep from the client the reply to the next request that contains `pattern`, until it is released."""
        return self._set_trap(Trap(pattern, hold_request=False))

    def _set_trap(self, trap: Trap) -> Trap:
        self._traps.append(trap)
        return trap

    def _notify(self) -> None:
        self._changed.set()  # wakes who waits now
        self._changed.clear()

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(writer)
        link.task = asyncio.create_task(self._serve(link, reader))
        link.task.add_done_callback(lambda _: self._drop(link))  # comes even if it is cancelled before it starts
        self._links.add(link)
        self.accepted += 1
        self._notify()

    def _drop(self, link: Link) -> None:
        self._links.discard(link)
        self._notify()

    async def _serve(self, link: Link, requests: asyncio.StreamReader) -> None:
        with suppress(OSError):  # the server is not there
            async with _closing(link.client):
                replies, server = await asyncio.open_connection(*self.upstream)
                async with _closing(server):
                    await self._pump(link, requests, replies, server)

    async def _pump(
        self, link: Link, requests: asyncio.StreamReader, replies: asyncio.StreamReader, server: asyncio.StreamWriter
    ) -> None:
        up = asyncio.create_task(self._pump_requests(link, requests, server))
        down = asyncio.create_task(self._pump_replies(link, replies))
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)  # a broken connection ends like any other

    async def _pump_requests(self, link: Link, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        recent = b""  # a pattern may arrive in pieces
        while data := await reader.read(CHUNK_BYTES):
            self.bytes_up += len(data)
            self.chunks_up += 1
            self.round_trips += not link.asks
            link.asks = True
            self._spring_trap(link, recent, data)
            recent = (recent + data)[-CHUNK_BYTES:]
            self._notify()
            if link.trap is not None and link.trap.hold_request:
                await link.trap.released.wait()
                link.trap = None
            await self.forward_requests.wait()
            server.write(data)
            await server.drain()

    def _spring_trap(self, link: Link, recent: bytes, data: bytes) -> None:
        for trap in self._traps:
            if trap.pattern in recent[max(0, len(recent) - len(trap.pattern) + 1) :] + data:
                self._traps.remove(trap)
                link.trap = trap
                trap.seen.set()
                return

    async def _pump_replies(self, link: Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(CHUNK_BYTES):
            link.asks = False
            await asyncio.sleep(self.delay_s)
            if link.trap is not None and not link.trap.hold_request:
                link.trap.answered.set()
                await link.trap.released.wait()
                link.trap = None
            await self.forward_replies.wait()
            if self._bytes_before_cut is not None:
                data, last = data[: self._bytes_before_cut], len(data) >= self._bytes_before_cut
                self._bytes_before_cut = None if last else self._bytes_before_cut - len(data)
                if last:
                    link.client.write(data)
                    await link.client.drain()
                    _end(link.client, rst=self._cut_with_rst)
                    return
            link.client.write(data)
            self._notify()
            await link.client.drain()


@asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _end(writer: asyncio.StreamWriter, *, rst: bool) -> None:
    if rst:
        connection = writer.get_extra_info("socket")  # uvloop has none any more when it was closed
        if connection is not None:
            with suppress(OSError):  # it has ended already, and is about to be dropped
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0_S)
        writer.transport.abort()
    else:
        writer.close()
