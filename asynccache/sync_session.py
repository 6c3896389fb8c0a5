"""`CachedSession`, and the events by which SQLAlchemy tells of its transactions.

Nothing overrides `commit()`: `session.begin()`, `sessionmaker.begin()` and `run_sync` never call it. The events see
every way to the end of a transaction, and these are the ones used, beside those of `asynccache.engine_events`:

    Session.after_begin             a connection joins the transaction
    Session.after_commit            COMMIT was answered: look at the locks
    Session.after_transaction_end   the end, however it came: unlock
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import LoaderCallableStatus, Mapper, PassiveFlag, Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.state import InstanceState
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from asynccache.cache import Cache
from asynccache.engine_events import follow, guard
from asynccache.orm.keys import PrimaryKey
from asynccache.orm.relationships import raises_on_sql
from asynccache.transaction import Transaction

_ASKED_FOR_BY_A_GET: Final = (
    "after_begin",
    "after_transaction_create",
    "after_transaction_end",
    "deleted_to_detached",
    "do_orm_execute",
    "loaded_as_persistent",
    "pending_to_transient",
    "persistent_to_detached",
    "persistent_to_transient",
)
"""The events whose listeners a session looks for when it begins, gets a row and is closed."""

PlainGet = Callable[[Any, Any, Mapping[str, Any]], Awaitable[object | None]]
"""SQLAlchemy's own get, of a model and a primary key, with the options that the user gave."""

LEFT: Final = object()
"""What a `PlainGet` answers that leaves the row to whoever asked for it."""


async def leave(_model: Any, _ident: Any, _options: Mapping[str, Any]) -> object:
    return LEFT


class ReadThrough(Protocol):
    """`asynccache.get.get`, which stands above."""

    def __call__(
        self,
        sync: CachedSession,
        cache: Cache,
        model: Any,
        ident: Any,
        options: Mapping[str, Any],
        plain_get: PlainGet,
        load: PlainGet | None = None,
    ) -> Awaitable[object | None]: ...


