"""The application of `benchmarks.workloads.web`: what it does in a request is the same with a cache and without one."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asynccache import AsyncCachedSession, Cache
from benchmarks.shop import Product, engine_of


def application() -> Starlette:
    """Make it, as `uvicorn --factory` wants it; the environment says which database and which cache."""
    engine = engine_of(os.environ["BENCH_DATABASE_URL"])
    cache_url = os.environ["BENCH_CACHE_URL"]
    cache = Cache(cache_url) if cache_url else None
    sessions: async_sessionmaker[AsyncSession] = async_sessionmaker(engine)
    if cache is not None:
        cache.register(Product)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)

    async def buy(request: Request) -> JSONResponse:
        """Show some products, and change the price of one."""
        shown = [int(pk) for pk in request.query_params["show"].split(",")]
        async with sessions() as session:
            products = [await session.get_one(Product, pk) for pk in shown]
            names = [product.name for product in products]
            bought = await session.get_one(Product, int(request.query_params["buy"]))
            bought.price += 1
            await session.commit()
        return JSONResponse({"products": names})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        yield
        if cache is not None:
            await cache.aclose()
        await engine.dispose()

    return Starlette(routes=[Route("/buy", buy, methods=["POST"])], lifespan=lifespan)
