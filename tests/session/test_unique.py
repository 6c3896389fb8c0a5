"""`cached_get_by`: rows by their secondary keys."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import date
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    CHAR,
    Column,
    Computed,
    Enum,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    UniqueConstraint,
    bindparam,
    delete,
    func,
    insert,
    join,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import MultipleResultsFound
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

from asynccache import (
    AsyncCachedSession,
    Cache,
    Change,
    ConfigurationError,
    MemcachedBackend,
    MemoryBackend,
    NotCacheableError,
    NotRegisteredError,
    Transition,
    Write,
    cached_get_by,
    cached_invalidate,
    protocol,
)
from tests.conftest import Sessions, Statements
from tests.gates import GatedBackend, a_read, a_write
from tests.session.conftest import on_both


class Base(DeclarativeBase):
    pass


class Member(Base):
    """One secondary key of one column, which may be NULL, and one of two."""

    __tablename__ = "member"
    __table_args__ = (UniqueConstraint("tenant_id", "slug"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str | None] = mapped_column(unique=True)
    tenant_id: Mapped[int] = mapped_column(default=1)
    slug: Mapped[str]
    name: Mapped[str] = mapped_column(default="")


class Person(Base):
    """Joined inheritance, with a key in the base's table and one in the subclass's."""

    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    badge: Mapped[int] = mapped_column(unique=True)

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}


class Student(Person):
    __tablename__ = "student"

    id: Mapped[int] = mapped_column(ForeignKey("person.id"), primary_key=True)
    matriculation: Mapped[str] = mapped_column("number", unique=True)

    __mapper_args__ = {"polymorphic_identity": "student"}


class Page(Base):
    """Single table inheritance."""

    __tablename__ = "page"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    path: Mapped[str] = mapped_column(unique=True)

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "page"}


class Article(Page):
    __mapper_args__ = {"polymorphic_identity": "article"}


class Lower(TypeDecorator[str]):
    """Makes another value of what it is given: keys are named by what is sent."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: object) -> str | None:  # noqa: ARG002
        return value.lower() if value is not None else None


class Rank(enum.Enum):
    FIRST = 1
    SECOND = 2


class Prize(Base):
    """Keys of other types, and something eager."""

    __tablename__ = "prize"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Lower, unique=True)
    rank: Mapped[Rank] = mapped_column(unique=True)
    day: Mapped[date] = mapped_column(unique=True)
    winner_id: Mapped[int | None] = mapped_column(ForeignKey("member.id"))
    winner: Mapped[Member | None] = relationship(lazy="selectin")


class Counted(GatedBackend):
    """Counts the round trips that wait for the server."""

    reads = 0

    async def get_many(self, keys: Sequence[Any]) -> list[bytes | None]:
        self.reads += 1
        return await super().get_many(keys)


@pytest.fixture
async def engine(engine: AsyncEngine) -> AsyncEngine:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    return engine


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Counted:
    url = request.getfixturevalue("cache_url") if "cache_url" in request.fixturenames else "memory://"
    return Counted(MemoryBackend() if url == "memory://" else MemcachedBackend.from_url(url))


@pytest.fixture
async def cache(backend: Counted) -> AsyncIterator[Cache]:
    async with Cache(backend, lease_ttl=30, ttl_jitter=0) as cache:
        register(cache)
        yield cache


def register(cache: Cache) -> None:
    cache.register(Member, unique=["email", ("tenant_id", "slug")])
    cache.register(Person, unique=["badge"])
    cache.register(Student, unique=["matriculation"])
    cache.register(Page, unique=["path"])
    cache.register(Prize, unique=["name", "rank", "day"])


Plain = async_sessionmaker[AsyncSession]


@pytest.fixture(autouse=True)
async def eve(plain: Plain) -> None:
    async with plain.begin() as session:
        session.add(Member(email="eve@x", slug="eve"))


async def id_of(sessions: Sessions, email: str = "eve@x") -> int | None:
    """Whose address this is, as a session of its own gets it."""
    async with sessions() as session:
        member = await cached_get_by(session, Member, email=email)
        assert member is None or member.email == email
        return member.id if member is not None else None


async def fill(sessions: Sessions, cache: Cache, email: str = "eve@x") -> None:
    """Have all that is needed in the cache."""
    for _ in range(2):
        await id_of(sessions, email)
        await cache.drain()


async def is_hit(sessions: Sessions, statements: Statements, email: str) -> bool:
    count = len(statements)
    await id_of(sessions, email)
    return len(statements) == count


# ----------------------------------------------------------------------------------------------------------------- cost


@on_both
async def test_a_miss_is_one_select_of_the_row_and_a_hit_two_reads(
    sessions: Sessions, cache: Cache, backend: Counted, statements: Statements
) -> None:
    # 1. The row by its address: the address is stored, and where it leads.
    # 2. The row by its primary key, which is stored now.
    # 3. Both from the cache.
    for selects, reads in [(1, None), (2, None), (2, 2), (2, 2)]:
        before = backend.reads
        assert await id_of(sessions) == 1
        await cache.drain()
        assert len(statements) == selects
        assert reads is None or backend.reads - before == reads
    assert "WHERE member.email = " in statements[0]
    assert "WHERE member.id = " not in statements[0]
    assert cache.stats.fills == 2


