"""Rows by their keys, in as few statements as the database takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.attributes import instance_state

from asynccache.orm.keys import PrimaryKey

_SELECT_PARAMETERS_MAX = 10_000
"""Well below what PostgreSQL (32,767) and SQLite (32,766) take in one statement."""


def select_many(session: Session, mapper: Mapper[Any], primary_keys: Sequence[PrimaryKey]) -> dict[PrimaryKey, object]:
    """Load these rows in one SELECT, unless they are very many."""
    columns = mapper.primary_key
    step = _SELECT_PARAMETERS_MAX // len(columns)
    found: dict[PrimaryKey, object] = {}
    for start in range(0, len(primary_keys), step):
        part = primary_keys[start : start + step]
        condition = columns[0].in_([key[0] for key in part]) if len(columns) == 1 else tuple_(*columns).in_(part)
        for instance in session.scalars(select(mapper.class_).where(condition)).unique():
            key = instance_state(instance).key
            assert key is not None, "loaded"
            found[tuple(key[1])] = instance
    if found.keys() - set(primary_keys):
        # The database takes some for the same that Python does not ("1" and 1, another case): ask for each as it is.
        for primary_key in primary_keys:
            if primary_key not in found:
                instance = Session.get(session, mapper.class_, primary_key)
                if instance is not None:
                    found[primary_key] = instance
    return found


def select_by(session: Session, model: type[Any], values: Mapping[str, Any]) -> object | None:
    """Load the one row whose attributes have these values. Raises sqlalchemy.exc.MultipleResultsFound."""
    conditions = [getattr(model, name) == value for name, value in values.items()]
    found: object | None = session.scalars(select(model).where(*conditions)).unique().one_or_none()
    return found
