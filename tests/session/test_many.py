"""`cached_get_many`: one look into the cache for all, one SELECT for the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from sqlalchemy import event, update
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from asynccache import Cache, Key, MemcachedBackend, MemoryBackend, cached_get_many
from tests.conftest import Sessions, Statements
from tests.models import Author, Base, Country, Editor, Printer, Secret, Shelf, Staff, Stock

Plain = async_sessionmaker[AsyncSession]

ALL = range(1, 101)


class CountedMemory(MemoryBackend):
    commands = 0

    def get_many_now(self, keys: Sequence[Key]) -> list[bytes | None]:
        self.commands += 1
        return super().get_many_now(keys)


@pytest.fixture
def backend(cache_url: str) -> CountedMemory | MemcachedBackend:
    return CountedMemory() if cache_url == "memory://" else MemcachedBackend.from_url(cache_url)


@pytest.fixture
async def cache(backend: CountedMemory | MemcachedBackend) -> AsyncIterator[Cache]:
    async with Cache(backend) as cache:
        cache.register(Base)
        cache.exclude(Secret)
        yield cache


@pytest.fixture(autouse=True)
async def rows(plain: Plain) -> None:
    async with plain.begin() as session:
        session.add_all([Author(id=i, name=f"author {i}") for i in ALL])
        session.add_all([Stock(shop=i, isbn=isbn, copies=i) for i in (1, 2) for isbn in "ab"])
        session.add_all([Editor(id=1, name="Eve", language="en"), Printer(id=2, name="Pia", level=3)])
        session.add_all([Country(code=code, name=code.lower()) for code in ("DE", "UK")])
        session.add(Shelf(id=1, name="top"))


async def names(session: AsyncSession, pks: Any) -> dict[Any, str | None]:
    authors = await cached_get_many(session, Author, pks)
    return {pk: author.name if author is not None else None for pk, author in authors.items()}


async def fill(sessions: Sessions, cache: Cache, pks: Any = ALL) -> None:
    async with sessions() as session:
        await names(session, pks)
    await cache.drain()


# ----------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.usefixtures("database_url")
async def test_all_misses_are_one_select_and_all_hits_one_read(
    sessions: Sessions, cache: Cache, backend: CountedMemory | MemcachedBackend, statements: Statements
) -> None:
    async with sessions() as session:
        missed = await names(session, ALL)
    await cache.drain()
    assert len(statements) == 1
    assert cache.stats.fills == len(ALL)
    commands = backend.commands
    async with sessions() as session:
        assert await names(session, ALL) == missed == {i: f"author {i}" for i in ALL}
    assert len(statements) == 1
    assert backend.commands == commands + 1
    assert cache.stats.hits == len(ALL)


async def test_hits_and_misses_mix(sessions: Sessions, cache: Cache, statements: Statements) -> None:
    await fill(sessions, cache, range(1, 11))
    async with sessions() as session:
        assert await names(session, range(5, 16)) == {i: f"author {i}" for i in range(5, 16)}
    assert len(statements) == 2
    assert (cache.stats.hits, cache.stats.misses, cache.stats.loads) == (6, 10 + 5, 2)


async def test_a_get_reads_what_many_have_filled_and_the_other_way_round(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    await fill(sessions, cache, [1, 2])
    async with sessions() as session:
        assert (await session.get_one(Author, 1)).name == "author 1"
        assert (await session.get_one(Author, 3)).name == "author 3"
    await cache.drain()
    async with sessions() as session:
        assert await names(session, [3, 2]) == {3: "author 3", 2: "author 2"}
    assert len(statements) == 2


async def test_what_the_session_holds_is_not_asked_for(
    sessions: Sessions, cache: Cache, backend: CountedMemory | MemcachedBackend, statements: Statements
) -> None:
    async with sessions() as session:
        held = await session.get_one(Author, 1)
        await cache.drain()
        found = await cached_get_many(session, Author, [1, 2])
        assert found[1] is held
        await cache.drain()
        statements.clear()
        commands = backend.commands
        assert await cached_get_many(session, Author, [2, 1]) == found
        assert (statements, backend.commands) == ([], commands)


async def test_nothing_asked_is_nothing_done(
    sessions: Sessions, backend: CountedMemory | MemcachedBackend, statements: Statements
) -> None:
    async with sessions() as session:
        assert await cached_get_many(session, Author, []) == {}
    assert (statements, backend.commands) == ([], 0)


async def test_concurrent_misses_of_the_same_rows_are_one_select(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    await fill(sessions, cache, [100])  # the isolation is known
    statements.clear()

    async def request(pks: Sequence[int]) -> dict[Any, str | None]:
        async with sessions() as session:
            return await names(session, pks)

    forwards, backwards = list(range(1, 21)), list(range(20, 0, -1))
    results = await asyncio.gather(*(request(pks) for pks in (forwards, backwards) * 10))
    assert all(result == {i: f"author {i}" for i in forwards} for result in results)
    assert len(statements) == 1


# ------------------------------------------------------------------------------------------------------ keys and values


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("model", "pks", "found"),
    [
        pytest.param(Author, [3, 1, 2], [True, True, True], id="in the order asked"),
        pytest.param(Author, [3, 1, 3, 1], [True, True], id="each once"),
        pytest.param(Author, [404, 1, -1], [False, True, False], id="missing rows"),
        pytest.param(Author, [(1,), (404,)], [True, False], id="tuples of one"),
        pytest.param(Author, [1, (1,)], [True, True], id="one row by two keys"),
        pytest.param(Stock, [(2, "a"), (1, "b"), (9, "a")], [True, True, False], id="two columns"),
        pytest.param(Country, ["UK", "DE", "uk"], [True, True, False], id="text"),
        pytest.param(Staff, [2, 1, 3], [True, True, False], id="a base"),
        pytest.param(Editor, [1, 2], [True, False], id="a subclass"),
    ],
)
async def test_the_answer_is_by_the_keys_as_given(
    model: type[Base],
    pks: list[Any],
    found: list[bool],
    warm: bool,
    sessions: Sessions,
    cache: Cache,
    statements: Statements,
) -> None:
    async with sessions() as session:
        if warm:
            await cached_get_many(session, model, pks)
            await cache.drain()
    statements.clear()
    async with sessions() as session:
        answer = await cached_get_many(session, model, iter(pks))
        assert list(answer) == list(dict.fromkeys(pks))
        assert [each is not None for each in answer.values()] == found
        for pk, instance in answer.items():
            assert instance is await session.get(model, pk)
            assert instance is None or isinstance(instance, model)
    if not warm:
        assert len(statements.selects()) >= 1
    elif model not in (Staff, Editor):
        assert not statements


async def test_that_there_is_no_such_row_is_cached_too(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    await fill(sessions, cache, [404, 405])
    statements.clear()
    async with sessions() as session:
        assert await names(session, [405, 404]) == {405: None, 404: None}
    assert not statements
    assert cache.stats.negative_hits == 2


async def test_a_key_of_another_type_is_left_to_the_database(sessions: Sessions, cache: Cache) -> None:
    await fill(sessions, cache, [1])
    async with sessions() as session:
        assert await names(session, [1, 2.0, 3]) == {1: "author 1", 2.0: "author 2", 3: "author 3"}
    assert cache.stats.bypassed == {"primary key type": 1}


async def test_a_wrong_number_of_values_raises(sessions: Sessions) -> None:
    async with sessions() as session:
        with pytest.raises(InvalidRequestError, match="Incorrect number of values in identifier"):
            await cached_get_many(session, Stock, [(1, "a"), (1,)])


# ----------------------------------------------------------------------------------------------------------- visibility


@pytest.mark.parametrize("how", ["unit of work", "statement"])
async def test_own_writes_are_read_from_the_database(how: str, sessions: Sessions, cache: Cache) -> None:
    await fill(sessions, cache, [1, 2, 3])
    async with sessions() as session:
        if how == "unit of work":
            (await session.get_one(Author, 1)).name = "mine"  # to be flushed by what follows
        else:
            await session.execute(update(Author).where(Author.id == 1).values(name="mine"))
        assert await names(session, [1, 2]) == {1: "mine", 2: "author 2"}
        session.expunge_all()
        assert await names(session, [3, 1]) == {3: "author 3", 1: "mine"}
        async with sessions() as other:
            assert await names(other, [1]) == {1: "author 1"}
    assert cache.stats.bypassed["own writes"] >= 1


async def test_who_has_written_fills_nothing(sessions: Sessions, cache: Cache) -> None:
    async with sessions() as session:
        session.add(Author(id=404, name="mine"))
        assert await names(session, [404, 1, 2]) == {404: "mine", 1: "author 1", 2: "author 2"}
        await cache.drain()
    assert cache.stats.fills == 0


async def test_what_is_pending_is_flushed_first(sessions: Sessions, statements: Statements) -> None:
    async with sessions() as session:
        added = Author(id=404, name="mine")
        session.add(added)
        assert (await cached_get_many(session, Author, [404]))[404] is added
        assert statements[0].startswith("INSERT")


async def test_a_model_that_is_read_past_the_cache(sessions: Sessions, cache: Cache, statements: Statements) -> None:
    async with sessions() as session:
        found = await cached_get_many(session, Shelf, [1, 2])
        assert found[2] is None
        assert found[1] is not None
        assert found[1].boards == []
    assert cache.stats.bypassed == {"eager relationship": 2}
    assert len(statements) == 2, "the shelves and their boards"


async def test_a_session_that_reads_past_the_cache(sessions: Sessions, cache: Cache, plain: Plain) -> None:
    await fill(sessions, cache, [1, 2])
    async with plain.begin() as session:  # which the cache does not see
        await session.execute(update(Author).values(name="database"))
    cache.reading = False
    async with sessions() as session:
        assert await names(session, [1, 404]) == {1: "database", 404: None}
    assert cache.stats.bypassed == {"reading is off": 2}


@pytest.mark.parametrize("warm", [False, True])
async def test_load_events_fire_for_each(warm: bool, sessions: Sessions, cache: Cache) -> None:
    if warm:
        await fill(sessions, cache, [1, 2])
    async with sessions() as session:
        loaded: list[object] = []
        event.listen(session.sync_session, "loaded_as_persistent", lambda _, instance: loaded.append(instance))
        found = await cached_get_many(session, Author, [1, 2, 404])
        assert loaded == [found[1], found[2]]
