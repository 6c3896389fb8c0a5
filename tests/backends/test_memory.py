"""What the memory backend does beyond the contract: it is bounded."""

from __future__ import annotations

import pytest

from asynccache import Change, ConfigurationError, Key, MemoryBackend, Transition, Write

pytestmark = pytest.mark.without_sqlalchemy


def put(*, ttl_s: float = 60, pinned: bool = False) -> Transition:
    return lambda _: Write(b"value", ttl_s, pinned)


def key(number: int) -> Key:
    return Key(b"%d" % number, 0)


async def test_the_least_recently_read_entity_makes_room() -> None:
    backend = MemoryBackend(entries_max=2)
    await backend.apply([Change(key(1), put()), Change(key(2), put())])
    await backend.get_many([key(1)])
    await backend.apply([Change(key(3), put())])
    assert await backend.get_many([key(1), key(2), key(3)]) == [b"value", None, b"value"]
    assert len(backend) == 2


async def test_locks_and_generations_never_make_room() -> None:
    backend = MemoryBackend(entries_max=2)
    await backend.apply([Change(key(0), put(pinned=True))])
    await backend.apply([Change(key(number), put()) for number in range(1, 100)])
    assert await backend.get_many([key(0)]) == [b"value"]


async def test_a_slot_is_kept_once_whether_pinned_or_not() -> None:
    backend = MemoryBackend()
    for pinned in (False, True, False):
        await backend.apply([Change(key(1), put(pinned=pinned))])
        assert len(backend) == 1


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_slot_expires_by_the_clock(pinned: bool) -> None:
    now_s = 0.0
    backend = MemoryBackend(clock=lambda: now_s)
    await backend.apply([Change(key(1), put(ttl_s=10, pinned=pinned))])
    now_s = 9.9
    assert await backend.get_many([key(1)]) == [b"value"]
    now_s = 10.0
    assert await backend.get_many([key(1)]) == [None]
    assert len(backend) == 0


def test_a_bound_must_make_sense() -> None:
    with pytest.raises(ConfigurationError, match="entries_max must be at least 1, not 0"):
        MemoryBackend(entries_max=0)
