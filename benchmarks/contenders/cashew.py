"""cashews around `get`: detached instances are cached, and each session is given one by `merge(load=False)`.

Its decorator protects from a stampede by default: who misses a key while another loads it waits for that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cashews import Cache
from cashews.exceptions import BackendNotAvailableError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from benchmarks.contenders.base import Contender, DoesNotRunError, Store
from benchmarks.server import Server
from benchmarks.shop import ROWS, Product


class CashewsInMemory(Contender):
    store = Store.MEMORY

    def __init__(self, name: str, engine: AsyncEngine, server: Server) -> None:
        super().__init__(name, engine, server)
        self.cache = Cache()
        if self.store is Store.MEMORY:
            self.cache.setup("mem://", size=2 * ROWS)
        else:
            try:
                self.cache.setup(server.url)
            except BackendNotAvailableError as error:
                raise DoesNotRunError(f"it knows no memcached: {type(error).__name__}: {error}") from error

        @self.cache(ttl="5m", key="product:{pk}")
        async def load(session: AsyncSession, pk: int) -> Any:
            product = await session.get(Product, pk)
            if product is not None:
                session.expunge(product)  # the cached instance belongs to no session
            return product

        self._load = load

    async def get(self, session: AsyncSession, pk: int) -> Any:
        cached = await self._load(session, pk=pk)
        return None if cached is None else session.sync_session.merge(cached, load=False)

    async def get_many(self, session: AsyncSession, pks: Sequence[int]) -> Sequence[Any]:
        found = await self.cache.get_many(*[f"product:{pk}" for pk in pks])
        cached = [each for each in found if each is not None]
        missing = [pk for pk, each in zip(pks, found, strict=True) if each is None]
        if missing:
            for product in (await session.scalars(select(Product).where(Product.id.in_(missing)))).all():
                session.expunge(product)
                await self.cache.set(f"product:{product.id}", product, expire="5m")
                cached.append(product)
        return [session.sync_session.merge(each, load=False) for each in cached]

    async def invalidate(self, pk: int) -> None:
        await self.cache.delete(f"product:{pk}")

    async def aclose(self) -> None:
        await self.cache.close()


class CashewsInMemcached(CashewsInMemory):
    store = Store.MEMCACHED
