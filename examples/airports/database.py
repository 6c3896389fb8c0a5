"""Engine, cache and sessions, for as long as a program runs."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from airports.models import Airport, Review
from asynccache import AsyncCachedSession, Cache

Sessions = async_sessionmaker[AsyncCachedSession]


@asynccontextmanager
async def open_sessions() -> AsyncGenerator[Sessions]:
    """Give what makes sessions. At the end the cache finishes what commits have left to do, then connections close."""
    url = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///airports.db")
    engine = create_async_engine(url, pool_size=15, max_overflow=0)  # connections stay: closing one may be cancelled
    try:
        async with Cache(os.environ.get("CACHE_URL", "memory://")) as cache:
            cache.register(Airport, ttl=300)
            cache.register(Review, ttl=300)
            yield async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache, expire_on_commit=False)
    finally:
        await engine.dispose()
