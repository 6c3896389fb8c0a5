"""Metrics for OpenTelemetry: `pip install 'sqlalchemy-asynccache[opentelemetry]'`, beside the SDK of your choice.

    cache.observe(OpenTelemetryObserver())

Counters like `asynccache.hits`, histograms like `asynccache.load_duration` in seconds, all by `model` and by `cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from opentelemetry.metrics import Meter, get_meter

from asynccache.adapters.instruments import (
    DURATIONS_S,
    INSTRUMENTS,
    Counter,
    Duration,
    Instrument,
    Recorders,
)
from asynccache.events import Event

_Recorder = Callable[[float, Mapping[str, str]], object]


class OpenTelemetryObserver:
    """An observer that records by instruments of an OpenTelemetry `Meter`.

    meter: whose instruments they are; the global provider's, if left out.
    buckets: upper bounds of the histograms, in seconds; a view of the SDK may set others.
    cache: the value of the attribute `cache`. For a second cache in the process take `for_cache` of the first.
    """

    def __init__(self, meter: Meter | None = None, *, buckets: Sequence[float] = DURATIONS_S, cache: str = "") -> None:
        meter = meter or get_meter("asynccache")
        recorders = {
            instrument: _recorder(meter, instrument, buckets)
            for instruments in INSTRUMENTS.values()
            for instrument in instruments
        }
        self._use(recorders, cache)

    def for_cache(self, cache: str) -> OpenTelemetryObserver:
        """The same instruments, with another value of the attribute `cache`."""
        other = object.__new__(type(self))
        other._use(self._recorders, cache)
        return other

    def __call__(self, event: Event, /) -> None:
        self._record(event)

    def _use(self, recorders: Mapping[Instrument, _Recorder], cache: str) -> None:
        def open_(instrument: Instrument, labels: Mapping[str, str]) -> Callable[[float], object]:
            record, attributes = recorders[instrument], {"cache": cache, **labels}
            return lambda value: record(value, attributes)

        self._recorders = recorders
        self._record = Recorders(open_)


def _recorder(meter: Meter, instrument: Instrument, buckets: Sequence[float]) -> _Recorder:
    name = f"asynccache.{instrument.name}"
    if isinstance(instrument, Counter):
        return meter.create_counter(name, f"{{{instrument.unit}}}", instrument.text).add
    if isinstance(instrument, Duration):
        return meter.create_histogram(
            name, "s", instrument.text, explicit_bucket_boundaries_advisory=list(buckets)
        ).record
    return meter.create_gauge(name, f"{{{instrument.unit}}}", instrument.text).set
