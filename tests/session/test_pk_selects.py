"""`Cache(rewrite_pk_selects=True)`: a SELECT by the primary key alone is a get.

Which statements are meant is in `tests/orm/test_pk_select.py`; here is what becomes of them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import import_module
from typing import Any, cast

import pytest
from sqlalchemy import Row, Select, delete, event, select, update
from sqlalchemy.exc import NoResultFound
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, ORMExecuteState, selectinload

from asynccache import AsyncCachedSession, Cache
from asynccache.orm.pk_select import primary_key_select
from tests.conftest import Sessions, Statements
from tests.models import Author, Base, Book, Editor, Note, Printer, Secret, Staff, Stock
from tests.session.conftest import Commands, on_both

Plain = async_sessionmaker[AsyncSession]


@pytest.fixture
async def cache(request: pytest.FixtureRequest) -> AsyncIterator[Cache]:
    url = request.getfixturevalue("cache_url") if "cache_url" in request.fixturenames else "memory://"
    async with Cache(url, lease_ttl=30, rewrite_pk_selects=True) as cache:
        cache.register(Base)
        cache.exclude(Secret)
        yield cache


@pytest.fixture(autouse=True)
async def rows(plain: Plain) -> None:
    async with plain.begin() as session:
        session.add_all([Author(id=1, name="Ann"), Stock(shop=1, isbn="a", copies=7), Secret(id=1, value="secret")])
        session.add_all([Editor(id=1, name="Eve", language="en"), Printer(id=2, name="Pia", level=3)])
        session.add(Note(title="dear"))


@pytest.fixture
def warm(sessions: Sessions, cache: Cache) -> Callable[..., Awaitable[None]]:
    async def warm(model: type[Any], *pks: Any) -> None:
        for pk in pks:
            async with sessions() as session:
                await session.get(model, pk)
        await cache.drain()
        cache.stats.hits = cache.stats.misses = cache.stats.loads = 0

    return warm


Warm = Callable[..., Awaitable[None]]


async def rename_past_the_cache(plain: Plain, name: str = "Eve") -> None:
    """Who reads this name has read the database; who reads the old one, the cache."""
    async with plain.begin() as session:
        await session.execute(update(Author).where(Author.id == 1).values(name=name))


def author(pk: int = 1) -> Select[Any]:
    return select(Author).where(Author.id == pk)


# --------------------------------------------------------------------------------------------------------------- served

Ask = Callable[[AsyncSession], Awaitable[Any]]


async def by_execute(session: AsyncSession) -> Any:
    return (await session.execute(author())).scalar_one_or_none()


async def by_scalars(session: AsyncSession) -> Any:
    return (await session.scalars(author())).one_or_none()


async def by_scalar(session: AsyncSession) -> Any:
    return await session.scalar(author())


async def by_a_scoped_session(session: AsyncSession) -> Any:
    scoped = async_scoped_session(cast("Sessions", lambda: session), scopefunc=lambda: None)
    return await scoped.scalar(author(), execution_options={}, bind_arguments=None)


@pytest.mark.parametrize("ask", [by_execute, by_scalars, by_scalar, by_a_scoped_session])
@on_both
async def test_it_comes_from_the_cache(
    ask: Ask, sessions: Sessions, warm: Warm, statements: Statements, commands: Commands, cache: Cache
) -> None:
    await warm(Author, 1)
    statements.clear()
    commands.clear()
    async with sessions() as session:
        found = await ask(session)
        assert (found.name, type(found)) == ("Ann", Author)
        assert found in session
        assert session.in_transaction()
    assert (statements, commands) == ([], ["get_many"])
    assert cache.stats.hits == 1


@on_both
async def test_a_miss_is_one_select_and_is_stored(sessions: Sessions, statements: Statements, cache: Cache) -> None:
    for pk, expected in ((1, "Ann"), (404, None)):
        statements.clear()
        for _ in range(2):
            async with sessions() as session:
                found = (await session.execute(author(pk))).scalar_one_or_none()
                assert (found and found.name) == expected
            await cache.drain()
        assert len(statements) == 1
    assert (cache.stats.hits, cache.stats.negative_hits, cache.stats.fills) == (1, 1, 2)


async def test_a_key_of_two_columns_and_parameters(sessions: Sessions, warm: Warm, statements: Statements) -> None:
    await warm(Stock, (1, "a"))
    statements.clear()
    async with sessions() as session:
        stock = await session.scalar(select(Stock).filter_by(isbn="a", shop=1))
        assert stock is not None
        assert stock.copies == 7
    assert statements == []


async def test_a_subclass(sessions: Sessions, warm: Warm, statements: Statements) -> None:
    await warm(Editor, 1)
    await warm(Printer, 2)
    statements.clear()
    async with sessions() as session:
        base = await session.scalar(select(Staff).where(Staff.id == 1))
        assert isinstance(base, Editor)
        assert base.language == "en"
        assert await session.scalar(select(Editor).where(Editor.id == 2)) is None, "a printer"
    assert statements == []


# ---------------------------------------------------------------------------------------------- as SQLAlchemy's results

USES: dict[str, Callable[[Any], Any]] = {
    "scalar": lambda result: result.scalar(),
    "scalar_one": lambda result: result.scalar_one(),
    "scalar_one_or_none": lambda result: result.scalar_one_or_none(),
    "scalars all": lambda result: result.scalars().all(),
    "scalars first": lambda result: result.scalars().first(),
    "scalars one": lambda result: result.scalars().one(),
    "scalars one_or_none": lambda result: result.scalars().one_or_none(),
    "scalars unique": lambda result: result.scalars().unique().all(),
    "unique scalar_one_or_none": lambda result: result.unique().scalar_one_or_none(),
    "unique all": lambda result: result.unique().all(),
    "all": lambda result: result.all(),
    "one": lambda result: result.one(),
    "one_or_none": lambda result: result.one_or_none(),
    "first": lambda result: result.first(),
    "fetchone": lambda result: result.fetchone(),
    "fetchmany": lambda result: result.fetchmany(2),
    "fetchall": lambda result: result.fetchall(),
    "iteration": lambda result: [row[0] for row in result],
    "row": lambda result: [(tuple(row), row.t if hasattr(row, "t") else None, row._fields) for row in result],
    "keys": lambda result: list(result.keys()),
    "mappings": lambda result: [dict(each) for each in result.mappings().all()],
    "mappings one": lambda result: dict(result.mappings().one()),
    "columns": lambda result: result.columns(0).all(),
    "columns by name": lambda result: [tuple(row) for row in result.columns(next(iter(result.keys()))).all()],
    "tuples": lambda result: result.tuples().all(),
    "partitions": lambda result: [[tuple(row) for row in part] for part in result.partitions(1)],
    "yield_per": lambda result: [tuple(row) for row in result.yield_per(1)],
    "freeze": lambda result: result.freeze()().all(),
    "closed": lambda result: (result.all(), result.closed),
    "close": lambda result: (result.close(), result.closed),
    "twice": lambda result: (result.all(), result.all()),
    "returns_rows": lambda result: getattr(result, "returns_rows", None),
}


def shown(value: Any) -> Any:
    """By what it is, not which."""
    if isinstance(value, (Author, Note)):
        return (type(value), value.id)
    if isinstance(value, dict):
        return {key: shown(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, Row)):
        return [shown(each) for each in value]
    return value


@pytest.mark.parametrize("use", USES)
async def test_a_result_behaves_as_sqlalchemy_s(use: str, sessions: Sessions, plain: Plain, warm: Warm) -> None:
    await warm(Author, 1, 404)
    await warm(Note, 1)
    for statement in (author(1), author(404), select(Note).where(Note.id == 1)):  # which is not hashable

        async def outcome(session: AsyncSession, statement: Any = statement) -> Any:
            try:
                return shown(USES[use](await session.execute(statement)))
            except Exception as error:
                return type(error), str(error)

        async with plain() as theirs, sessions() as ours:
            assert await outcome(ours) == await outcome(theirs)


async def test_scalars_raise_as_ever(sessions: Sessions, warm: Warm) -> None:
    await warm(Author, 404)
    async with sessions() as session:
        with pytest.raises(NoResultFound):
            (await session.scalars(author(404))).one()


# ------------------------------------------------------------------------------------------------------------- executed


@pytest.mark.parametrize(
    "statement",
    [
        author().options(selectinload(Author.books)),
        author().execution_options(populate_existing=True),
        author().with_for_update(),
        author().limit(1),
        author().where(Author.name == "Eve"),
        select(Author).where(Author.id == "1"),
    ],
)
async def test_another_statement_is_executed(
    statement: Select[Any], sessions: Sessions, warm: Warm, plain: Plain
) -> None:
    await warm(Author, 1)
    await rename_past_the_cache(plain)
    async with sessions() as session:
        found = await session.scalar(statement)
        assert found is not None
        assert found.name == "Eve"


@pytest.mark.parametrize("way", ["execute", "scalar", "scalars"])
async def test_options_of_the_execution_have_it_executed(
    way: str, sessions: Sessions, warm: Warm, plain: Plain
) -> None:
    await warm(Author, 1)
    await rename_past_the_cache(plain)
    async with sessions() as session:
        result = await getattr(session, way)(author(), execution_options={"populate_existing": True})
        found = result if way == "scalar" else result.one() if way == "scalars" else result.scalar_one()
        assert found.name == "Eve"


async def test_a_stream_is_executed(sessions: Sessions, warm: Warm, plain: Plain) -> None:
    await warm(Author, 1)
    await rename_past_the_cache(plain)
    async with sessions() as session:
        assert [each.name async for each in await session.stream_scalars(author())] == ["Eve"]


async def test_what_the_session_holds_is_asked_for(
    sessions: Sessions, warm: Warm, statements: Statements, plain: Plain
) -> None:
    """A SELECT tells whether it is still there."""
    await warm(Author, 1)
    async with sessions() as session:
        held = await session.get(Author, 1)
        async with plain.begin() as other:
            await other.execute(delete(Author))
        statements.clear()
        assert await session.scalar(author()) is None
        assert len(statements) == 1
        assert held is not None


async def test_a_transaction_sees_its_own_writes(sessions: Sessions, warm: Warm, cache: Cache) -> None:
    await warm(Author, 1)
    async with sessions() as session:
        await session.execute(update(Author).where(Author.id == 1).values(name="mine"))
        found = await session.scalar(author())
        assert found is not None
        assert found.name == "mine"
        session.add(Author(id=2, name="pending"))
        assert await session.scalar(select(Author.name).where(Author.id == 2)) == "pending"
        pending = Author(id=3, name="flushed by it")
        session.add(pending)
        assert await session.scalar(author(3)) is pending
    assert cache.stats.bypassed["own writes"] == 2


async def test_a_listener_of_do_orm_execute_sees_it(sessions: Sessions, warm: Warm, cache: Cache) -> None:
    await warm(Author, 1)
    heard: list[ORMExecuteState] = []
    async with sessions() as session:
        event.listen(session.sync_session, "do_orm_execute", heard.append)
        with pytest.warns(UserWarning, match="do_orm_execute"):
            assert await session.scalar(author()) is not None
    assert [each.is_select for each in heard] == [True]
    assert cache.stats.bypassed == {"do_orm_execute listener": 1}


async def test_a_model_that_is_not_cached_is_executed(sessions: Sessions, statements: Statements) -> None:
    for _ in range(2):
        async with sessions() as session:
            assert await session.scalar(select(Secret).where(Secret.id == 1)) is not None
    assert len(statements) == 2


async def test_it_has_to_be_asked_for(engine: AsyncEngine, statements: Statements) -> None:
    async with Cache("memory://") as cache:
        cache.register(Base)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        for _ in range(2):
            async with sessions() as session:
                assert await session.scalar(author()) is not None
                assert (await session.execute(author())).scalar_one()
        assert cache.stats.misses == 0
    assert len(statements) == 4


async def test_a_statement_that_is_made_once_is_served_again_and_again(
    sessions: Sessions, statements: Statements, cache: Cache
) -> None:
    statement = author()
    async with sessions() as session:
        held = await session.get(Author, 1)
        assert await session.scalar(statement) is held, "executed"
    await cache.drain()
    statements.clear()
    for _ in range(2):
        async with sessions() as session:
            assert await session.scalar(statement) is not None
    assert statements == []


# ----------------------------------------------------------------------------------------------------------------- cost


def calls(work: Callable[[], object]) -> int:
    """How many functions this calls, written in Python or not."""
    counted = 0

    def count(_frame: object, happened: str, _argument: object) -> None:
        nonlocal counted
        counted += happened in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted - 2  # `work` itself, and the end of counting


@pytest.mark.parametrize(
    ("statement", "calls_max"),
    [
        (update(Author).values(name="x"), 2),
        (select(Author), 5),
        (select(Author.id, Author.name).where(Author.name == "Ann"), 5),
        (select(Author).where(Author.name == "Ann").limit(10), 20),
        (
            select(Author).join(Book).where(Book.title == "x").order_by(Author.id).options(selectinload(Author.books)),
            20,
        ),
        (select(Author).where(Author.name == "Ann"), 20),
    ],
)
def test_other_statements_are_told_apart_in_a_few_calls(statement: Any, calls_max: int) -> None:
    """Executing one takes some thousands in SQLAlchemy, before the database has heard of it."""
    primary_key_select(author(), None)  # which notes the mapper's columns
    assert primary_key_select(statement, None) is None
    assert calls(lambda: primary_key_select(statement, None)) <= calls_max


# ---------------------------------------------------------------------------------------------------- real repositories


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it is older than SQLAlchemy 2.1
    from advanced_alchemy.exceptions import NotFoundError
    from advanced_alchemy.repository import SQLAlchemyAsyncRepository


class Authors(SQLAlchemyAsyncRepository[Author]):
    model_type = Author


@on_both
async def test_a_repository_of_advanced_alchemy_reads_from_the_cache(
    sessions: Sessions, warm: Warm, statements: Statements, cache: Cache
) -> None:
    await warm(Author, 1, 404)
    statements.clear()
    async with sessions() as session:
        found = await Authors(session=session).get(1)
        assert found.name == "Ann"
        with pytest.raises(NotFoundError):
            await Authors(session=session).get(404)
    async with sessions() as session:
        one_or_none = await Authors(session=session).get_one_or_none(Author.id == 1)
        assert one_or_none is not None
    assert statements == []
    async with sessions() as session:
        authors = Authors(session=session)
        (await authors.get(1)).name = "Eve"
        await session.commit()
    async with sessions() as session:
        assert (await Authors(session=session).get(1)).name == "Eve"


@pytest.mark.sqlalchemy_2_0
@on_both
async def test_a_user_database_of_fastapi_users_reads_from_the_cache(
    engine: AsyncEngine, sessions: Sessions, statements: Statements, cache: Cache
) -> None:
    fastapi_users: Any = import_module("fastapi_users_db_sqlalchemy")  # which is for SQLAlchemy 2.0 only

    class UserBase(DeclarativeBase):
        pass

    class User(fastapi_users.SQLAlchemyBaseUserTableUUID, UserBase):  # type: ignore[misc]
        __tablename__ = "site_user"

    cache.register(User)
    async with engine.begin() as connection:
        await connection.run_sync(UserBase.metadata.create_all)
    async with sessions() as session:
        users = fastapi_users.SQLAlchemyUserDatabase(session, User)
        pk = (await users.create({"email": "ann@example.com", "hashed_password": "x"})).id
    await cache.drain()
    for expected in (1, 0):
        statements.clear()
        async with sessions() as session:
            users = fastapi_users.SQLAlchemyUserDatabase(session, User)
            assert (await users.get(pk)).email == "ann@example.com"
        await cache.drain()
        assert len(statements) == expected
