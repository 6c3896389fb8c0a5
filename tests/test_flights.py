"""Who leads, who waits, who may share: the rules of one load per key, without an event loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from asynccache.flights import Answer, Flight, FlightTable, Lead, LoadAlone, ReadAgain, Share, Waiter
from asynccache.protocol import Lease

pytestmark = pytest.mark.without_sqlalchemy

LEASE = Lease(b"token-------", b"nonce-------")


@dataclass
class Told:
    """A waiter, and what it was told."""

    answers: list[Answer[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiter: Waiter[str] = Waiter(self.answers.append)

    @property
    def answer(self) -> Answer[str] | None:
        assert len(self.answers) <= 1, "told twice"
        return self.answers[0] if self.answers else None

    def led(self) -> Flight[str]:
        assert isinstance(self.answer, Lead)
        return self.answer.flight


@pytest.fixture
def table() -> FlightTable[str]:
    return FlightTable()


def joined(flight: Flight[str], count: int = 1) -> list[Told]:
    told = [Told() for _ in range(count)]
    for each in told:
        flight.join(each.waiter)
    return told


def test_who_asked_before_the_select_may_share_it(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    (early,) = joined(flight)
    flight.begin_load()
    flight.share_early(b"row")
    assert early.answer == Share(b"row")


def test_who_asked_during_the_select_may_not_until_it_is_certified(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    flight.begin_load()
    (late,) = joined(flight)
    flight.share_early(b"row")
    assert late.answer is None
    flight.land(b"row")
    assert late.answer == Share(b"row")


def test_who_may_not_share_moves_on_in_one_step_and_before_the_next_select(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    flight.begin_load()
    first, second, third = joined(flight, 3)
    flight.land(None)
    following = first.led()
    assert table.flights == {"k": following}
    following.begin_load()
    following.share_early(b"newer row")
    assert second.answer == third.answer == Share(b"newer row")


def test_who_moves_on_joins_a_flight_that_has_begun_meanwhile(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    flight.begin_load()
    (waiting,) = joined(flight)
    flight.close()
    following = table.lead("k")
    flight.land(None)
    assert waiting.answer is None
    following.begin_load()
    following.share_early(b"row")
    assert waiting.answer == Share(b"row")


def test_who_is_refused_twice_loads_alone(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    flight.begin_load()
    (waiting,) = joined(flight)
    flight.close()
    following = table.lead("k")
    following.begin_load()
    flight.land(None)
    following.land(None)
    assert waiting.answer == LoadAlone()


def test_nobody_joins_a_closed_flight(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    flight.close()
    assert table.flights == {}
    assert table.lead("k") is not flight


def test_a_flight_takes_only_itself_out_of_the_table(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    flight.close()
    following = table.lead("k")
    flight.land(None)
    flight.call_off()
    flight.close()
    assert table.flights == {"k": following}


def test_a_second_flight_of_a_key_is_a_mistake(table: FlightTable[str]) -> None:
    table.lead("k")
    with pytest.raises(AssertionError, match="second flight"):
        table.lead("k")


def test_a_flight_that_found_anothers_value_has_its_waiters_read_it(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    told = joined(flight, 2)
    flight.call_off()
    assert [each.answer for each in told] == [ReadAgain(), ReadAgain()]
    assert table.flights == {}


def test_a_cancelled_leader_hands_over_its_lease_and_not_its_row(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    flight.lease = LEASE
    (early,) = joined(flight)
    flight.begin_load()
    late, last = joined(flight, 2)
    assert flight.hand_over()
    assert early.led() is flight
    assert flight.lease is LEASE
    assert table.flights == {"k": flight}
    # Its SELECT has not begun: all who wait have asked before it.
    flight.begin_load()
    flight.share_early(b"row")
    assert late.answer == last.answer == Share(b"row")


def test_a_cancelled_leader_without_waiters_ends_the_flight(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    assert not flight.hand_over()
    assert table.flights == {}


def test_who_leaves_is_told_nothing(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    early, stays = joined(flight, 2)
    flight.begin_load()
    (late,) = joined(flight)
    early.waiter.leave()
    late.waiter.leave()
    flight.share_early(b"row")
    flight.land(b"row")
    assert early.answer is None
    assert late.answer is None
    assert stays.answer == Share(b"row")


def test_who_leaves_the_flight_it_moved_to_is_not_made_its_leader(table: FlightTable[str]) -> None:
    flight = table.lead("k")
    flight.begin_load()
    leads, leaves, stays = joined(flight, 3)
    flight.land(None)
    leaves.waiter.leave()
    assert leads.led().hand_over()
    assert leaves.answer is None
    assert stays.led() is leads.led()
