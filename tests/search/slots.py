"""Slots as values: their bytes, with ids by number, so that worlds that differ only in ids are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from asynccache import protocol
from asynccache.backends.base import UNREADABLE
from asynccache.protocol import MISSING
from tests.search.freeze import ID


class Slot(NamedTuple):
    """The bytes of a slot without its ids, and these by number, in the order in which they appear."""

    shape: bytes
    ids: tuple[int, ...]


Content = Slot | None
"""None: absent."""

UNREAD = Slot(UNREADABLE, ())
UNASKED = Slot(UNREADABLE + b"?", ())
"""The server was known to be away."""

BLANK = b"?" * protocol.ID_BYTES
FREE, HOLD = b"\xacF", b"\xacH"


def encode(value: bytes | None, numbers: dict[bytes, int]) -> Content:
    """numbers: of ids; those that are not in it get the next ones."""
    if value is None:
        return None
    return Slot(ID.sub(BLANK, value), tuple(numbers.setdefault(each, len(numbers)) for each in ID.findall(value)))


def decode(slot: Content, names: Sequence[bytes]) -> bytes | None:
    """names: what the numbers stand for."""
    if slot is None:
        return None
    first, *parts = slot.shape.split(BLANK)
    return first + b"".join(names[each] + part for each, part in zip(slot.ids, parts, strict=True))


def as_bytes(slot: Content) -> bytes | None:
    """With ids that tell their number."""
    if slot is None:
        return None
    return decode(slot, [b"id%010d" % each for each in range(max(slot.ids, default=0) + 1)])


def record_of(version: int, *, exists: bool = False) -> bytes:
    """exists: a row's first version is one; otherwise it is that there is no such row."""
    return b"v%d" % version if version or exists else MISSING


def version_of(record: bytes) -> int:
    return int(record[1:]) if record != MISSING else 0  # or later, where rows are deleted


def is_locked(slot: Slot) -> bool:
    return slot.shape.startswith(b"\xacL")


def deadline_ms(slot: Slot) -> int:
    """When the last owner of a lock has lost it."""
    return max((protocol.owners_of(as_bytes(slot)) or {}).values())


def why_endless(found: Content, content: Content, own: Sequence[int], now_ms: int) -> str | None:
    """What is wrong with a lock that takes the place of another.

    Each owner ends at a deadline that nobody else moves, and a lock with its last owner: that is why all locks end.
    """
    if found is None or content is None or not is_locked(content):
        return None
    before, after = protocol.owners_of(as_bytes(found)) or {}, protocol.owners_of(as_bytes(content)) or {}
    for owner, deadline in after.items():
        if owner in before and int(owner[2:]) not in own:
            if deadline > before[owner]:
                return "a lock gives another owner, who may be dead, more time"
            if deadline <= now_ms:
                return "a lock keeps an owner past its deadline"
    return None


def _tell_record(record: bytes) -> str:
    return f"v{version_of(record)}" if record[:1] in (MISSING, b"v") else record.decode()


def tell(slot: Content, *, is_generation: bool) -> str:
    """For people to read; ids as #0, #1 ..."""
    if slot is None:
        return "absent"
    ids = [f"#{each}" for each in slot.ids] or [""]
    match slot.shape[:2]:
        case b"\xacV" if is_generation:
            return f"OPEN {ids[0]}"
        case b"\xacV":
            return f"VALUE {_tell_record(slot.shape[len(protocol.opened(BLANK)) :])} of {ids[0]}"
        case b"\xacT":
            return f"LEASE {' of '.join(ids)}"
        case b"\xacL":
            return f"LOCKED by {', '.join(ids)}"
        case b"\xacH":
            return "HOLD"
        case b"\xacF":
            return "FREE"
        case _:
            return "unreadable"
