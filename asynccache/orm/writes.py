"""What one transaction wrote, as the slots that it must lock, and what the database changes with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

from sqlalchemy import ForeignKey, Table
from sqlalchemy.exc import SQLAlchemyError

from asynccache.orm.entity import HierarchySlots, PrimaryKey, Scope
from asynccache.orm.registry import Hierarchy, TableName, name_of
from asynccache.orm.statements import Effect, Parameters, TableWrite
from asynccache.protocol import Slot


class Writes:
    """The slots that a transaction's changes invalidate: single rows, and beyond `slots_max` rows of a hierarchy its
    generations.

    any: whether anything was written, cached or not.
    unknown: whether something was executed that may have written anything.
    """

    def __init__(self, hierarchies: Mapping[TableName, frozenset[Hierarchy]], slots_max: int) -> None:
        self._known = hierarchies
        self._slots_max = slots_max
        self._rows: dict[HierarchySlots, set[Slot]] = {}
        self._hierarchies: set[HierarchySlots] = set()
        self.any = False
        self.unknown = False

    def slots(self) -> Iterator[Slot]:
        """What must be locked before these changes are committed."""
        for rows in self._rows.values():
            yield from rows
        for hierarchy in self._hierarchies:
            yield from hierarchy.generations

    def cover(self, hierarchy: HierarchySlots, row: Slot) -> bool:
        """Whether the transaction may have changed this row."""
        return self.unknown or hierarchy in self._hierarchies or row in self._rows.get(hierarchy, ())

    def add(self, other: Writes) -> None:
        """Note all that another has noted."""
        self.any = self.any or other.any
        self.unknown = self.unknown or other.unknown
        for hierarchy in other._hierarchies:
            self.note_hierarchy(hierarchy)
        for hierarchy, rows in other._rows.items():
            self._note_rows(hierarchy, rows)

    def note_row(self, hierarchy: HierarchySlots, primary_key: PrimaryKey) -> None:
        self.any = True
        if hierarchy in self._hierarchies:
            return
        slot = hierarchy.row(primary_key)
        if slot is None:
            self.note_hierarchy(hierarchy)
        else:
            self._note_rows(hierarchy, (slot,))

    def _note_rows(self, hierarchy: HierarchySlots, slots: Iterable[Slot]) -> None:
        if hierarchy not in self._hierarchies:
            rows = self._rows.setdefault(hierarchy, set())
            rows.update(slots)
            if len(rows) > self._slots_max:
                self.note_hierarchy(hierarchy)

    def note_hierarchy(self, hierarchy: HierarchySlots) -> None:
        """Any row of it may have changed."""
        self.any = True
        self._hierarchies.add(hierarchy)
        self._rows.pop(hierarchy, None)

    def note_cascades(self, scope: Scope, table: Table, rule: Rule) -> None:
        """Rows of this table were deleted, or their keys updated: the database may do the same to rows that refer
        to them, and tells nobody."""
        for name in cascades(table, rule):
            for hierarchy in self._known.get(name, ()):
                self.note_hierarchy(scope.slots_of(hierarchy))

    def note_effect(self, scope: Scope, effect: Effect, parameter_sets: Sequence[Parameters]) -> None:
        """A statement was executed that the unit of work did not make."""
        if effect.unknown:
            self.any = self.unknown = True
            for hierarchies in self._known.values():
                for hierarchy in hierarchies:
                    self.note_hierarchy(scope.slots_of(hierarchy))
        for write in effect.writes:
            self.any = True
            self._note_table_write(scope, write, parameter_sets)
            if write.deletes:
                self.note_cascades(scope, write.table, "ondelete")
            if write.updates is None or write.updates & referenced_columns(write.table):
                self.note_cascades(scope, write.table, "onupdate")

    def _note_table_write(self, scope: Scope, write: TableWrite, parameter_sets: Sequence[Parameters]) -> None:
        rows = write.primary_keys.values(parameter_sets) if write.primary_keys is not None else None
        for hierarchy in self._of(write.table):
            slots = scope.slots_of(hierarchy)
            # Another `Table` of that name may give the key's columns in another order.
            key = tuple(column.name for column in write.table.primary_key)
            if rows is None or (name_of(write.table), key) != (hierarchy.table, hierarchy.primary_key):
                self.note_hierarchy(slots)
            else:
                for primary_key in rows:
                    self.note_row(slots, primary_key)

    def _of(self, table: object) -> frozenset[Hierarchy]:
        return self._known.get(name_of(table), frozenset()) if isinstance(table, Table) else frozenset()


# ----------------------------------------------------------------------------------------------------------- cascades

Rule = Literal["ondelete", "onupdate"]

_ACTIONS = frozenset({"CASCADE", "SET NULL", "SET DEFAULT"})

_cascades: WeakKeyDictionary[Table, dict[tuple[Rule, int], frozenset[TableName]]] = WeakKeyDictionary()
_referenced: WeakKeyDictionary[Table, tuple[int, frozenset[str]]] = WeakKeyDictionary()
"""Memos, by the number of tables that the metadata had."""


def cascades(table: Table, rule: Rule) -> frozenset[TableName]:
    """The tables that the database itself changes when rows of this one are deleted, or get other keys: the transitive
    closure over foreign keys with an action, as far as the metadata knows them."""
    memo = _cascades.setdefault(table, {})
    key = (rule, len(table.metadata.tables))
    if key not in memo:
        memo[key] = frozenset(map(name_of, _closure(table, rule)))
    return memo[key]


def referenced_columns(table: Table) -> frozenset[str]:
    """The names of the columns whose new values the database itself copies into rows that refer to them."""
    tables = len(table.metadata.tables)
    memo = _referenced.get(table)
    if memo is None or memo[0] != tables:
        children = table.metadata.tables.values()
        keys = (key for child in children for key in child.foreign_keys if _has_action(key, "onupdate"))
        memo = _referenced[table] = tables, frozenset[str]().union(*(_target_columns(key, table) for key in keys))
    return memo[1]


def _closure(table: Table, rule: Rule) -> set[Table]:
    found: set[Table] = set()
    todo = [table]
    while todo:
        parent = todo.pop()
        for child in parent.metadata.tables.values():
            if child not in found and _follows(child, parent, rule):
                found.add(child)
                todo.append(child)
    return found


def _follows(child: Table, parent: Table, rule: Rule) -> bool:
    return any(_has_action(key, rule) and _target_columns(key, parent) for key in child.foreign_keys)


def _has_action(key: ForeignKey, rule: Rule) -> bool:
    return (getattr(key, rule) or "").upper() in _ACTIONS


def _target_columns(key: ForeignKey, table: Table) -> set[str]:
    try:
        return {key.column.name} if key.references(table) else set()
    except SQLAlchemyError:  # refers to a table that the metadata does not have: perhaps this one, of another metadata
        return {column.name for column in table.columns}
