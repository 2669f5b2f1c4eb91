"""Metrics for Prometheus: read off the server's parts when they are scraped.

What means the same as in vLLM has vLLM's very name, prefix and labels (vllm/v1/metrics/loggers.py),
so that dashboards and autoscalers made for it work here; the rest begins with `eloquent:`. No label
grows with use: there are no ids, addresses or tenants.

Importing this module raises `ConfigurationError` where prometheus-client is not installed.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from eloquent.core.counts import LinkCounts
from eloquent.quic.listen import Listener
from eloquent.websocket.server import WebSocketListener
from eloquent_server.backends.base import Backend
from eloquent_server.families import (
    Family,
    Row,
    as_text,
    by,
    counter,
    counters,
    gauge,
    gauges,
    histograms,
    quantiles,
    registry_of,
)
from eloquent_server.metered import MeteredBackend
from eloquent_server.meters import Histogram, ModelMeters, StoreMeters
from eloquent_server.turns import TurnHub

_USUAL = dict.fromkeys(("stop", "length", "abort", "error"), 0)
"Finish reasons that are told from the start, so that the first of each makes a rate."
_REFUSED = dict.fromkeys(
    ("no_key", "wrong_key", "expired_key", "turns", "requests", "bytes", "all_turns"), 0
)
"The same of `Gate.refusals`."
OF_MODEL = ("model_name", "engine")
ENGINE = "0"
"vLLM numbers the engines of a server; here each model has one."


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


class StoreSource(Protocol):
    """What of a store is looked at."""

    @property
    def size(self) -> int:
        """Bytes of requests and answers."""

    @property
    def turns(self) -> int:
        """How many turns it knows."""

    @property
    def meters(self) -> StoreMeters:
        """How its commits went."""


class HttpFront(Protocol):
    """What of `eloquent_server.http.listen` is looked at; that needs more packages than this."""

    @property
    def connections(self) -> int:
        """How many are open."""

    @property
    def readers(self) -> int:
        """How many turns are being read."""

    @property
    def refused(self) -> Mapping[str, int]:
        """How many connections were refused or given up, by reason."""

    @property
    def statuses(self) -> Mapping[int, int]:
        """How many responses had which status."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """The parts of a server that are looked at."""

    backend: MeteredBackend
    hub: TurnHub
    store: StoreSource
    quic: Listener
    websocket: WebSocketListener | None = None
    http: HttpFront | None = None
    requests_refused: Mapping[str, int] = field(default_factory=dict)
    "Refused because of the key or a limit, by reason: those of `Gate.refusals`."
    inner: Callable[[], Backend | None] = lambda: None
    """The backend that generates, once it is there: an engine of ours has counts, and engines
    behind the server are well or not."""


class Metrics:
    """What `/metrics` says."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._collector = _Collector(sources)
        self._registry = registry_of(self._collector)

    async def scrape(self) -> tuple[bytes, str]:
        """Ask the engine for its counts, which it may take half a second for, and `render`."""
        backend = self._sources.inner()
        self._collector.stats = await backend.stats() if isinstance(backend, _Counting) else {}
        return self.render()

    def render(self) -> tuple[bytes, str]:
        """Return the metrics in Prometheus' text format, and its content type.

        What an engine in a process of its own says is as old as the last `scrape`.
        """
        return as_text(self._registry)


