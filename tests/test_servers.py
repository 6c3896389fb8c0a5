"""The servers that the other tests stand on: they run, and they fail when they are told to."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiomcache
import asyncpg
import pytest

from tests.servers import FaultProxy, Memcached, Postgres, process
from tests.servers.process import HOST, Process, cached, free_port, give_back_port

pytestmark = pytest.mark.without_sqlalchemy


# PostgreSQL


async def connect(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(url.replace("+asyncpg", ""))


async def test_postgres_answers_a_statement(postgres_url: str) -> None:
    connection = await connect(postgres_url)
    assert await connection.fetchval("SELECT 6 * 7") == 42
    await connection.close()


@pytest.mark.parametrize("attempt", [1, 2])
async def test_each_test_has_an_empty_database_of_its_own(postgres_url: str, attempt: int) -> None:
    connection = await connect(postgres_url)
    await connection.execute("CREATE TABLE foo ()")  # fails in the second attempt if it sees the first one's
    await connection.close()


async def test_dropping_a_database_throws_out_who_is_connected(postgres: Postgres) -> None:
    url = postgres.create_database()
    connection = await connect(url)
    postgres.drop_database(url)
    with pytest.raises((asyncpg.PostgresError, OSError)):
        await connection.fetchval("SELECT 1")
    connection.terminate()


async def test_postgres_can_prepare_a_transaction(postgres_url: str) -> None:
    connection = await connect(postgres_url)
    await connection.execute("BEGIN; CREATE TABLE foo (); PREPARE TRANSACTION 'half'")
    await connection.execute("ROLLBACK PREPARED 'half'")
    await connection.close()


# memcached


@pytest.fixture
async def client(memcached_server: Memcached) -> AsyncIterator[aiomcache.Client]:
    client = aiomcache.Client(memcached_server.host, memcached_server.port)
    yield client
    await client.close()


async def test_memcached_keeps_what_it_was_given(client: aiomcache.Client) -> None:
    await client.set(b"key", b"value")
    assert await client.get(b"key") == b"value"


async def test_a_flush_empties_memcached_for_what_came_before_only(
    client: aiomcache.Client, memcached_server: Memcached
) -> None:
    await client.set(b"old", b"value")
    memcached_server.flush()
    await client.set(b"new", b"value")
    assert await client.get(b"old") is None
    assert await client.get(b"new") == b"value"


async def test_a_restart_loses_the_data_and_keeps_the_port(memcached_server: Memcached) -> None:
    before = aiomcache.Client(memcached_server.host, memcached_server.port)
    await before.set(b"key", b"value")
    await before.close()
    memcached_server.restart()
    after = aiomcache.Client(memcached_server.host, memcached_server.port)
    assert await after.get(b"key") is None
    await after.close()


async def test_a_paused_memcached_hangs_until_it_is_resumed(
    client: aiomcache.Client, memcached_server: Memcached
) -> None:
    await client.set(b"key", b"value")
    memcached_server.pause()
    reading = asyncio.ensure_future(client.get(b"key"))
    done, _ = await asyncio.wait({reading}, timeout=0.2)
    assert not done
    memcached_server.resume()
    assert await reading == b"value"


async def test_a_stopped_memcached_refuses_connections(memcached_server: Memcached) -> None:
    memcached_server.pause()  # which must not keep it from ending
    memcached_server.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(memcached_server.host, memcached_server.port)


async def test_memcached_takes_more_arguments() -> None:
    with Memcached("-I", "2m") as server:
        client = aiomcache.Client(server.host, server.port)
        assert (await client.stats(b"settings"))[b"item_size_max"] == b"2097152"
        await client.close()


# Processes


def test_a_server_that_dies_shows_what_it_wrote() -> None:
    with pytest.raises(RuntimeError, match=r"ended with status 1\. It wrote:\nno such disk"):
        Process(["/bin/sh", "-c", "echo no such disk; exit 1"]).wait_until(lambda: False)


def test_a_server_that_does_not_come_up_is_ended() -> None:
    with pytest.raises(RuntimeError, match=r"was not ready in 0\.1 s"):
        Process(["sleep", "60"]).wait_until(lambda: False, timeout_s=0.1)


def test_a_server_and_its_folder_go_when_the_tests_are_killed() -> None:
    program = """
