"""Asks one server process over HTTP."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

from aiohttp import ClientSession, ClientTimeout, TCPConnector

from tests.servers.process import HOST

Json = dict[str, Any]


class Client:
    """For as long as the `async with` block. All methods raise aiohttp.ClientResponseError for a status from 400 on.

    connections: how many at once; 0 for no limit.
    """

    def __init__(self, url: str, *, connections: int = 0) -> None:
        self._http = ClientSession(
            url,
            connector=TCPConnector(limit=connections),
            raise_for_status=True,
            timeout=ClientTimeout(30),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def ask(self, method: str, path: str, **rest: Any) -> Any:
        async with self._http.request(method, path, **rest) as response:
            return await response.json() if response.status != 204 else None

    async def airport(self, icao: str) -> Json:
        airport: Json = await self.ask("GET", f"/airports/{icao}")
        return airport

    async def rename(self, icao: str, name: str) -> None:
        await self.ask("PUT", f"/airports/{icao}/name", params={"name": name})

    async def add_review(self, icao: str, stars: int) -> int:
        new = {"author": "a passenger", "stars": stars, "text": "as ever"}
        review: Json = await self.ask("POST", f"/airports/{icao}/reviews", json=new)
        return int(review["id"])

    async def review(self, id_: int) -> Json:
        review: Json = await self.ask("GET", f"/reviews/{id_}")
        return review

    async def health(self) -> Json:
        health: Json = await self.ask("GET", "/health")
        return health

    async def until_idle(self) -> None:
        """Wait until all that commits have locked is unlocked."""
        while (health := await self.health())["locks"] != health["unlocks"]:
            await asyncio.sleep(0.01)

    async def until_no_connection_is_held(self) -> None:
        """Wait until all connections to the database were given back."""
        while not (await self.health())["connections"].endswith("connections: 0"):
            await asyncio.sleep(0.01)

    async def until_hit(self, path: str, rows: int = 1) -> Json:
        """Ask until so many rows of the answer were served from the cache: they are stored in the background."""
        while True:
            before = await self.health()
            answer: Json = await self.ask("GET", path)
            if (await self.health())["hits"] == before["hits"] + rows:
                return answer


async def send(port: int, path: str) -> asyncio.StreamWriter:
    """Send a request on a connection of its own, and do not wait for the answer."""
    _, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"{path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 0\r\n\r\n".encode())
    return writer
