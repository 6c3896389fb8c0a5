"""`AsyncCachedSession` and the functions beside it: what an application uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy.exc import InvalidRequestError, NoResultFound
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Mapper, QueryableAttribute, RelationshipProperty, Session, object_session

from asynccache.by_key import get_by
from asynccache.cache import Cache
from asynccache.eligibility import entity_of
from asynccache.errors import ConfigurationError
from asynccache.get import Unanswered, get, get_now, get_unanswered
from asynccache.orm.keys import primary_key_of, primary_keys_of
from asynccache.orm.pk_select import PrimaryKeySelect, primary_key_select, result_of
from asynccache.orm.registry import mapper_of
from asynccache.orm.relationships import ManyToOne
from asynccache.reader import get_many, prefetch
from asynccache.sync_session import LEFT, CachedSession, leave

T = TypeVar("T")
K = TypeVar("K")


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
    _rewrites = False

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
            kind = getattr(
                sync_class, "class_", sync_class
            )  # a sessionmaker, with listeners of its own, will do as well
            if not issubclass(kind, CachedSession):
                name = kind.__name__
                raise ConfigurationError(
                    f"{sync_class!r} cannot tell the cache what it writes; combine the two: "
                    f"class My{name}(CachedSession, {name}): ..., and pass sync_session_class=My{name}"
                )
            kwargs["cache"] = cache
        super().__init__(bind, sync_session_class=sync_class, **kwargs)
        if cache is not None:
            cast("CachedSession", self.sync_session).read_through = get
            self._rewrites = cache.settings.rewrite_pk_selects
        self.cache = cache

    async def __aexit__(self, type_: Any, value: Any, traceback: Any) -> None:
        # AsyncSession closes in a task of its own and a greenlet, which costs more than a hit does.
        if type(self).close is AsyncCachedSession.close and self._closes_at_once():
            self.sync_session.close()
        else:
            await super().__aexit__(type_, value, traceback)

    async def close(self) -> None:
        """As `AsyncSession.close`."""
        if self._closes_at_once():
            self.sync_session.close()
        else:
            await super().close()

    def _closes_at_once(self) -> bool:
        return self.cache is not None and cast("CachedSession", self.sync_session).closes_at_once

    async def _plain_get(self, entity: Any, ident: Any, options: Mapping[str, Any]) -> object | None:
        with cast("CachedSession", self.sync_session).past_cache():
            found: object | None = await super().get(entity, ident, **options)
            return found

    async def _get_instead(self, select: PrimaryKeySelect) -> object | None:
        """Answer this statement from the cache; LEFT if it is to be executed."""
        sync, (mapper, primary_key, _) = cast("CachedSession", self.sync_session), select
        try:
            held = sync.identity_map.get(mapper.identity_key_from_primary_key(primary_key))
        except TypeError:  # not hashable, so no key
            return LEFT
        # A SELECT tells whether what the session holds is still there, and loads what is not loaded of it.
        if held is not None or self.cache is None:
            return LEFT
        return await get(sync, self.cache, mapper.class_, primary_key, {}, leave, self._plain_get)

    # A type checker sees AsyncSession's own signatures, which differ between SQLAlchemy 2.0 and 2.1.
    if not TYPE_CHECKING:

        async def get(self, entity, ident, **options):
            """As `AsyncSession.get`: from the identity map, else the cache, else by one SELECT."""
            cache = self.cache
            if cache is None:
                return await super().get(entity, ident, **options)
            found = get_now(self.sync_session, cache, entity, ident, options)
            if isinstance(found, Unanswered):
                return await get_unanswered(found, cache, (entity, ident, options), self._plain_get)
            return found

        async def execute(self, statement, params=None, **options):
            """As `AsyncSession.execute`; with `rewrite_pk_selects`, a SELECT by the primary key alone is a get."""
            if self._rewrites and not any(options.values()):
                select = primary_key_select(statement, params)
                if select is not None and (instance := await self._get_instead(select)) is not LEFT:
                    return result_of(select, instance)
            return await super().execute(statement, params, **options)

        async def scalar(self, statement, params=None, **options):
            """As `AsyncSession.scalar`, and as `execute`."""
            if self._rewrites and not any(options.values()):
                select = primary_key_select(statement, params)
                if select is not None and (instance := await self._get_instead(select)) is not LEFT:
                    return instance
            return await super().scalar(statement, params, **options)

        async def get_one(self, entity, ident, **options):
            """As `get`, but raises sqlalchemy.exc.NoResultFound if there is no such row."""
            instance = await self.get(entity, ident, **options)
            if instance is None:
                raise NoResultFound("No row was found when one was required")
            return instance


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
    wanted = primary_keys_of(mapper, pks)
    sync = cast("CachedSession", ours.sync_session)
    found = await get_many(sync, cache, mapper, list(dict.fromkeys(wanted.values())))
    return cast("dict[K, T | None]", {pk: found.get(primary_key) for pk, primary_key in wanted.items()})


async def cached_get_by(session: AsyncSession, model: type[T], /, **values: Any) -> T | None:
    """Get a row by a secondary key, through the cache: `await cached_get_by(session, User, email="eve@example.com")`.

    values: of the attributes of one key that the model was registered with, `cache.register(User, unique=["email"])`.
    Gives the row that the database holds with these values, as a SELECT would: what is pending is flushed before.
    Raises as `cached_get`; ConfigurationError for names that are no such key; SQLAlchemy's MultipleResultsFound if the
    database has several such rows, as it may have for a value of None.
    """
    ours, cache, _ = _registered(session, model)
    key = cache.models.unique_key(model, values)
    return cast("T | None", await get_by(cast("CachedSession", ours.sync_session), cache, model, key, values))


async def cached_prefetch(
    session: AsyncSession, instances: Iterable[object], attribute: QueryableAttribute[T | None]
) -> list[T]:
    """Load a many-to-one of many instances: one look into the cache, and one SELECT for what is not in it.

        books = (await session.scalars(select(Book))).all()
        authors = await cached_prefetch(session, books, Book.author)  # from here on book.author is there, without await

    instances: of the class that has the relationship, in this session.
    attribute: a many-to-one to the primary key of a cached model. What is loaded or assigned already stays as it is.
    Gives what they lead to, each once.

    Raises ConfigurationError for another attribute, or an instance that does not have it; NotRegisteredError if what
    it leads to is not cached; SQLAlchemy's InvalidRequestError for an instance that is not in this session.
    """
    parent = _many_to_one(attribute)
    ours, cache, _ = _registered(session, parent.target.class_)
    sync, wanted, owner = cast("CachedSession", ours.sync_session), list(instances), attribute.class_
    for each in wanted:
        if not isinstance(each, cast("type[Any]", owner)):
            raise ConfigurationError(f"{each!r} has no {attribute}; pass instances of {owner.__qualname__}")
        if object_session(each) is not sync:
            raise InvalidRequestError(f"{each!r} is not in this session; add it, or pass the session that it is in")
    return cast("list[T]", list(await prefetch(sync, cache, parent, wanted)))


def _many_to_one(attribute: Any) -> ManyToOne:
    relationship = getattr(attribute, "property", None)
    if not isinstance(relationship, RelationshipProperty):
        raise ConfigurationError(f"{_named(attribute)} is no relationship; pass a many-to-one, such as Book.author")
    if attribute is not getattr(attribute.class_, attribute.key, None):
        raise ConfigurationError(
            f"{_named(attribute)} is no relationship as it is mapped; pass {attribute.class_.__qualname__}."
            f"{attribute.key}, without an alias or further criteria"
        )
    parent = ManyToOne.of(relationship)
    if parent is None:
        raise ConfigurationError(
            f"{_named(attribute)} is no many-to-one by the primary key of what it leads to; "
            f"load it by .options(selectinload({_named(attribute)}))"
        )
    return parent


def _named(attribute: object) -> str:
    return str(attribute) if isinstance(attribute, QueryableAttribute) else repr(attribute)


def cached_invalidate(
    session: AsyncSession, model: type[Any], pk: Any, *, values: Mapping[str, Any] | None = None
) -> None:
    """Invalidate a row when this session commits, for a write that the library cannot see.

    pk: as for `get()`. Until then the session itself reads the row past the cache.
    values: for a model with secondary keys, what their attributes are by now; see `Cache.invalidate`.
    Raises as `cached_get_many`.
    """
    ours, cache, mapper = _registered(session, model)
    sync = ours.sync_session
    entity = entity_of(cast("CachedSession", sync), cache, model, sync.get_bind(mapper).engine)
    if entity is not None:
        if not sync.in_transaction():
            sync._autobegin_t()  # so that a rollback also forgets this
        slots = entity.slots_of(primary_key_of(mapper, pk), values or {})
        cast("CachedSession", sync).note().writes.note_slots(entity.slots, slots)


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
