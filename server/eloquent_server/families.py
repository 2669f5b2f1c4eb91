"""Families of metrics, as prometheus-client has them; names of counters get `_total`.

Importing this module raises `ConfigurationError` where that is not installed.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import inf

from eloquent.errors import ConfigurationError
from eloquent_server.meters import Histogram

try:
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        ProcessCollector,
        generate_latest,
    )
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as _error:
    raise ConfigurationError(
        "Metrics need the package prometheus-client, which is not installed: pip install "
        "'eloquent-stream[server]'."
    ) from _error

QUANTILES = (0.5, 0.9, 0.99)

Family = Metric

Row = tuple[Sequence[str], float]
"The values of a metric's labels, and its own."


def registry_of(collector: Collector) -> CollectorRegistry:
    """Return a registry with this collector, and with what the system knows of the process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    ProcessCollector(registry=registry)
    return registry


def as_text(registry: CollectorRegistry) -> tuple[bytes, str]:
    """Return a registry's metrics in Prometheus' text format, and its content type."""
    return generate_latest(registry), CONTENT_TYPE_LATEST


def gauge(name: str, text: str, value: float) -> Family:
    """Return what goes up and down."""
    return GaugeMetricFamily(name, text, value)


def counter(name: str, text: str, value: float) -> Family:
    """Return what only grows."""
    return CounterMetricFamily(name, text, value)


def gauges(name: str, text: str, labels: Sequence[str], rows: Iterable[Row]) -> Family:
    """Return a gauge for each row of labels."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def counters(name: str, text: str, labels: Sequence[str], rows: Iterable[Row]) -> Family:
    """Return a counter for each row of labels."""
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def histograms(
    name: str,
    text: str,
    labels: Sequence[str],
    rows: Iterable[tuple[Sequence[str], Histogram]],
) -> Family:
    """Return a histogram for each row of labels."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in rows:
        total, buckets = 0, []
        for bound, count in zip((*histogram.bounds, inf), histogram.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == inf else str(float(bound)), float(total)))
        family.add_metric(values, buckets, histogram.sum)
    return family


def quantiles(name: str, text: str, ordered: Sequence[float]) -> Family:
    """Return a gauge for each of `QUANTILES` of some values, which are in order; maybe none."""
    last = len(ordered) - 1
    chosen = QUANTILES if ordered else ()
    rows = [((str(each),), ordered[round(each * last)]) for each in chosen]
    return gauges(name, text, ("quantile",), rows)


def by(values: Mapping[str, float]) -> list[Row]:
    """Return rows of one label."""
    return [((name,), value) for name, value in values.items()]
