"""A bookshop: the mappings that tests of sessions use."""

from __future__ import annotations

import dataclasses
import enum
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, Column, DateTime, ForeignKey, Integer, Numeric, String, Table, Text
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    column_property,
    composite,
    mapped_column,
    reconstructor,
    relationship,
    synonym,
)


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Author(Base):
    """The plainest model."""

    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Currency(enum.Enum):
    EURO = "EUR"
    POUND = "GBP"


class Account(Base):
    """One column of each common type."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(50))
    email: Mapped[str | None] = mapped_column(String(100))
    opened: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    balance: Mapped[Decimal] = mapped_column(Numeric(12, 2))
    options: Mapped[dict[str, Any]] = mapped_column(JSON)
    active: Mapped[bool]
    currency: Mapped[Currency]
    token: Mapped[UUID]
    picture: Mapped[bytes]
    score: Mapped[float]


def account(id_: int = 1, **values: Any) -> Account:
    defaults: dict[str, Any] = {
        "owner": f"owner {id_}",
        "email": f"owner{id_}@example.com",
        "opened": datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC),
        "balance": Decimal("12345.67"),
        "options": {"a": [1, 2, 3], "b": {"c": "d"}},
        "active": True,
        "currency": Currency.POUND,
        "token": UUID(int=id_ * 7919),
        "picture": b"\x00\r\nEND\r\n\xff",
        "score": 3.25,
    }
    return Account(id=id_, **(defaults | values))


@dataclasses.dataclass
class Size:
    """In millimetres."""

    width: int
    height: int


book_tag = Table(
    "book_tag",
    Base.metadata,
    Column("book_id", ForeignKey("book.id"), primary_key=True),
    Column("tag_id", ForeignKey("tag.id"), primary_key=True),
)


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Book(Base):
    """What the ORM can do with one row."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int | None] = mapped_column(ForeignKey("author.id"))
    version: Mapped[int] = mapped_column()
    width: Mapped[int] = mapped_column(Integer)  # an expression over it has no type otherwise
    height: Mapped[int] = mapped_column(Integer)
    girth: Mapped[int] = column_property(width + height)
    title: Mapped[str]
    text: Mapped[str] = mapped_column(Text, deferred=True)
    notes: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(JSON))
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
    size: Mapped[Size] = composite("width", "height")
    name = synonym("title")
    author: Mapped[Author | None] = relationship(back_populates="books")
    tags: Mapped[list[Tag]] = relationship(secondary=book_tag)

    __mapper_args__ = {"version_id_col": version}

    @hybrid_property
    def shouted(self) -> str:
        return self.title.upper()

    @reconstructor
    def _reconstruct(self) -> None:
        self.reconstructed = True


def book(id_: int = 1, **values: Any) -> Book:
    defaults: dict[str, Any] = {
        "width": 130,
        "height": 200,
        "title": "hello",
        "text": "long",
        "notes": {"k": 1},
        "details": {"z": [1]},
    }
    return Book(id=id_, **(defaults | values))


class Staff(Base):
    """Joined table inheritance."""

    __tablename__ = "staff"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "staff"}


class Editor(Staff):
    __tablename__ = "editor"

    id: Mapped[int] = mapped_column(ForeignKey("staff.id"), primary_key=True)
    language: Mapped[str]

    __mapper_args__ = {"polymorphic_identity": "editor"}


class Printer(Staff):
    __tablename__ = "printer"

    id: Mapped[int] = mapped_column(ForeignKey("staff.id"), primary_key=True)
    level: Mapped[int]

    __mapper_args__ = {"polymorphic_identity": "printer"}


class Publication(Base):
    """Single table inheritance."""

    __tablename__ = "publication"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    title: Mapped[str]

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "publication"}


class Novel(Publication):
    chapters: Mapped[int | None]

    __mapper_args__ = {"polymorphic_identity": "novel"}


class Poem(Publication):
    verses: Mapped[int | None]

    __mapper_args__ = {"polymorphic_identity": "poem"}


class Stock(Base):
    """A primary key of two columns."""

    __tablename__ = "stock"

    shop: Mapped[int] = mapped_column(primary_key=True)
    isbn: Mapped[str] = mapped_column(primary_key=True)
    copies: Mapped[int]


class Note(MappedAsDataclass, Base):
    """A dataclass."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(init=False, primary_key=True)
    title: Mapped[str]
    body: Mapped[str] = mapped_column(default="")


class Chapter(Base):
    """What the database itself deletes and changes."""

    __tablename__ = "chapter"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int | None] = mapped_column(ForeignKey("author.id", ondelete="CASCADE", onupdate="CASCADE"))
    title: Mapped[str]


class Secret(Base):
    """Never registered."""

    __tablename__ = "secret"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[str]


class Shelf(Base):
    """An eager relationship, which a cached row alone cannot bring."""

    __tablename__ = "shelf"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    boards: Mapped[list[Board]] = relationship(lazy="selectin")


class Board(Base):
    __tablename__ = "board"

    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(ForeignKey("shelf.id"))


class Country(Base):
    """A primary key of text."""

    __tablename__ = "country"

    code: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
