"""A cached get returns a real persistent instance.

Each test runs twice: with an instance that SQLAlchemy has loaded, and with one that came from the cache (which is
asserted). Nothing in it may tell which is which.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

import pytest
from sqlalchemy import event, inspect, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import attributes, selectinload
from sqlalchemy.orm.exc import StaleDataError

from asynccache import Cache
from tests.conftest import Sessions, Statements
from tests.models import (
    Account,
    Author,
    Book,
    Country,
    Currency,
    Editor,
    Note,
    Novel,
    Poem,
    Printer,
    Publication,
    Size,
    Staff,
    Stock,
    Tag,
    account,
    book,
)

T = TypeVar("T")


@pytest.fixture
async def rows(plain: async_sessionmaker[AsyncSession]) -> None:
    async with plain.begin() as session:
        ann = Author(id=1, name="Ann")
        session.add_all(
            [
                ann,
                account(1),
                account(2, email=None),
                book(1, author=ann, tags=[Tag(id=1, name="new")]),
                Staff(id=3, name="Sam"),
                Editor(id=1, name="Eve", language="en"),
                Printer(id=2, name="Pia", level=3),
                Novel(id=1, title="It", chapters=12),
                Poem(id=2, title="If", verses=4),
                Publication(id=3, title="Us"),
                Stock(shop=1, isbn="a", copies=7),
                Country(code="Åland/1", name="Åland"),
            ]
        )
        session.add(Note(title="dear"))


class Source:
    """Where instances come from."""

    def __init__(self, sessions: Sessions, plain: async_sessionmaker[AsyncSession], cache: Cache | None) -> None:
        self._sessions = sessions
        self._plain = plain
        self._cache = cache

    def session(self) -> AsyncSession:
        return self._sessions() if self._cache is not None else self._plain()

    async def settle(self) -> None:
        """Have what was read so far in the cache."""
        if self._cache is not None:
            await self._cache.drain()

    async def warm(self, model: type[Any], pk: Any) -> None:
        """Have the row in the cache, as it is now in the database."""
        if self._cache is not None:
            await self._cache.invalidate(model, pk, scope=self._sessions.kw["bind"])
            async with self._sessions() as session:
                await session.get(model, pk)
            await self.settle()

    async def get(self, session: AsyncSession, model: type[T], pk: Any) -> T:
        await self.warm(model, pk)
        return await self.get_as_it_is(session, model, pk)

    async def get_as_it_is(self, session: AsyncSession, model: type[T], pk: Any) -> T:
        hits = self._cache.stats.hits if self._cache is not None else 0
        instance = await session.get(model, pk)
        assert instance is not None
        assert self._cache is None or self._cache.stats.hits == hits + 1, "not from the cache"
        return instance


@pytest.fixture(params=["SQLAlchemy", "cache"])
def source(
    request: pytest.FixtureRequest,
    rows: None,
    sessions: Sessions,
    plain: async_sessionmaker[AsyncSession],
    cache: Cache,
) -> Source:
    return Source(sessions, plain, cache if request.param == "cache" else None)


@pytest.fixture
async def session(source: Source) -> AsyncIterator[AsyncSession]:
    async with source.session() as session:
        yield session


def updates(statements: Statements) -> list[str]:
    return [each for each in statements if each.startswith("UPDATE")]


# ---------------------------------------------------------------------------------------------------------------- state


async def test_it_is_persistent_and_clean(session: AsyncSession, source: Source, statements: Statements) -> None:
    instance = await source.get(session, Account, 1)
    state = inspect(instance)
    assert (state.persistent, state.modified, state.expired) == (True, False, False)
    assert state.session is session.sync_session
    assert instance in session
    assert not session.dirty
    assert not session.new
    assert state.key == (Account, (1,), None)
    assert list(session.identity_map.values()) == [instance]
    statements.clear()
    assert await session.get(Account, 1) is instance
    assert not statements


async def test_no_attribute_has_a_history_and_nothing_is_written(
    session: AsyncSession, source: Source, statements: Statements
) -> None:
    instance = await source.get(session, Account, 1)
    for attribute in inspect(instance).mapper.column_attrs:
        history = attributes.get_history(instance, attribute.key)
        assert (list(history.added), list(history.deleted)) == ([], [])
    await session.commit()
    assert updates(statements) == []


@pytest.mark.usefixtures("database_url")
@pytest.mark.parametrize("pk", [1, 2])
async def test_columns_of_all_types_have_the_same_values_and_types(
    pk: int, session: AsyncSession, source: Source, plain: async_sessionmaker[AsyncSession]
) -> None:
    async with plain() as other:
        expected = await other.get_one(Account, pk)
    instance = await source.get(session, Account, pk)
    names = [attribute.key for attribute in inspect(Account).column_attrs]
    assert len(names) > 10
    for name in names:
        value, original = getattr(instance, name), getattr(expected, name)
        assert value == original
        assert name == "token" or type(value) is type(original)  # asyncpg has a UUID of its own
    assert instance.currency is Currency.POUND
    assert instance.opened.tzinfo == expected.opened.tzinfo


async def test_text_as_a_primary_key(session: AsyncSession, source: Source) -> None:
    assert (await source.get(session, Country, "Åland/1")).name == "Åland"


async def test_two_sessions_share_no_mutable_value(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Book, 1)
    instance.details["z"].append(99)
    instance.notes["k"] = 99
    async with source.session() as other:
        theirs = await source.get_as_it_is(other, Book, 1)
        assert theirs.details == {"z": [1]}
        assert theirs.notes == {"k": 1}


async def test_the_identity_map_holds_it_weakly(session: AsyncSession, source: Source) -> None:
    await source.get(session, Account, 1)
    gc.collect()
    assert len(session.identity_map) == 0


async def test_the_identity_map_holds_it_while_it_is_modified(session: AsyncSession, source: Source) -> None:
    (await source.get(session, Account, 1)).owner = "changed"
    gc.collect()
    assert (await session.get_one(Account, 1)).owner == "changed"


# -------------------------------------------------------------------------------------------------------------- changes


async def test_a_change_has_a_history_and_only_it_is_written(
    session: AsyncSession, source: Source, statements: Statements
) -> None:
    instance = await source.get(session, Book, 1)
    instance.title = "changed"
    history = inspect(instance).attrs.title.history
    assert (list(history.added), list(history.deleted)) == (["changed"], ["hello"])
    assert instance in session.dirty
    statements.clear()
    await session.flush()
    (statement,) = updates(statements)
    assignments = statement.partition("WHERE")[0]
    assert "title=" in assignments
    assert "version=" in assignments
    assert not any(name in assignments for name in ("width", "notes", "details", "author_id"))
    assert statements.selects() == []


async def test_the_version_counter_counts(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Book, 1)
    assert instance.version == 1
    instance.title = "changed"
    await session.commit()
    assert await instance.awaitable_attrs.version == 2


async def test_a_stale_copy_is_refused_by_its_version(
    session: AsyncSession, source: Source, plain: async_sessionmaker[AsyncSession]
) -> None:
    instance = await source.get(session, Book, 1)
    async with plain.begin() as other:
        await other.execute(update(Book).values(version=5))
    instance.title = "too late"
    with pytest.raises(StaleDataError):
        await session.flush()


async def test_a_mutable_dict_tracks_its_changes(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Book, 1)
    instance.notes["k"] = 2
    assert inspect(instance).modified
    await session.commit()
    async with source.session() as other:
        assert (await source.get(other, Book, 1)).notes == {"k": 2}


async def test_a_composite_is_there_and_writes_its_columns(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Book, 1)
    assert instance.size == Size(130, 200)
    instance.size = Size(1, 2)
    await session.flush()
    assert (instance.width, instance.height) == (1, 2)


async def test_synonyms_hybrids_and_column_properties_need_no_sql(
    session: AsyncSession, source: Source, statements: Statements
) -> None:
    instance = await source.get(session, Book, 1)
    statements.clear()
    assert (instance.name, instance.shouted, instance.girth) == ("hello", "HELLO", 330)
    assert not statements


async def test_the_reconstructor_has_run(session: AsyncSession, source: Source) -> None:
    assert (await source.get(session, Book, 1)).reconstructed is True


async def test_a_rollback_undoes_changes(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Account, 1)
    instance.owner = "changed"
    await session.flush()
    await session.rollback()
    assert inspect(instance).expired
    assert await instance.awaitable_attrs.owner == "owner 1"


async def test_it_can_be_deleted(session: AsyncSession, source: Source) -> None:
    await session.delete(await source.get(session, Stock, (1, "a")))
    await session.commit()
    async with source.session() as other:
        assert await other.get(Stock, (1, "a")) is None


# --------------------------------------------------------------------------------------------------- loading more of it


async def test_relationships_load_lazily(session: AsyncSession, source: Source, statements: Statements) -> None:
    instance = await source.get(session, Book, 1)
    assert {"author", "tags"} <= inspect(instance).unloaded
    statements.clear()
    author = await instance.awaitable_attrs.author
    assert author.name == "Ann"
    assert [tag.name for tag in await instance.awaitable_attrs.tags] == ["new"]
    assert await author.awaitable_attrs.books == [instance]
    assert len(statements) <= 3


async def test_a_many_to_one_takes_what_the_session_holds(
    session: AsyncSession, source: Source, statements: Statements
) -> None:
    instance = await source.get(session, Book, 1)
    author = await source.get(session, Author, 1)
    statements.clear()
    assert await instance.awaitable_attrs.author is author
    assert not statements


async def test_a_deferred_column_is_loaded_alone(session: AsyncSession, source: Source, statements: Statements) -> None:
    instance = await source.get(session, Book, 1)
    assert "text" in inspect(instance).unloaded
    statements.clear()
    assert await instance.awaitable_attrs.text == "long"
    (statement,) = statements
    assert "title" not in statement


async def test_a_query_fills_its_relationships(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Book, 1)
    found = await session.scalar(select(Book).options(selectinload(Book.tags)))
    assert found is instance
    assert [tag.name for tag in instance.tags] == ["new"]


async def test_it_can_be_expired_and_refreshed(session: AsyncSession, source: Source, statements: Statements) -> None:
    instance = await source.get(session, Account, 1)
    statements.clear()
    session.expire(instance, ["email"])
    assert await instance.awaitable_attrs.email == "owner1@example.com"
    assert instance.owner == "owner 1"
    await session.refresh(instance)
    assert len(statements) == 2
    await session.commit()
    assert inspect(instance).expired
    assert await instance.awaitable_attrs.owner == "owner 1"
    assert len(statements) == 3
    assert await session.get(Account, 1) is instance


async def test_a_get_of_what_is_expired_refreshes_it(
    session: AsyncSession, source: Source, statements: Statements
) -> None:
    author = await source.get(session, Author, 1)
    session.expire(author)
    statements.clear()
    assert await session.get(Author, 1) is author
    assert len(statements.selects()) == 1
    assert author.name == "Ann"


async def test_a_relationship_can_be_refreshed(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Book, 1)
    await session.refresh(instance, ["author"])
    assert instance.author is not None


# ------------------------------------------------------------------------------------------------------------- mappings


@pytest.mark.parametrize(
    ("model", "pk", "attribute", "value"), [(Editor, 1, "language", "en"), (Printer, 2, "level", 3)]
)
async def test_joined_inheritance(
    model: type[Staff], pk: int, attribute: str, value: object, session: AsyncSession, source: Source
) -> None:
    instance = await source.get(session, model, pk)
    assert type(instance) is model
    assert getattr(instance, attribute) == value
    assert await session.get(Staff, pk) is instance
    assert await session.get(Printer if model is Editor else Editor, pk) is None


async def test_a_joined_subclass_is_found_by_its_base(session: AsyncSession, source: Source) -> None:
    await source.warm(Editor, 1)
    instance = await source.get_as_it_is(session, Staff, 1)
    assert type(instance) is Editor
    assert await instance.awaitable_attrs.language == "en"


async def test_a_joined_subclass_loaded_by_its_base_loads_the_rest_later(session: AsyncSession, source: Source) -> None:
    instance = await session.get_one(Staff, 1)
    assert type(instance) is Editor
    assert await instance.awaitable_attrs.language == "en"
    async with source.session() as other:  # what the base has loaded was not stored for the subclass
        assert (await other.get_one(Editor, 1)).language == "en"


async def test_a_row_of_the_base_itself(session: AsyncSession, source: Source) -> None:
    assert type(await source.get(session, Staff, 3)) is Staff


@pytest.mark.parametrize("model", [Editor, Printer])
async def test_a_row_of_another_subclass_is_none(model: type[Staff], session: AsyncSession, source: Source) -> None:
    for other, pk in ((Staff, 3), (Editor, 1), (Printer, 2)):
        if other is not model:
            await source.warm(other, pk)
            assert await session.get(model, pk) is None


async def test_that_there_is_no_such_subclass_does_not_hide_the_row(session: AsyncSession, source: Source) -> None:
    assert await session.get(Printer, 1) is None
    await source.settle()
    async with source.session() as other:
        assert type(await other.get(Editor, 1)) is Editor


@pytest.mark.parametrize(("model", "pk"), [(Novel, 1), (Poem, 2), (Publication, 3)])
@pytest.mark.parametrize("by_base", [False, True])
async def test_single_table_inheritance(
    model: type[Publication], pk: int, by_base: bool, session: AsyncSession, source: Source
) -> None:
    await source.warm(model, pk)
    instance = await source.get_as_it_is(session, Publication if by_base else model, pk)
    assert type(instance) is model
    attribute, value = {Novel: ("chapters", 12), Poem: ("verses", 4), Publication: ("title", "Us")}[model]
    assert await getattr(instance.awaitable_attrs, attribute) == value
    others = {Novel, Poem} - {model}
    assert [await session.get(other, pk) for other in others] == [None] * len(others)


async def test_a_primary_key_of_two_columns(session: AsyncSession, source: Source, statements: Statements) -> None:
    instance = await source.get(session, Stock, (1, "a"))
    assert instance.copies == 7
    statements.clear()
    assert await session.get(Stock, {"isbn": "a", "shop": 1}) is instance
    assert not statements


async def test_a_primary_key_by_names(session: AsyncSession, source: Source) -> None:
    assert (await session.get_one(Stock, {"isbn": "a", "shop": 1})).copies == 7
    assert (await source.get(session, Author, 1)).name == "Ann"
    assert await session.get(Author, {"id": 2}) is None


async def test_a_dataclass(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Note, 1)
    assert (instance.title, instance.body) == ("dear", "")
    assert repr(instance) == "Note(id=1, title='dear', body='')"
    instance.title = "changed"
    await session.commit()
    async with source.session() as other:
        assert (await source.get(other, Note, 1)).title == "changed"


# ----------------------------------------------------------------------------------------------- events, other sessions


@pytest.fixture
def events() -> Iterator[list[str]]:
    heard: list[str] = []

    def load(target: object, context: object) -> None:
        heard.append("load")

    def refresh(target: object, context: object, names: object) -> None:
        heard.append("refresh")

    event.listen(Account, "load", load)
    event.listen(Account, "refresh", refresh)
    yield heard
    event.remove(Account, "load", load)
    event.remove(Account, "refresh", refresh)


async def test_load_events_fire(events: list[str], session: AsyncSession, source: Source) -> None:
    await source.warm(Account, 1)

    def loaded(session: object, instance: object) -> None:
        events.append("loaded_as_persistent")

    event.listen(session.sync_session, "loaded_as_persistent", loaded)
    events.clear()
    instance = await source.get_as_it_is(session, Account, 1)
    assert events == ["load", "loaded_as_persistent"]
    await session.refresh(instance)
    assert events == ["load", "loaded_as_persistent", "refresh"]


async def test_what_a_load_listener_assigns_is_no_change(session: AsyncSession, source: Source) -> None:
    def load(target: Author, context: object) -> None:
        target.name = target.name.upper()

    event.listen(Author, "load", load)
    try:
        instance = await source.get(session, Author, 1)
    finally:
        event.remove(Author, "load", load)
    assert instance.name == "ANN"
    assert instance not in session.dirty


async def test_it_can_be_pickled(session: AsyncSession, source: Source) -> None:
    copy: Book = pickle.loads(pickle.dumps(await source.get(session, Book, 1)))  # noqa: S301 (our own)
    assert (copy.title, copy.size, copy.notes) == ("hello", Size(130, 200), {"k": 1})
    assert inspect(copy).detached
    async with source.session() as other:
        other.add(copy)
        assert (await copy.awaitable_attrs.author).name == "Ann"


async def test_it_can_be_merged_into_another_session(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Book, 1)
    instance.title = "changed"
    async with source.session() as other:
        merged = await other.merge(instance)
        assert merged is not instance
        assert (merged.title, merged in other.dirty) == ("changed", True)


async def test_a_detached_instance_is_merged_into_it(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Book, 1)
    assert await session.merge(Book(id=1, title="changed")) is instance
    assert inspect(instance).attrs.title.history.deleted == ["hello"]


async def test_it_can_be_expunged_and_added(session: AsyncSession, source: Source) -> None:
    instance = await source.get(session, Author, 1)
    session.expunge(instance)
    assert inspect(instance).detached
    async with source.session() as other:
        other.add(instance)
        instance.name = "changed"
        await other.commit()
    async with source.session() as other:
        assert (await source.get(other, Author, 1)).name == "changed"
