"""Metrics for Prometheus: read off the server's parts when they are scraped.

What means the same as in vLLM has vLLM's very name, prefix and labels (vllm/v1/metrics/loggers.py),
so that dashboards and autoscalers made for it work here; the rest begins with `eloquent:`. No label
grows with use: there are no ids, addresses or tenants.

Importing this module raises `ConfigurationError` where prometheus-client is not installed.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol, runtime_checkable

from eloquent.core.counts import LinkCounts
from eloquent.errors import ConfigurationError
from eloquent.quic.listen import Listener
from eloquent.websocket.server import WebSocketListener
from eloquent_server.backends.base import Backend
from eloquent_server.metered import MeteredBackend
from eloquent_server.meters import Histogram, HttpMeters, ModelMeters
from eloquent_server.store import TokenStore
from eloquent_server.turns import TurnHub

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
except ImportError as _error:
    raise ConfigurationError(
        "Metrics need the package prometheus-client, which is not installed: pip install "
        "'eloquent-stream[server]'."
    ) from _error

QUANTILES = (0.5, 0.9, 0.99)
OF_MODEL = ("model_name", "engine")
ENGINE = "0"
"vLLM numbers the engines of a server; here each model has one."

Row = tuple[Sequence[str], float]
"The values of a metric's labels, and its own."


@runtime_checkable
class _Counting(Protocol):
    """A backend with an engine of ours."""

    async def stats(self) -> Mapping[str, int]:
        """Return counts by the names of `EngineStats`; none while it is down."""


class _Upstream(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def is_up(self) -> bool: ...


@runtime_checkable
class _Upstreams(Protocol):
    """A backend with engines behind the server."""

    @property
    def upstreams(self) -> Sequence[_Upstream]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The parts of a server that are looked at."""

    backend: MeteredBackend
    hub: TurnHub
    store: TokenStore
    quic: Listener
    websocket: WebSocketListener | None = None
    http: HttpMeters = field(default_factory=HttpMeters)
    inner: Callable[[], Backend | None] = lambda: None
    """The backend that generates, once it is there: an engine of ours has counts, and engines
    behind the server are well or not."""


class Metrics:
    """What `/metrics` says."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._collector = _Collector(sources)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)

    async def scrape(self) -> tuple[bytes, str]:
        """Ask the engine for its counts, which it may take half a second for, and `render`."""
        backend = self._sources.inner()
        self._collector.stats = await backend.stats() if isinstance(backend, _Counting) else {}
        return self.render()

    def render(self) -> tuple[bytes, str]:
        """Return the metrics in Prometheus' text format, and its content type.

        What an engine in a process of its own says is as old as the last `scrape`.
        """
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Collector:
    """Makes metrics of the parts' counts; a `Collector` of prometheus-client."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self.stats: Mapping[str, int] = {}
        "`EngineStats` of the local engine; empty: there is none, or it is down."

    def collect(self) -> Iterator[Metric]:
        """Yield every metric as it is now."""
        sources = self._sources
        yield from _models(sources.backend)
        yield from _engines(sources, self.stats)
        yield from _turns(sources.hub)
        yield from _connections(sources)
        yield from _sent(sources.quic.counts)
        yield from _store(sources.store)
        yield _gauge("eloquent:asyncio_tasks", "Tasks of the server.", len(asyncio.all_tasks()))


