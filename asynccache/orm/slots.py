"""The slots of one database: of rows and their generations, and of secondary keys, with what lies in these."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.types import TypeEngine

from asynccache.backends.base import Key
from asynccache.orm.codec import compile_codec
from asynccache.orm.column_types import Codecs, UncacheableTypeError
from asynccache.orm.keys import (
    PrimaryKey,
    RowSlot,
    by_what_is_sent,
    compile_row_slot,
    key_form,
    plain_or_hash,
    short_or_hash,
)
from asynccache.orm.registry import Hierarchy, Model, UniqueKey
from asynccache.orm.rows import SCHEMA_BYTES, RowFormat, UnusableRecordError
from asynccache.orm.wire import DecodeError, EncodeError
from asynccache.protocol import Slot


class HierarchySlots:
    """The keys of one hierarchy's rows and generations in one database, and the formats of its rows.

    names: where the rows are: namespace and database, and of each table the schema that it is really in, and its name.
    buckets: how many generations there are.
    """

    def __init__(self, hierarchy: Hierarchy, names: Iterable[str], dialect: Dialect, buckets: int) -> None:
        parts = [*names]
        if hierarchy.distinction:
            parts.append(hierarchy.distinction)
        self.prefix = short_or_hash(":".join(map(plain_or_hash, parts)))
        route = zlib.crc32(hierarchy.tables[0][1].encode())
        self.buckets = [Key(f"{self.prefix}#{bucket}".encode(), route + bucket) for bucket in range(buckets)]
        self.generations = tuple(Slot(key, key) for key in self.buckets)
        self.formats: defaultdict[Model, dict[bytes, RowFormat]] = defaultdict(dict)
        """By identity class, since two that are mapped to one table read the same slots, and by fingerprint."""
        self.row: RowSlot
        """The slot of a row, by its primary key as it is sent to the database; None if that is not exactly of its
        column's type."""
        self.row = _row_slot([column.type for column in hierarchy.columns], dialect, self.prefix, self.buckets)


class KeySlots:
    """The slots of one secondary key's values in one database, and what is stored there: a row's primary key.

        fingerprint of the primary key's columns | length of the key | key | the row, in what tasks share

    The row itself is never stored there: a lease on this slot says nothing of it.

    slot: the slot of these values, as they are sent to the database; None if they have none.
    asked: the same of values as Python code has them.
    """

    def __init__(
        self, rows: HierarchySlots, hierarchy: Hierarchy, key: UniqueKey, dialect: Dialect, codecs: Codecs
    ) -> None:
        label = short_or_hash(plain_or_hash("/".join((key.table[1], *key.columns))), _LABEL_BYTES_MAX)
        types = [column.type for column in key.columns_mapped]
        self.slot = _row_slot(types, dialect, f"{rows.prefix}@{label}", rows.buckets)
        self.asked = by_what_is_sent(types, dialect, self.slot)
        key_types = [column.type for column in hierarchy.columns]
        self._codec = compile_codec(key_types, dialect, codecs)
        self._schema = blake2b(repr(key_types).encode(), digest_size=SCHEMA_BYTES).digest()

    def encode(self, primary_key: PrimaryKey, row: bytes = b"") -> bytes | None:
        """None for a primary key that cannot be stored."""
        try:
            stored = self._codec.encode(primary_key)
        except EncodeError:
            return None
        return self._schema + len(stored).to_bytes(_LENGTH_BYTES) + stored + row

    def without_row(self, record: bytes) -> bytes:
        return record[: _row_at(record)]

    def decode(self, record: bytes) -> tuple[PrimaryKey, bytes]:
        """The primary key, and the row's record or b"". Raises UnusableRecordError."""
        if not record.startswith(self._schema):
            raise UnusableRecordError("a key of rows that were stored with other primary keys")
        row_at = _row_at(record)
        try:
            return tuple(self._codec.decode(record[SCHEMA_BYTES + _LENGTH_BYTES : row_at])), record[row_at:]
        except DecodeError as error:
            raise UnusableRecordError("a damaged key") from error


_LABEL_BYTES_MAX = 40
_LENGTH_BYTES = 2


def _row_slot(types: Sequence[TypeEngine[Any]], dialect: Dialect, prefix: str, buckets: Sequence[Key]) -> RowSlot:
    try:
        return compile_row_slot([key_form(type_, dialect) for type_ in types], prefix, buckets)
    except UncacheableTypeError:
        return lambda _: None


def _row_at(record: bytes) -> int:
    key_at = SCHEMA_BYTES + _LENGTH_BYTES
    return key_at + int.from_bytes(record[SCHEMA_BYTES:key_at])
