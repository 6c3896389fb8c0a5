"""`Cache.inspect`: what lies under a row's key, in words."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime
from uuid import UUID

import pytest
from sqlalchemy import Dialect, LargeBinary
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from asynccache import (
    AsyncCachedSession,
    Cache,
    Change,
    ConfigurationError,
    Inspection,
    Key,
    MemcachedBackend,
    NotRegisteredError,
    Write,
    protocol,
)
from asynccache.inspection import key_from_text
from asynccache.protocol import Kind, Lease
from asynccache.testing import failing
from tests.conftest import Sessions, Statements
from tests.models import Author, Currency, Secret, Stock
from tests.servers import Memcached
from tests.session.conftest import on_both
from tests.session.slots import name_of

decrypted: list[str] = []


class Encrypted(TypeDecorator[str]):
    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:  # noqa: ARG002
        return value.encode()[::-1] if value is not None else None

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        if value is None:
            return None
        decrypted.append(value.decode())
        return value[::-1].decode()


class Own(DeclarativeBase):
    pass


class Patient(Own):
    __tablename__ = "patient"

    id: Mapped[int] = mapped_column(primary_key=True)
    born: Mapped[datetime]
    diagnosis: Mapped[str] = mapped_column(Encrypted)


@pytest.fixture
async def ann(sessions: Sessions, cache: Cache) -> None:
    """Author 1 is in the cache."""
    async with sessions.begin() as session:
        session.add(Author(id=1, name="Ann"))
    await cache.drain()
    assert await name_of(sessions) == "Ann"
    await cache.drain()


async def look(cache: Cache, id_: int = 1) -> Inspection:
    (found,) = await cache.inspect(Author, id_)
    return found


@on_both
async def test_a_row_that_is_served_is_shown_with_its_columns(
    ann: None, cache: Cache, engine: AsyncEngine, statements: Statements
) -> None:
    found = await look(cache)
    assert found.served
    assert found.columns == {"id": 1, "name": "Ann"}
    assert (found.model, found.primary_key, found.verdict) == (Author, (1,), "the row")
    assert (found.row.kind, found.generation.kind) == ("value", "value")
    assert found.row.nonce == found.generation.nonce
    assert found.row.key.endswith(":author:1")
    assert found.database == cache.scope_of(engine.sync_engine).name  # type: ignore[union-attr]
    assert (len(found.schema or ""), found.schema_known) == (16, True)
    assert statements == []
    assert (cache.stats.hits, cache.stats.misses) == (0, 1), "to look is not to read: the miss is the fixture's"


@on_both
async def test_what_is_encrypted_is_shown_encrypted(sessions: Sessions, cache: Cache, engine: AsyncEngine) -> None:
    cache.register(Patient)
    async with engine.begin() as connection:
        await connection.run_sync(Own.metadata.create_all)
    born = datetime(2001, 2, 3, 4, 5, 6)  # noqa: DTZ001
    async with sessions.begin() as session:
        session.add(Patient(id=1, born=born, diagnosis="flu"))
    await cache.drain()
    async with sessions() as session:
        assert await session.get(Patient, 1)
    await cache.drain()
    decrypted.clear()
    (found,) = await cache.inspect(Patient, 1)
    assert found.served
    assert found.columns == {"id": 1, "born": born, "diagnosis": b"ulf"}
    assert decrypted == []


async def test_what_is_not_there_and_what_does_not_exist(sessions: Sessions, cache: Cache, engine: AsyncEngine) -> None:
    (found,) = await cache.inspect(Author, 1, scope=engine)
    assert (found.row.found, found.generation.found, found.served) == ("absent", "absent", False)
    assert found.verdict == "there is no generation: one is made, and the row is loaded and stored"
    assert await name_of(sessions) is None
    await cache.drain()
    found = await look(cache)
    assert (found.row.found, found.verdict, found.served) == ("that there is no such row", "there is no such row", True)
    assert (found.columns, found.schema) == (None, None)
    await cache.invalidate_all(Author)
    assert (await look(cache)).verdict == (
        "what is stored was invalidated with its generation: the row is loaded and stored"
    )


NONCE, DEADLINE_MS = b"n" * protocol.ID_BYTES, 4_102_444_800_000


def locked(*deadlines_ms: int) -> bytes:
    slot: bytes | None = None
    for i, deadline_ms in enumerate(deadlines_ms):
        owner = bytes([i]) * protocol.ID_BYTES
        write = protocol.lock(owner, deadline_ms - 2000, 1000)(slot)
        assert write is not None
        slot = write.value
    assert slot is not None
    return slot


@pytest.mark.parametrize(
    ("bytes_", "kind", "found", "verdict"),
    [
        (Lease(NONCE, NONCE).encoded(), "lease", "leased: a reader", "loaded and stored"),
        (locked(DEADLINE_MS), "locked", "locked by 1 commit, until 2100-01-01 00:00:00 UTC", "a commit is under way"),
        (
            locked(DEADLINE_MS, DEADLINE_MS + 1000),
            "locked",
            "locked by 2 commits, until 2100-01-01 00:00:01",
            "a commit",
        ),
        (b"\xacH", "hold", "on hold after a commit", "a commit is under way"),
        (b"\xacF", "free", "free:", "nothing is stored"),
        (b"\xac~later", "unknown", "of a kind that this version does not know", "a commit is under way"),
        (b"<html>", "foreign", "bytes that are not this library's", "nothing is stored"),
        (b"\xacVshort", "foreign", "bytes that are not this library's", "nothing is stored"),
    ],
)
async def test_each_state_of_a_slot_has_its_words(
    bytes_: bytes, kind: str, found: str, verdict: str, ann: None, cache: Cache
) -> None:
    await put(cache, (await look(cache)).row.key, lambda _: bytes_)
    inspection = await look(cache)
    assert (inspection.row.kind, inspection.served, inspection.columns) == (kind, False, None)
    assert inspection.row.found.startswith(found)
    assert verdict in inspection.verdict
    assert inspection.row.size_bytes == len(bytes_)
    if kind == "locked":
        assert inspection.row.locked_until[0] == datetime(2100, 1, 1, tzinfo=UTC)


async def put(cache: Cache, key: str, make: Callable[[bytes], bytes]) -> None:
    """Whatever the slot holds becomes what is made of it."""
    slot = Key(key.encode(), 0)

    def transition(found: bytes | None) -> Write:
        assert found is not None
        return Write(make(found), 60)

    await cache._store.backend.apply([Change(slot, transition)])


async def test_a_lease_and_a_lock_as_they_come(ann: None, sessions: Sessions, cache: Cache) -> None:
    before_s = time.time()
    async with sessions() as session:
        (await session.get_one(Author, 1)).name = "Eve"
        await session.flush()
        transaction = session.sync_session.cached_transaction  # type: ignore[attr-defined]
        await session.run_sync(lambda _: transaction.before_commit())
        found = await look(cache)
        await session.rollback()
    assert found.row.kind == "locked"
    (until,) = found.row.locked_until
    assert 15 < until.timestamp() - before_s < 60, "twice lock_ttl from now"
    await cache.drain()
    assert (await look(cache)).row.kind == "free"


@pytest.mark.parametrize("damage", ["other columns", "damaged"])
async def test_a_row_that_cannot_be_read_says_why(damage: str, ann: None, cache: Cache) -> None:
    def make(found: bytes) -> bytes:
        head = 2 + protocol.ID_BYTES
        return found[:-2] if damage == "damaged" else found[:head] + bytes(8) + found[head + 8 :]

    await put(cache, (await look(cache)).row.key, make)
    found = await look(cache)
    assert (found.served, found.columns, found.schema_known) == (False, None, damage == "damaged")
    assert found.verdict.startswith(
        "a damaged row of Author: it counts as not there"
        if damage == "damaged"
        else "a row of Author that was stored with other columns: it counts as not there"
    )


async def test_a_server_that_does_not_answer(ann: None, cache: Cache) -> None:
    with failing(cache):
        found = await look(cache)
    assert (found.row.kind, found.generation.kind, found.served) == ("unreadable", "unreadable", False)


async def test_composite_keys_are_found(sessions: Sessions, cache: Cache) -> None:
    async with sessions.begin() as session:
        session.add(Stock(shop=1, isbn="978-3", copies=4))
    await cache.drain()
    async with sessions() as session:
        await session.get(Stock, (1, "978-3"))
    await cache.drain()
    for key in ((1, "978-3"), {"isbn": "978-3", "shop": 1}, key_from_text(Stock, ["1", "978-3"])):
        (found,) = await cache.inspect(Stock, key)
        assert found.columns == {"shop": 1, "isbn": "978-3", "copies": 4}


async def test_the_node_that_holds_it_is_named(
    sessions: Sessions, engine: AsyncEngine, memcached_server: Memcached
) -> None:
    with Memcached() as other:
        nodes = [f"{server.host}:{server.port}" for server in (memcached_server, other)]
        async with Cache(MemcachedBackend(nodes, timeout_s=5)) as cache:
            cache.register(Author)
            ours = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
            for id_ in range(1, 20):
                assert await name_of(ours, id_) is None
            await cache.drain()
            found = [await look(cache, id_) for id_ in range(1, 20)]
            assert {each.node for each in found} == set(nodes)
            memcached_server.flush()
            gone = [each for each in found if not (await look(cache, *each.primary_key)).served]
            assert {each.node for each in gone} == {nodes[0]}


async def test_what_cannot_be_inspected_is_named(sessions: Sessions, cache: Cache, ann: None) -> None:
    with pytest.raises(NotRegisteredError, match="Secret is not cached"):
        await cache.inspect(Secret, 1)
    with pytest.raises(
        ConfigurationError, match=r"no row is cached under '1'; the primary key has exactly: id Integer"
    ):
        await cache.inspect(Author, "1")


class Mixed(Own):
    """A primary key of everything that can be one."""

    __tablename__ = "mixed"

    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    token: Mapped[UUID] = mapped_column(primary_key=True)
    raw: Mapped[bytes] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    moment: Mapped[datetime] = mapped_column(primary_key=True)
    currency: Mapped[Currency] = mapped_column(primary_key=True)


TYPED = ["7", "7", "00000000-0000-0000-0000-000000000007", "ff07", "2024-05-06", "2024-05-06T07:08:09", "POUND"]
MEANT = (7, "7", UUID(int=7), b"\xff\x07", date(2024, 5, 6), datetime(2024, 5, 6, 7, 8, 9), Currency.POUND)  # noqa: DTZ001


def test_a_key_that_was_typed_becomes_what_its_columns_hold() -> None:
    assert key_from_text(Mixed, TYPED) == MEANT
    assert key_from_text(Mixed, ["7"]) == ("7",), "too few: who is asked for it says so"


@pytest.mark.parametrize("position", [0, 2, 3, 4, 5, 6])
def test_what_is_no_value_of_a_column_is_named(position: int) -> None:
    typed = [*TYPED[:position], "x", *TYPED[position + 1 :]]
    name = Mixed.__mapper__.primary_key[position].key
    with pytest.raises(ConfigurationError, match=f"'x' is no .*, as the primary key's {name} is"):
        key_from_text(Mixed, typed)


def test_every_state_has_a_word() -> None:
    kinds = {protocol.kind_of(slot) for slot in (None, b"", b"\xacF", b"\xacH", b"\xac~", locked(DEADLINE_MS))}
    kinds |= {protocol.kind_of(Lease(NONCE, NONCE).encoded()), protocol.kind_of(protocol.opened(NONCE))}
    assert kinds == set(Kind)


@pytest.fixture(autouse=True)
async def _nothing_is_left_running(cache: Cache) -> AsyncIterator[None]:
    yield
    await cache.drain()
