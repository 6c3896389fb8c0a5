"""aiocache around `get`: detached instances are cached, and each session is given one by `merge(load=False)`.

`cached_stampede` is the variant of its decorator that lets others wait for who loads. Its time-out of an operation is
off, as for the others: it would cost a task for each get.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from aiocache import Cache, cached_stampede, multi_cached
from aiocache.serializers import PickleSerializer
from sqlalchemy import inspect, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from benchmarks.contenders.base import Contender, Store
from benchmarks.server import Server
from benchmarks.shop import Product


class AiocacheInMemory(Contender):
    store = Store.MEMORY

    def __init__(self, name: str, engine: AsyncEngine, server: Server) -> None:
        super().__init__(name, engine, server)
        settings: dict[str, Any] = {"ttl": 300, "timeout": 0, "cache": Cache.MEMORY}
        if self.store is Store.MEMCACHED:
            settings |= {"cache": Cache.MEMCACHED, "serializer": PickleSerializer()}
            settings |= {"endpoint": server.host, "port": server.port, "pool_size": 8}
        one = cached_stampede(lease=2, key_builder=lambda _load, _session, pk: f"aiocache:{pk}", **settings)
        self._one: Any = one(self._load)
        many = multi_cached("pks", key_builder=lambda pk, *_, **__: f"aiocache:many:{pk}", **settings)
        self._many: Any = many(self._load_many)

    async def get(self, session: AsyncSession, pk: int) -> Any:
        cached = await self._one(session, pk)
        return None if cached is None else session.sync_session.merge(cached, load=False)

    async def get_many(self, session: AsyncSession, pks: Sequence[int]) -> Sequence[Any]:
        cached = await self._many(session, pks=[*pks])
        return [session.sync_session.merge(each, load=False) for each in cached.values()]

    async def invalidate(self, pk: int) -> None:
        await self._one.cache.delete(f"aiocache:{pk}")

    async def aclose(self) -> None:
        await self._one.cache.close()
        await self._many.cache.close()

    async def _load(self, session: AsyncSession, pk: int) -> Any:
        product = await session.get(Product, pk)
        if product is not None:
            session.expunge(product)  # the cached instance belongs to no session
        return product

    async def _load_many(self, session: AsyncSession, *, pks: Sequence[str]) -> dict[int, Any]:
        wanted = [int(key.rpartition(":")[2]) for key in pks]  # it gives the keys of the cache
        found = (await session.scalars(select(Product).where(Product.id.in_(wanted)))).all()
        for product in found:
            session.expunge(product)
        return {product.id: product for product in found}


class AiocacheInMemcached(AiocacheInMemory):
    store = Store.MEMCACHED


class AiocacheOfValues(AiocacheInMemory):
    """What is cheapest: the columns' values as a dictionary that all share, and no instance at all."""

    async def get(self, session: AsyncSession, pk: int) -> Any:
        return await self._one(session, pk)

    async def get_many(self, session: AsyncSession, pks: Sequence[int]) -> Sequence[Any]:
        return list((await self._many(session, pks=[*pks])).values())

    def price(self, found: Any) -> Decimal:
        price: Decimal = found["price"]
        return price

    async def _load(self, session: AsyncSession, pk: int) -> Any:
        product = await super()._load(session, pk)
        return None if product is None else _values(product)

    async def _load_many(self, session: AsyncSession, *, pks: Sequence[str]) -> dict[int, Any]:
        found = await super()._load_many(session, pks=pks)
        return {pk: _values(product) for pk, product in found.items()}


def _values(product: Product) -> dict[str, Any]:
    return {column.key: getattr(product, column.key) for column in inspect(product).mapper.column_attrs}
