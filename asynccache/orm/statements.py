"""Which tables, and which rows of them, a statement writes; found once per compiled statement."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import ClauseElement, Column, ColumnElement, CursorResult, Dialect, Table
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.compiler import Compiled, SQLCompiler
from sqlalchemy.sql.dml import Delete, Insert, Update, UpdateBase
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList
from sqlalchemy.types import TypeDecorator, TypeEngine

from asynccache.orm.column_types import own_processors
from asynccache.orm.keys import sent

Parameters = Mapping[str, Any]


class Parameter(NamedTuple):
    """A parameter of a statement that holds the value of a column.

    type: makes another value of it, which is what is sent; None if it is sent as it is.
    """

    name: str
    type: TypeDecorator[Any] | None


@dataclass(frozen=True, slots=True)
class NamedRows:
    """How a statement's parameters name all rows that it touches.

    rows: by a column's name, the parameter that holds its value in these rows; one such, or one for each row of VALUES.
    expanding: the column whose parameter is the list of an IN, if there is one.
    new: for columns that the statement gives another value, the parameter that holds it; None if none does.
    nulls: columns that are NULL in these rows, since nothing gives them a value.
    """

    rows: Sequence[Mapping[str, Parameter]]
    expanding: str | None = None
    new: Mapping[str, Parameter | None] = field(default_factory=dict)
    nulls: frozenset[str] = frozenset()

    def keys(
        self, columns: Sequence[str], parameter_sets: Sequence[Parameters], dialect: Dialect
    ) -> list[tuple[Any, ...]] | None:
        """The rows' values of these columns as they are sent, before the statement and after it; None if they are not
        all told."""
        found: list[tuple[Any, ...]] = []
        moves = any(column in self.new for column in columns)
        for parameters in parameter_sets:
            for row in self.rows:
                before = [self._values(column, row.get(column), parameters, dialect) for column in columns]
                if any(values is None for values in before):
                    return None
                found += product(*(values or () for values in before))
                if moves:
                    after = [
                        self._values(column, self.new[column], parameters, dialect) if column in self.new else values
                        for column, values in zip(columns, before, strict=True)
                    ]
                    if any(values is None for values in after):
                        return None
                    found += product(*(values or () for values in after))
        return found

    def after(
        self, columns: Sequence[str], parameter_sets: Sequence[Parameters], dialect: Dialect
    ) -> list[tuple[Any, ...]] | None:
        """The same after the statement alone."""
        found: list[tuple[Any, ...]] = []
        for parameters in parameter_sets:
            for row in self.rows:
                values: list[Sequence[Any]] = []
                for column in columns:
                    parameter = self.new[column] if column in self.new else row.get(column)
                    is_null = column in self.nulls and column not in self.new
                    told = (None,) if is_null else self._values(column, parameter, parameters, dialect)
                    if told is None:
                        return None
                    values.append(told)
                found += product(*values)
        return found

    def _values(
        self, column: str, parameter: Parameter | None, parameters: Parameters, dialect: Dialect
    ) -> Sequence[Any] | None:
        if parameter is None:
            return None
        name, type_ = parameter
        if column == self.expanding and parameter != self.new.get(column):
            values = _expanded(parameters, name)
        else:
            values = [parameters[name]] if name in parameters else None
        if type_ is None or values is None:
            return values
        try:
            return [sent(type_, value, dialect) for value in values]
        except Exception:  # of the decorator's own code, which SQLAlchemy meets in its turn
            return None


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

    rows: how to find the rows, if the statement names them all.
    inserts: it inserts rows.
    deletes: it may delete rows, and the database those that refer to them.
    updates: the names of the columns that it may set in rows that were there before; None: any.
    returned: by their names, where columns of all rows that it touches are in the rows of its answer.
    generates: its answer tells the primary key of each row that it inserts.
    """

    table: Table
    rows: NamedRows | None = None
    inserts: bool = False
    deletes: bool = False
    updates: frozenset[str] | None = None
    returned: Mapping[str, int] = field(default_factory=dict)
    generates: bool = False

    def made(
        self, columns: Sequence[str], parameter_sets: Sequence[Parameters], dialect: Dialect
    ) -> list[tuple[Any, ...]] | None:
        """The values that rows have in these columns since the statement, as they are sent; None if they are not all
        told."""
        if self.updates is not None and self.updates.isdisjoint(columns) and not self.inserts:
            return []
        return self.rows.after(columns, parameter_sets, dialect) if self.rows is not None else None

    def tells(self, columns: Iterable[str]) -> bool:
        """Whether its answer may tell the values of these columns in all rows that it has touched."""
        wanted = set(columns)
        return wanted <= (
            {column.name for column in self.table.primary_key} if self.generates else self.returned.keys()
        )

    def told(self, columns: Sequence[str], result: CursorResult[Any]) -> list[tuple[Any, ...]] | None:
        """What its answer tells of these columns, or None."""
        places = self.returned
        rows = _answered_rows(result) if not self.generates else _inserted_keys(result)
        if rows is None:
            return None
        if self.generates:
            places = {column.name: place for place, column in enumerate(self.table.primary_key)}
        found = [tuple([row[places[column]] for column in columns]) for row in rows]
        return None if any(value is None for key in found for value in key) else found