@on_both
async def test_a_row_that_is_cached_is_read_from_there_once_its_key_is_known(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    async with sessions() as session:
        await session.get(Member, 1)
    await cache.drain()
    assert await id_of(sessions) == 1
    await cache.drain()
    assert len(statements) == 2
    assert await id_of(sessions) == 1
    assert len(statements) == 2


@on_both
async def test_that_there_is_no_such_row_is_stored_as_well(
    sessions: Sessions, cache: Cache, backend: Counted, statements: Statements
) -> None:
    assert await id_of(sessions, "nobody@x") is None
    await cache.drain()
    before = backend.reads
    assert await id_of(sessions, "nobody@x") is None
    assert len(statements) == 1
    assert backend.reads - before == 1
    assert cache.stats.negative_hits == 1


async def test_that_there_is_no_such_row_is_served_for_the_negative_ttl(
    engine: AsyncEngine, statements: Statements
) -> None:
    now_s = 0.0
    async with Cache(MemoryBackend(clock=lambda: now_s), ttl=100, negative_ttl=10, ttl_jitter=0) as cache:
        register(cache)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        await fill(sessions, cache, "nobody@x")
        await fill(sessions, cache)
        now_s = 9
        assert await is_hit(sessions, statements, "nobody@x")
        now_s = 11
        assert not await is_hit(sessions, statements, "nobody@x")
        assert await is_hit(sessions, statements, "eve@x")


async def test_concurrent_misses_are_one_select(sessions: Sessions, cache: Cache, statements: Statements) -> None:
    assert set(await asyncio.gather(*(id_of(sessions) for _ in range(100)))) == {1}
    assert len(statements) == 1
    assert cache.stats.coalesced == 99
    await cache.drain()
    assert set(await asyncio.gather(*(id_of(sessions) for _ in range(100)))) == {1}
    assert len(statements) == 2
    await cache.drain()
    assert set(await asyncio.gather(*(id_of(sessions) for _ in range(100)))) == {1}
    assert len(statements) == 2


async def test_concurrent_misses_are_two_selects_in_a_fleet(
    engine: AsyncEngine, statements: Statements, memcached_url: str
) -> None:
    fleet = [Cache(memcached_url + "?timeout=5", lease_ttl=30) for _ in range(2)]
    for cache in fleet:
        register(cache)
    makers = [async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache) for cache in fleet]
    ids = await asyncio.gather(*(id_of(maker) for maker in makers for _ in range(50)))
    assert set(ids) == {1}
    assert len(statements) <= 2
    for cache in fleet:
        await cache.aclose()


async def test_who_shares_a_row_gets_an_instance_of_its_own(sessions: Sessions) -> None:
    async with sessions() as one, sessions() as other:
        found = await asyncio.gather(*(cached_get_by(each, Member, email="eve@x") for each in (one, other)))
        assert found[0] is not found[1]
        assert all(member in session for member, session in zip(found, (one, other), strict=True))


# ---------------------------------------------------------------------------------------------------------- which rows


