"""The same application under each server, in two processes: what one of them commits, the other serves."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from http import HTTPStatus

import pytest
from aiohttp import ClientResponseError

from tests.applications.client import Client, send
from tests.applications.conftest import Stage, Statements
from tests.applications.serving import Program

Clients = tuple[Client, Client]

KEFLAVIK = "BIKF"
REYKJAVIK = "BIRK"
AKUREYRI = "BIAR"
EGILSSTADIR = "BIEG"


async def test_the_second_read_is_a_hit_in_either_process(clients: Clients, stage: Stage) -> None:
    one, _ = clients
    first = await one.until_hit(f"/airports/{KEFLAVIK}")
    selects, before = Statements(stage, "SELECT airport."), [(await each.health())["hits"] for each in clients]
    assert [await each.airport(KEFLAVIK) for each in clients] == [first, first]
    assert [(await each.health())["hits"] for each in clients] == [hits + 1 for hits in before]
    assert len(selects) == 0


async def test_an_airport_that_there_is_not_is_not_found(clients: Clients) -> None:
    for client in clients:
        with pytest.raises(ClientResponseError) as raised:
            await client.airport("XXXX")
        assert raised.value.status == HTTPStatus.NOT_FOUND


async def test_an_update_through_one_process_is_seen_through_the_other_by_the_next_request(clients: Clients) -> None:
    one, other = clients
    for number in range(40):
        writer, reader = (one, other) if number % 2 else (other, one)
        await writer.rename(KEFLAVIK, f"Keflavik {number}")
        for client in (reader, writer, reader):
            assert (await client.airport(KEFLAVIK))["name"] == f"Keflavik {number}"


async def test_a_bulk_update_through_one_process_is_seen_through_the_other_by_the_next_request(
    clients: Clients, stage: Stage
) -> None:
    one, other = clients
    (country, closed), (_, open_) = await countries_that_are_open(stage)
    for client in clients:
        assert (await client.airport(closed))["is_open"]
        assert (await client.airport(open_))["is_open"]
    await one.ask("POST", f"/countries/{country}/close")
    for client in (other, one):
        assert not (await client.airport(closed))["is_open"]
        assert (await client.airport(open_))["is_open"]


async def test_the_airport_of_a_review_is_as_it_is_now_and_from_the_cache(clients: Clients, stage: Stage) -> None:
    one, other = clients
    review = await one.add_review(REYKJAVIK, stars=5)
    for number in range(5):
        await one.rename(REYKJAVIK, f"Reykjavik {number}")
        for client in (other, one):
            assert (await client.review(review))["airport"]["name"] == f"Reykjavik {number}"
            latest, *_ = await client.ask("GET", f"/airports/{REYKJAVIK}/reviews")
            assert (latest["id"], latest["airport"]["name"]) == (review, f"Reykjavik {number}")
    for client in clients:
        await client.until_hit(f"/reviews/{review}", rows=2)
        selects = Statements(stage, "SELECT")
        assert (await client.review(review))["airport"]["name"] == "Reykjavik 4"
        assert len(selects) == 0


async def test_200_requests_at_once_for_a_cold_row_make_one_select_in_all(
    pair: tuple[Program, Program], clients: Clients, stage: Stage
) -> None:
    one, _ = clients
    name = f"cold, on {pair[0].port}"
    await one.rename(KEFLAVIK, name)
    await one.until_idle()
    selects = Statements(stage, "SELECT airport.")
    misses = await missed_by(clients)
    async with stage.locked("airport"):
        asking = [asyncio.create_task(client.airport(KEFLAVIK)) for _ in range(100) for client in clients]
        with suppress(TimeoutError):  # who waits for another process's row does so for some seconds only
            async with asyncio.timeout(1):
                while await missed_by(clients) < misses + 200:
                    await asyncio.sleep(0.01)
    assert {airport["name"] for airport in await asyncio.gather(*asking)} == {name}
    assert len(selects) == 1


async def missed_by(clients: Clients) -> int:
    return sum([(await client.health())["misses"] for client in clients])


async def test_clients_that_disconnect_midway_leave_nothing_behind(
    pair: tuple[Program, Program], clients: Clients, stage: Stage
) -> None:
    """No stale value, no connection that is not given back, no warning."""
    chance = random.Random("the same moments in each run")
    icaos = [KEFLAVIK, REYKJAVIK, AKUREYRI, EGILSSTADIR]

    async def leave_midway(program: Program, number: int) -> None:
        icao = chance.choice(icaos)
        path = f"PUT /airports/{icao}/name?name=hurry-{number}" if number % 3 else f"GET /airports/{icao}"
        writer = await send(program.port, path)
        await asyncio.sleep(chance.uniform(0, longest_s))  # this is the moment
        if number % 2:
            writer.transport.abort()
        else:
            writer.close()

    async def crowd(program: Program) -> None:
        for start in range(0, 120, 6):
            await asyncio.gather(*(leave_midway(program, start + number) for number in range(6)))

    async def stay(writer: Client, reader: Client, icao: str) -> None:
        for number in range(10):
            await writer.rename(icao, f"patience-{number}")
            await reader.airport(icao)

    one, other = clients
    await one.rename(KEFLAVIK, "before anybody hurries")
    began_s = time.monotonic()
    await one.rename(KEFLAVIK, "how long that takes")
    longest_s = 4 * (time.monotonic() - began_s)
    updates = Statements(stage, "UPDATE airport")
    stayers = [stay(one, other, icao) for icao in icaos[:2]] + [stay(other, one, icao) for icao in icaos[2:]]
    await asyncio.gather(*map(crowd, pair), *stayers)
    assert len(updates) > 40, "none of those in a hurry has come as far as the database"
    for client in clients:
        await client.until_no_connection_is_held()
    committed = await names_of(stage, icaos)
    for _ in range(2):  # from the database, and from the cache
        for client in clients:
            assert {icao: (await client.airport(icao))["name"] for icao in icaos} == committed
    assert [program.troubles for program in pair] == [[], []]


# What the database says, past everything.


async def countries_that_are_open(stage: Stage) -> list[tuple[str, str]]:
    """Two countries, each with an airport of it."""
    sql = "SELECT country, min(icao) FROM airport GROUP BY country HAVING every(is_open) ORDER BY country LIMIT 2"
    return [(country, icao) for country, icao in await stage.fetch(sql)]


async def names_of(stage: Stage, icaos: list[str]) -> dict[str, str]:
    rows = await stage.fetch("SELECT icao, name FROM airport WHERE icao = ANY($1)", icaos)
    return {row["icao"]: row["name"] for row in rows}
