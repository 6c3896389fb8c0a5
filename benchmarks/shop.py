"""The model that all contenders read, ten columns of the usual types, and the databases that hold its rows."""

from __future__ import annotations

import enum
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import JSON, DateTime, Numeric, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ROWS: Final = 20_000
HOT: Final = range(1, 257)
"""What is hit. Nobody changes it."""
COLD: Final = range(1_001, 10_001)
"""What is missed: each round takes rows that nobody has asked for before."""
COLDEST: Final = range(10_001, 11_001)
"""What herds wait for."""
CROWDED: Final = 600
"""So many rows belong to each contender to change, above all others."""

POOL_SIZE: Final = 20


class Category(enum.Enum):
    TOOLS = "tools"
    GARDEN = "garden"
    KITCHEN = "kitchen"


class Base(DeclarativeBase):
    pass


class Product(Base):
    """Its price counts how often it was changed."""

    __tablename__ = "product"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    description: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    price: Mapped[Decimal] = mapped_column(Numeric(12, 2))
    attributes: Mapped[dict[str, Any]] = mapped_column(JSON)
    active: Mapped[bool]
    category: Mapped[Category]
    public_id: Mapped[uuid.UUID]
    weight: Mapped[float]


def _row(number: int) -> dict[str, Any]:
    return {
        "id": number,
        "name": f"product {number}",
        "description": f"a thing that somebody may want to have, number {number}",
        "created_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number),
        "price": Decimal(0),
        "attributes": {"colour": "green", "sizes": [1, 2, 3], "supplier": {"id": number % 100, "country": "PT"}},
        "active": number % 10 != 0,
        "category": list(Category)[number % len(Category)],
        "public_id": uuid.UUID(int=number),
        "weight": number / 7,
    }


def engine_of(url: str) -> AsyncEngine:
    """An engine as applications have it; who waits for a connection waits as long as it takes."""
    return create_async_engine(url, pool_size=POOL_SIZE, max_overflow=0, pool_timeout=300)


async def fill(url: str, rows: int = ROWS) -> None:
    """Create the table, unless it is there."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        if not await connection.scalar(select(func.count()).select_from(Product)):
            await connection.execute(insert(Product), [_row(number) for number in range(1, rows + 1)])
    async with engine.connect() as connection:
        await _analyze(connection)
    await engine.dispose()


async def _analyze(connection: AsyncConnection) -> None:
    # Else autovacuum does it in the middle of a measurement.
    if connection.dialect.name == "postgresql":
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await autocommit.exec_driver_sql("VACUUM ANALYZE product")


def own_rows(number: int) -> range:
    """The rows that contender `number` may change: what it does to them nobody else's cache can know."""
    first = COLDEST.stop + number * CROWDED
    return range(first, first + CROWDED)


class Selects:
    """How many SELECTs of products an engine has sent."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        self.count += statement.startswith("SELECT") and "FROM product" in statement


@asynccontextmanager
async def counted(engine: AsyncEngine) -> AsyncGenerator[Selects]:
    """Count the engine's SELECTs of products."""
    selects = Selects()
    event.listen(engine.sync_engine, "before_cursor_execute", selects)
    try:
        yield selects
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", selects)
