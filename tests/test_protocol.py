"""The transitions of a slot, one by one: what each replaces, and what it leaves alone."""

from __future__ import annotations

import pytest

from asynccache import protocol
from asynccache.backends.base import UNREADABLE, Transition, Write
from asynccache.protocol import Hit, Lease, Leased, Locked, NoGeneration, Vacant

pytestmark = pytest.mark.without_sqlalchemy

NONCE, OLD_NONCE, NEW_NONCE = b"nonce-------", b"old-nonce---", b"new-nonce---"
ME, OTHER = b"me----------", b"other-------"
NOW_MS, TTL_MS = 1_700_000_000_000, 10_000

LEASE = Lease(b"my-token----", NONCE)
OTHERS_LEASE = Lease(b"its-token---", NONCE)
OLD_LEASE = Lease(b"its-token---", OLD_NONCE)
RECORD = b"schema--body"


def written(transition: Transition, found: bytes | None) -> bytes | None:
    write = transition(found)
    return write.value if write is not None else None


def value(nonce: bytes, record: bytes = RECORD) -> bytes:
    filled = written(protocol.fill(Lease(LEASE.token, nonce), record, 1), Lease(LEASE.token, nonce).encoded())
    assert filled is not None
    return filled


def locked(*owners: bytes, at_ms: int = NOW_MS) -> bytes:
    slot: bytes | None = None
    for owner in owners:
        slot = written(protocol.lock(owner, at_ms, TTL_MS), slot)
    assert slot is not None
    return slot


OPEN = protocol.opened(NONCE)
VALUE, MISSING, OLD_VALUE = value(NONCE), value(NONCE, protocol.MISSING), value(OLD_NONCE)
FREE = written(protocol.give_back(LEASE), LEASE.encoded())
HOLD = written(protocol.unlock_entity(ME, NOW_MS, hold_off_s=2), locked(ME))
FROM_A_LATER_VERSION = b"\xac!something"
FOREIGN = b"hello"
GARBAGE = [b"", b"\xac", OPEN[:-1], LEASE.encoded()[:-1], locked(ME)[:-1], b"\xacL", FOREIGN]
ANYTHING = [None, OPEN, VALUE, MISSING, OLD_VALUE, FREE, HOLD, LEASE.encoded(), FROM_A_LATER_VERSION, *GARBAGE]


# --------------------------------------------------------------------------------------------------- what a reader sees


@pytest.mark.parametrize(
    ("entity", "generation", "verdict"),
    [
        (VALUE, OPEN, Hit(RECORD)),
        (MISSING, OPEN, Hit(protocol.MISSING)),
        (OLD_VALUE, OPEN, Vacant(NONCE)),
        (None, OPEN, Vacant(NONCE)),
        (FREE, OPEN, Vacant(NONCE)),
        (OLD_LEASE.encoded(), OPEN, Vacant(NONCE)),
        (OTHERS_LEASE.encoded(), OPEN, Leased()),
        (locked(OTHER), OPEN, Locked()),
        (HOLD, OPEN, Locked()),
        (UNREADABLE, OPEN, Locked()),
        (FROM_A_LATER_VERSION, OPEN, Locked()),
        *[(each, OPEN, Vacant(NONCE)) for each in GARBAGE],
        *[(VALUE, each, NoGeneration()) for each in [None, *GARBAGE]],
        *[(each, each, NoGeneration()) for each in GARBAGE],
        (VALUE, locked(OTHER), Locked()),
        (VALUE, UNREADABLE, Locked()),
        (VALUE, FROM_A_LATER_VERSION, Locked()),
    ],
)
def test_a_reader_judges_two_slots(entity: bytes, generation: bytes, verdict: protocol.Verdict) -> None:
    assert protocol.judge(entity, generation) == verdict


def test_two_slots_that_are_locked_alike_are_no_hit() -> None:
    assert protocol.judge(locked(ME), locked(ME)) == Locked()


def test_a_value_that_was_rejected_is_vacant_until_it_changes() -> None:
    assert protocol.judge(VALUE, OPEN, rejected=VALUE) == Vacant(NONCE)
    assert protocol.judge(MISSING, OPEN, rejected=VALUE) == Hit(protocol.MISSING)


