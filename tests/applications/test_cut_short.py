"""What is cut short: requests whose client leaves, and whose server is asked to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import pytest
from aiohttp import ClientError
from airports.database import Sessions, open_sessions
from airports.models import Airport

from asynccache import Cache
from tests.applications.client import Client, send
from tests.applications.conftest import Stage, Wire
from tests.applications.serving import SERVERS, Program

AKUREYRI, HORNAFJORDUR, REYKJAVIK = "BIAR", "BIHN", "BIRK"


class Reader:
    """Reads airports in the tests' own process, past all proxies: one more that shares the cache."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.cache: Cache = sessions.kw["cache"]

    async def name_of(self, icao: str) -> str:
        async with self._sessions() as session:
            name = (await session.get_one(Airport, icao)).name
        await self.cache.drain()  # so that it is stored, if it may be
        return name


@pytest.fixture
async def reader(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reader]:
    monkeypatch.setenv("DATABASE_URL", stage.database_url)
    monkeypatch.setenv("CACHE_URL", stage.cache_url)
    async with open_sessions() as sessions:
        yield Reader(sessions)


@pytest.mark.parametrize("server", [name for name in SERVERS if name != "aiohttp-cancelling"])  # which ends as aiohttp
async def test_a_shutdown_finishes_what_was_begun(server: str, wire: Wire, reader: Reader) -> None:
    with wire.stage.program(SERVERS[server]) as program:
        await asyncio.to_thread(program.wait_until_served)
        async with Client(program.url) as client:
            # 1. A commit was answered, and what it has locked is about to be unlocked.
            await client.until_hit(f"/airports/{REYKJAVIK}")
            locking = wire.cache.hold_request(b"cas ")
            renaming = asyncio.create_task(client.rename(REYKJAVIK, server))
            await locking.seen.wait()
            unlocking = wire.cache.hold_request(b"cas ")
            locking.released.set()
            await renaming
            await unlocking.seen.wait()
            # 2. A read was answered, and its row is about to be stored.
            filling = wire.cache.hold_request(b"cas ")
            await client.airport(AKUREYRI)
            await filling.seen.wait()
            # 3. A request has sent its COMMIT.
            committing = wire.database.hold_request(b"COMMIT")
            renaming = asyncio.create_task(client.rename(HORNAFJORDUR, server))
            await committing.seen.wait()

            program.process.terminate()
            await until_it_serves_nobody_else(program)
            committing.released.set()
            await renaming
            ended = asyncio.create_task(asyncio.to_thread(program.process.wait))
            done, _ = await asyncio.wait({ended}, timeout=0.3)
            assert not done, "it has not waited for what the cache has to do"
            filling.released.set()
            unlocking.released.set()
            status = await ended
        assert (status in (0, -signal.SIGTERM), program.troubles) == (True, [])

    hits = reader.cache.stats.hits
    await reader.name_of(AKUREYRI)
    assert reader.cache.stats.hits == hits + 1, "what was read was stored"
    for icao in (REYKJAVIK, HORNAFJORDUR):
        assert [await reader.name_of(icao), await reader.name_of(icao)] == [server, server]
    assert reader.cache.stats.hits == hits + 3, "what was renamed is not locked: the first read has stored it"


async def test_a_shutdown_does_not_wait_for_a_cache_that_does_not_answer(wire: Wire) -> None:
    impatient = replace(wire.stage, cache_url=wire.stage.cache_url.replace("timeout=5", "timeout=0.25"))
    with impatient.program(SERVERS["fastapi-uvicorn"]) as program:
        await asyncio.to_thread(program.wait_until_served)
        async with Client(program.url) as client:
            await client.airport(REYKJAVIK)
            wire.cache.forward_replies.clear()
            await client.rename(REYKJAVIK, "renamed in the dark")
            program.process.terminate()
            await asyncio.to_thread(program.process.wait)
        assert program.troubles == []


@pytest.mark.parametrize("server", ["fastapi-uvicorn", "aiohttp-cancelling"], ids=["goes on", "is cancelled"])
async def test_who_leaves_while_its_commit_is_answered_leaves_no_stale_value(
    server: str, wire: Wire, reader: Reader
) -> None:
    with wire.stage.program(SERVERS[server]) as program:
        await asyncio.to_thread(program.wait_until_served)
        async with Client(program.url) as client:
            await client.until_hit(f"/airports/{REYKJAVIK}")
            committing = wire.database.hold_reply(b"COMMIT")
            writer = await send(program.port, f"PUT /airports/{REYKJAVIK}/name?name={server}")
            await committing.answered.wait()  # it is committed, which nobody has been told
            writer.transport.abort()
            for _ in range(3):
                assert await reader.name_of(REYKJAVIK) == server
                assert (await client.airport(REYKJAVIK))["name"] == server
            committing.released.set()
            await client.until_no_connection_is_held()
            assert (await client.airport(REYKJAVIK))["name"] == server
        assert await reader.name_of(REYKJAVIK) == server
        assert program.troubles == []


async def until_it_serves_nobody_else(program: Program) -> None:
    """Wait until the server has heard that it is to end. Some of them let clients in then, and leave them alone."""
    with suppress(OSError, TimeoutError, ClientError):
        while True:
            async with asyncio.timeout(0.5), Client(program.url) as client:
                await client.health()
