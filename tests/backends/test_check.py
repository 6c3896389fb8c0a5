"""What is found out about real servers, started one way and another, and about those that are in trouble."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from asynccache.backends.base import Applied, Change, Key, Write
from asynccache.backends.memcached import MemcachedBackend
from asynccache.backends.memory import MemoryBackend
from asynccache.backends.report import Level, NodeReport, lock_life_s
from asynccache.errors import CacheClosedError
from asynccache.protocol import is_locked_by, lock
from tests.servers import FaultProxy, Memcached

pytestmark = pytest.mark.without_sqlalchemy

PATIENT_S = 20.0  # for tests that are not about time
BOUND_S = 2.0  # what 0.25 s for an answer may take on a busy machine
LOCK_TTL_S = 10.0
PROTECTED = ("-o", "temporary_ttl=25")
TINY = ("-m", "1", "-I", "512k")  # MiB; memcached wants an item to be at most half of it


@asynccontextmanager
async def backend_on(*nodes: str, timeout_s: float = PATIENT_S) -> AsyncGenerator[MemcachedBackend, None]:
    backend = MemcachedBackend(nodes, timeout_s=timeout_s)
    try:
        yield backend
    finally:
        await backend.aclose()


def address(server: Memcached | FaultProxy) -> str:
    return f"{server.host}:{server.port}"


async def check(*servers: Memcached | FaultProxy, timeout_s: float = PATIENT_S) -> list[NodeReport]:
    async with backend_on(*map(address, servers), timeout_s=timeout_s) as backend:
        return await backend.check(lock_ttl_s=LOCK_TTL_S)


async def check_one(server: Memcached | FaultProxy, *, timeout_s: float = PATIENT_S) -> NodeReport:
    (report,) = await check(server, timeout_s=timeout_s)
    return report


def unwell(report: NodeReport) -> dict[str, Level]:
    """What is not as it should be, except that an answer took long: the machine may be busy."""
    return {
        finding.topic: finding.level
        for finding in report.findings
        if finding.level is not Level.OK and (finding.topic, finding.level) != ("reachable", Level.WARNING)
    }


def say(server: Memcached, *commands: bytes) -> bytes:
    """Speak to the server without any client."""
    with socket.create_connection((server.host, server.port)) as connection:
        connection.sendall(b"".join(commands) + b"quit\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def fill(server: Memcached, slots: int = 30_000) -> None:
    """Store more slots than fit into 1 MiB, as large as a lock: room is made among items of one size only."""
    say(server, *(b"set slot%d 0 300 22 noreply\r\n%b\r\n" % (i, b"x" * 22) for i in range(slots)))


# How it was started


async def test_a_memcached_as_it_is_installed_may_evict_locks(memcached: Memcached) -> None:
    report = await check_one(memcached)
    assert report.usable
    assert unwell(report) == {"locks": Level.WARNING}
    assert (report.node, report.reachable, report.error) == (address(memcached), True, None)
    assert (report.cas_enabled, report.evicts, report.temporary_ttl_s) == (True, True, 0)
    assert (report.item_size_max_bytes, report.memory_max_bytes) == (1 << 20, 64 << 20)
    assert (report.evictions, report.refusals) == (0, 0)
    assert report.connections_max is not None
    assert 900 < report.connections_max < 1024
    assert report.version is not None
    assert report.connections is not None
    assert report.connections >= 1
    assert report.round_trip_s is not None
    assert 0 < report.round_trip_s < PATIENT_S


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (PROTECTED, {}),
        (("-o", "temporary_ttl=20"), {"locks": Level.WARNING}),
        (("-o", "temporary_ttl=3600"), {"temporary_ttl": Level.WARNING}),
        (("-C", *PROTECTED), {"cas": Level.ERROR}),
        (("-M",), {"evictions": Level.WARNING}),
        (("-I", "32k", "-o", "slab_chunk_max=16,temporary_ttl=25"), {"item size": Level.WARNING}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_what_a_server_was_started_with_is_found(arguments: tuple[str, ...], found: dict[str, Level]) -> None:
    with Memcached(*arguments) as server:
        report = await check_one(server)
    assert unwell(report) == found
    assert report.usable is (Level.ERROR not in found.values())


async def test_a_running_server_can_be_told_to_protect_locks() -> None:
    with Memcached() as server:
        assert (await check_one(server)).locks_protected is False
        assert say(server, b"lru temp_ttl 25\r\n") == b"OK\r\n"
        report = await check_one(server)
    assert unwell(report) == {}
    assert report.locks_protected is True


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [((), False), (("-o", "temporary_ttl=20"), False), (("-o", "temporary_ttl=21"), True), (("-M",), True)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_a_lock_is_kept_by_a_full_server_if_the_report_says_so(arguments: tuple[str, ...], kept: bool) -> None:
    owner, row = b"o" * 12, Key(b"k", 0)
    assert lock_life_s(LOCK_TTL_S) == 21
    with Memcached(*TINY, *arguments) as server:
        async with backend_on(address(server)) as backend:
            locking = lock(owner, int(1000 * time.time()), int(1000 * LOCK_TTL_S))
            # Its deadline lies that far ahead when it is made, as here, or less.
            (locked,) = await backend.apply([Change(row, lambda found: now(locking(found)))])
            assert is_locked_by(locked.after, owner)
            fill(server)
            (slot,) = await backend.get_many([row])
            (report,) = await backend.check(lock_ttl_s=LOCK_TTL_S)
    assert report.locks_protected is kept
    assert is_locked_by(slot, owner) is kept


def now(write: Write | None) -> Write:
    assert write is not None
    assert write.pinned
    return write


# What has become of it


async def test_a_server_that_evicts_has_too_little_memory() -> None:
    with Memcached(*TINY, *PROTECTED) as server:
        assert unwell(await check_one(server)) == {}
        fill(server)
        full = await check_one(server)
        server.restart()
        assert unwell(await check_one(server)) == {}
    assert unwell(full) == {"evictions": Level.WARNING, "memory": Level.WARNING}
    assert full.evictions is not None
    assert full.evictions > 1000
    assert full.usable


async def test_a_server_that_must_not_evict_refuses() -> None:
    with Memcached(*TINY, "-M") as server:
        fill(server)
        report = await check_one(server)
    assert unwell(report) == {"evictions": Level.WARNING, "memory": Level.WARNING}
    assert report.evictions == 0
    assert report.refusals is not None
    assert report.refusals > 1000


async def test_a_server_that_has_few_connections_left_says_so() -> None:
    with Memcached("-c", "100", *PROTECTED) as server, contextlib.ExitStack() as clients:
        most = (await check_one(server)).connections_max
        assert most is not None
        many = most * 9 // 10
        for _ in range(many):
            clients.enter_context(socket.create_connection((server.host, server.port)))
        await until(lambda report: report.connections == many + 1, server)
        assert unwell(await check_one(server)) == {"connections": Level.WARNING}
        clients.close()
        await until(lambda report: report.connections == 1, server)
        assert unwell(await check_one(server)) == {}


async def test_a_server_that_has_no_connection_left_refuses() -> None:
    with Memcached("-c", "100", *PROTECTED) as server, contextlib.ExitStack() as clients:
        for _ in range(100):
            clients.enter_context(socket.create_connection((server.host, server.port)))
        await until(lambda report: not report.usable, server)
        report = await check_one(server)
        assert (report.usable, report.reachable) == (False, True)
        assert "Too many open connections" in str(report.error)
        clients.close()
        await until(lambda report: report.usable, server)


async def until(condition: Callable[[NodeReport], bool], server: Memcached) -> None:
    """The server counts connections as it gets round to them."""
    while not condition(await check_one(server)):
        await asyncio.sleep(0.01)


async def test_a_server_that_is_far_away_is_told_from_one_that_is_near(memcached_server: Memcached) -> None:
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        proxy.delay_s = 0.05
        report = await check_one(proxy)
        await proxy.until(lambda: proxy.open == 0)
    assert report.round_trip_s is not None
    assert report.round_trip_s >= 0.05
    assert [finding.level for finding in report.findings if finding.topic == "reachable"] == [Level.WARNING]
    assert report.usable


# Trouble


async def test_a_server_that_is_down_is_reported(memcached_server: Memcached) -> None:
    memcached_server.stop()
    down = await check_one(memcached_server)
    assert (down.usable, down.reachable, down.findings[0].level) == (False, False, Level.ERROR)
    assert str(memcached_server.port) in str(down.error)
    memcached_server.start()
    assert (await check_one(memcached_server)).usable


async def test_a_server_that_says_nothing_is_given_up_in_time(memcached_server: Memcached) -> None:
    memcached_server.pause()
    began_s = time.monotonic()
    silent = await check_one(memcached_server, timeout_s=0.25)
    assert time.monotonic() - began_s < BOUND_S
    assert (silent.usable, silent.reachable, silent.error) == (False, False, "no answer in time")
    memcached_server.resume()
    assert (await check_one(memcached_server)).usable


async def test_one_server_that_is_down_says_nothing_about_the_others(memcached: Memcached) -> None:
    with Memcached() as paused, Memcached() as stopped:
        paused.pause()
        stopped.stop()
        nodes = [memcached, paused, paused, paused, stopped, memcached]
        began_s = time.monotonic()
        reports = await check(*nodes, timeout_s=1)
        assert time.monotonic() - began_s < 2.9  # they are asked at once
    assert [report.node for report in reports] == [*map(address, nodes)]
    assert [report.usable for report in reports] == [True, False, False, False, False, True]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "it closed the connection"),
        (b"END", "it closed the connection"),
        (b"STAT version 1\r\n" * 10, "it closed the connection"),
        (b"SERVER_ERROR out of memory\r\n", "SERVER_ERROR out of memory"),
        (b"STAT a b\nSTAT c d\r\nEND\r\n", "STAT c d"),
        (b"VALUE k 0 1\r\n1\r\nEND\r\n", "VALUE k 0 1"),
        (b"".join(b"STAT %d x\r\n" % i for i in range(10_000)) + b"END\r\n", "answer to stats"),
        (b"STAT version " + b"1" * 100_000 + b"\r\nEND\r\n", "limit"),
    ],
    ids=["nothing", "half a line", "no end", "an error", "half a line end", "another answer", "too many", "too long"],
)
async def test_what_is_no_answer_is_trouble_with_that_server(answer: bytes, error: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            while await reader.readuntil(b"\r\n"):
                writer.write(answer)
                if not answer.endswith(b"END\r\n"):
                    break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with backend_on(f"{host}:{port}") as backend:
            (report,) = await backend.check(lock_ttl_s=LOCK_TTL_S)
    assert not report.usable
    assert error in str(report.error)


async def test_a_check_takes_one_of_the_backends_connections_and_gives_it_back(memcached_server: Memcached) -> None:
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        async with backend_on(address(proxy)) as backend:
            for _ in range(3):
                (report,) = await backend.check(lock_ttl_s=LOCK_TTL_S)
                assert report.usable
            assert proxy.accepted == 1
        await proxy.until(lambda: proxy.open == 0)


async def test_a_check_that_is_cancelled_leaves_nothing_behind(memcached_server: Memcached) -> None:
    async with (
        FaultProxy((memcached_server.host, memcached_server.port)) as proxy,
        backend_on(address(proxy)) as backend,
    ):
        proxy.forward_replies.clear()
        checking = asyncio.create_task(backend.check(lock_ttl_s=LOCK_TTL_S))
        await proxy.until(lambda: proxy.chunks_up == 1)
        checking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await checking
        await proxy.until(lambda: proxy.open == 0)
        proxy.forward_replies.set()
        assert await backend.apply([Change(Key(b"k", 0), lambda _: Write(b"1", 60))]) == [Applied(None, b"1")]
        (report,) = await backend.check(lock_ttl_s=LOCK_TTL_S)
        assert report.usable


async def test_a_closed_backend_is_not_asked(memcached: Memcached) -> None:
    async with backend_on(address(memcached)) as backend:
        pass
    with pytest.raises(CacheClosedError):
        await backend.check(lock_ttl_s=LOCK_TTL_S)


# Memory


async def test_memory_tells_its_bounds() -> None:
    backend = MemoryBackend(entries_max=2, value_bytes_max=1000)
    await backend.apply([Change(Key(b"k", 0), lambda _: Write(b"1", 60))])
    (report,) = await backend.check(lock_ttl_s=LOCK_TTL_S)
    assert (report.usable, report.reachable, report.item_size_max_bytes) == (True, True, 1000)
    assert [finding.found for finding in report.findings if finding.topic == "entries"] == ["1 of 2"]
    await backend.apply([Change(Key(b"l", 0), lambda _: Write(b"1", 60))])
    (report,) = await backend.check(lock_ttl_s=LOCK_TTL_S)
    assert {finding.topic for finding in report.findings if finding.level is not Level.OK} == {"entries"}
    await backend.apply([Change(Key(b"m", 0), lambda _: Write(b"1", 60))])
    (report,) = await backend.check(lock_ttl_s=LOCK_TTL_S)
    assert (report.evictions, report.refusals, report.locks_protected) == (1, 0, True)
    assert report.memory_used_bytes == backend.stats.bytes_used
    assert {finding.topic for finding in report.findings if finding.level is not Level.OK} == {"entries", "evictions"}