class _Collector:
    """Makes metrics of the parts' counts; a `Collector` of prometheus-client."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self.stats: Mapping[str, int] = {}
        "`EngineStats` of the local engine; empty: there is none, or it is down."

    def collect(self) -> Iterator[Family]:
        """Yield every metric as it is now."""
        sources = self._sources
        yield from _models(sources.backend)
        yield from _engines(sources, self.stats)
        yield from _turns(sources.hub)
        yield from _connections(sources)
        if sources.http is not None:
            yield from _http(sources.http)
        yield counters(
            *("eloquent:requests_refused", "Refused for the key or a limit.", ("reason",)),
            by(_REFUSED | dict(sources.requests_refused)),
        )
        yield from _sent(sources.quic.counts)
        yield from _store(sources.store)
        yield gauge("eloquent:asyncio_tasks", "Tasks of the server.", len(asyncio.all_tasks()))


def _models(backend: MeteredBackend) -> Iterator[Family]:
    """Yield what is known of turns by model; but for the last two the names are vLLM's."""
    first = next(iter(backend.models), "")
    by_model = backend.by_model or {first: ModelMeters()}

    def rows(of: Callable[[ModelMeters], float]) -> list[Row]:
        return [((model, ENGINE), of(meters)) for model, meters in by_model.items()]

    def times(of: Callable[[ModelMeters], Histogram]) -> list[tuple[Sequence[str], Histogram]]:
        return [((model, ENGINE), of(meters)) for model, meters in by_model.items()]

    yield gauges(
        *("vllm:num_requests_running", "Turns that have begun and not ended.", OF_MODEL),
        rows(lambda of: of.running),
    )
    yield gauges(
        *("vllm:num_requests_waiting", "Turns that have said nothing yet.", OF_MODEL),
        rows(lambda of: of.waiting),
    )
    yield counters(
        *("vllm:prompt_tokens", "Prompt tokens of turns that ended.", OF_MODEL),
        rows(lambda of: of.prompt_tokens),
    )
    yield counters(
        *("vllm:generation_tokens", "An event counts one; the end adds what lacks.", OF_MODEL),
        rows(lambda of: of.generation_tokens),
    )
    yield counters(
        *("vllm:prefix_cache_queries", "Prompt tokens that were looked for.", OF_MODEL),
        rows(lambda of: of.prompt_tokens),
    )
    yield counters(
        *("vllm:prefix_cache_hits", "Prompt tokens that were cached.", OF_MODEL),
        rows(lambda of: of.cached_tokens),
    )
    yield counters(
        "vllm:request_success",
        "Turns that ended, by reason; abort: cancelled, or nobody read them.",
        (*OF_MODEL, "finished_reason"),
        (
            ((model, ENGINE, reason), count)
            for model, meters in by_model.items()
            for reason, count in (_USUAL | meters.finished).items()
        ),
    )
    yield histograms(
        *("vllm:time_to_first_token_seconds", "From the request to the first text.", OF_MODEL),
        times(lambda of: of.ttft),
    )
    yield histograms(
        *("vllm:inter_token_latency_seconds", "From one event with text to the next.", OF_MODEL),
        times(lambda of: of.gap),
    )
    yield histograms(
        *("vllm:e2e_request_latency_seconds", "From the request to the answer's end.", OF_MODEL),
        times(lambda of: of.latency),
    )
    yield counters(
        *("eloquent:generations", "Turns that were generated, each once.", OF_MODEL),
        rows(lambda of: of.generations),
    )
    yield counters(
        "eloquent:generations_continued",
        "Turns that a process before this one began, and that were gone on with.",
        OF_MODEL,
        rows(lambda of: of.continued),
    )


def _engines(sources: Sources, stats: Mapping[str, int]) -> Iterator[Family]:
    """Yield what the local engine, or the engines behind the server, say of themselves."""
    backend = sources.inner()
    if stats:
        of_model = (next(iter(sources.backend.models), ""), ENGINE)
        capacity = stats["kv_capacity_bytes"]
        yield gauges(
            *("vllm:kv_cache_usage_perc", "Share of its memory in use; 1 is all.", OF_MODEL),
            [(of_model, stats["kv_bytes"] / capacity if capacity else 0.0)],
        )
        yield counters(
            *("vllm:num_preemptions", "Turns that gave up their row for a while.", OF_MODEL),
            [(of_model, stats["preemptions"])],
        )
    if isinstance(backend, _Upstreams):
        yield gauges(
            *("eloquent:upstream_up", "Whether an engine behind the server is up.", ("upstream",)),
            (((each.name,), each.is_up) for each in backend.upstreams),
        )


def _turns(hub: TurnHub) -> Iterator[Family]:
    """Yield what the hub knows."""
    yield gauges(
        "eloquent:turns",
        "Turns in memory: all, those being generated, those of these that nobody reads now.",
        ("state",),
        by({"open": hub.open, "generating": hub.generating, "unread": hub.unread}),
    )
    yield gauge("eloquent:readers", "Readers of turns.", hub.readers)
    yield counter(
        "eloquent:resumes",
        "Readers that came to a turn which was there: over another connection, or others.",
        hub.resumes,
    )


