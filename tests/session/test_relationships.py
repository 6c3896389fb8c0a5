"""Relationships: a lazy many-to-one is a get; what is eager comes along; many are prefetched at once.

a lazy many-to-one that is cached           1 command, 0 statements
the many-to-ones of 100 instances, cached   1 command, 0 statements
... that are not                            1 look, 1 SELECT
a cached row with an eager many-to-one      2 commands, 0 statements
a cached row with an eager collection       1 command, 1 statement: 2 without a cache
"""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import ForeignKey, create_engine, event, insert, inspect, literal_column, select, update
from sqlalchemy.exc import InvalidRequestError, MissingGreenlet, StatementError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    PassiveFlag,
    Session,
    attributes,
    foreign,
    joinedload,
    mapped_column,
    relationship,
    remote,
    selectinload,
)

from asynccache import Cache, CachedSession, ConfigurationError, NotRegisteredError, cached_get_many, cached_prefetch
from tests.conftest import Sessions, Statements
from tests.session.conftest import Commands, on_both

Plain = async_sessionmaker[AsyncSession]


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Artist(Base):
    """Joined table inheritance; each leads to whom it learned from."""

    __tablename__ = "artist"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    teacher_id: Mapped[int | None] = mapped_column(ForeignKey("artist.id"))
    teacher: Mapped[Artist | None] = relationship(remote_side="Artist.id")

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "artist"}


class Singer(Artist):
    __tablename__ = "singer"

    id: Mapped[int] = mapped_column(ForeignKey("artist.id"), primary_key=True)
    voice: Mapped[str]

    __mapper_args__ = {"polymorphic_identity": "singer"}


class Shop(Base):
    __tablename__ = "shop"

    city: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Private(Base):
    """Never registered."""

    __tablename__ = "private"

    id: Mapped[int] = mapped_column(primary_key=True)


class Disc(Base):
    """Every kind of many-to-one."""

    __tablename__ = "disc"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    artist_id: Mapped[int | None] = mapped_column(ForeignKey("artist.id"))
    shop_city: Mapped[str | None]
    shop_number: Mapped[int | None]
    private_id: Mapped[int | None]
    artist: Mapped[Artist | None] = relationship()
    singer: Mapped[Singer | None] = relationship(
        primaryjoin=lambda: foreign(Disc.artist_id) == remote(Singer.id), viewonly=True
    )
    shop: Mapped[Shop | None] = relationship(
        primaryjoin=lambda: (foreign(Disc.shop_city) == Shop.city) & (foreign(Disc.shop_number) == Shop.number)
    )
    private: Mapped[Private | None] = relationship(primaryjoin=lambda: foreign(Disc.private_id) == Private.id)
    namesake: Mapped[Artist | None] = relationship(
        primaryjoin=lambda: foreign(Disc.title) == remote(Artist.name), viewonly=True
    )
    raising: Mapped[Artist | None] = relationship(lazy="raise", viewonly=True)
    tracks: Mapped[list[Track]] = relationship(back_populates="disc")


class Track(Base):
    """What is eager, and leads to what is eager in its turn."""

    __tablename__ = "track"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    disc_id: Mapped[int] = mapped_column(ForeignKey("disc.id"))
    singer_id: Mapped[int | None] = mapped_column(ForeignKey("singer.id"))
    disc: Mapped[Disc] = relationship(back_populates="tracks", lazy="joined")
    singer: Mapped[Singer | None] = relationship(lazy="selectin")


class Play(Base):
    __tablename__ = "play"

    id: Mapped[int] = mapped_column(primary_key=True)
    track_id: Mapped[int] = mapped_column(ForeignKey("track.id"))
    track: Mapped[Track] = relationship(lazy="immediate")


class Guarded(Base):
    __tablename__ = "guarded"

    id: Mapped[int] = mapped_column(primary_key=True)
    artist_id: Mapped[int] = mapped_column(ForeignKey("artist.id"))
    artist: Mapped[Artist] = relationship(lazy="raise_on_sql")


