"""Shows what lies under one row's key, in words: its slot, its generation's, and whether it would be served.

It looks once, changes nothing, and runs no code of the application's: a column that a `TypeDecorator` converts both
ways is shown as it is stored, so that what is encrypted in the database is shown encrypted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement

from asynccache import protocol
from asynccache.backends.base import UNREADABLE, Key
from asynccache.errors import ConfigurationError
from asynccache.orm.entity import Entity
from asynccache.orm.keys import PrimaryKey, value_from_text
from asynccache.orm.registry import mapper_of
from asynccache.orm.rows import SCHEMA_BYTES, UnusableRecordError
from asynccache.protocol import MISSING, Kind
from asynccache.store import Store


@dataclass(frozen=True, slots=True)
class SlotView:
    """One slot, as it was found.

    key: its name on the server.
    kind: its state, as `protocol.Kind` names it, or "unreadable".
    found: the same in words.
    nonce: of the generation that a value or a lease is valid under, or of an open generation itself; in hex.
    locked_until: when the locks of commits end at the latest, by the wall clock of who placed them, one for each owner.
    size_bytes: of the whole slot.
    """

    key: str
    kind: str
    found: str
    nonce: str | None = None
    locked_until: tuple[datetime, ...] = ()
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the cache has of one row.

    database: the scope's name: a path, a database's name, or what `cache_scope` says.
    node: which server holds it.
    served: whether a session that may use the cache would be served from it now.
    verdict: what such a session would do, and why.
    schema: the fingerprint of the stored columns, in hex; None if no row is stored.
    schema_known: whether this application has a model with these columns.
    columns: attributes and their values as stored: in bind form where a `TypeDecorator` converts both ways. None if
        no row is stored, or none that can be read.
    """

    model: type[Any]
    primary_key: tuple[Any, ...]
    database: str
    node: str
    row: SlotView
    generation: SlotView
    served: bool
    verdict: str
    schema: str | None = None
    schema_known: bool = False
    columns: Mapping[str, Any] | None = None


def key_from_text(model: type[Any], texts: Sequence[str]) -> PrimaryKey:
    """A primary key as it was typed, as `Session.get` wants it. Raises ConfigurationError for what is no value."""
    mapper = mapper_of(model)
    columns = mapper.primary_key if mapper is not None else ()
    if len(columns) != len(texts):
        return tuple(texts)  # a wrong number, or no model: who is asked for it says so
    return tuple(_value_from_text(column, text) for column, text in zip(columns, texts, strict=True))


def _value_from_text(column: ColumnElement[Any], text: str) -> Any:
    try:
        return value_from_text(column.type, text)
    except ValueError as error:
        raise ConfigurationError(f"{error}, as the primary key's {column.key} is") from error


async def inspect(store: Store, entity: Entity, primary_key: PrimaryKey) -> Inspection | None:
    """Look at a row's slots; None if the primary key has values that no row is cached under."""
    slot = entity.row(primary_key)
    if slot is None:
        return None
    row, generation = await store.read(slot)
    name, backend = entity.model.__qualname__, store.backend
    served, verdict, schema, known, columns = False, "", None, False, None
    record = protocol.record_of(row)
    if record:
        schema = record[:SCHEMA_BYTES].hex()
        known = entity.knows_schema(record)
        try:
            columns = entity.stored_values(record)
        except UnusableRecordError as error:
            verdict = f"{error}: it counts as not there, and is loaded and stored anew"
    if entity.bypass is not None:
        verdict = f"{name} is read past the cache: {entity.bypass}"
    elif not verdict:
        served, verdict = _verdict(row, generation)
    return Inspection(
        model=entity.model,
        primary_key=primary_key,
        database=entity.scope.name,
        node=backend.node_of(slot.key) if hasattr(backend, "node_of") else repr(backend),
        row=_view(slot.key, row, _OF_ROWS),
        generation=_view(slot.generation, generation, _OF_GENERATIONS),
        served=served,
        verdict=verdict,
        schema=schema,
        schema_known=known,
        columns=columns,
    )


def _verdict(row: bytes | None, generation: bytes | None) -> tuple[bool, str]:
    match protocol.judge(row, generation):
        case protocol.Hit(record):
            return True, "there is no such row" if record == MISSING else "the row"
        case protocol.Vacant():
            stale = protocol.kind_of(row) is Kind.VALUE
            why = "what is stored was invalidated with its generation" if stale else "nothing is stored"
            return False, f"{why}: the row is loaded and stored"
        case protocol.Leased():
            return False, "another reader is loading it: this one waits for its row, at most lease_timeout"
        case protocol.NoGeneration():
            return False, "there is no generation: one is made, and the row is loaded and stored"
        case protocol.Locked():
            return False, "a commit is under way, or what is there cannot be read: the row is loaded and not stored"


_OF_ROWS: Mapping[Kind, str] = {
    Kind.ABSENT: "absent",
    Kind.LEASE: "leased: a reader is loading the row",
    Kind.VALUE: "a row",
    Kind.LOCKED: "locked",
    Kind.HOLD: "on hold after a commit, until hold_off has passed",
    Kind.FREE: "free: somebody has let go of it a moment ago",
    Kind.UNKNOWN: "of a kind that this version does not know, which it takes for locked",
    Kind.FOREIGN: "bytes that are not this library's, or cut short, which it takes for absent",
}

_OF_GENERATIONS: Mapping[Kind, str] = {
    **_OF_ROWS,
    Kind.VALUE: "open",
    Kind.LEASE: "a lease, where none belongs: it is replaced",
}


def _view(key: Key, slot: bytes | None, words: Mapping[Kind, str]) -> SlotView:
    name = key.name.decode()
    if slot == UNREADABLE:
        return SlotView(name, "unreadable", "not readable: the server does not answer, or this process doubts it")
    kind = protocol.kind_of(slot)
    found, nonce = words[kind], protocol.nonce_of(slot)
    if kind is Kind.VALUE and words is _OF_ROWS and protocol.record_of(slot) == MISSING:
        found = "that there is no such row"
    until = tuple(
        datetime.fromtimestamp(deadline_ms / 1000, UTC) for deadline_ms in (protocol.owners_of(slot) or {}).values()
    )
    if until:
        commits = f"{len(until)} commit{'s'[: len(until) > 1]}"
        found = f"locked by {commits}, until {max(until):%Y-%m-%d %H:%M:%S} UTC at the latest"
    return SlotView(name, kind.value, found, nonce.hex() if nonce else None, until, len(slot or b""))
