"""What the tasks of a history do, as an application would write it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import update

from asynccache import AsyncCachedSession, cached_get, cached_get_by, cached_get_many, cached_invalidate
from tests.simulation.fleet import ROWS, Item, Process
from tests.simulation.history import Kind, Operation

if TYPE_CHECKING:
    from tests.simulation.world import World

Perform = Callable[["World", Process, Sequence[int]], Awaitable[None]]


async def perform(world: World, process: Process, operation: Operation) -> None:
    await _PERFORM[operation.kind](world, process, operation.keys)


def _value(item: Item | None) -> int | None:
    return item.value if item is not None else None


# --------------------------------------------------------------------------------------------------------------- reads


async def _read(world: World, process: Process, session: AsyncCachedSession, key: int) -> Item | None:
    floor = world.floor(process, key)
    item = await cached_get(session, Item, key)
    world.has_read(key, _value(item), floor)
    return item


async def _get(world: World, process: Process, keys: Sequence[int]) -> None:
    for key in keys:
        async with process.sessions() as session:
            floor = world.floor(process, key)
            item = await session.get(Item, key)
            world.has_read(key, _value(item), floor)


async def _get_many(world: World, process: Process, keys: Sequence[int]) -> None:
    async with process.sessions() as session:
        floors = {key: world.floor(process, key) for key in keys}
        items = await cached_get_many(session, Item, keys)
        for key, item in items.items():
            world.has_read(key, _value(item), floors[key])


async def _get_by(world: World, process: Process, keys: Sequence[int]) -> None:
    for key in keys:
        for value in world.values_to_ask_for(key):
            async with process.sessions() as session:
                floors = {each: world.floor(process, each) for each in ROWS}
                item = await cached_get_by(session, Item, value=value)
                if item is None:
                    world.has_not_found(value, floors)
                elif item.value != value:
                    world.violate(f"row {item.id}, which has {item.value}, is given for {value}")
                else:
                    world.has_read(item.id, item.value, floors[item.id])


async def _get_connected(world: World, process: Process, keys: Sequence[int]) -> None:
    async with process.sessions() as session:
        _ = await session.connection()
        for key in keys:
            await _read(world, process, session, key)


# -------------------------------------------------------------------------------------------------------------- writes


async def _commit(world: World, process: Process, session: AsyncCachedSession) -> None:
    """Commit, and look at once: no stale row is served, not even for the moment that it takes to unlock."""
    await session.commit()
    world.acknowledged(process)
    await _get(world, process, (0,))


async def _save(world: World, process: Process, keys: Sequence[int]) -> None:
    async with process.sessions() as session:
        for key in keys:
            item = await _read(world, process, session, key)
            if item is None:
                session.add(Item(id=key, value=world.fresh_value()))
            else:
                item.value = world.fresh_value()
        await _commit(world, process, session)


async def _delete(world: World, process: Process, keys: Sequence[int]) -> None:
    async with process.sessions() as session:
        for key in keys:
            item = await _read(world, process, session, key)
            if item is not None:
                await session.delete(item)
        await _commit(world, process, session)


async def _change(world: World, session: AsyncCachedSession, key: int) -> None:
    """Change a row, and read it as its own transaction sees it."""
    value = world.fresh_value()
    result = await session.execute(update(Item).where(Item.id == key).values(value=value))
    session.expunge_all()
    if result.rowcount:  # type: ignore[attr-defined]
        item = await session.get(Item, key)
        if item is None or item.value != value:
            world.violate(f"its own change of row {key} to {value} is not seen, but {_value(item)}")


async def _update_where(world: World, process: Process, keys: Sequence[int]) -> None:
    async with process.sessions() as session:
        for key in keys:
            await _change(world, session, key)
        await _commit(world, process, session)


async def _update_all(world: World, process: Process, _: Sequence[int]) -> None:
    async with process.sessions() as session:
        await session.execute(update(Item).values(value=world.fresh_value() + Item.id))
        await _commit(world, process, session)


async def _savepoint(world: World, process: Process, keys: Sequence[int]) -> None:
    async with process.sessions() as session:
        for key in keys:
            await _change(world, session, key)
            async with session.begin_nested() as savepoint:
                await _change(world, session, key)
                await savepoint.rollback()
        await _commit(world, process, session)


async def _roll_back(world: World, process: Process, keys: Sequence[int]) -> None:
    async with process.sessions() as session:
        for key in keys:
            await _change(world, session, key)
        await session.rollback()
        for key in keys:
            await _read(world, process, session, key)


async def _write_elsewhere(world: World, process: Process, keys: Sequence[int]) -> None:
    values = world.write_elsewhere(keys)
    for key in keys:
        await process.cache.invalidate(Item, key, values={"value": values[key]}, scope=process.engine)
    world.invalidated(process, keys)


async def _write_elsewhere_in_session(world: World, process: Process, keys: Sequence[int]) -> None:
    async with process.sessions() as session:
        values = world.write_elsewhere(keys)
        for key in keys:
            cached_invalidate(session, Item, key, values={"value": values[key]})
        await session.commit()
        world.invalidated(process, keys)


# ------------------------------------------------------------------------------------------------------------- trouble


async def _evict(world: World, _: Process, keys: Sequence[int]) -> None:
    for key in keys:
        world.server.evict(world.slots[key].key.name)
        for value in world.values_to_ask_for(key):
            world.server.evict(world.processes[0].slot_of_value(value).key.name)


async def _evict_generations(world: World, _: Process, keys: Sequence[int]) -> None:
    for key in keys:
        world.server.evict(world.slots[key].generation.name)


async def _restart(world: World, _process: Process, _keys: Sequence[int]) -> None:
    world.server.restart()


async def _cut_off(world: World, process: Process, _keys: Sequence[int]) -> None:
    world.server.cut_off(process.number)


_PERFORM: Mapping[Kind, Perform] = {
    "get": _get,
    "get many": _get_many,
    "get by": _get_by,
    "get connected": _get_connected,
    "save": _save,
    "delete": _delete,
    "update where": _update_where,
    "update all": _update_all,
    "savepoint": _savepoint,
    "rollback": _roll_back,
    "foreign": _write_elsewhere,
    "foreign in session": _write_elsewhere_in_session,
    "evict": _evict,
    "evict generations": _evict_generations,
    "restart": _restart,
    "cut off": _cut_off,
}
