"""What every backend must do. A backend of one's own joins by a line in `backend`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from asynccache import Applied, Backend, Change, Key, MemcachedBackend, MemoryBackend, Transition, Write
from tests.servers import Memcached

pytestmark = pytest.mark.without_sqlalchemy


@pytest.fixture(params=["memory", "memcached", "two memcached"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    backend: Backend
    if request.param == "memory":
        backend = MemoryBackend()
    else:
        server: Memcached = request.getfixturevalue("memcached_server")
        nodes = 2 if request.param == "two memcached" else 1
        backend = MemcachedBackend([f"{server.host}:{server.port}"] * nodes)
    yield backend
    await backend.aclose()


A, B, C = (Key(name, route) for route, name in enumerate((b"a", b"b", b"c")))


def put(value: bytes, ttl_s: float = 60) -> Transition:
    return lambda _: Write(value, ttl_s)


def leave(found: bytes | None) -> None:
    return None


def append(value: bytes) -> Transition:
    return lambda found: Write((found or b"") + value, 60)


async def test_what_was_never_written_is_absent(backend: Backend) -> None:
    assert await backend.get_many([A, B]) == [None, None]


async def test_nothing_is_asked_for(backend: Backend) -> None:
    assert await backend.get_many([]) == []
    assert await backend.apply([]) == []


async def test_a_transition_sees_what_is_there_and_replaces_it(backend: Backend) -> None:
    assert await backend.apply([Change(A, append(b"1"))]) == [Applied(None, b"1")]
    assert await backend.apply([Change(A, append(b"2"))]) == [Applied(b"1", b"12")]
    assert await backend.get_many([A]) == [b"12"]


async def test_a_transition_may_leave_what_is_there(backend: Backend) -> None:
    assert await backend.apply([Change(A, leave)]) == [Applied(None, None)]
    await backend.apply([Change(A, put(b"1"))])
    assert await backend.apply([Change(A, leave)]) == [Applied(b"1", b"1")]
    assert await backend.get_many([A]) == [b"1"]


async def test_answers_come_in_the_order_of_the_keys(backend: Backend) -> None:
    await backend.apply([Change(C, put(b"3")), Change(A, put(b"1"))])
    assert await backend.get_many([A, B, C, A]) == [b"1", None, b"3", b"1"]
    assert await backend.apply([Change(C, leave), Change(B, put(b"2")), Change(A, leave)]) == [
        Applied(b"3", b"3"),
        Applied(None, b"2"),
        Applied(b"1", b"1"),
    ]


async def test_two_changes_of_one_slot_follow_each_other(backend: Backend) -> None:
    assert await backend.apply([Change(A, append(b"1")), Change(B, leave), Change(A, append(b"2"))]) == [
        Applied(None, b"1"),
        Applied(None, None),
        Applied(b"1", b"12"),
    ]


@pytest.mark.parametrize("there", [None, b"1"])
async def test_a_wrong_hint_that_a_slot_is_absent_changes_nothing(backend: Backend, there: bytes | None) -> None:
    if there is not None:
        await backend.apply([Change(A, put(there))])
    assert await backend.apply([Change(A, append(b"2"), absent=True)]) == [Applied(there, (there or b"") + b"2")]


async def test_no_change_is_lost_among_many(backend: Backend) -> None:
    letters = [bytes([letter]) for letter in b"abcdefghijklmnop"]
    await asyncio.gather(*(backend.apply([Change(A, append(letter)), Change(B, append(letter))]) for letter in letters))
    for value in await backend.get_many([A, B]):
        assert value is not None
        assert sorted(value) == sorted(b"".join(letters))


async def test_any_bytes_are_kept_as_they_are(backend: Backend) -> None:
    values = [b"", b"\r\nEND\r\n", b"VALUE a 0 1 1\r\nx\r\nEND\r\n", bytes(range(256)), b"x" * 1_000_000]
    before = None
    for value in values:
        assert await backend.apply([Change(A, put(value))]) == [Applied(before, value)]
        assert await backend.get_many([A]) == [value]
        before = value


async def test_a_value_that_is_too_large_is_refused_and_the_slot_stays(backend: Backend) -> None:
    await backend.apply([Change(A, put(b"1"))])
    too_large = b"x" * ((1 << 20) + 1)
    assert await backend.apply([Change(A, put(too_large)), Change(B, put(b"2"))]) == [
        Applied(b"1", b"1"),
        Applied(None, b"2"),
    ]
    assert await backend.get_many([A, B]) == [b"1", b"2"]


async def test_a_value_lives_at_least_its_ttl_and_not_for_ever(backend: Backend) -> None:
    await backend.apply([Change(A, put(b"short", ttl_s=0.1)), Change(B, put(b"long", ttl_s=40 * 86400))])
    async with asyncio.timeout(10):
        while (await backend.get_many([A]))[0] is not None:
            await asyncio.sleep(0.05)
    assert await backend.get_many([A, B]) == [None, b"long"]


async def test_an_expired_slot_is_absent_to_a_transition(backend: Backend) -> None:
    await backend.apply([Change(A, put(b"short", ttl_s=0.1))])
    async with asyncio.timeout(10):
        while (await backend.apply([Change(A, leave)]))[0].before is not None:
            await asyncio.sleep(0.05)


async def test_many_keys_are_read_and_written_at_once(backend: Backend) -> None:
    keys = [Key(b"key-%d" % number, number % 7) for number in range(1_000)]
    await backend.apply([Change(key, put(key.name)) for key in keys])
    assert await backend.get_many(keys) == [key.name for key in keys]


async def test_closing_twice_is_no_matter(backend: Backend) -> None:
    await backend.get_many([A])
    await backend.aclose()
    await backend.aclose()


async def test_a_check_tells_that_slots_can_be_kept_there(backend: Backend) -> None:
    reports = await backend.check(lock_ttl_s=10)
    assert reports
    assert all(report.usable for report in reports)
