"""The promises of the protocol under every interleaving of small worlds, and that a mistake in it is found.

pytest tests/test_protocol_search.py            the small worlds, and the mistakes: a minute
nox -s search                                   the large ones as well: many minutes
"""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest

from tests.search.explore import search
from tests.search.mutations import MUTATIONS, Mutation
from tests.search.process import simulated
from tests.search.scenarios import LARGE, SMALL
from tests.search.world import Scenario

# No SQLAlchemy beside its greenlets, through which transactions await. Minutes on a busy machine.
pytestmark = [pytest.mark.without_sqlalchemy, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _simulated() -> Generator[None]:
    # A search keeps millions of tuples, which the collector of cycles would go through again and again.
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 1000)
    with simulated():
        yield
    gc.set_threshold(*before)


@pytest.mark.parametrize("scenario", SMALL, ids=lambda scenario: scenario.name)
def test_every_promise_holds_in_every_interleaving(scenario: Scenario) -> None:
    found = search(scenario)
    assert found.broken is None, str(found)


@pytest.mark.search
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", LARGE, ids=lambda scenario: scenario.name)
def test_every_promise_holds_in_larger_worlds(scenario: Scenario) -> None:
    found = search(scenario)
    print(f"\n{scenario.name}: {found}")  # noqa: T201
    assert found.broken is None, str(found)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_is_found(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.apply(monkeypatch)
    found = search(mutation.world, mutation.server)
    assert found.broken is not None, f"not found: {found}"
    assert found.broken.promise == mutation.breaks, str(found)


def test_a_counterexample_tells_what_happens_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    (mutation,) = (each for each in MUTATIONS if each.name == "a_fill_is_a_set")
    mutation.apply(monkeypatch)
    assert str(search(mutation.world)).splitlines()[1:] == [
        "  1. A asks and reads E0 absent, G absent",
        "  2. A finds G absent: makes it G OPEN #0",
        "  3. A reads E0 absent, G OPEN #0",
        "  4. A finds E0 absent: makes it E0 LEASE #1 of #0",
        "  5. A's SELECT, begun right after its last step, gives v0",
        "  6. A's fill finds G OPEN #0: leaves it",
        "  7. W begins",
        "  8. W finds E0 LEASE #1 of #0: makes it E0 LOCKED by #2",
        "  9. W COMMITs v1",
        " 10. W reads E0 LOCKED by #2",
        " 11. W's unlock finds E0 LOCKED by #2: makes it E0 FREE",
        " 12. A's fill finds E0 FREE: makes it E0 VALUE v0 of #0",
        "     all writers have ended, and v0 is served while the database holds v1",
    ]