@dataclass(frozen=True, slots=True)
class Effect:
    """What a statement does to what the cache holds.

    unknown: it is not understood, and may have written anything.
    commits: it is a COMMIT that the application has written itself.
    changes_settings: it may have changed what later statements of its transaction see (isolation, search path, role).
    settings_last: the same for the next transactions on its connection, unless its parameters tell otherwise.
    """

    writes: tuple[TableWrite, ...] = ()
    unknown: bool = False
    commits: bool = False
    changes_settings: bool = False
    settings_last: bool = False

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
    writes: list[TableWrite] = []
    for each in found:
        if isinstance(each.table, Table) and isinstance(compiled, SQLCompiler):
            writes.append(_table_write(each, each.table, compiled))
            continue
        tables = [part for part in visitors.iterate(each.table) if isinstance(part, Table)]
        if not tables:
            return UNKNOWN
        writes += [TableWrite(table, deletes=not isinstance(each, Update)) for table in tables]
    return Effect(tuple(writes))


def _table_write(statement: UpdateBase, table: Table, compiled: SQLCompiler) -> TableWrite:
    is_whole = statement is compiled.statement  # and not a common table expression, which has no answer of its own
    returned = _returned_columns(table, compiled) if is_whole else {}
    if isinstance(statement, Update):
        params = _names_of_parameters(compiled) if is_whole else frozenset[str]()
        updates = _columns_set(statement, params)
        if not updates:
            return TableWrite(table)
        rows = _pinned_rows(statement.whereclause, table, compiled)
        if rows is not None:
            keys = {column.name: _parameter(column.key, compiled) for column in table.columns}
            # This name of a parameter is SQLAlchemy's own for the value that a column is set to. Where that is an
            # expression or a parameter of the user's, the WHERE clause may have one of this name.
            named = params - {_key_of(target) for target, value in _given(statement).items() if not _is_literal(value)}
            new = {name: key if (key := keys[name]) and key.name in named else None for name in updates & keys.keys()}
            rows = NamedRows(rows.rows, rows.expanding, new)
        # RETURNING tells where rows went to, and not where they were.
        returned = {name: place for name, place in returned.items() if name not in updates}
        return TableWrite(table, rows, updates=updates, returned=returned)
    if isinstance(statement, Insert):
        return _insert(statement, table, compiled, returned, is_whole=is_whole)
    if isinstance(statement, Delete):
        rows = _pinned_rows(statement.whereclause, table, compiled)
        return TableWrite(table, rows, deletes=True, updates=frozenset(), returned=returned)
    return TableWrite(table, deletes=True)


def _names_of_parameters(compiled: SQLCompiler) -> frozenset[str]:
    """The keys of `compiled.params`, which would ask for values: those of a `bindparam(callable_=...)` are made anew
    for whoever asks."""
    escaped = compiled.escaped_bind_names
    return frozenset([escaped.get(name, name) for name in compiled.bind_names.values()])


def _insert(
    statement: Insert, table: Table, compiled: SQLCompiler, returned: Mapping[str, int], *, is_whole: bool
) -> TableWrite:
    if statement._prefixes:  # OR REPLACE deletes what stands in its way, whatever its key
        return TableWrite(table, deletes=True)
    updates = _columns_upserted(statement, table)
    if updates is None:
        return TableWrite(table)
    if updates:  # the row that it updates instead may have had other values
        returned = {name: place for name, place in returned.items() if name not in updates}
    rows = _inserted_rows(statement, table, compiled) if is_whole else None
    key = [column.key for column in table.primary_key]
    generates = (
        is_whole
        and not any(isinstance(column.type, TypeDecorator) for column in table.primary_key)
        and statement._post_values_clause is None
        and rows is not None
        and len(rows.rows) == 1
        and not statement._returning
        # A key that an SQL expression makes is told by some databases, and mistaken by others.
        and _names_of_parameters(compiled).issuperset(
            {_key_of(each) for each in statement._values or {}}.intersection(key)
        )
    )
    if statement._post_values_clause is not None and not _conflicts_in_key(statement, table):
        rows = None
    elif rows is not None and updates:
        rows = replace(rows, new=dict.fromkeys(updates))
    return TableWrite(table, rows, inserts=True, updates=updates, returned=returned, generates=generates)


