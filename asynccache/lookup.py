"""Reading a row by a secondary key: a slot leads to the primary key, and the row is read as ever.

read U and its generation (one round trip)
  "no row has these values"      -> that is the answer
  a primary key                  -> read the row: from the cache, from another task's load, or by a SELECT
       it has these values       -> that is the answer
       it has others             -> U led astray: it becomes FREE; look again
  nothing there                  -> SELECT the row by these values: that is the answer; U becomes VALUE(its primary key)

Why nobody gets what is out of date. A row that is served was read after it was asked for, with these values in it, and
no two rows have them: whatever U may hold, it can only lead astray, and that is seen. That *no* row has them is
believed, and so is locked for: every commit locks the slots of the values that its rows have from then on. The slots of
the values that they had before need no lock; often nobody knows these, since another transaction may have changed the
row since it was loaded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from asynccache.reading import Ask, Load, Miss, ReadPath

LOOKS_MAX = 2
"""Who was led astray twice asks the database."""


class RowAsk(Ask, Protocol):
    """An ask for the row that a key has led to. Once it was served or loaded:

    matches: it is the row with the values that were asked for, as far as can be told.
    was_loaded: the database was asked for that row, be it this one or not.
    """

    @property
    def matches(self) -> bool: ...

    @property
    def was_loaded(self) -> bool: ...


class KeyAsk(Ask, Protocol):
    """An ask for the row with certain values, whose primary key is in the slot of these. Once it was served or loaded:

    row: the row that it has led to; None if it is answered: there is no such row, or it came with it.
    record: what has led there.
    """

    @property
    def row(self) -> RowAsk | None: ...

    @property
    def record(self) -> bytes: ...


LoadMisses = Callable[[Sequence[Miss], Load], Awaitable[None]]
"""`ReadPath.load`, for the session that asks."""


async def look_up(ask: KeyAsk, reads: ReadPath, load_misses: LoadMisses, load: Load) -> bool:
    """Answer this ask; False if the session is to ask the database.

    load: SELECTs the row by the values that were asked for, be it the row or its key that is missed.
    Raises what `load` raises.
    """
    looks = 0
    while looks < LOOKS_MAX:
        looks += 1
        if misses := await reads.look([ask]):
            await load_misses(misses, load)
        row = ask.row
        if row is None:
            return True
        if misses := await reads.look([row]):
            await load_misses(misses, load)
        if row.matches:
            return True
        await reads.discard(ask.slot, ask.record)
        if row.was_loaded:
            return True
    return False
