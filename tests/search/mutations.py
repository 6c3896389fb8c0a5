"""The mistakes that must be found: each breaks one promise of one small world.

Most take the place of a function of the library; what they replace is what a reader would think could be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from asynccache import protocol
from asynccache.backends.base import UNREADABLE, Change, Key, Transition, Write
from asynccache.flights import Flight, Share
from asynccache.locking import WritePath
from asynccache.protocol import Lease, Slot
from asynccache.reading import ReadPath, _Led
from asynccache.repair import Claim, Debt, Repairs
from asynccache.store import Store
from asynccache.transaction import Transaction
from tests.search import process
from tests.search.loop import untyped
from tests.search.process import Sought, SoughtRow
from tests.search.scenarios import (
    CANCEL,
    CANCEL_BESIDE_SNAPSHOT,
    CUT,
    CUT_AND_LOCK_LOST,
    DEADLINES,
    DEATH,
    DEATH_OF_ONE,
    FLEET,
    HERD,
    HERD_AND_TABLE,
    HERD_IN_FLEET,
    KEY_AND_ROW,
    KEY_BACK,
    KEY_BEFORE_AND_AFTER,
    KEY_BY_TABLE,
    KEY_HERD,
    KEY_TAKEN,
    LOCK_LOST,
    LOOK_LOST,
    OWED_BY_TABLE,
    OWED_BY_TABLE_AND_CUT,
    OWED_BY_TABLE_ELSEWHERE,
    REPLICA,
    REPLICA_LOCK_LOST,
    ROW,
    SILENCE,
    SILENCE_AND_DEATH,
    SNAPSHOT,
    SNAPSHOT_ELSEWHERE,
    STRAY_CAS,
    TABLE,
    TABLE_CUT,
    TABLE_DEATH,
    TABLE_DEATH_OF_ONE,
    TABLE_LOCK_LOST,
    TABLE_REPLICA,
    UNLOCKABLE,
    UNLOCKABLE_AND_CUT,
    UNLOCKABLE_HERE,
)
from tests.search.world import Promise, Scenario, Server

Apply = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutation:
    """A mistake, a world in which it shows, and the promise that it breaks there."""

    name: str
    breaks: Promise
    world: Scenario
    apply: Apply
    server: Server = "as it is"


MUTATIONS: list[Mutation] = []


def breaks(promise: Promise, world: Scenario, server: Server = "as it is") -> Callable[[Apply], Apply]:
    def note(apply: Apply) -> Apply:
        MUTATIONS.append(Mutation(apply.__name__, promise, world, apply, server))
        return apply

    return note


VALUE, LEASE, LOCKED, FREE = b"\xacV", b"\xacT", b"\xacL", b"\xacF"


def _is(slot: bytes | None, *kinds: bytes) -> bool:
    return slot is not None and slot.startswith(kinds)


# -------------------------------------------------------------------------------------------------- slots, by readers


@breaks("no stale value stays", FLEET)
def a_fill_takes_any_lease_for_its_own(patch: pytest.MonkeyPatch) -> None:
    def fill(lease: Lease, record: bytes, ttl_s: float) -> Transition:
        return lambda found: Write(protocol.opened(lease.nonce) + record, ttl_s) if _is(found, LEASE) else None

    patch.setattr(protocol, "fill", fill)


@breaks("no stale value stays", ROW)
def a_fill_is_a_set(patch: pytest.MonkeyPatch) -> None:
    def fill(lease: Lease, record: bytes, ttl_s: float) -> Transition:
        return lambda _: Write(protocol.opened(lease.nonce) + record, ttl_s)

    patch.setattr(protocol, "fill", fill)


@breaks("no stale value stays", DEATH)
def a_lease_is_taken_over_a_lock(patch: pytest.MonkeyPatch) -> None:
    judge = protocol.judge

    def careless(entity: bytes | None, generation: bytes | None, rejected: bytes | None = None) -> protocol.Verdict:
        return judge(None if _is(entity, LOCKED) else entity, generation, rejected)

    patch.setattr(protocol, "judge", careless)


@breaks("no stale value stays", TABLE_DEATH)
def a_generation_is_opened_over_a_lock(patch: pytest.MonkeyPatch) -> None:
    judge = protocol.judge

    def careless(entity: bytes | None, generation: bytes | None, rejected: bytes | None = None) -> protocol.Verdict:
        return judge(entity, None if _is(generation, LOCKED) else generation, rejected)

    patch.setattr(protocol, "judge", careless)


@breaks("no stale value stays", TABLE)
def the_nonce_is_that_of_the_fill_and_not_of_the_lease(patch: pytest.MonkeyPatch) -> None:
    async def fill(self: Any, fills: Sequence[Any]) -> None:
        (each,) = fills
        _, generation = await self.store.read([each.ask.slot.key, each.ask.slot.generation])
        each.flight.land(None)
        if protocol.is_open(generation):
            record = generation + each.record
            await self.store.apply(
                [Change(each.ask.slot.key, lambda found: Write(record, 1) if found == each.lease.encoded() else None)]
            )

    patch.setattr(ReadPath, "_fill", fill)


@breaks("no stale value stays", TABLE)
def every_generation_has_the_same_nonce(patch: pytest.MonkeyPatch) -> None:
    opened = protocol.opened
    patch.setattr(protocol, "open_generation", lambda _: lambda found: None if found else Write(opened(b"=" * 12), 1))
    patch.setattr(
        protocol,
        "unlock_generation",
        lambda owner, now_ms, *_: protocol._unlock(owner, now_ms, 0, Write(opened(b"=" * 12), 1)),
    )


@breaks("no stale value stays", TABLE)
def a_value_is_served_whatever_its_generation(patch: pytest.MonkeyPatch) -> None:
    hit = protocol.hit

    def careless(entity: bytes | None, generation: bytes | None, rejected: bytes | None = None) -> bytes | None:
        if protocol.is_open(generation) and entity is not None and _is(entity, VALUE):
            return entity[14:]
        return hit(entity, generation, rejected)

    patch.setattr(protocol, "hit", careless)


@breaks("no stale value stays", SILENCE)
def a_lease_that_was_not_answered_counts_as_placed(patch: pytest.MonkeyPatch) -> None:
    offer = ReadPath._offer

    async def hopeful(self: ReadPath, offers: Sequence[tuple[_Led, Lease]], generations: Any) -> list[_Led]:
        lost = await offer(self, offers, generations)
        for each, lease in offers:
            if each not in lost:
                each.flight.lease = lease
        return lost

    patch.setattr(ReadPath, "_offer", hopeful)


@breaks("no stale value stays", SNAPSHOT_ELSEWHERE)
def a_lease_is_given_back_blindly(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(protocol, "give_back", lambda _: lambda _: Write(FREE, 1))


# -------------------------------------------------------------------------------------------------- slots, by writers


@breaks("no stale value stays", DEATH_OF_ONE)
def unlocking_is_a_set(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(protocol, "unlock_entity", lambda *_: lambda _: Write(FREE, 1))


@breaks("no stale value stays", DEATH_OF_ONE)
def a_lock_has_one_owner(patch: pytest.MonkeyPatch) -> None:
    lock = protocol.lock
    patch.setattr(protocol, "lock", lambda *about: lambda _: lock(*about)(None))


@breaks("no stale value stays", TABLE_DEATH_OF_ONE)
def a_lock_of_a_generation_has_one_owner(patch: pytest.MonkeyPatch) -> None:
    a_lock_has_one_owner(patch)


@breaks("no stale hit", LOCK_LOST)
def a_lock_that_was_lost_is_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    async def verify(self: WritePath, slots: Iterable[Slot], owner: bytes) -> None:
        pass

    patch.setattr(WritePath, "verify", verify)


@breaks("no stale hit", TABLE_LOCK_LOST)
def a_lock_that_was_lost_of_a_table_is_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    a_lock_that_was_lost_is_not_looked_for(patch)


def _unlock_leaving(*kinds: bytes) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        unlock = protocol.unlock_entity

        def careless(owner: bytes, now_ms: int, hold_off_s: float) -> Transition:
            transition = unlock(owner, now_ms, hold_off_s)
            return lambda found: None if _is(found, *kinds) else transition(found)

        patch.setattr(protocol, "unlock_entity", careless)

    return apply


@breaks("no stale hit", LOCK_LOST)
def unlocking_leaves_what_took_the_place_of_a_lost_lock(patch: pytest.MonkeyPatch) -> None:
    _unlock_leaving(VALUE, LEASE)(patch)


@breaks("no stale value stays", UNLOCKABLE)
def the_repair_destroys_values_and_not_leases(patch: pytest.MonkeyPatch) -> None:
    _unlock_leaving(LEASE)(patch)


@breaks("no stale value stays", SILENCE_AND_DEATH)
def a_lock_that_was_not_answered_counts_as_placed(patch: pytest.MonkeyPatch) -> None:
    try_lock = WritePath._try_lock

    async def hopeful(self: WritePath, slots: Sequence[Slot], owner: bytes) -> tuple[list[Slot], list[Slot]]:
        await try_lock(self, slots, owner)
        return [], []

    patch.setattr(WritePath, "_try_lock", hopeful)


@breaks("no stale value stays", CUT)
def the_locks_of_a_commit_that_was_cut_off_are_released_at_once(patch: pytest.MonkeyPatch) -> None:
    def release_unknown(self: Any) -> None:
        self._release()

    patch.setattr(Transaction, "_release_unknown", release_unknown)


@breaks("no stale value stays", TABLE_CUT)
def the_locks_of_a_bulk_commit_that_was_cut_off_are_released_at_once(patch: pytest.MonkeyPatch) -> None:
    the_locks_of_a_commit_that_was_cut_off_are_released_at_once(patch)


@breaks("no stale value stays", CUT_AND_LOCK_LOST)
def the_locks_of_a_commit_that_was_cut_off_are_left_to_expire(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transaction, "_release_unknown", lambda self: self._let_go())


@breaks("no stale value stays", UNLOCKABLE_AND_CUT)
def a_slot_that_could_not_be_locked_is_not_repaired_unless_the_commit_is_answered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WritePath, "release_later", lambda *_, **__: None)


@breaks("no stale value stays", UNLOCKABLE_AND_CUT)
def a_slot_that_could_not_be_locked_is_repaired_before_the_commit_has_an_outcome(patch: pytest.MonkeyPatch) -> None:
    def release_later(self: Any, slots: Iterable[Slot], owner: bytes, *, placed: bool) -> None:
        if not placed:
            self._repairs.owe((Claim(slot, owner) for slot in slots), doubtful=True)

    patch.setattr(WritePath, "release_later", release_later)


@breaks("locks end", DEADLINES)
def a_lock_gives_everybody_the_latest_deadline(patch: pytest.MonkeyPatch) -> None:
    locked: Any = untyped(protocol)._locked

    def renewing(owners: Mapping[bytes, int], now_ms: int) -> Write:
        write: Write = locked(dict.fromkeys(owners, max(owners.values())), now_ms)
        return write

    patch.setattr(protocol, "_locked", renewing)


@breaks("locks end", DEADLINES)
def a_lock_keeps_the_dead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(protocol, "_alive", lambda slot, _: dict(protocol.owners_of(slot) or {}))


@breaks("no stale value stays", REPLICA)
def a_row_is_opened_before_replicas_have_it(patch: pytest.MonkeyPatch) -> None:
    unlock = protocol.unlock_entity
    patch.setattr(protocol, "unlock_entity", lambda owner, now_ms, _: unlock(owner, now_ms, 0))


@breaks("no stale value stays", TABLE_REPLICA)
def a_table_is_opened_before_replicas_have_it(patch: pytest.MonkeyPatch) -> None:
    unlock = protocol.unlock_generation
    patch.setattr(protocol, "unlock_generation", lambda owner, now_ms, nonce, _: unlock(owner, now_ms, nonce, 0))


@breaks("no stale value stays", REPLICA_LOCK_LOST)
def a_slot_whose_lock_was_evicted_is_left_open_to_replicas(patch: pytest.MonkeyPatch) -> None:
    unlock = protocol.unlock_entity

    def careless(owner: bytes, now_ms: int, hold_off_s: float) -> Transition:
        transition = unlock(owner, now_ms, hold_off_s)
        return lambda found: transition(found) if found is not None else None

    patch.setattr(protocol, "unlock_entity", careless)


# ------------------------------------------------------------------------------------------------------------ doubts


@breaks("no stale hit", UNLOCKABLE_HERE)
def what_could_not_be_locked_is_read_all_the_same(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Store, "doubt", lambda *_: None)
    patch.setattr(Store, "trust", lambda *_: None)


@breaks("no stale hit", UNLOCKABLE_HERE)
def what_could_not_be_locked_is_trusted_before_it_is_repaired(patch: pytest.MonkeyPatch) -> None:
    release = WritePath.release

    def trusting(self: Any, slots: Iterable[Slot], owner: bytes) -> None:
        self._repairs.forget([Claim(slot, owner) for slot in slots])
        release(self, slots, owner)

    patch.setattr(WritePath, "release", trusting)


@breaks("no stale hit", UNLOCKABLE_HERE)
def what_was_asked_for_while_in_doubt_is_believed_afterwards(patch: pytest.MonkeyPatch) -> None:
    async def read(self: Any, keys: Sequence[Key]) -> list[bytes | None]:
        slots = await self.backend.get_many(keys)
        return [UNREADABLE if key in self._doubtful else slot for key, slot in zip(keys, slots, strict=True)]

    patch.setattr(Store, "read", read)


# ------------------------------------------------------------------------------------------------------------- debts


@breaks("no stale hit", LOOK_LOST)
def a_commit_that_may_wait_looks_at_its_locks_only_once(patch: pytest.MonkeyPatch) -> None:
    async def verify(self: Any, slots: Iterable[Slot], owner: bytes) -> None:
        unseen = await self._destroy_lost(list(slots), owner)
        self._repairs.owe((Claim(slot, owner) for slot in unseen), doubtful=True)

    patch.setattr(WritePath, "verify", verify)


@breaks("no stale hit", OWED_BY_TABLE)
def what_there_is_no_room_to_owe_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    note = untyped(Repairs)._note

    def forgetful(self: Any, claim: Claim, debt: Debt) -> None:
        if claim in self._debts or len(self) < self._settings.repairs_max:
            note(self, claim, debt)

    patch.setattr(Repairs, "_note", forgetful)


@breaks("no stale hit", OWED_BY_TABLE)
def what_is_owed_by_its_table_is_read_all_the_same(patch: pytest.MonkeyPatch) -> None:
    doubt, trust = Store.doubt, Store.trust

    def unless_generation(change: Callable[[Store, Key], None]) -> Callable[[Store, Key], None]:
        return lambda self, key: change(self, key) if key != process.GENERATION else None

    patch.setattr(Store, "doubt", unless_generation(doubt))
    patch.setattr(Store, "trust", unless_generation(trust))


@breaks("no stale value stays", OWED_BY_TABLE_ELSEWHERE)
def what_is_owed_by_its_table_is_doubted_and_not_renewed(patch: pytest.MonkeyPatch) -> None:
    unlock = protocol.unlock_generation
    patch.setattr(
        protocol,
        "unlock_generation",
        lambda owner, *about: (lambda _: None) if owner == process.NOBODY else unlock(owner, *about),
    )


@breaks("no stale value stays", OWED_BY_TABLE_AND_CUT)
def what_is_owed_by_its_table_is_renewed_before_the_commit_has_an_outcome(patch: pytest.MonkeyPatch) -> None:
    note = untyped(Repairs)._note

    def hasty(self: Any, claim: Claim, debt: Debt) -> None:
        has_room = claim in self._debts or len(self) < self._settings.repairs_max
        note(self, claim, debt if has_room else replace(debt, due_s=0.0))

    patch.setattr(Repairs, "_note", hasty)


# ----------------------------------------------------------------------------------------------------------- flights


@breaks("no stale share", HERD)
def a_row_is_shared_without_a_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "is_intact", lambda *_: True)


@breaks("no stale share", HERD_AND_TABLE)
def the_check_looks_at_the_row_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "is_intact", lambda self, entity, _: entity == self.encoded())


@breaks("no stale share", HERD)
def who_asks_during_the_select_counts_as_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flight, "begin_load", lambda _: None)


@breaks("no stale share", HERD)
def the_row_is_shared_with_the_late_as_well(patch: pytest.MonkeyPatch) -> None:
    def share_early(self: Flight[Key], record: bytes) -> None:
        for waiter in self._take_waiters():
            waiter.answer(Share(record))

    patch.setattr(Flight, "share_early", share_early)


@breaks("no stale share", HERD)
def a_flight_is_closed_after_its_check(patch: pytest.MonkeyPatch) -> None:
    close = Flight.close

    def closing(end: Callable[..., Any]) -> Callable[..., Any]:
        def ending(self: Flight[Key], *about: Any) -> Any:
            close(self)
            return end(self, *about)

        return ending

    patch.setattr(Flight, "land", closing(Flight.land))
    patch.setattr(Flight, "call_off", closing(Flight.call_off))
    patch.setattr(Flight, "close", lambda _: None)


@breaks("no stale share", SNAPSHOT)
def a_row_from_a_snapshot_is_shared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(process, "may_leave", lambda _: True)


@breaks("nobody waits for ever", CANCEL)
def a_cancelled_leader_tells_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadPath, "_hand_over", lambda _, flight: flight.close())


@breaks("flights end", CANCEL)
def a_cancelled_leader_leaves_its_flight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadPath, "_hand_over", lambda *_: None)


@breaks("flights end", CANCEL_BESIDE_SNAPSHOT)
def who_is_cancelled_as_it_is_made_the_leader_does_not_pass_it_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadPath, "_abandon", lambda _, wait: wait.waiter.leave())


@breaks("nobody waits for ever", HERD)
def the_refused_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    def land(self: Flight[Key], certified: bytes | None) -> None:
        self.close()
        for waiter in self._take_waiters():
            if certified is not None:
                waiter.answer(Share(certified))

    patch.setattr(Flight, "land", land)


@breaks("nobody waits for ever", HERD_IN_FLEET)
def who_reads_anothers_value_forgets_its_waiters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flight, "call_off", lambda self: self.close())


# ----------------------------------------------------------------------------------------------------- secondary keys


def _locking(patch: pytest.MonkeyPatch, instead: Mapping[Key, Sequence[Key]]) -> None:
    def slots(self: Any) -> list[Slot]:
        return [Slot(each, process.GENERATION) for key in self.locks for each in instead.get(key, [key])]

    patch.setattr(process._Writes, "slots", slots)


@breaks("no stale hit", KEY_TAKEN)
def the_value_that_a_row_gets_is_not_locked(patch: pytest.MonkeyPatch) -> None:
    _locking(patch, {key: [] for key in process.UNIQUES.values()})


@breaks("no stale hit", KEY_BEFORE_AND_AFTER)
def the_value_that_a_row_had_is_locked_and_not_the_one_that_it_gets(patch: pytest.MonkeyPatch) -> None:
    _locking(patch, {process.UNIQUES["b"]: [process.UNIQUES["a"]]})


@breaks("no stale value stays", KEY_BACK)
def a_row_that_is_back_is_not_locked_by_its_key(patch: pytest.MonkeyPatch) -> None:
    the_value_that_a_row_gets_is_not_locked(patch)


@breaks("no stale hit", KEY_AND_ROW)
def what_a_key_leads_to_is_served_unseen(patch: pytest.MonkeyPatch) -> None:
    serve = SoughtRow.serve

    def careless(self: SoughtRow, record: bytes) -> bool:
        served = serve(self, record)
        self.matches = True
        return served

    patch.setattr(SoughtRow, "serve", careless)


@breaks("no stale hit", KEY_HERD)
def a_row_that_came_with_its_key_is_stored_and_shared_with_the_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sought, "certain", lambda _, record: record)


@breaks("no stale value stays", KEY_BY_TABLE)
def a_key_is_served_whatever_its_generation(patch: pytest.MonkeyPatch) -> None:
    a_value_is_served_whatever_its_generation(patch)


# --------------------------------------------------------------------------------------------------------- the server


@breaks("no stale value stays", SILENCE, "writes blindly")
def the_server_is_written_to_by_set(_: pytest.MonkeyPatch) -> None:
    pass


@breaks(
    "no stale value stays",
    STRAY_CAS,
    "has one connection for gets and another for cas",
)
def a_cas_goes_over_another_connection_than_its_gets(_: pytest.MonkeyPatch) -> None:
    pass