def _connections(sources: Sources) -> Iterator[Family]:
    """Yield how many connections there are, what they are like, and who was refused."""
    quic, websocket = sources.quic, sources.websocket
    paths = quic.paths()
    channels = quic.channels
    counts = {"quic": quic.counts}
    if websocket is not None:
        counts["websocket"] = websocket.counts
    yield gauges(
        "eloquent:connections",
        "Open connections by rung: QUIC datagrams, a QUIC stream, WebSocket, and HTTP.",
        ("rung",),
        by(
            {
                "datagrams": len(paths) - channels,
                "stream": channels,
                "websocket": 0 if websocket is None else websocket.connections,
                "http": 0 if sources.http is None else sources.http.connections,
            }
        ),
    )
    yield quantiles(
        *("eloquent:rtt_seconds", "Smoothed round-trip times of open QUIC connections."),
        sorted(path.srtt_s for path in paths),
    )
    yield quantiles(
        *("eloquent:loss_ratio", "Shares of bundles lost of late, of open QUIC connections."),
        sorted(path.loss for path in paths),
    )
    yield counters(
        "eloquent:handshakes",
        "Connections that were begun, that first had to show their address (retried), that were "
        "not made in time or made room for others (given_up), and that were refused because too "
        "many are open.",
        ("transport", "outcome"),
        (
            ((transport, outcome), count)
            for transport, of in counts.items()
            for outcome, count in _handshakes(of).items()
            if transport == "quic" or outcome in ("given_up", "refused")
        ),
    )
    yield counters(
        "eloquent:refusals",
        "What readers were told instead of an answer, or of the rest of it.",
        ("transport", "code"),
        (
            ((transport, code), count)
            for transport, of in counts.items()
            for code, count in of.refusals.items()
        ),
    )


def _http(front: HttpFront) -> Iterator[Family]:
    """Yield what the HTTP front says of itself."""
    yield gauge("eloquent:http_readers", "Turns that are being read over HTTP.", front.readers)
    yield counters(
        *("eloquent:http_responses", "Responses, by their status.", ("status",)),
        by({str(status): count for status, count in front.statuses.items()}),
    )
    yield counters(
        *("eloquent:http_connections_refused", "Refused or given up, by reason.", ("reason",)),
        by(front.refused),
    )


def _handshakes(counts: LinkCounts) -> dict[str, int]:
    return {
        "begun": counts.handshakes,
        "retried": counts.retries,
        "given_up": counts.given_up,
        "refused": counts.refused,
    }


def _sent(counts: LinkCounts) -> Iterator[Family]:
    """Yield what QUIC sent, and what became of it."""
    yield counters(
        "eloquent:udp_bytes",
        "UDP payload; what goes to clients by generated tokens is the bytes per token.",
        ("to",),
        by({"clients": counts.bytes_out, "server": counts.bytes_in}),
    )
    yield counters(
        *("eloquent:udp_datagrams", "UDP datagrams.", ("to",)),
        by({"clients": counts.datagrams_out, "server": counts.datagrams_in}),
    )
    yield counters(
        "eloquent:bundles",
        "Datagrams with text: all that were sent; those lost; lost ones whose text others had "
        "carried anyway (recovered), of which something had to be sent again (resent), and that "
        "came after all (late).",
        ("fate",),
        by(
            {
                "sent": counts.bundles,
                "lost": counts.lost_bundles,
                "recovered": counts.recovered_bundles,
                "resent": counts.resent_bundles,
                "late": counts.late_bundles,
            }
        ),
    )


def _store(store: StoreSource) -> Iterator[Family]:
    """Yield what the token store holds, and how long it takes."""
    meters = store.meters
    yield gauge("eloquent:store_bytes", "Requests and answers that are stored.", store.size)
    yield gauge("eloquent:store_turns", "Turns that are stored, or remembered.", store.turns)
    yield histograms(
        *("eloquent:store_flush_seconds", "Duration of the store's commits.", ()),
        [((), meters.flush)],
    )
    yield histograms(
        *("eloquent:store_flush_writes", "Writes in each commit.", ()), [((), meters.writes)]
    )
    yield counter("eloquent:store_flush_failures", "Commits that failed.", meters.failures)
