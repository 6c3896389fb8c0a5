"""How the rows of one class become bytes and instances.

A get of a class loads what is mapped in that class, and of a row of a subclass no more: SQLAlchemy leaves the
subclass's own columns to be loaded when they are first used. Such a row is stored as it was loaded, in a format of its
own. It can answer who asks in the same way, or for a class further up; who asks for the subclass takes it for a miss,
and stores the whole row in its place.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import instance_state

from asynccache.orm.cacheable import check_column, loaded_columns, stored_columns
from asynccache.orm.codec import Codec, compile_codec
from asynccache.orm.column_types import Codecs
from asynccache.orm.hydrate import Hydrate, compile_hydrate
from asynccache.orm.registry import Model
from asynccache.orm.wire import EncodeError
from asynccache.settings import Policy

logger = logging.getLogger("asynccache")

SCHEMA_BYTES = 8
"""A row's bytes begin with a fingerprint of the columns that were stored, so that two versions of an application that
share a cache never read each other's rows. It is in the value and not in the key: while both run, each must invalidate
what the other reads."""


class UnusableRecordError(Exception):
    """A record that this process cannot read: damaged, foreign, or stored by another version of the application."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the rows of one class become bytes and instances, as a get of one class loads them.

    model: the class of the rows.
    asked: the class that was asked for: this one, or one that it inherits from.
    keys: the attributes that are stored.
    not_loaded: attributes that a get of the class that was asked for does not load.
    """

    schema: bytes
    model: Model
    asked: Model
    keys: tuple[str, ...]
    not_loaded: tuple[str, ...]
    codec: Codec
    hydrate: Hydrate
    complaints: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, mapper: Mapper[Any], asked: Mapper[Any], policy: Policy, codecs: Codecs, dialect: Dialect) -> RowFormat:
        """Raises NotCacheableError for a column whose type cannot make the round trip."""
        usual = [each.key for each in loaded_columns(mapper)]
        loaded = _loaded_keys(mapper, asked)
        not_loaded = tuple(key for key in usual if key not in loaded)
        stored = [each for each in stored_columns(mapper, policy) if each.key in loaded]
        for each in stored:
            check_column(mapper.class_, each.key, each.columns[0].type, dialect, codecs)
        keys = tuple(each.key for each in stored)
        codec = compile_codec([each.columns[0].type for each in stored], dialect, codecs)
        columns = [(each.key, str(each.columns[0]), repr(each.columns[0].type)) for each in stored]
        parts: list[object] = [mapper.class_.__qualname__, columns]
        if codec.given:
            parts.append(codec.given)
        if not_loaded:
            parts.append(asked.class_.__qualname__)
        # Addresses of objects in the types' arguments would make each process's rows unreadable to the others.
        fingerprint = re.sub(r" at 0x[0-9a-f]+", "", repr(tuple(parts))).encode()
        return cls(
            schema=blake2b(fingerprint, digest_size=SCHEMA_BYTES).digest(),
            model=mapper.class_,
            asked=asked.class_ if not_loaded else mapper.class_,
            keys=keys,
            not_loaded=not_loaded,
            codec=codec,
            hydrate=compile_hydrate(mapper, keys, [key for key in usual if key not in keys]),
        )

    def encode(self, instance: object) -> bytes | None:
        """The row's bytes, or None if it is not just as the database has it, or not loaded as this format has it."""
        state = instance_state(instance)
        loaded = state.dict
        if state.modified or any(key in loaded for key in self.not_loaded):
            return None
        try:
            return self.schema + self.codec.encode(tuple([loaded[key] for key in self.keys]))
        except KeyError:
            return None
        except EncodeError as error:
            self._complain(str(error))
            return None

    def _complain(self, reason: str) -> None:
        if reason not in self.complaints and len(self.complaints) < 10:
            self.complaints.add(reason)
            logger.warning("a row of %s is not cached: %s", self.model.__qualname__, reason)


def _loaded_keys(mapper: Mapper[Any], asked: Mapper[Any]) -> frozenset[str]:
    """The column attributes that a get of one class loads of a row of another, which inherits from it."""
    if asked is mapper:
        return frozenset(mapper.column_attrs.keys())
    classes = [each for each in (asked, *asked.with_polymorphic_mappers) if mapper.isa(each)]
    return frozenset(key for each in classes for key in each.column_attrs.keys())  # noqa: SIM118 - no dict
