"""Who takes part: SQLAlchemy as it is, asynccache, and the other ways there are to cache rows under asyncio.

Each does what its own documentation says, with the settings that suit it best. A package that is not installed, or that
does not know a store, keeps its place in the tables with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Final, NamedTuple

from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.contenders.base import Contender, DoesNotRunError, Maker, Store
from benchmarks.server import Server

PLAIN: Final = "SQLAlchemy alone"
OURS: Final = "asynccache, memory"
OURS_MEMCACHED: Final = "asynccache, memcached"

_CLASSES: Final = {
    PLAIN: "base.Contender",
    OURS: "ours.OursInMemory",
    "aiocache + merge, memory": "aiocaches.AiocacheInMemory",
    "aiocache of dictionaries, memory": "aiocaches.AiocacheOfValues",
    "cashews + merge, memory": "cashew.CashewsInMemory",
    "dogpile recipe, memory": "dogpile.DogpileInMemory",
    "advanced-alchemy, memory": "alchemy.AlchemyInMemory",
    "sqlacache, memory": "sqlacaches.SqlacacheInMemory",
    OURS_MEMCACHED: "ours.OursInMemcached",
    "aiocache + merge, memcached": "aiocaches.AiocacheInMemcached",
    "cashews + merge, memcached": "cashew.CashewsInMemcached",
    "dogpile recipe, memcached": "dogpile.DogpileInMemcached",
    "advanced-alchemy, memcached": "alchemy.AlchemyInMemcached",
    "sqlacache, memcached": "sqlacaches.SqlacacheInMemcached",
}
NAMES: Final = tuple(_CLASSES)


def in_order(names: Iterable[str]) -> list[str]:
    """As they stand everywhere; others (a client alone, a number of entries) keep their order, after them."""
    return sorted(names, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))


class Field(NamedTuple):
    """Who takes part, and why others do not, by name."""

    contenders: list[Contender]
    absent: dict[str, str]

    async def aclose(self) -> None:
        for contender in self.contenders:
            await contender.aclose()


async def field_of(engine: AsyncEngine, server: Server, names: Iterable[str] = NAMES) -> Field:
    field = Field([], {})
    for name in names:
        try:
            contender = _maker(name)(name, engine, server)
            await contender.start()
        except DoesNotRunError as error:
            field.absent[name] = str(error)
        else:
            field.contenders.append(contender)
    return field


def _maker(name: str) -> Maker:
    module, _, kind = _CLASSES[name].partition(".")
    try:
        maker: Maker = getattr(import_module(f"{__name__}.{module}"), kind)
    except ImportError as error:
        raise DoesNotRunError(f"not installed: {error}") from error
    return maker


__all__ = [
    "NAMES",
    "OURS",
    "OURS_MEMCACHED",
    "PLAIN",
    "Contender",
    "DoesNotRunError",
    "Field",
    "Store",
    "field_of",
    "in_order",
]
