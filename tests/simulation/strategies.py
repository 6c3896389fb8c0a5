"""Histories for Hypothesis to draw.

It shrinks them towards few operations, no pauses, quick answers, and a queue in which the first come are served first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

from hypothesis import strategies as st

from tests.simulation.backend import FATES
from tests.simulation.database import COMMITS, STATEMENTS
from tests.simulation.fleet import PROCESSES
from tests.simulation.history import History, Kind, Operation

_READS: Sequence[Kind] = ("get", "get", "get", "get many", "get connected")
_WRITES: Sequence[Kind] = ("update where", "update where", "save", "update all", "delete", "savepoint", "rollback")
_TROUBLE: Sequence[Kind] = ("evict", "evict generations", "restart", "cut off")
_FOREIGN: Sequence[Kind] = ("foreign", "foreign in session")
_BY_VALUE: Sequence[Kind] = ("get by", "get by")
assert {*_READS, *_BY_VALUE, *_WRITES, *_TROUBLE, *_FOREIGN} == set(get_args(Kind))


def _decisions(fates: int, calls: Sequence[int]) -> st.SearchStrategy[bytes]:
    """One of these calls has a fate other than a quick answer, or all have any."""
    one = st.builds(
        lambda before, fate: bytes(before) + bytes([fate]), st.sampled_from(calls), st.integers(1, fates - 1)
    )
    return one | st.lists(st.integers(0, fates - 1), max_size=len(calls)).map(bytes)


_CACHE = _decisions(len(FATES), range(8))
_STATEMENTS = _decisions(len(STATEMENTS), (0, 0, 0, 1, 2))
_COMMITS = st.integers(1, len(COMMITS) - 1).map(lambda fate: bytes([fate]))

_PAUSES_MS = (0, 0, 3, 10, 20, 40, 100, 400, 1000, 2000)


def _operation(
    kinds: Sequence[Kind],
    *,
    keys: Sequence[tuple[int, ...]] = ((0,),),
    pauses_ms: Sequence[int] = _PAUSES_MS,
    **special: st.SearchStrategy[Any],
) -> st.SearchStrategy[Operation]:
    return st.builds(
        Operation,
        kind=st.sampled_from(kinds),
        process=st.integers(0, PROCESSES - 1),
        keys=st.sampled_from(keys),
        pause_ms=st.sampled_from(pauses_ms),
        **special,
    )


def _crowd(
    kinds: Sequence[Kind], keys: Sequence[tuple[int, ...]], pauses_ms: Sequence[int]
) -> st.SearchStrategy[tuple[Operation, ...]]:
    """Anybody does anything, and one thing or all may go wrong for each."""
    operation = partial(_operation, kinds, keys=keys, pauses_ms=pauses_ms)
    cancelled_at = st.integers(0, 50)
    return st.lists(
        st.one_of(
            operation(),
            operation(statements=_STATEMENTS),
            operation(commits=_COMMITS),
            operation(cache=_CACHE),
            operation(cache=_CACHE, statements=_STATEMENTS, commits=_COMMITS),
            operation(cancelled_at=cancelled_at),
            operation(cancelled_at=cancelled_at, statements=_STATEMENTS, commits=_COMMITS),
        ),
        min_size=2,
        max_size=7,
    ).map(tuple)


_READ = _operation(("get", "get", "get many"))
_READ_BY = _operation(("get by",))
_WRITE = _operation(("update where", "update where", "save", "update all"))
_SLOW_READ = _operation(("get",), statements=st.sampled_from([b"\4", b"\5", b"\6"]))
_SLOW_FILL = _operation(("get",), cache=st.sampled_from([bytes(calls) + b"\5" for calls in (2, 3, 4)]))
_SLOW_WRITE = _operation(("update where", "save"), commits=st.sampled_from([b"\3", b"\4"]))
_ODD_WRITE = _operation(("update where", "save", "update all"), commits=_COMMITS)
_HINDERED_WRITE = _operation(("update where", "save", "update all"), cache=_CACHE)
_CUT_OFF = _operation(("cut off",))
_LOSS = _operation(_TROUBLE)
_SHORT_MS = (0, 0, 1, 2, 3, 5, 8, 20)
_LONG_MS = (0, 0, 3, 10, 60, 400, 1000, 4000, 12_000)
_ROWS = ((0,), (1,), (2,), (0, 1), (1, 0), (0, 2), (0, 1, 2))

# Most histories are about one row and few kinds of operations, since that is where they meet ("swarm testing":
# Groce et al., ISSTA 2012). The first ones have the shape of the races that the design is about.
_PLOTS: Sequence[st.SearchStrategy[tuple[Operation, ...]]] = [
    st.tuples(_SLOW_READ, _WRITE, _READ, _READ),
    st.tuples(_READ, _SLOW_FILL, _WRITE, _READ, _READ),
    st.tuples(_SLOW_WRITE, _LOSS, _READ, _READ),
    st.tuples(_READ, _ODD_WRITE, _READ, _READ),
    st.tuples(_READ, _ODD_WRITE, _LOSS, _READ),
    st.tuples(_READ, _LOSS, _HINDERED_WRITE, _READ, _READ),
    st.tuples(_READ, _CUT_OFF, _WRITE, _READ, _READ),
    st.tuples(_READ_BY, _READ, _WRITE, _READ, _READ_BY),
    st.tuples(_READ_BY, _ODD_WRITE, _READ_BY, _READ_BY),
    _crowd(("get", "get", "get many", "update where", "update all"), [(0,)], _SHORT_MS),
    _crowd(("get", "get", "get", "update where"), [(0,)], _SHORT_MS),
    _crowd((*_READS, *_WRITES, *_TROUBLE), [(0,)], _LONG_MS),
    _crowd((*_READS, *_BY_VALUE, *_WRITES, *_TROUBLE, *_FOREIGN), _ROWS, _LONG_MS),
]

HISTORIES = st.builds(
    History,
    operations=st.one_of(_PLOTS),
    choices=st.just(b"") | st.binary(max_size=10) | st.binary(min_size=60, max_size=60),
    warm=st.sampled_from([True, True, True, False]),
    hold_off_s=st.sampled_from([0.0, 0.0, 0.0, 2.0]),
    on_lock_failure=st.sampled_from(["commit", "commit", "raise"]),
    slots_max=st.sampled_from([64, 64, 2]),
    repairs_max=st.sampled_from([10_000, 1]),
)