def _models(backend: MeteredBackend) -> Iterator[Metric]:
    """Yield what is known of turns by model; but for the last two the names are vLLM's."""
    first = next(iter(backend.models), "")
    by_model = backend.by_model or {first: ModelMeters()}

    def rows(of: Callable[[ModelMeters], float]) -> list[Row]:
        return [((model, ENGINE), of(meters)) for model, meters in by_model.items()]

    def times(of: Callable[[ModelMeters], Histogram]) -> list[tuple[Sequence[str], Histogram]]:
        return [((model, ENGINE), of(meters)) for model, meters in by_model.items()]

    yield _gauges(
        *("vllm:num_requests_running", "Turns that have begun and not ended.", OF_MODEL),
        rows(lambda of: of.running),
    )
    yield _gauges(
        *("vllm:num_requests_waiting", "Turns that have said nothing yet.", OF_MODEL),
        rows(lambda of: of.waiting),
    )
    yield _counters(
        *("vllm:prompt_tokens", "Prompt tokens of turns that ended.", OF_MODEL),
        rows(lambda of: of.prompt_tokens),
    )
    yield _counters(
        *("vllm:generation_tokens", "An event counts one; the end adds what lacks.", OF_MODEL),
        rows(lambda of: of.generation_tokens),
    )
    yield _counters(
        *("vllm:prefix_cache_queries", "Prompt tokens that were looked for.", OF_MODEL),
        rows(lambda of: of.prompt_tokens),
    )
    yield _counters(
        *("vllm:prefix_cache_hits", "Prompt tokens that were cached.", OF_MODEL),
        rows(lambda of: of.cached_tokens),
    )
    yield _counters(
        "vllm:request_success",
        "Turns that ended, by reason; abort: cancelled, or nobody read them.",
        (*OF_MODEL, "finished_reason"),
        (
            ((model, ENGINE, reason), count)
            for model, meters in by_model.items()
            for reason, count in meters.finished.items()
        ),
    )
    yield _histograms(
        *("vllm:time_to_first_token_seconds", "From the request to the first text.", OF_MODEL),
        times(lambda of: of.ttft),
    )
    yield _histograms(
        *("vllm:inter_token_latency_seconds", "From one event with text to the next.", OF_MODEL),
        times(lambda of: of.gap),
    )
    yield _histograms(
        *("vllm:e2e_request_latency_seconds", "From the request to the answer's end.", OF_MODEL),
        times(lambda of: of.latency),
    )
    yield _counters(
        *("eloquent:generations", "Turns that were generated, each once.", OF_MODEL),
        rows(lambda of: of.generations),
    )
    yield _counters(
        "eloquent:generations_continued",
        "Turns that a process before this one began, and that were gone on with.",
        OF_MODEL,
        rows(lambda of: of.continued),
    )


def _engines(sources: Sources, stats: Mapping[str, int]) -> Iterator[Metric]:
    """Yield what the local engine, or the engines behind the server, say of themselves."""
    backend = sources.inner()
    if stats:
        of_model = (next(iter(sources.backend.models), ""), ENGINE)
        capacity = stats["kv_capacity_bytes"]
        yield _gauges(
            *("vllm:kv_cache_usage_perc", "Share of its memory in use; 1 is all.", OF_MODEL),
            [(of_model, stats["kv_bytes"] / capacity if capacity else 0.0)],
        )
        yield _counters(
            *("vllm:num_preemptions", "Turns that gave up their row for a while.", OF_MODEL),
            [(of_model, stats["preemptions"])],
        )
    if isinstance(backend, _Upstreams):
        yield _gauges(
            *("eloquent:upstream_up", "Whether an engine behind the server is up.", ("upstream",)),
            (((each.name,), each.is_up) for each in backend.upstreams),
        )


def _turns(hub: TurnHub) -> Iterator[Metric]:
    """Yield what the hub knows."""
    yield _gauges(
        "eloquent:turns",
        "Turns in memory: all, those being generated, those of these that nobody reads now.",
        ("state",),
        _by({"open": hub.open, "generating": hub.generating, "unread": hub.unread}),
    )
    yield _gauge("eloquent:readers", "Readers of turns.", hub.readers)
    yield _counter(
        "eloquent:resumes",
        "Readers that came to a turn which was there: over another connection, or others.",
        hub.resumes,
    )


