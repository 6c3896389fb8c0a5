"""What the memory backend does beyond the contract: it is bounded, by a policy that stands a scan."""

from __future__ import annotations

import asyncio
import sys
import time
import tracemalloc
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynccache import Cache, Change, ConfigurationError, Key, MemoryBackend, Transition, Write
from asynccache.backends._s3fifo import ENTRY_BYTES, HOPS_MAX, SWEPT_PER_WRITE, S3Fifo

pytestmark = pytest.mark.without_sqlalchemy


def put(value: bytes = b"value", *, ttl_s: float = 60, pinned: bool = False) -> Transition:
    return lambda _: Write(value, ttl_s, pinned)


def key(number: int) -> Key:
    return Key(b"%d" % number, 0)


async def write(backend: MemoryBackend, numbers: Iterable[int], transition: Transition | None = None) -> None:
    """Each by itself, as sessions do."""
    for number in numbers:
        await backend.apply([Change(key(number), transition or put())])


async def read_through(backend: MemoryBackend, numbers: Iterable[int]) -> None:
    """As the read path does it: what is not there is leased, loaded, looked after, and stored."""
    for number in numbers:
        if await backend.get_many([key(number)]) == [None]:
            await write(backend, [number], put(b"lease"))
            await backend.get_many([key(number)])
            await write(backend, [number])


async def kept(backend: MemoryBackend, numbers: Iterable[int]) -> list[int]:
    asked = list(numbers)
    found = await backend.get_many([key(number) for number in asked])
    return [number for number, value in zip(asked, found, strict=True) if value is not None]


def check_accounts(slots: S3Fifo) -> None:
    """Count everything again, going along the queues in both directions."""
    entries, sizes = [0, 0, 0], [0, 0, 0]
    seen: set[int] = set()
    for queue in range(3):
        entry, before = slots._next[queue], queue
        while entry != queue:
            assert slots._previous[entry] == before
            assert slots._queues[entry] == queue
            assert slots._index[slots._names[entry]] == entry
            entries[queue] += 1
            sizes[queue] += ENTRY_BYTES + len(slots._names[entry]) + len(slots._values[entry])
            seen.add(entry)
            entry, before = slots._next[entry], entry
        assert slots._previous[queue] == before
    assert (slots._entries_in, slots._bytes_in) == (entries, sizes)
    assert seen == set(slots._index.values())
    assert seen | set(slots._unused) | {0, 1, 2} == set(range(len(slots._names)))
    assert len(seen) + len(slots._unused) + 3 == len(slots._names)
    assert not any(slots._names[unused] or slots._values[unused] for unused in slots._unused)
    assert slots._ghosts <= set(slots._ghosts_by_age)
    assert len(slots._ghosts_by_age) <= slots.entries_max + 1


# Any history at all

KEYS = st.integers(0, 12)
SIZES = st.sampled_from([0, 100, 1000, 2000, 2300, 2500])
PUTS = st.tuples(st.just("put"), KEYS, SIZES, st.sampled_from([1.0, 5.0, 100.0]), st.booleans())
READS = st.tuples(st.just("read"), st.lists(KEYS, max_size=4))
LOOKS = st.tuples(st.just("leave"), KEYS)
WAITS = st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 200.0]))
HISTORIES = st.lists(st.one_of(PUTS, PUTS, PUTS, READS, LOOKS, WAITS), min_size=20, max_size=60)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 9), HISTORIES)
async def test_whatever_happens_it_serves_what_was_written_last_within_its_bounds(
    entries_max: int, history: list[Any]
) -> None:
    now_s = 0.0
    backend = MemoryBackend(entries_max=entries_max, bytes_max=6000, value_bytes_max=2400, clock=lambda: now_s)
    written: dict[int, tuple[bytes, float]] = {}
    newcomers = 0

    def expected(number: int) -> bytes | None:
        value, expires_s = written.get(number, (None, 0.0))
        return value if expires_s > now_s else None

    for step, (operation, *arguments) in enumerate(history):
        before = backend.stats
        match operation, arguments:
            case "put", (number, size, ttl_s, pinned):
                value = b"%d " % step + b"x" * size
                present = backend._slots._index.keys()
                was_there = key(number).name in present and backend.get_many_now([key(number)]) != [None]
                (applied,) = await backend.apply([Change(key(number), put(value, ttl_s=ttl_s, pinned=pinned))])
                assert applied.before in (None, expected(number))
                if len(value) > 2400:
                    assert applied.after == applied.before
                    assert backend.stats.refusals == before.refusals + 1
                else:
                    written[number] = value, now_s + ttl_s
                    newcomers += not was_there
            case "read", (numbers,):
                found = backend.get_many_now([key(number) for number in numbers])
                assert all(value in (None, expected(number)) for number, value in zip(numbers, found, strict=True))
            case "leave", (number,):
                await backend.apply([Change(key(number), lambda _: None)])
            case _:
                now_s += arguments[0]
        check_accounts(backend._slots)
        after = backend.stats
        assert len(backend) == after.entries <= entries_max
        assert after.bytes_used <= 6000
        assert after.entries == newcomers - after.evictions - after.expirations
        if after.pinned_evictions > before.pinned_evictions:
            assert after.pinned == after.entries, "a lock was evicted while there were entities"
        if not after.evictions:  # then nothing else takes a slot away than its ttl
            assert all(backend.get_many_now([key(number)]) == [expected(number)] for number in written)


