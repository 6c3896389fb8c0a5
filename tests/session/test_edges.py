"""Unusual but legal uses of SQLAlchemy, each of which gave a wrong answer once."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Dialect,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, QueryContext, mapped_column, synonym
from sqlalchemy.types import TypeDecorator

from asynccache import AsyncCachedSession, AsyncCacheWarning, Cache, cached_get_many, cached_invalidate, sync_session
from asynccache.orm.statements import effect_of
from asynccache.sync_session import CachedSession
from tests.conftest import Sessions, Statements, listening
from tests.models import Author, Base, Country


async def name_of(sessions: Sessions, model: type[Any] = Author, primary_key: Any = 1) -> str | None:
    """As it is read in a session of its own, once all that earlier ones read is stored."""
    async with sessions() as session:
        assert session.cache is not None
        await session.cache.drain()
        instance = await session.get(model, primary_key)
        return instance.name if instance is not None else None


@pytest.fixture
async def author(sessions: Sessions) -> None:
    """One author, in the database and in the cache."""
    async with sessions.begin() as session:
        session.add(Author(id=1, name="old"))
    assert await name_of(sessions) == "old"


def another_author() -> type[Any]:
    """A class with the same name, mapped to the same table, by another registry."""

    class Other(DeclarativeBase):
        pass

    class Author(Other):
        __tablename__ = "author"

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]
        number = synonym("id")

    return Author


# ------------------------------------------------------------------------------------------------------------- classes


async def test_two_classes_of_one_table_each_get_their_own_instances(
    author: None, cache: Cache, sessions: Sessions
) -> None:
    models: list[type[Any]] = [Author, another_author(), another_author()]
    for model in models[1:]:
        cache.register(model)

    async def get(model: type[Any]) -> object:
        async with sessions() as session:
            return await session.get(model, 1)

    for model in models * 2:
        assert type(await get(model)) is model
        await cache.drain()
    await cache.invalidate(Author, 1)
    found = await asyncio.gather(*(get(model) for model in models * 3))
    assert [type(each) for each in found] == models * 3


async def test_a_load_listener_that_comes_late_is_heard(author: None, cache: Cache, sessions: Sessions) -> None:
    model = another_author()
    cache.register(model)
    for _ in range(2):
        await name_of(sessions, model)
    heard: list[object] = []
    event.listen(model, "load", lambda target, _: heard.append(target))
    hits = cache.stats.hits
    await name_of(sessions, model)
    assert cache.stats.hits == hits + 1
    assert len(heard) == 1


async def test_a_synonym_may_name_the_primary_key(author: None, cache: Cache, sessions: Sessions) -> None:
    model = another_author()
    cache.register(model)
    assert await name_of(sessions, model, {"number": 1}) == "old"
    await cache.invalidate(model, {"number": 1})


# ----------------------------------------------------------------------------------------------------------- databases


async def test_a_database_in_memory_is_another_one_after_its_engine_was_disposed_of(cache: Cache) -> None:
    engine = create_async_engine("sqlite+aiosqlite:///:memory:")
    sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
    for _ in range(2):
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        assert await name_of(sessions) is None
        async with sessions.begin() as session:
            session.add(Author(id=1, name="old"))
        assert await name_of(sessions) == "old"
        await cache.drain()
        await engine.dispose()


async def test_an_engine_is_heard_whatever_was_at_its_address_before(
    cache: Cache, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy's registry of listeners knows an engine by its address. Of one that is gone it still tells who
    listened, as long as a connection of it is held somewhere; and another may be made there meanwhile."""
    async with AsyncCachedSession(cache=cache) as session:
        assert session.cache, "what listens to all sessions does so by now"
    monkeypatch.setattr(event, "contains", lambda *_: True)
    another = create_async_engine(engine.url)
    sessions = async_sessionmaker(another, class_=AsyncCachedSession, cache=cache)
    async with sessions.begin() as session:
        session.add(Author(id=1, name="old"))
    assert await name_of(sessions) == "old"
    async with sessions.begin() as session:
        await session.execute(update(Author).values(name="new"))
    assert await name_of(sessions) == "new"
    await another.dispose()


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "autocommit"])
async def test_the_name_of_an_isolation_level_may_be_spelled_in_any_way(
    author: None, engine: AsyncEngine, cache: Cache, sessions: Sessions, level: str
) -> None:
    at_once = engine.execution_options(isolation_level=level)
    async with AsyncCachedSession(at_once, cache=cache) as session:
        await session.execute(update(Author).where(Author.id == 1).values(name="new"))
        await session.rollback()
    assert await name_of(sessions) == "new"


async def test_while_the_database_is_down_nobody_waits_for_the_failures_of_others(cache: Cache) -> None:
    async def connect(*_: object, **__: object) -> None:
        await asyncio.sleep(0.2)
        raise OSError("down")

    engine = create_async_engine("postgresql+asyncpg://host/name", async_creator=connect)
    sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
    async with asyncio.timeout(1):  # in turn they would take 2 s
        found = await asyncio.gather(*(name_of(sessions) for _ in range(10)), return_exceptions=True)
    assert [type(each) for each in found] == [OSError] * 10


