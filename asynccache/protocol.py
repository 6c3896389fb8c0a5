"""The states of a slot and their transitions: pure functions of bytes, with no I/O, no clock and no SQLAlchemy.

There are two kinds of slot. `E` holds one entity; `G`, a generation, stands for a bucket of primary keys:

    E: absent | LEASE(token, nonce) | VALUE(nonce, record) | LOCKED(owner -> deadline) | HOLD | FREE
    G: absent | OPEN(nonce)                                | LOCKED(owner -> deadline) | HOLD

An entity is served only while it carries the nonce of its generation, so that renewing a generation invalidates every
entity of its bucket without knowing their keys. A lease promises that nobody committed a change to the slot since it
was taken: locking a slot destroys the lease in it, so that the fill that follows the lease is refused. Absence proves
nothing and leads to nothing but a new lease; a slot can be evicted at any time.

The lease is that of memcached at Facebook (Nishtala et al., "Scaling Memcache at Facebook", NSDI 2013), built from
compare-and-set alone. What differs: writers lock *before* COMMIT instead of deleting after it, and a lock has many
owners.

The bytes: a magic byte, a kind, then fixed fields. VALUE is its generation's own bytes followed by the record, which is
empty for a row that is known not to exist; whether an entity may be served is one `startswith`. A kind that this
version does not know is treated as locked by readers (a later version may have written it) and overwritten by
writers; for that reason a later version may add kinds of values, but never another kind of lock. Bytes that are not
ours, or cut short, are replaced like an expired value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from asynccache.backends.base import Key, Transition, Write

ID_BYTES = 12
"""Tokens, nonces and owners are 96 random bits, fresh at every attempt: one is never seen twice."""

MISSING = b""
"""The record of a row that does not exist."""

FREE_TTL_S = 1.0
"""FREE says no more than absence does. It stands in for a conditional delete, and need not last."""

GENERATION_TTL_S = 7 * 86400.0
"""Long, since a generation that expires takes its whole bucket along; below the 30 days after which memcached takes a
time to live for a date."""

_MAGIC = b"\xac"
_OPEN, _LEASE, _LOCKED, _HOLD, _FREE = (_MAGIC + kind for kind in (b"V", b"T", b"L", b"H", b"F"))
_KIND_BYTES = len(_OPEN)
_OPEN_BYTES = _KIND_BYTES + ID_BYTES
_LEASE_BYTES = _KIND_BYTES + 2 * ID_BYTES
_DEADLINE_BYTES = 8
_OWNER_BYTES = ID_BYTES + _DEADLINE_BYTES


class Slot(NamedTuple):
    """The address of a row, and that of the generation that it is valid under; both the same for a generation."""

    key: Key
    generation: Key

    @property
    def is_generation(self) -> bool:
        return self.key == self.generation


def fresh_id() -> bytes:
    """A new token, nonce or owner."""
    return os.urandom(ID_BYTES)


def opened(nonce: bytes) -> bytes:
    """The bytes of a generation that may be read."""
    return _OPEN + nonce


def is_open(generation: bytes | None) -> bool:
    return generation is not None and len(generation) == _OPEN_BYTES and generation.startswith(_OPEN)


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to fill one slot, for as long as nobody touches it."""

    token: bytes
    nonce: bytes

    def encoded(self) -> bytes:
        return _LEASE + self.token + self.nonce

    def is_intact(self, entity: bytes | None, generation: bytes | None) -> bool:
        """Whether nobody committed a change since the lease was taken, as far as these two slots can tell."""
        return entity == self.encoded() and generation == opened(self.nonce)


def owners_of(slot: bytes | None) -> Mapping[bytes, int] | None:
    """The owners of a lock and their deadlines in milliseconds since the epoch, or None if the slot is not locked."""
    if slot is None or not _is_lock(slot):
        return None
    return {
        slot[at : at + ID_BYTES]: int.from_bytes(slot[at + ID_BYTES : at + _OWNER_BYTES])
        for at in range(_KIND_BYTES, len(slot), _OWNER_BYTES)
    }


def is_locked_by(slot: bytes | None, owner: bytes) -> bool:
    if slot is None or not _is_lock(slot):
        return False
    # It nearly always has one owner.
    return slot.startswith(owner, _KIND_BYTES) or any(
        slot.startswith(owner, at) for at in range(_KIND_BYTES + _OWNER_BYTES, len(slot), _OWNER_BYTES)
    )


def _is_lock(slot: bytes) -> bool:
    return slot.startswith(_LOCKED) and len(slot) > _KIND_BYTES and (len(slot) - _KIND_BYTES) % _OWNER_BYTES == 0


