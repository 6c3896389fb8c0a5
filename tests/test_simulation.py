"""The whole library in a deterministic simulation: thousands of histories, with faults at every await.

Each version of SQLAlchemy has histories of its own. `HISTORIES=100000 pytest tests/test_simulation.py` plays more of
them. A history that fails is shrunken and printed, with all that happened in it; `play(History(...))` plays it again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.simulation import world
from tests.simulation.fleet import PROCESSES
from tests.simulation.history import History, Operation
from tests.simulation.mutations import MUTATIONS
from tests.simulation.strategies import HISTORIES
from tests.simulation.world import ViolationError, play

SQLALCHEMY = sqlalchemy.__version__[:3]
BATCH = 1000
BATCHES = max(1, int(os.environ.get("HISTORIES", "5000")) // BATCH)

MUTANT_HISTORIES_MAX = 6000


def histories(number: int, *phases: Phase) -> Callable[[Any], Any]:
    # Without Hypothesis's phase "explain", whose tracing makes each history take five times as long.
    return settings(
        max_examples=number,
        phases=phases,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


@pytest.mark.timeout(900)  # for the shrinking, and busy machines; the histories themselves take ten seconds
@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_history_breaks_a_promise(batch: int) -> None:
    @seed(f"{SQLALCHEMY} {batch}")
    @histories(BATCH, Phase.generate, Phase.shrink)
    @given(HISTORIES)
    def check(history: History) -> None:
        play(history)

    check()


@pytest.mark.once
@pytest.mark.timeout(600)  # one wants two thousand histories, which is half a minute where nothing else runs
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_rule_that_is_removed_is_missed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[mutation](monkeypatch)

    @seed(0)
    @histories(MUTANT_HISTORIES_MAX, Phase.generate)
    @given(HISTORIES)
    def check(history: History) -> None:
        play(history)

    with pytest.raises(ViolationError):
        check()


@seed(0)
@histories(100, Phase.generate)
@given(HISTORIES)
def test_a_history_is_played_the_same_way_again(history: History) -> None:
    first = play(history)
    world.forget_the_fleet()
    again = play(history)
    assert first.shown() == again.shown()


@seed(0)
@histories(200, Phase.generate, Phase.shrink)
@given(
    readers=st.lists(
        st.builds(
            Operation,
            kind=st.sampled_from(["get", "get many", "get connected"]),
            process=st.integers(0, PROCESSES - 1),
            pause_ms=st.sampled_from([0, 0, 1, 2, 5]),
            cache=st.lists(st.integers(0, 3)).map(bytes),
            statements=st.lists(st.integers(0, 4)).map(bytes),
        ),
        min_size=1,
        max_size=12,
    ),
    choices=st.binary(),
)
def test_concurrent_misses_make_one_select_when_all_goes_well(readers: list[Operation], choices: bytes) -> None:
    played = play(History(tuple(readers), choices))
    assert played.database.selects == 1


def test_a_lock_that_was_lost_is_made_up_for_however_much_is_owed() -> None:
    """
    1. A COMMIT is cut off; the locks of two rows stay, to be released when it must have ended. Only one of them fits
       into what is remembered.
    2. The locks are evicted. A reader finds nothing, and stores the old rows.
    3. The COMMIT is executed.
    """
    late = Operation("update where", keys=(0, 1), commits=b"\7")
    played = play(
        History((late, Operation("evict", keys=(0, 1), pause_ms=30), Operation("get many", keys=(0, 1))), repairs_max=1)
    )
    assert [played.database.committed(key) for key in (0, 1)] != [100, 101]
