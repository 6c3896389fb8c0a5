"""Which tables, and which rows of them, a statement writes; found once per compiled statement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Table
from sqlalchemy.engine.interfaces import Compiled
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import Delete, Insert, Update, UpdateBase
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList

Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PrimaryKeys:
    """Where a statement's parameters tell the primary keys of the rows that it writes: a name for each column of
    the key."""

    names: tuple[str, ...]

    def values(self, parameter_sets: Sequence[Parameters]) -> list[tuple[Any, ...]] | None:
        """The primary keys, or None if a parameter is not there."""
        found = []
        for parameters in parameter_sets:
            if len(self.names) == 1:
                values = _expanded(parameters, self.names[0])
                if values is None:
                    return None
                found += [(value,) for value in values]
            elif all(name in parameters for name in self.names):
                found.append(tuple(parameters[name] for name in self.names))
            else:
                return None
        return found


def _expanded(parameters: Parameters, name: str) -> Sequence[Any] | None:
    """The values of one parameter, or of the list that an IN was expanded to: `name_1`, `name_2` and so on."""
    if name in parameters:
        value = parameters[name]
        return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    expanded = re.compile(re.escape(name) + r"_\d+")
    values = [value for key, value in parameters.items() if expanded.fullmatch(key)]
    return values or None


@dataclass(frozen=True, slots=True)
class TableWrite:
    """A table that a statement writes.

    primary_keys: how to find the rows, if the statement names them all.
    kind: the class of the statement, which tells what the database may do to other tables.
    """

    table: Table
    kind: type[UpdateBase]
    primary_keys: PrimaryKeys | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """What a statement does to what the cache holds.

    unknown: it is not understood, and may have written anything.
    changes_settings: it may have changed what later statements of its transaction see (isolation, search path, role).
    """

    writes: tuple[TableWrite, ...] = ()
    unknown: bool = False
    changes_settings: bool = False

    @property
    def writes_something(self) -> bool:
        return bool(self.writes) or self.unknown


NOTHING = Effect()
UNKNOWN = Effect(unknown=True)

_effects: WeakKeyDictionary[Compiled, Effect] = WeakKeyDictionary()
"""A memo and no more: SQLAlchemy keeps compiled statements in its own cache, and drops them with it."""


def effect_of(compiled: Compiled | None, sql: str) -> Effect:
    """What a statement that is about to be executed will do.

    compiled: None for SQL that was given as a string (`exec_driver_sql`).
    """
    if compiled is None:
        return _effect_of_text(sql)
    effect = _effects.get(compiled)
    if effect is None:
        effect = _effects[compiled] = _analyse(compiled, sql)
    return effect


def _analyse(compiled: Compiled, sql: str) -> Effect:
    statement = compiled.statement
    if statement is None:
        return _effect_of_text(sql)
    found = [each for each in visitors.iterate(statement) if isinstance(each, UpdateBase)]
    if not found:
        return _effect_of_text(sql)
    if isinstance(statement, UpdateBase) and found == [statement] and isinstance(statement.table, Table):
        keys = _primary_keys(statement, statement.table, compiled)
        return Effect((TableWrite(statement.table, type(statement), keys),))
    writes = []
    for each in found:
        tables = [part for part in visitors.iterate(each.table) if isinstance(part, Table)]
        if not tables:
            return UNKNOWN
        writes += [TableWrite(table, type(each)) for table in tables]
    return Effect(tuple(writes))


def _primary_keys(statement: UpdateBase, table: Table, compiled: Compiled) -> PrimaryKeys | None:
    """The parameters that hold the primary keys of all rows that a statement can touch, if it says so itself."""
    columns = list(table.primary_key)
    if not columns or not isinstance(compiled, SQLCompiler):
        return None
    if isinstance(statement, Insert):
        # An upsert, or INSERT FROM SELECT, touches rows that its parameters do not name; in a list of VALUES the
        # parameters have other names.
        if statement._post_values_clause is not None or statement.select is not None or statement._multi_values:
            return None
        return PrimaryKeys(tuple(column.key for column in columns))
    if not isinstance(statement, (Update, Delete)):
        return None
    if isinstance(statement, Update) and _sets_any(statement, compiled, columns):
        return None
    pinned = _pinned_columns(statement.whereclause, table)
    names = []
    for column in columns:
        parameter = pinned.get(column.key)
        if parameter is None or (parameter.expanding and len(columns) > 1):
            return None
        names.append(compiled.bind_names.get(parameter, parameter.key))
    return PrimaryKeys(tuple(names))


def _sets_any(statement: Update, compiled: SQLCompiler, columns: Sequence[ColumnElement[Any]]) -> bool:
    """Whether an UPDATE moves rows to another primary key.

    `_values` and `_ordered_values` are where SQLAlchemy keeps what `values()` was given; a bulk UPDATE by primary key,
    and one whose values come with the execution, name their columns in the parameters instead.
    """
    given = {**(statement._values or {}), **dict(getattr(statement, "_ordered_values", None) or ())}
    names = {str(getattr(target, "key", target)) for target in given} | set(compiled.params)
    return any(column.key in names for column in columns)


def _pinned_columns(where: ColumnElement[Any] | None, table: Table) -> dict[str, BindParameter[Any]]:
    """Columns of the table that the WHERE clause binds to parameters, by `=` or `IN`, in all rows."""
    if where is None:
        return {}
    conjuncts = where.clauses if isinstance(where, BooleanClauseList) and where.operator is operators.and_ else (where,)
    pinned: dict[str, BindParameter[Any]] = {}
    for each in conjuncts:
        if not isinstance(each, BinaryExpression) or each.operator not in (operators.eq, operators.in_op):
            continue
        owner = getattr(each.left, "table", None)
        # An alias of the same table is another set of rows, and not a Table.
        if isinstance(owner, Table) and owner.fullname == table.fullname and isinstance(each.right, BindParameter):
            pinned[str(each.left.key)] = each.right
    return pinned


# --------------------------------------------------------------------------------------------------------------- text

_COMMENTS = re.compile(r"\A(?:\s+|--[^\n]*\n|/\*.*?\*/)+", re.DOTALL)
_READS = re.compile(r"(?:select|show|values|table|explain|with)\b", re.IGNORECASE)
_WRITES = re.compile(r"\b(?:insert|update|delete|merge|into|truncate)\b", re.IGNORECASE)
_SETTINGS = re.compile(r"(?:set|reset|discard|pragma)\b", re.IGNORECASE)
_HARMLESS = re.compile(r"(?:savepoint|release|rollback\s+to|lock|listen|unlisten|notify)\b", re.IGNORECASE)


def _effect_of_text(sql: str) -> Effect:
    """Judge SQL by its first word: reads, settings, and what does nothing to rows. All else may write anything.

    A SELECT is taken for a read, although it may call a function that writes.
    """
    sql = _COMMENTS.sub("", sql)
    if match := _READS.match(sql):
        return UNKNOWN if match[0].lower() in ("with", "explain") and _WRITES.search(sql) else NOTHING
    if _HARMLESS.match(sql):
        return NOTHING
    return Effect(changes_settings=True) if _SETTINGS.match(sql) else UNKNOWN