@on_both
async def test_a_key_of_several_columns_is_asked_for_in_any_order(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    for values in ({"tenant_id": 1, "slug": "eve"}, {"slug": "eve", "tenant_id": 1}) * 2:
        async with sessions() as session:
            member = await cached_get_by(session, Member, **values)
            assert member is not None
            assert member.id == 1
            assert await cached_get_by(session, Member, tenant_id=2, slug="eve") is None
        await cache.drain()
    assert len(statements) == 3


@pytest.mark.parametrize("given", [1, True, b"eve@x"])
async def test_a_value_of_another_type_is_the_database_s_to_compare(
    sessions: Sessions, cache: Cache, statements: Statements, given: Any
) -> None:
    async with sessions() as session:
        assert await cached_get_by(session, Member, email=given) is None
    assert cache.stats.bypassed["secondary key type"] == 1
    assert len(statements) == 1


async def test_null_is_asked_of_the_database(sessions: Sessions, cache: Cache, plain: Plain) -> None:
    async with sessions() as session:
        assert await cached_get_by(session, Member, email=None) is None
    async with plain.begin() as session:
        session.add_all([Member(id=2, slug="b"), Member(id=3, slug="c")])
    async with sessions() as session:
        with pytest.raises(MultipleResultsFound):
            await cached_get_by(session, Member, email=None)
    assert cache.stats.bypassed["null in a secondary key"] == 2
    assert cache.stats.fills == 0


@on_both
async def test_joined_subclasses_are_found_by_keys_of_both_tables(
    sessions: Sessions, cache: Cache, plain: Plain, statements: Statements
) -> None:
    async with plain.begin() as session:
        session.add_all([Person(id=1, badge=1), Student(id=2, badge=2, matriculation="m2")])
    asked: list[tuple[type[Person], dict[str, Any], int | None]] = [
        (Person, {"badge": 1}, 1),
        (Person, {"badge": 2}, 2),
        (Student, {"badge": 2}, 2),
        (Student, {"badge": 1}, None),  # of another class
        (Student, {"matriculation": "m2"}, 2),
        (Student, {"matriculation": "m1"}, None),
    ]
    for look in range(4):
        statements.clear()
        for model, values, id_ in asked:
            async with sessions() as session:
                found = await cached_get_by(session, model, **values)
                assert (found.id if found is not None else None) == id_
                assert found is None or isinstance(found, model)
            await cache.drain()
        assert look < 3 or statements == []


async def test_that_there_is_none_of_a_subclass_does_not_mean_that_there_is_none(
    sessions: Sessions, cache: Cache, plain: Plain, statements: Statements
) -> None:
    """What a subclass is not found by may be another class's, also before anybody has found it."""
    async with plain.begin() as session:
        session.add(Page(id=1, path="/"))
        session.add(Person(id=1, badge=1))
    for model, base, values in ((Article, Page, {"path": "/"}), (Student, Person, {"badge": 1})):
        async with sessions() as session:
            assert await cached_get_by(session, model, **values) is None
            await cache.drain()
            assert await cached_get_by(session, base, **values) is not None


async def test_keys_that_look_alike_have_slots_of_their_own(sessions: Sessions, cache: Cache, plain: Plain) -> None:
    """A primary key, a secondary key and one of two columns, all with the same text."""

    class Other(Base):
        __tablename__ = "other"
        __table_args__ = (UniqueConstraint("a", "b"),)
        code: Mapped[str] = mapped_column(primary_key=True)
        a: Mapped[str] = mapped_column(unique=True)
        b: Mapped[str] = mapped_column(unique=True)

    try:
        cache.register(Other, unique=["a", "b", ("a", "b")])
        async with plain.begin() as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
            session.add_all(
                [Other(code="x", a="y", b="z"), Other(code="y", a="z", b="x"), Other(code="z", a="x", b="y")]
            )
        for _ in range(3):
            async with sessions() as session:
                found = [
                    await session.get(Other, "x"),
                    await cached_get_by(session, Other, a="x"),
                    await cached_get_by(session, Other, b="x"),
                    await cached_get_by(session, Other, a="x", b="y"),
                ]
                assert [each and each.code for each in found] == ["x", "z", "y", "z"]
            await cache.drain()
    finally:
        Base.metadata.remove(Other.metadata.tables["other"])


@pytest.mark.parametrize("email", ["a b\r\n@x", "ü" * 200, "", "a" * 300])
async def test_any_text_is_a_key(sessions: Sessions, cache: Cache, statements: Statements, email: str) -> None:
    async with sessions.begin() as session:
        session.add(Member(id=2, email=email, slug="x"))
    await cache.drain()
    await fill(sessions, cache, email)
    statements.clear()
    assert await id_of(sessions, email) == 2
    assert statements == []


@on_both
async def test_keys_of_all_types_that_primary_keys_may_have(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    keys: list[dict[str, Any]] = [{"name": "nobel"}, {"rank": Rank.FIRST}, {"day": date(1901, 12, 10)}]
    async with sessions() as session:
        for key in keys:
            assert await cached_get_by(session, Prize, **key) is None
    await cache.drain()
    async with sessions.begin() as session:
        session.add(Prize(id=UUID(int=1), name="Nobel", rank=Rank.FIRST, day=date(1901, 12, 10)))
    assert cache.stats.locks == 4
    for _ in range(2):
        for key in keys:
            async with sessions() as session:
                assert await cached_get_by(session, Prize, **key) is not None
            await cache.drain()
    statements.clear()
    for key in keys:
        async with sessions() as session:
            prize = await cached_get_by(session, Prize, **key)
            assert prize is not None
            assert (prize.id, prize.name, prize.rank) == (UUID(int=1), "nobel", Rank.FIRST)
    assert statements == []
    async with sessions() as session:  # which the database would give back as another
        assert await cached_get_by(session, Prize, name="NOBEL") is not None
    assert cache.stats.bypassed["secondary key type"] == 1


async def test_what_is_eager_comes_with_the_row(sessions: Sessions, cache: Cache, statements: Statements) -> None:
    async with sessions.begin() as session:
        session.add(Prize(id=UUID(int=1), name="a", rank=Rank.FIRST, day=date(2000, 1, 1), winner_id=1))
    for _ in range(4):  # the second time the row is stored, the third time its winner
        statements.clear()
        async with sessions() as session:
            prize = await cached_get_by(session, Prize, name="a")
            assert prize is not None
            assert prize.winner is not None
            assert prize.winner.email == "eve@x"
        await cache.drain()
    assert statements == []


# ------------------------------------------------------------------------------------------------------------ sessions


async def test_what_the_session_holds_is_given_by_what_the_database_holds(
    sessions: Sessions, cache: Cache, plain: Plain
) -> None:
    """As a SELECT does it: the row is found by its committed values, and the instance is as the session has it."""
    cache.watch(plain.kw["bind"])
    await fill(sessions, cache)
    async with sessions() as session, sessions() as reference:
        held = await session.get(Member, 1)
        also_held = await reference.get(Member, 1)
        async with plain.begin() as other:
            await other.execute(update(Member).where(Member.id == 1).values(email="new@x"))
        await cache.drain()
        for _ in range(3):
            assert await cached_get_by(session, Member, email="eve@x") is None
            assert await cached_get_by(session, Member, email="new@x") is held
            await cache.drain()
        assert await reference.scalar(select(Member).where(Member.email == "new@x")) is also_held
        assert held is not None
        assert also_held is not None
        assert held.email == also_held.email == "eve@x"
    assert await id_of(sessions, "new@x") == 1


async def test_an_instance_that_is_held_is_never_stored(sessions: Sessions, cache: Cache, plain: Plain) -> None:
    """
    1. A session holds a row.
    2. Another renames it.
    3. The session finds it by its address: what it holds is older than what its SELECT found.
    """
    cache.watch(plain.kw["bind"])
    async with sessions() as session:
        held = await session.get(Member, 1)
        async with plain.begin() as other:
            await other.execute(update(Member).where(Member.id == 1).values(name="new"))
        await cache.drain()
        for _ in range(3):
            waiting = asyncio.create_task(name_by(sessions))
            assert await cached_get_by(session, Member, email="eve@x") is held
            assert await waiting == "new"
            await cache.drain()


async def name_by(sessions: Sessions) -> str | None:
    async with sessions() as session:
        member = await cached_get_by(session, Member, email="eve@x")
        return member.name if member is not None else None


async def test_an_expired_instance_is_refreshed(sessions: Sessions, cache: Cache, statements: Statements) -> None:
    await fill(sessions, cache)
    async with sessions() as session:
        held = await session.get(Member, 1)
        await session.commit()
        statements.clear()
        assert await cached_get_by(session, Member, email="eve@x") is held
        assert held is not None
        assert held.name == ""  # without another SELECT, for which there is no greenlet
        assert statements == []
        session.expire(held)  # who says so wants the database
        assert await cached_get_by(session, Member, email="eve@x") is held
        assert held.name == ""
        assert len(statements) == 1


@on_both
async def test_what_is_pending_is_flushed_and_own_writes_are_seen(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    await fill(sessions, cache, "new@x")
    await fill(sessions, cache)
    async with sessions() as session:
        member = await session.get(Member, 1)
        assert member is not None
        member.email = "new@x"
        assert await cached_get_by(session, Member, email="new@x") is member
        assert await cached_get_by(session, Member, email="eve@x") is None
        assert await id_of(sessions) == 1
        await session.rollback()
    await cache.drain()
    assert cache.stats.bypassed["own writes"] == 2
    assert await id_of(sessions) == 1
    assert await id_of(sessions, "new@x") is None


async def test_without_autoflush_the_database_is_asked_what_it_holds(sessions: Sessions, cache: Cache) -> None:
    await fill(sessions, cache)
    async with sessions(autoflush=False) as session:
        member = await session.get(Member, 1)
        assert member is not None
        member.email = "new@x"
        assert await cached_get_by(session, Member, email="eve@x") is member
        assert await cached_get_by(session, Member, email="new@x") is None


async def test_it_reads_past_the_cache_where_get_does(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, statements: Statements
) -> None:
    await fill(sessions, cache)
    statements.clear()
    cache.reading = False
    assert await id_of(sessions) == 1
    cache.reading = True
    async with engine.connect() as connection, sessions(bind=connection) as session:
        assert await cached_get_by(session, Member, email="eve@x") is not None
    assert cache.stats.bypassed == {"reading is off": 1, "external connection": 1}
    assert len(statements) == 2


async def test_it_takes_any_session_of_ours(sessions: Sessions, cache: Cache, plain: Plain) -> None:
    scoped = async_scoped_session(sessions, scopefunc=asyncio.current_task)
    assert await cached_get_by(scoped, Member, email="eve@x") is not None  # type: ignore[arg-type]
    await scoped.remove()
    async with plain() as session:
        with pytest.raises(ConfigurationError, match="has no cache"):
            await cached_get_by(session, Member, email="eve@x")
    async with sessions() as session:
        with pytest.raises(NotRegisteredError):
            await cached_get_by(session, int, email="eve@x")  # type: ignore[type-var, unused-ignore]


@pytest.mark.parametrize(
    ("model", "values", "told"),
    [
        (Member, {"name": "x"}, "no secondary key of name; it has email, slug \\+ tenant_id"),
        (Member, {"tenant_id": 1}, "no secondary key of tenant_id"),
        (Member, {"email": "x", "slug": "y"}, "no secondary key of email \\+ slug"),
        (Member, {}, "no secondary key of nothing"),
        (Person, {"matriculation": "x"}, "Person has no secondary key of matriculation; it has badge"),
    ],
)
async def test_a_key_that_was_not_registered_is_refused(
    sessions: Sessions, model: type[Any], values: dict[str, Any], told: str
) -> None:
    async with sessions() as session:
        with pytest.raises(ConfigurationError, match=told):
            await cached_get_by(session, model, **values)


# -------------------------------------------------------------------------------------------------------------- writes

Writing = Callable[[AsyncSession], Awaitable[object]]


async def by_the_unit_of_work(session: AsyncSession) -> None:
    (await session.get_one(Member, 1)).email = "new@x"


async def by_the_unit_of_work_unloaded(session: AsyncSession) -> None:
    member = await session.get_one(Member, 1)
    session.expire(member)
    member.email = "new@x"


async def by_update(session: AsyncSession) -> None:
    await session.execute(update(Member).where(Member.id == 1).values(email="new@x"))


async def by_update_of_both(session: AsyncSession) -> None:
    await session.execute(update(Member).where(Member.id == 1).values(email="new@x", slug="new", tenant_id=1))


async def by_update_in_bulk(session: AsyncSession) -> None:
    await session.execute(update(Member), [{"id": 1, "email": "new@x"}])


async def by_update_with_a_parameter(session: AsyncSession) -> None:
    statement = update(Member).where(Member.id == bindparam("which")).values(email=bindparam("what"))
    await (await session.connection()).execute(statement, {"which": 1, "what": "new@x"})


async def by_update_of_the_key(session: AsyncSession) -> None:
    await session.execute(update(Member).where(Member.email == "eve@x").values(email="new@x"))


async def by_update_with_an_expression(session: AsyncSession) -> None:
    await session.execute(update(Member).where(Member.id == 1).values(email=func.replace(Member.email, "eve", "new")))


async def by_update_of_a_pinned_pair(session: AsyncSession) -> None:
    where = (Member.id == 1, Member.tenant_id == 1)
    await session.execute(update(Member).where(*where).values(slug="new", email="new@x"))


async def by_delete_and_insert(session: AsyncSession) -> None:
    await session.execute(delete(Member).where(Member.id == 1))
    await session.execute(insert(Member).values(id=7, email="new@x", slug="new"))


async def by_add(session: AsyncSession) -> None:
    session.add(Member(id=7, email="new@x", slug="new"))


async def by_add_with_a_key_from_the_database(session: AsyncSession) -> None:
    session.add(Member(email="new@x", slug="new"))


async def by_insert(session: AsyncSession) -> None:
    await session.execute(insert(Member).values(id=7, email="new@x", slug="new"))


async def by_insert_of_many(session: AsyncSession) -> None:
    await session.execute(insert(Member), [{"id": i, "email": f"{i}@x", "slug": f"{i}"} for i in range(50, 55)])
    await session.execute(insert(Member), [{"id": 7, "email": "new@x", "slug": "new"}])


async def by_insert_of_values(session: AsyncSession) -> None:
    rows = [{"id": i, "email": email, "slug": email, "tenant_id": 1} for i, email in ((6, "6@x"), (7, "new@x"))]
    await session.execute(insert(Member).values(rows))


async def by_insert_of_tuples(session: AsyncSession) -> None:
    table = Member.__table__
    assert isinstance(table, Table)
    await session.execute(insert(table).values([(6, "6@x", 1, "6", ""), (7, "new@x", 1, "new", "")]))


async def by_insert_with_an_expression(session: AsyncSession) -> None:
    await session.execute(insert(Member).values(id=7, email=func.lower("NEW@x"), slug="new"))


async def by_insert_from_select(session: AsyncSession) -> None:
    row = select(
        Member.id + 6, func.replace(Member.email, "eve", "new"), Member.tenant_id, Member.slug + "2", Member.name
    )
    await session.execute(insert(Member).from_select(["id", "email", "tenant_id", "slug", "name"], row))


def _upsert(session: AsyncSession) -> Any:
    return (sqlite if session.get_bind().dialect.name == "sqlite" else postgresql).insert(Member)


async def by_upsert(session: AsyncSession) -> None:
    statement = _upsert(session).values(id=1, email="new@x", slug="eve", tenant_id=1)
    await session.execute(
        statement.on_conflict_do_update(index_elements=["id"], set_={"email": statement.excluded.email})
    )


async def by_upsert_that_inserts(session: AsyncSession) -> None:
    statement = _upsert(session).values(id=7, email="new@x", slug="new", tenant_id=1)
    await session.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"name": "other"}))


