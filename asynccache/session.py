"""`AsyncCachedSession` and the functions beside it: what an application uses."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy.exc import NoResultFound
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Mapper, Session

from asynccache.cache import Cache
from asynccache.errors import ConfigurationError
from asynccache.orm.entity import PrimaryKey, primary_key_of
from asynccache.orm.registry import mapper_of
from asynccache.orm.select import select_many
from asynccache.reader import Reader, entity_of, get, whereabouts
from asynccache.sync_session import CachedSession

T = TypeVar("T")
K = TypeVar("K")

_USUAL: Mapping[str, tuple[Any, ...]] = {
    "options": (None, (), []),
    "populate_existing": (None, False),
    "with_for_update": (None, False),
    "identity_token": (None,),
    "execution_options": (None, {}),
}
"""Arguments of `get()` that ask for nothing special. `async_scoped_session.get` passes them all, so that it is the
values that count; and they differ between SQLAlchemy 2.0 and 2.1."""


class AsyncCachedSession(AsyncSession):
    """An `AsyncSession` whose `get()` and `get_one()` read through a cache.

        Session = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)

    cache: None makes it a plain AsyncSession. Everything else is as AsyncSession has it.

    `get(..., populate_existing=True)` reads past the cache for one call, and so does every other argument that asks for
    something special: options, locks, execution options.

    Raises ConfigurationError for a `sync_session_class` that cannot tell the cache what it writes.
    """

    sync_session_class: type[Session] = CachedSession
    sync_session: Session

    def __init__(
        self,
        bind: Any = None,
        *,
        cache: Cache | None = None,
        sync_session_class: type[Session] | None = None,
        **kwargs: Any,
    ) -> None:
        sync_class = sync_session_class or self.sync_session_class
        if cache is not None:
            if not issubclass(sync_class, CachedSession):
                name = sync_class.__name__
                raise ConfigurationError(
                    f"{sync_class!r} cannot tell the cache what it writes; combine the two: "
                    f"class My{name}(CachedSession, {name}): ..., and pass sync_session_class=My{name}"
                )
            kwargs["cache"] = cache
        super().__init__(bind, sync_session_class=sync_class, **kwargs)
        self.cache = cache

    async def __aexit__(self, type_: Any, value: Any, traceback: Any) -> None:
        # AsyncSession closes in a task of its own and a greenlet, which costs more than a hit does.
        if self._closes_at_once and type(self).close is AsyncCachedSession.close:
            self.sync_session.close()
        else:
            await super().__aexit__(type_, value, traceback)

    async def close(self) -> None:
        """As `AsyncSession.close`."""
        if self._closes_at_once:
            self.sync_session.close()
        else:
            await super().close()

    @property
    def _closes_at_once(self) -> bool:
        return self.cache is not None and cast("CachedSession", self.sync_session).closes_at_once

    # A type checker sees AsyncSession's own signatures, which differ between SQLAlchemy 2.0 and 2.1.
    if not TYPE_CHECKING:

        async def get(self, entity, ident, **options):
            """As `AsyncSession.get`: from the identity map, else the cache, else by one SELECT."""
            cache = self.cache
            if cache is None:
                return await super().get(entity, ident, **options)
            if options and any(value not in _USUAL.get(name, ()) for name, value in options.items()):
                if cache.models.caches(entity):
                    cache.stats.bypassed["options"] += 1
                return await super().get(entity, ident, **options)
            return await get(self, cache, entity, ident, options, _plain_get)

        async def get_one(self, entity, ident, **options):
            """As `get`, but raises sqlalchemy.exc.NoResultFound if there is no such row."""
            instance = await self.get(entity, ident, **options)
            if instance is None:
                raise NoResultFound("No row was found when one was required")
            return instance


def _plain_get(session: AsyncSession, model: Any, ident: Any, options: Mapping[str, Any]) -> Awaitable[object | None]:
    # What `super().get` would be within `get`: not AsyncSession's own where another class stands between.
    return super(AsyncCachedSession, cast("AsyncCachedSession", session)).get(model, ident, **options)


async def cached_get(session: AsyncSession, model: type[T], pk: Any) -> T | None:
    """`session.get(model, pk)` through the cache, for code that is given any session of ours.

    session: an `AsyncCachedSession` with a cache; the type is that which existing code annotates.
    Raises ConfigurationError for any other session, NotRegisteredError for a model that is not cached.
    """
    ours, _, _ = _registered(session, model)
    return await ours.get(model, pk)


async def cached_get_many(session: AsyncSession, model: type[T], pks: Iterable[K]) -> dict[K, T | None]:
    """Get many rows: one look into the cache for all, one SELECT for those that are not in it.

    pks: as for `get()`, hashable: values, or tuples of values.
    Gives a dict from each of them, in order and as it was given, to the instance or None.
    Raises as `cached_get`; SQLAlchemy's InvalidRequestError for a wrong number of values.
    """
    ours, cache, mapper = _registered(session, model)
    wanted = {pk: primary_key_of(mapper, pk) for pk in pks}
    where = whereabouts(cast("CachedSession", ours.sync_session), cache, model)
    primary_keys = list(dict.fromkeys(wanted.values()))
    found: Mapping[PrimaryKey, object]
    if where is None:
        found = await select_many(ours, mapper, primary_keys)
    else:
        found = await Reader(ours, cache, *where).get_many(primary_keys)
    return cast("dict[K, T | None]", {pk: found.get(primary_key) for pk, primary_key in wanted.items()})


def cached_invalidate(session: AsyncSession, model: type[Any], pk: Any) -> None:
    """Invalidate a row when this session commits, for a write that the library cannot see.

    pk: as for `get()`. Until then the session itself reads the row past the cache.
    Raises as `cached_get_many`.
    """
    ours, cache, mapper = _registered(session, model)
    sync = ours.sync_session
    entity = entity_of(cast("CachedSession", sync), cache, model, sync.get_bind(mapper).engine)
    if entity is not None:
        if not sync.in_transaction():
            sync._autobegin_t()  # so that a rollback also forgets this
        cast("CachedSession", sync).note().writes.note_row(entity.slots, primary_key_of(mapper, pk))


def _registered(session: object, model: type[Any]) -> tuple[AsyncCachedSession, Cache, Mapper[Any]]:
    if isinstance(session, async_scoped_session):
        session = session()
    if not isinstance(session, AsyncCachedSession) or session.cache is None:
        raise ConfigurationError(
            f"{session!r} has no cache; make it by async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)"
        )
    mapper = mapper_of(model)
    if mapper is None or not session.cache.models.caches(model):
        raise session.cache.not_registered(model)
    return session, session.cache, mapper