def _inserted_rows(statement: Insert, table: Table, compiled: SQLCompiler) -> NamedRows | None:
    if statement.select is not None:
        return None
    rows = [""]
    if statement._multi_values:
        rows = [f"_m{row}" for row in range(sum(len(values) for values in statement._multi_values))]
    expressions = {_key_of(each) for each, value in (statement._values or {}).items() if not _is_literal(value)}
    named = [
        {
            column.name: parameter
            for column in table.columns
            if (parameter := _parameter(column.key + row, compiled)) is not None
        }
        for row in rows
    ]
    # What the values of several rows are made of is in no one place.
    nulls = frozenset(
        column.name
        for column in (table.columns if rows == [""] else ())
        if _has_no_default(column) and column.key not in expressions and column.key not in compiled.binds
    )
    return NamedRows(tuple(named), nulls=nulls)


def _has_no_default(column: Column[Any]) -> bool:
    """Whether a column is NULL in rows that are inserted without it, as far as the metadata knows."""
    return bool(column.nullable) and column.default is None and column.server_default is None


def _columns_upserted(statement: Insert, table: Table) -> frozenset[str] | None:
    """The columns that an INSERT may set in a row that was there before; None: perhaps all."""
    clause = statement._post_values_clause
    if clause is None or type(clause).__name__ == "OnConflictDoNothing":
        return frozenset()
    values = getattr(clause, "update_values_to_set", None)
    if values is None:
        return None
    names = {column.key: column.name for column in table.columns}
    return frozenset(names.get(key, key) for key in map(_key_of, dict(values)))


def _conflicts_in_key(statement: Insert, table: Table) -> bool:
    """Whether the row that an upsert finds in its place has the primary key that it was to insert."""
    clause: Any = statement._post_values_clause
    if type(clause).__name__ == "OnConflictDoNothing":
        return True
    if clause.inferred_target_whereclause is not None:
        return False
    target = {_key_of(element) for element in clause.inferred_target_elements or ()}
    key = list(table.primary_key)
    return bool(key) and target in ({column.key for column in key}, {column.name for column in key})


def _returned_columns(table: Table, compiled: SQLCompiler) -> dict[str, int]:
    found: dict[str, int] = {}
    for place, entry in enumerate(compiled._result_columns):
        for each in entry.objects:
            owner = getattr(each, "table", None)
            if isinstance(each, Column) and isinstance(owner, Table) and owner.fullname == table.fullname:
                found.setdefault(each.name, place)
    return found


def _inserted_keys(result: CursorResult[Any]) -> Sequence[Any] | None:
    """The primary key of each row that was inserted, if they are all known."""
    keys = result.inserted_primary_key_rows
    complete = len(keys) == len(result.context.compiled_parameters) and all(key is not None for key in keys)
    return keys if complete else None


def _answered_rows(result: CursorResult[Any]) -> Sequence[Any] | None:
    """The rows of RETURNING, if they are here by now, without fetching those that are the application's to fetch.

    asyncio drivers have them all, unless they were asked to stream. They are as the driver gives them; what is not just
    of its column's type is taken for no key.
    """
    context: Any = result.context
    if not context._is_explicit_returning:  # SQLAlchemy has asked for them, and fetched them
        fetched: Sequence[Any] | None = result.returned_defaults_rows
        return fetched
    if context._insertmanyvalues_rows is not None:
        return list(context._insertmanyvalues_rows)
    if getattr(context.cursor, "server_side", True):
        return None
    rows = getattr(context.cursor, "_rows", None)
    return None if rows is None else list(rows)


def _key_of(target: object) -> str:
    """A column's key, as the places where statements keep their values have it: columns, attributes or strings."""
    return str(getattr(target, "key", target))


