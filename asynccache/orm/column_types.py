"""Which column type has which wire form, and which has none.

A type is judged as the dialect implements it, and refused where it is not known that its values come back exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql.ranges import AbstractMultiRange, AbstractSingleRange, MultiRange, Range
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.types import NullType, TypeDecorator, TypeEngine, UserDefinedType

from asynccache.orm.forms import (
    ANYTHING,
    DATETIMES,
    FLOATS,
    INTS,
    UUIDS,
    Form,
    TypeCodec,
    array_of,
    by_bind_form,
    by_codec,
    by_name,
    dynamic,
    native,
)
from asynccache.orm.wire import IP_KINDS, BitString

Codecs = Mapping[type[TypeEngine[Any]], TypeCodec]
"""By column type. The nearest class in the method resolution order decides."""


class UncacheableTypeError(Exception):
    """Raised when no value of a column type could be brought back exactly; the text is the reason and the way out."""


class UnresolvedTypeError(UncacheableTypeError):
    """Raised when a type has no implementation for this dialect; it may have one for another."""


# By `TypeEngine.python_type`, which every generic type and most types of the dialects name.
_BY_PYTHON_TYPE: dict[type, Form] = {
    **{kind: native(kind) for kind in (bool, str, bytes, Decimal, date)},
    int: INTS,
    float: FLOATS,
    UUID: UUIDS,
    datetime: DATETIMES,
    time: dynamic(time),
    timedelta: dynamic(timedelta),
}

# By class, for types that name no Python type or one that is too narrow.
_BY_CLASS: tuple[tuple[tuple[type[Any], ...], Form], ...] = (
    ((sa.JSON,), dynamic(dict, list, str, int, float, bool, Decimal)),
    ((pg.HSTORE,), dynamic(dict)),
    ((pg.INET, pg.CIDR), dynamic(str, *IP_KINDS)),
    ((pg.MACADDR, pg.MACADDR8, pg.MONEY, pg.TSVECTOR, pg.TSQUERY, pg.REGCLASS, pg.REGCONFIG), native(str)),
    ((pg.OID,), INTS),
    ((AbstractSingleRange,), dynamic(Range)),
    ((AbstractMultiRange,), dynamic(MultiRange)),
)


def resolved(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """A column type as the dialect implements it. Raises UncacheableTypeError."""
    _refuse_own_processors(type_)
    impl = _implementation(type_, dialect)
    _refuse_own_processors(impl)
    return impl


def _implementation(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    try:
        return type_.dialect_impl(dialect)  # knows `with_variant` and `TypeDecorator.load_dialect_impl`
    except Exception as error:
        raise UnresolvedTypeError(
            f"{_name(type_)} has no implementation for {dialect.name}: {type(error).__name__}: {error}"
        ) from error


def _codec_of(type_: TypeEngine[Any], dialect: Dialect, codecs: Codecs) -> TypeCodec | None:
    def nearest(kind: type[Any]) -> TypeCodec | None:
        return next((codecs[each] for each in kind.__mro__ if each in codecs), None)

    if not codecs:
        return None
    return nearest(type(type_)) or nearest(type(_implementation(type_, dialect)))


def form_of(type_: TypeEngine[Any], dialect: Dialect, codecs: Codecs) -> Form:
    """Choose the wire form of a column type, as the dialect implements it. Raises UncacheableTypeError."""
    if codec := _codec_of(type_, dialect, codecs):
        return by_codec(codec)
    impl = resolved(type_, dialect)
    if isinstance(impl, sa.PickleType):
        raise UncacheableTypeError("PickleType holds pickles, and nothing in the cache may be one; use JSON instead")
    if isinstance(impl, sa.Interval):  # a TypeDecorator in name: where it is emulated it brings its own processors
        return _BY_PYTHON_TYPE[timedelta]
    if isinstance(impl, TypeDecorator):
        return _decorated(impl, dialect, codecs)
    if isinstance(impl, NullType):
        raise UncacheableTypeError("the column has no type (NullType); give it the type that it has in the database")
    if isinstance(impl, UserDefinedType):
        raise UncacheableTypeError(
            f"{_name(type_)} is a UserDefinedType, whose values could be anything; wrap a type of SQLAlchemy in a "
            "TypeDecorator instead"
        )
    if isinstance(impl, sa.ARRAY):
        return array_of(form_of(impl.item_type, dialect, codecs))
    if isinstance(impl, pg.DOMAIN):  # has no processors: values are what the driver makes of the type below it
        return ANYTHING
    if isinstance(impl, sa.Enum):
        return native(str) if impl.enum_class is None else by_name(impl.enum_class)
    if isinstance(impl, pg.BIT) and BitString:
        return dynamic(str, BitString)
    for classes, form in _BY_CLASS:
        if isinstance(impl, classes):
            return form
    try:
        python_type = impl.python_type
    except NotImplementedError:  # SQLAlchemy 2.0 raises, 2.1 says `object`
        python_type = object
    if python_type in _BY_PYTHON_TYPE:
        return _BY_PYTHON_TYPE[python_type]
    raise UncacheableTypeError(f"{_name(type_)} has values of no known wire form; convert them in a TypeDecorator")


def _decorated(decorator: TypeDecorator[Any], dialect: Dialect, codecs: Codecs) -> Form:
    inner = form_of(decorator.impl_instance, dialect, codecs)
    binds = type(decorator).process_bind_param is not TypeDecorator.process_bind_param
    results = type(decorator).process_result_value is not TypeDecorator.process_result_value
    if results and binds:
        return by_bind_form(decorator, inner, dialect)
    if results:
        raise UncacheableTypeError(
            f"{_name(decorator)} defines process_result_value alone, so that nothing can be stored from which its "
            "values could be made again; define process_bind_param too"
        )
    return inner


def own_processors(type_: TypeEngine[Any]) -> Sequence[str]:
    """The methods by which a type that is not SQLAlchemy's own makes other values of those that it is given."""
    for cls in type(type_).__mro__:
        own = {"bind_processor", "result_processor"} & vars(cls).keys()
        if own and cls.__module__.partition(".")[0] != "sqlalchemy":
            return sorted(own)
    return ()


def _refuse_own_processors(type_: TypeEngine[Any]) -> None:
    if own := own_processors(type_):
        raise UncacheableTypeError(
            f"{_name(type_)} overrides {' and '.join(own)}, so that its values could be anything; use a "
            "TypeDecorator with process_bind_param and process_result_value"
        )


def _name(type_: TypeEngine[Any]) -> str:
    return f"{type(type_).__module__}.{type(type_).__qualname__}"