async def by_update_of_all(session: AsyncSession) -> None:
    await session.execute(update(Member).values(email=func.replace(Member.email, "eve", "new")))


async def by_text(session: AsyncSession) -> None:
    await session.execute(text("UPDATE member SET email = 'new@x' WHERE id = 1"))


BY_SLOT: dict[Writing, int] = {
    by_the_unit_of_work: 2,
    by_the_unit_of_work_unloaded: 2,
    by_update: 2,
    by_update_of_both: 3,
    by_update_in_bulk: 2,
    by_update_of_a_pinned_pair: 3,
    by_add: 3,
    by_add_with_a_key_from_the_database: 3,
    by_insert: 3,
    by_insert_of_many: 18,
    by_insert_of_values: 6,
    by_insert_of_tuples: 6,
    by_delete_and_insert: 4,
    by_upsert_that_inserts: 3,
}
"""With how many slots they lock: those of rows, and of the values that these have from then on."""

BY_TABLE: list[Writing] = [
    by_update_with_a_parameter,
    by_update_of_the_key,
    by_update_with_an_expression,
    by_insert_with_an_expression,
    by_insert_from_select,
    by_upsert,
    by_update_of_all,
    by_text,
]


@on_both
@pytest.mark.parametrize("write", [*BY_SLOT, *BY_TABLE], ids=lambda write: write.__name__)
async def test_who_is_not_there_is_found_once_it_is_and_who_was_is_not(
    sessions: Sessions, cache: Cache, statements: Statements, write: Writing
) -> None:
    await fill(sessions, cache)
    await fill(sessions, cache, "new@x")
    assert await is_hit(sessions, statements, "eve@x")
    assert await is_hit(sessions, statements, "new@x")
    before = cache.stats.locks
    async with sessions.begin() as session:
        await write(session)
    assert await id_of(sessions, "new@x") is not None
    await cache.drain()
    async with sessions() as session:
        expected = await session.scalar(select(Member.id).where(Member.email == "eve@x"))
    for _ in range(3):
        assert await id_of(sessions) == expected
        assert await id_of(sessions, "new@x") is not None
        await cache.drain()
    assert await is_hit(sessions, statements, "eve@x")
    assert await is_hit(sessions, statements, "new@x")
    if write in BY_SLOT:
        assert cache.stats.locks - before == BY_SLOT[write]
    else:
        assert cache.stats.locks - before >= cache.settings.buckets