def _connections(sources: Sources) -> Iterator[Metric]:
    """Yield how many connections there are, what they are like, and who was refused."""
    quic, websocket = sources.quic, sources.websocket
    paths = quic.paths()
    channels = quic.channels
    counts = {"quic": quic.counts}
    if websocket is not None:
        counts["websocket"] = websocket.counts
    yield _gauges(
        "eloquent:connections",
        "Open connections by rung: QUIC datagrams, a QUIC stream, WebSocket; readers over HTTP.",
        ("rung",),
        _by(
            {
                "datagrams": len(paths) - channels,
                "stream": channels,
                "websocket": 0 if websocket is None else websocket.connections,
                "http": sources.http.readers,
            }
        ),
    )
    yield _quantiles(
        *("eloquent:rtt_seconds", "Smoothed round-trip times of open QUIC connections."),
        sorted(path.srtt_s for path in paths),
    )
    yield _quantiles(
        *("eloquent:loss_ratio", "Shares of bundles lost of late, of open QUIC connections."),
        sorted(path.loss for path in paths),
    )
    yield _counters(
        "eloquent:handshakes",
        "Connections that were begun, that first had to show their address (retried), that were "
        "not made in time (given_up), and that were refused because too many are open.",
        ("transport", "outcome"),
        (
            ((transport, outcome), count)
            for transport, of in counts.items()
            for outcome, count in _handshakes(of).items()
        ),
    )
    refusals = {name: of.refusals for name, of in counts.items()} | {"http": sources.http.refusals}
    yield _counters(
        "eloquent:refusals",
        "What readers were told instead of an answer, or of the rest of it.",
        ("transport", "code"),
        (
            ((transport, code), count)
            for transport, by_code in refusals.items()
            for code, count in by_code.items()
        ),
    )


def _handshakes(counts: LinkCounts) -> dict[str, int]:
    return {
        "begun": counts.handshakes,
        "retried": counts.retries,
        "given_up": counts.given_up,
        "refused": counts.refused,
    }


def _sent(counts: LinkCounts) -> Iterator[Metric]:
    """Yield what QUIC sent, and what became of it."""
    yield _counters(
        "eloquent:udp_bytes",
        "UDP payload; what goes to clients by generated tokens is the bytes per token.",
        ("to",),
        _by({"clients": counts.bytes_out, "server": counts.bytes_in}),
    )
    yield _counters(
        *("eloquent:udp_datagrams", "UDP datagrams.", ("to",)),
        _by({"clients": counts.datagrams_out, "server": counts.datagrams_in}),
    )
    yield _counters(
        "eloquent:bundles",
        "Datagrams with text: all that were sent; those lost; lost ones whose text others had "
        "carried anyway (recovered), of which something had to be sent again (resent), and that "
        "came after all (late).",
        ("fate",),
        _by(
            {
                "sent": counts.bundles,
                "lost": counts.lost_bundles,
                "recovered": counts.recovered_bundles,
                "resent": counts.resent_bundles,
                "late": counts.late_bundles,
            }
        ),
    )


def _store(store: TokenStore) -> Iterator[Metric]:
    """Yield what the token store holds, and how long it takes."""
    meters = store.meters
    yield _gauge("eloquent:store_bytes", "Requests and answers that are stored.", store.size)
    yield _gauge("eloquent:store_turns", "Turns that are stored, or remembered.", store.turns)
    yield _histograms(
        *("eloquent:store_flush_seconds", "Duration of the store's commits.", ()),
        [((), meters.flush)],
    )
    yield _histograms(
        *("eloquent:store_flush_writes", "Writes in each commit.", ()), [((), meters.writes)]
    )
    yield _counter("eloquent:store_flush_failures", "Commits that failed.", meters.failures)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value)


def _gauges(name: str, text: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _counters(name: str, text: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _histograms(
    name: str,
    text: str,
    labels: Sequence[str],
    rows: Iterable[tuple[Sequence[str], Histogram]],
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in rows:
        total, buckets = 0, []
        for bound, count in zip((*histogram.bounds, inf), histogram.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == inf else str(float(bound)), float(total)))
        family.add_metric(values, buckets, histogram.sum)
    return family


def _quantiles(name: str, text: str, ordered: Sequence[float]) -> Metric:
    last = len(ordered) - 1
    chosen = QUANTILES if ordered else ()
    rows = [((str(each),), ordered[round(each * last)]) for each in chosen]
    return _gauges(name, text, ("quantile",), rows)


def _by(values: Mapping[str, float]) -> list[Row]:
    """Return rows of one label."""
    return [((name,), value) for name, value in values.items()]
