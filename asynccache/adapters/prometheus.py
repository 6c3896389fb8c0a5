"""Metrics for Prometheus: `pip install 'sqlalchemy-asynccache[prometheus]'`.

    cache.observe(PrometheusObserver())

Counters like `asynccache_hits_total`, histograms like `asynccache_load_duration_seconds`, by `model` and by `cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import prometheus_client as prometheus
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from asynccache.adapters.instruments import (
    DURATIONS_S,
    INSTRUMENTS,
    Counter,
    Duration,
    Instrument,
    Level,
    Recorders,
)
from asynccache.events import Event

_CACHE: Final = "cache"


class PrometheusObserver:
    """An observer that counts in a registry of `prometheus_client`.

    registry: where its metrics are; there can be one `PrometheusObserver` in each. For a second cache in the process
        take `for_cache` of the first.
    prefix: what the metrics' names begin with.
    buckets: upper bounds of the histograms, in seconds.
    cache: the value of the label `cache`.

    Raises ValueError, as `prometheus_client` does, if the registry has these metrics already.
    """

    def __init__(
        self,
        registry: CollectorRegistry = REGISTRY,
        *,
        prefix: str = "asynccache",
        buckets: Sequence[float] = DURATIONS_S,
        cache: str = "",
    ) -> None:
        metrics = {
            instrument: _metric(instrument, registry, prefix, buckets)
            for instruments in INSTRUMENTS.values()
            for instrument in instruments
        }
        self._use(metrics, cache)

    def for_cache(self, cache: str) -> PrometheusObserver:
        """The same metrics, with another value of the label `cache`."""
        other = object.__new__(type(self))
        other._use(self._metrics, cache)
        return other

    def __call__(self, event: Event, /) -> None:
        self._record(event)

    def _use(self, metrics: Mapping[Instrument, Any], cache: str) -> None:
        def open_(instrument: Instrument, labels: Mapping[str, str]) -> Callable[[float], object]:
            metric = metrics[instrument].labels(cache, *labels.values())
            record: Callable[[float], object]
            match instrument:
                case Counter():
                    record = metric.inc
                case Duration():
                    record = metric.observe
                case Level():
                    record = metric.set
            return record

        self._metrics = metrics
        self._record = Recorders(open_)


def _metric(
    instrument: Instrument, registry: CollectorRegistry, prefix: str, buckets: Sequence[float]
) -> MetricWrapperBase:
    name, labels = f"{prefix}_{instrument.name}", (_CACHE, *instrument.labels)
    if isinstance(instrument, Counter):
        return prometheus.Counter(name, instrument.text, labels, registry=registry)
    if isinstance(instrument, Duration):
        return prometheus.Histogram(f"{name}_seconds", instrument.text, labels, registry=registry, buckets=buckets)
    return prometheus.Gauge(name, instrument.text, labels, registry=registry)
