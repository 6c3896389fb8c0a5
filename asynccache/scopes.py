"""Finds out which database an engine reads and writes, and has one `Scope` for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Dialect, Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool

from asynccache.errors import ConfigurationError
from asynccache.events import Model
from asynccache.orm.entity import Scope, standard_schema
from asynccache.orm.registry import Models
from asynccache.protocol import Slot


class Scopes:
    """The databases that one cache has met in this process.

    warn_once: told of an engine whose database has no name.
    """

    def __init__(self, models: Models, *, namespace: str, buckets: int, warn_once: Callable[[str], None]) -> None:
        self._models = models
        self._namespace = namespace
        self._buckets = buckets
        self._warn_once = warn_once
        self._scopes: dict[tuple[Any, ...], Scope] = {}
        self._by_engine: WeakKeyDictionary[Engine, Scope] = WeakKeyDictionary()
        self._latest_engine: Callable[[], Engine | None] = lambda: None
        self._latest_scope: Scope | None = None
        self._memory_databases: WeakKeyDictionary[Pool, str] = WeakKeyDictionary()

    def of(self, engine: Engine, options: Mapping[str, Any] | None = None) -> Scope | None:
        """The scope of what is read and written through an engine.

        options: the execution options in force, if they may differ from the engine's.
        None if nothing tells which database this is: a URL that does not name one.
        """
        if options is None:
            if self._latest_engine() is engine:  # nearly always: an application has one
                return self._latest_scope
            scope = self._by_engine.get(engine)
            if scope is None:
                scope = self.of(engine, engine.get_execution_options())
                # A database in memory ends with the engine's pool; and the default schema is known after a connection.
                if scope is not None and engine.dialect.default_schema_name and not _is_in_memory(engine):
                    self._by_engine[engine] = scope
            if engine in self._by_engine:
                self._latest_engine, self._latest_scope = ref(engine), scope
            return scope
        name = options.get("cache_scope") or self._database_of(engine)
        if name is None:
            self._warn_once(
                f"{engine.url!r} does not name its database, so that nothing read through it is cached; "
                'give it a name: create_async_engine(..., execution_options={"cache_scope": "..."})'
            )
            return None
        return self._scope(name, engine.dialect, options.get("schema_translate_map") or {})

    async def meant_by(self, scope: str | Engine | AsyncEngine | None) -> list[Scope]:
        """The scopes of an engine, of a database's name, or for None all that there are.

        Raises ConfigurationError if that is none; what connecting raises, for an engine that nobody has used yet.
        """
        if isinstance(scope, AsyncEngine):
            if scope.dialect.default_schema_name is None:
                async with scope.connect():  # which tells it
                    pass
            scope = scope.sync_engine
        if isinstance(scope, Engine):
            found = self.of(scope)
            known = [found] if found is not None else []
        elif scope is None:
            known = list(self._scopes.values())
        else:
            known = [each for each in self._scopes.values() if each.name == scope]
            known = known or [self._scope(scope, DefaultDialect(), {})]
        if not known:
            raise ConfigurationError(
                "this process has used no database with this cache yet; say which one you mean: scope=engine"
            )
        return known

    def model_of(self, slot: Slot) -> Model:
        """The class at the root of the hierarchy whose rows have these slots."""
        return next(filter(None, (scope.model_of(slot) for scope in self._scopes.values())), object)

    def forget(self) -> None:
        """What is registered has changed."""
        for scope in self._scopes.values():
            scope.forget()

    def _scope(self, name: str, dialect: Dialect, schema_translate_map: Mapping[str | None, str | None]) -> Scope:
        # Until there was a connection to ask, the default schema is taken for the standard one.
        default_schema = dialect.default_schema_name or standard_schema(dialect)
        key = (name, dialect.name, default_schema, frozenset(schema_translate_map.items()))
        scope = self._scopes.get(key)
        if scope is None:
            scope = self._scopes[key] = Scope(
                self._models,
                dialect,
                name=name,
                namespace=self._namespace,
                default_schema=default_schema,
                schema_translate_map=dict(schema_translate_map),
                buckets=self._buckets,
            )
        return scope

    def _database_of(self, engine: Engine) -> str | None:
        """A database's name; a random one for SQLite in memory, which lives as long as its pool."""
        database = engine.url.database
        if _is_in_memory(engine):
            name: str = self._memory_databases.setdefault(engine.pool, f"memory-{uuid4().hex}")
            return name
        if engine.dialect.name == "sqlite" and database and not database.startswith("file:"):
            return os.path.abspath(database)
        return database or None


def _is_in_memory(engine: Engine) -> bool:
    database = engine.url.database
    return engine.dialect.name == "sqlite" and (not database or ":memory:" in database or "mode=memory" in database)
