"""What clients send and get."""

from dataclasses import dataclass
from typing import Self

from sqlalchemy import Pool

from airports.models import Airport, Review
from asynccache import Stats


@dataclass(frozen=True, slots=True)
class AirportView:
    icao: str
    name: str
    city: str
    country: str
    is_open: bool
    rating: float | None

    @classmethod
    def of(cls, airport: Airport) -> Self:
        return cls(airport.icao, airport.name, airport.city, airport.country, airport.is_open, airport.rating)


@dataclass(frozen=True, slots=True)
class NewReview:
    author: str
    stars: int
    text: str


@dataclass(frozen=True, slots=True)
class ReviewView:
    id: int
    author: str
    stars: int
    text: str
    airport: AirportView

    @classmethod
    async def of(cls, review: Review) -> Self:
        airport = await review.awaitable_attrs.airport
        return cls(review.id, review.author, review.stars, review.text, AirportView.of(airport))


@dataclass(frozen=True, slots=True)
class Health:
    """What a process has done so far, and what it holds."""

    process: int
    connections: str
    hits: int
    misses: int
    loads: int
    locks: int
    unlocks: int

    @classmethod
    def of(cls, process: int, pool: Pool, stats: Stats) -> Self:
        numbers = (stats.hits, stats.misses, stats.loads, stats.locks, stats.unlocks)
        return cls(process, pool.status(), *numbers)