@on_both
async def test_a_row_that_is_cached_with_another_value_is_not_served(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    """
    1. It is stored where an address leads.
    2. The row gets another address, and is stored with it.
    3. The old address leads there still. That is seen, and led to no more.
    """
    await fill(sessions, cache)
    async with sessions.begin() as session:
        await by_update(session)
    await cache.drain()
    async with sessions() as session:
        await session.get(Member, 1)
    await cache.drain()
    statements.clear()
    for _ in range(2):
        assert await id_of(sessions) is None
        await cache.drain()
    assert len(statements) == 1


@on_both
async def test_a_change_of_other_columns_locks_the_row_alone(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    await fill(sessions, cache)
    async with sessions.begin() as session:
        (await session.get_one(Member, 1)).name = "Eve"
    assert cache.stats.locks == 1
    await cache.drain()
    statements.clear()
    async with sessions() as session:
        member = await cached_get_by(session, Member, email="eve@x")
        assert member is not None
        assert member.name == "Eve"
    assert len(statements) == 1
    assert "WHERE member.email = " in statements[0]  # the one way to load a row by a key


@on_both
async def test_a_row_that_is_deleted_is_not_found_and_found_when_it_is_back(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    await fill(sessions, cache)
    async with sessions.begin() as session:
        await session.delete(await session.get_one(Member, 1))
    assert cache.stats.locks == 1
    await cache.drain()
    for _ in range(2):
        assert await id_of(sessions) is None
        await cache.drain()
    assert await is_hit(sessions, statements, "eve@x")
    for id_ in (2, 1):
        async with sessions.begin() as session:
            await session.execute(delete(Member))
            session.add(Member(id=id_, email="eve@x", slug="eve"))
        assert await id_of(sessions) == id_
        await cache.drain()
        await fill(sessions, cache)
        assert await is_hit(sessions, statements, "eve@x")


@on_both
async def test_two_rows_that_swap_their_keys_are_found_by_the_new_ones(
    sessions: Sessions, cache: Cache, plain: Plain, statements: Statements
) -> None:
    async with plain.begin() as session:
        session.add(Member(id=2, email="bob@x", slug="bob"))
    await fill(sessions, cache)
    await fill(sessions, cache, "bob@x")
    async with sessions.begin() as session:
        for id_, email in ((1, "third@x"), (2, "eve@x"), (1, "bob@x")):
            await session.execute(update(Member).where(Member.id == id_).values(email=email))
    for _ in range(3):
        assert [await id_of(sessions, email) for email in ("eve@x", "bob@x", "third@x")] == [2, 1, None]
        await cache.drain()
    assert await is_hit(sessions, statements, "eve@x")
    assert await is_hit(sessions, statements, "bob@x")


async def test_a_pair_of_which_one_is_changed_locks_the_table(sessions: Sessions, cache: Cache) -> None:
    """The other half is not told, and what the session holds of it may be out of date."""
    async with sessions() as session:
        assert await cached_get_by(session, Member, tenant_id=1, slug="new") is None
        await cache.drain()
        (await session.get_one(Member, 1)).slug = "new"
        await session.commit()
        assert cache.stats.locks == cache.settings.buckets
        found = await cached_get_by(session, Member, tenant_id=1, slug="new")
        assert found is not None


async def test_a_row_without_a_value_locks_no_slot_for_it(sessions: Sessions, cache: Cache) -> None:
    async with sessions.begin() as session:
        session.add(Member(id=2, slug="a"))
    assert cache.stats.locks == 2
    async with sessions.begin() as session:
        await session.execute(insert(Member).values(id=3, slug="b"))
    assert cache.stats.locks == 4
    async with sessions.begin() as session:
        (await session.get_one(Member, 1)).email = None
    assert cache.stats.locks == 5
    await cache.drain()
    assert await id_of(sessions) is None


async def test_a_rollback_changes_nothing(sessions: Sessions, cache: Cache, statements: Statements) -> None:
    await fill(sessions, cache)
    await fill(sessions, cache, "new@x")
    async with sessions() as session:
        await by_update(session)
        await session.rollback()
    assert cache.stats.locks == 0
    assert await is_hit(sessions, statements, "eve@x")
    assert await is_hit(sessions, statements, "new@x")


async def test_beyond_64_slots_the_generations_are_locked(sessions: Sessions, cache: Cache) -> None:
    await fill(sessions, cache, "60@x")
    async with sessions.begin() as session:
        session.add_all([Member(id=i, email=f"{i}@x", slug=f"{i}") for i in range(50, 80)])
    assert cache.stats.locks == cache.settings.buckets
    assert await id_of(sessions, "60@x") == 60


async def test_keys_of_joined_tables_are_locked_by_the_statement_that_sets_them(
    sessions: Sessions, cache: Cache
) -> None:
    async with sessions() as session:
        assert await cached_get_by(session, Student, matriculation="m") is None
        assert await cached_get_by(session, Person, badge=7) is None
    await cache.drain()
    async with sessions.begin() as session:
        session.add(Student(id=1, badge=7, matriculation="m"))
    assert cache.stats.locks == 3
    async with sessions() as session:
        assert await cached_get_by(session, Student, matriculation="m") is not None
        assert await cached_get_by(session, Person, badge=7) is not None
    await cache.drain()
    async with sessions.begin() as session:
        (await session.get_one(Student, 1)).matriculation = "n"
    assert cache.stats.locks == 5


async def test_a_watched_engine_s_writes_count_as_well(sessions: Sessions, cache: Cache, engine: AsyncEngine) -> None:
    cache.watch(engine)
    await fill(sessions, cache, "new@x")
    async with engine.begin() as connection:
        await connection.execute(update(Member).where(Member.id == 1).values(email="new@x"))
    assert cache.stats.locks == 2
    assert await id_of(sessions, "new@x") == 1


async def test_ddl_and_invalidate_all_leave_nothing(sessions: Sessions, cache: Cache, statements: Statements) -> None:
    await fill(sessions, cache, "nobody@x")
    await cache.invalidate_all(Member)
    assert not await is_hit(sessions, statements, "nobody@x")


async def test_invalidate_is_told_what_the_row_has_by_now_or_renews_the_table(
    sessions: Sessions, cache: Cache, plain: Plain, statements: Statements
) -> None:
    async def change(email: str) -> None:  # unseen
        async with plain.begin() as session:
            await session.execute(update(Member).where(Member.id == 1).values(email=email))

    for email in ("1@x", "2@x", "3@x", "4@x"):
        await fill(sessions, cache, email)
    await fill(sessions, cache, "other@x")

    await change("1@x")
    await cache.invalidate(Member, 1, values={"email": "1@x", "tenant_id": 1, "slug": "eve"})
    assert await id_of(sessions, "1@x") == 1
    assert await id_of(sessions, "eve@x") is None
    assert await is_hit(sessions, statements, "other@x")

    await change("2@x")
    async with sessions() as session:
        cached_invalidate(session, Member, 1, values={"email": "2@x", "tenant_id": 1, "slug": "eve"})
        await session.commit()
    await cache.drain()
    assert await id_of(sessions, "2@x") == 1
    assert await is_hit(sessions, statements, "other@x")

    await change("3@x")
    async with sessions() as session:
        cached_invalidate(session, Member, 1)
        await session.commit()
    await cache.drain()
    assert await id_of(sessions, "3@x") == 1
    await fill(sessions, cache, "other@x")

    await change("4@x")
    await cache.invalidate(Member, 1)
    assert await id_of(sessions, "4@x") == 1
    assert not await is_hit(sessions, statements, "other@x")


# ------------------------------------------------------------------------------------------------------------ promises


@pytest.mark.parametrize("step", ["lease", "check", "fill"])
@pytest.mark.parametrize("email", ["eve@x", "new@x"])
async def test_what_was_read_before_a_commit_is_not_stored_after_it(
    sessions: Sessions, cache: Cache, backend: Counted, email: str, step: str
) -> None:
    """
    1. A reader misses (and, at "check" and "fill", takes its lease and reads what is there).
    2. A writer commits another address.
    3. The reader goes on.
    """
    await fill(sessions, cache, "other@x")
    await cache.invalidate_all(Member)  # so that the generations are there, and nothing else
    calls = 0

    def nth(n: int, kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def matches(call: Any) -> bool:
            nonlocal calls
            calls += kind(call)
            return calls == n

        return matches

    gate = backend.hold({"lease": a_write, "check": nth(2, a_read), "fill": nth(2, a_write)}[step])
    reader = asyncio.create_task(id_of(sessions, email))
    await gate.reached.wait()
    async with sessions.begin() as session:
        await by_update(session)
    gate.open()
    assert await reader in (1, None)
    await cache.drain()
    for _ in range(3):
        assert await id_of(sessions) is None
        assert await id_of(sessions, "new@x") == 1
        await cache.drain()


@pytest.mark.parametrize("write", [by_update, by_update_of_all, by_add], ids=lambda write: write.__name__)
async def test_no_hit_is_stale_after_a_commit_is_acknowledged(
    sessions: Sessions, cache: Cache, backend: Counted, write: Writing
) -> None:
    """
    1. It is in the cache where the old address leads, and that nobody has the new one.
    2. A writer commits; the unlocking that follows is held, as if the writer's process had died there.
    """
    await fill(sessions, cache)
    await fill(sessions, cache, "new@x")
    held = [backend.hold(a_write), backend.hold(a_write)]
    held[0].open()  # the lock
    async with sessions.begin() as session:
        await write(session)
    await held[1].reached.wait()
    for _ in range(2):
        assert await id_of(sessions, "new@x") is not None
        assert await id_of(sessions) == (1 if write is by_add else None)
    held[1].open()


async def test_who_asks_late_is_not_given_the_row_that_was_loaded_by_its_key(
    sessions: Sessions, cache: Cache, backend: Counted, statements: Statements
) -> None:
    """
    1. A reader has loaded the row by its address; its fill is held.
    2. A writer changes another column, which locks the row and not its address.
    3. Another asks, whom the address may be told and the row may not.
    """
    await fill(sessions, cache, "other@x")
    await cache.invalidate_all(Member)
    late: list[asyncio.Task[str | None]] = []
    gate = backend.hold(lambda call: a_write(call) and any("SELECT" in each for each in statements))
    statements.clear()
    first = asyncio.create_task(name_by(sessions))
    await gate.reached.wait()
    async with sessions.begin() as session:
        await session.execute(update(Member).where(Member.id == 1).values(name="new"))
    late.append(asyncio.create_task(name_by(sessions)))
    gate.open()
    assert await first == ""
    assert await late[0] == "new"
    await cache.drain()


def put(value: bytes) -> Transition:
    return lambda _: Write(value, 60)


async def test_what_the_server_holds_of_a_key_may_be_anything(
    sessions: Sessions, cache: Cache, backend: Counted, statements: Statements
) -> None:
    """Damaged, of another primary key's type, or leading to another row: all are replaced."""
    await fill(sessions, cache)
    scope = cache.scope_of(sessions.kw["bind"].sync_engine)
    assert scope is not None
    entity = scope.entity(Member)
    assert entity is not None
    slots = scope.key_slots(entity.hierarchy, cache.models.unique_key(Member, ["email"]))
    slot = slots.slot(["eve@x"])
    assert slot is not None
    good, _ = await backend.get_many(slot)
    assert good is not None
    for forged in (good[:-1], good[:16] + b"\xff" * 8, good[:24] + b"\xff\xff" + good[26:], good + b"row", b"\x80"):
        await backend.apply([Change(slot.key, put(forged))])
        assert await id_of(sessions) == 1
        await cache.drain()
    other_row = slots.encode((999,))
    assert other_row is not None
    await backend.apply([Change(slot.key, put(good[: 2 + protocol.ID_BYTES] + other_row))])
    statements.clear()
    for _ in range(2):
        assert await id_of(sessions) == 1
        await cache.drain()
    assert len(statements) == 2
    assert (await backend.get_many([slot.key]))[0] == good
    assert await is_hit(sessions, statements, "eve@x")


# -------------------------------------------------------------------------------------------------------- registration


class Refused(DeclarativeBase):
    pass


class Odd(Refused):
    __tablename__ = "odd"
    __table_args__ = (
        UniqueConstraint("both_a", "both_b"),
        Index("ix_partial", "partial", unique=True, postgresql_where=text("partial > 0")),
        Index("ix_sqlite", "partial_too", unique=True, sqlite_where=text("partial_too > 0")),
        Index("ix_lower", func.lower(text("expression")), unique=True),
        Index("ix_whole", "whole", unique=True),
        Index("ix_plain", "plain"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    both_a: Mapped[int]
    both_b: Mapped[int]
    partial: Mapped[int]
    partial_too: Mapped[int]
    expression: Mapped[str]
    whole: Mapped[str]
    plain: Mapped[str]
    score: Mapped[float] = mapped_column(unique=True)
    mood: Mapped[str] = mapped_column(Enum("good", "bad"), unique=True)
    collated: Mapped[str] = mapped_column(String(collation="NOCASE"), unique=True)
    computed: Mapped[int] = mapped_column(Computed("both_a + both_b"), unique=True)
    touched: Mapped[int] = mapped_column(unique=True, onupdate=lambda: 1)
    indexed: Mapped[str] = mapped_column(index=True, unique=True)
    padded: Mapped[str] = mapped_column(CHAR(3), unique=True)


class Concrete(Odd):
    __tablename__ = "concrete"

    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column(unique=True)

    __mapper_args__ = {"concrete": True}


class Joined(Refused):
    __table__ = join(
        Table("left", Refused.metadata, Column("id", Integer, primary_key=True)),
        Table(
            "right",
            Refused.metadata,
            Column("right_id", ForeignKey("left.id"), primary_key=True),
            Column("code", Integer, unique=True),
        ),
    )
    id = column_property(__table__.c.left_id, __table__.c.right_right_id)


@pytest.mark.parametrize("unique", [["whole"], ["indexed"], [("both_a", "both_b")], [("both_a", "indexed")]])
def test_what_the_database_holds_unique_is_a_key(unique: Any) -> None:
    Cache("memory://").register(Odd, unique=unique)


@pytest.mark.parametrize(
    ("unique", "error", "told"),
    [
        ("whole", ConfigurationError, r"write unique=\['whole'\]"),
        (["nothing"], ConfigurationError, "Odd maps no column as 'nothing'"),
        (
            ["both_a"],
            ConfigurationError,
            "Odd.both_a is no secondary key: nothing says that it is unique; give 'odd' a",
        ),
        (["partial"], ConfigurationError, "nothing says that it is unique"),
        (["partial_too"], ConfigurationError, "nothing says that it is unique"),
        (["expression"], ConfigurationError, "nothing says that it is unique"),
        (["plain"], ConfigurationError, "nothing says that it is unique"),
        ([()], ConfigurationError, "name different columns"),
        ([("whole", "whole")], ConfigurationError, "name different columns"),
        (["id"], ConfigurationError, "Odd.id has all of the primary key: .* use session.get"),
        ([("id", "whole")], ConfigurationError, "use session.get"),
        (["score"], NotCacheableError, "Odd.score cannot be part of a secondary key"),
        (["collated"], NotCacheableError, "Odd.collated cannot be part of a secondary key: .*collation"),
        (["computed"], NotCacheableError, "Odd.computed cannot be part of a secondary key: it changes when"),
        (["padded"], NotCacheableError, "Odd.padded cannot be part of a secondary key: .* make it a String"),
        (["touched"], NotCacheableError, "Odd.touched cannot be part of a secondary key: it changes when"),
    ],
)
def test_what_cannot_be_a_key_is_refused_with_the_way_out(unique: Any, error: type[Exception], told: str) -> None:
    cache = Cache("memory://")
    with pytest.raises(error, match=told):
        cache.register(Odd, unique=unique)
    assert not cache.models.caches(Odd)


def test_columns_of_two_tables_are_no_key() -> None:
    with pytest.raises(ConfigurationError, match="columns of one table"):
        Cache("memory://").register(Student, unique=[("badge", "matriculation")])


@pytest.mark.parametrize("model", [Concrete, Joined])
def test_rows_of_several_tables_have_no_keys(model: type[Any]) -> None:
    with pytest.raises(NotCacheableError, match="rows of a join or of concrete classes have none"):
        Cache("memory://").register(model, unique=["code"])


@pytest.mark.parametrize("target", [Refused, Refused.registry])
def test_keys_are_of_classes(target: Any) -> None:
    with pytest.raises(ConfigurationError, match="register the class by itself"):
        Cache("memory://").register(target, unique=["whole"])


def test_registering_a_key_configures_no_mappers() -> None:
    class Early(DeclarativeBase):
        pass

    cache = Cache("memory://")

    @cache.register(unique=["code"])
    class Child(Early):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[str] = mapped_column(unique=True)
        parent: Mapped[Any] = relationship("Parent", primaryjoin="Child.code == foreign(Parent.code)")

    assert not Child.__mapper__.configured


async def test_a_key_that_is_not_registered_any_more_is_not_locked(sessions: Sessions, cache: Cache) -> None:
    cache.register(Member)
    async with sessions.begin() as session:
        session.add(Member(id=2, email="b@x", slug="b"))
    assert cache.stats.locks == 1
    async with sessions() as session:
        with pytest.raises(ConfigurationError, match=r"cache.register\(Member, unique=\[...\]\)"):
            await cached_get_by(session, Member, email="b@x")


async def test_a_column_that_is_deferred_is_asked_of_the_database(
    engine: AsyncEngine, cache: Cache, sessions: Sessions
) -> None:
    class Late(Base):
        __tablename__ = "late"
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[str] = mapped_column(unique=True, deferred=True)

    try:
        cache.register(Late, unique=["code"])
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with sessions.begin() as session:
            session.add(Late(id=1, code="x"))
        async with sessions() as session:
            assert await cached_get_by(session, Late, code="x") is not None
        assert cache.stats.bypassed["secondary key of a column that is not stored"] == 1
    finally:
        Base.metadata.remove(Late.metadata.tables["late"])


@on_both
async def test_what_was_loaded_of_a_row_by_its_base_is_completed(
    sessions: Sessions, plain: Plain, cache: Cache, statements: Statements
) -> None:
    async with plain.begin() as session:
        session.add(Student(id=1, badge=7, matriculation="m"))
    async with sessions() as session:
        await cached_get_by(session, Student, badge=7)
    await cache.drain()
    async with sessions() as session:
        person = await session.get(Person, 1)
        assert isinstance(person, Student)
        await cache.drain()
        for selects in (1, 0):
            statements.clear()
            assert await cached_get_by(session, Student, badge=7) is person
            assert len(statements) == selects
            assert person.matriculation == "m"


class Coupon(Base):
    __tablename__ = "coupon"

    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str] = mapped_column(unique=True)


class CouponByCode(Base):
    """The same rows, known by another primary key."""

    __table__ = Coupon.__table__
    __mapper_args__ = {"primary_key": [Coupon.__table__.c.code]}


async def test_models_that_know_the_rows_of_one_table_by_different_keys_have_slots_of_their_own(
    engine: AsyncEngine, cache: Cache, backend: Counted
) -> None:
    async with Cache(backend) as other:  # another process
        for each in (cache, other):
            each.register(Coupon, unique=["owner"])
            each.register(CouponByCode, unique=["owner"])
        ours, theirs = (async_sessionmaker(engine, class_=AsyncCachedSession, cache=each) for each in (cache, other))

        async def ask(sessions: Sessions) -> list[bool]:
            found = []
            for model in (Coupon, CouponByCode):
                async with sessions() as session:
                    found.append(await cached_get_by(session, model, owner="eve") is not None)
            await cache.drain()
            return found

        assert await ask(ours) == [False, False]
        async with theirs.begin() as session:
            session.add(Coupon(id=1, code="c", owner="eve"))
        await other.drain()
        assert await ask(ours) == [True, True]
        assert await ask(ours) == [True, True]


class Other(DeclarativeBase):
    """Another part of the application, with its own tables for the same database."""


class PlainPrize(Other):
    """The table of prizes, whose names are sent as they are."""

    __tablename__ = "prize"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


async def test_each_of_two_models_of_one_table_names_slots_by_what_it_sends(sessions: Sessions, cache: Cache) -> None:
    cache.register(PlainPrize, unique=["name"])
    async with sessions() as session:
        assert await cached_get_by(session, PlainPrize, name="X") is None
        assert await cached_get_by(session, Prize, name="CUP") is None
    await cache.drain()
    async with sessions.begin() as session:
        session.add(Prize(id=UUID(int=1), name="Cup", rank=Rank.FIRST, day=date(2024, 1, 1)))
    await cache.drain()
    async with sessions() as session:
        assert await cached_get_by(session, Prize, name="CUP") is not None
