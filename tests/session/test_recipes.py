"""The recipes of `docs/recipes.md`, as that page has them, and what they are for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlmodel
from advanced_alchemy.config import AsyncSessionConfig, SQLAlchemyAsyncConfig
from sqlalchemy import event, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import sessionmaker

from asynccache import AsyncCachedSession, Cache, CachedSession, ConfigurationError
from tests.docs.pages import ROOT, blocks_of
from tests.docs.stage import airports, run
from tests.models import Author

RECIPES = ROOT / "docs" / "recipes.md"


@pytest.fixture
async def names(sqlite_url: str) -> AsyncIterator[dict[str, Any]]:
    """What the page has when it is through."""
    async with airports(sqlite_url) as names:
        for block in blocks_of(RECIPES):
            await run(block, names)
        await names["cache"].drain()
        yield names


async def change_past_the_cache(engine: AsyncEngine, model: Any) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(update(model).values(name="past the cache"))
        await session.commit()


async def test_sqlmodel_reads_through_the_cache_and_invalidates(names: dict[str, Any]) -> None:
    cache, hero, sessions = names["cache"], names["Hero"], names["HeroSession"]
    async with sessions() as session:
        assert (await session.get(hero, 1)).name == "Deadpond"
    await cache.drain()
    await change_past_the_cache(names["engine"], hero)
    async with sessions.begin() as session:
        found = await session.get(hero, 1)
        assert found.name == "Deadpond"
        found.name = "Wade"
    async with sessions() as session:
        assert (await session.get(hero, 1)).name == "Wade"
        assert (await session.exec(sqlmodel.select(hero.name))).all() == ["Wade"]


async def test_advanced_alchemy_reads_through_the_cache_and_invalidates(names: dict[str, Any]) -> None:
    cache, airport, alchemy = names["cache"], names["Airport"], names["alchemy"]
    async with alchemy.get_session() as session:
        assert (await session.get(airport, "EDDF")).name == "Rhein-Main"
    await cache.drain()
    await change_past_the_cache(names["engine"], airport)
    async with alchemy.get_session() as session:
        found = await session.get(airport, "EDDF")
        assert found.name == "Rhein-Main"
        found.name = "Frankfurt"
        await names["Airports"](session=session).update(found, auto_commit=True)
    async with alchemy.get_session() as session:
        assert (await session.get(airport, "EDDF")).name == "Frankfurt"


async def test_advanced_alchemy_s_own_session_maker_is_refused(engine: AsyncEngine, cache: Cache) -> None:
    class Ours(AsyncCachedSession):
        """Its options have no place for a cache."""

        def __init__(self, bind: Any = None, **options: Any) -> None:
            super().__init__(bind, cache=cache, **options)

    config = SQLAlchemyAsyncConfig(engine_instance=engine, session_config=AsyncSessionConfig(class_=Ours))
    with pytest.raises(ConfigurationError, match=r"cannot tell the cache what it writes.*class MySession"):
        config.create_session_maker()()


async def test_a_sync_sessionmaker_of_ours_with_listeners_will_do(engine: AsyncEngine, cache: Cache) -> None:
    makers = sessionmaker(class_=CachedSession)
    commits: list[object] = []
    event.listen(makers, "before_commit", commits.append)
    async with AsyncCachedSession(engine, cache=cache, sync_session_class=makers) as session:  # type: ignore[arg-type]
        session.add(Author(id=1, name="Ann"))
        await session.commit()
    assert (len(commits), cache.stats.locks) == (1, 1)
