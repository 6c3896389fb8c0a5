"""What cannot be cached, and what is read past the cache: how a class is mapped decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Dialect
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.orm import ColumnProperty, Mapper, QueryableAttribute
from sqlalchemy.sql import elements, visitors
from sqlalchemy.types import TypeEngine

from asynccache.errors import ConfigurationError, NotCacheableError
from asynccache.orm.codec import check_type
from asynccache.orm.column_types import Codecs, UncacheableTypeError, UnresolvedTypeError
from asynccache.orm.keys import key_form
from asynccache.orm.registry import Model, Models, conditions_of, mapper_of, root_of, subclasses_of, tables_of
from asynccache.settings import Policy


def check_cacheable(mapper: Mapper[Any], policy: Policy, codecs: Codecs) -> None:
    """Say at registration what can never be cached.

    Looks at columns only: asking for attributes would configure all mappers, too early for an application that is
    still defining them. Raises NotCacheableError naming model, column, reason, and the way out.
    """
    name, root = mapper.class_.__qualname__, root_of(mapper)
    if not tables_of(root.local_table):
        raise NotCacheableError(
            f"{name} cannot be cached: it is mapped to {root.local_table!r}, which is neither a table nor a join of "
            "tables. Register its concrete subclasses, if it has some, or exclude the model"
        )
    for condition in conditions_of(root.local_table):
        if not _reads_rows_of(root, condition):
            raise NotCacheableError(
                f"{name} cannot be cached: its join has a condition beyond its tables' columns. Exclude the model"
            )
    for column in mapper.primary_key:
        try:
            key_form(column.type, DefaultDialect())
        except UnresolvedTypeError:
            pass  # its own database will know it
        except UncacheableTypeError as error:
            raise NotCacheableError(f"{name}.{column.key} cannot be cached: {error}. Exclude the model") from error
    for key, column in mapper.columns.items():
        # What a union calls the classes of its rows is no attribute.
        is_attribute = isinstance(column, Column) or column is not mapper.polymorphic_on
        if is_attribute and key not in policy.exclude_columns:
            check_column(mapper.class_, key, column.type, None, codecs)


def check_column(model: Model, key: str, type_: TypeEngine[Any], dialect: Dialect | None, codecs: Codecs) -> None:
    """The same of one column, by its attribute's name. dialect: None when it is not known yet."""
    try:
        check_type(type_, dialect, codecs)
    except UncacheableTypeError as error:
        name = model.__qualname__
        raise NotCacheableError(
            f"{name}.{key} cannot be cached: {error}. Leave the column out: cache.register({name}, "
            f"exclude_columns=[{key!r}]). Or say how its values are stored, before: "
            f"cache.codec_for({type(type_).__qualname__}, encode=..., decode=...). Exclude the model: "
            f"cache.exclude({name})"
        ) from error


def columns_left_out(target: object, attributes: Sequence[str | QueryableAttribute[Any]]) -> frozenset[str]:
    """The names of attributes that are not to be stored. Raises ConfigurationError for such as cannot be left out."""
    mapper = mapper_of(target)
    if mapper is None:
        raise ConfigurationError(
            f"exclude_columns names columns of one mapped class, and {target!r} is none; register the class that has "
            "them, beside it"
        )
    model, names = mapper.class_, set[str]()
    known = dict(mapper.columns.items())  # without configuring all mappers, as above
    for each in attributes:
        name = each if isinstance(each, str) else each.key
        of = f"{model.__qualname__}.{name}"
        if not isinstance(each, str) and each.class_ not in model.__mro__:
            raise ConfigurationError(f"{each} cannot be left out of {model.__qualname__}: it is of another class")
        if name not in known:
            raise ConfigurationError(f"{of} cannot be left out: it is no mapped column; there are {', '.join(known)}")
        if known[name] in mapper.primary_key or getattr(known[name], "primary_key", False):  # or of a subclass's table
            raise ConfigurationError(f"{of} cannot be left out: it is in the primary key")
        if known[name] is mapper.version_id_col:
            raise ConfigurationError(f"{of} cannot be left out: it is the version, which each UPDATE compares")
        names.add(name)
    return frozenset(names)


def stored_columns(mapper: Mapper[Any], policy: Policy) -> list[ColumnProperty[Any]]:
    """The attributes that are stored of a row."""
    return [each for each in loaded_columns(mapper) if each.key not in policy.exclude_columns]


def loaded_columns(mapper: Mapper[Any]) -> list[ColumnProperty[Any]]:
    """The column attributes that a get has to come back with."""
    return [each for each in mapper.column_attrs if each.instrument and not each.deferred]


# ------------------------------------------------------------------------------------------------- read past the cache


def bypass_of(mapper: Mapper[Any], models: Models) -> str | None:
    """Why no row of a class is read from the cache; None if rows are."""
    if mapper.always_refresh:
        return "always_refresh"
    if any(each.concrete and each is not mapper for each in mapper.with_polymorphic_mappers):
        return "polymorphic union"  # rows of several tables, whose keys may be the same
    for each in subclasses_of(mapper):
        policy = models.policy_of(each.class_)
        stored = stored_columns(each, policy) if policy is not None else ()
        if not all(_reads_rows_of(each, attribute.columns[0]) for attribute in stored):
            return "column_property beyond its own row"
    return None


_PURE_EXPRESSIONS = (
    elements.BindParameter,
    elements.BinaryExpression,
    elements.BooleanClauseList,
    elements.UnaryExpression,
    elements.Grouping,
    elements.ClauseList,
    elements.ExpressionClauseList,
    elements.Label,
    elements.Cast,
    elements.TypeCoerce,
    elements.Case,
    elements.Null,
    elements.True_,
    elements.False_,
)


def _reads_rows_of(mapper: Mapper[Any], expression: ColumnElement[Any]) -> bool:
    """Whether an expression changes only when a class's own rows do: a function may be volatile, and a subquery reads
    other rows."""
    return all(
        each.table in mapper.tables if isinstance(each, Column) else isinstance(each, _PURE_EXPRESSIONS)
        for each in visitors.iterate(expression)
    )
