"""The cache seen from its own side: what lies in the slots of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from asynccache import Cache, protocol
from asynccache.backends.base import Key
from asynccache.orm.entity import Entity
from tests.models import Author


class Slots:
    """Looks into the slots of one cache and one database, past all that the library does with them."""

    def __init__(self, cache: Cache, engine: AsyncEngine) -> None:
        self._cache = cache
        self._engine = engine.sync_engine

    async def row(self, model: type[Any], *primary_key: Any) -> bytes | None:
        """What lies in the slot of this row."""
        slot = self._entity(model).row(primary_key)
        assert slot is not None
        return (await self._read([slot.key]))[0]

    async def generations(self, model: type[Any]) -> list[bytes | None]:
        """What lies in the generations of this model's hierarchy."""
        return await self._read([slot.key for slot in self._entity(model).slots.generations])

    async def is_locked(self, model: type[Any], *primary_key: Any) -> bool:
        return protocol.owners_of(await self.row(model, *primary_key)) is not None

    async def are_generations_locked(self, model: type[Any]) -> bool:
        locked = {protocol.owners_of(slot) is not None for slot in await self.generations(model)}
        assert len(locked) == 1, "all, or none"
        return locked.pop()

    async def holds_value(self, model: type[Any], *primary_key: Any) -> bool:
        """Whether a row, or that there is none, is stored and valid."""
        slot = self._entity(model).row(primary_key)
        assert slot is not None
        return isinstance(protocol.judge(*await self._read(slot)), protocol.Hit)

    def _entity(self, model: type[Any]) -> Entity:
        scope = self._cache.scope_of(self._engine)
        entity = scope.entity(model) if scope is not None else None
        assert entity is not None
        return entity

    async def _read(self, keys: Sequence[Key]) -> list[bytes | None]:
        return await self._cache._store.backend.get_many(keys)


async def name_of(sessions: async_sessionmaker[Any], id_: int = 1) -> str | None:
    """An author's name, as a session of its own gets it."""
    async with sessions() as session:
        author = await session.get(Author, id_)
        return author.name if author is not None else None