class Box(Base):
    """Eager collections, by a SELECT of their own."""

    __tablename__ = "box"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("artist.id"))
    owner: Mapped[Artist | None] = relationship(lazy="joined")
    items: Mapped[list[Item]] = relationship(lazy="selectin", back_populates="box")
    labels: Mapped[list[Sticker]] = relationship(lazy="subquery")


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    box_id: Mapped[int] = mapped_column(ForeignKey("box.id"))
    box: Mapped[Box] = relationship(back_populates="items")


class Sticker(Base):
    __tablename__ = "sticker"

    id: Mapped[int] = mapped_column(primary_key=True)
    box_id: Mapped[int] = mapped_column(ForeignKey("box.id"))


class Crate(Base):
    """An eager collection by a join."""

    __tablename__ = "crate"

    id: Mapped[int] = mapped_column(primary_key=True)
    bottles: Mapped[list[Bottle]] = relationship(lazy="joined")


class Bottle(Base):
    __tablename__ = "bottle"

    id: Mapped[int] = mapped_column(primary_key=True)
    crate_id: Mapped[int] = mapped_column(ForeignKey("crate.id"))


class Node(Base):
    """Eager relationships that lead back."""

    __tablename__ = "node"

    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("node.id"))
    parent: Mapped[Node | None] = relationship(lazy="joined", join_depth=2, remote_side="Node.id")


class Show(Base):
    __tablename__ = "show"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    host_id: Mapped[int | None] = mapped_column(ForeignKey("artist.id"))
    host: Mapped[Artist | None] = relationship(lazy="joined", foreign_keys=host_id)

    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "show"}


class Opera(Show):
    """What is eager in a subclass is not for those who ask for its base."""

    __tablename__ = "opera"

    id: Mapped[int] = mapped_column(ForeignKey("show.id"), primary_key=True)
    star_id: Mapped[int | None] = mapped_column(ForeignKey("singer.id"))
    star: Mapped[Singer | None] = relationship(lazy="selectin", foreign_keys=star_id)

    __mapper_args__ = {"polymorphic_identity": "opera"}


class Gala(Show):
    """The same of a subclass that its base loads as well."""

    guest_id: Mapped[int | None] = mapped_column(ForeignKey("singer.id"))
    guest: Mapped[Singer | None] = relationship(lazy="selectin", foreign_keys=guest_id)

    __mapper_args__ = {"polymorphic_identity": "gala", "polymorphic_load": "inline"}


@pytest.fixture
async def cache(cache: Cache) -> Cache:
    cache.register(Base)
    cache.exclude(Private)
    return cache


@pytest.fixture(autouse=True)
async def rows(engine: AsyncEngine, plain: Plain) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with plain.begin() as session:
        session.add_all([Artist(id=1, name="Ann"), Singer(id=2, name="Sue", voice="alto", teacher_id=1)])
        session.add_all([Shop(city="Rom", number=1, name="Uno"), Private(id=1)])
        await session.flush()
        session.add_all([Disc(id=1, title="Ann", artist_id=1, private_id=1), Disc(id=2, title="two", artist_id=2)])
        session.add_all([Disc(id=3, title="none"), Disc(id=4, title="shop", shop_city="Rom", shop_number=1)])
        session.add(Disc(id=5, title="dangling", shop_city="Rom", shop_number=404))
        session.add_all([Guarded(id=1, artist_id=1), Node(id=1), Box(id=1, name="box", owner_id=1), Crate(id=1)])
        await session.flush()
        session.add_all([Track(id=1, title="one", disc_id=1, singer_id=2), Track(id=2, title="two", disc_id=2)])
        session.add_all([Item(id=1, box_id=1), Item(id=2, box_id=1), Sticker(id=1, box_id=1)])
        session.add_all([Bottle(id=1, crate_id=1), Node(id=2, parent_id=1)])
        await session.flush()
        session.add(Play(id=1, track_id=1))


@pytest.fixture
def fill(sessions: Sessions, cache: Cache) -> Callable[..., Awaitable[None]]:
    """Have these rows in the cache, and nothing counted."""

    async def fill(model: type[Any], *pks: Any) -> None:
        for pk in pks:
            async with sessions() as session:
                await session.get(model, pk)
        await cache.drain()
        cache.stats.hits = cache.stats.misses = cache.stats.loads = 0
        cache.stats.bypassed.clear()

    return fill


