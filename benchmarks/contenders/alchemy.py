"""advanced-alchemy's cached repository: rows as JSON in a region of dogpile.cache, detached instances out of it.

It reads through its cache only with `auto_expunge`, so that nobody takes the result for one of the session's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from advanced_alchemy._listeners import _active_cache_operations
from advanced_alchemy.cache import CacheConfig, CacheManager, setup_cache_listeners
from advanced_alchemy.exceptions import NotFoundError
from advanced_alchemy.filters import CollectionFilter
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from benchmarks.contenders.base import Contender, Store
from benchmarks.server import Server
from benchmarks.shop import Product


class Products(SQLAlchemyAsyncRepository[Any]):
    model_type = Product


class AlchemyInMemory(Contender):
    store = Store.MEMORY

    def __init__(self, name: str, engine: AsyncEngine, server: Server) -> None:
        super().__init__(name, engine, server)
        in_memcached = {"url": f"{server.host}:{server.port}"}
        self.manager = CacheManager(
            CacheConfig(
                backend="dogpile.cache.memory" if self.store is Store.MEMORY else "dogpile.cache.pymemcache",
                expiration_time=300,
                arguments={} if self.store is Store.MEMORY else in_memcached,
            )
        )
        setup_cache_listeners()
        self.session = async_sessionmaker(engine, info={"cache_manager": self.manager}, expire_on_commit=False)

    async def get(self, session: AsyncSession, pk: int) -> Any:
        with suppress(NotFoundError):
            return await self._products(session).get(pk)
        return None

    async def get_many(self, session: AsyncSession, pks: Sequence[int]) -> Sequence[Any]:
        # What it caches is the list, under its filters; any change of any product empties it.
        return await self._products(session).get_many(CollectionFilter("id", [*pks]))

    async def commit(self, pk: int) -> Decimal:
        async with self.session() as session:  # what its repository does not write is not invalidated
            products = Products(session=session, auto_expunge=False)
            product = await products.get(pk, with_for_update=True)
            product.price += 1
            await products.update(product)  # with auto_commit it would invalidate at the next commit only
            await session.commit()
            price: Decimal = product.price
        return price

    async def settle(self) -> None:
        if _active_cache_operations:  # it has no way to wait for them
            await asyncio.wait([*_active_cache_operations])

    @staticmethod
    def _products(session: AsyncSession) -> Products:
        """One repository for each session, as its services have it."""
        products = session.info.get("products")
        if products is None:
            products = session.info["products"] = Products(session=session, auto_expunge=True)
        return products


class AlchemyInMemcached(AlchemyInMemory):
    store = Store.MEMCACHED
