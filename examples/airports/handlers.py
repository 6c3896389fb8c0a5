"""What the application does: plain functions of a session. They commit before they answer.

A row that is not there raises sqlalchemy.exc.NoResultFound, of which each framework makes a 404.
"""

import os

from sqlalchemy import select, update

from airports.models import Airport, Job, Review
from airports.views import AirportView, Health, NewReview, ReviewView
from asynccache import AsyncCachedSession, cached_get_many


async def read_airport(session: AsyncCachedSession, icao: str) -> AirportView:
    return AirportView.of(await session.get_one(Airport, icao))


async def rename_airport(session: AsyncCachedSession, icao: str, name: str) -> AirportView:
    airport = await session.get_one(Airport, icao)
    airport.name = name
    await session.commit()
    return AirportView.of(airport)


async def close_airports(session: AsyncCachedSession, country: str) -> None:
    """One UPDATE, whatever it finds: no airport that is cached so far is served any more."""
    await session.execute(update(Airport).where(Airport.country == country).values(is_open=False))
    await session.commit()


async def add_review(session: AsyncCachedSession, icao: str, new: NewReview) -> ReviewView:
    """The rating is computed by the worker. Its job and the review are committed together."""
    airport = await session.get_one(Airport, icao)
    review = Review(airport=airport, author=new.author, stars=new.stars, text=new.text)
    session.add_all([review, Job(airport_icao=icao)])
    await session.commit()
    return await ReviewView.of(review)


async def read_review(session: AsyncCachedSession, id: int) -> ReviewView:
    return await ReviewView.of(await session.get_one(Review, id))


async def latest_reviews(session: AsyncCachedSession, icao: str) -> list[ReviewView]:
    """A query says which they are, the cache what they say."""
    latest = select(Review.id).where(Review.airport_icao == icao).order_by(Review.id.desc()).limit(10)
    reviews = await cached_get_many(session, Review, await session.scalars(latest))
    return [await ReviewView.of(review) for review in reviews.values() if review is not None]


async def health(session: AsyncCachedSession) -> Health:
    assert session.cache is not None
    return Health.of(os.getpid(), session.get_bind().engine.pool, session.cache.stats)
