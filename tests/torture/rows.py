"""What is read and written: rows with a version that only grows, told apart by one number over all tables."""

from __future__ import annotations

from typing import Final, NamedTuple

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

GROUPS: Final = 10
CHECK: Final = 1_000_003


class Base(DeclarativeBase):
    pass


class Row(Base):
    """
    group: so many rows are written by one statement that names no primary key.
    version: grows by one with every change.
    check: `id * CHECK + version`, to tell a row that was mixed up with another, or put together from two.
    """

    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    group: Mapped[int]
    version: Mapped[int]
    check: Mapped[int]
    body: Mapped[str] = mapped_column(String(200))


class Item(Row):
    """Written by all writers that live."""

    __tablename__ = "item"


class RowVictim(Row):
    """Written by nobody but writers of single rows that are killed in their COMMIT."""

    __tablename__ = "row_victim"


class TableVictim(Row):
    """Written by nobody but writers of whole tables that are killed in their COMMIT: a table of its own, since its
    generations are locked with each."""

    __tablename__ = "table_victim"


ITEMS: Final = range(100)
ROW_VICTIMS: Final = range(ITEMS.stop, ITEMS.stop + 30)
TABLE_VICTIMS: Final = range(ROW_VICTIMS.stop, ROW_VICTIMS.stop + 20)
KEYS: Final = TABLE_VICTIMS.stop
"""How many rows there are in all; primary keys are unique over the three tables."""


def model_of(key: int) -> type[Row]:
    if key in ITEMS:
        return Item
    return RowVictim if key in ROW_VICTIMS else TableVictim


class Version(NamedTuple):
    key: int
    version: int


def is_whole(row: Row, key: int) -> bool:
    return row.id == key and row.check == key * CHECK + row.version


def first_rows() -> list[Row]:
    body = "x" * 150
    return [
        model_of(key)(id=key, group=key % GROUPS, version=1, check=key * CHECK + 1, body=body) for key in range(KEYS)
    ]