async def rename_past_the_cache(plain: Plain, name: str = "Eve") -> None:
    """Who reads this name has read the database; who reads the old one, the cache."""
    async with plain.begin() as session:
        await session.execute(update(Artist).where(Artist.id == 1).values(name=name))


# ---------------------------------------------------------------------------------------------------- lazy many-to-ones

Fill = Callable[..., Awaitable[None]]
Touch = Callable[[AsyncSession, Disc], Awaitable[Artist | None]]


async def by_awaitable_attrs(_session: AsyncSession, disc: Disc) -> Artist | None:
    artist: Artist | None = await disc.awaitable_attrs.artist
    return artist


async def by_run_sync(session: AsyncSession, disc: Disc) -> Artist | None:
    return await session.run_sync(lambda _: disc.artist)


@pytest.mark.parametrize("touch", [by_awaitable_attrs, by_run_sync])
@on_both
async def test_a_lazy_many_to_one_comes_from_the_cache(
    touch: Touch, sessions: Sessions, fill: Fill, cache: Cache, statements: Statements, commands: Commands
) -> None:
    await fill(Artist, 1)
    async with sessions() as session:
        disc = (await session.scalars(select(Disc).where(Disc.id == 1))).one()
        statements.clear()
        commands.clear()
        artist = await touch(session, disc)
        assert artist is not None
        assert artist.name == "Ann"
        assert disc.artist is artist is await session.get(Artist, 1)
        assert not session.dirty
    assert (statements, len(commands)) == ([], 1)
    assert cache.stats.hits == 1


@on_both
async def test_a_lazy_many_to_one_that_is_not_cached_is_loaded_once_and_stored(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    for _ in range(2):
        async with sessions() as session:
            disc = await session.get_one(Disc, 1)
            assert (await disc.awaitable_attrs.artist).name == "Ann"
        await cache.drain()
    assert len(statements.selects()) == 2, "the disc and its artist, once"
    assert (cache.stats.misses, cache.stats.loads, cache.stats.fills, cache.stats.hits) == (2, 2, 2, 2)


async def test_many_sessions_that_load_it_lazily_make_one_select(
    sessions: Sessions, fill: Fill, cache: Cache, statements: Statements
) -> None:
    await fill(Disc, 1)
    statements.clear()

    async def ask() -> str:
        async with sessions() as session:
            disc = await session.get_one(Disc, 1)
            name: str = (await disc.awaitable_attrs.artist).name
            return name

    assert await asyncio.gather(*[ask() for _ in range(20)]) == ["Ann"] * 20
    assert len(statements.selects()) == 1
    assert cache.stats.coalesced == 19


@on_both
async def test_a_many_to_one_of_two_columns(sessions: Sessions, fill: Fill, statements: Statements) -> None:
    await fill(Shop, ("Rom", 1))
    await fill(Disc, 4)
    statements.clear()
    async with sessions() as session:
        disc = await session.get_one(Disc, 4)
        assert (await disc.awaitable_attrs.shop).name == "Uno"
    assert statements == []


async def test_a_many_to_one_to_a_subclass_gives_it_or_none(
    sessions: Sessions, fill: Fill, statements: Statements
) -> None:
    await fill(Disc, 1, 2)
    await fill(Artist, 1)
    await fill(Singer, 2)
    statements.clear()
    async with sessions() as session:
        ann, sue = await session.get_one(Disc, 1), await session.get_one(Disc, 2)
        assert (await sue.awaitable_attrs.artist).voice == "alto", "with the columns of its own class"
        assert await sue.awaitable_attrs.singer is sue.artist
        assert await ann.awaitable_attrs.singer is None, "she does not sing"
    assert statements == []


async def test_without_a_key_there_is_nothing_to_ask(
    sessions: Sessions, fill: Fill, statements: Statements, commands: Commands
) -> None:
    await fill(Disc, 3)
    async with sessions() as session:
        disc = await session.get_one(Disc, 3)
        statements.clear()
        commands.clear()
        assert await disc.awaitable_attrs.artist is None
    assert (statements, commands) == ([], [])


@on_both
async def test_that_a_key_leads_to_nothing_is_known_too(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    for _ in range(2):
        async with sessions() as session:
            disc = await session.get_one(Disc, 5)
            assert await disc.awaitable_attrs.shop is None
        await cache.drain()
    assert len(statements.selects()) == 2, "the disc and its shop, once"
    assert cache.stats.negative_hits == 1


async def test_the_target_of_a_new_key_is_loaded(sessions: Sessions, fill: Fill) -> None:
    await fill(Artist, 1)
    await fill(Singer, 2)
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)
        disc.artist_id = 2
        assert (await disc.awaitable_attrs.artist).name == "Sue"


async def test_a_transaction_sees_its_own_writes(sessions: Sessions, fill: Fill, cache: Cache) -> None:
    await fill(Artist, 1)
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)
        await session.execute(update(Artist).where(Artist.id == 1).values(name="mine"))
        assert (await disc.awaitable_attrs.artist).name == "mine"
    assert cache.stats.bypassed == {"own writes": 1}


