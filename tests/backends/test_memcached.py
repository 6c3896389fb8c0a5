"""What the network, the server and a cancelled caller can do to the memcached backend, and what they cannot."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from asynccache.backends._aiomcache import Client
from asynccache.backends._endpoint import Address, Endpoint
from asynccache.backends._node import ROUNDS_MAX, exptime_of
from asynccache.backends.base import (
    UNCONFIRMED,
    UNREADABLE,
    UNSENT,
    Applied,
    Change,
    Key,
    NodeState,
    Transition,
    Write,
)
from asynccache.backends.memcached import MemcachedBackend, parse_address
from asynccache.errors import CacheClosedError, ConfigurationError, WrongLoopError
from tests.servers import FaultProxy, Memcached
from tests.watch import Watch

K, OTHER = Key(b"k", 0), Key(b"other", 0)
pytestmark = pytest.mark.without_sqlalchemy

PATIENT_S = 20.0  # for tests that are not about time
BOUND_S = 1.5  # what a timeout of 0.25 s may take on a busy machine


def put(value: bytes, ttl_s: float = 60) -> Transition:
    return lambda _: Write(value, ttl_s)


def leave(_: bytes | None) -> None:
    return None


def increment(before: bytes | None) -> Write:
    return Write(b"%d" % (int(before or 0) + 1), 60)


async def store(backend: MemcachedBackend, value: bytes, *keys: Key) -> None:
    for applied in await backend.apply([Change(key, put(value)) for key in keys]):
        assert applied.confirmed


async def read(backend: MemcachedBackend, key: Key = K) -> bytes | None:
    return (await backend.get_many([key]))[0]


async def apply(backend: MemcachedBackend, transition: Transition, key: Key = K, *, absent: bool = False) -> Applied:
    return (await backend.apply([Change(key, transition, absent)]))[0]


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


Ask = Callable[[MemcachedBackend], Coroutine[Any, Any, object]]


@pytest.fixture(params=["get_many", "apply"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """A command that something happens to."""
    if request.param == "get_many":
        return lambda backend: read(backend, OTHER)
    return lambda backend: apply(backend, put(b"asked"), OTHER)


def gave_up(answer: object) -> bool:
    return answer in (UNREADABLE, UNCONFIRMED, UNSENT)


@pytest.fixture
async def proxy(memcached_server: Memcached) -> AsyncIterator[FaultProxy]:
    """Between a backend and the server. Waits in the end until the backend has let go of its last connection."""
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        yield proxy
        await abandoned(proxy)


async def received(proxy: FaultProxy, chunks: int) -> None:
    await proxy.until(lambda: proxy.chunks_up == chunks)


async def abandoned(proxy: FaultProxy) -> None:
    await proxy.until(lambda: proxy.open == 0)


@asynccontextmanager
async def closing(backend: MemcachedBackend) -> AsyncGenerator[MemcachedBackend, None]:
    try:
        yield backend
    finally:
        await backend.aclose()


@pytest.fixture
async def backend(proxy: FaultProxy) -> AsyncIterator[MemcachedBackend]:
    """One connection, so that what a command leaves behind is met by the next."""
    async with closing(MemcachedBackend([f"{proxy.host}:{proxy.port}"], timeout_s=PATIENT_S, pool_size=1)) as backend:
        yield backend


@pytest.fixture
async def hasty(proxy: FaultProxy) -> AsyncIterator[MemcachedBackend]:
    async with closing(MemcachedBackend([f"{proxy.host}:{proxy.port}"], timeout_s=0.25)) as backend:
        yield backend


@pytest.fixture
async def direct(memcached_server: Memcached) -> AsyncIterator[MemcachedBackend]:
    """Past the proxy: what is really there."""
    address = f"{memcached_server.host}:{memcached_server.port}"
    async with closing(MemcachedBackend([address], timeout_s=PATIENT_S)) as backend:
        yield backend


def say(server: Memcached, *commands: bytes) -> bytes:
    """Speak to the server without any client, for a transition that must not wait."""
    with socket.create_connection((server.host, server.port)) as connection:
        connection.sendall(b"".join(commands) + b"quit\r\n")
        return b"".join(iter(lambda: connection.recv(4096), b""))


class Script:
    """A server that sends its next reply to whatever comes, and falls silent when it has none left.

    Beside that it says that it knows no settings, as proxies do.
    """

    def __init__(self, *replies: bytes) -> None:
        self.replies = list(replies)
        self.accepted = 0
        self.silent = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if data == b"stats settings\r\n":
                    writer.write(b"ERROR\r\n")
                elif self.replies:
                    writer.write(self.replies.pop(0))
                    await writer.drain()
                if not self.replies:
                    self.silent.set()
        writer.close()


@asynccontextmanager
async def scripted(
    *replies: bytes, timeout_s: float = PATIENT_S
) -> AsyncGenerator[tuple[Script, MemcachedBackend], None]:
    script = Script(*replies)
    async with await asyncio.start_server(script.serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with closing(MemcachedBackend([f"{host}:{port}"], timeout_s=timeout_s, pool_size=1)) as backend:
            yield script, backend


# Reading and applying


async def test_a_read_is_one_command_that_names_each_key_once(proxy: FaultProxy, backend: MemcachedBackend) -> None:
    await store(backend, b"1", K)
    commands, sent = backend.commands, proxy.bytes_up
    assert await backend.get_many([OTHER, K, OTHER, K]) == [None, b"1", None, b"1"]
    assert (backend.commands, proxy.bytes_up) == (commands + 1, sent + len(b"get other k\r\n"))
    assert await backend.get_many([]) == []
    assert await backend.apply([]) == []
    assert (backend.commands, proxy.bytes_up) == (commands + 1, sent + len(b"get other k\r\n"))


async def test_many_keys_are_several_commands_in_one_round_trip(proxy: FaultProxy, backend: MemcachedBackend) -> None:
    keys = [Key(b"key-%03d" % i, i) for i in range(300)]
    assert await backend.apply([Change(k, put(k.name), absent=True) for k in keys]) == [
        Applied(None, k.name) for k in keys
    ]
    assert backend.commands == len(keys)
    proxy.forward_replies.clear()
    reading = asyncio.create_task(backend.get_many(keys))
    asked = proxy.bytes_up + 3 * len(b"get \r\n") + len(keys) * len(b" key-000") - 3
    await proxy.until(lambda: proxy.bytes_up == asked)  # all three commands, before the first answer
    proxy.forward_replies.set()
    assert await reading == [key.name for key in keys]
    assert backend.commands == len(keys) + 3


async def test_a_transition_costs_a_gets_and_a_write(direct: MemcachedBackend) -> None:
    assert await apply(direct, increment) == Applied(None, b"1")
    assert await apply(direct, increment) == Applied(b"1", b"2")
    assert direct.commands == 4
    assert await apply(direct, leave) == Applied(b"2", b"2")
    assert direct.commands == 5


async def test_a_slot_said_to_be_absent_is_added_without_a_look(direct: MemcachedBackend) -> None:
    assert await apply(direct, increment, absent=True) == Applied(None, b"1")
    assert direct.commands == 1
    assert await apply(direct, increment, absent=True) == Applied(b"1", b"2")  # which was wrong
    assert direct.commands == 4
    assert await apply(direct, leave, absent=True) == Applied(b"2", b"2")  # and nothing to add: so it looks


async def test_two_changes_of_one_slot_happen_one_after_the_other(direct: MemcachedBackend) -> None:
    changes = [Change(K, increment, absent=True), Change(OTHER, increment), Change(K, increment, absent=True)]
    assert await direct.apply(changes) == [Applied(None, b"1"), Applied(None, b"1"), Applied(b"1", b"2")]


async def test_no_increment_is_lost_among_concurrent_writers(memcached_server: Memcached) -> None:
    node = f"{memcached_server.host}:{memcached_server.port}"
    async with closing(MemcachedBackend([node], timeout_s=PATIENT_S)) as backend:
        keys = [Key(b"counter-%d" % i, 0) for i in range(3)]
        batches = await asyncio.gather(*(backend.apply([Change(key, increment) for key in keys]) for _ in range(60)))
        confirmed = [sum(batch[i].confirmed for batch in batches) for i in range(3)]
        assert await backend.get_many(keys) == [b"%d" % n for n in confirmed]
        assert min(confirmed) > ROUNDS_MAX  # a few may have lost in all rounds


async def test_who_loses_every_race_is_told_that_nothing_is_confirmed(
    direct: MemcachedBackend, memcached_server: Memcached
) -> None:
    calls = 0

    def overtaken(before: bytes | None) -> Write:
        nonlocal calls
        calls += 1
        say(memcached_server, b"set k 0 0 5\r\nfirst\r\n")
        return Write(b"late", 60)

    assert await apply(direct, overtaken) == UNCONFIRMED
    assert calls == ROUNDS_MAX
    assert await read(direct) == b"first"


AWKWARD = [
    b"",
    b"\r\nEND\r\n",
    b"END\r\n",
    b"VALUE k 0 3 1\r\nabc\r\nEND\r\n",
    b"STORED\r\n",
    b"SERVER_ERROR out of memory\r\n",
    b"set other 0 0 3\r\nbad\r\n",
    bytes(range(256)),
    b"x" * 900_000,
]


@pytest.mark.parametrize("value", AWKWARD, ids=lambda value: repr(value[:20]))
async def test_values_are_bytes_even_if_they_look_like_protocol(direct: MemcachedBackend, value: bytes) -> None:
    for _ in range(2):
        await store(direct, value, K)
        assert await direct.get_many([OTHER, K]) == [None, value]
        assert await apply(direct, leave) == Applied(value, value)


async def test_a_value_that_another_client_wrote_with_flags_is_bytes_too(
    direct: MemcachedBackend, memcached_server: Memcached
) -> None:
    say(memcached_server, b"set k 77 0 3\r\nabc\r\n")
    assert await read(direct) == b"abc"


async def test_a_value_too_large_leaves_its_slot_as_it_was_and_hurts_no_neighbour(
    proxy: FaultProxy, backend: MemcachedBackend
) -> None:
    huge = put(b"x" * (1 << 20))
    await store(backend, b"old", K)
    changes = [Change(K, huge), Change(OTHER, huge), Change(Key(b"small", 0), put(b"new"))]
    refused, refused_where_absent, small = await backend.apply(changes)
    assert (refused, refused_where_absent, small) == (
        Applied(b"old", b"old"),
        Applied(None, None),
        Applied(None, b"new"),
    )
    assert await apply(backend, huge, absent=True) == Applied(b"old", b"old")  # the hint was wrong, the answer is not
    assert await backend.get_many([K, OTHER]) == [b"old", None]
    assert proxy.accepted == 2  # one writes, one reads


BAD_KEYS = [b"", b"x" * 251, "中".encode() * 100, b"a b", b"k\n", b"k\r\nflush_all", b"\x7f", b"\xff\xfe", b"\x00"]


@pytest.mark.parametrize("name", BAD_KEYS)
async def test_a_bad_key_never_reaches_the_server(direct: MemcachedBackend, name: bytes) -> None:
    await store(direct, b"alive", K)
    before = direct.commands
    value = b"set k 0 0 6\r\nhacked\r\n"
    with pytest.raises(ValueError, match="not a memcached key"):
        await direct.get_many([K, Key(name, 0)])
    for absent in (False, True):
        with pytest.raises(ValueError, match="not a memcached key"):
            await direct.apply([Change(K, put(value)), Change(Key(name, 0), put(value), absent)])
    assert direct.commands == before
    assert await read(direct) == b"alive"


async def test_a_key_of_250_bytes_is_as_good_as_any(direct: MemcachedBackend) -> None:
    longest = Key(b"x" * 250, 0)
    await store(direct, b"1", longest)
    assert await read(direct, longest) == b"1"


# Time to live


@pytest.mark.parametrize(
    ("ttl_s", "pinned", "exptime"),
    [
        (0.001, False, 1),
        (1, False, 1),
        (1.01, False, 2),
        (1, True, 2),
        (0, False, 1),
        (30 * 86400, False, 30 * 86400),
        (30 * 86400, True, 1_700_000_001 + 30 * 86400),  # above 30 days: a date
        (31 * 86400, False, 1_700_000_000 + 31 * 86400),
        (1e12, False, 2**31 - 1),
    ],
)
def test_expiration_is_rounded_up_and_never_for_ever(ttl_s: float, pinned: bool, exptime: int) -> None:
    assert exptime_of(Write(b"", ttl_s, pinned), 1_700_000_000.0) == exptime


@pytest.mark.parametrize("ttl_s", [31 * 86400, 100 * 365 * 86400, 1e300])
async def test_long_lives_are_stored_and_their_values_not_executed(direct: MemcachedBackend, ttl_s: float) -> None:
    assert await apply(direct, put(b"set other 0 0 6\r\nhacked", ttl_s)) == Applied(None, b"set other 0 0 6\r\nhacked")
    assert await direct.get_many([K, OTHER]) == [b"set other 0 0 6\r\nhacked", None]


async def test_a_slot_ends_with_its_time(direct: MemcachedBackend) -> None:
    await apply(direct, put(b"1", ttl_s=0.1))
    await asyncio.sleep(2.1)
    assert await read(direct) is None


# Cancelled callers


async def assert_unharmed(backend: MemcachedBackend, direct: MemcachedBackend) -> None:
    """Each answer belongs to its question: a connection that is one behind gives the wrong one here."""
    for i in range(3):
        await store(direct, b"%d" % i, K)
        assert await backend.get_many([K, Key(b"missing", 0)]) == [b"%d" % i, None]
        assert await apply(backend, put(b"mine")) == Applied(b"%d" % i, b"mine")
        assert await read(direct) == b"mine"


async def test_cancelled_before_it_is_sent(backend: MemcachedBackend, direct: MemcachedBackend, ask: Ask) -> None:
    await cancel(asyncio.create_task(ask(backend)))
    assert backend.commands == 0
    await assert_unharmed(backend, direct)


@pytest.mark.parametrize("at", ["request", "reply"])
@pytest.mark.parametrize("command", [b"gets other", b"add other"])
async def test_cancelled_while_it_waits_for_its_answer(
    proxy: FaultProxy, backend: MemcachedBackend, direct: MemcachedBackend, command: bytes, at: str
) -> None:
    await store(backend, b"warm", K)
    trap = proxy.hold_request(command) if at == "request" else proxy.hold_reply(command)
    task = asyncio.create_task(apply(backend, put(b"asked"), OTHER))
    await (trap.seen if at == "request" else trap.answered).wait()
    await cancel(task)
    assert await read(backend) == b"warm"  # on another connection
    trap.released.set()
    await assert_unharmed(backend, direct)


async def test_cancelled_when_the_answer_is_there(
    proxy: FaultProxy, backend: MemcachedBackend, direct: MemcachedBackend, ask: Ask
) -> None:
    for turns in range(40):  # cancel in each turn of the loop that the command takes
        task = asyncio.create_task(ask(backend))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        if turns % 4 == 0:
            await assert_unharmed(backend, direct)


async def test_cancelled_in_the_middle_of_a_body() -> None:
    body = b"VALUE k 0 8 1\r\nEND\r\nEND"
    async with scripted(body[:-4]) as (script, backend):
        task = asyncio.create_task(apply(backend, leave))
        await script.silent.wait()
        await cancel(task)
        script.replies = [b"END\r\n"]
        assert await apply(backend, leave) == Applied(None, None)
        assert script.accepted == 2


async def test_cancelled_while_it_waits_for_a_connection(
    proxy: FaultProxy, backend: MemcachedBackend, direct: MemcachedBackend
) -> None:
    proxy.forward_replies.clear()
    first = asyncio.create_task(apply(backend, leave))
    await received(proxy, 1)
    second = asyncio.create_task(apply(backend, put(b"asked"), OTHER))
    await asyncio.sleep(0)
    await cancel(second)
    proxy.forward_replies.set()
    assert await first == Applied(None, None)
    assert proxy.accepted == 1
    await assert_unharmed(backend, direct)


# Connections that end


@pytest.mark.parametrize("rst", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("offset", [*range(0, 46, 3), 60])
async def test_a_read_that_is_cut_off_is_unreadable(
    proxy: FaultProxy, backend: MemcachedBackend, direct: MemcachedBackend, offset: int, rst: bool
) -> None:
    await store(backend, b"END\r\nvalue", K, OTHER)
    proxy.cut_after(offset, rst=rst)
    assert await backend.get_many([K, OTHER]) == [UNREADABLE, UNREADABLE]
    await assert_unharmed(backend, direct)


@pytest.mark.parametrize("rst", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("offset", [0, 1, 4, 5, 6, 9, 12, 13, 15, 20])
async def test_a_write_that_is_cut_off_is_known_or_unconfirmed(
    proxy: FaultProxy, backend: MemcachedBackend, direct: MemcachedBackend, offset: int, rst: bool
) -> None:
    """The replies are END, STORED, STORED: 5, 8 and 8 bytes."""
    await apply(backend, leave)
    proxy.cut_after(offset, rst=rst)
    keys = [K, OTHER]
    applied = await backend.apply([Change(key, put(key.name)) for key in keys])
    if not rst:  # with RST the kernel may throw away what was received
        assert [one.confirmed for one in applied] == [offset >= 13, offset >= 21]
    for key, one, value in zip(keys, applied, await direct.get_many(keys), strict=True):
        assert value == one.after or (one == UNCONFIRMED and value in (None, key.name))
    await assert_unharmed(backend, direct)


async def test_a_write_whose_answer_was_lost_is_not_repeated(
    proxy: FaultProxy, backend: MemcachedBackend, direct: MemcachedBackend
) -> None:
    trap = proxy.hold_reply(b"add k")
    task = asyncio.create_task(apply(backend, increment))
    await trap.answered.wait()
    proxy.cut()
    assert await task == UNCONFIRMED
    assert await read(direct) == b"1"


async def test_a_connection_that_ended_while_idle_is_replaced(
    proxy: FaultProxy, backend: MemcachedBackend, direct: MemcachedBackend
) -> None:
    await store(backend, b"1", K)
    proxy.cut()
    await abandoned(proxy)
    assert await read(backend) == b"1"


async def test_a_dead_connection_does_not_strand_who_waits_for_it(proxy: FaultProxy, backend: MemcachedBackend) -> None:
    proxy.forward_replies.clear()
    first, *others = (asyncio.create_task(apply(backend, leave)) for _ in range(5))
    await received(proxy, 1)
    proxy.cut()
    proxy.forward_replies.set()
    assert await first == UNCONFIRMED
    assert await asyncio.gather(*others) == [Applied(None, None)] * 4


async def test_a_restart_between_gets_and_cas_makes_the_version_worthless(
    direct: MemcachedBackend, memcached_server: Memcached
) -> None:
    """
    1. `gets` gives version 1 of a slot on a fresh server.
    2. The server restarts and somebody stores another value, which gets version 1, too.
    3. The `cas` for version 1 would replace what its transition has never seen.
    """

    def version() -> bytes:
        say(memcached_server, b"set k 0 0 3\r\nold\r\n")
        found = re.search(rb"VALUE k 0 3 (\d+)", say(memcached_server, b"gets k\r\n"))
        assert found
        return found[1]

    memcached_server.restart()
    first_version = version()

    def restarted(before: bytes | None) -> Write:
        assert before == b"old"
        memcached_server.restart()
        assert version() == first_version
        return Write(b"stale", 60)

    assert await apply(direct, restarted) == UNCONFIRMED
    assert await read(direct) == b"old"
    await store(direct, b"new", K)


LIES = [
    b"VALUE k 0 3 1\r\nabc\r\nEND\r\n",  # an answer to another question
    b"VALUE other 0 2 1\r\nabcdEND\r\n",
    b"VALUE other 0 -1 1\r\nabc\r\nEND\r\n",
    b"VALUE other 0 3\r\nabc\r\nEND\r\n",
    b"STORED\r\n",
    b"ERROR\r\n",
    b"SERVER_ERROR out of memory\r\n",
    b"\r\n",
    b"x" * 200_000,
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: repr(lie[:30]))
async def test_an_answer_that_makes_no_sense_ends_the_connection(lie: bytes) -> None:
    async with scripted(lie, b"END\r\n") as (script, backend):
        assert await apply(backend, leave, OTHER) == UNCONFIRMED
        assert await apply(backend, leave) == Applied(None, None)
        assert script.accepted == 2


@pytest.mark.parametrize("lie", [b"ERROR\r\n", b"CLIENT_ERROR bad data chunk\r\n", b"END\r\n", b"STORED!\r\n"])
async def test_a_write_with_a_senseless_answer_is_unconfirmed(lie: bytes) -> None:
    async with scripted(lie, b"END\r\n") as (script, backend):
        assert await apply(backend, put(b"1"), absent=True) == UNCONFIRMED
        assert await read(backend) is None
        assert script.accepted == 2


async def test_bytes_that_nobody_asked_for_are_nobodys_answer() -> None:
    async with scripted(b"END\r\nVALUE k 0 3 1\r\nabc\r\nEND\r\n", b"END\r\n") as (script, backend):
        assert await apply(backend, leave) == Applied(None, None)
        assert await apply(backend, leave) == Applied(None, None)
        assert script.accepted == 2


# Servers in trouble


async def timed(awaitable: Awaitable[object]) -> tuple[object, float]:
    start_s = time.monotonic()
    return await awaitable, time.monotonic() - start_s


async def test_a_hung_server_costs_no_more_than_the_timeout(
    hasty: MemcachedBackend, memcached_server: Memcached, ask: Ask
) -> None:
    await store(hasty, b"1", K)
    memcached_server.pause()
    for _ in range(2):  # on a warm connection, and on a new one
        answer, took_s = await timed(ask(hasty))
        assert gave_up(answer)
        assert took_s < BOUND_S
    memcached_server.resume()
    assert await read(hasty) == b"1"


async def test_many_callers_of_a_hung_server_wait_no_longer_than_one(
    hasty: MemcachedBackend, memcached_server: Memcached, ask: Ask
) -> None:
    memcached_server.pause()
    answers, took_s = await timed(asyncio.gather(*(ask(hasty) for _ in range(100))))
    assert isinstance(answers, list)
    assert all(map(gave_up, answers))
    assert took_s < BOUND_S


async def test_a_server_that_refuses_is_unreadable_until_it_is_back(
    hasty: MemcachedBackend, memcached_server: Memcached, ask: Ask
) -> None:
    memcached_server.stop()
    for _ in range(20):  # more often than there are connections
        assert gave_up(await ask(hasty))
    watch = Watch(hasty)
    memcached_server.start()
    await watch.until(NodeState.CLOSED)
    assert await read(hasty) is None
    await store(hasty, b"1", K)
    assert await read(hasty) == b"1"


async def test_the_time_to_connect_is_bounded_by_itself(ask: Ask) -> None:
    # A full backlog: the kernel answers no more handshakes.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, contextlib.ExitStack() as crowd:
        for _ in range(4):
            client = crowd.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listening.getsockname())
        host, port = listening.getsockname()
        async with closing(
            MemcachedBackend([f"{host}:{port}"], connect_timeout_s=0.25, timeout_s=PATIENT_S)
        ) as backend:
            answer, took_s = await timed(ask(backend))
        assert gave_up(answer)
        assert took_s < BOUND_S


async def test_a_cold_pool_opens_no_more_connections_than_it_may(proxy: FaultProxy) -> None:
    async with closing(MemcachedBackend([f"{proxy.host}:{proxy.port}"], timeout_s=PATIENT_S, pool_size=4)) as backend:
        assert await asyncio.gather(*(apply(backend, leave) for _ in range(200))) == [Applied(None, None)] * 200
        assert proxy.accepted == 4
        assert await asyncio.gather(*(read(backend) for _ in range(200))) == [None] * 200
        assert proxy.accepted == 5  # all reads share one more


async def test_a_server_without_versions_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with Memcached("-C") as server:
        async with closing(MemcachedBackend([f"{server.host}:{server.port}"])) as backend:
            say(server, b"set k 0 0 5\r\nalive\r\n")
            for _ in range(3):
                assert not (await apply(backend, put(b"set k 0 0 6\r\nhacked"))).confirmed
            assert await read(backend) == UNREADABLE
            assert say(server, b"get k\r\n") == b"VALUE k 0 5\r\nalive\r\nEND\r\n"
        [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert (record.name, "-C" in record.getMessage(), str(server.port) in record.getMessage()) == (
            "asynccache",
            True,
            True,
        )


# Several nodes


async def test_a_key_lives_on_the_node_of_its_route(memcached_server: Memcached) -> None:
    with Memcached() as second:
        servers = [memcached_server, second]
        async with closing(MemcachedBackend([f"{s.host}:{s.port}" for s in servers], timeout_s=PATIENT_S)) as backend:
            keys = [Key(b"key-%d" % route, route) for route in range(5)]
            await store(backend, b"1", *keys)
            assert await backend.get_many(keys) == [b"1"] * 5
            for route, key in enumerate(keys):
                found = [b"VALUE" in say(server, b"get %b\r\n" % key.name) for server in servers]
                assert found == [route % 2 == 0, route % 2 == 1]


async def test_a_node_in_trouble_spoils_its_own_keys_only(memcached_server: Memcached) -> None:
    with Memcached() as second:
        nodes = [f"{server.host}:{server.port}" for server in (memcached_server, second)]
        async with closing(MemcachedBackend(nodes, timeout_s=0.25)) as backend:
            keys = [Key(b"key-%d" % route, route) for route in range(4)]
            await store(backend, b"1", *keys)
            for trouble in (second.pause, second.stop):
                trouble()
                answers, took_s = await timed(backend.get_many(keys))
                assert answers == [b"1", UNREADABLE, b"1", UNREADABLE]
                assert took_s < BOUND_S
                assert await backend.apply([Change(key, put(b"1")) for key in keys]) == [
                    Applied(b"1", b"1"),
                    UNCONFIRMED,
                    Applied(b"1", b"1"),
                    UNCONFIRMED,
                ]


async def test_nodes_are_asked_at_the_same_time(memcached_server: Memcached) -> None:
    upstream = (memcached_server.host, memcached_server.port)
    async with (
        FaultProxy(upstream) as one,
        FaultProxy(upstream) as two,
        closing(MemcachedBackend([f"{p.host}:{p.port}" for p in (one, two)], timeout_s=PATIENT_S)) as backend,
    ):
        one.forward_replies.clear()
        two.forward_replies.clear()
        reading = asyncio.create_task(backend.get_many([Key(b"a", 0), Key(b"b", 1)]))
        await received(one, 1)
        await received(two, 1)
        one.forward_replies.set()
        two.forward_replies.set()
        assert await reading == [None, None]
        await backend.aclose()
        await abandoned(one)
        await abandoned(two)


# Life and end


async def test_closing_ends_all_that_is_under_way(proxy: FaultProxy) -> None:
    tasks_before = asyncio.all_tasks()
    backend = MemcachedBackend([f"{proxy.host}:{proxy.port}"], timeout_s=PATIENT_S, pool_size=2)
    await asyncio.gather(read(backend), read(backend))
    proxy.forward_replies.clear()
    reading = asyncio.create_task(read(backend))
    writing = asyncio.create_task(apply(backend, put(b"1"), OTHER))
    waiting = asyncio.create_task(read(backend))
    await received(proxy, proxy.chunks_up + 2)
    await backend.aclose()
    assert (await reading, await writing, await waiting) == (UNREADABLE, UNCONFIRMED, UNREADABLE)
    await abandoned(proxy)
    assert asyncio.all_tasks() == tasks_before
    await backend.aclose()
    with pytest.raises(CacheClosedError):
        await read(backend)
    with pytest.raises(CacheClosedError):
        await apply(backend, leave)


async def test_closing_while_it_connects_leaves_no_connection(proxy: FaultProxy, ask: Ask) -> None:
    backend = MemcachedBackend([f"{proxy.host}:{proxy.port}"], timeout_s=PATIENT_S)
    connecting = asyncio.create_task(ask(backend))
    await asyncio.sleep(0)
    await backend.aclose()
    assert gave_up(await connecting)
    assert backend.commands == 0
    await abandoned(proxy)


Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on an event loop of its own."""
    return asyncio.run if request.param == "asyncio" else uvloop.run


