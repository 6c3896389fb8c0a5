"""How connections to memcached are made: TLS, authentication, the greeting; and what is refused, how long it takes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import ssl
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from asynccache import Cache
from asynccache.backends._aiomcache import Client
from asynccache.backends._endpoint import Address, AuthenticationError, Credentials, Endpoint, SteppedTimeout
from asynccache.backends.base import UNCONFIRMED, UNREADABLE, Applied, Change, Key, Transition, Write
from asynccache.backends.memcached import MemcachedBackend
from asynccache.errors import ConfigurationError
from tests.servers import FaultProxy, Memcached

pytestmark = pytest.mark.without_sqlalchemy

K = Key(b"k", 0)
PATIENT_S = 20.0  # for tests that are not about time
HASTY_S = 0.25
BOUND_S = 1.5  # what a timeout of 0.25 s may take on a busy machine

USER, PASSWORD = "bob", "s3cr:t/@?#%"
IN_URL = "bob:s3cr%3At%2F%40%3F%23%25"

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on an event loop of its own."""
    return asyncio.run if request.param == "asyncio" else uvloop.run


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls_server(ca: trustme.CA) -> Iterator[Memcached]:
    with Memcached(certificate=ca.issue_cert("127.0.0.1")) as server:
        yield server


@pytest.fixture(scope="module")
def closed_server() -> Iterator[Memcached]:
    """One that answers only who authenticates."""
    with Memcached(users={USER: PASSWORD}) as server:
        yield server