async def test_what_is_pending_is_flushed_first(sessions: Sessions, fill: Fill) -> None:
    await fill(Artist, 1)
    async with sessions() as session:
        disc = await session.get_one(Disc, 3)
        session.add(Artist(id=3, name="new"))
        disc.artist_id = 3
        assert (await disc.awaitable_attrs.artist).name == "new"


@pytest.mark.parametrize("passive", [PassiveFlag.PASSIVE_NO_FETCH, PassiveFlag.PASSIVE_NO_INITIALIZE])
async def test_who_may_not_fetch_looks_nowhere(
    passive: PassiveFlag, sessions: Sessions, fill: Fill, statements: Statements, commands: Commands
) -> None:
    await fill(Artist, 1)
    await fill(Disc, 1)
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)
        statements.clear()
        commands.clear()
        history = await session.run_sync(lambda _: attributes.get_history(disc, "artist", passive))
        assert not history.unchanged
    assert (statements, commands) == ([], [])


async def test_without_a_greenlet_a_lazy_load_fails_as_ever(sessions: Sessions, fill: Fill) -> None:
    await fill(Artist, 1)
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of SQLAlchemy's coroutine, which nobody awaits
            with pytest.raises((MissingGreenlet, StatementError), match="greenlet_spawn has not been called"):
                _ = disc.artist
            gc.collect()
        assert (await disc.awaitable_attrs.artist).name == "Ann"
        assert session.sync_session.get(Disc, 1) is disc, "which takes none"


@pytest.mark.parametrize("warm", [True, False])
async def test_what_is_to_raise_raises_whatever_is_cached(warm: bool, sessions: Sessions, fill: Fill) -> None:
    if warm:
        await fill(Artist, 1)
    async with sessions() as session:
        guarded, disc = await session.get_one(Guarded, 1), await session.get_one(Disc, 1)
        for instance, name in ((guarded, "artist"), (disc, "raising")):
            with pytest.raises(InvalidRequestError, match="lazy='raise"):
                await getattr(instance.awaitable_attrs, name)
        held = await session.get(Artist, 1)
        assert await guarded.awaitable_attrs.artist is held, "without SQL"


async def test_options_of_the_query_that_loaded_it_go_to_the_database(
    sessions: Sessions, fill: Fill, plain: Plain
) -> None:
    await fill(Artist, 1)
    await rename_past_the_cache(plain)
    async with sessions() as session:
        query = select(Disc).options(selectinload(Disc.tracks)).where(Disc.id == 1)
        disc = (await session.scalars(query)).one()
        assert (await disc.awaitable_attrs.artist).name == "Eve"


async def test_other_columns_than_the_key_go_to_the_database(
    sessions: Sessions, statements: Statements, cache: Cache
) -> None:
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)
        statements.clear()
        assert (await disc.awaitable_attrs.namesake).id == 1
        assert len(statements) == 1
        assert (await disc.awaitable_attrs.private).id == 1
        assert len(statements) == 2
    assert cache.stats.bypassed == {}, "no get of a cached model"