def test_a_backend_outlives_event_loops_and_leaves_no_connection_behind(run: Run) -> None:
    async def use(backend: MemcachedBackend, expected: Applied) -> None:
        assert await apply(backend, increment) == expected
        assert await read(backend) == expected.after

    with Memcached() as server:
        backend = MemcachedBackend([f"{server.host}:{server.port}"], timeout_s=PATIENT_S)
        at_first = connections(server)
        run(use(backend, Applied(None, b"1")))
        run(use(backend, Applied(b"1", b"2")))
        asyncio.run(use(backend, Applied(b"2", b"3")))
        assert backend.commands == 9
        while connections(server) > at_first:  # the server takes its time to notice
            time.sleep(0.01)
        asyncio.run(backend.aclose())


def connections(server: Memcached) -> int:
    found = re.search(rb"STAT curr_connections (\d+)", say(server, b"stats\r\n"))
    assert found
    return int(found[1])


async def test_one_backend_does_not_serve_two_loops_at_once(direct: MemcachedBackend) -> None:
    await read(direct)
    with pytest.raises(WrongLoopError):
        await asyncio.to_thread(asyncio.run, read(direct))


def test_cancellation_and_time_are_kept_on_every_event_loop(memcached_server: Memcached, run: Run) -> None:
    async def main() -> None:
        async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
            node = f"{proxy.host}:{proxy.port}"
            async with closing(MemcachedBackend([node], timeout_s=0.25, pool_size=1)) as backend:
                await store(backend, b"1", K)
                trap = proxy.hold_reply(b"get other")
                task = asyncio.create_task(read(backend, OTHER))
                await trap.answered.wait()
                await cancel(task)
                trap.released.set()
                assert await read(backend) == b"1"
                proxy.forward_replies.clear()
                answer, took_s = await timed(read(backend))
                assert answer == UNREADABLE
                assert took_s < BOUND_S
                proxy.forward_replies.set()
                assert await read(backend) == b"1"

    run(main())