# Eviction


async def test_what_was_not_read_makes_room() -> None:
    backend = MemoryBackend(entries_max=2)
    await write(backend, [1, 2])
    await backend.get_many([key(1)])
    await write(backend, [3])
    assert await kept(backend, [1, 2, 3]) == [1, 3]
    assert backend.stats.evictions == 1


async def test_a_scan_does_not_drive_out_what_is_read_again_and_again() -> None:
    backend = MemoryBackend(entries_max=100)
    hot = range(60)
    for _ in range(3):
        await read_through(backend, hot)
    await read_through(backend, range(1000, 11_000))
    assert await kept(backend, hot) == list(hot)
    assert len(backend) == 100
    check_accounts(backend._slots)


async def test_a_change_of_mind_is_followed() -> None:
    """What was read often once is not kept for ever, as counting alone would have it."""
    backend = MemoryBackend(entries_max=100)
    for _ in range(50):
        await read_through(backend, range(80))
    for _ in range(20):
        await read_through(backend, range(100, 180))
    assert len(await kept(backend, range(100, 180))) == 80


async def test_what_was_evicted_too_early_is_known_again_when_it_comes_back() -> None:
    """A loop over a little more than there is room for, where evicting the least recently read hits nothing."""
    backend = MemoryBackend(entries_max=100)
    for _ in range(10):
        await read_through(backend, range(120))
    assert len(await kept(backend, range(120))) > 50
    before = backend.stats.evictions
    await read_through(backend, range(120))
    assert backend.stats.evictions - before < 90


@pytest.mark.parametrize("away", ["commit", "ttl"])
async def test_a_row_that_is_read_often_keeps_its_rank_when(away: str) -> None:
    now_s = 0.0
    backend = MemoryBackend(entries_max=100, clock=lambda: now_s)
    await read_through(backend, [1, 1])
    await write(backend, range(1000, 1200))
    if away == "commit":
        await write(backend, [1], put(b"lock", pinned=True))
        await write(backend, [1], put(b"free"))
    else:
        await write(backend, [1], put(ttl_s=1))
        now_s = 1.0
        assert await kept(backend, [1]) == []
    await write(backend, [1])
    await write(backend, range(2000, 2200))
    assert await kept(backend, [1]) == [1]


async def test_bytes_are_bounded_as_entries_are() -> None:
    backend = MemoryBackend(bytes_max=100_000)
    await write(backend, range(100), put(b"x" * 1000))
    size = 100_000 // (ENTRY_BYTES + 2 + 1000)
    assert len(backend) == size
    assert backend.stats.bytes_used <= 100_000
    await write(backend, [200], put(b"x" * 90_000))
    assert await kept(backend, [200]) == [200]
    assert backend.stats.bytes_used <= 100_000
    assert backend.stats.evictions > size


async def test_a_value_that_grows_in_its_place_has_others_make_room() -> None:
    backend = MemoryBackend(bytes_max=10_000)
    await write(backend, range(5), put(b"x" * 1000))
    await backend.get_many([key(4)])
    await write(backend, [4], put(b"x" * 9000))
    assert await kept(backend, range(5)) == [4]


@pytest.mark.parametrize(("bounds", "size"), [({"value_bytes_max": 10}, 11), ({"bytes_max": 5000}, 4700)])
async def test_a_value_that_is_too_large_is_refused_and_counted(bounds: dict[str, Any], size: int) -> None:
    backend = MemoryBackend(**bounds)
    await write(backend, [1])
    (applied,) = await backend.apply([Change(key(1), put(b"x" * size))])
    assert (applied.before, applied.after) == (b"value", b"value")
    assert (backend.stats.refusals, backend.stats.evictions) == (1, 0)