# ------------------------------------------------------------------------------------------------------- reader's steps


@pytest.mark.parametrize("found", [None, *GARBAGE])
def test_a_generation_is_opened_where_there_is_none(found: bytes | None) -> None:
    assert written(protocol.open_generation(NEW_NONCE), found) == protocol.opened(NEW_NONCE)


@pytest.mark.parametrize("found", [OPEN, locked(OTHER), FROM_A_LATER_VERSION])
def test_a_generation_that_is_there_is_left_alone(found: bytes) -> None:
    assert protocol.open_generation(NEW_NONCE)(found) is None


@pytest.mark.parametrize("found", [None, FREE, OLD_VALUE, OLD_LEASE.encoded(), *GARBAGE])
def test_a_lease_is_taken_where_nothing_is_served(found: bytes | None) -> None:
    assert protocol.take_lease(LEASE, 3)(found) == Write(LEASE.encoded(), 3)


@pytest.mark.parametrize("found", [VALUE, MISSING, OTHERS_LEASE.encoded(), locked(OTHER), HOLD, FROM_A_LATER_VERSION])
def test_a_lease_takes_nothing_from_others(found: bytes) -> None:
    assert protocol.take_lease(LEASE, 3)(found) is None


def test_a_lease_replaces_the_very_value_that_was_rejected() -> None:
    assert written(protocol.take_lease(LEASE, 3, rejected=VALUE), VALUE) == LEASE.encoded()
    assert protocol.take_lease(LEASE, 3, rejected=VALUE)(value(NONCE, b"another")) is None


def test_a_fill_replaces_its_own_lease() -> None:
    assert protocol.fill(LEASE, RECORD, 300)(LEASE.encoded()) == Write(VALUE, 300)


@pytest.mark.parametrize(
    "found", [*[each for each in ANYTHING if each != LEASE.encoded()], OTHERS_LEASE.encoded(), locked(ME)]
)
def test_a_fill_replaces_nothing_else(found: bytes | None) -> None:
    assert protocol.fill(LEASE, RECORD, 300)(found) is None
    assert protocol.give_back(LEASE)(found) is None


@pytest.mark.parametrize("found", [VALUE, OLD_VALUE])
def test_what_is_out_of_date_is_discarded_whatever_its_generation(found: bytes) -> None:
    assert written(protocol.discard(RECORD), found) == FREE


@pytest.mark.parametrize("found", [each for each in ANYTHING if each not in (VALUE, OLD_VALUE)] + [locked(OTHER)])
def test_nothing_else_is_discarded(found: bytes | None) -> None:
    assert written(protocol.discard(RECORD), found) is None
    assert written(protocol.discard(b"another"), VALUE) is None


def test_a_lease_is_intact_as_long_as_nobody_touched_either_slot() -> None:
    assert LEASE.is_intact(LEASE.encoded(), OPEN)
    assert not LEASE.is_intact(LEASE.encoded(), protocol.opened(NEW_NONCE))
    assert not LEASE.is_intact(LEASE.encoded(), locked(OTHER))
    assert not LEASE.is_intact(LEASE.encoded(), None)
    assert not LEASE.is_intact(OTHERS_LEASE.encoded(), OPEN)
    assert not LEASE.is_intact(locked(OTHER), OPEN)
    assert not LEASE.is_intact(None, OPEN)


# ------------------------------------------------------------------------------------------------------- writer's steps


@pytest.mark.parametrize("found", ANYTHING)
def test_a_lock_destroys_whatever_it_finds(found: bytes | None) -> None:
    write = protocol.lock(ME, NOW_MS, TTL_MS)(found)
    assert write is not None
    assert protocol.owners_of(write.value) == {ME: NOW_MS + 2 * TTL_MS}
    assert (write.ttl_s, write.pinned) == (2 * TTL_MS / 1000, True)


def test_a_lock_has_many_owners_each_with_a_deadline() -> None:
    slot = written(protocol.lock(OTHER, NOW_MS + 500, TTL_MS), locked(ME))
    assert protocol.owners_of(slot) == {ME: NOW_MS + 20_000, OTHER: NOW_MS + 20_500}


