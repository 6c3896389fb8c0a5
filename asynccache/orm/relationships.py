"""Relationships as a cache of rows sees them: many-to-ones that are a get, and what a get has to bring along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sqlalchemy.orm import MANYTOONE, Mapper, RelationshipProperty
from sqlalchemy.orm.attributes import instance_dict
from sqlalchemy.orm.exc import UnmappedColumnError

from asynccache.orm.keys import PrimaryKey

_JOINED = frozenset({"joined", False})
_EAGER = frozenset({"selectin", "subquery", "immediate"}) | _JOINED
"""`relationship(lazy=…)` that a get must come back with."""


class ManyToOne(NamedTuple):
    """A many-to-one whose target is found by its primary key, so that loading it is a get.

    key: its attribute.
    target: the mapper of what it leads to.
    sources: the attributes that hold the target's primary key, in its order.
    """

    key: str
    target: Mapper[Any]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, relationship: RelationshipProperty[Any]) -> ManyToOne | None:
        """None if it is anything else: to many, or by other columns, or by more than their equality."""
        # SQLAlchemy's own verdict, by which its lazy loads ask `_identity_lookup` first, and the columns that it
        # takes the key from.
        if relationship.direction is not MANYTOONE or not relationship._use_get:
            return None
        columns, target = relationship._lazy_strategy._equated_columns, relationship.mapper
        try:
            sources = [relationship.parent.get_property_by_column(columns[each]).key for each in target.primary_key]
        except UnmappedColumnError:
            return None
        return cls(relationship.key, target, tuple(sources))

    def is_loaded(self, instance: object) -> bool:
        return self.key in instance_dict(instance)

    def knows_key(self, instance: object) -> bool:
        loaded = instance_dict(instance)
        return all(name in loaded for name in self.sources)

    def key_of(self, instance: object) -> PrimaryKey:
        return tuple([getattr(instance, name) for name in self.sources])


class Eager(NamedTuple):
    """What a get has to bring along with a row.

    parents: many-to-ones of cached classes.
    selected: other relationships; each takes a SELECT.
    """

    parents: tuple[ManyToOne, ...]
    selected: tuple[str, ...]


def eager_relationships(
    mapper: Mapper[Any], asked: Mapper[Any], is_cached: Callable[[type[Any]], bool]
) -> Eager | None:
    """None if a get of such a row is better left to SQLAlchemy.

    That is where one SELECT brings it all by a join, and where eager relationships lead back to the class that they
    came from: SQLAlchemy knows where to stop.

    asked: the class that is got: this one, or one that it inherits from, whose get leaves it to a later use to load
        what is this one's own.
    """
    parents, selected = list[ManyToOne](), list[str]()
    loads = [each for each in mapper.iterate_to_root() if _loads(asked, each)]
    for relationship in _eager(mapper):
        if not any(relationship.key in each.relationships for each in loads):
            continue
        parent = ManyToOne.of(relationship)
        if _leads_back(relationship, frozenset({mapper.base_mapper})):
            return None
        if parent is not None and is_cached(parent.target.class_):
            parents.append(parent)
        elif relationship.lazy in _JOINED:
            return None
        else:
            selected.append(relationship.key)
    return Eager(tuple(parents), tuple(selected))


def _eager(mapper: Mapper[Any]) -> Iterator[RelationshipProperty[Any]]:
    return (each for each in mapper.relationships if each.lazy in _EAGER)


def _loads(asked: Mapper[Any], mapper: Mapper[Any]) -> bool:
    """Whether a get of the one class loads what is mapped in the other, if a row is of that."""
    return asked.isa(mapper) or mapper in asked.with_polymorphic_mappers or mapper.polymorphic_load == "selectin"


def _leads_back(relationship: RelationshipProperty[Any], path: frozenset[Mapper[Any]]) -> bool:
    base = relationship.mapper.base_mapper
    if base in path:
        return True
    if relationship.direction is not MANYTOONE:
        return False  # by a SELECT, with all that belongs to its rows
    path |= {base}
    return any(
        _leads_back(each, path) for target in relationship.mapper.self_and_descendants for each in _eager(target)
    )


def raises_on_sql(mapper: Mapper[Any], target: Mapper[Any]) -> bool:
    """Whether a lazy load of the one by the other may be refused as soon as it takes SQL: it is then refused at all
    times, rather than at those when the row is not in the cache."""
    return any(each.lazy == "raise_on_sql" and each.mapper is target for each in mapper.relationships)
