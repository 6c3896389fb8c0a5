"""The recipe of SQLAlchemy's documentation (examples/dogpile_caching): `do_orm_execute` and a region of dogpile.cache.

It is written for threads. Where that would stop an event loop it has what an application under asyncio gives it:

- A mutex that a task may wait for. dogpile's own is a thread's: the second task that misses a key would wait for it in
  the event loop, and so keep the first from ever releasing it.
- A cache key of its own for each row. The recipe would derive one from the statement, for some 20 µs a get.

memcached is asked by dogpile's own client, pymemcache, which blocks the event loop for as long as the server takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from dogpile.cache import make_region
from dogpile.cache.api import CacheMutex
from dogpile.cache.proxy import ProxyBackend
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import ORMExecuteState, Session, loading
from sqlalchemy.orm.interfaces import UserDefinedOption
from sqlalchemy.util import await_only

from benchmarks.contenders.base import Contender, Store
from benchmarks.server import Server
from benchmarks.shop import Product


class FromCache(UserDefinedOption):
    """Its payload is the cache key of the statement's result."""


class _TaskMutex(CacheMutex):
    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    def acquire(self, wait: bool = True) -> bool:
        if not wait and self._lock.locked():
            return False
        await_only(self._lock.acquire())
        return True

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()


class _TaskMutexes(ProxyBackend):
    def get_mutex(self, key: str) -> CacheMutex:  # noqa: ARG002
        return _TaskMutex()


class DogpileInMemory(Contender):
    store = Store.MEMORY

    def __init__(self, name: str, engine: AsyncEngine, server: Server) -> None:
        super().__init__(name, engine, server)
        in_memcached = {"url": f"{server.host}:{server.port}"}
        self.region = make_region().configure(
            "dogpile.cache.memory" if self.store is Store.MEMORY else "dogpile.cache.pymemcache",
            expiration_time=300,
            arguments={} if self.store is Store.MEMORY else in_memcached,
            wrap=[_TaskMutexes],
        )

        class CachingSession(Session):
            """A class of its own, so that nobody else's statements are listened to."""

        event.listen(CachingSession, "do_orm_execute", self._from_region)
        self.session = async_sessionmaker(engine, sync_session_class=CachingSession, expire_on_commit=False)

    async def get(self, session: AsyncSession, pk: int) -> Any:
        return await session.get(Product, pk, options=[FromCache(f"dogpile:{pk}")])

    async def get_many(self, session: AsyncSession, pks: Sequence[int]) -> Sequence[Any]:
        # What it caches is the result of the statement, so that these rows are one entry, and only this list finds it.
        statement = select(Product).where(Product.id.in_(pks)).options(FromCache(f"dogpile:{pks[0]}-{pks[-1]}"))
        return (await session.scalars(statement)).all()

    async def invalidate(self, pk: int) -> None:
        self.region.delete(f"dogpile:{pk}")

    def _from_region(self, state: ORMExecuteState) -> Any:
        for option in state.user_defined_options:
            if isinstance(option, FromCache):
                key = str(option.payload)
                frozen = self.region.get_or_create(key, lambda: state.invoke_statement().freeze())
                return loading.merge_frozen_result(state.session, state.statement, frozen, load=False)()
        return None


class DogpileInMemcached(DogpileInMemory):
    store = Store.MEMCACHED
