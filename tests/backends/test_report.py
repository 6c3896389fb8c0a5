"""What a server's `stats` mean, one cause after the other; that real servers say so is in test_check.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields

import pytest

from asynccache.backends._node import exptime_of
from asynccache.backends.report import (
    Finding,
    Level,
    MemoryStats,
    NodeReport,
    lock_life_s,
    locks_are_protected,
    report_failure,
    report_on,
    report_on_memory,
    report_unchecked,
)
from asynccache.protocol import lock

pytestmark = pytest.mark.without_sqlalchemy

MIB = 1 << 20

# Of a memcached 1.6.18 with `-o temporary_ttl=25`, what is read of it.
STATS = {
    "uptime": "7300",
    "version": "1.6.18",
    "curr_connections": "3",
    "reserved_fds": "20",
    "limit_maxbytes": str(64 * MIB),
    "bytes": str(10 * MIB),
    "evictions": "0",
    "store_no_memory": "0",
}
SETTINGS = {
    "maxconns": "1024",
    "evictions": "on",
    "cas_enabled": "yes",
    "item_size_max": str(MIB),
    "temp_lru": "yes",
    "temporary_ttl": "25",
}


Told = Mapping[str, str]


def report(
    stats: Told | None = None, settings: Told | None = None, *, round_trip_s: float = 0.001, lock_ttl_s: float = 10
) -> NodeReport:
    """Report on a server in good order but for what is given."""
    told = {**STATS, **(stats or {})}, {**SETTINGS, **(settings or {})}
    return report_on("host:11211", *told, round_trip_s=round_trip_s, lock_ttl_s=lock_ttl_s)


def about(topic: str, report: NodeReport) -> Finding:
    (found,) = [finding for finding in report.findings if finding.topic == topic]
    return found


def worse_than_ok(report: NodeReport) -> dict[str, Level]:
    return {finding.topic: finding.level for finding in report.findings if finding.level is not Level.OK}


def test_a_server_in_good_order_gives_no_reason_to_act() -> None:
    assert report() == NodeReport(
        node="host:11211",
        reachable=True,
        error=None,
        version="1.6.18",
        uptime_s=7300,
        round_trip_s=0.001,
        cas_enabled=True,
        evicts=True,
        temporary_ttl_s=25,
        locks_protected=True,
        item_size_max_bytes=MIB,
        memory_used_bytes=10 * MIB,
        memory_max_bytes=64 * MIB,
        evictions=0,
        refusals=0,
        connections=3,
        connections_max=1004,
        findings=(
            Finding(Level.OK, "reachable", "yes, in 1.0 ms"),
            Finding(Level.OK, "version", "1.6.18, up for 2 h"),
            Finding(Level.OK, "cas", "enabled"),
            Finding(Level.OK, "locks", "not evicted: they live at most 21 s, and temporary_ttl is 25 s"),
            Finding(Level.OK, "item size", "up to 1 MiB"),
            Finding(Level.OK, "memory", "10 MiB of 64 MiB used"),
            Finding(Level.OK, "evictions", "none"),
            Finding(Level.OK, "connections", "3 of 1,004"),
        ),
    )
    assert report().usable


@pytest.mark.parametrize(
    ("stats", "settings", "topic", "found", "way_out"),
    [
        ({}, {"temp_lru": "no", "temporary_ttl": "61"}, "locks", "not set", "temporary_ttl=25"),
        ({}, {"temporary_ttl": "20"}, "locks", "is 20 s", "temporary_ttl=25"),
        ({}, {"temporary_ttl": "43"}, "temporary_ttl", "43 s", "temporary_ttl=25"),
        ({}, {"item_size_max": "2048"}, "item size", "2 KiB: larger rows are not cached", "raise -I"),
        ({"bytes": str(60 * MIB)}, {}, "memory", "60 MiB of 64 MiB used: nearly full", "raise -m, now 64"),
        ({"store_no_memory": "5000"}, {}, "memory", "5,000 writes were refused", "raise -m, now 64"),
        ({"evictions": "5000"}, {}, "evictions", "5,000 in 2 h", "raise -m"),
        ({}, {"evictions": "off"}, "evictions", "refuses locks", "without -M"),
        ({"curr_connections": "1000"}, {}, "connections", "1,000 of 1,004", "raise -c"),
        ({"version": "1.4.39"}, {}, "version", "1.4.39", "1.5.0 or newer"),
    ],
)
def test_what_could_be_better_is_a_warning_with_a_way_out(
    stats: Told, settings: Told, topic: str, found: str, way_out: str
) -> None:
    warned = report(stats, settings)
    assert warned.usable
    assert worse_than_ok(warned) == {topic: Level.WARNING}
    assert found in about(topic, warned).found
    assert way_out in about(topic, warned).way_out


def test_a_server_that_is_far_away_is_slower_than_the_query_that_it_saves() -> None:
    assert worse_than_ok(report(round_trip_s=0.010)) == {}
    assert worse_than_ok(report(round_trip_s=0.011)) == {"reachable": Level.WARNING}
    assert about("reachable", report(round_trip_s=0.011)).found == "yes, in 11.0 ms"


def test_a_server_without_versions_to_compare_cannot_be_used() -> None:
    disabled = report(settings={"cas_enabled": "no"})
    assert not disabled.usable
    assert about("cas", disabled).level is Level.ERROR
    assert about("cas", disabled).way_out == "start memcached without -C"


def test_a_server_that_evicts_nothing_evicts_no_locks() -> None:
    assert about("locks", report(settings={"evictions": "off", "temp_lru": "no"})).level is Level.OK


@pytest.mark.parametrize("version", ["1.5.0", "1.6.18_beta", "1.10.0", "custom"])
def test_a_version_that_is_new_or_not_understood_is_let_pass(version: str) -> None:
    assert about("version", report({"version": version})).level is Level.OK


def test_what_the_server_does_not_tell_is_none_and_not_judged() -> None:
    silent = report_on("host:11211", {}, {}, round_trip_s=0.001, lock_ttl_s=10)
    assert silent == NodeReport("host:11211", reachable=True, round_trip_s=0.001, findings=silent.findings)
    assert [finding.topic for finding in silent.findings] == ["reachable", "locks"]
    assert worse_than_ok(silent) == {"locks": Level.WARNING}
    assert "does not tell" in about("locks", silent).found
    assert silent.usable


@pytest.mark.parametrize("nonsense", ["", "-1", "many", "1e9", "²"])
def test_a_number_that_is_none_was_not_told(nonsense: str) -> None:
    told = report({"bytes": nonsense, "evictions": nonsense}, {"maxconns": nonsense})
    assert (told.memory_used_bytes, told.evictions, told.connections_max) == (None, None, None)


# Locks


@pytest.mark.parametrize("lock_ttl_s", [0.2, 1, 1.5, 10, 12.34, 60])
def test_a_lock_lives_as_long_as_the_backend_has_it_live(lock_ttl_s: float) -> None:
    written = lock(b"o" * 12, 0, int(1000 * lock_ttl_s))(None)
    assert written is not None
    assert lock_life_s(lock_ttl_s) == exptime_of(written, time.time())


@pytest.mark.parametrize(
    ("settings", "protected"),
    [
        ({"evictions": "on", "temp_lru": "yes", "temporary_ttl": "21"}, True),
        ({"evictions": "on", "temp_lru": "yes", "temporary_ttl": "20"}, False),
        ({"evictions": "on", "temp_lru": "no", "temporary_ttl": "61"}, False),  # 61 is the default, and not in force
        ({"evictions": "off", "temp_lru": "no", "temporary_ttl": "61"}, True),
        ({"temp_lru": "yes", "temporary_ttl": "21"}, True),
        ({"evictions": "on", "temp_lru": "yes"}, None),
        ({"evictions": "on", "temporary_ttl": "61"}, None),
        ({}, None),
    ],
)
def test_locks_are_protected_where_nothing_that_lives_so_short_is_evicted(
    settings: dict[str, str], protected: bool | None
) -> None:
    assert locks_are_protected(settings, 10) is protected


def test_the_way_out_follows_from_lock_ttl() -> None:
    assert "temporary_ttl=65, so that locks, which live at most 61 s" in about("locks", report(lock_ttl_s=30)).way_out
    assert report(lock_ttl_s=12).locks_protected
    assert not report(lock_ttl_s=12.1).locks_protected


# What is no memcached that answers


def test_a_server_that_does_not_answer_cannot_be_used() -> None:
    down = report_failure("host:11211", "no answer in time", reachable=False)
    assert (down.usable, down.reachable, down.error) == (False, False, "no answer in time")
    assert "correct the URL" in about("reachable", down).way_out


def test_a_server_that_refuses_cannot_be_used() -> None:
    refused = report_failure("host:11211", "unauthenticated", reachable=True)
    assert (refused.usable, refused.reachable) == (False, True)
    assert about("reachable", refused).found == "refused: unauthenticated"


def memory(**different: int) -> NodeReport:
    empty = dict.fromkeys((field.name for field in fields(MemoryStats)), 0)
    return report_on_memory(
        MemoryStats(**empty | {"entries_max": 10, "bytes_max": MIB, "value_bytes_max": MIB} | different)
    )


def test_memory_is_usable_and_tells_its_bounds() -> None:
    roomy = memory(entries=9, bytes_used=MIB // 2)
    assert worse_than_ok(roomy) == {}
    assert (roomy.usable, roomy.item_size_max_bytes, roomy.memory_max_bytes) == (True, MIB, MIB)
    assert about("memory", roomy).found == "512 KiB of 1 MiB used"
    assert worse_than_ok(memory(entries=10)) == {"entries": Level.WARNING}


@pytest.mark.parametrize(("entries", "bound"), [(9, "entries_max"), (1, "bytes_max")])
def test_memory_that_evicts_says_which_bound_to_raise(entries: int, bound: str) -> None:
    full = memory(entries=entries, bytes_used=MIB // 2, evictions=5000, pinned_evictions=3)
    assert worse_than_ok(full) == {"locks": Level.WARNING, "evictions": Level.WARNING}
    assert about("evictions", full).found == "5,000: not all that is cached finds room"
    assert full.locks_protected is False
    for topic in ("locks", "evictions"):
        assert about(topic, full).way_out.startswith(f"raise {bound}")


def test_a_backend_that_cannot_be_checked_says_so() -> None:
    unchecked = report_unchecked("mine")
    assert unchecked == NodeReport("'mine'", findings=unchecked.findings)
    assert worse_than_ok(unchecked) == {"check": Level.WARNING}