import sys
from tests.servers import Postgres
with Postgres() as server:
    print(server.port, server.folder, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as tests:
        assert tests.stdout is not None
        port, folder = tests.stdout.readline().split()
        with socket.create_connection((HOST, int(port))) as connection:
            tests.kill()
            assert connection.recv(1) == b""  # the server has ended
        while Path(folder).exists():
            time.sleep(0.01)


def test_no_process_gets_the_port_of_a_server_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    with Memcached() as server:
        server.stop()
        free = free_port()
        give_back_port(free)
        ports = [server.port] * 50 + [free]
        monkeypatch.setattr(process, "PORTS", ports)
        assert free_port() == free
        give_back_port(free)
        program = f"from tests.servers import process; process.PORTS = {ports}; print(process.free_port())"
        other = subprocess.run(
            [sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE
        )
    assert int(other.stdout) == free


def test_a_folder_that_is_kept_is_filled_once_whoever_else_asks_for_it_meanwhile() -> None:
    fills = 0
    begun = threading.Event()

    def fill(folder: Path) -> None:
        nonlocal fills
        fills += 1
        begun.set()
        time.sleep(0.2)  # the other has asked
        (folder / "file").touch()

    name = f"test-{uuid.uuid4()}"
    with ThreadPoolExecutor() as threads:
        first = threads.submit(cached, name, fill)
        begun.wait()
        folder = cached(name, fill)
    assert [each.name for each in folder.iterdir()] == ["file"]
    assert (first.result(), fills) == (folder, 1)
    shutil.rmtree(folder)
    folder.with_name(f"{name}.lock").unlink()


# The proxy, before a memcached

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def proxy(memcached_server: Memcached) -> AsyncIterator[FaultProxy]:
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        yield proxy


@pytest.fixture
async def streams(proxy: FaultProxy) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    yield reader, writer
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def is_silent(reader: asyncio.StreamReader) -> bool:
    try:
        await asyncio.wait_for(reader.read(1), 0.1)
    except TimeoutError:
        return True
    return False


async def test_the_proxy_forwards_and_counts(proxy: FaultProxy, streams: Streams) -> None:
    reader, writer = streams
    for _ in range(2):
        writer.write(b"mn\r\n")
        assert await reader.readline() == b"MN\r\n"
    assert (proxy.accepted, proxy.open, proxy.chunks_up, proxy.bytes_up) == (1, 1, 2, 8)
    writer.close()
    await proxy.until(lambda: proxy.open == 0)


async def test_the_proxy_delays_replies(proxy: FaultProxy, streams: Streams) -> None:
    reader, writer = streams
    proxy.delay_s = 0.1
    start_s = time.monotonic()
    writer.write(b"mn\r\n")
    await reader.readline()
    assert time.monotonic() - start_s >= 0.1


async def test_held_replies_flow_once_released(proxy: FaultProxy, streams: Streams) -> None:
    reader, writer = streams
    proxy.forward_replies.clear()
    writer.write(b"mn\r\n")
    await proxy.until(lambda: proxy.chunks_up == 1)
    assert await is_silent(reader)
    proxy.forward_replies.set()
    assert await reader.readline() == b"MN\r\n"


async def test_held_requests_reach_the_server_once_released(
    proxy: FaultProxy, streams: Streams, client: aiomcache.Client
) -> None:
    reader, writer = streams
    proxy.forward_requests.clear()
    writer.write(b"set key 0 0 5\r\nvalue\r\n")
    await proxy.until(lambda: proxy.chunks_up == 1)
    assert await client.get(b"key") is None
    proxy.forward_requests.set()
    assert await reader.readline() == b"STORED\r\n"


async def test_a_cut_ends_all_connections(proxy: FaultProxy, streams: Streams) -> None:
    await proxy.until(lambda: proxy.open == 1)
    proxy.cut()
    assert await streams[0].read() == b""
    await proxy.until(lambda: proxy.open == 0)


async def test_who_comes_while_the_server_is_down_is_hung_up_on(
    proxy: FaultProxy, memcached_server: Memcached, streams: Streams, caplog: pytest.LogCaptureFixture
) -> None:
    await proxy.until(lambda: proxy.open == 1)
    memcached_server.stop()
    assert await streams[0].read() == b""
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    await proxy.until(lambda: proxy.open == 0)
    gc.collect()  # asyncio logs an exception that nobody asked for when its task is collected
    assert not caplog.records


async def test_a_cut_with_rst_is_an_error_to_the_client(proxy: FaultProxy, streams: Streams) -> None:
    await proxy.until(lambda: proxy.open == 1)
    proxy.cut(rst=True)
    with pytest.raises(ConnectionResetError):
        await streams[0].read()


async def test_a_reply_is_cut_in_the_middle(proxy: FaultProxy, streams: Streams) -> None:
    reader, writer = streams
    proxy.cut_after(6)
    writer.write(b"mn\r\n")
    assert await reader.readline() == b"MN\r\n"
    writer.write(b"mn\r\n")
    assert await reader.read() == b"MN"


async def test_a_reply_is_cut_in_the_middle_with_rst(proxy: FaultProxy, streams: Streams) -> None:
    reader, writer = streams
    proxy.cut_after(2, rst=True)
    writer.write(b"mn\r\n")
    with pytest.raises(ConnectionResetError):
        await reader.readline()


async def test_refused_clients_come_back_once_accepted(proxy: FaultProxy, streams: Streams) -> None:
    reader, writer = streams
    await proxy.until(lambda: proxy.open == 1)
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(proxy.host, proxy.port)
    writer.write(b"mn\r\n")  # who was connected stays so
    assert await reader.readline() == b"MN\r\n"
    await proxy.accept()
    _, another = await asyncio.open_connection(proxy.host, proxy.port)
    await proxy.until(lambda: proxy.accepted == 2)
    another.close()
    await another.wait_closed()


async def test_a_trap_holds_the_reply_to_a_request_that_was_carried_out(
    proxy: FaultProxy, streams: Streams, client: aiomcache.Client
) -> None:
    reader, writer = streams
    trap = proxy.hold_reply(b"set key")
    writer.write(b"mn\r\n")
    assert await reader.readline() == b"MN\r\n"  # not the request that the trap waits for
    writer.write(b"set key 0 0 5\r\nvalue\r\n")
    await trap.answered.wait()
    assert trap.seen.is_set()
    assert await client.get(b"key") == b"value"
    assert await is_silent(reader)
    trap.released.set()
    assert await reader.readline() == b"STORED\r\n"


async def test_a_trap_holds_a_request_which_a_cut_then_loses(
    proxy: FaultProxy, streams: Streams, client: aiomcache.Client
) -> None:
    reader, writer = streams
    trap = proxy.hold_request(b"set key")
    writer.write(b"set key 0 0 5\r\nvalue\r\n")
    await trap.seen.wait()
    proxy.cut()
    assert await reader.read() == b""
    assert await client.get(b"key") is None


async def test_a_trap_recognises_a_request_in_pieces_and_only_once(proxy: FaultProxy, streams: Streams) -> None:
    reader, writer = streams
    first = proxy.hold_request(b"mn\r\n")
    writer.write(b"m")
    await proxy.until(lambda: proxy.chunks_up == 1)
    assert not first.seen.is_set()
    writer.write(b"n\r\n")
    await first.seen.wait()
    second = proxy.hold_request(b"mn\r\n")
    first.released.set()
    assert await reader.readline() == b"MN\r\n"
    writer.write(b"version\r\n")
    await reader.readline()
    assert not second.seen.is_set()


async def test_the_proxy_ends_while_a_client_does_not_read(memcached_server: Memcached) -> None:
    value = b"x" * 1_000_000
    requests = b"set key 0 0 %d\r\n%b\r\n" % (len(value), value) + b"get key\r\n" * 50
    with socket.socket() as client:
        client.setblocking(False)
        async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, (proxy.host, proxy.port))
            await loop.sock_sendall(client, requests)
            await proxy.until(lambda: proxy.unsent_bytes > 0)
