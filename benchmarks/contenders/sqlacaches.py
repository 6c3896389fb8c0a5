"""sqlacache: results of statements, frozen and pickled, in a cache of cashews; `session.get` needs no change."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from decimal import Decimal

from sqlacache import configure
from sqlacache.exceptions import TransportError
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.contenders.base import Contender, DoesNotRunError, Store
from benchmarks.server import Server
from benchmarks.shop import Product


class SqlacacheInMemory(Contender):
    store = Store.MEMORY

    def __init__(self, name: str, engine: AsyncEngine, server: Server) -> None:
        super().__init__(name, engine, server)
        self.manager = configure(
            backend="mem://" if self.store is Store.MEMORY else server.url,
            models={f"{Product.__module__}.{Product.__name__}": {"ops": "all", "timeout": 300}},
        )

    async def start(self) -> None:
        try:
            await self.manager.bind(self.engine)
        except TransportError as error:
            raise DoesNotRunError(f"it knows no memcached: {error.__cause__!r}") from error
        self._listen(False)

    async def commit(self, pk: int) -> Decimal:
        async with self.session() as session:
            # It would answer a SELECT ... FOR UPDATE from the cache, without locking the row.
            options = {"sqlacache_skip_interceptor": True}
            product = await session.get_one(Product, pk, with_for_update=True, execution_options=options)
            product.price += 1
            await session.commit()
        return product.price

    @contextmanager
    def turn(self) -> Generator[None]:
        # It listens on the class Session, and so on every session of the process: only while it is its turn.
        self._listen(True)
        try:
            yield
        finally:
            self._listen(False)

    async def aclose(self) -> None:
        self._listen(True)
        await self.manager.disconnect()

    def _listen(self, on: bool) -> None:
        for target, identifier, listener in self.manager._listeners:
            if on:
                event.listen(
                    target, identifier, listener, **({"retval": True} if identifier == "do_orm_execute" else {})
                )
            else:
                event.remove(target, identifier, listener)


class SqlacacheInMemcached(SqlacacheInMemory):
    store = Store.MEMCACHED