# ------------------------------------------------------------------------------------------------------------- tenants


@pytest.fixture
async def tenants(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """Three schemas, in each of which the author has its name."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/main.db")

    @event.listens_for(engine.sync_engine, "connect")
    def attach(connection: Any, _: object) -> None:
        for schema in ("one", "two"):
            connection.execute(f"ATTACH '{tmp_path}/{schema}.db' AS {schema}")

    for schema in ("main", "one", "two"):
        async with engine.execution_options(schema_translate_map={None: schema}).begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(Author).values(id=1, name=schema))
    yield engine
    await engine.dispose()
    gc.collect()


async def test_a_connection_may_change_its_schema_within_a_transaction(tenants: AsyncEngine, cache: Cache) -> None:
    async def read_and_write(schema: str, name: str) -> str:
        async with AsyncCachedSession(tenants, cache=cache) as session:
            connection = await session.connection()
            _ = await connection.execution_options(schema_translate_map={None: schema})
            author = await session.get_one(Author, 1)
            before, author.name = author.name, name
            await session.commit()
        await cache.drain()
        return before

    for before, after in (("", "a"), ("a", "b")):
        for schema in ("one", "two"):
            translated = tenants.execution_options(schema_translate_map={None: schema})
            sessions = async_sessionmaker(translated, class_=AsyncCachedSession, cache=cache)
            assert await name_of(sessions) == (before or schema)
            await cache.drain()
            assert await read_and_write(schema, after) == (before or schema)
            assert await name_of(sessions) == after


async def test_a_session_that_has_its_schema_from_after_begin_gets_no_other(tenants: AsyncEngine, cache: Cache) -> None:
    class TenantSession(CachedSession):
        pass

    schema = ""

    def choose(_session: object, _transaction: object, connection: Connection) -> None:
        connection.execution_options(schema_translate_map={None: schema})

    sessions = async_sessionmaker(tenants, class_=AsyncCachedSession, cache=cache)
    of_tenant = async_sessionmaker(tenants, class_=AsyncCachedSession, cache=cache, sync_session_class=TenantSession)
    assert await name_of(sessions) == "main"
    with listening(TenantSession, "after_begin", choose):
        for schema in ("one", "two", "one", "two"):
            assert await name_of(of_tenant) == schema
            async with of_tenant() as session:
                found = await cached_get_many(session, Author, [1])
            assert found[1] is not None
            assert found[1].name == schema


@pytest.mark.parametrize("setting", ["SET LOCAL search_path TO {}", "SELECT set_config('search_path', '{}', true)"])
@pytest.mark.parametrize("listens", [False, True])
async def test_a_tenant_that_is_chosen_by_a_setting_gets_no_other(
    postgres_url: str, cache: Cache, setting: str, listens: bool
) -> None:
    engine = create_async_engine(postgres_url)
    async with engine.begin() as connection:
        for schema in ("public", "one", "two"):
            await connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
            await connection.execute(text(f"CREATE TABLE {schema}.author (id int PRIMARY KEY, name text)"))
            await connection.execute(text(f"INSERT INTO {schema}.author VALUES (1, '{schema}')"))

    class TenantSession(CachedSession):
        pass

    schema = ""

    def choose(_session: object, _transaction: object, connection: Connection) -> None:
        connection.exec_driver_sql(setting.format(schema))

    async def read() -> str:
        async with AsyncCachedSession(engine, cache=cache, sync_session_class=TenantSession) as session:
            if not listens:
                await session.execute(text(setting.format(schema)))
            return (await session.get_one(Author, 1)).name

    if listens:  # before the first session with a cache is made
        event.remove(CachedSession, "after_begin", sync_session._after_begin)
    with listening(TenantSession, "after_begin", choose) if listens else nullcontext():
        sync_session.listen()
        for schema in ("one", "two", "one", "two"):
            assert await read() == schema
            await cache.drain()
    await engine.dispose()


async def test_a_schema_that_is_chosen_when_the_engine_begins_is_read_past_the_cache(
    tenants: AsyncEngine, cache: Cache
) -> None:
    schema = "main"

    def choose(connection: Connection) -> None:
        connection.execution_options(schema_translate_map={None: schema})

    sessions = async_sessionmaker(tenants, class_=AsyncCachedSession, cache=cache)
    assert await name_of(sessions) == "main"
    with listening(tenants.sync_engine, "begin", choose):
        schema = "one"
        with pytest.warns(AsyncCacheWarning, match="begin listeners"):
            assert await name_of(sessions) == "one"
        schema = "two"
        assert await name_of(sessions) == "two"


def test_a_setting_may_be_made_by_a_function_and_two_statements_by_one_string() -> None:
    compiled = select(func.set_config("app.tenant", "1", True)).compile()
    assert effect_of(compiled, str(compiled)).changes_settings
    assert effect_of(None, "SELECT 1; UPDATE author SET name = 'new'").unknown
    assert not effect_of(None, "SELECT 1;\n").writes_something


async def test_an_invalidation_goes_to_the_schema_of_its_session(tenants: AsyncEngine, cache: Cache) -> None:
    translated = tenants.execution_options(schema_translate_map={None: "one"})
    sessions = async_sessionmaker(translated, class_=AsyncCachedSession, cache=cache)
    assert await name_of(sessions) == "one"
    await cache.drain()
    async with translated.begin() as connection:  # which nobody sees
        await connection.execute(update(Author).values(name="new"))
    async with AsyncCachedSession(tenants, cache=cache) as session:
        _ = await session.connection(execution_options={"schema_translate_map": {None: "one"}})
        cached_invalidate(session, Author, 1)
        await session.commit()
    assert await name_of(sessions) == "new"


async def test_a_sharded_session_reads_past_the_cache(author: None, engine: AsyncEngine, cache: Cache) -> None:
    class Sharded(CachedSession, ShardedSession):
        pass

    def choose(_mapper: Mapper[Any], instance: Author, clause: object = None) -> str:
        return {"old": "shard"}[instance.name]  # asked without an instance, it does not know

    sessions = async_sessionmaker(
        class_=AsyncCachedSession,
        sync_session_class=Sharded,
        cache=cache,
        shards={"shard": engine.sync_engine},
        shard_chooser=choose,
        identity_chooser=lambda *_, **__: ["shard"],
        execute_chooser=lambda _: ["shard"],
    )
    assert await name_of(sessions) == "old"


# -------------------------------------------------------------------------------------------------------------- writes


async def test_a_write_in_a_mapper_event_is_seen_although_statements_are_not_cached(
    author: None, engine: AsyncEngine, cache: Cache, sessions: Sessions
) -> None:
    def rename(_mapper: object, connection: Connection, _target: object) -> None:
        connection.execute(update(Author).where(Author.id == 1).values(name="new"))

    uncompiled = engine.execution_options(compiled_cache=None)
    with listening(Country, "before_insert", rename):
        async with AsyncCachedSession(uncompiled, cache=cache) as session:
            session.add(Country(code="de", name="Germany"))
            await session.commit()
    assert await name_of(sessions) == "new"


async def test_another_table_of_that_name_may_have_its_key_in_another_order(
    engine: AsyncEngine, cache: Cache, sessions: Sessions
) -> None:
    def place(metadata: MetaData, *key: str) -> Table:
        return Table(
            "place", metadata, *(Column(each, Integer, primary_key=True) for each in key), Column("name", String)
        )

    class Place(DeclarativeBase):
        pass

    class Seat(Place):
        __table__ = place(Place.metadata, "row", "seat")

    cache.register(Seat)
    async with engine.begin() as connection:
        await connection.run_sync(Place.metadata.create_all)
    async with sessions.begin() as session:
        session.add(Seat(row=1, seat=2, name="old"))
    assert await name_of(sessions, Seat, (1, 2)) == "old"
    other = place(MetaData(), "seat", "row")
    async with sessions.begin() as session:
        await session.execute(update(other).where(other.c.row == 1, other.c.seat == 2).values(name="new"))
    assert await name_of(sessions, Seat, (1, 2)) == "new"


class Lower(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return value.lower() if value is not None else None


async def test_a_parameter_may_be_sent_as_another_value_than_it_was_given(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        session.add(Country(code="de", name="old"))
    assert await name_of(sessions, Country, "de") == "old"
    code = bindparam("given", "DE", type_=Lower())
    async with sessions.begin() as session:
        await session.execute(update(Country).where(Country.code == code).values(name="new"))
    assert await name_of(sessions, Country, "de") == "new"


async def test_many_are_found_by_keys_that_only_the_database_takes_for_the_same(
    author: None, sessions: Sessions
) -> None:
    for _ in range(2):
        async with sessions() as session:
            assert await session.get(Author, "1") is not None
            session.expunge_all()
            found = await cached_get_many(session, Author, ["1", 2])
            assert found["1"] is not None
            assert found[2] is None


async def test_a_commit_that_the_application_writes_itself_is_a_commit(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    async with sessions.begin() as session:
        session.add(Author(id=1, name="old"))
    await cache.drain()
    async with sessions() as session:
        await session.get(Author, 1)
    await cache.drain()

    async with sessions() as writer:
        await writer.execute(update(Author).where(Author.id == 1).values(name="new"))
        await writer.execute(text("COMMIT"))
        async with sessions() as session:
            assert (await session.get_one(Author, 1)).name == "new"
        await writer.rollback()


async def test_load_listeners_find_the_session_in_their_context(sessions: Sessions, cache: Cache) -> None:
    found: list[object] = []

    def listener(target: Author, context: QueryContext) -> None:
        found.append(context.session)

    async with sessions.begin() as session:
        session.add(Author(id=1, name="old"))
    await cache.drain()
    event.listen(Author, "load", listener)
    try:
        async with sessions() as loading, sessions() as hit:
            await loading.get(Author, 1)
            await cache.drain()
            await hit.get(Author, 1)
            assert cache.stats.hits == 1
            assert found == [loading.sync_session, hit.sync_session]
    finally:
        event.remove(Author, "load", listener)