@pytest.fixture
def trusted(ca: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system trust our CA."""
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


def put(value: bytes) -> Transition:
    return lambda _: Write(value, 60)


def leave(_: bytes | None) -> None:
    return None


async def read(backend: MemcachedBackend) -> bytes | None:
    return (await backend.get_many([K]))[0]


async def apply(backend: MemcachedBackend, transition: Transition) -> Applied:
    return (await backend.apply([Change(K, transition)]))[0]


@asynccontextmanager
async def closing(backend: MemcachedBackend) -> AsyncGenerator[MemcachedBackend, None]:
    try:
        yield backend
    finally:
        await backend.aclose()


def node(server: Memcached | FaultProxy) -> str:
    return f"{server.host}:{server.port}"


def to(url: str) -> contextlib.AbstractAsyncContextManager[MemcachedBackend]:
    return closing(MemcachedBackend.from_url(f"{url}?timeout={PATIENT_S}&connect_timeout={PATIENT_S}"))


async def assert_works(backend: MemcachedBackend) -> None:
    for value in (b"1", b"x" * 500_000):
        assert (await apply(backend, put(value))).after == value
        assert await read(backend) == value


async def assert_refused(backend: MemcachedBackend) -> None:
    for _ in range(3):
        assert await read(backend) == UNREADABLE
        assert not (await apply(backend, put(b"refused"))).confirmed


def ask(server: Memcached, command: bytes) -> bytes:
    with server.connect() as connection:
        connection.sendall(command + b"quit\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# TLS


def test_reads_and_writes_go_over_tls(tls_server: Memcached, trusted: None, run: Run) -> None:
    async def main() -> None:
        async with to(tls_server.url) as backend:
            await assert_works(backend)
        await assert_works(backend := MemcachedBackend.from_url(tls_server.url))  # and nobody closes it

    run(main())
    gc.collect()


async def test_a_context_of_ones_own_brings_its_own_ca(tls_server: Memcached, ca: trustme.CA) -> None:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    async with closing(MemcachedBackend([node(tls_server)], tls=context, timeout_s=PATIENT_S)) as backend:
        await assert_works(backend)


async def test_a_client_certificate_is_shown(ca: trustme.CA) -> None:
    with Memcached(certificate=ca.issue_cert("127.0.0.1"), clients=ca) as server:
        context = ssl.create_default_context()
        ca.configure_trust(context)
        nodes = [node(server)]
        async with closing(
            MemcachedBackend(nodes, tls=context, timeout_s=HASTY_S, connect_timeout_s=HASTY_S)
        ) as backend:
            await assert_refused(backend)
        ca.issue_cert("client.example").configure_cert(context)
        async with closing(MemcachedBackend(nodes, tls=context, timeout_s=PATIENT_S)) as backend:
            await assert_works(backend)


async def test_an_unknown_ca_is_refused(tls_server: Memcached, caplog: pytest.LogCaptureFixture) -> None:
    ask(tls_server, b"set k 0 0 5\r\nalive\r\n")
    async with closing(MemcachedBackend([node(tls_server)], tls=True, timeout_s=PATIENT_S)) as backend:
        await assert_refused(backend)
    assert ask(tls_server, b"get k\r\n") == b"VALUE k 0 5\r\nalive\r\nEND\r\n"
    [message] = errors(caplog)
    assert f"memcached at {node(tls_server)} is not used" in message
    assert "unable to get local issuer certificate" in message
    assert "SSL_CERT_FILE" in message


async def test_a_certificate_for_another_name_is_refused(
    ca: trustme.CA, trusted: None, caplog: pytest.LogCaptureFixture
) -> None:
    with Memcached(certificate=ca.issue_cert("elsewhere.example")) as server:
        async with to(server.url) as backend:
            await assert_refused(backend)
        assert ask(server, b"get k\r\n") == b"END\r\n"
    [message] = errors(caplog)
    assert "IP address mismatch" in message


async def test_tls_to_a_server_that_speaks_none_is_refused(
    memcached_server: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [node(memcached_server)]
    async with closing(MemcachedBackend(nodes, tls=True, timeout_s=HASTY_S, connect_timeout_s=HASTY_S)) as backend:
        began_s = time.monotonic()
        assert await read(backend) == UNREADABLE
        assert not (await apply(backend, put(b"1"))).confirmed
        assert time.monotonic() - began_s < 2 * BOUND_S


async def test_no_tls_to_a_server_that_wants_it_is_refused(
    tls_server: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "asynccache")
    async with closing(MemcachedBackend([node(tls_server)], timeout_s=HASTY_S)) as backend:
        await assert_refused(backend)
    assert any("memcacheds://" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("tls", [True, ssl.create_default_context()], ids=["True", "context"])
def test_a_unix_socket_has_no_tls(tls: bool | ssl.SSLContext) -> None:
    with pytest.raises(ConfigurationError, match=r"/run/m\.sock is a unix socket.*without TLS"):
        MemcachedBackend(["host", "/run/m.sock"], tls=tls)
    with pytest.raises(ConfigurationError, match="the scheme is none of"):
        MemcachedBackend.from_url("memcacheds+unix:///run/m.sock")


def test_something_else_than_a_context_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"tls must be True, False or an ssl\.SSLContext, not 'yes'"):
        MemcachedBackend(["host"], tls="yes")  # type: ignore[arg-type]


# Authentication


@pytest.mark.parametrize("certified", [False, True], ids=["plain", "TLS"])
def test_user_and_password_open_both_channels(ca: trustme.CA, trusted: None, run: Run, certified: bool) -> None:
    certificate = ca.issue_cert("127.0.0.1") if certified else None

    async def main() -> None:
        async with to(server.url.replace("://", f"://{IN_URL}@")) as backend:
            await assert_works(backend)

    with Memcached(users={USER: PASSWORD}, certificate=certificate) as server:
        run(main())


async def test_every_new_connection_authenticates_first(closed_server: Memcached) -> None:
    async with FaultProxy((closed_server.host, closed_server.port)) as proxy:
        backend = MemcachedBackend([node(proxy)], timeout_s=PATIENT_S, user=USER, password=PASSWORD, pool_size=3)
        async with closing(backend):
            for connections in (4, 8):  # three of the pool, and one that reads
                await asyncio.gather(*(apply(backend, leave) for _ in range(20)))
                await assert_works(backend)
                assert proxy.accepted == connections
                proxy.cut()
                await proxy.until(lambda: proxy.open == 0)


async def test_a_unix_socket_authenticates_too(closed_server: Memcached, tmp_path: Path) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies, server = await asyncio.open_connection(closed_server.host, closed_server.port)
        await asyncio.gather(pump(reader, server), pump(replies, writer))

    async with (
        await asyncio.start_unix_server(relay, tmp_path / "socket"),
        to(f"memcached+unix://{IN_URL}@{tmp_path}/socket") as backend,
    ):
        assert (await apply(backend, put(b"1"))).after == b"1"
        assert await read(backend) == b"1"


async def test_a_server_that_wants_no_password_keeps_none(memcached_server: Memcached) -> None:
    async with to(f"memcached://{IN_URL}@{node(memcached_server)}") as backend:
        await assert_works(backend)
    assert ask(memcached_server, b"get asynccache:authentication\r\n") == b"END\r\n"


WRONG: list[dict[str, Any]] = [{"user": USER, "password": "wrong"}, {"user": "eve", "password": PASSWORD}, {}]


@pytest.mark.parametrize("credentials", WRONG, ids=["wrong password", "wrong user", "none"])
@pytest.mark.parametrize("first", [read, lambda backend: apply(backend, put(b"1"))], ids=["read", "write"])
async def test_who_does_not_authenticate_is_refused_and_told_once(
    closed_server: Memcached,
    caplog: pytest.LogCaptureFixture,
    credentials: dict[str, Any],
    first: Callable[[MemcachedBackend], Awaitable[object]],
) -> None:
    caplog.set_level(logging.DEBUG)
    async with closing(MemcachedBackend([node(closed_server)], timeout_s=PATIENT_S, **credentials)) as backend:
        assert await first(backend) in (UNREADABLE, UNCONFIRMED)
        [message] = errors(caplog)
        await assert_refused(backend)
    assert errors(caplog) == [message]
    assert f"memcached at {node(closed_server)} is not used: it " in message
    assert ("none are configured" in message) == (not credentials)
    assert not {"wrong", PASSWORD, "eve"} & set(caplog.text.split())


async def test_the_pool_says_why_it_does_not_connect(closed_server: Memcached) -> None:
    address = Address(closed_server.host, closed_server.port)
    for credentials in (None, Credentials(USER, "wrong")):
        client = Client(Endpoint(address, None, credentials), pool_size=1)
        with pytest.raises(AuthenticationError):
            await client.get(b"k")
        await client.close()


ANSWERS = [
    b"STORED",  # without an end
    b"STORED\r\nEND\r\n",
    b"-ERR unknown command 'bob', with args beginning with: 's3cr:t/@?#%'\r\n",  # as Redis does
    b"x" * 10_000,
    b"",
    None,
]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: repr(answer and answer[:20]))
async def test_an_answer_that_is_none_is_not_taken_for_a_welcome(
    answer: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                seen.append(data)
                if answer is None:
                    break
                writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with closing(
            MemcachedBackend(
                [f"{host}:{port}"], timeout_s=HASTY_S, connect_timeout_s=HASTY_S, user=USER, password=PASSWORD
            )
        ) as backend:
            assert (await read(backend), await apply(backend, leave)) == (UNREADABLE, UNCONFIRMED)
    assert set(seen) == {Credentials(USER, PASSWORD).command}  # and not a command more
    assert PASSWORD not in caplog.text


# The password is nowhere to be seen

BAD_URLS = [
    "memcached://bob:sEcReT@host:port",
    "memcached://bob:sEcReT@",
    "memcached://bob:sEcReT@host?retries=3",
    "memcached://bob:sEcReT@host?timeout",
    "memcached://bob:sEcReT@host/0",
    "memcached://bob:sEcReT@[::1",
    "memcached://bob:sEcReT@ho\u2100st",  # which urlsplit refuses with all that is before the host
    "memcached://bob\u2100:sEcReT@host\u2100",
    "memcached://bob:%ff%fesEcReT@host",
    "memcached://bob:sEcReT%0d%0a@host",
    "memcached://bob:sEcReT\r\n@host:port",
    "memcached://bob:sEcReT x@host",
    "memcached://bob:sEcReT%20x@host",
    "memcached://:sEcReT@host",
    "memcached://sEcReT@host",
    "memcached://sEcReT:@host",
    "memcached://bob:sEcReT/x@host",
    "memcached://bob:sEcReT?x@host",
    "memcached://bob:sEcReT#x@host",
    "memcached://bob:sEcReT@x@host",
    "memcached://bob:x@sEcReT@host",
    "memcached://a,bob:sEcReT@host:x",
    "memcached://bob:sEcReT@host,bob:sEcReT@other",
    "memcached:bob:sEcReT@host",
    "memcached+unix://bob:sEcReT@run/socket",
    "memcacheds+unix://bob:sEcReT@/run/socket",
    "redis://bob:sEcReT@host",
    "bob:sEcReT@host",
    "REDIS://bob:sEcReT\n@host",
]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        yield from chain(error.__cause__)
        error = error.__context__


@pytest.mark.parametrize("url", BAD_URLS)
@pytest.mark.parametrize("make", [Cache, MemcachedBackend.from_url])
def test_a_bad_url_does_not_show_its_password(url: str, make: Callable[[str], object]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(url)
    for error in chain(caught.value):
        assert "sEcReT" not in f"{error} {error!r} {vars(error)} {error.args}"
    assert "sEcReT" not in "".join(traceback.format_exception(caught.value))
    assert "***@" in str(caught.value)


@pytest.mark.parametrize("nodes", ["bob:sEcReT@host", ["bob:sEcReT@host"], ["a", "bob:sEcReT@host:x"]])
def test_a_bad_node_does_not_show_its_password(nodes: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        MemcachedBackend(nodes)
    assert "sEcReT" not in str(caught.value)


@pytest.mark.parametrize("bad", ["", "a b", "a\r", "a\nflush_all", "a\0b", "\udcff"])
def test_a_user_or_password_that_would_break_the_command_is_refused(bad: str) -> None:
    for user, password, wrong in (("bob", bad, "password"), (bad, "sEcReT", "user")):
        with pytest.raises(ConfigurationError, match=f"the {wrong} is empty, or has a space") as caught:
            MemcachedBackend(["host"], user=user, password=password)
        assert "sEcReT" not in str(caught.value)
        if bad:
            assert bad not in str(caught.value).split("'")


@pytest.mark.parametrize("half", [{"user": "bob"}, {"password": "sEcReT"}])
def test_a_user_and_a_password_come_together(half: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="wants both a user and a password"):
        MemcachedBackend(["host"], **half)


async def test_no_repr_and_no_log_shows_a_password(
    closed_server: Memcached, memcached_server: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    url = f"memcached://{IN_URL}@{node(closed_server)}"
    cache = Cache(url)
    backend = MemcachedBackend.from_url(url)
    await assert_works(backend)
    [one] = backend._nodes
    for thing in (
        cache,
        backend,
        one,
        one.client,
        one.client.endpoint,
        one.client.endpoint.credentials,
        one.client._pool,
        one.client._pool._idle,
        one.channel,
        one.channel._pipeline,
        asyncio.all_tasks(),
    ):
        assert PASSWORD not in repr(thing)
        assert PASSWORD not in str(thing)
    await cache.aclose()
    await backend.aclose()
    assert PASSWORD not in caplog.text


# The greeting


async def test_a_server_without_versions_is_not_even_asked(caplog: pytest.LogCaptureFixture) -> None:
    with Memcached("-C") as server:
        async with (
            FaultProxy((server.host, server.port)) as proxy,
            closing(MemcachedBackend([node(proxy)], timeout_s=PATIENT_S)) as backend,
        ):
            for _ in range(3):
                assert not (await apply(backend, put(b"1"))).confirmed
                assert proxy.bytes_up % len(b"stats settings\r\n") == 0
            assert backend.commands == 0
            await proxy.until(lambda: proxy.open == 0)
    [message] = errors(caplog)
    assert "start it without -C" in message


async def test_the_settings_of_the_server_are_known(memcached_server: Memcached) -> None:
    client = Client(Endpoint(Address(memcached_server.host, memcached_server.port)), pool_size=1)
    assert client.settings == {}
    async with client.connection(PATIENT_S) as conn:
        assert client.settings["cas_enabled"] == "yes"
        assert client.settings["maxbytes"] == str(64 << 20)
        stats = await client.server_stats(conn)
        assert stats["version"] == "1.6.18" or int(stats["pid"]) > 0
        assert await client.server_stats(conn, b"nonsense") == {}
        assert await client.server_stats(conn, b"slabs") == await client.server_stats(conn, b"slabs")
    assert client._pool._idle == [conn]
    assert client.commands == 0
    await client.close()


STATS = [
    b"STAT a 1\r\nERROR\r\n",
    b"STAT a\r\n" * 10_001 + b"END\r\n",
    b"STAT " + b"a" * 100_000,
    b"VALUE k 0 1\r\nx\r\nEND\r\n",
    b"SERVER_ERROR out of memory\r\n",
    b"STORED\r\n",
    b"END\r\nEND\r\n",
]


@pytest.mark.parametrize("answer", STATS, ids=lambda answer: repr(answer[:20]))
async def test_a_senseless_answer_to_the_greeting_ends_the_connection(answer: bytes) -> None:
    async with serving(answer) as (host, port, seen):
        async with closing(MemcachedBackend([f"{host}:{port}"], timeout_s=PATIENT_S)) as backend:
            assert await apply(backend, put(b"1")) == UNCONFIRMED
        assert seen == [b"stats settings\r\n"]


@asynccontextmanager
async def serving(answer: bytes) -> AsyncGenerator[tuple[str, int, list[bytes]], None]:
    """A server that gives one answer to whatever comes."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                seen.append(data)
                writer.write(answer)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield host, port, seen


# How long it takes


@pytest.fixture
async def proxy(memcached_server: Memcached) -> AsyncGenerator[FaultProxy, None]:
    """Between a backend and the server. Waits in the end until the backend has let go of its last connection."""
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        yield proxy
        await proxy.until(lambda: proxy.open == 0)


def pool_of(backend: MemcachedBackend) -> Any:
    return backend._nodes[0].client._pool


async def test_a_greeting_without_an_answer_costs_an_operation_no_more_than_its_timeout(proxy: FaultProxy) -> None:
    tasks = asyncio.all_tasks()
    proxy.forward_replies.clear()
    backend = MemcachedBackend([node(proxy)], timeout_s=HASTY_S, connect_timeout_s=4 * HASTY_S, pool_size=2)
    async with closing(backend):
        began_s = time.monotonic()
        answers = await asyncio.gather(*(apply(backend, put(b"1")) for _ in range(50)))
        assert answers == [UNCONFIRMED] * 50
        assert HASTY_S * 0.9 < time.monotonic() - began_s < BOUND_S
        assert proxy.accepted == 2
        await proxy.until(lambda: proxy.open == 0)  # without anybody's help
        assert 4 * HASTY_S * 0.9 < time.monotonic() - began_s < 4 * BOUND_S
        assert not pool_of(backend)._waiters
        while pool_of(backend)._attempts:
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == tasks


async def test_a_slow_greeting_is_there_for_a_later_operation(proxy: FaultProxy) -> None:
    backend = MemcachedBackend([node(proxy)], timeout_s=HASTY_S, connect_timeout_s=PATIENT_S, pool_size=1)
    async with closing(backend):
        greeting = proxy.hold_reply(b"stats settings")
        assert await apply(backend, put(b"1")) == UNCONFIRMED
        assert await apply(backend, put(b"1")) == UNCONFIRMED  # which waits for the same
        greeting.released.set()
        while not pool_of(backend)._idle:
            await asyncio.sleep(0.001)
        assert await apply(backend, put(b"1")) == Applied(None, b"1")
        assert proxy.accepted == 1


async def test_closing_does_not_wait_for_a_greeting(proxy: FaultProxy) -> None:
    tasks = asyncio.all_tasks()
    greeting = proxy.hold_reply(b"stats settings")
    backend = MemcachedBackend([node(proxy)], timeout_s=HASTY_S, connect_timeout_s=PATIENT_S)
    assert await apply(backend, put(b"1")) == UNCONFIRMED  # and the attempt goes on
    waiting = asyncio.create_task(apply(backend, put(b"1")))
    await greeting.answered.wait()
    while not pool_of(backend)._waiters:
        await asyncio.sleep(0)
    async with asyncio.timeout(BOUND_S):
        await backend.aclose()
    assert await waiting == UNCONFIRMED
    await proxy.until(lambda: proxy.open == 0)
    assert asyncio.all_tasks() == tasks


async def test_whoever_waits_takes_what_another_had_begun(proxy: FaultProxy) -> None:
    backend = MemcachedBackend([node(proxy)], timeout_s=PATIENT_S, connect_timeout_s=PATIENT_S)
    async with closing(backend):
        greeting = proxy.hold_reply(b"stats settings")
        first = asyncio.create_task(apply(backend, leave))
        await greeting.answered.wait()
        first.cancel()
        await asyncio.wait({first})
        second = asyncio.create_task(apply(backend, leave))
        await asyncio.sleep(0)
        greeting.released.set()
        assert await second == Applied(None, None)
        assert proxy.accepted == 1


async def test_a_pool_whose_callers_gave_up_has_no_more_connections_than_it_may(proxy: FaultProxy) -> None:
    backend = MemcachedBackend([node(proxy)], timeout_s=HASTY_S, connect_timeout_s=PATIENT_S, pool_size=3)
    async with closing(backend):
        proxy.forward_replies.clear()
        for _ in range(2):
            assert await asyncio.gather(*(apply(backend, leave) for _ in range(10))) == [UNCONFIRMED] * 10
        proxy.forward_replies.set()
        while len(pool_of(backend)._idle) < 3:
            await asyncio.sleep(0.001)
        assert await asyncio.gather(*(apply(backend, leave) for _ in range(100))) == [Applied(None, None)] * 100
        assert proxy.accepted == proxy.open == 3


async def test_the_error_of_an_attempt_that_nobody_waits_for_is_told(
    closed_server: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    async with FaultProxy((closed_server.host, closed_server.port)) as proxy:
        greeting = proxy.hold_reply(b"stats settings")
        async with closing(MemcachedBackend([node(proxy)], timeout_s=HASTY_S, connect_timeout_s=PATIENT_S)) as backend:
            assert await apply(backend, leave) == UNCONFIRMED
            greeting.released.set()
            await proxy.until(lambda: proxy.open == 0)
            while pool_of(backend)._attempts:
                await asyncio.sleep(0)
    [message] = errors(caplog)
    assert "none are configured" in message


def test_cancelled_anywhere_on_the_way_to_a_connection_leaks_nothing(closed_server: Memcached, run: Run) -> None:
    async def main() -> None:
        async with FaultProxy((closed_server.host, closed_server.port)) as proxy:
            tasks = asyncio.all_tasks()
            for turns in range(40):
                backend = MemcachedBackend(
                    [node(proxy)], timeout_s=PATIENT_S, pool_size=1, user=USER, password=PASSWORD
                )
                async with closing(backend):
                    first, second, third = (asyncio.create_task(apply(backend, leave)) for _ in range(3))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    first.cancel()
                    third.cancel()
                    await asyncio.wait({first, third})
                    assert (await second).confirmed
                    pool = pool_of(backend)
                    assert (pool._in_use, pool._attempts, len(pool._waiters)) == (set(), set(), 0)
                    assert len(pool._idle) <= 1  # 0: the third was cancelled while its answer was under way
                    assert (await apply(backend, leave)).confirmed
            await proxy.until(lambda: proxy.open == 0)
            assert asyncio.all_tasks() == tasks

    run(main())
    gc.collect()


@pytest.mark.parametrize("end", ["close", "loop"])
def test_ending_anywhere_on_the_way_to_a_connection_leaks_nothing(
    ca: trustme.CA, trusted: None, run: Run, end: str
) -> None:
    certificate = ca.issue_cert("127.0.0.1")
    with Memcached(users={USER: PASSWORD}, certificate=certificate) as server:
        at_first = connections(server)

        async def main(turns: int) -> None:
            backend = MemcachedBackend(
                [node(server)], tls=True, timeout_s=PATIENT_S, pool_size=1, user=USER, password=PASSWORD
            )
            changing, reading = asyncio.create_task(apply(backend, leave)), asyncio.create_task(read(backend))
            for _ in range(turns):
                await asyncio.sleep(0 if turns < 20 else 0.0005)
            if end == "close":
                await backend.aclose()
                assert await changing in (UNCONFIRMED, Applied(None, None))
                assert await reading in (UNREADABLE, None)
                assert asyncio.all_tasks() == {asyncio.current_task()}

        for turns in range(1, 40):
            run(main(turns))
        gc.collect()
        while connections(server) > at_first:
            time.sleep(0.01)


def connections(server: Memcached) -> int:
    [line] = [line for line in ask(server, b"stats\r\n").split(b"\r\n") if line.startswith(b"STAT curr_connections ")]
    return int(line.split()[2])


# A loop that stalls


async def stall(turns: int, turn_s: float) -> None:
    for _ in range(turns):
        time.sleep(turn_s)  # noqa: ASYNC251 (that is the point)
        await asyncio.sleep(0)


async def test_a_loop_that_stalls_does_not_count_against_the_server(memcached_server: Memcached) -> None:
    """A turn of the loop takes longer than the time-out. The server has long answered when its answer is read."""
    async with closing(MemcachedBackend([node(memcached_server)], timeout_s=0.05, connect_timeout_s=0.05)) as backend:
        stalling = asyncio.create_task(stall(20, turn_s=0.06))
        assert await apply(backend, put(b"1")) == Applied(None, b"1")
        await stalling


async def test_a_stepped_timeout_takes_its_time_and_no_longer() -> None:
    began_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done in 0\.2 s"):
        async with SteppedTimeout(0.2):
            await asyncio.Event().wait()
    assert 0.19 < time.monotonic() - began_s < BOUND_S
    async with SteppedTimeout(0.01):
        pass
    await asyncio.sleep(0.05)  # and what is left of it harms nobody
    with pytest.raises(TimeoutError, match="my own"):
        async with SteppedTimeout(PATIENT_S):
            raise TimeoutError("my own")


async def test_a_stepped_timeout_does_not_swallow_a_cancellation() -> None:
    async def wait() -> None:
        async with SteppedTimeout(PATIENT_S):
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
