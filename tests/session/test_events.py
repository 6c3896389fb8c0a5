"""What an observer is told: every thing that happens once, with its model, and nothing at all when nobody listens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import FrozenInstanceError

import pytest
from sqlalchemy import event, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from asynccache import Cache, Change, Key, NodeState, Transition, Write, cached_get_by, cached_get_many, protocol
from asynccache.events import (
    BackendFailed,
    Bypassed,
    Coalesced,
    DropReason,
    Event,
    FillDropped,
    Filled,
    Garbage,
    Hit,
    Loaded,
    Locked,
    LockFailed,
    LockLost,
    LockUnverified,
    Missed,
    NodeChanged,
    Repaired,
    RepairFailed,
    RepairsChanged,
    Unlocked,
)
from asynccache.protocol import Slot
from asynccache.telemetry import Telemetry
from asynccache.testing import FailingBackend, failing
from tests.conftest import Sessions
from tests.gates import Call, GatedBackend, a_write
from tests.models import Author, Editor, Shelf, Staff, Stock
from tests.servers import Memcached
from tests.session.conftest import on_both
from tests.session.slots import Slots, name_of
from tests.told import Told
from tests.watch import Watch


@pytest.fixture
async def told(cache: Cache) -> AsyncIterator[Told]:
    told = Told(cache)
    yield told
    await cache.drain()
    told.check()


@pytest.fixture
async def author(plain: async_sessionmaker[AsyncSession]) -> None:
    """Author 1 is in the database, and the cache knows nothing of it."""
    async with plain.begin() as session:
        session.add(Author(id=1, name="Ann"))


async def rename(sessions: Sessions, name: str = "Eve") -> None:
    async with sessions.begin() as session:
        (await session.get_one(Author, 1)).name = name


# --------------------------------------------------------------------------------------------------------------- reads


@on_both
async def test_a_miss_is_loaded_and_stored_and_then_a_hit(
    author: None, sessions: Sessions, cache: Cache, told: Told
) -> None:
    assert await name_of(sessions) == "Ann"
    await cache.drain()
    assert await name_of(sessions) == "Ann"
    load, hit = told.of(Loaded)[0], told.of(Hit)[0]
    assert told == [Missed(Author, 1), load, Filled(Author, 1), hit]
    assert (load.model, load.rows) == (hit.model, hit.rows) == (Author, 1)
    assert 0 < hit.duration_s < 60
    assert 0 < load.duration_s < 60
    assert not hit.missing


async def test_that_there_is_no_such_row_is_a_hit_of_its_own(sessions: Sessions, cache: Cache, told: Told) -> None:
    for _ in range(2):
        assert await name_of(sessions) is None
        await cache.drain()
    assert [hit.missing for hit in told.of(Hit)] == [True]


@on_both
async def test_rows_that_are_read_together_are_one_event_each(sessions: Sessions, cache: Cache, told: Told) -> None:
    async with sessions.begin() as session:
        session.add_all([Author(id=id_, name="Ann") for id_ in range(1, 6)])
    await cache.drain()
    told.clear()
    cache.stats.__init__()  # type: ignore[misc]
    for wanted in (range(1, 4), range(1, 7), range(1, 8)):  # 6 and 7 do not exist
        async with sessions() as session:
            await cached_get_many(session, Author, wanted)
        await cache.drain()
    assert [(type(each), each.rows) for each in told if isinstance(each, (Hit, Missed, Loaded))] == [
        *((Missed, 3), (Loaded, 3)),
        *((Hit, 3), (Missed, 3), (Loaded, 3)),
        *((Hit, 5), (Hit, 1), (Missed, 1), (Loaded, 1)),
    ]
    assert [hit.missing for hit in told.of(Hit)] == [False, False, True]


@on_both
async def test_who_waits_for_anothers_load_is_told_of(
    author: None, sessions: Sessions, cache: Cache, told: Told
) -> None:
    assert set(await asyncio.gather(*(name_of(sessions) for _ in range(10)))) == {"Ann"}
    await cache.drain()
    assert len(told.of(Loaded)) == 1
    assert told.of(Coalesced) == [Coalesced(Author, 1)] * 9


class Own(DeclarativeBase):
    pass


class Member(Own):
    __tablename__ = "member"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)


async def test_a_get_by_a_secondary_key_is_told_under_the_row_s_model(
    sessions: Sessions, cache: Cache, engine: AsyncEngine, told: Told
) -> None:
    cache.register(Member, unique=["email"])
    async with engine.begin() as connection:
        await connection.run_sync(Own.metadata.create_all)
    async with sessions.begin() as session:
        session.add(Member(id=1, email="ann@example.com"))
    await cache.drain()
    told.clear()
    cache.stats.__init__()  # type: ignore[misc]
    for _ in range(3):
        async with sessions() as session:
            assert await cached_get_by(session, Member, email="ann@example.com")
        await cache.drain()
    assert {each.model for each in told if isinstance(each, (Hit, Missed, Loaded, Filled))} == {Member}
    assert told.of(Missed)
    assert told.of(Hit)


@pytest.mark.parametrize(
    "reason", ["options", "primary key type", "reading is off", "own writes", "eager relationship"]
)
async def test_a_get_that_reads_past_the_cache_says_why(
    reason: str, author: None, sessions: Sessions, cache: Cache, told: Told
) -> None:
    async with sessions() as session:
        match reason:
            case "options":
                await session.get(Author, 1, populate_existing=True)
            case "primary key type":
                await session.get(Author, True)
            case "reading is off":
                cache.reading = False
                await cached_get_many(session, Author, [1, 2, 3])
            case "own writes":
                await session.execute(update(Author).where(Author.id == 1).values(name="Eve"))
                await session.get(Author, 1)
            case _:
                await cached_get_many(session, Shelf, [1])
    model, rows = (Shelf if reason == "eager relationship" else Author), (3 if reason == "reading is off" else 1)
    assert told == [Bypassed(model, rows, reason)]


async def test_what_cannot_be_decoded_is_told_once(
    author: None, sessions: Sessions, cache: Cache, slots: Slots, told: Told
) -> None:
    await name_of(sessions)
    await cache.drain()
    value = await slots.row(Author, 1)
    assert value is not None
    await put(cache, slot_of(cache, sessions).key, value[:-3])
    assert await name_of(sessions) == "Ann"
    assert told.of(Garbage) == [Garbage(Author, 1)]


def slot_of(cache: Cache, sessions: Sessions) -> Slot:
    scope = cache.scope_of(sessions.kw["bind"].sync_engine)
    entity = scope and scope.entity(Author)
    slot = entity and entity.row((1,))
    assert slot
    return slot


async def put(cache: Cache, key: Key, value: bytes) -> None:
    await change(cache, key, lambda _: Write(value, 60))


async def change(cache: Cache, key: Key, transition: Transition) -> None:
    """Past gates, as another process would."""
    backend = cache._store.backend
    await (backend.backend if isinstance(backend, GatedBackend) else backend).apply([Change(key, transition)])


# ------------------------------------------------------------------------------------------------------- dropped fills


@pytest.mark.parametrize(
    ("reason", "doubted"),
    [(reason, False) for reason in ("locked", "invalidated", "lease lost", "no answer", "refused")]
    + [("no answer", True)],
)
async def test_a_fill_that_is_dropped_says_why(
    reason: DropReason,
    doubted: bool,
    sessions: Sessions,
    cache: Cache,
    plain: async_sessionmaker[AsyncSession],
    told: Told,
) -> None:
    """
    1. A reader misses, takes its lease and loads the row.
    2. Something happens before that is filled.
    3. The row is not stored.
    """
    async with plain.begin() as session:
        session.add(Author(id=1, name="x" * (1 << 20) if reason == "refused" else "Ann"))
    await name_of(sessions)
    await cache.drain()
    await cache.invalidate(Author, 1)  # so that the slot is empty, and its generation there
    told.clear()
    cache.stats.__init__()  # type: ignore[misc]
    calls: list[Call] = []

    def the_second(call: Call) -> bool:
        calls.extend([call] if a_write(call) else [])
        return len(calls) == 2

    gated = GatedBackend.before(cache)
    gate = gated.hold(the_second)
    assert await name_of(sessions)
    await gate.reached.wait()
    slot, now_ms = slot_of(cache, sessions), time.time_ns() // 1_000_000
    match reason:
        case "locked":
            await change(cache, slot.key, protocol.lock(protocol.fresh_id(), now_ms, 10_000))
        case "invalidated":
            renewal = protocol.unlock_generation(protocol.fresh_id(), now_ms, protocol.fresh_id(), 0)
            await change(cache, slot.generation, renewal)
        case "lease lost":
            await change(cache, slot.key, protocol.unlock_entity(protocol.fresh_id(), now_ms, 0))
        case "no answer" if doubted:  # a commit of this process could not lock the row
            cache._store.doubt(slot.key)
        case "no answer":
            gated.backend = FailingBackend(gated.backend)
        case "refused":
            pass
    gate.open()
    await cache.drain()
    assert told.of(FillDropped) == [FillDropped(Author, 1, reason)]
    assert told.of(Filled) == []


# -------------------------------------------------------------------------------------------------------------- writes


@on_both
async def test_a_commit_locks_and_unlocks_and_each_hierarchy_is_named_by_its_root(
    sessions: Sessions, cache: Cache, told: Told
) -> None:
    async with sessions.begin() as session:
        session.add_all([Author(id=1, name="Ann"), Author(id=2, name="Ben"), Editor(id=1, name="Eve", language="en")])
    await cache.drain()
    locked = told.of(Locked)
    assert {(each.model, each.slots) for each in locked} == {(Author, 2), (Staff, 1)}
    assert len({each.duration_s for each in locked}) == 1, "they are locked in one go"
    assert 0 < locked[0].duration_s < 60
    assert sorted(told.of(Unlocked), key=str) == [Unlocked(Author, 2), Unlocked(Staff, 1)]


@on_both
async def test_a_bulk_write_locks_the_generations(sessions: Sessions, cache: Cache, told: Told) -> None:
    async with sessions.begin() as session:
        await session.execute(update(Stock).values(copies=0))
    await cache.drain()
    assert [(each.model, each.slots) for each in told.of(Locked)] == [(Stock, 16)]


async def test_what_cannot_be_locked_is_repaired_when_the_server_is_back(
    author: None, sessions: Sessions, cache: Cache, told: Told
) -> None:
    with failing(cache):
        await rename(sessions)
        assert [(each.model, each.slots) for each in told.of(LockFailed)] == [(Author, 1)]
        assert told.of(RepairsChanged) == [RepairsChanged(1)]
        assert sum(each.slots for each in told.of(BackendFailed)) == cache.stats.backend_errors > 0
    await cache.drain()
    assert told.of(Repaired) == told_of_unlocking(told) == [Repaired(Author, 1)]
    assert told[-1] == RepairsChanged(0)


def told_of_unlocking(told: Told) -> list[Repaired]:
    """As repairs, for each of them is among the unlockings."""
    return [Repaired(each.model, each.slots) for each in told.of(Unlocked)]


async def test_what_is_given_up_is_told(author: None, sessions: Sessions, cache: Cache, told: Told) -> None:
    with failing(cache) as away:
        await rename(sessions)
        await cache.aclose()
        assert away.failing
    assert told.of(RepairFailed) == [RepairFailed(Author, 1)]
    assert told[-1] == RepairsChanged(0)


@pytest.mark.parametrize("cache_url", ["memcached"], indirect=True)
@pytest.mark.usefixtures("cache_url")
async def test_a_lock_that_was_lost_is_told(
    author: None, sessions: Sessions, cache: Cache, memcached_server: Memcached, told: Told
) -> None:
    async with sessions() as session:
        (await session.get_one(Author, 1)).name = "Eve"
        event.listen(session.sync_session.get_bind(), "commit", lambda _: memcached_server.flush())
        await session.commit()
    assert told.of(LockLost) == [LockLost(Author, 1)]


@pytest.mark.parametrize("cache_url", ["memcached"], indirect=True)
@pytest.mark.usefixtures("cache_url")
async def test_a_server_that_goes_away_during_a_commit_is_told(
    author: None, sessions: Sessions, cache: Cache, memcached_server: Memcached, told: Told
) -> None:
    async with sessions() as session:
        (await session.get_one(Author, 1)).name = "Eve"
        event.listen(session.sync_session.get_bind(), "commit", lambda _: memcached_server.stop(), once=True)
        await session.commit()
    assert told.of(LockUnverified) == [LockUnverified(Author, 1)]
    memcached_server.start()
    await cache.drain()
    assert told.of(Repaired) == [Repaired(Author, 1)]


@pytest.mark.parametrize("cache_url", ["memcached"], indirect=True)
@pytest.mark.usefixtures("cache_url")
async def test_a_breaker_that_opens_and_closes_is_told(
    author: None, sessions: Sessions, cache: Cache, memcached_server: Memcached, told: Told
) -> None:
    watch = Watch(cache._store.backend)
    memcached_server.stop()
    while NodeState.OPEN not in watch.states:
        assert await name_of(sessions) == "Ann"
    memcached_server.start()
    await watch.until(NodeState.CLOSED)
    assert told.of(NodeChanged) == watch


# ----------------------------------------------------------------------------------------------------------- observers


async def test_an_observer_that_raises_is_logged_once_and_breaks_nothing(
    author: None, sessions: Sessions, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise LookupError(event)

    cache.observe(broken)
    after = Told(cache)
    for _ in range(3):
        assert await name_of(sessions) == "Ann"
        await rename(sessions, "Ann")
        await cache.drain()
    after.check()
    assert len(after) > 3, "who comes after it is called all the same"
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "broken" in record.message
    assert record.exc_info


async def test_who_listens_no_more_is_told_no_more(author: None, sessions: Sessions, cache: Cache) -> None:
    heard: list[Event] = []
    for _ in range(2):
        cache.observe(heard.append)
    await name_of(sessions)
    await cache.drain()
    assert heard.count(Missed(Author, 1)) == 1, "who is there twice is told once"
    cache.unobserve(heard.append)
    count = len(heard)
    await name_of(sessions)
    assert len(heard) == count


async def test_when_nobody_listens_no_event_is_made_and_no_clock_is_read(
    author: None, sessions: Sessions, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Telemetry, "tell", fail)
    monkeypatch.setattr("asynccache.telemetry.time", None)
    for _ in range(2):
        assert await name_of(sessions) == "Ann"
        await cache.drain()
    await rename(sessions, "Eve")
    with failing(cache):
        await rename(sessions, "Ann")
    await cache.drain()
    assert (cache.stats.hits, cache.stats.repairs) == (2, 1)


def test_events_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Missed(Author, 1).rows = 2  # type: ignore[misc]
    assert not hasattr(Missed(Author, 1), "__dict__")
