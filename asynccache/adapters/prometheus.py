"""Metrics for Prometheus: `pip install 'sqlalchemy-asynccache[prometheus]'`.

    cache.observe(PrometheusObserver())

Counters like `asynccache_hits_total`, histograms like `asynccache_load_duration_seconds`, by `model` and by `cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    label_of,
    value_of,
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
        self._cache = cache
        self._metrics: Mapping[Instrument, Any] = {
            instrument: _metric(instrument, registry, prefix, buckets)
            for instruments in INSTRUMENTS.values()
            for instrument in instruments
        }

    def for_cache(self, cache: str) -> PrometheusObserver:
        """The same metrics, with another value of the label `cache`."""
        other = object.__new__(type(self))
        other._cache, other._metrics = cache, self._metrics
        return other

    def __call__(self, event: Event, /) -> None:
        for instrument in INSTRUMENTS.get(type(event), ()):
            labels = [label_of(event, name) for name in instrument.labels]
            metric = self._metrics[instrument].labels(self._cache, *labels)
            value = value_of(instrument, event)
            if isinstance(instrument, Counter):
                metric.inc(value)
            elif isinstance(instrument, Duration):
                metric.observe(value)
            else:
                metric.set(value)


def _metric(
    instrument: Instrument, registry: CollectorRegistry, prefix: str, buckets: Sequence[float]
) -> MetricWrapperBase:
    name, labels = f"{prefix}_{instrument.name}", (_CACHE, *instrument.labels)
    if isinstance(instrument, Counter):
        return prometheus.Counter(name, instrument.text, labels, registry=registry)
    if isinstance(instrument, Duration):
        return prometheus.Histogram(f"{name}_seconds", instrument.text, labels, registry=registry, buckets=buckets)
    return prometheus.Gauge(name, instrument.text, labels, registry=registry)
