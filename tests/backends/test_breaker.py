"""The circuit breaker before each memcached: nobody waits for a server that is known to be away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

import pytest

from asynccache import Change, Key, MemcachedBackend, NodeState, Write
from asynccache.backends._node import FAILURES_MAX
from asynccache.backends.base import UNCONFIRMED, UNREADABLE, UNSENT
from tests.servers import FaultProxy, Memcached
from tests.watch import Watch

pytestmark = pytest.mark.without_sqlalchemy

K: Final = Key(b"k", 0)
PUT: Final = Change(K, lambda _: Write(b"1", 60))
CLOSED, OPEN, HALF_OPEN = NodeState.CLOSED, NodeState.OPEN, NodeState.HALF_OPEN

DOWN = Memcached.stop, Memcached.start
SILENT = Memcached.pause, Memcached.resume
in_trouble = pytest.mark.parametrize("trouble", [DOWN, SILENT], ids=["down", "silent"])
Trouble = tuple[Callable[[Memcached], None], Callable[[Memcached], None]]


@pytest.fixture
async def backend(memcached_server: Memcached) -> AsyncIterator[MemcachedBackend]:
    backend = MemcachedBackend([f"{memcached_server.host}:{memcached_server.port}"], timeout_s=0.25)
    yield backend
    await backend.aclose()


async def read(backend: MemcachedBackend) -> bytes | None:
    return (await backend.get_many([K]))[0]


async def is_away(backend: MemcachedBackend) -> bool:
    """Whether reads and writes are answered without asking the server."""
    commands = backend.commands
    answers = (await backend.get_many([K, K]), await backend.apply([PUT, PUT]))
    return answers == ([UNREADABLE] * 2, [UNSENT] * 2) and backend.commands == commands


@in_trouble
async def test_reads_that_fail_in_a_row_open_it_and_a_probe_that_is_answered_closes_it(
    trouble: Trouble, backend: MemcachedBackend, memcached_server: Memcached
) -> None:
    fail, recover = trouble
    watch = Watch(backend)
    assert await read(backend) is None
    fail(memcached_server)
    for _ in range(FAILURES_MAX):
        assert not watch
        assert await read(backend) == UNREADABLE
    assert watch.states == [OPEN]
    assert await is_away(backend)

    recover(memcached_server)
    await watch.until(CLOSED)
    assert not (await backend.apply([PUT]))[0].before
    assert await read(backend) == b"1"


@in_trouble
async def test_so_do_writes(trouble: Trouble, backend: MemcachedBackend, memcached_server: Memcached) -> None:
    fail, recover = trouble
    watch = Watch(backend)
    fail(memcached_server)
    for _ in range(FAILURES_MAX):
        assert not watch
        assert await backend.apply([PUT]) == [UNCONFIRMED]
    assert await is_away(backend)
    recover(memcached_server)
    await watch.until(CLOSED)
    assert (await backend.apply([PUT]))[0].confirmed


async def test_an_answer_sets_the_count_back(backend: MemcachedBackend, memcached_server: Memcached) -> None:
    watch = Watch(backend)
    for _ in range(3):
        memcached_server.stop()
        for _ in range(FAILURES_MAX - 1):
            assert await read(backend) == UNREADABLE
            assert await backend.apply([PUT]) == [UNCONFIRMED]
        memcached_server.start()
        assert await read(backend) is None
        assert (await backend.apply([PUT]))[0].confirmed
    assert not watch


async def test_a_server_that_answers_reads_but_no_writes_is_away(memcached_server: Memcached) -> None:
    """The answers to its reads do not make its failures to write any fewer."""
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        backend = MemcachedBackend([f"{proxy.host}:{proxy.port}"], timeout_s=5, connect_timeout_s=5)
        watch = Watch(backend)
        for _ in range(FAILURES_MAX):
            trap = proxy.hold_request(b"gets ")
            writing = asyncio.create_task(backend.apply([PUT]))
            await trap.seen.wait()
            assert await read(backend) is None
            assert not watch
            proxy.cut()
            assert await writing == [UNCONFIRMED]
        assert watch.states == [OPEN]
        await backend.aclose()


@in_trouble
async def test_it_goes_on_probing_alone_for_as_long_as_it_takes(
    trouble: Trouble, backend: MemcachedBackend, memcached_server: Memcached
) -> None:
    fail, recover = trouble
    fail(memcached_server)
    watch = Watch(backend)
    for _ in range(FAILURES_MAX):
        await read(backend)
    while len(watch) < 5:
        await watch.until(HALF_OPEN)
        assert await is_away(backend), "a probe is on its way, and nobody else"
        await watch.until(OPEN)
    assert watch.states[:5] == [OPEN, HALF_OPEN, OPEN, HALF_OPEN, OPEN]
    recover(memcached_server)
    await watch.until(CLOSED)
    assert watch[-1].reason == ""
    assert {change.node for change in watch} == {f"{memcached_server.host}:{memcached_server.port}"}
    assert all(change.reason for change in watch if change.state is OPEN)


@in_trouble
async def test_it_is_told_once_when_it_opens_and_once_when_it_closes(
    trouble: Trouble, backend: MemcachedBackend, memcached_server: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    fail, recover = trouble
    fail(memcached_server)
    watch = Watch(backend)
    for _ in range(50):
        await read(backend)
        await backend.apply([PUT])
    while len(watch) < 5:
        await watch.until(HALF_OPEN)
        await watch.until(OPEN)
    recover(memcached_server)
    await watch.until(CLOSED)
    await asyncio.sleep(0)
    told = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert len(told) == 2
    assert f"{memcached_server.host}:{memcached_server.port} is not used until it answers again: " in told[0]
    assert "is used again, after " in told[1]


async def test_while_it_is_open_it_costs_less_than_a_millisecond(
    backend: MemcachedBackend, memcached_server: Memcached
) -> None:
    memcached_server.pause()
    for _ in range(FAILURES_MAX):
        await read(backend)
    keys, changes = [K] * 100, [PUT] * 100
    took_s: list[float] = []
    for _ in range(1000):
        before_s = time.thread_time()  # what it computes; the rest of the machine has nothing to do with it
        await backend.get_many(keys)
        await backend.apply(changes)
        took_s.append(time.thread_time() - before_s)
    assert backend.states == {f"{memcached_server.host}:{memcached_server.port}": OPEN}
    assert sorted(took_s)[990] < 0.001


async def test_who_waits_in_vain_for_a_connection_has_nothing_against_the_server(memcached_server: Memcached) -> None:
    backend = MemcachedBackend([f"{memcached_server.host}:{memcached_server.port}"], timeout_s=0.1, pool_size=1)
    watch = Watch(backend)
    assert (await backend.apply([PUT]))[0].confirmed
    client = backend._nodes[0].client
    connection = await client.acquire()
    waiting = [backend.apply([PUT]) for _ in range(2 * FAILURES_MAX)]
    assert await asyncio.gather(*waiting) == [[UNCONFIRMED]] * (2 * FAILURES_MAX)
    assert not watch
    client.release(connection)
    assert (await backend.apply([PUT]))[0].confirmed
    await backend.aclose()


async def test_a_server_without_versions_is_away_at_once_and_stays_so(caplog: pytest.LogCaptureFixture) -> None:
    with Memcached("-C") as server:
        backend = MemcachedBackend([f"{server.host}:{server.port}"])
        watch = Watch(backend)
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(b"set k 0 0 1\r\n1\r\n")
            assert connection.recv(64) == b"STORED\r\n"
        assert await backend.apply([PUT]) == [UNCONFIRMED]
        assert watch.states == [OPEN]
        assert "-C" in watch[0].reason
        await watch.until(HALF_OPEN)
        await watch.until(OPEN)
        assert await is_away(backend)
        await backend.aclose()
    assert sum("-C" in record.getMessage() for record in caplog.records if record.levelno > logging.INFO) == 1


@in_trouble
async def test_closing_ends_the_probes(
    trouble: Trouble, backend: MemcachedBackend, memcached_server: Memcached
) -> None:
    fail, _ = trouble
    fail(memcached_server)
    watch = Watch(backend)
    for _ in range(FAILURES_MAX):
        await read(backend)
    await watch.until(HALF_OPEN)
    await backend.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_closing_while_a_write_fails_begins_no_probe(
    backend: MemcachedBackend, memcached_server: Memcached
) -> None:
    assert (await backend.apply([PUT]))[0].confirmed
    memcached_server.pause()
    for _ in range(FAILURES_MAX - 1):
        assert await backend.apply([PUT]) == [UNCONFIRMED]
    commands = backend.commands
    writing = asyncio.create_task(backend.apply([PUT]))
    await asyncio.sleep(0)
    await backend.aclose()
    assert await writing == [UNCONFIRMED]
    assert backend.commands == commands, "it waited for a connection"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_server_to_which_connecting_takes_longer_than_a_call_is_found_back() -> None:
    with Memcached(users={"user": "password"}) as server:
        async with FaultProxy((server.host, server.port)) as proxy:
            proxy.delay_s = 0.16  # three answers, to the password, to the greeting and to the probe, take longer
            backend = MemcachedBackend.from_url(f"memcached://user:password@{proxy.host}:{proxy.port}?timeout=0.3")
            watch = Watch(backend)
            proxy.refuse()
            for _ in range(FAILURES_MAX):
                assert await read(backend) == UNREADABLE
            await proxy.accept()
            async with asyncio.timeout(20):
                await watch.until(CLOSED)
            assert await read(backend) is None
            await backend.aclose()


def test_what_was_known_on_one_event_loop_is_forgotten_on_the_next(memcached_server: Memcached) -> None:
    backend = MemcachedBackend([f"{memcached_server.host}:{memcached_server.port}"], timeout_s=5)

    async def fail() -> None:
        for _ in range(FAILURES_MAX):
            await read(backend)
        assert await is_away(backend)

    memcached_server.stop()
    asyncio.run(fail())
    memcached_server.start()
    assert asyncio.run(read(backend)) is None


async def test_a_server_that_takes_no_more_connections_is_away_until_it_does() -> None:
    with Memcached("-c", "40") as server, contextlib.ExitStack() as crowd:
        for _ in range(60):  # some of the 40 are its own
            crowd.enter_context(socket.create_connection((server.host, server.port)))
        backend = MemcachedBackend([f"{server.host}:{server.port}"], timeout_s=5)
        watch = Watch(backend)
        while not watch:
            assert await read(backend) == UNREADABLE
            assert not (await backend.apply([PUT]))[0].confirmed
        assert watch[0].state is OPEN
        crowd.close()
        await watch.until(CLOSED)
        assert (await backend.apply([PUT]))[0].confirmed
        assert await read(backend) == b"1"
        await backend.aclose()


async def test_connecting_that_was_cancelled_before_it_began_begins_again(backend: MemcachedBackend) -> None:
    """Somebody ends all tasks of the loop, and goes on."""
    reading = asyncio.create_task(read(backend))
    before = asyncio.all_tasks()
    while not (begun := asyncio.all_tasks() - before):
        await asyncio.sleep(0)
    for task in begun:
        task.cancel()
    assert await reading == UNREADABLE
    assert await read(backend) is None


async def test_probing_that_was_cancelled_begins_again(backend: MemcachedBackend, memcached_server: Memcached) -> None:
    memcached_server.stop()
    for _ in range(FAILURES_MAX):
        await read(backend)
    (probing,) = asyncio.all_tasks() - {asyncio.current_task()}
    probing.cancel()
    await asyncio.wait({probing})
    memcached_server.start()
    watch = Watch(backend)
    assert await read(backend) == UNREADABLE
    await watch.until(CLOSED)
    assert await read(backend) is None


async def test_a_tls_connection_that_is_cut_off_is_one_failure_of_several(backend: MemcachedBackend) -> None:
    (node,) = backend._nodes
    node.channel.failures = 1
    node.channel.on_failure(ssl.SSLEOFError("EOF occurred in violation of protocol"))
    assert node.state is CLOSED
    node.channel.on_failure(ssl.SSLCertVerificationError("self-signed"))
    assert node.state is OPEN
