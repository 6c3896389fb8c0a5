"""Statements that are a get in disguise: `select(Model).where(Model.id == 5)`, recognised by their structure alone.

Whatever is not known to be harmless makes a statement another one: it is executed, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import BinaryExpression, BindParameter, FromClause, Result, Select, Table
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.orm import Mapper
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import CacheableOptions
from sqlalchemy.types import TypeEngine

from asynccache.orm.keys import PrimaryKey
from asynccache.orm.statements import conjuncts

_HARMLESS = frozenset({"_raw_columns", "_where_criteria", "_propagate_attrs", "_label_style", "_memoized_keys"})
"""What a `Select` says about itself if it has an entity and conditions, and nothing else: no option, join, limit, lock,
hint. SQLAlchemy keeps all that was said in the statement's `__dict__`; an empty value is as good as none."""

_UNIQUE_BY_IDENTITY: Mapping[str, Any] = (
    {"_create_unique_filters": lambda _: [id]}
    if hasattr(SimpleResultMetaData, "_create_unique_filters")  # SQLAlchemy 2.1
    else {"_unique_filters": [id]}
)
"""Instances need not be hashable: those of dataclasses are not."""

_Positions = Mapping[int, tuple[int, TypeEngine[Any]]]

_positions: WeakKeyDictionary[Mapper[Any], _Positions] = WeakKeyDictionary()
"""For each mapper, where a column stands in its primary key, and its type; by the column's hash, which is its identity,
and which its annotated copies in statements share."""


class PrimaryKeySelect(NamedTuple):
    """A statement that asks for one row of a mapped class by its primary key.

    entity: what it selects, as the statement has it.
    """

    mapper: Mapper[Any]
    primary_key: PrimaryKey
    entity: Any


def primary_key_select(statement: object, params: object) -> PrimaryKeySelect | None:
    """Recognise a get in disguise, or give None.

    params: those that it is executed with.
    """
    # In the order in which most others are told apart.
    if type(statement) is not Select or not (params is None or isinstance(params, dict)):
        return None
    said = statement.__dict__
    conditions, entities = said.get("_where_criteria", ()), said["_raw_columns"]
    if not conditions or len(entities) != 1 or not isinstance(entities[0], FromClause):
        return None
    mapper = entities[0]._annotations.get("parententity")
    if not isinstance(mapper, Mapper):  # but a table, or an alias
        return None
    positions = _positions.get(mapper) or _take_positions(mapper)
    unused = dict(params) if isinstance(params, dict) else {}
    values: dict[int, Any] = {}
    for condition in conditions:
        for each in conjuncts(condition):
            if type(each) is not BinaryExpression or each.operator is not operators.eq or each.modifiers:
                return None
            column, bind = (each.right, each.left) if isinstance(each.left, BindParameter) else (each.left, each.right)
            position, type_ = positions.get(hash(column), (None, None))
            if position is None or position in values or not isinstance(bind, BindParameter) or bind.type is not type_:
                return None
            if bind.callable is not None or bind.expanding or bind.literal_execute or bind.isoutparam:
                return None
            values[position] = bind.value
            if bind.key in unused and not bind.unique:
                values[position] = unused.pop(bind.key)
            elif bind.required:
                return None
    if unused or len(values) != len(mapper.primary_key) or not _says_nothing_else(statement):
        return None
    return PrimaryKeySelect(mapper, tuple([values[position] for position in range(len(values))]), entities[0])


def result_of(select: PrimaryKeySelect, instance: object | None) -> Result[Any]:
    """What executing the statement would have given."""
    metadata = SimpleResultMetaData([select.mapper.class_.__name__], [(select.entity,)], **_UNIQUE_BY_IDENTITY)
    found: Any = iter([] if instance is None else [instance])
    return IteratorResult(metadata, found, _source_supports_scalars=True)


def _take_positions(mapper: Mapper[Any]) -> _Positions:
    # A property of several columns, as of joined inheritance, has them equal. So has one of a join, unless it is an
    # outer one.
    joined = not isinstance(mapper.local_table, Table)
    positions = _positions[mapper] = {
        hash(column): (position, column.type)
        for position, key in enumerate(mapper.primary_key)
        for column in ([key] if joined else mapper.get_property_by_column(key).columns)
    }
    return positions


def _says_nothing_else(statement: Select[Any]) -> bool:
    memos = statement._memoized_keys
    for name, value in statement.__dict__.items():
        if name in _HARMLESS or name in memos or value is None:
            continue
        if isinstance(value, CacheableOptions):  # which SQLAlchemy notes as it compiles a statement
            if vars(value):
                return False
        elif not isinstance(value, (tuple, dict)) or value:
            return False
    return True