def _columns_set(statement: Update, params: frozenset[str]) -> frozenset[str]:
    """The names of the columns that an UPDATE sets, and maybe more.

    params: the names of the parameters that its values may come with.

    A bulk UPDATE by primary key, and one whose values come with the execution, name their columns in the parameters.
    """
    names = {column.key: column.name for column in statement.table.columns}
    return frozenset(names.get(key, key) for key in {*map(_key_of, _given(statement)), *params})


def _given(statement: Update) -> Mapping[Any, Any]:
    """What `values()` was given, by where SQLAlchemy keeps it."""
    return {**(statement._values or {}), **dict(getattr(statement, "_ordered_values", None) or ())}


def _is_literal(value: object) -> bool:
    """Whether this is a plain value, for which SQLAlchemy makes a parameter of its own."""
    return value.unique if isinstance(value, BindParameter) else not isinstance(value, ClauseElement)


def _parameter(name: str, compiled: SQLCompiler) -> Parameter | None:
    """A parameter by its name, if there is one, and it is told what is sent for it."""
    bound = compiled.binds.get(name)
    return _as_sent(name, bound.type) if bound is not None else None


def _as_sent(name: str, type_: TypeEngine[Any]) -> Parameter | None:
    if type_._has_bind_expression or own_processors(type_):  # nobody can tell
        return None
    return Parameter(name, type_ if isinstance(type_, TypeDecorator) else None)


def _pinned_rows(where: ColumnElement[Any] | None, table: Table, compiled: SQLCompiler) -> NamedRows | None:
    pinned = _pinned_columns(where, table)
    row: dict[str, Parameter] = {}
    expanding: str | None = None
    for name, parameter in pinned.items():
        sent_as = _as_sent(compiled.bind_names.get(parameter, parameter.key), parameter.type)
        if sent_as is None or (parameter.expanding and expanding is not None):
            continue
        row[name] = sent_as
        if parameter.expanding:
            expanding = name
    return NamedRows((row,), expanding) if row else None


def _pinned_columns(where: ColumnElement[Any] | None, table: Table) -> dict[str, BindParameter[Any]]:
    """Columns of the table that the WHERE clause binds to parameters, by `=` or `IN`, in all rows."""
    pinned: dict[str, BindParameter[Any]] = {}
    for each in conjuncts(where):
        if not isinstance(each, BinaryExpression) or each.operator not in (operators.eq, operators.in_op):
            continue
        owner = getattr(each.left, "table", None)
        # An alias of the same table is another set of rows, and not a Table.
        if isinstance(owner, Table) and owner.fullname == table.fullname and isinstance(each.right, BindParameter):
            pinned[str(getattr(each.left, "name", each.left.key))] = each.right
    return pinned


def conjuncts(condition: ColumnElement[Any] | None) -> Sequence[ColumnElement[Any]]:
    """The conditions that all must hold for this one to hold."""
    if condition is None:
        return ()
    if isinstance(condition, BooleanClauseList) and condition.operator is operators.and_:
        return condition.clauses
    return (condition,)


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

_LASTS = re.compile(r"(?:set|reset|discard)\b(?!\s+(?:local|transaction|constraints)\b)", re.IGNORECASE)
"""What a PRAGMA of SQLite sets lasts as well, but does not tell which rows are there."""

_SETS_LOCAL_CONFIG = re.compile(r"\bset_config\s*\([^;]*,\s*true\s*\)", re.IGNORECASE)

_HARMLESS = re.compile(
    r"(?:savepoint|release|rollback\s+to|prepare\s+transaction|lock|listen|unlisten|notify)\b", re.IGNORECASE
)


def _effect_of_text(sql: str) -> Effect:
    """Judge SQL by its first word: reads, settings, and what does nothing to rows. All else may write anything.

    A SELECT is taken for a read, although it may call a function that writes.
    """
    sql = _BEFORE_FIRST_WORD.sub("", sql)
    if _MORE_THAN_ONE.search(sql):
        return Effect(unknown=True, changes_settings=True, settings_last=True)
    if match := _READS.match(sql):
        if match[0].lower() in ("with", "explain") and _WRITES.search(sql):
            return UNKNOWN
        if not _SETS_CONFIG.search(sql):
            return NOTHING
        return Effect(changes_settings=True, settings_last=not _SETS_LOCAL_CONFIG.search(sql))
    if _HARMLESS.match(sql):
        return NOTHING
    if _COMMITS.match(sql):
        return Effect(commits=True)
    if not _SETTINGS.match(sql):
        return UNKNOWN
    return Effect(changes_settings=True, settings_last=bool(_LASTS.match(sql)))
