"""Column values -> a persistent instance in a session, as if SQLAlchemy had loaded the row.

What `sqlalchemy.orm.loading._instance` does for a row of a result, generated per mapper. The public ways do not do:
`merge(load=False)` drops unflushed changes and takes ten times as long; `make_transient_to_detached` loses the load
events, and with them `MutableDict` and its like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Mapper, Session
from sqlalchemy.orm.attributes import instance_dict, instance_state

IdentityKey = tuple[Any, ...]
Hydrate = Callable[[Session, IdentityKey, tuple[Any, ...]], object]
"""(session, identity key, column values in order) -> instance. The identity map must not hold the key."""


class LoadContext(NamedTuple):
    """What `load` and `refresh` listeners are given for SQLAlchemy's `QueryContext`: there was no query, but there is
    its session."""

    session: Session


def compile_hydrate(mapper: Mapper[Any], keys: Sequence[str], unloaded: Sequence[str]) -> Hydrate:
    """Make the function that puts rows of this mapper into sessions.

    keys: the attributes that the values are of, in order.
    unloaded: columns that are loaded when one of them is first used, in one SELECT. (Deferred columns and relationships
        know by themselves that they are loaded then; others would be taken for None.)
    """
    manager = mapper.class_manager
    # The names below that have an underscore, or that belong to InstanceState and IdentityMap, are SQLAlchemy's own
    # way to make an instance persistent; there is no public one that also fires the load events.
    source = f"""
def hydrate(session, key, values):
    instance = new(model)
    state = new_state(instance, manager)
    set_state(instance, state)
    state.key = key
    state.session_id = session.hash_key
    session.identity_map._add_unpresent(state, key)
    loaded = instance_dict(instance)
    {"".join(f"loaded[{key!r}], " for key in keys)} = values
    {f"state.expired_attributes.update({tuple(unloaded)!r})" if unloaded else ""}
    hear = events.load  # to ask whether it is empty would be a call
    if hear.parent_listeners or hear.listeners:
        hear(state, Context(session))
        if state.modified:  # a listener assigned through instrumented attributes
            state._commit_all(loaded, session.identity_map)
    hear = session.dispatch.loaded_as_persistent
    if hear.parent_listeners or hear.listeners:
        hear(session, state)
    return instance
"""
    names: dict[str, Any] = {
        "new": mapper.class_.__new__,
        "model": mapper.class_,
        "manager": manager,
        "new_state": manager._state_constructor,
        "set_state": manager._state_setter,
        "instance_dict": instance_dict,
        "events": manager.dispatch,
        "Context": LoadContext,
    }
    exec(compile(source, f"<asynccache: hydrate {mapper.class_.__name__}>", "exec"), names)  # noqa: S102
    hydrate: Hydrate = names["hydrate"]
    return hydrate


def refresh(session: Session, instance: object, keys: Sequence[str], values: tuple[Any, ...]) -> object:
    """Put a row into an instance that has expired, as SQLAlchemy does when it is asked for; give it back.

    keys: as for `compile_hydrate`.
    """
    state, loaded = instance_state(instance), instance_dict(instance)
    loaded.update(zip(keys, values, strict=True))
    if state.manager.dispatch.refresh:
        state.manager.dispatch.refresh(state, LoadContext(session), set(keys))
    state._commit(loaded, keys)  # also what a listener has assigned
    unloaded = [each.key for each in state.manager._scalar_loader_impls if each.key not in loaded]
    state.expired_attributes.intersection_update(unloaded)  # each relationship is loaded when it is used
    return instance
