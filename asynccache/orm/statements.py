"""Which tables, and which rows of them, a statement writes; found once per compiled statement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Table
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.compiler import Compiled, SQLCompiler
from sqlalchemy.sql.dml import Delete, Insert, Update, UpdateBase
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList
from sqlalchemy.types import TypeDecorator

Parameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PrimaryKeys:
    """Where a statement's parameters tell the primary keys of the rows that it writes: a name for each column of
    the key.

    expanding: the one parameter is the list of an IN.
    """

    names: tuple[str, ...]
    expanding: bool = False

    def values(self, parameter_sets: Sequence[Parameters]) -> list[tuple[Any, ...]] | None:
        """The primary keys, or None if a parameter is not there."""
        found = []
        for parameters in parameter_sets:
            if self.expanding:
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
    """The values of the list that an IN was expanded to: `name_1`, `name_2` and so on."""
    if name in parameters:
        value = parameters[name]
        return list(value) if isinstance(value, (list, tuple, set, frozenset)) else None
    expanded = re.compile(re.escape(name) + r"_\d+")
    values = [value for key, value in parameters.items() if expanded.fullmatch(key)]
    return values or None


@dataclass(frozen=True, slots=True)
class TableWrite:
    """A table that a statement writes.

    primary_keys: how to find the rows, if the statement names them all.
    deletes: it may delete rows, and the database those that refer to them.
    updates: the names of the columns that it may set in rows that were there before; None: any.
    """

    table: Table
    primary_keys: PrimaryKeys | None = None
    deletes: bool = False
    updates: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """What a statement does to what the cache holds.

    unknown: it is not understood, and may have written anything.
    commits: it is a COMMIT that the application has written itself.
    changes_settings: it may have changed what later statements of its transaction see (isolation, search path, role).
    """

    writes: tuple[TableWrite, ...] = ()
    unknown: bool = False
    commits: bool = False
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
    if (
        isinstance(statement, UpdateBase)
        and found == [statement]
        and isinstance(statement.table, Table)
        and isinstance(compiled, SQLCompiler)
    ):
        return Effect((_table_write(statement, statement.table, compiled),))
    writes = []
    for each in found:
        tables = [part for part in visitors.iterate(each.table) if isinstance(part, Table)]
        if not tables:
            return UNKNOWN
        writes += [TableWrite(table, deletes=not isinstance(each, Update)) for table in tables]
    return Effect(tuple(writes))


def _table_write(statement: UpdateBase, table: Table, compiled: SQLCompiler) -> TableWrite:
    primary_keys = _primary_keys(statement, table, compiled)
    if isinstance(statement, Update):
        return TableWrite(table, primary_keys, updates=_columns_set(statement, compiled))
    if isinstance(statement, Insert):
        updates = None if _touches_other_rows(statement) else frozenset[str]()
        return TableWrite(table, primary_keys, deletes=bool(statement._prefixes), updates=updates)
    return TableWrite(table, primary_keys, deletes=True, updates=frozenset())


def _primary_keys(statement: UpdateBase, table: Table, compiled: SQLCompiler) -> PrimaryKeys | None:
    """The parameters that hold the primary keys of all rows that a statement can touch, if it says so itself."""
    columns = list(table.primary_key)
    if not columns:
        return None
    if isinstance(statement, Insert):
        # The rows of INSERT FROM SELECT are in no parameters; in a list of VALUES these have other names.
        if _touches_other_rows(statement) or statement.select is not None or statement._multi_values:
            return None
        return PrimaryKeys(tuple(column.key for column in columns))
    if not isinstance(statement, (Update, Delete)):
        return None
    if isinstance(statement, Update) and any(column.name in _columns_set(statement, compiled) for column in columns):
        return None  # rows move to other keys
    pinned = _pinned_columns(statement.whereclause, table)
    names = []
    for column in columns:
        parameter = pinned.get(column.key)
        if parameter is None or (parameter.expanding and len(columns) > 1):
            return None
        if isinstance(parameter.type, TypeDecorator):
            return None  # may send another value than this one
        names.append(compiled.bind_names.get(parameter, parameter.key))
    return PrimaryKeys(tuple(names), expanding=any(pinned[column.key].expanding for column in columns))


def _touches_other_rows(statement: Insert) -> bool:
    """Whether an INSERT may change rows that were there before: an upsert, or INSERT OR REPLACE."""
    return statement._post_values_clause is not None or bool(statement._prefixes)


def _columns_set(statement: Update, compiled: SQLCompiler) -> frozenset[str]:
    """The names of the columns that an UPDATE sets, and maybe more.

    `_values` and `_ordered_values` are where SQLAlchemy keeps what `values()` was given; a bulk UPDATE by primary key,
    and one whose values come with the execution, name their columns in the parameters instead.
    """
    given = {**(statement._values or {}), **dict(getattr(statement, "_ordered_values", None) or ())}
    names = {column.key: column.name for column in statement.table.columns}
    keys = {str(getattr(target, "key", target)) for target in given} | set(compiled.params)
    return frozenset(names.get(key, key) for key in keys)


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

_BEFORE_FIRST_WORD = re.compile(r"\A(?:[\s(]+|--[^\n]*\n|/\*(?:(?!/\*).)*?\*/)+", re.DOTALL)
"""Parentheses and comments; not such with a comment inside, which end in one place for PostgreSQL and in another for
SQLite."""

_READS = re.compile(r"(?:select|show|values|table|explain|with)\b", re.IGNORECASE)
_WRITES = re.compile(r"\b(?:insert|update|delete|merge|into|truncate)\b", re.IGNORECASE)
_COMMITS = re.compile(r"(?:commit|end)\b(?!\s+prepared)", re.IGNORECASE)
_SETTINGS = re.compile(r"(?:set|reset|discard|pragma)\b", re.IGNORECASE)
_MORE_THAN_ONE = re.compile(r";\s*\S")
"""Some drivers execute many statements that come in one string."""

_SETS_CONFIG = re.compile(r"\bset_config\b", re.IGNORECASE)
"""PostgreSQL's SET as a function, which row-level security is usually told its tenant by."""

_HARMLESS = re.compile(
    r"(?:savepoint|release|rollback\s+to|prepare\s+transaction|lock|listen|unlisten|notify)\b", re.IGNORECASE
)


def _effect_of_text(sql: str) -> Effect:
    """Judge SQL by its first word: reads, settings, and what does nothing to rows. All else may write anything.

    A SELECT is taken for a read, although it may call a function that writes.
    """
    sql = _BEFORE_FIRST_WORD.sub("", sql)
    if _MORE_THAN_ONE.search(sql):
        return Effect(unknown=True, changes_settings=True)
    if match := _READS.match(sql):
        if match[0].lower() in ("with", "explain") and _WRITES.search(sql):
            return UNKNOWN
        return Effect(changes_settings=True) if _SETS_CONFIG.search(sql) else NOTHING
    if _HARMLESS.match(sql):
        return NOTHING
    if _COMMITS.match(sql):
        return Effect(commits=True)
    return Effect(changes_settings=True) if _SETTINGS.match(sql) else UNKNOWN