class CachedSession(Session):
    """A session that tells its cache what it writes: the synchronous side of `AsyncCachedSession`.

    To combine it with another session class: `class MySession(CachedSession, TheirSession): ...`, and then
    `sync_session_class=MySession`.

    cache: None makes it a plain session. Everything else is as `sqlalchemy.orm.Session` has it.
    """

    chooses_bind = False
    """Whether `get_bind` has to be asked for each model: it is one's own, or single models or tables are bound to
    something else. Otherwise it gives `bind` for all."""
    _has_usual_close = True
    cached_transaction: Transaction | None = None
    """What the cache knows of the transaction that is under way; None if it has done nothing yet."""

    read_through: ReadThrough | None = None
    """How rows are read for code that SQLAlchemy runs for an `AsyncCachedSession`; None in a session without one."""
    was_told_to_expire = False
    """`expire` or `expire_all` was called in this transaction: for what the database has now, not the cache."""
    _is_past_cache = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.chooses_bind = cls.get_bind is not Session.get_bind
        cls._has_usual_close = cls.close is Session.close

    def __init__(self, *args: Any, cache: Cache | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = cache
        if cache is not None:
            _listen_once()
            # As SQLAlchemy does for each event when a session is first asked for it, by a call. A class of the
            # application's own may have listened to some already.
            if "dispatch" not in vars(self):
                listeners: Any = self.dispatch
                for name in _ASKED_FOR_BY_A_GET:
                    setattr(listeners, name, listeners._empty_listeners[name])

    def _add_bind(self, key: Any, bind: Engine | Connection) -> None:
        # SQLAlchemy's own, to which `binds`, `bind_mapper` and `bind_table` come. What it makes of them has one name
        # in 2.0 and another in 2.1.
        super()._add_bind(key, bind)
        self.chooses_bind = True

    @property
    def holds_connection(self) -> bool:
        return self.cached_transaction is not None and bool(self.cached_transaction.joined)

    @property
    def closes_at_once(self) -> bool:
        """Whether closing awaits nothing: there is no connection to give back, and nobody listens who might await."""
        transaction = self.cached_transaction
        if not self._has_usual_close or (transaction is not None and transaction.joined):
            return False
        listeners = self.dispatch
        return not (
            listeners.persistent_to_detached
            or listeners.pending_to_transient
            or len(listeners.after_transaction_end) > 1  # beside our own
        )

    # --------------------------------------------------------------------------------------------------------- reading

    @contextmanager
    def past_cache(self) -> Generator[None]:
        """What is got and lazily loaded meanwhile is read past the cache."""
        before, self._is_past_cache = self._is_past_cache, True
        try:
            yield
        finally:
            self._is_past_cache = before

    @property
    def _reader(self) -> ReadThrough | None:
        """`read_through`, if it can be awaited here and now."""
        if self.cache is None or self._is_past_cache or self._flushing or not in_greenlet():
            return None
        return self.read_through

    def _get_related(self, mapper: Mapper[Any], primary_key: PrimaryKey) -> object:
        """What a many-to-one leads to, as SQLAlchemy's lazy loads expect it; LEFT if they are to find out."""
        held = self.identity_map.get(mapper.identity_key_from_primary_key(primary_key))
        reader = self._reader if held is None or instance_state(held).expired else None
        if reader is None or self.cache is None:
            return LEFT
        found = await_only(reader(self, self.cache, mapper.class_, primary_key, {}, leave, self._load_past_cache))
        return LoaderCallableStatus.PASSIVE_CLASS_MISMATCH if found is None else found  # which is taken for None

    async def _load_past_cache(self, model: Any, ident: Any, options: Mapping[str, Any]) -> object | None:
        with self.past_cache():
            return await greenlet_spawn(partial(super().get, model, ident, **options))

    # A type checker sees Session's own signatures, which differ between SQLAlchemy 2.0 and 2.1.
    if not TYPE_CHECKING:

        def _identity_lookup(
            self,
            mapper,
            primary_key_identity,
            identity_token=None,
            passive=PassiveFlag.PASSIVE_OFF,
            lazy_loaded_from=None,
            **options,
        ):
            # SQLAlchemy's own. The lazy load of a many-to-one by its target's primary key asks it first, and emits a
            # SELECT if it gives None. `sqlalchemy.ext.horizontal_shard` overrides it as well.
            if lazy_loaded_from is not None and _may_be_a_get(mapper, identity_token, passive, lazy_loaded_from):
                found = self._get_related(mapper, tuple(primary_key_identity))
                if found is not LEFT:
                    return found
            return super()._identity_lookup(
                mapper,
                primary_key_identity,
                identity_token=identity_token,
                passive=passive,
                lazy_loaded_from=lazy_loaded_from,
                **options,
            )

        def get(self, entity, ident, **options):
            """As `Session.get`: within `AsyncSession.run_sync` through the cache, like `AsyncCachedSession.get`."""
            reader = self._reader
            if reader is None:
                return super().get(entity, ident, **options)
            return await_only(reader(self, self.cache, entity, ident, options, self._load_past_cache))

        def merge(self, *args, **options):
            """As `Session.merge`: it compares with what is in the database."""
            with self.past_cache():
                return super().merge(*args, **options)

        if hasattr(Session, "merge_all"):  # SQLAlchemy 2.1

            def merge_all(self, *args, **options):
                """As `Session.merge_all`, and as `merge`."""
                with self.past_cache():
                    return super().merge_all(*args, **options)

    def expire(self, instance: object, attribute_names: Iterable[str] | None = None) -> None:
        """As `Session.expire`."""
        self.was_told_to_expire = True
        super().expire(instance, attribute_names)

    def expire_all(self) -> None:
        """As `Session.expire_all`."""
        self.was_told_to_expire = True
        super().expire_all()

    def note(self) -> Transaction:
        """The `cached_transaction`, begun if need be."""
        assert self.cache is not None
        if self.cached_transaction is None:
            self.cached_transaction = Transaction(self.cache)
        return self.cached_transaction


def _may_be_a_get(
    mapper: Mapper[Any], identity_token: object, passive: PassiveFlag, parent: InstanceState[Any]
) -> bool:
    """Whether a lazy load is what an access to the attribute of a persistent instance leads to, and no more."""
    return (
        passive == PassiveFlag.PASSIVE_OFF
        and identity_token is None
        and parent.key is not None
        and parent.identity_token is None
        and not parent.load_options  # which may be about what is loaded
        and not raises_on_sql(parent.mapper, mapper)
    )


# ----------------------------------------------------------------------------------------------------- session events


def _after_begin(session: Session, transaction: SessionTransaction, connection: object) -> None:
    if not isinstance(session, CachedSession) or session.cache is None:
        return
    if not isinstance(connection, Connection):
        return  # a stand-in, as tests have: it has no events to listen to, and reaches no database
    root = transaction
    while root.parent is not None:
        root = root.parent
    *_, begun_by_session = root._connections[connection]
    session.cached_transaction = follow(connection, session.note(), external=not begun_by_session)


def _after_commit(session: Session) -> None:
    if isinstance(session, CachedSession) and (ours := session.cached_transaction) is not None:
        if ours.joined:
            guard(ours.answered)
        elif not session.in_nested_transaction():
            guard(ours.committed_without_connection)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if isinstance(session, CachedSession) and transaction.parent is None:
        ours, session.cached_transaction = session.cached_transaction, None
        session.was_told_to_expire = False
        # An external one goes on, but for the COMMIT of a connection that is the session's own.
        if ours is not None and (ours.awaits_answer or not ours.external):
            guard(ours.end)
            ours.deliver_cancellation()  # here, at the very end


# ---------------------------------------------------------------------------------------------------------- listening

_LISTENERS: Sequence[tuple[Any, str, Callable[..., None]]] = (
    (CachedSession, "after_begin", _after_begin),
    (CachedSession, "after_commit", _after_commit),
    (CachedSession, "after_transaction_end", _after_transaction_end),
)


def listen() -> None:
    """Have SQLAlchemy tell us. To be called once, or again when something has removed all listeners."""
    for target, name, listener in _LISTENERS:
        if not event.contains(target, name, listener):
            # First of all, to hear what the application's own listeners execute.
            event.listen(target, name, listener, insert=name == "after_begin")


_listen_once = cache(listen)
