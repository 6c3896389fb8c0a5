"""What is stored: airports, reviews of them, and what is to be done in the background."""

from sqlalchemy import ForeignKey
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Airport(Base):
    __tablename__ = "airport"

    icao: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    city: Mapped[str]
    country: Mapped[str] = mapped_column(index=True)
    is_open: Mapped[bool] = mapped_column(default=True)
    rating: Mapped[float | None]


class Review(Base):
    __tablename__ = "review"

    id: Mapped[int] = mapped_column(primary_key=True)
    airport_icao: Mapped[str] = mapped_column(ForeignKey(Airport.icao), index=True)
    author: Mapped[str]
    stars: Mapped[int]
    text: Mapped[str]
    airport: Mapped[Airport] = relationship()


class Job(Base):
    """An airport whose rating is to be computed anew."""

    __tablename__ = "job"

    id: Mapped[int] = mapped_column(primary_key=True)
    airport_icao: Mapped[str]
