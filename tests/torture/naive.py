"""The cache that is written in an afternoon: get, else SELECT and set; delete after COMMIT.

It goes through the same client as ours, which does what it can about time-outs and lost connections, so that the
protocol is all that differs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from asynccache import Change, Key, MemcachedBackend, Transition, Write
from asynccache.backends.base import UNREADABLE
from tests.torture.rows import model_of

_DELETED: Final = b"-"


class NaiveCache:
    def __init__(self, backend: MemcachedBackend, plain: async_sessionmaker[AsyncSession], ttl_s: float) -> None:
        self._backend = backend
        self._plain = plain
        self._ttl_s = ttl_s
        self.hits = 0

    async def version_of(self, key: int) -> int:
        (found,) = await self._backend.get_many([_key(key)])
        if found not in (None, UNREADABLE, _DELETED):
            self.hits += 1
            return int(found)
        model = model_of(key)
        async with self._plain() as session:
            version = (await session.scalars(select(model.version).where(model.id == key))).one()
        await self._backend.apply([Change(_key(key), _set(b"%d" % version, self._ttl_s))])
        return version

    async def delete(self, keys: Iterable[int]) -> None:
        await self._backend.apply([Change(_key(key), _set(_DELETED, 1)) for key in keys])


def _key(key: int) -> Key:
    return Key(b"naive:%d" % key, 0)


def _set(value: bytes, ttl_s: float) -> Transition:
    return lambda _: Write(value, ttl_s)