async def test_a_listener_of_do_orm_execute_sees_the_lazy_load(sessions: Sessions, fill: Fill, cache: Cache) -> None:
    await fill(Artist, 1)
    heard: list[ORMExecuteState] = []
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)
        event.listen(session.sync_session, "do_orm_execute", heard.append)
        with pytest.warns(UserWarning, match="do_orm_execute"):
            assert (await disc.awaitable_attrs.artist).name == "Ann"
    assert [each.is_relationship_load for each in heard] == [True]
    assert cache.stats.bypassed == {"do_orm_execute listener": 1}


async def test_within_a_flush_and_a_merge_the_database_is_asked(sessions: Sessions, fill: Fill, plain: Plain) -> None:
    await fill(Artist, 1)
    await rename_past_the_cache(plain)
    seen: list[str | None] = []
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)

        @event.listens_for(session.sync_session, "before_flush")
        def look(sync: Session, *_: object) -> None:
            seen.append(disc.artist.name if disc.artist is not None else None)

        disc.title = "changed"
        await session.flush()
        assert seen == ["Eve"]
    async with sessions() as session:
        merged = await session.merge(Artist(id=1, name="Ann", kind="artist"))
        assert session.is_modified(merged), "it is Eve by now"


@pytest.mark.sqlalchemy_2_1
async def test_merging_many_compares_with_the_database_as_well(
    sessions: Sessions, fill: Fill, plain: Plain, cache: Cache
) -> None:
    await fill(Artist, 1)
    await rename_past_the_cache(plain)
    async with sessions() as session:
        merge_all: Any = getattr(session, "merge_all", None)
        (merged,) = await merge_all([Artist(id=1, name="Ann", kind="artist")])
        assert session.is_modified(merged)
    assert cache.stats.hits == 0


async def test_a_session_without_asyncio_reads_the_database(cache: Cache, fill: Fill, tmp_path: Any) -> None:
    await fill(Artist, 1)
    engine = create_engine(f"sqlite:///{tmp_path}/plain.db")
    Base.metadata.create_all(engine)
    with CachedSession(engine, cache=cache) as session:
        session.add_all([Artist(id=1, name="here"), Disc(id=1, title="disc", artist_id=1)])
        session.flush()
        session.expire_all()
        disc = session.get_one(Disc, 1)
        assert disc.artist is not None
        assert disc.artist.name == "here"
    engine.dispose()


# ------------------------------------------------------------------------------------------------- gets within run_sync


@on_both
async def test_a_get_within_run_sync_comes_from_the_cache(
    sessions: Sessions, fill: Fill, cache: Cache, statements: Statements, commands: Commands
) -> None:
    await fill(Artist, 1, 404)
    statements.clear()
    commands.clear()
    async with sessions() as session:
        artist = await session.run_sync(lambda sync: sync.get_one(Artist, 1))
        assert artist.name == "Ann"
        assert await session.run_sync(lambda sync: sync.get(Artist, 1)) is artist
        assert await session.run_sync(lambda sync: sync.get(Artist, 404)) is None
    assert (statements, len(commands)) == ([], 2)
    assert (cache.stats.hits, cache.stats.negative_hits) == (1, 1)


async def test_a_get_with_options_within_run_sync_goes_to_the_database(
    sessions: Sessions, fill: Fill, plain: Plain, cache: Cache
) -> None:
    await fill(Artist, 1)
    await rename_past_the_cache(plain)
    async with sessions() as session:
        artist = await session.run_sync(lambda sync: sync.get_one(Artist, 1, populate_existing=True))
        assert artist.name == "Eve"
    assert cache.stats.bypassed == {"options": 1}


async def test_a_miss_within_run_sync_is_stored(sessions: Sessions, cache: Cache, statements: Statements) -> None:
    for _ in range(2):
        async with sessions() as session:
            await session.run_sync(lambda sync: sync.get_one(Artist, 1))
        await cache.drain()
    assert len(statements) == 1
    assert cache.stats.hits == 1


# ------------------------------------------------------------------------------------------------------------- prefetch


