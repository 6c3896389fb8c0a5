"""What the contenders do besides being fast, found out by trying."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import event, inspect
from sqlalchemy.util import await_only

from benchmarks.contenders import Contender, Store
from benchmarks.shop import Product, counted
from benchmarks.stage import Stage

TRIES: Final = 20
TOGETHER: Final = 50
AT_COMMIT: Final = "at commit"
SOON: Final = "soon after"
BY_APPLICATION: Final = "by the application"


@dataclass(frozen=True, slots=True)
class Claims:
    """What was found true of a contender. None: it caches nothing.

    persistent: a hit is an instance of the session that asked.
    faithful: its columns have the values, and the types, that the database's driver would give.
    isolated: nobody else sees what a session does to a mutable value (JSON) that it was given.
    coalesced: misses of one key at once are one SELECT in a process.
    invalidated: who reads after a commit gets what was committed: `AT_COMMIT`, `SOON` after it, or `BY_APPLICATION`,
        which has to say so itself.
    fresh: a row that was read before a commit is not stored after it.
    """

    persistent: bool | None
    faithful: bool | None
    isolated: bool | None
    coalesced: bool | None
    invalidated: str | None
    fresh: bool | None


async def claims_of(stage: Stage, contender: Contender, pks: range) -> Claims:
    """Try it, on rows that nobody else touches."""
    stage.tell(f"what is true of {contender.name}")
    if contender.store is Store.NOWHERE:
        return Claims(True, True, True, False, None, None)
    with contender.turn():
        persistent, faithful = await _hit(contender, pks[0])
        return Claims(
            persistent,
            faithful,
            await _isolates(contender, pks[1]),
            await _coalesces(contender, pks[2]),
            await _invalidates(contender, pks[3]),
            await _stays_fresh(contender, pks[4]),
        )


async def _read(contender: Contender, pk: int) -> Any:
    async with contender.session() as session:
        found = await contender.get(session, pk)
    await contender.settle()
    return found


async def _hit(contender: Contender, pk: int) -> tuple[bool, bool]:
    async with contender.session() as session:
        real = await session.get(Product, pk, populate_existing=True)
        session.expunge_all()
    await _read(contender, pk)
    async with contender.session() as session:
        found = await contender.get(session, pk)
        persistent = isinstance(found, Product) and bool(inspect(found).persistent)
        values = found if isinstance(found, dict) else vars(found)
        faithful = all(
            values.get(column.key) == getattr(real, column.key)
            and isinstance(getattr(real, column.key), type(values.get(column.key)))
            for column in inspect(Product).column_attrs
        )
        return persistent, faithful


async def _isolates(contender: Contender, pk: int) -> bool:
    def attributes(found: Any) -> dict[str, Any]:
        values: dict[str, Any] = found["attributes"] if isinstance(found, dict) else found.attributes
        return values

    await _read(contender, pk)
    attributes(await _read(contender, pk))["colour"] = "of one session alone"
    return bool(attributes(await _read(contender, pk))["colour"] != "of one session alone")


async def _coalesces(contender: Contender, pk: int) -> bool:
    async with counted(contender.engine) as selects:
        await asyncio.gather(*(_read(contender, pk) for _ in range(TOGETHER)))
    return selects.count == 1


async def _invalidates(contender: Contender, pk: int) -> str:
    """Commit a change, and do nothing else; then read at once, and a little later."""
    seen = set[str]()
    for _ in range(TRIES):
        await _read(contender, pk)
        price = await contender.commit(pk)
        async with contender.session() as session:
            if contender.price(await contender.get(session, pk)) == price:
                seen.add(AT_COMMIT)
                continue
        await contender.settle()
        seen.add(SOON if contender.price(await _read(contender, pk)) == price else BY_APPLICATION)
        await contender.invalidate(pk)
    return next(each for each in (BY_APPLICATION, SOON, AT_COMMIT) if each in seen)


async def _stays_fresh(contender: Contender, pk: int) -> bool:
    """1. A reader misses, and has its row from the database. 2. The row is changed, committed and invalidated.
    3. The reader goes on, and stores what it has. 4. What does the next reader get?"""
    async with asyncio.timeout(30), _held_after_its_select(contender) as (selected, go_on):
        reader = asyncio.create_task(_read(contender, pk))
        await selected.wait()
        price = await contender.change(pk)
        await contender.settle()
        go_on.set()
        await reader
    return contender.price(await _read(contender, pk)) == price


@asynccontextmanager
async def _held_after_its_select(contender: Contender) -> AsyncGenerator[tuple[asyncio.Event, asyncio.Event]]:
    """The first who reads a product's row is held before it can do anything with it."""
    selected, go_on = asyncio.Event(), asyncio.Event()

    def hold(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not selected.is_set() and "FROM product" in statement:
            selected.set()
            await_only(go_on.wait())

    event.listen(contender.engine.sync_engine, "after_cursor_execute", hold)
    try:
        yield selected, go_on
    finally:
        event.remove(contender.engine.sync_engine, "after_cursor_execute", hold)