# Locks and generations


async def test_locks_and_generations_never_make_room_for_rows() -> None:
    backend = MemoryBackend(entries_max=2)
    await write(backend, [0], put(pinned=True))
    await write(backend, range(1, 100))
    assert await kept(backend, [0]) == [0]
    assert backend.stats.pinned_evictions == 0


async def test_rows_make_room_for_locks_however_often_they_are_read() -> None:
    backend = MemoryBackend(entries_max=4)
    await read_through(backend, [1, 1, 1, 2, 2, 2])
    await write(backend, range(10, 14), put(pinned=True))
    assert await kept(backend, [1, 2, 10, 11, 12, 13]) == [10, 11, 12, 13]
    assert (backend.stats.evictions, backend.stats.pinned_evictions) == (2, 0)


async def test_where_only_locks_and_generations_are_left_the_oldest_goes_and_is_counted() -> None:
    backend = MemoryBackend(entries_max=3)
    await write(backend, [1, 2, 3, 1], put(pinned=True))
    await backend.get_many([key(2)])  # which is no reason
    await write(backend, [4], put(pinned=True))
    assert await kept(backend, [1, 2, 3, 4]) == [1, 3, 4]
    assert backend.stats.pinned_evictions == 1


async def test_where_only_locks_and_generations_are_left_no_row_is_kept() -> None:
    backend = MemoryBackend(entries_max=3)
    await write(backend, [1, 2, 3], put(pinned=True))
    await write(backend, [4])
    assert await kept(backend, [1, 2, 3, 4]) == [1, 2, 3]
    assert (backend.stats.evictions, backend.stats.pinned_evictions) == (1, 0)


async def test_a_slot_is_kept_once_whether_pinned_or_not() -> None:
    backend = MemoryBackend()
    for pinned in (False, True, False):
        await write(backend, [1], put(pinned=pinned))
        assert (len(backend), backend.stats.pinned) == (1, pinned)


# Expiry


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_slot_expires_by_the_clock(pinned: bool) -> None:
    now_s = 0.0
    backend = MemoryBackend(clock=lambda: now_s)
    await write(backend, [1], put(ttl_s=10, pinned=pinned))
    now_s = 9.9
    assert await backend.get_many([key(1)]) == [b"value"]
    now_s = 10.0
    assert await backend.get_many([key(1)]) == [None]
    assert (len(backend), backend.stats.expirations) == (0, 1)


@pytest.mark.parametrize("pinned", [False, True])
async def test_what_has_expired_goes_though_nobody_reads_it(pinned: bool) -> None:
    now_s = 0.0
    backend = MemoryBackend(clock=lambda: now_s)
    await write(backend, range(1000), put(ttl_s=10, pinned=pinned))
    now_s = 10.0
    writes = 1000 // SWEPT_PER_WRITE + 100
    await write(backend, range(5000, 5000 + writes))
    assert (len(backend), backend.stats.expirations) == (writes, 1000)


async def test_expired_slots_are_few_while_writes_go_on() -> None:
    now_s = 0.0
    backend = MemoryBackend(clock=lambda: now_s)
    for number in range(10_000):
        await write(backend, [number], put(ttl_s=1000))
        now_s += 1
    assert len(backend) < 1250


# What it costs


class Counted(S3Fifo):
    moves = 0

    def _link(self, entry: int, queue: int) -> None:
        self.moves += 1
        super()._link(entry, queue)


def test_one_write_moves_few_entries_though_all_of_them_were_read() -> None:
    slots = Counted(1000, 1 << 30)
    for number in range(1000):
        slots.put(b"%d" % number, b"", 1.0, pinned=False, now_s=0)
    for number in range(1000, 1050):
        slots.get_many([key(each) for each in range(number)] * 3, 0)
        slots.moves = 0
        slots.put(b"%d" % number, b"", 1.0, pinned=False, now_s=0)
        assert slots.moves <= 1 + HOPS_MAX
    assert len(slots) == 1000


@pytest.mark.timeout(180)  # three seconds on a machine that has nothing else to do
def test_a_million_entries_cost_as_much_each_as_a_thousand() -> None:
    def fill(slots: S3Fifo, numbers: range) -> float:
        names = [b"a:key:of:usual:length:%d" % number for number in numbers]
        began_s = time.process_time()
        for name in names:
            slots.put(name, b"value", 60.0, pinned=False, now_s=0)
        return (time.process_time() - began_s) / len(names)

    few, many = S3Fifo(1000, 1 << 40), S3Fifo(1_000_000, 1 << 40)
    fill(few, range(1000))
    fill(many, range(1_000_000))
    rounds = [(fill(few, round_), fill(many, round_)) for round_ in map(_fresh_numbers, range(5))]
    assert (len(few), len(many)) == (1000, 1_000_000)
    assert (few.evictions, many.evictions) == (5000, 5000)
    # What is not in the processor's caches takes it two or three times as long. Looking at a million takes a thousand.
    assert min(of_many for _, of_many in rounds) < 20 * min(of_few for of_few, _ in rounds)


