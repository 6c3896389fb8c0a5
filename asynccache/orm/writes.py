"""What one transaction wrote, as the slots that it must lock, and what the database changes with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import CursorResult, ForeignKey, Table
from sqlalchemy.exc import SQLAlchemyError

from asynccache.orm.entity import Scope
from asynccache.orm.keys import PrimaryKey
from asynccache.orm.registry import Hierarchy, KeyNames, Models, TableName, UniqueKey, name_of
from asynccache.orm.slots import HierarchySlots
from asynccache.orm.statements import Effect, Parameters, TableWrite
from asynccache.protocol import Slot


class Writes:
    """The slots that a transaction's changes invalidate: single rows, and beyond `slots_max` rows of a hierarchy its
    generations.

    models: knows which hierarchies have rows in a table.
    any: whether anything was written, cached or not.
    unknown: whether something was executed that may have written anything.
    """

    def __init__(self, models: Models, slots_max: int) -> None:
        self._models = models
        self._slots_max = slots_max
        self._rows: dict[HierarchySlots, set[Slot]] = {}
        self._hierarchies: set[HierarchySlots] = set()
        self._unanswered: dict[object, set[HierarchySlots]] = {}
        """By a statement whose answer will tell which rows it has touched, what it may have touched until then."""
        self.any = False
        self.unknown = False

    def slots(self) -> Iterator[Slot]:
        """What must be locked before these changes are committed."""
        for rows in self._rows.values():
            yield from rows
        for hierarchy in self._hierarchies.union(*self._unanswered.values()):
            yield from hierarchy.generations

    def cover(self, hierarchy: HierarchySlots, row: Slot) -> bool:
        """Whether the transaction may have changed this row."""
        return (
            self.unknown
            or hierarchy in self._hierarchies
            or row in self._rows.get(hierarchy, ())
            or any(hierarchy in hierarchies for hierarchies in self._unanswered.values())
        )

    def touch(self, hierarchy: HierarchySlots) -> bool:
        """Whether the transaction may have changed any row of a hierarchy."""
        return (
            self.unknown
            or hierarchy in self._hierarchies
            or hierarchy in self._rows
            or any(hierarchy in hierarchies for hierarchies in self._unanswered.values())
        )

    def add(self, other: Writes) -> None:
        """Note all that another has noted."""
        self.any = self.any or other.any
        self.unknown = self.unknown or other.unknown
        for hierarchy in other._hierarchies.union(*other._unanswered.values()):
            self.note_hierarchy(hierarchy)
        for hierarchy, rows in other._rows.items():
            self._note_rows(hierarchy, rows)

    def note_row(self, hierarchy: HierarchySlots, slot: Slot | None) -> None:
        """A row may have changed; None: which one is not known."""
        self.any = True
        if slot is None:
            self.note_hierarchy(hierarchy)
        else:
            self._note_rows(hierarchy, (slot,))

    def note_slots(self, hierarchy: HierarchySlots, slots: Sequence[Slot] | None) -> None:
        """slots: of its rows and their secondary keys; None: any."""
        self.any = True
        if slots is None:
            self.note_hierarchy(hierarchy)
        else:
            self._note_rows(hierarchy, slots)

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

    def note_effect(
        self, scope: Scope, effect: Effect, parameter_sets: Sequence[Parameters], statement: object = None
    ) -> None:
        """A statement is about to be executed.

        statement: whose answer will be noted too; None if there is no time to wait for it.
        """
        if effect.unknown:
            self.any = self.unknown = True
            for hierarchies in self._models.hierarchies().values():
                for hierarchy in hierarchies:
                    self.note_hierarchy(scope.slots_of(hierarchy))
        for write in effect.writes:
            self.any = True
            for hierarchy, columns in self._of(write.table).items():
                slots = scope.slots_of(hierarchy)
                if columns is None:
                    self.note_hierarchy(slots)
                elif (keys := _keys_of(write, columns, parameter_sets, scope)) is not None:
                    self._note_keys(slots, keys)
                elif statement is not None and write.tells(columns):
                    self._unanswered.setdefault(statement, set()).add(slots)
                else:
                    self.note_hierarchy(slots)
            for hierarchy, key in scope.models.unique_keys_in(name_of(write.table)):
                self._note_unique(scope, hierarchy, key, write, parameter_sets)
            self._note_cascades(scope, write)

    def note_answer(self, scope: Scope, effect: Effect, statement: object, result: CursorResult[Any]) -> None:
        """A statement was answered. Before, it may have touched any row."""
        unanswered = self._unanswered.pop(statement, set())
        for write in effect.writes:
            for hierarchy, columns in self._of(write.table).items():
                slots = scope.slots_of(hierarchy)
                if slots not in unanswered:
                    continue
                keys = write.told(columns, result) if columns is not None and write.tells(columns) else None
                if keys is not None:
                    self._note_keys(slots, keys)
                else:
                    self.note_hierarchy(slots)

    def _note_unique(
        self,
        scope: Scope,
        hierarchy: Hierarchy,
        key: UniqueKey,
        write: TableWrite,
        parameter_sets: Sequence[Parameters],
    ) -> None:
        """Lock the values of a secondary key that rows have from here on, so that nobody is told that no row has them.

        Those that they had before need no lock: what they lead to is looked at before it is served.
        """
        made = write.made(key.columns, parameter_sets, scope.dialect)
        slot = scope.key_slots(hierarchy, key).slot
        slots = [slot(values) for values in made if None not in values] if made is not None else [None]
        known = [each for each in slots if each is not None]
        self.note_slots(scope.slots_of(hierarchy), known if len(known) == len(slots) else None)

    @property
    def awaits_answers(self) -> bool:
        return bool(self._unanswered)

    def _note_keys(self, hierarchy: HierarchySlots, primary_keys: Iterable[PrimaryKey]) -> None:
        for primary_key in primary_keys:
            self.note_row(hierarchy, hierarchy.row(primary_key))

    def _note_cascades(self, scope: Scope, write: TableWrite) -> None:
        """The database itself may delete or update rows that refer to those that a statement deletes or updates, and
        tells nobody."""
        for name in cascades(write.table, deletes=write.deletes, updates=write.updates):
            for hierarchy in self._models.hierarchies().get(name, ()):
                self.note_hierarchy(scope.slots_of(hierarchy))

    def _of(self, table: Table) -> Mapping[Hierarchy, KeyNames]:
        return self._models.hierarchies().get(name_of(table), {})


def _keys_of(
    write: TableWrite, columns: Sequence[str], parameter_sets: Sequence[Parameters], scope: Scope
) -> list[PrimaryKey] | None:
    return write.rows.keys(columns, parameter_sets, scope.dialect) if write.rows is not None else None


# ----------------------------------------------------------------------------------------------------------- cascades

_Change = frozenset[str] | None
"""What happens to rows of a table: columns that get other values, or None: they are deleted."""

_memo: WeakKeyDictionary[Table, dict[tuple[int, bool, _Change], frozenset[TableName]]] = WeakKeyDictionary()
"""By the number of tables that the metadata had, and the arguments of `cascades`."""


def cascades(table: Table, *, deletes: bool, updates: frozenset[str] | None) -> frozenset[TableName]:
    """The tables that the database itself changes when rows of this one are deleted, or get other values: the
    transitive closure over foreign keys with an action, as far as the metadata knows them.

    updates: the names of the columns that get other values; None: any may.
    """
    memo = _memo.setdefault(table, {})
    key = (len(table.metadata.tables), deletes, updates)
    if key not in memo:
        todo: list[tuple[Table, _Change]] = [(table, None)] if deletes else []
        todo.append((table, frozenset(column.name for column in table.columns) if updates is None else updates))
        memo[key] = frozenset(map(name_of, _closure(todo)))
    return memo[key]


def _closure(todo: list[tuple[Table, _Change]]) -> set[Table]:
    """What follows from these changes. A delete goes on as a delete (CASCADE) or as an update (SET NULL, SET DEFAULT),
    an update as an update of the columns that refer to it."""
    seen: set[tuple[Table, _Change]] = set()
    found: set[Table] = set()
    while todo:
        table, change = todo.pop()
        for child in table.metadata.tables.values():
            for key in child.foreign_keys:
                targets = _target_columns(key, table)
                action = (key.ondelete if change is None else key.onupdate) or ""
                if action.upper() not in _ACTIONS or not (targets if change is None else targets & change):
                    continue
                found.add(child)
                deleted = change is None and action.upper() == "CASCADE"
                follows = (child, None if deleted else frozenset({key.parent.name}))
                if follows not in seen:
                    seen.add(follows)
                    todo.append(follows)
    return found


_ACTIONS = frozenset({"CASCADE", "SET NULL", "SET DEFAULT"})


def _target_columns(key: ForeignKey, table: Table) -> set[str]:
    try:
        return {key.column.name} if key.references(table) else set()
    except SQLAlchemyError:  # refers to a table that the metadata does not have: perhaps this one, of another metadata
        return {column.name for column in table.columns}
