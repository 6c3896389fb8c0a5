"""The adapters, against the libraries that they are for: what is scraped, what is exported, what is logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from asynccache import AsyncCachedSession, Cache, NodeChanged, NodeState
from asynccache.adapters.instruments import DURATIONS_S, INSTRUMENTS
from asynccache.adapters.logs import LogObserver
from asynccache.adapters.opentelemetry import OpenTelemetryObserver
from asynccache.adapters.prometheus import PrometheusObserver
from asynccache.events import Bypassed, Event, FillDropped, Garbage, Hit, LockLost, Missed, RepairsChanged
from asynccache.testing import failing
from tests.conftest import Sessions
from tests.models import Author, Staff
from tests.servers import Memcached
from tests.session.slots import name_of
from tests.told import Told
from tests.watch import Watch

Measured = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def work(sessions: Sessions, cache: Cache) -> None:
    """A little of everything: 2 hits, one of them that there is no such row; 3 misses; a commit; a failure."""
    for id_ in (1, 1, 2, 2):
        await name_of(sessions, id_)
        await cache.drain()
    async with sessions() as session:
        await session.get(Author, 1, populate_existing=True)
    with failing(cache):
        async with sessions.begin() as session:
            (await session.get_one(Author, 1)).name = "Eve"
    await cache.drain()


@pytest.fixture
async def ann(plain: async_sessionmaker[AsyncSession]) -> None:
    async with plain.begin() as session:
        session.add(Author(id=1, name="Ann"))


def every_event_is_measured(told: Told, cache: Cache, measured: Measured, prefix: str, cache_label: str) -> None:
    """What was measured is what was told, and what the cache counted."""

    def of(name: str, **labels: str) -> float:
        return measured.get((prefix + name, frozenset({"cache": cache_label, **labels}.items())), 0)

    author, stats = {"model": "Author"}, cache.stats
    assert of("hits", **author, missing="false") == stats.hits > 0
    assert of("hits", **author, missing="true") == stats.negative_hits > 0
    assert of("misses", **author) == stats.misses > 0
    assert of("loads", **author) == stats.loads > 0
    assert of("fills", **author) == stats.fills > 0
    assert of("bypassed", **author, reason="options") == stats.bypassed["options"] == 1
    assert of("locks_failed", **author) == stats.locks_failed == 1
    assert of("unlocks", **author) == of("repairs", **author) == stats.repairs == 1
    assert of("backend_errors") == stats.backend_errors > 0
    assert of("repairs_owed") == 0
    assert told, "somebody else listens as well"


# ---------------------------------------------------------------------------------------------------------- Prometheus


def scraped(registry: CollectorRegistry) -> Measured:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name.removesuffix("_total"), frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


async def test_prometheus_scrapes_what_was_told(ann: None, sessions: Sessions, cache: Cache) -> None:
    registry, told = CollectorRegistry(), Told(cache)
    cache.observe(PrometheusObserver(registry))
    await work(sessions, cache)
    measured = scraped(registry)
    every_event_is_measured(told, cache, measured, "asynccache_", "")
    author = frozenset({"cache": "", "model": "Author"}.items())
    assert measured["asynccache_load_duration_seconds_count", author] == cache.stats.loads
    took_s = sum(each.duration_s for each in told.of(Hit))
    assert measured["asynccache_hit_duration_seconds_sum", author] == pytest.approx(took_s)
    assert measured["asynccache_hit_duration_seconds_bucket", author | {("le", "+Inf")}] == len(told.of(Hit))
    bounds = {dict(labels)["le"] for name, labels in measured if name == "asynccache_hit_duration_seconds_bucket"}
    assert {float(bound) for bound in bounds} == {*DURATIONS_S, float("inf")}


async def test_several_caches_share_the_metrics_of_a_registry(ann: None, sessions: Sessions, cache: Cache) -> None:
    registry = CollectorRegistry()
    one = PrometheusObserver(registry, prefix="airports", cache="one")
    other = one.for_cache("other")
    one(Missed(Author, 2))
    other(Missed(Author, 5))
    other(Missed(Staff, 7))
    measured = scraped(registry)
    assert {dict(labels)["cache"] + dict(labels)["model"]: value for (_, labels), value in measured.items()} == {
        "oneAuthor": 2,
        "otherAuthor": 5,
        "otherStaff": 7,
    }
    with pytest.raises(ValueError, match="Duplicated"):
        PrometheusObserver(registry, prefix="airports")


def test_prometheus_shows_a_server_that_is_away() -> None:
    registry = CollectorRegistry()
    observer = PrometheusObserver(registry)
    node = frozenset({"cache": "", "node": "host:11211"}.items())
    for state, away in ((NodeState.OPEN, 1), (NodeState.HALF_OPEN, 1), (NodeState.CLOSED, 0)):
        observer(NodeChanged("host:11211", state))
        measured = scraped(registry)
        assert measured["asynccache_node_away", node] == away
        assert measured["asynccache_breakers", node | {("state", state.value)}] == 1


# ------------------------------------------------------------------------------------------------------- OpenTelemetry


@pytest.fixture
def reader() -> Iterator[InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    yield reader
    reader.shutdown()


def exported(reader: InMemoryMetricReader) -> dict[str, Any]:
    data = reader.get_metrics_data()
    assert data is not None
    (resource,) = data.resource_metrics
    (scope,) = resource.scope_metrics
    assert scope.scope.name == "asynccache"
    return {metric.name: metric for metric in scope.metrics}


async def test_opentelemetry_exports_what_was_told(
    ann: None, sessions: Sessions, cache: Cache, reader: InMemoryMetricReader
) -> None:
    told = Told(cache)
    meter = MeterProvider([reader]).get_meter("asynccache")
    cache.observe(OpenTelemetryObserver(meter, cache="airports"))
    await work(sessions, cache)
    metrics = exported(reader)
    measured: Measured = {
        (name, frozenset(point.attributes.items())): point.value
        for name, metric in metrics.items()
        for point in metric.data.data_points
        if hasattr(point, "value")
    }
    every_event_is_measured(told, cache, measured, "asynccache.", "airports")
    assert (metrics["asynccache.hits"].unit, metrics["asynccache.hit_duration"].unit) == ("{row}", "s")
    (point,) = metrics["asynccache.hit_duration"].data.data_points
    assert (point.count, point.explicit_bounds) == (len(told.of(Hit)), DURATIONS_S)
    assert point.sum == pytest.approx(sum(each.duration_s for each in told.of(Hit)))


def test_several_caches_share_the_instruments_of_a_meter(reader: InMemoryMetricReader) -> None:
    one = OpenTelemetryObserver(MeterProvider([reader]).get_meter("asynccache"), cache="one")
    one(Missed(Author, 2))
    one.for_cache("other")(Missed(Author, 5))
    points = exported(reader)["asynccache.misses"].data.data_points
    assert {point.attributes["cache"]: point.value for point in points} == {"one": 2, "other": 5}


def test_every_kind_of_event_has_an_instrument_and_every_instrument_a_name_of_its_own() -> None:
    assert set(INSTRUMENTS) == set(get_args(Event))
    names = [instrument.name for instruments in INSTRUMENTS.values() for instrument in instruments]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------------------------------------------------- logging


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


async def test_a_line_is_logged_for_each_reason_and_none_for_each_get(
    ann: None, sessions: Sessions, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asynccache")
    cache.observe(LogObserver())
    for _ in range(100):
        await name_of(sessions)
        async with sessions() as session:
            await session.get(Author, 1, populate_existing=True)
            await session.get(Staff, 1, populate_existing=True)
            await session.get(Author, True)
    assert lines(caplog) == [
        "rows of Author are read past the cache: options",
        "rows of Staff are read past the cache: options",
        "rows of Author are read past the cache: primary key type",
    ]


def test_what_is_logged_once_for_each_model(caplog: pytest.LogCaptureFixture) -> None:
    observer = LogObserver()
    for _ in range(3):
        for event in (
            FillDropped(Author, 1, "refused"),
            FillDropped(Author, 1, "locked"),
            LockLost(Author, 1),
            Hit(Author, 1, missing=False, duration_s=1),
        ):
            observer(event)
    assert lines(caplog) == [
        "the cache server refused to store a row of Author: it is too large, or there is no memory",
        "locks of Author were lost before their COMMIT was answered: evicted, or the server was restarted; "
        "`python -m asynccache check` tells what to do",
    ]
    caplog.clear()
    caplog.set_level(logging.INFO, "asynccache")
    for _ in range(3):
        observer(Garbage(Author, 1))
        observer(Bypassed(Author, 1, "options"))
    assert len(lines(caplog)) == 2


def test_repairs_are_logged_as_they_begin_and_end_and_not_more_often_than_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 1000.0
    observer = LogObserver(quiet_s=60, clock=lambda: now_s)
    for _ in range(180):  # a server that comes and goes every second, for three minutes
        observer(RepairsChanged(3))
        now_s += 0.5
        observer(RepairsChanged(0))
        now_s += 0.5
    begin, end = "3 slots could not be locked or released; they are repaired in the background", "after 0.5 s"
    assert lines(caplog) == [begin, f"all slots are repaired, {end}"] * 3


@pytest.mark.parametrize("cache_url", ["memcached"], indirect=True)
@pytest.mark.usefixtures("cache_url")
async def test_what_the_library_itself_logs_is_not_said_twice(
    ann: None, sessions: Sessions, cache: Cache, memcached_server: Memcached, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asynccache")
    cache.observe(LogObserver())
    watch = Watch(cache._store.backend)
    memcached_server.stop()
    while NodeState.OPEN not in watch.states:
        assert await name_of(sessions) == "Ann"
    async with AsyncCachedSession(sessions.kw["bind"], cache=cache) as session:
        (await session.get_one(Author, 1)).name = "Eve"
        await session.commit()
    memcached_server.start()
    await cache.drain()
    await watch.until(NodeState.CLOSED)
    words = ("is not used until", "1 slots could not be locked", "is used again", "all slots are repaired")
    assert sorted(line for word in words for line in lines(caplog) if word in line) == sorted(lines(caplog))
    assert len(lines(caplog)) == len(words)
