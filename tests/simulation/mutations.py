"""Ways to break the library: each removes a rule of its design. A simulation that does not notice is worth nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from asynccache import protocol
from asynccache.backends.base import Transition, Write
from asynccache.flights import Flight
from asynccache.locking import WritePath
from asynccache.orm.entity import Entity
from asynccache.orm.writes import Writes
from asynccache.protocol import Lease, Slot
from asynccache.store import Store
from asynccache.transaction import Transaction

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]


def fills_without_looking_for_its_lease(patch: Patch) -> None:
    def fill(lease: Lease, record: bytes, ttl_s: float) -> Transition:
        return lambda _: Write(protocol.opened(lease.nonce) + record, ttl_s)

    patch.setattr(protocol, "fill", fill)


def shares_without_certification(patch: Patch) -> None:
    patch.setattr(Lease, "is_intact", lambda *_: True)


def certifies_without_the_generation(patch: Patch) -> None:
    patch.setattr(Lease, "is_intact", lambda lease, entity, _: entity == lease.encoded())


def lets_newcomers_join_until_a_flight_has_landed(patch: Patch) -> None:
    close = Flight.close

    def closing_first(end: Callable[..., Any]) -> Callable[..., Any]:
        def ended(flight: Flight[Any], *args: Any) -> Any:
            close(flight)
            return end(flight, *args)

        return ended

    patch.setattr(Flight, "close", lambda _: None)
    patch.setattr(Flight, "land", closing_first(Flight.land))
    patch.setattr(Flight, "call_off", closing_first(Flight.call_off))


def destroys_after_commit_instead_of_locking_before(patch: Patch) -> None:
    def lock(transaction: Transaction, slots: Iterable[Slot], **_: object) -> None:
        transaction._locked.update(slots)  # so that they are destroyed in the background

    patch.setattr(Transaction, "_lock", lock)
    does_not_verify_after_commit(patch)


def takes_other_owners_off_the_lock(patch: Patch) -> None:
    patch.setattr(protocol, "_unlock", lambda _owner, _now_ms, last: lambda found: None if found is None else last)
    does_not_verify_after_commit(patch)  # which would make up for it


def does_not_verify_after_commit(patch: Patch) -> None:
    async def verify(*_: object) -> None:
        pass

    patch.setattr(WritePath, "verify", verify)


def does_not_doubt_what_was_not_locked(patch: Patch) -> None:
    patch.setattr(Store, "doubt", lambda *_: None)
    patch.setattr(Store, "trust", lambda *_: None)


def unlocks_although_commit_was_not_answered(patch: Patch) -> None:
    patch.setattr(Transaction, "_release_unknown", Transaction._release)


def reads_its_own_writes_from_the_cache(patch: Patch) -> None:
    patch.setattr("asynccache.reader.Row.why_not", lambda _: None)


def stores_what_is_not_committed(patch: Patch) -> None:
    patch.setattr("asynccache.reader.Row.why_not", lambda _: None)
    patch.setattr("asynccache.reader.may_fill", lambda _: True)


def does_not_lock_the_values_that_rows_get(patch: Patch) -> None:
    patch.setattr(Writes, "_note_unique", lambda *_: None)


def serves_what_a_key_leads_to_unseen(patch: Patch) -> None:
    patch.setattr(Entity, "has", lambda *_: True)


def keeps_the_nonce_of_a_generation(patch: Patch) -> None:
    unlock_generation = protocol.unlock_generation
    nonce = bytes(protocol.ID_BYTES)
    patch.setattr(protocol, "open_generation", _with_nonce(protocol.open_generation, nonce))
    patch.setattr(
        protocol, "unlock_generation", lambda owner, now_ms, _, hold_s: unlock_generation(owner, now_ms, nonce, hold_s)
    )


def _with_nonce(opening: Callable[[bytes], Transition], nonce: bytes) -> Callable[[bytes], Transition]:
    return lambda _: opening(nonce)


MUTATIONS: Mapping[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        fills_without_looking_for_its_lease,
        shares_without_certification,
        certifies_without_the_generation,
        lets_newcomers_join_until_a_flight_has_landed,
        destroys_after_commit_instead_of_locking_before,
        takes_other_owners_off_the_lock,
        does_not_verify_after_commit,
        does_not_doubt_what_was_not_locked,
        unlocks_although_commit_was_not_answered,
        reads_its_own_writes_from_the_cache,
        stores_what_is_not_committed,
        keeps_the_nonce_of_a_generation,
        does_not_lock_the_values_that_rows_get,
        serves_what_a_key_leads_to_unseen,
    )
}
