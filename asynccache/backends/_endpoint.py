"""How a connection to one memcached is made: TCP or a unix socket, TLS, authentication; written once for all channels.

Authentication is memcached's for the text protocol (`-Y`, since 1.5.15): the first command of a connection is a `set`
of any key, whose value is "user password". It goes out alone. A server that refuses it answers what is pipelined
behind it *in its place* (1.6.18), so that a wrong password would look like a missing one.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar, cast

from asynccache.errors import ConfigurationError

_TOKEN: Final = re.compile(r"[^\0\r\n \ud800-\udfff]+")
_UNAUTHENTICATED: Final = b"CLIENT_ERROR unauthenticated"
_ANSWER_BYTES_MAX: Final = 512

P = TypeVar("P", bound=asyncio.BaseProtocol)
_log = logging.getLogger("asynccache")


class RefusedError(ConnectionError):
    """The base of what keeps a server from being used until somebody changes it, or the configuration."""


class AuthenticationError(RefusedError):
    """Raised when the server refuses user and password, or wants them and got none."""


class CasDisabledError(RefusedError):
    """Raised when the server gives no versions to compare: it was started with `-C`."""


_PERMANENT: Final = (RefusedError, ssl.SSLError)
"""What does not pass by itself."""


def is_permanent(error: BaseException) -> bool:
    """Whether only people can change it. A TLS connection that is cut off is no such thing."""
    return isinstance(error, _PERMANENT) and not isinstance(error, ssl.SSLEOFError)


def check_authenticated(line: bytes) -> None:
    """Raise AuthenticationError if this is what a server says to who has not authenticated."""
    if line.startswith(_UNAUTHENTICATED):
        raise AuthenticationError("it wants a user and a password, and none are configured: memcached://user:password@")


class Address(NamedTuple):
    """Where a server listens: a host and its port, or the path of a unix socket and None."""

    host: str
    port: int | None

    def __str__(self) -> str:
        return self.host if self.port is None else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a password. The password is in no repr and in no error.

    Raises ConfigurationError for what could not be sent: the server reads "user password" up to the end of a line.
    """

    user: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        for name, value in (("user", self.user), ("password", self.password)):
            if not _TOKEN.fullmatch(value):
                raise ConfigurationError(
                    f"the {name} is empty, or has a space, CR, LF or NUL in it, or is no text in UTF-8; memcached's "
                    "authentication wants both a user and a password, without any of these"
                )

    @property
    def command(self) -> bytes:
        # Expired from the start: a server that wants no authentication would store the password for everybody to read.
        value = f"{self.user} {self.password}".encode()
        return b"set asynccache:authentication 0 -1 %d\r\n%b\r\n" % (len(value), value)


@dataclass(frozen=True, slots=True, eq=False)
class Endpoint:
    """One server, and what it takes to get a connection to it.

    tls: how its certificate is verified. None: no TLS.
    credentials: are sent on every new connection before anything else. None: there are none.
    connect_timeout_s: seconds for a new connection in all, TLS, authentication and any greeting included. Kept by who
        connects, since greetings are theirs.
    """

    address: Address
    tls: ssl.SSLContext | None = None
    credentials: Credentials | None = None
    connect_timeout_s: float = 1.0
    _told: set[type[BaseException]] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tls is not None and self.address.port is None:
            raise ConfigurationError(
                f"{self.address} is a unix socket, which memcached serves without TLS; leave tls out, or give host:port"
            )

    async def open_streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, for who awaits line by line. Raises OSError, and RefusedError among them."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        transport, protocol = await self.open(lambda: asyncio.StreamReaderProtocol(reader, loop=loop))
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def open(self, make: Callable[[], P]) -> tuple[asyncio.Transport, P]:
        """Connect, and give the connection to the protocol that `make` gives. Raises as `open_streams` does."""
        loop = asyncio.get_running_loop()
        opening = Opening(self.credentials, loop)
        host, port = self.address
        try:
            if port is None:
                await loop.create_unix_connection(lambda: opening, host)
            else:
                await loop.create_connection(lambda: opening, host, port, ssl=self.tls)
            transport = await opening.opened
            if transport.is_closing():
                raise ConnectionResetError("it closed the connection at once")
            protocol = make()
            transport.set_protocol(protocol)
            protocol.connection_made(transport)
            transport.resume_reading()
        except BaseException:
            opening.abort()
            raise
        return transport, protocol

    def report(self, error: BaseException) -> None:
        """Log what went wrong with this server: what only people can change as an error, once; the rest for debug."""
        kind = type(error)
        if not is_permanent(error) or kind in self._told:
            _log.debug("memcached at %s: %r", self.address, error)
            return
        self._told.add(kind)
        advice = ""
        if isinstance(error, ssl.SSLError):
            advice = (
                ". Does it speak TLS (-Z)? Is its certificate for this name, from a known CA (SSL_CERT_FILE, or tls=)?"
            )
        _log.error("memcached at %s is not used: %s%s", self.address, error, advice)


class Opening(asyncio.Protocol):
    """A connection before it is anybody's: sends the credentials, if there are any, and reads the answer.

    opened: the transport, with reading paused, for another protocol to take over. What the server said instead of a
        welcome is in no error: some (Redis) repeat the words that they do not understand, here the password.
    """

    def __init__(self, credentials: Credentials | None, loop: asyncio.AbstractEventLoop) -> None:
        self.opened: asyncio.Future[asyncio.Transport] = loop.create_future()
        self._credentials = credentials
        self._answer = b""
        self._transport: asyncio.Transport | None = None

    def abort(self) -> None:
        self.opened.cancel()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        if self._credentials is None:
            self._welcome(self._transport)
        else:
            self._transport.write(self._credentials.command)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if b"\n" not in self._answer and len(self._answer) < _ANSWER_BYTES_MAX:
            return
        if self._answer == b"STORED\r\n" and self._transport is not None:
            self._welcome(self._transport)
        elif self._answer.startswith((b"CLIENT_ERROR ", b"ERROR")):
            self._fail(AuthenticationError("it refuses this user with this password"))
        else:
            self._fail(ConnectionError("what it said first is no answer of memcached"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionResetError("it closed the connection before its first answer"))

    def _welcome(self, transport: asyncio.Transport) -> None:
        transport.pause_reading()
        if not self.opened.done():
            self.opened.set_result(transport)

    def _fail(self, error: Exception) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # whoever waits for it may have been cancelled
        elif self._transport is not None:
            self._transport.abort()


class SteppedTimeout:
    """Like `asyncio.timeout`, but a loop that stalls does not use it up: it ends after `timeout_s` seconds, and not
    before the loop has come round `STEPS` times.

    With ten thousand tasks a turn of the loop may take longer than the whole time-out. Answers that have long arrived
    are then read after the timer has gone off, and a healthy server looks like a dead one.
    """

    STEPS: Final = 8

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._steps_left = self.STEPS
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._timeout.__aenter__()
        self._set_timer()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise TimeoutError(f"not done in {self._timeout_s} s") from error

    def _set_timer(self) -> None:
        self._timer = self._loop.call_later(self._timeout_s / self.STEPS, self._step)

    def _step(self) -> None:
        self._steps_left -= 1
        if self._steps_left:
            self._set_timer()
        else:
            self._timeout.reschedule(self._loop.time())
