"""Column values <-> bytes: typed msgpack, compiled once for each mapper, exact or refused, and never pickle.

What is stored is the value as Python code sees it on a loaded instance. The one exception is a `TypeDecorator` that
converts both ways: its *bind form* is stored, so that a column that Python encrypts is encrypted in the cache too. (One
that the database decrypts, by a `column_expression`, is not.)

Exact means: the same type and the same value come back, down to the offset of a datetime, the exponent of a Decimal
and the sign of a zero. Where that cannot be had, the type is refused (`UncacheableTypeError`, once, at registration)
or the row is not cached (`EncodeError`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

from msgspec import msgpack
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.types import TypeEngine

from asynccache.orm.column_types import Codecs, UnresolvedTypeError, form_of
from asynccache.orm.wire import DecodeError, EncodeError, load_extension, pack


@dataclass(frozen=True, slots=True)
class Codec:
    """The wire form of one mapper's rows.

    encode: one value a column -> bytes. Raises `EncodeError`, nothing else.
    decode: bytes -> fresh values, sharing nothing with an earlier call. Raises `DecodeError`, nothing else, and runs
        no code that the bytes could choose.
    show: as `decode`, but runs no code of the application's: where that would make a value (a `TypeDecorator` that
        decrypts it), what it would be made from.
    given: names and versions of the codecs of the application's own that take part in it.
    """

    encode: Callable[[tuple[Any, ...]], bytes]
    decode: Callable[[bytes], tuple[Any, ...]]
    show: Callable[[bytes], tuple[Any, ...]]
    given: tuple[str, ...] = ()


def check_type(type_: TypeEngine[Any], dialect: Dialect | None, codecs: Codecs) -> None:
    """Refuse a column type whose values cannot be cached.

    dialect: None when it is not known yet. Types are then judged by SQLAlchemy's default dialect, and a type that
        resolves on its own database only is left to `compile_codec`.

    Raises UncacheableTypeError with the reason.
    """
    try:
        form_of(type_, dialect or DefaultDialect(), codecs)
    except UnresolvedTypeError:
        if dialect is not None:
            raise


def compile_codec(column_types: Sequence[TypeEngine[Any]], dialect: Dialect, codecs: Codecs) -> Codec:
    """Generate the codec for rows of these column types, in this order.

    Both functions are straight-line code over the columns, the way `dataclasses` writes an `__init__`: a loop over
    columns costs a third more. The source is made of positions alone; no name or value of the user's is in it.

    Raises UncacheableTypeError for a type that `check_type` refuses.
    """
    forms = [form_of(type_, dialect, codecs) for type_ in column_types]
    row_type = GenericAlias(tuple, tuple(form.annotation for form in forms))
    scope: dict[str, Any] = {
        "pack": pack,
        "unpack": msgpack.Decoder(row_type, ext_hook=load_extension).decode,
        "write_all": lambda row: [form.write(value) for form, value in zip(forms, row, strict=True)],
        "EncodeError": EncodeError,
        "DecodeError": DecodeError,
    }
    written, read = "", ""
    for i, form in enumerate(forms):
        scope |= {f"kind{i}": form.verbatim, f"write{i}": form.write, f"kinds{i}": form.as_read, f"read{i}": form.read}
        written += (f"v{i} if type(v{i}) is kind{i} else " if form.verbatim else "") + f"write{i}(v{i}), "
        if form.read is None:
            read += f"v{i}, "
        else:
            read += (f"v{i} if type(v{i}) in kinds{i} else " if form.as_read else "") + f"read{i}(v{i}), "
    row = "".join(f"v{i}, " for i in range(len(forms)))
    exec(_SOURCE.format(row=row, written=written, read=read), scope)  # noqa: S102 (positions alone, as said above)
    given = tuple(form.given for form in forms if form.given is not None)

    def show(data: bytes) -> tuple[Any, ...]:
        try:
            return tuple([form.show(wire) for form, wire in zip(forms, scope["unpack"](data), strict=True)])
        except Exception as error:
            raise DecodeError("not a row of this codec: " + type(error).__name__) from error

    return Codec(scope["encode"], scope["decode"], show, given)


def wires_of(data: bytes) -> Sequence[Any]:
    """What a codec has written for each column, to compare. Raises DecodeError."""
    try:
        wires: Sequence[Any] = msgpack.decode(data, type=list[Any])
    except Exception as error:
        raise DecodeError("not a row: " + type(error).__name__) from error
    return wires


# `except Exception`: a TypeDecorator's own code runs in here and may raise whatever it likes, as may hostile bytes.
_SOURCE = """
def encode(row):
    try:
        try:
            ({row}) = row
            return pack(({written}))
        except OverflowError:  # an int beyond 64 bits went the fast way; each `write` knows what to do with it
            return pack(write_all(row))
    except EncodeError:
        raise
    except Exception as error:
        raise EncodeError("no wire form for this row: " + type(error).__name__) from error

def decode(data):
    try:
        ({row}) = unpack(data)
        return ({read})
    except Exception as error:
        raise DecodeError("not a row of this codec: " + type(error).__name__) from error
"""