@pytest.fixture
async def discs(plain: Plain, sessions: Sessions) -> None:
    """100 discs by 10 artists."""
    async with plain.begin() as session:
        session.add_all([Artist(id=i, name=f"artist {i}") for i in range(10, 20)])
        await session.flush()
        session.add_all([Disc(id=i, title=f"disc {i}", artist_id=10 + i % 10) for i in range(100, 200)])


async def hundred(session: AsyncSession) -> list[Disc]:
    return list((await session.scalars(select(Disc).where(Disc.id >= 100).order_by(Disc.id))).all())


@on_both
async def test_the_parents_of_all_are_one_read_or_one_select(
    discs: None, sessions: Sessions, cache: Cache, statements: Statements, commands: Commands
) -> None:
    for expected in (1, 0):
        async with sessions() as session:
            found = await hundred(session)
            statements.clear()
            commands.clear()
            artists = await cached_prefetch(session, found, Disc.artist)
            assert len(statements) == expected
            assert commands[0] == "get_many"
            assert sorted(artist.id for artist in artists) == list(range(10, 20))
            # Nothing more is needed, not even a greenlet.
            assert [disc.artist.name if disc.artist else None for disc in found] == [
                f"artist {10 + i % 10}" for i in range(100, 200)
            ]
            assert not session.dirty
        await cache.drain()
    assert commands == ["get_many"]


async def test_prefetching_leads_on(sessions: Sessions, fill: Fill, statements: Statements) -> None:
    await fill(Disc, 1, 2)
    await fill(Artist, 1)
    await fill(Singer, 2)
    statements.clear()
    async with sessions() as session:
        found = await cached_get_many(session, Disc, [1, 2])
        singers = await cached_prefetch(session, [each for each in found.values() if each], Disc.artist)
        teachers = await cached_prefetch(session, singers, Artist.teacher)
        assert [teacher.name for teacher in teachers] == ["Ann"]
        assert [each.teacher.name if each.teacher else None for each in singers] == [None, "Ann"]
    assert statements == []


async def test_keys_that_lead_to_nothing_are_set_to_none(sessions: Sessions, statements: Statements) -> None:
    async with sessions() as session:
        one, two = await session.get_one(Disc, 3), await session.get_one(Disc, 5)
        assert await cached_prefetch(session, [one, two], Disc.shop) == []
        assert (one.shop, two.shop) == (None, None)
        statements.clear()
        assert await cached_prefetch(session, [one], Disc.artist) == []
        assert one.artist is None
        assert await cached_prefetch(session, [], Disc.artist) == []
    assert statements == []


async def test_what_is_loaded_or_assigned_is_left_alone(sessions: Sessions, fill: Fill) -> None:
    await fill(Artist, 1)
    await fill(Singer, 2)
    async with sessions() as session:
        one, two = await session.get_one(Disc, 1), await session.get_one(Disc, 2)
        assigned = Artist(name="assigned")
        two.artist = assigned
        artists = await cached_prefetch(session, [one, two], Disc.artist)
        assert two.artist is assigned
        assert one.artist is not None
        assert artists == [one.artist, assigned]


async def test_a_key_that_has_expired_is_loaded_first(sessions: Sessions, fill: Fill) -> None:
    await fill(Artist, 1)
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)
        session.expire(disc)
        assert [each.name for each in await cached_prefetch(session, [disc], Disc.artist)] == ["Ann"]
        assert disc.artist is not None


async def test_a_key_that_the_database_makes_is_flushed_first(sessions: Sessions, fill: Fill) -> None:
    await fill(Artist, 1)
    async with sessions() as session:
        disc = await session.get_one(Disc, 3)
        disc.artist_id = literal_column("1")
        assert [each.name for each in await cached_prefetch(session, [disc], Disc.artist)] == ["Ann"]
        assert disc.artist is not None


