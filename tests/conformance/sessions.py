"""The session classes that take the place of `Session` and `AsyncSession` while SQLAlchemy's tests run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet

import sqlalchemy.ext.asyncio
import sqlalchemy.orm
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.mapper import _all_registries
from sqlalchemy.util import greenlet_spawn

from asynccache import AsyncCachedSession, Cache
from asynccache.eligibility import Step, whereabouts, why_not
from asynccache.errors import NotCacheableError
from asynccache.get import _USUAL, get
from asynccache.metrics import Stats
from asynccache.orm.entity import Entity
from asynccache.orm.keys import primary_key_of
from asynccache.sync_session import CachedSession, listen


class Mode(StrEnum):
    """base: SQLAlchemy's sessions.
    swapped: ours.
    forced: ours, and a synchronous session's gets and lazy loads read through the cache as those of an
        AsyncCachedSession's do; each row that they have loaded is made anew from the bytes that would be stored of it.
    """

    BASE = "base"
    SWAPPED = "swapped"
    FORCED = "forced"


class TestedCache(Cache):
    """A cache in memory in which all is registered that can be and is mapped by the time a session is made."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__("memory://", rewrite_pk_selects=True)
        self.forced = 0
        self._known: WeakSet[Mapper[Any]] = WeakSet()

    def register_all(self) -> None:
        managers = {manager for each in _all_registries() for manager in list(each._managers)}
        for mapper in {manager.mapper for manager in managers if manager.is_mapped}:
            # SQLAlchemy's tests unmap their classes, and whether these are garbage is found out later.
            if mapper not in self._known and not mapper._dispose_called:
                self._known.add(mapper)
                with suppress(NotCacheableError):
                    self.register(mapper.class_)

    def counts(self) -> Counter[str]:
        numbers = {each.name: getattr(self.stats, each.name) for each in fields(Stats)}
        counts = Counter({name: number for name, number in numbers.items() if isinstance(number, int)})
        counts["forced"] = self.forced
        return counts


class SyncSession(CachedSession):
    """`CachedSession`, as if it were the one that SQLAlchemy has."""

    tested: ClassVar[TestedCache]
    """The cache of the test that is running."""
    forced: ClassVar[bool]

    def __init__(self, bind: Any = None, **options: Any) -> None:
        self.tested.register_all()
        listen()  # tests of events end by removing all listeners
        options.setdefault("cache", self.tested)
        super().__init__(bind, **options)
        if self.forced:
            self.read_through = get
        self.merges = False

    def _merge(self, *args: Any, **options: Any) -> Any:
        before, self.merges = self.merges, True  # which compares with the database
        try:
            return super()._merge(*args, **options)
        finally:
            self.merges = before

    def get(self, entity: Any, ident: Any, **options: Any) -> Any:
        if self.forced and self.cache is not None and self._is_past_cache and not self.merges:
            return self._get_anew(entity, ident, options)
        return super().get(entity, ident, **options)

    async def _load_past_cache(self, model: Any, ident: Any, options: Mapping[str, Any]) -> object | None:
        with self.past_cache():
            return await greenlet_spawn(partial(self.get, model, ident, **options))

    def _get_anew(self, entity: Any, ident: Any, options: Mapping[str, Any]) -> Any:
        """Load a row, and put another instance in the place of the loaded one, as if it came from a cache."""
        is_usual = all(value in _USUAL.get(name, ()) for name, value in options.items())
        mapped = self._mapped(entity) if is_usual else None
        if mapped is None:
            return super().get(entity, ident, **options)
        if hasattr(ident, "__composite_values__") or is_dataclass(ident):
            return super().get(entity, ident, **options)
        primary_key = primary_key_of(mapped.mapper, ident)
        if mapped.row(primary_key) is None:
            return super().get(entity, ident, **options)
        if self.autoflush and not self._is_clean():
            self._autoflush()
        key = mapped.identity_key(primary_key)
        is_held = key in self.identity_map
        instance = super().get(entity, ident, **options)
        record = mapped.encode(instance, key) if instance is not None and not is_held else None
        if record is None:
            return instance
        loaded = instance_state(instance)
        self.identity_map.safe_discard(loaded)
        loaded._detach(self)
        self.tested.forced += 1
        return mapped.hydrate(self, key, record)

    def _mapped(self, model: Any) -> Entity | None:
        """None where a get would not be answered from a cache, whatever is in it."""
        where = whereabouts(self, self.cache, model) if self.cache is not None else None
        if where is None or self.cache is None:
            return None
        mapped, bind = where
        verdict = why_not(self.cache, self, mapped, bind)
        return mapped if isinstance(verdict, Step) or verdict in (None, "external connection") else None


class AsyncSession(AsyncCachedSession):
    """`AsyncCachedSession`, as if it were the one that SQLAlchemy has."""

    sync_session_class = SyncSession

    def __init__(self, bind: Any = None, **options: Any) -> None:
        options.setdefault("cache", SyncSession.tested)
        super().__init__(bind, **options)


def take_place(mode: Mode) -> None:
    """Put our classes where tests import SQLAlchemy's from, and where its factories take them by default."""
    if mode is Mode.BASE:
        return
    SyncSession.forced = mode is Mode.FORCED
    places = (
        (SyncSession, sqlalchemy.orm.Session, (sqlalchemy.orm, sqlalchemy.orm.session), sqlalchemy.orm.sessionmaker),
        (
            AsyncSession,
            sqlalchemy.ext.asyncio.AsyncSession,
            (sqlalchemy.ext.asyncio, sqlalchemy.ext.asyncio.session),
            sqlalchemy.ext.asyncio.async_sessionmaker,
        ),
    )
    for ours, theirs, modules, factory in places:
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(ours, name, getattr(theirs, name))
        for module in modules:
            setattr(module, theirs.__name__, ours)
        defaults = factory.__init__.__kwdefaults__
        assert defaults is not None
        assert defaults["class_"] is theirs
        defaults["class_"] = ours
