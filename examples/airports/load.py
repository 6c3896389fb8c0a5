"""Fills the tables with all airports of the world, or of some countries. Those that are there get their names back.

python -m airports.load
python -m airports.load IS LI
"""

import asyncio
import sys
from collections.abc import Collection
from typing import Any

import airportsdata
from sqlalchemy import insert, select, update

from airports.database import open_sessions
from airports.models import Airport, Base


def airports_of(countries: Collection[str]) -> list[dict[str, Any]]:
    return [
        {
            "icao": airport["icao"],
            "name": airport["name"],
            "city": airport["city"],
            "country": airport["country"],
            "is_open": True,
        }
        for airport in airportsdata.load("ICAO").values()
        if not countries or airport["country"] in countries
    ]


async def main(countries: list[str]) -> None:
    async with open_sessions() as sessions, sessions.begin() as session:
        await session.run_sync(lambda sync: Base.metadata.create_all(sync.connection()))
        there = set(await session.scalars(select(Airport.icao)))
        wanted = airports_of(countries)
        if new := [airport for airport in wanted if airport["icao"] not in there]:
            await session.execute(insert(Airport), new)
        if old := [airport for airport in wanted if airport["icao"] in there]:
            await session.execute(update(Airport), old)
    print(f"{len(new):,} airports are new, {len(old):,} were there")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