async def test_a_relationship_that_raises_can_be_prefetched(sessions: Sessions) -> None:
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)
        await cached_prefetch(session, [disc], Disc.raising)
        assert disc.raising is not None


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (Disc.tracks, r"Disc\.tracks is no many-to-one .*selectinload\(Disc\.tracks\)"),
        (Disc.namesake, r"Disc\.namesake is no many-to-one .*selectinload\(Disc\.namesake\)"),
        (Disc.title, r"Disc\.title is no relationship"),
        (Disc.artist.and_(Artist.name == "Ann"), r"is no relationship as it is mapped"),
        ("artist", r"'artist' is no relationship"),
    ],
)
async def test_what_cannot_be_prefetched_says_so(attribute: Any, message: str, sessions: Sessions) -> None:
    async with sessions() as session:
        disc = await session.get_one(Disc, 1)
        with pytest.raises(ConfigurationError, match=message):
            await cached_prefetch(session, [disc], attribute)


async def test_what_has_no_such_relationship_says_so(sessions: Sessions, plain: Plain) -> None:
    async with sessions() as session, plain() as other:
        artist, elsewhere = await session.get_one(Artist, 1), await other.get_one(Disc, 1)
        with pytest.raises(ConfigurationError, match=r"Artist .* has no Disc\.artist; pass instances of Disc"):
            await cached_prefetch(session, [artist], Disc.artist)
        with pytest.raises(InvalidRequestError, match=r"Disc .* is not in this session"):
            await cached_prefetch(session, [elsewhere], Disc.artist)
        with pytest.raises(NotRegisteredError, match="Private is not cached"):
            await cached_prefetch(session, [await session.get_one(Disc, 1)], Disc.private)
        with pytest.raises(ConfigurationError, match="has no cache"):
            await cached_prefetch(other, [elsewhere], Disc.artist)


# ---------------------------------------------------------------------------------------------------------------- eager


@on_both
async def test_eager_many_to_ones_come_from_the_cache_with_their_row(
    sessions: Sessions, fill: Fill, cache: Cache, statements: Statements, commands: Commands
) -> None:
    await fill(Play, 1)
    for model, pk in ((Track, 1), (Disc, 1), (Singer, 2)):
        await fill(model, pk)
    statements.clear()
    commands.clear()
    async with sessions() as session:
        play = await session.get_one(Play, 1)
        assert play.track.title == "one"
        assert play.track.disc.title == "Ann"
        assert play.track.singer is not None
        assert play.track.singer.voice == "alto"
    assert (statements, len(commands)) == ([], 4)
    assert cache.stats.hits == 4
    assert cache.stats.bypassed == {}


async def test_an_eager_many_to_one_that_is_not_cached_is_loaded_and_stored(
    sessions: Sessions, fill: Fill, cache: Cache, statements: Statements
) -> None:
    await fill(Track, 1)
    await cache.invalidate(Disc, 1)
    statements.clear()
    for _ in range(2):
        async with sessions() as session:
            track = await session.get_one(Track, 1)
            assert (track.disc.title, track.singer.voice if track.singer else None) == ("Ann", "alto")
        await cache.drain()
    assert len(statements.selects()) == 2, "a disc and a singer, which a joined get has not stored"


@on_both
async def test_eager_collections_take_a_select_each(
    sessions: Sessions, fill: Fill, statements: Statements, cache: Cache
) -> None:
    await fill(Artist, 1)
    async with sessions() as session:
        assert await session.get(Box, 1)
    await cache.drain()
    assert len(statements.selects()) - 1 == 3, "box and owner, items, stickers"
    statements.clear()
    async with sessions() as session:
        box = await session.get_one(Box, 1)
        assert box.owner is not None
        assert (box.owner.name, len(box.items), len(box.labels)) == ("Ann", 2, 1)
        assert {item.box for item in box.items} == {box}, "which is in the identity map"
        assert not session.dirty
    assert len(statements) == 2
    assert cache.stats.hits == 2


@pytest.mark.parametrize(("model", "pk"), [(Crate, 1), (Node, 2)])
async def test_what_a_join_brings_and_what_leads_back_is_read_past_the_cache(
    model: type[Any], pk: int, sessions: Sessions, cache: Cache
) -> None:
    for _ in range(2):
        async with sessions() as session:
            found = await session.get_one(model, pk)
            assert found.bottles[0].id == 1 if model is Crate else found.parent.id == 1
        await cache.drain()
    assert cache.stats.bypassed == {"eager relationship": 2}
    assert cache.stats.fills == 0