def test_a_lock_that_is_placed_again_is_renewed() -> None:
    slot = written(protocol.lock(ME, NOW_MS + 500, TTL_MS), locked(ME))
    assert protocol.owners_of(slot) == {ME: NOW_MS + 20_500}


def test_a_lock_drops_owners_past_their_deadline() -> None:
    slot = written(protocol.lock(ME, NOW_MS + 20_000, TTL_MS), locked(OTHER))
    assert protocol.owners_of(slot) == {ME: NOW_MS + 40_000}


def test_a_lock_lives_until_its_last_deadline() -> None:
    write = protocol.unlock_entity(ME, NOW_MS + 3_000, hold_off_s=0)(locked(ME, OTHER))
    assert write is not None
    assert write.ttl_s == 17.0


def test_the_last_owner_leaves_an_entity_free() -> None:
    assert written(protocol.unlock_entity(ME, NOW_MS, hold_off_s=0), locked(ME)) == FREE


def test_the_last_owner_leaves_a_hold_for_as_long_as_replicas_lag() -> None:
    hold = Write(b"\xacH", 2, pinned=True)
    assert protocol.unlock_entity(ME, NOW_MS, hold_off_s=2)(locked(ME)) == hold
    assert protocol.unlock_generation(ME, NOW_MS, NEW_NONCE, hold_off_s=2)(locked(ME)) == hold


def test_a_lock_that_was_lost_leaves_a_hold_too() -> None:
    for unlock in (protocol.unlock_entity(ME, NOW_MS, 2), protocol.unlock_generation(ME, NOW_MS, NEW_NONCE, 2)):
        assert written(unlock, None) == written(unlock, VALUE) == HOLD


def test_a_generation_is_opened_once_its_hold_is_over_and_not_before() -> None:
    assert protocol.judge(VALUE, HOLD) == Locked()
    assert protocol.open_generation(NEW_NONCE)(HOLD) is None
    assert written(protocol.open_generation(NEW_NONCE), None) == protocol.opened(NEW_NONCE)


def test_the_last_owner_leaves_a_generation_with_a_new_nonce() -> None:
    write = protocol.unlock_generation(ME, NOW_MS, NEW_NONCE, hold_off_s=0)(locked(ME))
    assert write is not None
    assert (write.value, write.pinned) == (protocol.opened(NEW_NONCE), True)


@pytest.mark.parametrize(
    "unlock", [protocol.unlock_entity(ME, NOW_MS, 0), protocol.unlock_generation(ME, NOW_MS, NEW_NONCE, 0)]
)
class TestUnlock:
    def test_others_keep_their_lock(self, unlock: Transition) -> None:
        assert protocol.owners_of(written(unlock, locked(ME, OTHER))) == {OTHER: NOW_MS + 20_000}
        assert unlock(locked(OTHER)) is None

    def test_owners_past_their_deadline_keep_nothing_locked(self, unlock: Transition) -> None:
        slot = written(protocol.lock(ME, NOW_MS - 1, TTL_MS), locked(OTHER, at_ms=NOW_MS - 20_000))
        left = written(unlock, slot)
        assert left is not None
        assert protocol.owners_of(left) is None

    def test_what_is_absent_stays_absent(self, unlock: Transition) -> None:
        assert unlock(None) is None  # unless replicas lag: see above

    @pytest.mark.parametrize("found", [VALUE, OLD_VALUE, OPEN, LEASE.encoded(), FOREIGN, FROM_A_LATER_VERSION])
    def test_what_took_the_place_of_a_lost_lock_is_destroyed(self, unlock: Transition, found: bytes) -> None:
        left = written(unlock, found)
        assert left in (FREE, protocol.opened(NEW_NONCE))
        assert left != found


def test_ids_are_never_seen_twice() -> None:
    ids = {protocol.fresh_id() for _ in range(10_000)}
    assert len(ids) == 10_000
    assert {len(each) for each in ids} == {protocol.ID_BYTES}
