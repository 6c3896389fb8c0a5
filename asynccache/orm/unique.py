"""Secondary keys as they are registered: `unique=["email", ("tenant_id", "slug")]`, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import CHAR, NCHAR, Column, Index, Table, UniqueConstraint
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.orm import Mapper

from asynccache.errors import ConfigurationError, NotCacheableError
from asynccache.orm.column_types import UncacheableTypeError, UnresolvedTypeError
from asynccache.orm.keys import key_form
from asynccache.orm.registry import UniqueKey, mapper_of, name_of, root_of, tables_of

Unique = Sequence[str | tuple[str, ...]]
"""Secondary keys of a model: names of attributes, or tuples of them."""


def unique_keys(model: object, unique: Unique) -> list[UniqueKey]:
    """The secondary keys of a mapped class, checked.

    Raises ConfigurationError for what is no column of it, is not unique in the database, or is the primary key;
    NotCacheableError for columns whose values cannot be part of a key.
    """
    if isinstance(unique, str):
        raise ConfigurationError(f"unique is a list of secondary keys: write unique=[{unique!r}]")
    mapper = mapper_of(model)
    if mapper is None:
        if unique:
            raise ConfigurationError(
                f"unique names attributes of a mapped class, which {model!r} is not; register the class by itself"
            )
        return []
    return [_unique_key(mapper, (key,) if isinstance(key, str) else tuple(key)) for key in unique]


def _unique_key(mapper: Mapper[Any], attributes: Sequence[str]) -> UniqueKey:
    told = f"{mapper.class_.__qualname__}.{' + '.join(map(str, attributes))}"
    # Not its attributes: asking for them would configure all mappers, too early.
    columns: list[Column[Any]] = []
    for attribute in attributes:
        column = mapper.columns.get(attribute)
        if not isinstance(column, Column) or not isinstance(column.table, Table):
            raise ConfigurationError(
                f"{told} is no secondary key: {mapper.class_.__qualname__} maps no column as {attribute!r}; "
                "name attributes as the class has them"
            )
        columns.append(column)
    tables: set[Table] = {column.table for column in columns}
    if len(tables) != 1 or len(set(columns)) != len(attributes):
        raise ConfigurationError(f"{told} is no secondary key: name different columns of one table")
    (table,) = tables
    if len(tables_of(root_of(mapper).local_table)) > 1 or mapper.concrete:
        raise NotCacheableError(f"{told} is no secondary key: rows of a join or of concrete classes have none")
    if set(root_of(mapper).primary_key) <= set(columns) or set(table.primary_key) <= set(columns):
        raise ConfigurationError(f"{told} has all of the primary key: there is nothing to register, use session.get")
    if not any(each and each <= set(columns) for each in _unique_columns(table)):
        raise ConfigurationError(
            f"{told} is no secondary key: nothing says that it is unique; give {table.name!r} a UniqueConstraint or a "
            "unique Index of just these columns, without a condition"
        )
    for attribute, column in zip(attributes, columns, strict=True):
        _check_values(f"{mapper.class_.__qualname__}.{attribute}", column)
    pairs = sorted(zip(columns, attributes, strict=True), key=lambda pair: pair[0].name)
    return UniqueKey(
        name_of(table),
        tuple(column.name for column, _ in pairs),
        tuple(attribute for _, attribute in pairs),
        tuple(column for column, _ in pairs),
    )


def _unique_columns(table: Table) -> Iterator[set[Column[Any]]]:
    """Sets of columns that no two rows have the same values in."""
    for column in table.columns:
        if column.unique:
            yield {column}
    for constraint in table.constraints:
        if isinstance(constraint, UniqueConstraint):
            yield set(constraint.columns)
    for index in table.indexes:
        if index.unique and _is_whole(index):
            yield set(index.columns)


def _is_whole(index: Index) -> bool:
    """Whether an index is over columns alone, and all rows: no expression, and no condition in any dialect."""
    conditions = [value for name, value in index.kwargs.items() if str(name).endswith("_where")]
    return all(isinstance(each, Column) for each in index.expressions) and all(each is None for each in conditions)


def _check_values(told: str, column: Column[Any]) -> None:
    if column.computed is not None or column.onupdate is not None or column.server_onupdate is not None:
        raise NotCacheableError(
            f"{told} cannot be part of a secondary key: it changes when other columns do, which no statement shows"
        )
    if isinstance(column.type, (CHAR, NCHAR)):
        raise NotCacheableError(f"{told} cannot be part of a secondary key: the database fills it up; make it a String")
    try:
        key_form(column.type, DefaultDialect())
    except UnresolvedTypeError:
        pass  # its own database will know it
    except UncacheableTypeError as error:
        raise NotCacheableError(f"{told} cannot be part of a secondary key: {error}") from error