async def test_a_unix_socket_will_do(memcached_server: Memcached, tmp_path: Path) -> None:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies, server = await asyncio.open_connection(memcached_server.host, memcached_server.port)
        while data := await reader.read(65536):
            server.write(data)
            writer.write(await replies.read(65536))
        server.close()
        writer.close()

    path = tmp_path / "memcached.sock"
    async with (
        await asyncio.start_unix_server(relay, path),
        closing(MemcachedBackend.from_url(f"memcached+unix://{path}?timeout={PATIENT_S}")) as backend,
    ):
        await store(backend, b"1", K)
        assert await read(backend) == b"1"


# aiomcache's own commands, on the same client


@pytest.fixture
async def client(proxy: FaultProxy) -> AsyncIterator[Client]:
    client = Client(Endpoint(Address(proxy.host, proxy.port), connect_timeout_s=PATIENT_S), pool_size=1)
    yield client
    await client.close()


async def test_inherited_commands_survive_cancellation(proxy: FaultProxy, client: Client) -> None:
    await client.set(b"k", b"1")
    commands: list[Callable[[], Awaitable[object]]] = [
        lambda: client.set(b"k", b"2"),
        lambda: client.get(b"other"),
        client.stats,
    ]

    async def run(command: Callable[[], Awaitable[object]]) -> None:
        await command()

    for command in commands:
        proxy.forward_replies.clear()
        task = asyncio.create_task(run(command))
        await received(proxy, proxy.chunks_up + 1)
        await cancel(task)
        proxy.forward_replies.set()
        assert await client.get(b"missing") is None
        assert await client.add(b"k", b"3") is False
    assert await client.multi_get(b"k", b"k") == (b"2", b"2")