# --------------------------------------------------------------------------------------------------- what people see


class Kind(Enum):
    """The state of a slot. A generation that is open counts as a value: it is one of no row."""

    ABSENT = "absent"
    LEASE = "lease"
    VALUE = "value"
    LOCKED = "locked"
    HOLD = "hold"
    FREE = "free"
    UNKNOWN = "unknown"
    """Of a later version, maybe."""
    FOREIGN = "foreign"
    """Not ours, or cut short."""


def kind_of(slot: bytes | None) -> Kind:
    if slot is None:
        return Kind.ABSENT
    known = {
        _OPEN: (Kind.VALUE, len(slot) >= _OPEN_BYTES),
        _LEASE: (Kind.LEASE, len(slot) == _LEASE_BYTES),
        _LOCKED: (Kind.LOCKED, _is_lock(slot)),
        _HOLD: (Kind.HOLD, True),
        _FREE: (Kind.FREE, True),
    }
    kind, is_whole = known.get(slot[:_KIND_BYTES], (Kind.UNKNOWN, _blocks(slot)))
    return kind if is_whole else Kind.FOREIGN


def nonce_of(slot: bytes | None) -> bytes | None:
    """The generation that a value or a lease belongs to, or that an open generation is."""
    if slot is None or kind_of(slot) not in (Kind.VALUE, Kind.LEASE):
        return None
    return slot[_KIND_BYTES:_OPEN_BYTES] if kind_of(slot) is Kind.VALUE else slot[-ID_BYTES:]


def record_of(slot: bytes | None) -> bytes | None:
    """The record of a value, whichever generation it belongs to: `MISSING`, or the bytes of a row."""
    return slot[_OPEN_BYTES:] if slot is not None and kind_of(slot) is Kind.VALUE else None


# ------------------------------------------------------------------------------------------------- what a reader sees


@dataclass(frozen=True, slots=True)
class Hit:
    """The record may be served: `MISSING`, or the bytes of a row."""

    record: bytes


