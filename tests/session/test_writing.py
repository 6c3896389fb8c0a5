"""Every way to write a row ends what the cache holds of it, and of no more than it must.

Each way says which slots it may lock: rows, where the write names them, and whole tables (their generations) where it
does not. Everything else that is cached must be served from the cache afterwards.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import (
    Connection,
    ForeignKey,
    Table,
    bindparam,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Mapper,
    mapped_column,
    object_mapper,
    relationship,
    selectinload,
)

from asynccache import AsyncCachedSession, Cache, cached_get_many
from tests.conftest import Sessions, Statements
from tests.models import (
    Author,
    Base,
    Book,
    Chapter,
    Country,
    Editor,
    Novel,
    Printer,
    Secret,
    Staff,
    Stock,
    Tag,
    book_tag,
)

BUCKETS = 16

UPSERTS = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class Music(AsyncAttrs, DeclarativeBase):
    """Mappings that write more than the row that they are asked to write."""


class Album(Music):
    """Children without a backref, children that it owns, and a row that it refers to and that refers to it."""

    __tablename__ = "album"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    single_id: Mapped[int | None] = mapped_column(ForeignKey("track.id", use_alter=True, name="album_single"))
    tracks: Mapped[list[Track]] = relationship(foreign_keys="Track.album_id")
    covers: Mapped[list[Cover]] = relationship(cascade="all, delete-orphan")
    single: Mapped[Track | None] = relationship(foreign_keys=single_id, post_update=True)
    genres: Mapped[list[Genre]] = relationship(secondary="album_genre")


class Track(Music):
    __tablename__ = "track"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    album_id: Mapped[int | None] = mapped_column(ForeignKey("album.id"))
    remix_of: Mapped[int | None] = mapped_column(ForeignKey("track.id"))
    remixes: Mapped[list[Track]] = relationship(foreign_keys=remix_of, post_update=True)


class Cover(Music):
    __tablename__ = "cover"

    id: Mapped[int] = mapped_column(primary_key=True)
    album_id: Mapped[int] = mapped_column(ForeignKey("album.id"))


class Genre(Music):
    __tablename__ = "genre"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class AlbumGenre(Music):
    """The table of a many-to-many relationship, mapped beside it."""

    __tablename__ = "album_genre"

    album_id: Mapped[int] = mapped_column(ForeignKey("album.id"), primary_key=True)
    genre_id: Mapped[int] = mapped_column(ForeignKey("genre.id"), primary_key=True)
    since: Mapped[int] = mapped_column(server_default="2024")


class Title(Music):
    """Another model on the table of albums, never registered."""

    __table__ = Album.__table__
    __mapper_args__ = {"include_properties": ["id", "title"]}

    title: Mapped[str]


AUTHOR, BOOK, COUNTRY, EDITOR, STAFF, STOCK = (
    Base.metadata.tables[name] for name in ("author", "book", "country", "editor", "staff", "stock")
)

Row = tuple[type[Any], Any]
"""A model and a primary key."""

WORLD: tuple[Row, ...] = (
    *((Author, id_) for id_ in (1, 2, 3, 4, 5, 9)),  # 4, 5, 9, 10 and "xx": rows that are not there
    *((Book, id_) for id_ in (1, 2)),
    *((Chapter, id_) for id_ in (1, 2, 3)),
    *((Country, code) for code in ("de", "fr", "xx")),
    (Editor, 1),
    (Printer, 2),
    (Staff, 9),
    *((Novel, id_) for id_ in (1, 2)),
    *((Stock, pk) for pk in ((1, "x"), (1, "y"))),
    *((Tag, id_) for id_ in (1, 2)),
    *((Album, id_) for id_ in (1, 2)),
    *((Track, id_) for id_ in (1, 2)),
    *((Cover, id_) for id_ in (1, 2)),
    *((Genre, id_) for id_ in (1, 2)),
    *((AlbumGenre, pk) for pk in ((1, 1), (1, 2))),
)

ROWS: dict[type[Any] | Table, list[dict[str, Any]]] = {
    Author: [{"id": id_, "name": f"author {id_}"} for id_ in (1, 2, 3)],
    Book: [
        {"id": id_, "author_id": id_, "version": 1, "width": 1, "height": 2, "title": "", "text": "", "notes": {}}
        | {"details": {}}
        for id_ in (1, 2)
    ],
    Chapter: [{"id": id_, "author_id": id_, "title": f"chapter {id_}"} for id_ in (1, 2, 3)],
    Country: [{"code": code, "name": code.upper()} for code in ("de", "fr")],
    Editor: [{"id": 1, "kind": "editor", "name": "Ed", "language": "en"}],
    Printer: [{"id": 2, "kind": "printer", "name": "Pat", "level": 1}],
    Novel: [{"id": id_, "title": f"novel {id_}", "chapters": 3} for id_ in (1, 2)],
    Secret: [{"id": 1, "value": "secret"}],
    Stock: [{"shop": 1, "isbn": isbn, "copies": 1} for isbn in ("x", "y")],
    Tag: [{"id": id_, "name": f"tag {id_}"} for id_ in (1, 2)],
    book_tag: [{"book_id": 1, "tag_id": 1}],
    Album: [{"id": id_, "title": f"album {id_}"} for id_ in (1, 2)],
    Track: [{"id": id_, "title": f"track {id_}", "album_id": 1} for id_ in (1, 2)],
    Cover: [{"id": id_, "album_id": 1} for id_ in (1, 2)],
    Genre: [{"id": id_, "name": f"genre {id_}"} for id_ in (1, 2)],
    AlbumGenre: [{"album_id": 1, "genre_id": 1}],
}

Write = Callable[[AsyncSession], Awaitable[object]]


@dataclass(frozen=True)
class Way:
    """A way to write.

    rows: the rows whose slots it locks.
    tables: the root models whose generations it locks; a declarative base for all that are registered.
    changes: the rows that are different afterwards; among those of `rows` and `tables`.
    on: the databases that can do it.
    """

    write: Write
    rows: tuple[Row, ...]
    tables: tuple[type[Any], ...]
    changes: tuple[Row, ...]
    on: str

    def keeps(self) -> list[Row]:
        """The rows that may still be served from the cache."""
        return [row for row in WORLD if row not in self.rows and not issubclass(row[0], self.tables)]


WAYS: dict[str, Way] = {}


def way(
    *changes: Row, rows: Iterable[Row] | None = None, tables: Iterable[type[Any]] = (), on: str = "sqlite postgresql"
) -> Callable[[Write], Write]:
    """rows: the same as `changes` unless said otherwise, or unless there are tables."""

    def add(write: Write) -> Write:
        locked = rows if rows is not None else () if tables else changes
        WAYS[write.__name__] = Way(write, tuple(locked), tuple(tables), changes, on)
        return write

    return add


EVERYTHING = (Base, Music)


async def next_author_is_4(session: AsyncSession) -> None:
    """SQLite takes the highest key that is there and one more; PostgreSQL has not seen those of the world."""
    if session.get_bind().dialect.name == "postgresql":
        _ = await session.scalars(select(func.setval("author_id_seq", 3)))


def upsert_for(session: AsyncSession, model: type[Any]) -> Any:
    return UPSERTS[session.get_bind().dialect.name](model)


# --------------------------------------------------------------------------------------------------- the unit of work


@way((Author, 9))
async def an_insert(session: AsyncSession) -> None:
    session.add(Author(id=9, name="new"))


@way((Author, 1))
async def an_update(session: AsyncSession) -> None:
    (await session.get_one(Author, 1)).name = "new"


@way((Stock, (1, "x")))
async def an_update_under_a_composite_key(session: AsyncSession) -> None:
    (await session.get_one(Stock, (1, "x"))).copies = 99


@way((Country, "de"))
async def a_delete(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Country, "de"))


@way((Country, "de"), (Country, "xx"))
async def a_change_of_primary_key(session: AsyncSession) -> None:
    (await session.get_one(Country, "de")).code = "xx"


@way((Author, 3), (Author, 9), (Chapter, 3), rows=[(Author, 3), (Author, 9)], tables=[Chapter])
async def a_change_of_primary_key_that_the_database_cascades(session: AsyncSession) -> None:
    (await session.get_one(Author, 3)).id = 9


@way((Author, 3), (Chapter, 3), rows=[(Author, 3)], tables=[Chapter])
async def a_delete_that_the_database_cascades(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Author, 3))


@way((Author, 1), (Book, 1), (Chapter, 1), rows=[(Author, 1), (Book, 1)], tables=[Chapter])
async def a_delete_that_nulls_the_foreign_keys_of_children(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Author, 1))


@way((Track, 1))
async def a_removal_from_a_collection_without_backref(session: AsyncSession) -> None:
    album = await session.get_one(Album, 1)
    tracks = await album.awaitable_attrs.tracks
    tracks.remove(await session.get_one(Track, 1))


@way((Cover, 1))
async def a_removal_of_an_orphan(session: AsyncSession) -> None:
    album = await session.get_one(Album, 1)
    covers = await album.awaitable_attrs.covers
    covers.remove(await session.get_one(Cover, 1))


@way((Album, 1), (Track, 1), (Track, 2), (Cover, 1), (Cover, 2), (AlbumGenre, (1, 1)))
async def a_delete_of_a_parent_with_children_of_all_kinds(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Album, 1))


@way((Album, 1))
async def a_post_update(session: AsyncSession) -> None:
    (await session.get_one(Album, 1)).single = await session.get_one(Track, 2)


@way((Track, 2))
async def a_post_update_of_a_row_that_nothing_else_changes(session: AsyncSession) -> None:
    original = await session.get_one(Track, 1)
    (await original.awaitable_attrs.remixes).append(await session.get_one(Track, 2))


@way((AlbumGenre, (1, 2)))
async def an_append_to_a_many_to_many_collection(session: AsyncSession) -> None:
    album = await session.get_one(Album, 1)
    genres = await album.awaitable_attrs.genres
    genres.append(await session.get_one(Genre, 2))


@way((Editor, 1))
async def an_update_of_a_column_of_the_base_table(session: AsyncSession) -> None:
    (await session.get_one(Editor, 1)).name = "new"


@way((Editor, 1))
async def an_update_of_a_column_of_the_joined_table(session: AsyncSession) -> None:
    (await session.get_one(Editor, 1)).language = "fr"


@way((Staff, 9))
async def an_insert_of_a_subclass(session: AsyncSession) -> None:
    session.add(Editor(id=9, name="new", language="de"))


@way((Printer, 2))
async def a_delete_of_a_subclass(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Printer, 2))


@way((Novel, 1))
async def an_update_under_single_table_inheritance(session: AsyncSession) -> None:
    (await session.get_one(Novel, 1)).chapters = 99


@way((Album, 1))
async def an_update_through_another_model_that_is_not_registered(session: AsyncSession) -> None:
    (await session.get_one(Title, 1)).title = "new"


@way((Author, 1), (Country, "de"))
async def a_core_statement_in_a_mapper_event(session: AsyncSession) -> None:
    def listener(mapper: Mapper[Author], connection: Connection, target: Author) -> None:
        connection.execute(update(COUNTRY).where(COUNTRY.c.code == "de").values(name="new"))

    event.listen(Author, "after_update", listener)
    try:
        (await session.get_one(Author, 1)).name = "new"
        await session.flush()
    finally:
        event.remove(Author, "after_update", listener)


@way((Country, "de"), (Country, "fr"), rows=[(Author, 1)], tables=[Country])
async def a_bulk_update_after_a_flush_that_failed_in_a_savepoint(session: AsyncSession) -> None:
    savepoint = await session.begin_nested()
    session.add(Author(id=1, name="there is one already"))
    with pytest.raises(IntegrityError):
        await session.flush()
    await savepoint.rollback()
    await session.execute(update(Country).values(name="new"))


# ------------------------------------------------------------------------------------ statements that name their rows


@way((Author, 1))
async def an_orm_update_by_primary_key(session: AsyncSession) -> None:
    await session.execute(update(Author).where(Author.id == 1).values(name="new"))


@way((Author, 1), (Author, 2))
async def an_orm_update_by_primary_keys(session: AsyncSession) -> None:
    await session.execute(update(Author).where(Author.id.in_([1, 2])).values(name="new"))


@way((Author, 2), rows=[(Author, 2), (Author, 3)])
async def an_orm_update_by_primary_keys_and_more(session: AsyncSession) -> None:
    wanted = Author.id.in_([2, 3]), Author.name == "author 2"
    await session.execute(update(Author).where(*wanted).values(name="new"))


@way((Author, 1), (Author, 2))
async def a_bulk_update_by_primary_key(session: AsyncSession) -> None:
    await session.execute(update(Author), [{"id": 1, "name": "new"}, {"id": 2, "name": "new"}])


@way((Country, "de"))
async def an_orm_delete_by_primary_key(session: AsyncSession) -> None:
    await session.execute(delete(Country).where(Country.code == "de"))


@way((Author, 3), (Chapter, 3), rows=[(Author, 3)], tables=[Chapter])
async def an_orm_delete_by_primary_key_that_the_database_cascades(session: AsyncSession) -> None:
    await session.execute(delete(Author).where(Author.id == 3))


@way((Author, 9))
async def an_orm_insert(session: AsyncSession) -> None:
    await session.execute(insert(Author), [{"id": 9, "name": "new"}])


@way((Author, 9))
async def an_orm_insert_returning(session: AsyncSession) -> None:
    _ = (await session.scalars(insert(Author).returning(Author), [{"id": 9, "name": "new"}])).all()


@way((Author, 1))
async def a_core_update_by_primary_key(session: AsyncSession) -> None:
    await session.execute(update(AUTHOR).where(AUTHOR.c.id == 1).values(name="new"))


@way((Author, 1), (Author, 2))
async def a_core_update_by_primary_key_of_many(session: AsyncSession) -> None:
    statement = update(AUTHOR).where(AUTHOR.c.id == bindparam("key")).values(name="new")
    await (await session.connection()).execute(statement, [{"key": 1}, {"key": 2}])


@way((Stock, (1, "x")))
async def a_core_update_by_composite_key(session: AsyncSession) -> None:
    await session.execute(update(STOCK).where(STOCK.c.shop == 1, STOCK.c.isbn == "x").values(copies=99))


@way((Country, "de"))
async def a_core_delete_by_primary_key(session: AsyncSession) -> None:
    await session.execute(delete(COUNTRY).where(COUNTRY.c.code == "de"))


@way((Author, 9))
async def a_core_insert(session: AsyncSession) -> None:
    await session.execute(insert(AUTHOR).values(id=9, name="new"))


@way((Author, 1))
async def a_core_update_on_the_connection(session: AsyncSession) -> None:
    await (await session.connection()).execute(update(AUTHOR).where(AUTHOR.c.id == 1).values(name="new"))


@way((Author, 9), (Author, 1))
async def bulk_save_objects(session: AsyncSession) -> None:
    one = await session.get_one(Author, 1)
    one.name = "new"
    with session.no_autoflush:
        await session.run_sync(lambda sync: sync.bulk_save_objects([Author(id=9, name="new"), one]))


@way((Author, 9))
async def bulk_insert_mappings(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.bulk_insert_mappings(inspect(Author), [{"id": 9, "name": "new"}]))


@way((Author, 1))
async def bulk_update_mappings(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.bulk_update_mappings(inspect(Author), [{"id": 1, "name": "new"}]))


@way((Author, 1))
async def a_query_update_by_primary_key(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.query(Author).where(Author.id == 1).update({"name": "new"}))


@way((Editor, 1))
async def a_core_update_of_a_joined_table_by_primary_key(session: AsyncSession) -> None:
    await session.execute(update(EDITOR).where(EDITOR.c.id == 1).values(language="fr"))


@way((Country, "de"), (Country, "xx"))
async def an_upsert(session: AsyncSession) -> None:
    rows = [{"code": "de", "name": "new"}, {"code": "xx", "name": "new"}]
    statement = upsert_for(session, Country)
    statement = statement.on_conflict_do_update(index_elements=["code"], set_={"name": statement.excluded.name})
    await session.execute(statement, rows)


@way((Country, "xx"), rows=[(Country, "de"), (Country, "xx")])
async def an_upsert_that_leaves_alone_what_is_there(session: AsyncSession) -> None:
    rows = [{"code": "de", "name": "new"}, {"code": "xx", "name": "new"}]
    await session.execute(upsert_for(session, Country).on_conflict_do_nothing(), rows)


# ------------------------------------------------------------------------------ statements whose answers tell the rows


@way((Author, 4))
async def an_insert_of_an_instance_whose_key_the_database_makes(session: AsyncSession) -> None:
    await next_author_is_4(session)
    session.add(Author(name="new"))


@way((Author, 4), (Author, 5))
async def an_insert_of_instances_whose_keys_the_database_makes(session: AsyncSession) -> None:
    await next_author_is_4(session)
    session.add_all([Author(name="new"), Author(name="new")])


@way((Author, 4))
async def an_insert_of_a_key_that_the_database_makes(session: AsyncSession) -> None:
    await next_author_is_4(session)
    await session.execute(insert(AUTHOR).values(name="new"))


@way((Author, 4), (Author, 5))
async def an_orm_insert_returning_keys_that_the_database_makes(session: AsyncSession) -> None:
    await next_author_is_4(session)
    added = (await session.scalars(insert(Author).returning(Author), [{"name": "new"}, {"name": "new"}])).all()
    assert [each.id for each in added] == [4, 5]


@way((Author, 4))
async def a_core_insert_returning_a_key_that_the_database_makes(session: AsyncSession) -> None:
    await next_author_is_4(session)
    statement = insert(AUTHOR).values(name="new").returning(AUTHOR.c.name, AUTHOR.c.id)
    assert tuple((await session.execute(statement)).one()) == ("new", 4)


@way((Author, 4), (Author, 5))
async def bulk_save_objects_whose_keys_the_database_makes(session: AsyncSession) -> None:
    await next_author_is_4(session)
    added = [Author(name="new"), Author(name="new")]
    await session.run_sync(lambda sync: sync.bulk_save_objects(added, return_defaults=True))
    assert [each.id for each in added] == [4, 5]


@way((Country, "xx"))
async def an_insert_from_select_returning_its_keys(session: AsyncSession) -> None:
    rows = select(text("'xx'"), Author.name).where(Author.id == 1)
    statement = insert(Country).from_select(["code", "name"], rows).returning(Country.code)
    assert (await session.scalars(statement)).all() == ["xx"]


@way((Author, 1), (Author, 2), (Author, 3))
async def an_orm_update_of_all_returning_its_rows(session: AsyncSession) -> None:
    changed = (await session.scalars(update(Author).values(name="new").returning(Author))).all()
    assert {each.id for each in changed} == {1, 2, 3}


@way((Author, 1))
async def an_orm_update_that_fetches_what_it_changes(session: AsyncSession) -> None:
    statement = update(Author).where(func.lower(Author.name) == "author 1").values(name="new")
    await session.execute(statement, execution_options={"synchronize_session": "fetch"})


@way((Country, "de"))
async def a_core_delete_returning_its_keys(session: AsyncSession) -> None:
    statement = delete(COUNTRY).where(COUNTRY.c.name == "DE").returning(COUNTRY)
    assert tuple((await session.execute(statement)).one()) == ("de", "DE")


@way(rows=[])
async def an_update_returning_that_nothing_was_changed(session: AsyncSession) -> None:
    statement = update(AUTHOR).where(AUTHOR.c.name == "nobody").values(name="new").returning(AUTHOR.c.id)
    assert (await session.execute(statement)).all() == []


@way((Country, "de"))
async def an_upsert_returning_what_it_has_changed(session: AsyncSession) -> None:
    statement = upsert_for(session, Country).from_select(
        ["code", "name"], select(COUNTRY).where(COUNTRY.c.code == "de")
    )
    statement = statement.on_conflict_do_update(index_elements=["code"], set_={"name": "new"})
    assert (await session.scalars(statement.returning(COUNTRY.c.code))).all() == ["de"]


# ---------------------------------------------------------------------------------------- statements that name no rows


@way((Author, 1), (Author, 2), (Author, 3), tables=[Author])
async def an_orm_update_of_all(session: AsyncSession) -> None:
    await session.execute(update(Author).values(name="new"))


@way((Author, 1), tables=[Author])
async def an_orm_update_by_another_column(session: AsyncSession) -> None:
    await session.execute(update(Author).where(Author.name == "author 1").values(name="new"))


@way((Author, 1), (Author, 2), tables=[Author])
async def an_update_by_one_primary_key_or_something_else(session: AsyncSession) -> None:
    await session.execute(update(Author).where((Author.id == 1) | (Author.name == "author 2")).values(name="new"))


@way((Author, 3), (Author, 9), (Chapter, 3), rows=[(Author, 3), (Author, 9)], tables=[Chapter])
async def an_update_by_primary_key_that_sets_it(session: AsyncSession) -> None:
    await session.execute(update(Author).where(Author.id == 3).values(id=9))


@way((Author, 1), tables=[Author])
async def an_update_from_another_table(session: AsyncSession) -> None:
    statement = update(Author).where(Author.id == Book.author_id, Book.id == 1).values(name="new")
    await session.execute(statement, execution_options={"synchronize_session": False})


@way((Author, 1), (Book, 1), (Chapter, 1), rows=[(Book, 1)], tables=[Author, Chapter])
async def a_core_delete_by_another_column(session: AsyncSession) -> None:
    await session.execute(update(BOOK).where(BOOK.c.id == 1).values(author_id=None))
    await session.execute(delete(AUTHOR).where(AUTHOR.c.name == "author 1"))


@way((Editor, 1), (Staff, 9))
async def core_statements_on_the_joined_table(session: AsyncSession) -> None:
    await session.execute(update(EDITOR).where(EDITOR.c.id == 1).values(language="fr"))
    await session.execute(insert(STAFF).values(id=9, kind="staff", name="new"))


@way((Country, "xx"), tables=[Country])
async def an_insert_from_select(session: AsyncSession) -> None:
    rows = select(text("'xx'"), Author.name).where(Author.id == 1)
    await session.execute(insert(Country).from_select(["code", "name"], rows))


@way((Author, 9), on="postgresql")
async def an_insert_whose_primary_key_is_a_subquery_that_the_database_returns(session: AsyncSession) -> None:
    await an_insert_whose_primary_key_is_a_subquery(session)


@way((Author, 9), tables=[Author], on="sqlite")
async def an_insert_whose_primary_key_is_a_subquery(session: AsyncSession) -> None:
    nine = select(Tag.id + 7).where(Tag.id == 2).scalar_subquery()
    await session.execute(insert(AUTHOR).values(id=nine, name="new"))


@way((Author, 9), rows=[(Author, 9), (Author, 10)])
async def an_insert_of_a_list_of_values(session: AsyncSession) -> None:
    await session.execute(insert(AUTHOR).values([{"id": 9, "name": "new"}, {"id": 10, "name": "new"}]))


@way((Author, 4), (Author, 5), tables=[Author], on="sqlite postgresql")
async def an_insert_of_many_whose_keys_the_database_makes_and_nobody_asks_for(session: AsyncSession) -> None:
    await next_author_is_4(session)
    await session.execute(insert(AUTHOR), [{"name": "new"}, {"name": "new"}])


@way((Author, 4), tables=[Author])
async def an_insert_whose_answer_does_not_tell_its_key(session: AsyncSession) -> None:
    await next_author_is_4(session)
    assert (await session.scalars(insert(AUTHOR).values(name="new").returning(AUTHOR.c.name))).one() == "new"


@way((Author, 4), tables=[Author])
async def an_insert_whose_answer_is_streamed(session: AsyncSession) -> None:
    await next_author_is_4(session)
    result = await session.stream(insert(Author).values(name="new").returning(Author.id))
    assert await result.scalar_one() == 4


@way((Tag, 1), tables=[Tag])
async def an_upsert_that_finds_rows_by_something_else(session: AsyncSession) -> None:
    statement = upsert_for(session, Tag).values(id=9, name="tag 1")
    await session.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"name": "new"}))


@way((Country, "de"), (Country, "xx"), tables=[Country])
async def an_upsert_that_moves_rows(session: AsyncSession) -> None:
    statement = upsert_for(session, Country).values(code="de", name="new")
    await session.execute(statement.on_conflict_do_update(index_elements=["code"], set_={"code": "xx"}))


@way((Author, 3), (Chapter, 3), tables=[Author, Chapter], on="sqlite")
async def an_insert_or_replace(session: AsyncSession) -> None:
    await session.execute(insert(AUTHOR).prefix_with("OR REPLACE").values(id=3, name="new"))


@way((Country, "xx"), tables=[Country], on="postgresql")
async def a_common_table_expression_that_inserts(session: AsyncSession) -> None:
    written = insert(Country).values(code="xx", name="new").returning(Country.code).cte()
    await session.execute(select(written))


@way((Country, "de"), on="postgresql")
async def a_common_table_expression_that_writes(session: AsyncSession) -> None:
    written = update(Country).where(Country.code == "de").values(name="new").returning(Country.code).cte()
    await session.execute(select(written))


@way((Stock, (1, "x")), (Country, "de"), (Country, "fr"), tables=[Stock, Country], on="postgresql")
async def a_statement_with_another_one_beside_it(session: AsyncSession) -> None:
    beside = update(COUNTRY).values(name="new").cte()
    await session.execute(update(STOCK).where(STOCK.c.isbn == "x").values(copies=99).add_cte(beside))


@way((Author, 1), (Author, 2), (Author, 3), tables=[Author])
async def a_query_update(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.query(Author).update({"name": "new"}))


@way((Author, 1), tables=EVERYTHING)
async def text_that_writes(session: AsyncSession) -> None:
    await session.execute(text("/* by hand */ update author set name = 'new' where id = :id"), {"id": 1})


@way((Author, 1), tables=EVERYTHING)
async def driver_sql_that_writes(session: AsyncSession) -> None:
    await (await session.connection()).exec_driver_sql("UPDATE author SET name = 'new' WHERE id = 1")


@way((Author, 1), tables=EVERYTHING)
async def instances_from_text_that_writes(session: AsyncSession) -> None:
    written = text("update author set name = 'new' where id = 1 returning id, name")
    _ = (await session.scalars(select(Author).from_statement(written))).all()


@way((Author, 1), tables=EVERYTHING, on="postgresql")
async def text_with_a_common_table_expression_that_writes(session: AsyncSession) -> None:
    sql = "with new as (update author set name = 'new' where id = 1 returning id) select id from new"
    await session.execute(text(sql))


@way((Author, 1), tables=EVERYTHING, on="postgresql")
async def text_of_another_language(session: AsyncSession) -> None:
    await session.execute(text("do $$ begin update author set name = 'new' where id = 1; end $$"))


# --------------------------------------------------------------------------------------------------------- the promise


@pytest.fixture
async def world(engine: AsyncEngine, cache: Cache, sessions: Sessions) -> None:
    """A database full of rows, all of them cached, and so is the absence of those that are not there."""
    if engine.dialect.name == "sqlite":

        def enforce_foreign_keys(connection: Any, record: object) -> None:
            connection.execute("PRAGMA foreign_keys=ON")

        event.listen(engine.sync_engine, "connect", enforce_foreign_keys)
        await engine.dispose()  # with the connections that do not
    async with engine.begin() as connection:
        await connection.run_sync(Music.metadata.create_all, checkfirst=False)
        await connection.execute(text("create unique index tag_name on tag (name)"))
    async with AsyncSession(engine) as session:
        for table, rows in ROWS.items():
            await session.execute(insert(table), rows)
        await session.commit()
    for model in (Album, Track, Cover, Genre, AlbumGenre):
        cache.register(model)
    async with sessions() as session:
        for model in {model for model, _ in WORLD}:
            await cached_get_many(session, model, [pk for each, pk in WORLD if each is model])
    await cache.drain()


async def look(sessions: async_sessionmaker[Any], rows: Iterable[Row]) -> dict[Row, object]:
    """What `get` gives for each of these rows, in a session of its own."""
    found: dict[Row, object] = {}
    async with sessions() as session:
        for model, pk in rows:
            instance = await session.get(model, pk)
            if instance is None:
                found[model, pk] = None
            else:
                columns = object_mapper(instance).column_attrs
                found[model, pk] = type(instance), {k: v for k, v in vars(instance).items() if k in columns}
    return found


@pytest.mark.parametrize("writer", ["a session of ours", "a plain session on a watched engine"])
@pytest.mark.parametrize(
    ("database_url", "name"),
    [(database, name) for name, way in WAYS.items() for database in way.on.split()],
    indirect=["database_url"],
)
@pytest.mark.usefixtures("world")
async def test_a_commit_ends_what_is_cached_of_the_rows_that_it_changed_and_of_no_others(
    database_url: str,
    name: str,
    writer: str,
    sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    engine: AsyncEngine,
    cache: Cache,
    statements: Statements,
) -> None:
    way = WAYS[name]
    before = await look(sessions, WORLD)

    if writer == "a session of ours":
        async with sessions.begin() as session:
            await way.write(session)
    else:
        cache.watch(engine)
        async with plain.begin() as session:
            await way.write(session)

    assert await look(sessions, WORLD) == (after := await look(plain, WORLD))
    assert {row for row in WORLD if before[row] != after[row]} == set(way.changes)
    hierarchies = {each for table in cache.models.hierarchies().values() for each in table}
    tables = len(hierarchies) if way.tables == EVERYTHING else len(way.tables)
    assert cache.stats.locks == len(way.rows) + tables * BUCKETS
    await cache.drain()
    statements.clear()
    await look(sessions, way.keeps())
    assert statements == []


@pytest.mark.usefixtures("database_url", "world")
async def test_beyond_64_rows_of_one_table_its_generations_are_locked_instead(
    sessions: Sessions, plain: async_sessionmaker[AsyncSession], cache: Cache
) -> None:
    async with sessions.begin() as session:
        session.add_all(Country(code=f"new {n}", name="new") for n in range(63))
        (await session.get_one(Country, "de")).name = "new"
    assert cache.stats.locks == 64

    async with sessions.begin() as session:
        for code in ("de", "fr", *(f"new {n}" for n in range(63))):
            (await session.get_one(Country, code)).name = "newer"
        (await session.get_one(Author, 1)).name = "newer"
    assert cache.stats.locks == 64 + BUCKETS + 1
    assert await look(sessions, WORLD) == await look(plain, WORLD)


@pytest.mark.usefixtures("world")  # SQLite: what PostgreSQL has done of a statement that failed is gone
async def test_what_a_statement_has_written_before_it_failed_is_as_unknown_as_its_answer(sessions: Sessions) -> None:
    async with sessions() as session:
        with pytest.raises(IntegrityError):
            await (await session.connection()).execute(
                insert(AUTHOR).returning(AUTHOR.c.id),
                [{"name": "new"}, {"name": None}],
                execution_options={"insertmanyvalues_page_size": 1},
            )
        assert (await session.get_one(Author, 4)).name == "new", "that there is none was cached"
        await session.commit()
    async with sessions() as session:
        assert (await session.get_one(Author, 4)).name == "new"


# ---------------------------------------------------------------------------------------- what changes nothing cached


async def reading_by_select(session: AsyncSession) -> None:
    _ = (await session.scalars(select(Author).options(selectinload(Author.books)))).all()


async def reading_by_select_for_update(session: AsyncSession) -> None:
    _ = (await session.scalars(select(Author).with_for_update())).all()


async def reading_by_a_common_table_expression(session: AsyncSession) -> None:
    _ = (await session.execute(select(select(Author).cte()))).all()


async def reading_by_a_union_of_parenthesised_selects(session: AsyncSession) -> None:
    if session.get_bind().dialect.name == "postgresql":  # SQLite does not take the parentheses
        one = select(Author.id).order_by(Author.id).limit(1)
        _ = (await session.execute(union_all(one, one))).all()


async def reading_by_text(session: AsyncSession) -> None:
    _ = (await session.execute(text("-- all\n /* of them */ select * from author"))).all()


async def a_setting(session: AsyncSession) -> None:
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    await session.execute(text("pragma cache_size = 100" if is_sqlite else "set local work_mem = '4MB'"))


async def a_savepoint_released_and_one_rolled_back(session: AsyncSession) -> None:
    async with session.begin_nested():
        _ = await session.get(Author, 1, populate_existing=True)
    savepoint = await session.begin_nested()
    await savepoint.rollback()


async def writing_a_table_that_is_not_cached(session: AsyncSession) -> None:
    session.add(Secret(id=2, value="new"))
    (await session.get_one(Secret, 1)).value = "new"
    await session.flush()
    await session.execute(update(Secret).values(value="newer"))
    await session.execute(delete(Base.metadata.tables["secret"]))


async def writing_a_table_between_two_that_are_cached(session: AsyncSession) -> None:
    await session.execute(insert(book_tag).values(book_id=2, tag_id=2))


@pytest.mark.parametrize(
    "harmless",
    [
        reading_by_select,
        reading_by_select_for_update,
        reading_by_a_common_table_expression,
        reading_by_a_union_of_parenthesised_selects,
        reading_by_text,
        a_setting,
        a_savepoint_released_and_one_rolled_back,
        writing_a_table_that_is_not_cached,
        writing_a_table_between_two_that_are_cached,
    ],
)
@pytest.mark.usefixtures("database_url", "world")
async def test_what_changes_no_cached_row_locks_nothing(
    harmless: Write, sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    async with sessions.begin() as session:
        await harmless(session)
    assert cache.stats.locks == 0
    await cache.drain()
    statements.clear()
    await look(sessions, WORLD)
    assert statements == []


# ------------------------------------------------------------------------------------------ what is registered in part


@pytest.fixture
async def staff(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        session.add(Editor(id=1, name="Ed", language="en"))
        await session.commit()


@pytest.mark.usefixtures("database_url", "staff")
async def test_a_subclass_that_is_not_cached_ends_what_is_cached_of_its_base(engine: AsyncEngine) -> None:
    async with Cache("memory://") as cache:
        cache.register(Staff)
        cache.exclude(Editor)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        assert await look(sessions, [(Staff, 2)]) == {(Staff, 2): None}
        await cache.drain()

        async with sessions.begin() as session:
            session.add(Editor(id=2, name="new", language="en"))

        assert cache.stats.locks == 1
        assert (await look(sessions, [(Staff, 2)]))[Staff, 2] is not None


@pytest.mark.parametrize("statement", [False, True], ids=["by the unit of work", "by a statement"])
@pytest.mark.usefixtures("database_url", "staff")
async def test_a_base_that_is_not_cached_ends_what_is_cached_of_its_subclass(
    engine: AsyncEngine, *, statement: bool
) -> None:
    async with Cache("memory://") as cache:
        cache.register(Editor)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        await look(sessions, [(Editor, 1)])
        await cache.drain()

        async with sessions.begin() as session:
            if statement:
                await session.execute(update(Staff).where(Staff.id == 1).values(name="new"))
            else:
                (await session.get_one(Staff, 1)).name = "new"

        assert cache.stats.locks == 1
        async with sessions() as session:
            assert (await session.get_one(Editor, 1)).name == "new"