async def test_inherited_commands_end_with_their_connection(proxy: FaultProxy, client: Client) -> None:
    await client.set(b"k", b"1")
    for offset in (0, 4):
        await client.get(b"k")
        proxy.cut_after(offset)
        with pytest.raises(asyncio.IncompleteReadError):
            await client.set(b"k", b"2")
    assert await client.get(b"k") == b"2"


@pytest.mark.parametrize("version", [None, 0])
async def test_inherited_cas_refuses_to_go_without_a_version(client: Client, version: int | None) -> None:
    await client.set(b"k", b"alive")
    with pytest.raises(ValueError, match="cas of b'k' needs the version"):
        await client.cas(b"k", b"delete k", version)  # type: ignore[arg-type]
    assert await client.gets(b"k") == (b"alive", (await client.gets(b"k"))[1])


# Configuration


@pytest.mark.parametrize(
    ("node", "address"),
    [
        ("cache.example:1234", Address("cache.example", 1234)),
        ("cache", Address("cache", 11211)),
        ("10.0.0.1:1", Address("10.0.0.1", 1)),
        ("[::1]:1234", Address("::1", 1234)),
        ("[::1]", Address("::1", 11211)),
        ("/run/memcached.sock", Address("/run/memcached.sock", None)),
    ],
)
def test_nodes_are_hosts_or_sockets(node: str, address: Address) -> None:
    assert parse_address(node) == address


