"""What a process is in the middle of, as a value: two that are equal go on alike.

It is read off the tasks themselves: where each coroutine awaits, its local variables, and all that these refer to.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import types
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, cast
from weakref import ReferenceType

from greenlet import greenlet  # type: ignore[import-untyped]

from asynccache.background import Background
from asynccache.metrics import Stats
from asynccache.reading import Miss
from asynccache.repair import Debt
from asynccache.settings import Policy, Settings
from asynccache.telemetry import Telemetry
from tests.search.liveness import live_locals
from tests.search.loop import StillLoop, untyped

ID = re.compile(rb"id\d{10}")
"""Tokens, nonces and owners in the search: as long as real ones, and easy to find in slots."""

Names = dict[bytes, int]


class _Outdated:
    """Takes the place of what was seen in the slots, which is not to be used after an await: to use it fails."""


_OUTDATED = _Outdated()

_PLAIN = frozenset({type(None), bool, int, float, str})

_TELL_NOTHING: tuple[type, ...] = (
    _Outdated,
    Background,  # its tasks are the loop's
    Stats,
    Telemetry,
    Settings,
    Policy,
    StillLoop,
    logging.Logger,
    types.ModuleType,
    types.GenericAlias,
    ReferenceType,
    type,
)


def name_ids(value: bytes, names: Names) -> Hashable:
    """Replace each id by a number, the first to appear by 0: processes that differ only in ids are alike."""
    if ID.search(value) is None:
        return value
    found = [names.setdefault(each, len(names)) for each in ID.findall(value)]
    return ID.sub(b"?", value), *found


class Freezer:
    """Freezes the objects of one process; what was frozen before is referred to by its number.

    now_s: when it is, for what is owed.
    """

    def __init__(self, nothing_to_tell: tuple[type, ...] = (), *, now_s: float = 0.0) -> None:
        self._now_s = now_s
        self.names: Names = {}
        self._nothing_to_tell = (*_TELL_NOTHING, *nothing_to_tell)
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no two have the same id()

    def freeze(self, value: Any) -> Hashable:
        kind: type = type(value)
        if kind in _PLAIN:
            return cast("Hashable", value)
        if kind is bytes:
            return name_ids(value, self.names)
        if kind is tuple or kind is list:
            return tuple([self.freeze(each) for each in value])
        if issubclass(kind, self._nothing_to_tell):
            return kind.__name__
        if issubclass(kind, (tuple, deque)):
            return tuple([self.freeze(each) for each in cast("Iterable[Any]", value)])
        if issubclass(kind, Mapping):
            pairs = cast("Mapping[Any, Any]", value).items()
            return tuple([(self.freeze(key), self.freeze(each)) for key, each in pairs])
        if issubclass(kind, (set, frozenset)):
            return tuple(sorted(map(self.freeze, cast("set[Any]", value)), key=repr))
        if issubclass(kind, Enum):
            return cast("Enum", value).name
        number = self._numbers.get(id(value))
        if number is not None:
            return "seen", number
        number = self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        return number, type(value).__name__, *self._parts(value)

    def _parts(self, value: Any) -> Iterator[Hashable]:
        if isinstance(value, Miss):
            value.entity = value.generation = cast("Any", _OUTDATED)
        if isinstance(value, Debt):
            yield from (max(0.0, value.due_s - self._now_s), value.doubtful)
        elif isinstance(value, asyncio.Task):
            task: asyncio.Task[Any] = value
            yield from (task.get_name(), task.cancelling())
            yield self._state(task) if task.done() else self.freeze(untyped(task)._fut_waiter)
            yield None if task.done() else self.freeze(task.get_coro())
        elif isinstance(value, asyncio.TimerHandle):
            yield value.when()
        elif isinstance(value, asyncio.Future):
            yield self._state(value)
        elif isinstance(value, types.CoroutineType):
            coroutine: types.CoroutineType[Any, Any, Any] = value
            yield self._frame(coroutine.cr_frame)
            if isinstance(coroutine.cr_await, types.CoroutineType):
                yield self.freeze(coroutine.cr_await)
        elif isinstance(value, greenlet):
            frame: types.FrameType | None = value.gr_frame
            while frame is not None:
                yield self._frame(frame)
                frame = frame.f_back
        elif isinstance(value, types.FunctionType):
            yield value.__qualname__
            yield from (self.freeze(cell.cell_contents) for cell in value.__closure__ or ())
        elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            yield value.__name__
            yield self.freeze(value.__self__)
        elif not isinstance(value, (BaseException, asyncio.Handle)):
            yield from (self.freeze(each) for each in _attributes(value))

    def _frame(self, frame: types.FrameType | None) -> Hashable:
        if frame is None:
            return None
        variables = tuple((name, self.freeze(each)) for name, each in live_locals(frame))
        return frame.f_code.co_qualname, frame.f_lasti, variables

    def _state(self, future: asyncio.Future[Any]) -> Hashable:
        if not future.done():
            return "pending"
        if future.cancelled():
            return "cancelled"
        return self.freeze(future.exception() or future.result())


def _attributes(value: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(value):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))
        return
    yield from (each for _, each in sorted(getattr(value, "__dict__", {}).items()))
    for class_ in type(value).__mro__:
        slots: tuple[str, ...] = class_.__dict__.get("__slots__", ())
        yield from (getattr(value, slot) for slot in slots if hasattr(value, slot))