async def test_many_with_eager_many_to_ones_are_one_read_for_each_relationship(
    sessions: Sessions, fill: Fill, statements: Statements, commands: Commands
) -> None:
    await fill(Track, 1, 2)
    await fill(Disc, 1, 2)
    await fill(Singer, 2)
    statements.clear()
    commands.clear()
    async with sessions() as session:
        found = await cached_get_many(session, Track, [1, 2])
        titles = [(each.disc.title, each.singer and each.singer.name) for each in found.values() if each is not None]
        assert titles == [("Ann", "Sue"), ("two", None)]
    assert (statements, len(commands)) == ([], 3)


async def test_many_with_eager_collections_are_read_past_the_cache(
    sessions: Sessions, cache: Cache, statements: Statements
) -> None:
    statements.clear()
    async with sessions() as session:
        box = (await cached_get_many(session, Box, [1]))[1]
        assert box is not None
        assert len(box.items) == 2
    assert cache.stats.bypassed == {"eager relationship": 1}
    assert len(statements) == 3


async def test_those_who_wait_for_a_row_get_it_complete(
    sessions: Sessions, statements: Statements, cache: Cache
) -> None:
    async def ask() -> tuple[str, str]:
        async with sessions() as session:
            track = await session.get_one(Track, 1)
            assert track.singer is not None
            return track.disc.title, track.singer.voice

    assert await asyncio.gather(*[ask() for _ in range(10)]) == [("Ann", "alto")] * 10
    assert cache.stats.coalesced > 0


async def test_eager_relationships_see_own_writes(sessions: Sessions, fill: Fill) -> None:
    await fill(Track, 1)
    await fill(Disc, 1)
    async with sessions() as session:
        await session.execute(update(Disc).where(Disc.id == 1).values(title="mine"))
        assert (await session.get_one(Track, 1)).disc.title == "mine"


async def test_a_new_row_of_an_eager_collection_is_there_at_once(sessions: Sessions, fill: Fill) -> None:
    await fill(Box, 1)
    async with sessions.begin() as session:
        await session.execute(insert(Item).values(id=3, box_id=1))
    async with sessions() as session:
        assert len((await session.get_one(Box, 1)).items) == 3


async def test_the_options_of_a_get_are_sqlalchemy_s(sessions: Sessions, fill: Fill, statements: Statements) -> None:
    await fill(Disc, 1)
    statements.clear()
    async with sessions() as session:
        disc = await session.get_one(Disc, 1, options=[joinedload(Disc.artist)])
        assert disc.artist is not None
    assert len(statements) == 1


@pytest.mark.parametrize(
    ("model", "id_", "loaded"), [(Show, 1, {"host"}), (Opera, 1, {"host", "star"}), (Show, 2, {"host", "guest"})]
)
@on_both
async def test_what_is_eager_is_what_a_get_of_the_class_that_is_asked_for_loads(
    model: type[Show],
    id_: int,
    loaded: set[str],
    plain: Plain,
    sessions: Sessions,
    statements: Statements,
    fill: Callable[..., Awaitable[None]],
) -> None:
    async with plain.begin() as session:
        session.add_all([Opera(id=1, host_id=1, star_id=2), Gala(id=2, host_id=1, guest_id=2)])
    await fill(Singer, 2)
    await fill(Artist, 1)
    await fill(model, id_)
    relationships = {"host", "star", "guest"}
    async with plain() as session:
        assert inspect(await session.get_one(model, id_)).dict.keys() & relationships == loaded
    statements.clear()
    async with sessions() as session:
        assert inspect(await session.get_one(model, id_)).dict.keys() & relationships == loaded
    assert statements == []


async def test_an_expired_instance_of_a_subclass_is_refreshed_with_what_is_eager_in_it(
    plain: Plain, sessions: Sessions, fill: Callable[..., Awaitable[None]]
) -> None:
    async with plain.begin() as session:
        session.add(Opera(id=1, star_id=2))
    await fill(Opera, 1)
    async with sessions() as session:
        opera = await session.get_one(Opera, 1)
        await session.commit()
        assert await session.get(Show, 1) is opera
        assert opera.star is not None
