"""The airports, served by Litestar: `uvicorn airports.app_litestar:app`, after `python -m airports.load`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from litestar import Litestar, Response, get, post, put
from litestar.datastructures import State
from litestar.di import Provide
from sqlalchemy.exc import NoResultFound

from airports import handlers
from airports.database import open_sessions
from airports.views import AirportView, Health, NewReview, ReviewView
from asynccache import AsyncCachedSession


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncGenerator[None]:
    async with open_sessions() as app.state.sessions:
        yield


async def session_of(state: State) -> AsyncGenerator[AsyncCachedSession]:
    async with state.sessions() as session:
        yield session


@get("/airports/{icao:str}")
async def read_airport(session: AsyncCachedSession, icao: str) -> AirportView:
    return await handlers.read_airport(session, icao)


@put("/airports/{icao:str}/name")
async def rename_airport(session: AsyncCachedSession, icao: str, name: str) -> AirportView:
    return await handlers.rename_airport(session, icao, name)


@post("/countries/{country:str}/close", status_code=204)
async def close_airports(session: AsyncCachedSession, country: str) -> None:
    await handlers.close_airports(session, country)


@get("/airports/{icao:str}/reviews")
async def latest_reviews(session: AsyncCachedSession, icao: str) -> list[ReviewView]:
    return await handlers.latest_reviews(session, icao)


@post("/airports/{icao:str}/reviews")
async def add_review(session: AsyncCachedSession, icao: str, data: NewReview) -> ReviewView:
    return await handlers.add_review(session, icao, data)


@get("/reviews/{id:int}")
async def read_review(session: AsyncCachedSession, id: int) -> ReviewView:
    return await handlers.read_review(session, id)


@get("/health")
async def health(session: AsyncCachedSession) -> Health:
    return await handlers.health(session)


def not_found(_: object, __: NoResultFound) -> Response[dict[str, str]]:
    return Response({"detail": "Not Found"}, status_code=404)


app = Litestar(
    [read_airport, rename_airport, close_airports, latest_reviews, add_review, read_review, health],
    lifespan=[lifespan],
    dependencies={"session": Provide(session_of)},
    exception_handlers={NoResultFound: not_found},
)
