"""asynccache, with its defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from asynccache import AsyncCachedSession, Cache, cached_get_many
from benchmarks.contenders.base import Contender, Store
from benchmarks.server import Server
from benchmarks.shop import Product


class OursInMemory(Contender):
    store = Store.MEMORY

    def __init__(self, name: str, engine: AsyncEngine, server: Server) -> None:
        super().__init__(name, engine, server)
        self.cache = Cache("memory://" if self.store is Store.MEMORY else server.url)
        self.cache.register(Product)
        self.session = async_sessionmaker(engine, class_=AsyncCachedSession, cache=self.cache, expire_on_commit=False)

    async def get_many(self, session: AsyncSession, pks: Sequence[int]) -> Sequence[Any]:
        return list((await cached_get_many(session, Product, pks)).values())

    async def settle(self) -> None:
        await self.cache.drain()

    async def aclose(self) -> None:
        await self.cache.aclose()


class OursInMemcached(OursInMemory):
    store = Store.MEMCACHED
