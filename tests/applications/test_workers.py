"""Servers that start several processes themselves, workers in the background, and scripts: one cache for all."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack

import pytest

from tests.applications.client import Client
from tests.applications.conftest import Stage
from tests.applications.serving import SERVERS

KEFLAVIK = "BIKF"
REYKJAVIK, AKUREYRI, EGILSSTADIR = "BIRK", "BIAR", "BIEG"


@pytest.mark.parametrize("server", ["fastapi-uvicorn", "fastapi-granian"])
async def test_two_workers_of_one_server_see_each_other_s_commits(server: str, stage: Stage) -> None:
    with stage.program(f"{SERVERS[server]} --workers 2") as program:
        program.wait_until_served()
        async with AsyncExitStack() as stack:
            workers: dict[int, Client] = {}
            while len(workers) < 2:  # which of them takes a connection is chance
                client = await stack.enter_async_context(Client(program.url, connections=1))
                workers[(await client.health())["process"]] = client
            for number in range(20):
                for writer in workers.values():
                    await writer.rename(KEFLAVIK, f"Keflavik {number}")
                    for reader in workers.values():
                        assert (await reader.airport(KEFLAVIK))["name"] == f"Keflavik {number}"
        program.process.terminate()
        program.process.wait()
        assert program.troubles == []
    for process in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


async def test_what_a_worker_commits_is_seen_by_the_next_request(stage: Stage) -> None:
    with stage.program(SERVERS["fastapi-uvicorn"]) as server, stage.program("airports.worker") as worker:
        server.wait_until_served()
        async with Client(server.url) as client:
            for stars, rating in ((2, 2), (5, 3.5)):
                await client.until_hit(f"/airports/{KEFLAVIK}")
                await client.add_review(KEFLAVIK, stars=stars)
                await until_there_is_no_job(stage)
                assert (await client.airport(KEFLAVIK))["rating"] == rating
        worker.process.terminate()
        assert (worker.process.wait(), worker.troubles, server.troubles) == (0, [], [])


async def test_what_plain_functions_in_forked_processes_commit_is_seen_by_the_next_request(stage: Stage) -> None:
    with stage.program(SERVERS["fastapi-uvicorn"]) as server:
        server.wait_until_served()
        async with Client(server.url) as client:
            for icao in (REYKJAVIK, AKUREYRI, EGILSSTADIR):
                await client.add_review(icao, stars=3)
                await client.until_hit(f"/airports/{icao}")
            await asyncio.to_thread(stage.run, f"airports.tasks {REYKJAVIK} {AKUREYRI} {EGILSSTADIR}")
            for icao in (REYKJAVIK, AKUREYRI, EGILSSTADIR):
                assert (await client.airport(icao))["rating"] == 3
                await client.until_hit(f"/airports/{icao}")
        assert server.troubles == []


async def test_what_a_script_commits_is_seen_by_the_next_request(stage: Stage) -> None:
    with stage.program(SERVERS["fastapi-uvicorn"]) as server:
        server.wait_until_served()
        async with Client(server.url) as client:
            await client.rename(KEFLAVIK, "somewhere")
            await client.until_hit(f"/airports/{KEFLAVIK}")
            written = await asyncio.to_thread(stage.run, "airports.load IS")
            assert written.startswith("0 airports are new, ")
            assert (await client.airport(KEFLAVIK))["name"] == "Keflavik International Airport"
        assert server.troubles == []


async def until_there_is_no_job(stage: Stage) -> None:
    while await stage.fetch("SELECT FROM job"):
        await asyncio.sleep(0.01)