def _fresh_numbers(round_: int) -> range:
    return range(2_000_000 + 1000 * round_, 2_000_000 + 1000 * (round_ + 1))


def test_memory_is_counted_as_the_process_takes_it() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        slots = S3Fifo(10_000, 1 << 40)
        for number in range(25_000):  # so that there are as many ghosts as entries
            slots.put(b"%40d" % number, b"%140d" % number, 60.0, pinned=False, now_s=0)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.7 * slots.bytes_used < used < slots.bytes_used
    assert used / 10_000 < 140 + 500


# Threads


@contextmanager
def threads_that_take_turns_often() -> Generator[None]:
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)


def test_event_loops_of_many_threads_share_one_and_lose_nothing() -> None:
    backend = MemoryBackend(entries_max=6)

    async def work(letter: bytes) -> None:
        for number in range(1500):
            await backend.apply([Change(key(0), lambda found: Write((found or b"") + letter, 60, pinned=True))])
            await write(backend, [number % 16 + 1], put(b"%d" % (number % 16 + 1)))
            asked = [key(each % 16 + 1) for each in range(number, number + 4)]
            found = backend.get_many_now(asked)
            assert all(value in (None, each.name) for each, value in zip(asked, found, strict=True))

    with threads_that_take_turns_often(), ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(asyncio.run, work(letter)) for letter in (b"a", b"b", b"c", b"d")]:
            future.result()
    (value,) = backend.get_many_now([key(0)])
    assert value is not None
    assert sorted(value) == sorted(b"abcd" * 1500)
    check_accounts(backend._slots)


# Settings, and what is told


async def test_its_bounds_can_stand_in_the_url() -> None:
    url = "memory://?entries_max=7&bytes_max=50000&value_bytes_max=300"
    stats = MemoryBackend.from_url(url).stats
    assert (stats.entries_max, stats.bytes_max, stats.value_bytes_max) == (7, 50_000, 300)
    assert MemoryBackend.from_url("memory://").stats == MemoryBackend().stats
    async with Cache(url) as cache:
        (report,) = await cache.check()
    assert (report.memory_max_bytes, report.item_size_max_bytes) == (50_000, 300)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("entries_max=0", "entries_max must be at least 1, not 0"),
        ("entries_max=many", "entries_max must be a whole number, not 'many'"),
        ("bytes_max=128MiB", "bytes_max must be a whole number, not '128MiB'"),
        ("entries=5", "parameter 'entries' is not one of entries_max, bytes_max, value_bytes_max"),
        ("bytes_max=5000&bytes_max=5000", "parameter 'bytes_max' .* is there twice"),
        ("entries_max", "bad query field"),
    ],
)
def test_a_url_that_makes_no_sense(query: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"bad memory URL .*{reason}.*Give memory://\?entries_max=") as caught:
        Cache(f"memory://?{query}")
    assert repr(f"memory://?{query}") in str(caught.value)


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ({"entries_max": 0}, "entries_max must be at least 1, not 0"),
        ({"bytes_max": 4095}, "bytes_max must be at least 4096, not 4095"),
        ({"value_bytes_max": 0}, "value_bytes_max must be at least 1, not 0"),
    ],
)
def test_a_bound_must_make_sense(bounds: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        MemoryBackend(**bounds)


async def test_a_check_tells_of_locks_that_were_evicted() -> None:
    backend = MemoryBackend(entries_max=2)
    await write(backend, [1, 2], put(pinned=True))
    (report,) = await backend.check(lock_ttl_s=10)
    assert report.locks_protected
    await write(backend, [3], put(pinned=True))
    (report,) = await backend.check(lock_ttl_s=10)
    assert report.locks_protected is False
    assert report.evictions == 1
    (finding,) = [finding for finding in report.findings if finding.topic == "locks"]
    assert finding.found.startswith("1 locks or generations were evicted")
    assert finding.way_out.startswith("raise entries_max")


async def test_closing_empties_it() -> None:
    backend = MemoryBackend()
    await write(backend, [1])
    await backend.aclose()
    assert (len(backend), backend.stats.bytes_used) == (0, 0)
