"""The airports, served by FastAPI: `uvicorn airports.app_fastapi:app`, after `python -m airports.load`."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import NoResultFound

from airports import handlers
from airports.database import open_sessions
from airports.views import AirportView, Health, NewReview, ReviewView
from asynccache import AsyncCachedSession


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    async with open_sessions() as app.state.sessions:
        yield


app = FastAPI(title="Airports", lifespan=lifespan)


async def session_of(request: Request) -> AsyncGenerator[AsyncCachedSession]:
    async with request.app.state.sessions() as session:
        yield session


# It ends before the answer is sent, so that no slow client holds a connection to the database.
Session = Annotated[AsyncCachedSession, Depends(session_of, scope="function")]


@app.exception_handler(NoResultFound)
async def not_found(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse({"detail": "Not Found"}, status_code=404)


@app.get("/airports/{icao}")
async def read_airport(session: Session, icao: str) -> AirportView:
    return await handlers.read_airport(session, icao)


@app.put("/airports/{icao}/name")
async def rename_airport(session: Session, icao: str, name: str) -> AirportView:
    return await handlers.rename_airport(session, icao, name)


@app.post("/countries/{country}/close", status_code=204)
async def close_airports(session: Session, country: str) -> None:
    await handlers.close_airports(session, country)


@app.get("/airports/{icao}/reviews")
async def latest_reviews(session: Session, icao: str) -> list[ReviewView]:
    return await handlers.latest_reviews(session, icao)


@app.post("/airports/{icao}/reviews", status_code=201)
async def add_review(session: Session, icao: str, new: NewReview) -> ReviewView:
    return await handlers.add_review(session, icao, new)


@app.get("/reviews/{id}")
async def read_review(session: Session, id: int) -> ReviewView:
    return await handlers.read_review(session, id)


@app.get("/health")
async def health(session: Session) -> Health:
    return await handlers.health(session)
