"""The library with a part of its protocol left out. A harness that does not see it gone says nothing of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from asynccache import protocol
from asynccache.backends.base import Transition, Write
from asynccache.locking import WritePath
from asynccache.protocol import Lease, Slot
from asynccache.transaction import Transaction

_lock = WritePath.lock
_destroy = protocol.unlock_entity


def never_lock_generations() -> None:
    async def lock(self: WritePath, slots: Iterable[Slot], owner: bytes) -> bool:
        return await _lock(self, [slot for slot in slots if not slot.is_generation], owner)

    _replace(WritePath, "lock", lock)


def lock_after_commit() -> None:
    """What the look after COMMIT does not find locked it destroys, so that this is a delete after COMMIT, but one that
    leases notice."""

    async def lock(self: WritePath, slots: Iterable[Slot], owner: bytes) -> bool:
        return True

    _replace(WritePath, "lock", lock)


def fill_blindly() -> None:
    def fill(lease: Lease, record: bytes, ttl_s: float) -> Transition:
        return lambda _: Write(protocol.opened(lease.nonce) + record, ttl_s)

    _replace(protocol, "fill", fill)


def share_uncertified() -> None:
    def is_intact(self: Lease, entity: bytes | None, generation: bytes | None) -> bool:
        return True

    _replace(Lease, "is_intact", is_intact)


def never_verify() -> None:
    async def verify(self: WritePath, slots: Iterable[Slot], owner: bytes) -> None:
        pass

    def unlock(owner: bytes, now_ms: int, hold_off_s: float) -> Transition:
        settle = _destroy(owner, now_ms, hold_off_s)
        return lambda found: settle(found) if protocol.is_locked_by(found, owner) else None

    _replace(WritePath, "verify", verify)
    _replace(protocol, "unlock_entity", unlock)


def unlock_unknown() -> None:
    """A commit that was not answered is taken for one that was rolled back."""
    _replace(Transaction, "_release_unknown", Transaction._release)


def unlock_blindly() -> None:
    def unlock(owner: bytes, now_ms: int, hold_off_s: float) -> Transition:
        return lambda _: Write(b"", 1)

    _replace(protocol, "unlock_entity", unlock)


def _replace(owner: Any, name: str, mutant: Any) -> None:
    setattr(owner, name, mutant)


MUTATIONS: Final[Mapping[str, Callable[[], None]]] = {
    each.__name__.replace("_", "-"): each
    for each in (
        never_lock_generations,
        lock_after_commit,
        fill_blindly,
        share_uncertified,
        never_verify,
        unlock_unknown,
        unlock_blindly,
    )
}
