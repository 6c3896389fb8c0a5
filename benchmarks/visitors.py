"""Visitors of the web application, in a process of their own: each asks for the next page when it has the last.

Standard input has a JSON object a line, {"url": ..., "seconds": ...}; each is answered by one on standard output.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
from itertools import accumulate
from time import perf_counter
from typing import Any, Final

import aiohttp

from benchmarks.shop import COLD

VISITORS: Final = 32
PRODUCTS: Final = 1_000
SHOWN: Final = 5

_WEIGHTS: Final = [*accumulate(1 / rank for rank in range(1, PRODUCTS + 1))]


async def _visitor(client: aiohttp.ClientSession, chance: random.Random, until_s: float, taken_s: list[float]) -> None:
    while (start_s := perf_counter()) < until_s:
        *shown, bought = chance.choices(COLD[:PRODUCTS], cum_weights=_WEIGHTS, k=SHOWN + 1)
        query = {"show": ",".join(map(str, shown)), "buy": str(bought)}
        async with client.post("/buy", params=query) as response:
            response.raise_for_status()
            await response.read()
        taken_s.append(perf_counter() - start_s)


async def _visit(url: str, seconds: float) -> dict[str, Any]:
    taken_s: list[float] = []
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=VISITORS)) as client:
        start_s = perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(VISITORS):
                group.create_task(_visitor(client, random.Random(number), start_s + seconds, taken_s))
        rate = len(taken_s) / (perf_counter() - start_s)
    return {"requests_per_s": rate, "p99_s": statistics.quantiles(taken_s, n=100)[-1]}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(_visit(**json.loads(line)))), flush=True)  # noqa: T201 (it is what is asked for)


if __name__ == "__main__":
    main()