@dataclass(frozen=True, slots=True)
class Vacant:
    """Nothing to serve, and a lease under this nonce may be asked for."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class Leased:
    """Another reader is loading the row."""


@dataclass(frozen=True, slots=True)
class Locked:
    """A writer is at work, or the slot cannot be read: load the row and store nothing."""


@dataclass(frozen=True, slots=True)
class NoGeneration:
    """The bucket has no generation yet, or no more: make one, then look again."""


Verdict = Hit | Vacant | Leased | Locked | NoGeneration


def hit(entity: bytes | None, generation: bytes | None, rejected: bytes | None = None) -> bytes | None:
    """The record that a reader may serve; None if there is none: then `judge` says what it may do instead.

    That these are two functions is for the sake of hits, which are many: nothing is made but the record.
    """
    if entity is None or generation is None or len(generation) != _OPEN_BYTES:
        return None
    # Both begin alike, so that the entity is a value if the generation is open.
    if not entity.startswith(generation) or not generation.startswith(_OPEN) or entity == rejected:
        return None
    return entity[_OPEN_BYTES:]


def judge(entity: bytes | None, generation: bytes | None, rejected: bytes | None = None) -> Verdict:
    """Say what a reader may do about the two slots of one entity.

    rejected: a value that this reader has found to be of no use to it (another schema, damaged), as it stood in the
        slot; it counts as vacant.
    """
    record = hit(entity, generation, rejected)
    if record is not None:
        return Hit(record)
    if not is_open(generation):
        return NoGeneration() if generation is None or not _blocks(generation) else Locked()
    assert generation is not None
    nonce = generation[_KIND_BYTES:]
    if entity is None:
        return Vacant(nonce)
    if entity.startswith(_LEASE) and entity.endswith(nonce) and len(entity) == _LEASE_BYTES:
        return Leased()
    return Locked() if _blocks(entity) else Vacant(nonce)


def _blocks(slot: bytes) -> bool:
    """Whether nobody may store a value here now: LOCKED, HOLD, or a kind that only a later version knows."""
    if slot.startswith(_LOCKED):
        return _is_lock(slot)
    return slot[:1] == _MAGIC and len(slot) >= _KIND_BYTES and not slot.startswith((_OPEN, _LEASE, _FREE))


# --------------------------------------------------------------------------------------------- transitions of readers


def look(_found: bytes | None) -> Write | None:
    """Leave the slot as it is: what is there is told in one batch with what other slots become."""
    return None


def open_generation(nonce: bytes) -> Transition:
    """G: absent becomes OPEN(nonce)."""

    def transition(found: bytes | None) -> Write | None:
        if isinstance(judge(None, found), NoGeneration):
            return Write(opened(nonce), GENERATION_TTL_S, pinned=True)
        return None

    return transition


def take_lease(lease: Lease, ttl_s: float, rejected: bytes | None = None) -> Transition:
    """E: whatever holds nothing for this generation becomes LEASE. Who lost the race finds a lease or a value there."""

    def transition(found: bytes | None) -> Write | None:
        if isinstance(judge(found, opened(lease.nonce), rejected), Vacant):
            return Write(lease.encoded(), ttl_s)
        return None

    return transition


def give_back(lease: Lease) -> Transition:
    """E: this very LEASE becomes FREE, so that others need not wait for it to expire."""

    def transition(found: bytes | None) -> Write | None:
        return Write(_FREE, FREE_TTL_S) if found == lease.encoded() else None

    return transition


def fill(lease: Lease, record: bytes, ttl_s: float) -> Transition:
    """E: this very LEASE becomes VALUE, under the nonce that was current when the lease was taken."""

    def transition(found: bytes | None) -> Write | None:
        return Write(opened(lease.nonce) + record, ttl_s) if found == lease.encoded() else None

    return transition


def discard(record: bytes) -> Transition:
    """E: a VALUE of this record becomes FREE, whatever its generation."""

    def transition(found: bytes | None) -> Write | None:
        if found is None or not found.startswith(_OPEN) or found[_OPEN_BYTES:] != record:
            return None
        return Write(_FREE, FREE_TTL_S)

    return transition


# --------------------------------------------------------------------------------------------- transitions of writers


def lock(owner: bytes, now_ms: int, lock_ttl_ms: int) -> Transition:
    """E or G: whatever is there becomes LOCKED by `owner`, beside those who have locked it already.

    The owner's deadline is 2 * `lock_ttl_ms` from now. Owners past theirs are dropped: a lock that every later writer
    renewed for a dead one would never end.
    """

    mine = {owner: now_ms + 2 * lock_ttl_ms}
    alone = _locked(mine, now_ms)

    def transition(found: bytes | None) -> Write | None:
        others = _alive(found, now_ms)
        return _locked(others | mine, now_ms) if others else alone

    return transition


def unlock_entity(owner: bytes, now_ms: int, hold_off_s: float) -> Transition:
    """E: take `owner` off the lock; the last one leaves FREE, or HOLD for `hold_off_s` seconds if that is not 0.

    Anything but a lock or absence means that the lock was lost (evicted, restarted, never placed) and that a reader may
    have put an old value in its place: it is destroyed, leases included. With an owner that holds nothing this is
    therefore "destroy", which is all that an invalidation outside of a transaction has to do. Absence is left as it is,
    unless HOLD is due.
    """
    return _unlock(owner, now_ms, hold_off_s, Write(_FREE, FREE_TTL_S))


def unlock_generation(owner: bytes, now_ms: int, nonce: bytes, hold_off_s: float) -> Transition:
    """G: take `owner` off the lock; the last one leaves OPEN with a new nonce, and so does a lock that was lost.

    If `hold_off_s` is not 0 it is HOLD for so many seconds, after which a reader opens a new generation.
    """
    return _unlock(owner, now_ms, hold_off_s, Write(opened(nonce), GENERATION_TTL_S, pinned=True))


def _unlock(owner: bytes, now_ms: int, hold_off_s: float, opening: Write) -> Transition:
    hold = Write(_HOLD, hold_off_s, pinned=True) if hold_off_s > 0 else None

    def transition(found: bytes | None) -> Write | None:
        if found is None:
            return hold
        if not _is_lock(found):
            return hold or opening
        if not is_locked_by(found, owner):
            return None
        others = {other: deadline for other, deadline in _alive(found, now_ms).items() if other != owner}
        return _locked(others, now_ms) if others else hold or opening

    return transition


def _alive(slot: bytes | None, now_ms: int) -> dict[bytes, int]:
    owners = owners_of(slot)
    return {owner: deadline for owner, deadline in owners.items() if deadline > now_ms} if owners else {}


def _locked(owners: Mapping[bytes, int], now_ms: int) -> Write:
    parts = [owner + deadline.to_bytes(_DEADLINE_BYTES) for owner, deadline in sorted(owners.items())]
    return Write(b"".join([_LOCKED, *parts]), (max(owners.values()) - now_ms) / 1000, pinned=True)