@pytest.mark.parametrize("node", ["", ":11211", "host:0", "host:65536", "host:x", "::1", "a b", "host:1\n"])
def test_a_bad_node_is_named(node: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(repr(node))):
        MemcachedBackend([node])


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "memcached://",
        "memcached://host,",
        "memcached://host:99999",
        "memcached://host/0",
        "memcached://host#x",
        "memcached://host?timeout=soon",
        "memcached://host?timeout=0",
        "memcached://host?timeout=nan",
        "memcached://host?pool_size=1.5",
        "memcached://host?pool_size=-1",
        "memcached://host?timeout=1&timeout=2",
        "memcached://host?retries=3",
        "memcached://host?timeout",
        "memcached://[::1",
        "memcached+unix://run/socket",
        "memcached+unix:///",
    ],
)
def test_a_bad_url_is_named_with_what_would_do(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        MemcachedBackend.from_url(url)
    assert repr(url) in str(caught.value)
    assert "memcached://host:port[,host:port...] or memcached+unix:///path" in str(caught.value)


async def test_a_url_sets_what_the_constructor_takes(proxy: FaultProxy, memcached_server: Memcached) -> None:
    hosts = f"{proxy.host}:{proxy.port},{memcached_server.host}:{memcached_server.port}"
    async with closing(
        MemcachedBackend.from_url(f"memcached://{hosts}?timeout=20&connect_timeout=20&pool_size=2")
    ) as backend:
        changes = (apply(backend, leave, Key(b"k", 0)) for _ in range(20))
        assert await asyncio.gather(*changes) == [Applied(None, None)] * 20
        assert proxy.accepted == 2
        await store(backend, b"1", Key(b"k", 1))
        assert await read(backend, Key(b"k", 0)) == b"1"  # it is the same server, past the proxy


@pytest.mark.parametrize(
    "arguments", [{"timeout_s": 0}, {"connect_timeout_s": -1}, {"pool_size": 0}, {"timeout_s": float("inf")}]
)
def test_impossible_numbers_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        MemcachedBackend(["host"], **arguments)


@pytest.mark.parametrize("nodes", [[], "host:11211"])
def test_nodes_are_a_list_of_at_least_one(nodes: Any) -> None:
    with pytest.raises(ConfigurationError, match="nodes"):
        MemcachedBackend(nodes)
