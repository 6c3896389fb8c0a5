"""What the unit of work touches in the cache when it writes rows of a mapped class: found once for each class, since
what is asked for each flushed row has to cost next to nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Table
from sqlalchemy.orm import InstanceState, Mapper

from asynccache.orm.entity import HierarchySlots, Scope
from asynccache.orm.registry import Hierarchy, TableName, name_of
from asynccache.orm.writes import Writes, cascades, referenced_columns

Slots = frozenset[HierarchySlots]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What changes in the cache with rows of one mapped class, in one database.

    key: the attributes of the primary key.
    rows: the slots of these rows, if they are cached.
    others: the other cached hierarchies that have rows in the same tables: any of these.
    on_delete: those of which the database itself changes rows when such a row is deleted.
    on_update: the same by the attribute that gets another value.
    """

    key: tuple[str, ...] = ()
    rows: HierarchySlots | None = None
    others: Slots = frozenset()
    on_delete: Slots = frozenset()
    on_update: Mapping[str, Slots] = field(default_factory=dict)

    def note_write(self, writes: Writes, state: InstanceState[Any]) -> None:
        """An instance was inserted, updated or deleted."""
        for hierarchy in self.others:
            writes.note_hierarchy(hierarchy)
        if self.rows is None:
            return
        values = state.dict
        if state.key is None:
            writes.note_row(self.rows, tuple([values.get(name) for name in self.key]))
            return
        before = tuple(state.key[1])
        writes.note_row(self.rows, before)
        # Differs if the primary key was changed. What is expired was not; asking for it would be a SELECT.
        after = tuple([values.get(name, value) for name, value in zip(self.key, before, strict=True)])
        # The same objects, since equal ones may be different keys (1 and True).
        if not all(map(is_, after, before)):
            writes.note_row(self.rows, after)

    def note_key_update(self, writes: Writes, state: InstanceState[Any]) -> None:
        """An instance is about to be updated, and by the database maybe what refers to it."""
        if self.on_update:
            for name in self.on_update.keys() & state.committed_state.keys():
                for hierarchy in self.on_update[name]:
                    writes.note_hierarchy(hierarchy)

    def note_update(self, writes: Writes, state: InstanceState[Any]) -> None:
        """An instance was updated."""
        self.note_key_update(writes, state)
        self.note_write(writes, state)

    def note_delete(self, writes: Writes, state: InstanceState[Any]) -> None:
        """An instance was deleted, and by the database maybe what refers to it."""
        self.note_write(writes, state)
        for hierarchy in self.on_delete:
            writes.note_hierarchy(hierarchy)


NOTHING = Footprint()

Hierarchies = Mapping[TableName, frozenset[Hierarchy]]

_footprints: WeakKeyDictionary[Scope, dict[Mapper[Any], tuple[Hierarchies, int, Footprint]]] = WeakKeyDictionary()
"""A memo, for these cached hierarchies and as many tables as the metadata had."""


def footprint_of(mapper: Mapper[Any], scope: Scope, cached: Hierarchies) -> Footprint:
    """What changes with rows of a mapped class; `NOTHING` if nothing of it is cached.

    cached: the cached hierarchies that have rows in each table.
    """
    tables = [table for table in mapper.tables if isinstance(table, Table)]
    count = sum(len(table.metadata.tables) for table in tables)
    memo = _footprints.setdefault(scope, {})
    known = memo.get(mapper)
    if known is None or known[0] is not cached or known[1] != count:
        known = memo[mapper] = cached, count, _find(mapper, tables, scope, cached)
    return known[2]


def _find(mapper: Mapper[Any], tables: Iterable[Table], scope: Scope, cached: Hierarchies) -> Footprint:
    def hierarchies(names: Iterable[TableName]) -> set[Hierarchy]:
        return {each for name in names for each in cached.get(name, ())}

    def slots(names: Iterable[TableName]) -> Slots:
        return frozenset(map(scope.slots_of, hierarchies(names)))

    names = list(map(name_of, tables))
    own = Hierarchy.of(mapper)
    rows = scope.slots_of(own) if own is not None and own in hierarchies(names) else None
    on_update: dict[str, Slots] = {}
    for table in tables:
        columns = referenced_columns(table)
        if columns and (changed := slots(cascades(table, "onupdate"))):
            for attribute in mapper.column_attrs:
                if any(isinstance(column, Column) and column.name in columns for column in attribute.columns):
                    on_update[attribute.key] = on_update.get(attribute.key, frozenset()) | changed
    footprint = Footprint(
        key=tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key),
        rows=rows,
        others=slots(names) - {rows},
        on_delete=slots(name for table in tables for name in cascades(table, "ondelete")),
        on_update=on_update,
    )
    return footprint if footprint.rows or footprint.others or footprint.on_delete or footprint.on_update else NOTHING
