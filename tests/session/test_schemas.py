"""One row has one slot, by whichever name its schema goes; and tables of two schemas have two."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Executable, func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from asynccache import AsyncCachedSession, Cache
from tests.conftest import Sessions
from tests.models import Author, Base


@pytest.fixture
async def tenants(postgres_url: str, cache: Cache) -> AsyncIterator[tuple[Sessions, Sessions, AsyncEngine]]:
    """Sessions in the schemas `public` and `tenant` of one database, which only their search paths tell apart."""
    public = create_async_engine(postgres_url)
    tenant = create_async_engine(postgres_url, connect_args={"server_settings": {"search_path": "tenant"}})
    async with public.begin() as connection:
        await connection.execute(text("CREATE SCHEMA tenant"))
    makers = []
    for engine in (public, tenant):
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        maker = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        makers.append(maker)
        async with maker.begin() as session:
            session.add(Author(id=1, name="in public" if engine is public else "in tenant"))
    await cache.drain()
    yield makers[0], makers[1], public
    for engine in (public, tenant):
        await engine.dispose()


async def name_of(sessions: Sessions) -> str | None:
    async with sessions() as session:
        author = await session.get(Author, 1)
        return author.name if author is not None else None


async def test_schemas_that_only_the_search_path_tells_apart_are_two(
    tenants: tuple[Sessions, Sessions, AsyncEngine], cache: Cache
) -> None:
    public, tenant, _ = tenants
    for _ in range(3):
        assert await name_of(public) == "in public"
        assert await name_of(tenant) == "in tenant"
        await cache.drain()
    assert cache.stats.hits >= 2


async def test_the_standard_schema_is_one_whether_it_is_spelled_out_or_not(
    tenants: tuple[Sessions, Sessions, AsyncEngine], cache: Cache
) -> None:
    public, _, engine = tenants
    assert await name_of(public) == "in public"
    await cache.drain()
    spelled_out = async_sessionmaker(
        engine.execution_options(schema_translate_map={None: "public"}), class_=AsyncCachedSession, cache=cache
    )
    hits = cache.stats.hits
    assert await name_of(spelled_out) == "in public"
    assert cache.stats.hits == hits + 1
    async with spelled_out.begin() as session:
        author = await session.get_one(Author, 1)
        author.name = "changed"
    assert await name_of(public) == "changed"


async def test_a_process_that_has_used_no_database_yet_can_invalidate_in_the_right_schema(
    tenants: tuple[Sessions, Sessions, AsyncEngine], cache: Cache, postgres_url: str
) -> None:
    _, tenant, _ = tenants
    assert await name_of(tenant) == "in tenant"
    await cache.drain()
    script = create_async_engine(postgres_url, connect_args={"server_settings": {"search_path": "tenant"}})
    async with script.begin() as connection:
        await connection.execute(text("UPDATE author SET name = 'changed by a script'"))
    await script.dispose()
    unused = create_async_engine(postgres_url, connect_args={"server_settings": {"search_path": "tenant"}})
    await cache.invalidate(Author, 1, scope=unused)
    await unused.dispose()
    assert await name_of(tenant) == "changed by a script"


@pytest.mark.parametrize(
    ("setting", "lasts"),
    [
        (text("SET search_path TO tenant"), True),
        (select(func.set_config("search_path", "tenant", False)), True),
        (text("SELECT set_config('search_path', 'tenant', false)"), True),
        (text("SET LOCAL search_path TO tenant"), False),
        (select(func.set_config("search_path", "tenant", True)), False),
        (text("SELECT set_config('search_path', 'tenant', true)"), False),
    ],
    ids=str,
)
async def test_what_is_set_stays_on_its_connection_whose_rows_are_stored_no_more(
    tenants: tuple[Sessions, Sessions, AsyncEngine], cache: Cache, setting: Executable, *, lasts: bool
) -> None:
    """1. A session sets its search path and commits. 2. Its connection goes back to the pool, and to somebody else."""
    public, _, engine = tenants
    async with public() as session:
        await session.execute(setting)
        await session.commit()
    fills = cache.stats.fills
    assert await name_of(public) == ("in tenant" if lasts else "in public")
    await cache.drain()
    assert cache.stats.fills - fills == (not lasts)
    await engine.dispose()
    assert await name_of(public) == "in public"
