"""No read is older than a commit that was acknowledged before it began: eight and more processes, each fault for a
moment. The long runs are `nox -s torture`, and what they do is told in `tests/torture/`.
"""

from __future__ import annotations

import pytest

from asynccache.settings import OnLockFailure
from tests.servers import Postgres
from tests.torture.mixes import ALL, CATCHES, Fault, Mix
from tests.torture.run import Result, run

# Busy machines make runs longer: each lasts until it has shown something, and takes all processors meanwhile.
pytestmark = [pytest.mark.torture, pytest.mark.alone, pytest.mark.timeout(150)]

SECONDS = 1.5
COMMIT: OnLockFailure = "commit"
RAISE: OnLockFailure = "raise"

RUNS = [
    Mix(frozenset(), COMMIT, SECONDS),
    Mix(frozenset({Fault.CANCEL_READS, Fault.DELAY_COMMITS}), COMMIT, SECONDS),
    Mix(frozenset({Fault.CANCEL_COMMITS}), COMMIT, SECONDS),
    Mix(frozenset({Fault.KILL}), COMMIT, 2 * SECONDS),
    Mix(frozenset({Fault.EVICT}), COMMIT, SECONDS),
    Mix(frozenset({Fault.CUT}), COMMIT, SECONDS),
    Mix(frozenset({Fault.LAG}), RAISE, SECONDS),
    Mix(frozenset({Fault.RESTART}), COMMIT, SECONDS),
    Mix(frozenset({Fault.RESTART}), RAISE, SECONDS),
    Mix(frozenset({Fault.PAUSE}), COMMIT, SECONDS),
    Mix(frozenset({Fault.PAUSE}), RAISE, SECONDS),
    Mix(frozenset({Fault.PARTITION}), COMMIT, SECONDS),
    Mix(frozenset({Fault.PARTITION}), RAISE, SECONDS),
]
AT_ONCE = [Mix(ALL, COMMIT, SECONDS), Mix(ALL, RAISE, SECONDS)]

NEEDED = ["never-lock-generations", "lock-after-commit", "fill-blindly", "share-uncertified"]
"""Parts of the protocol that hide behind others when they are left out. For the rest: `nox -s torture -- --mutation
all`."""


def told(result: Result) -> str:
    return "\n".join([*result.broken, *result.proves_nothing, *map(str, result.events[:20]), str(result.counts)])


@pytest.mark.parametrize(
    "mix", [*(pytest.param(mix, marks=pytest.mark.once) for mix in RUNS), *AT_ONCE], ids=lambda mix: mix.name
)
def test_nothing_stale_is_read_under(mix: Mix, postgres: Postgres) -> None:
    result = run(mix, postgres)
    assert result.counts.stale == 0, told(result)
    assert not result.broken, told(result)
    assert not result.proves_nothing, told(result)


@pytest.mark.once
@pytest.mark.parametrize("mutation", NEEDED)
def test_it_would_be_seen_if_the_library_did(mutation: str, postgres: Postgres) -> None:
    result = run(Mix(CATCHES[mutation], RAISE, 60, mutation=mutation, until_stale=True), postgres)
    assert result.counts.stale > 0, told(result)
