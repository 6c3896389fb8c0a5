"""All airports of the world, read by 64 tasks at once: by plain sessions, then by cached ones.

    python examples/quickstart.py
    python examples/quickstart.py --database postgresql+asyncpg://me@localhost/test --cache memcached://localhost

Needs `pip install sqlalchemy-asynccache[sqlite] rich airportsdata`, and `[postgresql]` for the second line. Replaces the
database's table `airport`. Ends with status 1 if anything that it shows is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import airportsdata
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy import event, insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asynccache import AsyncCachedSession, Cache, cached_get


class Base(DeclarativeBase):
    pass


class Airport(Base):
    __tablename__ = "airport"

    icao: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    city: Mapped[str]
    country: Mapped[str]
    elevation: Mapped[float]
    lat: Mapped[float]
    lon: Mapped[float]
    tz: Mapped[str]


async def quickstart(engine: AsyncEngine, cache_url: str, *, tasks: int, gets: int, herd: int) -> bool:
    async with Cache(cache_url) as cache:
        cache.register(Airport, ttl=300)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)

        codes = await load_airports(engine, sessions)
        await cache.drain()  # the commit's locks are let go in the background, and what follows counts exactly
        selects = Selects(engine)

        async with sessions() as session:
            airport = await session.get(Airport, FRANKFURT)  # as ever: by a SELECT, since it is not in the cache yet
        async with sessions() as session:
            airport = await cached_get(session, Airport, FRANKFURT)  # the same, where code is to say that it is cached

        facts = [Fact(f"2 sessions get {airport and airport.name}: {selects} SELECT", airport and selects.count == 1)]
        # All below measures and counts; there is no more to using the library.
        wanted = zipf(codes, gets)
        meter = Meter(cache, selects, tasks)
        show_table(
            await meter.measure("plain AsyncSession", async_sessionmaker(engine), wanted),
            await meter.measure("cached, cold at first", sessions, wanted),
            await meter.measure("cached, once more", sessions, wanted),
        )
        ...
