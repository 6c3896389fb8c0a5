"""What every contender does: get products, in a session of its own kind, and change them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from enum import Enum
from typing import Any, ClassVar

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from benchmarks.server import Server
from benchmarks.shop import Product


class Store(Enum):
    """Where a contender keeps what it has read."""

    NOWHERE = "none"
    MEMORY = "memory"
    MEMCACHED = "memcached"


class DoesNotRunError(Exception):
    """Raised when a contender cannot take part, with what its package says about it."""


class Contender:
    """SQLAlchemy as it is. The others override what they do differently.

    name: what tables call it.
    server: for those that keep rows in memcached.

    Raises DoesNotRunError when it cannot take part, and so does `start`.
    """

    store: ClassVar[Store] = Store.NOWHERE

    def __init__(self, name: str, engine: AsyncEngine, server: Server) -> None:
        self.name = name
        self.engine = engine
        self.server = server
        self.session: Callable[[], AsyncSession] = async_sessionmaker(engine, expire_on_commit=False)

    async def start(self) -> None:
        """What wants an event loop."""

    async def get(self, session: AsyncSession, pk: int) -> Any:
        return await session.get(Product, pk)

    async def get_many(self, session: AsyncSession, pks: Sequence[int]) -> Sequence[Any]:
        return (await session.scalars(select(Product).where(Product.id.in_(pks)))).all()

    async def change(self, pk: int) -> Decimal:
        """Raise a price by one, in a session of its own. Give it when everything is done that the contender's
        documentation tells an application to do."""
        price = await self.commit(pk)
        await self.invalidate(pk)
        return price

    async def commit(self, pk: int) -> Decimal:
        """The change alone."""
        async with self.session() as session:
            product = await session.get_one(Product, pk, with_for_update=True)
            product.price += 1
            await session.commit()
        return product.price

    async def invalidate(self, pk: int) -> None:
        """What the application itself has to do after a commit."""

    def price(self, found: Any) -> Decimal:
        price: Decimal = found.price
        return price

    @contextmanager
    def turn(self) -> Generator[None]:
        """Around what it does: contenders that listen on every session of the process listen only now."""
        yield

    async def settle(self) -> None:
        """Wait for what it does in the background."""

    async def aclose(self) -> None:
        """Let go of what it holds; the engine is the caller's."""


def expunge(session: AsyncSession, found: Sequence[Any]) -> None:
    """Take out of the identity map what has come into it, so that the next get looks further."""
    sync = session.sync_session
    for each in found:
        if isinstance(each, Product) and each in sync:
            sync.expunge(each)


Maker = Callable[[str, AsyncEngine, Server], Contender]
"""A contender's class: by its name, for one engine and one memcached."""
