"""Why aiomcache's client is not used as it is: each test fails with it (0.8.2) and passes with ours.

Should one of these begin to pass with aiomcache itself, a part of `_aiomcache` may go.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import aiomcache
import pytest

from asynccache.backends._aiomcache import Client
from asynccache.backends._endpoint import Address, Endpoint
from tests.servers import FaultProxy, Memcached

pytestmark = pytest.mark.without_sqlalchemy

Make = Callable[[str, int, int], aiomcache.Client]
"""host, port, pool_size -> a client."""

SOON_S = 3.0


def stock(host: str, port: int, pool_size: int) -> aiomcache.Client:
    return aiomcache.Client(host, port, pool_size=pool_size)


def ours(host: str, port: int, pool_size: int) -> aiomcache.Client:
    return Client(Endpoint(Address(host, port)), pool_size=pool_size)


@pytest.fixture(params=[pytest.param(stock, marks=pytest.mark.xfail(strict=True)), ours], ids=["stock", "ours"])
def make(request: pytest.FixtureRequest) -> Make:
    chosen: Make = request.param
    return chosen


@pytest.fixture
async def proxy(memcached_server: Memcached) -> AsyncIterator[FaultProxy]:
    async with FaultProxy((memcached_server.host, memcached_server.port)) as proxy:
        yield proxy


@pytest.fixture
async def client(make: Make, proxy: FaultProxy) -> AsyncIterator[aiomcache.Client]:
    """One connection, so that what a command leaves behind is met by the next."""
    client = make(proxy.host, proxy.port, 1)
    yield client
    proxy.cut(rst=True)
    with contextlib.suppress(Exception):
        await client.close()


async def held(client: aiomcache.Client, proxy: FaultProxy, key: bytes) -> asyncio.Future[bytes | None]:
    """A `get` that the server has answered, and whose answer is still on its way."""
    trap = proxy.hold_reply(b"get")
    task = asyncio.ensure_future(client.get(key))
    await trap.answered.wait()
    return task


async def test_who_comes_after_a_cancelled_command_gets_its_own_answer(
    client: aiomcache.Client, proxy: FaultProxy
) -> None:
    await client.set(b"one", b"1")
    await client.set(b"two", b"2")
    trap = proxy.hold_reply(b"get")
    task = asyncio.ensure_future(client.get(b"one"))
    await trap.answered.wait()
    task.cancel()
    await asyncio.wait({task})
    trap.released.set()
    async with asyncio.timeout(SOON_S):
        assert await client.get(b"two") == b"2"


async def test_who_comes_after_one_that_was_cancelled_in_a_large_body_gets_its_own_answer(
    client: aiomcache.Client, proxy: FaultProxy
) -> None:
    await client.set(b"large", b"x" * 500_000)
    await client.set(b"small", b"1")
    proxy.delay_s = 0.05
    task = asyncio.ensure_future(client.get(b"large"))
    await asyncio.sleep(0.12)  # some of it has come, at 64 KiB in 0.05 s
    task.cancel()
    await asyncio.wait({task})
    proxy.delay_s = 0
    async with asyncio.timeout(SOON_S):
        assert await client.get(b"small") == b"1"


async def test_a_connection_that_ends_leaves_nobody_waiting(client: aiomcache.Client, proxy: FaultProxy) -> None:
    await client.set(b"k", b"1")
    first = await held(client, proxy, b"k")
    waiting = [asyncio.ensure_future(client.get(b"k")) for _ in range(3)]
    await asyncio.sleep(0)
    proxy.cut(rst=True)
    _, pending = await asyncio.wait([first, *waiting], timeout=SOON_S)
    for task in pending:
        task.cancel()
    await asyncio.gather(first, *waiting, return_exceptions=True)
    assert not pending


async def test_a_cold_pool_opens_no_more_connections_than_it_may(make: Make, proxy: FaultProxy) -> None:
    client = make(proxy.host, proxy.port, 4)
    await asyncio.gather(*(client.get(b"k") for _ in range(200)))
    accepted = proxy.accepted
    proxy.cut(rst=True)
    with contextlib.suppress(Exception):
        await client.close()
    assert accepted <= 4


async def test_a_key_that_is_too_long_in_bytes_does_not_have_its_value_executed(
    client: aiomcache.Client, memcached_server: Memcached
) -> None:
    await client.set(b"victim", b"alive")
    with contextlib.suppress(Exception):
        async with asyncio.timeout(SOON_S):
            await client.set("é".encode() * 200, b"delete victim")
    safe = ours(memcached_server.host, memcached_server.port, 1)
    assert await safe.get(b"victim") == b"alive"
    await safe.close()


async def test_a_cas_without_a_version_does_not_have_its_value_executed(
    client: aiomcache.Client, memcached_server: Memcached
) -> None:
    await client.set(b"victim", b"alive")
    with contextlib.suppress(Exception):
        async with asyncio.timeout(SOON_S):
            await client.cas(b"k", b"delete victim", None)  # type: ignore[arg-type]
    safe = ours(memcached_server.host, memcached_server.port, 1)
    assert await safe.get(b"victim") == b"alive"
    await safe.close()


FREEZES = """
import asyncio, sys
from tests.backends.test_stock import ours, stock

async def serve(reader, writer):
    while line := await reader.readline():
        if line.startswith(b"stats"):
            writer.write(b"ERROR\\r\\n")
        else:
            writer.write(b"HALF A LI")
            writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = {"stock": stock, "ours": ours}[sys.argv[1]]("127.0.0.1", server.sockets[0].getsockname()[1], 1)
    try:
        async with asyncio.timeout(2):
            await client.delete(b"k")
    except Exception:
        print("ended")

asyncio.run(main())
"""


def test_a_connection_that_ends_in_the_middle_of_a_line_does_not_freeze_the_event_loop(make: Make) -> None:
    """In a process of its own, since nothing within it could end it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", FREEZES, make.__name__], check=False, capture_output=True, text=True, timeout=6
        )
    except subprocess.TimeoutExpired:
        pytest.fail("it is frozen")
    assert done.stdout == "ended\n"
