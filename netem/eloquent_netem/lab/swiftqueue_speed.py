"""How long SwiftQueue takes for a prediction, and what it holds for a connection.

A prediction is an event taken in and forecasts made for all of `SILENCES_S`. Times are the calling
thread's CPU time: what else runs does not count, nor do threads that BLAS may wake, which are shown
beside it. Figures for the benchmarks, no tests: they depend on the machine.
"""

import math
import random
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from statistics import median

import numpy as np

from eloquent.swiftqueue.features import EVENT_FEATURES, MAX_PENDING, QUERY_FEATURES
from eloquent.swiftqueue.forecaster import SILENCES_S, Forecaster, Outlook
from eloquent.swiftqueue.inference import Model, Predictor, tensor_shapes
from eloquent.swiftqueue.records import Observation, Queue
from eloquent.swiftqueue.shape import Shape
from eloquent_netem.lab.findings import Finding, Sheet

CONNECTIONS = (1, 2, 4, 8, 16, 32, 64, 128)
BOUNDS_US = {1: 150.0, 32: 15.0}
"For one prediction, by how many connections are predicted for at once; the median counts."
MEMORY_BOUND_BYTES = 1e6
PREDICTIONS = 6000
"With each number of connections; a round is one for each, and there are at least a hundred."
PACKET_GAP_S = 0.01
PACKET_BYTES = 300
PART = "swiftqueue-speed"
HEADER = (
    "connections",
    "event",
    "forecasts",
    "prediction",
    "p99",
    "with features",
    "other threads",
)
_TO_US = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Times for one connection, in microseconds: medians over the rounds."""

    connections: int
    "Predicted for at once."
    event_us: float
    "Taking an event in,"
    forecast_us: float
    "making the forecasts,"
    prediction_us: float
    "and both together."
    prediction_p99_us: float
    whole_us: float
    """What a packet costs in all: noting that it left and what became of it, features, and the
    prediction."""
    other_threads: float
    "CPU time of threads that BLAS woke, over real time; 0 is meant."


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What predictions cost on one machine."""

    rows: tuple[Row, ...]
    held_bytes: int
    "For a connection, at most."


def random_model(seed: int = 1) -> Model:
    """Return a model of the usual sizes that knows nothing: it takes as long as any."""
    shape = Shape(event_features=EVENT_FEATURES, query_features=QUERY_FEATURES)
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.normal(size=size) / math.sqrt(size[-1])).astype(np.float32)
        for name, size in tensor_shapes(shape).items()
    }
    return Model(shape, tensors)


def measure(
    model: Model, connections: Sequence[int] = CONNECTIONS, predictions: int = PREDICTIONS
) -> Speed:
    """Measure a model with each number of connections."""
    rows = [_row(model, many, max(predictions // many, 100)) for many in connections]
    return Speed(rows=tuple(rows), held_bytes=memory_bytes(model))


def memory_bytes(model: Model) -> int:
    """Return what a connection holds at most: its slot, and what is remembered of its packets.

    As many packets as are ever remembered are on their way in each queue, and as many are known.
    """
    forecaster = Forecaster(Predictor(model))
    packets = _packets(1)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    outlook = forecaster.open()
    for packet in islice(packets, MAX_PENDING):
        _tell(outlook, packet)
    for packet in islice(packets, 2 * MAX_PENDING):
        _send(outlook, packet)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held - before + model.slot_bytes


def findings(speed: Speed) -> list[Finding]:
    """Return the figures that have bounds."""
    found = [
        Finding(
            part=PART,
            what=f"a prediction, {row.connections} connection{'s' * (row.connections > 1)}",
            figure=row.prediction_us,
            bound=BOUNDS_US[row.connections],
            unit="us",
        )
        for row in speed.rows
        if row.connections in BOUNDS_US
    ]
    held = Finding(
        part=PART,
        what="held for a connection",
        figure=speed.held_bytes,
        bound=MEMORY_BOUND_BYTES,
        unit="B",
    )
    return [*found, held]


def sheet(speed: Speed) -> Sheet:
    """Return the table."""
    lines = []
    for row in speed.rows:
        times_us = row.event_us, row.forecast_us, row.prediction_us, row.prediction_p99_us
        figures = [f"{time_us:.1f}" for time_us in (*times_us, row.whole_us)]
        lines.append((str(row.connections), *figures, f"{row.other_threads:.2f}"))
    title = f"A prediction ({len(SILENCES_S)} forecasts), us for each connection"
    return Sheet(title, HEADER, tuple(lines))


def _row(model: Model, connections: int, rounds: int) -> Row:
    events, forecasts, other_threads = _bare(model, connections, rounds)
    both = sorted(map(sum, zip(events, forecasts, strict=True)))
    each_us = _TO_US / connections
    return Row(
        connections=connections,
        event_us=median(events) * each_us,
        forecast_us=median(forecasts) * each_us,
        prediction_us=median(both) * each_us,
        prediction_p99_us=both[len(both) * 99 // 100] * each_us,
        whole_us=median(_whole(model, connections, rounds)) * each_us,
        other_threads=other_threads,
    )


def _bare(model: Model, connections: int, rounds: int) -> tuple[list[float], list[float], float]:
    """Return the seconds that events and forecasts took in each round, and other threads' share."""
    predictor = Predictor(model)
    slots = [predictor.open() for _ in range(connections)]
    rng = np.random.default_rng(1)
    events = rng.normal(size=(connections, EVENT_FEATURES)).astype(np.float32)
    queries = rng.normal(size=(connections, len(SILENCES_S), QUERY_FEATURES)).astype(np.float32)
    pushed, asked = [], []
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time() - time.thread_time()
    for number in range(model.shape.window + rounds):
        sent_s = [number * PACKET_GAP_S] * connections
        before_s = time.thread_time()
        predictor.push(slots, events, sent_s)
        between_s = time.thread_time()
        predictor.forecast(slots, queries)
        pushed.append(between_s - before_s)
        asked.append(time.thread_time() - between_s)
    others_s = time.process_time() - time.thread_time() - begun_cpu_s
    share = max(0.0, others_s / (time.perf_counter() - begun_s))
    return pushed[model.shape.window :], asked[model.shape.window :], share


def _whole(model: Model, connections: int, rounds: int) -> list[float]:
    """Return the seconds that each round took when connections send, hear and are settled."""
    forecaster = Forecaster(Predictor(model))
    flows = [(forecaster.open(), _packets(seed)) for seed in range(connections)]
    found = []
    for _ in range(rounds):
        told = [(outlook, next(packets)) for outlook, packets in flows]
        begun_s = time.thread_time()
        for outlook, packet in told:
            _tell(outlook, packet)
        forecaster.settle(told[0][1].known_s)
        found.append(time.thread_time() - begun_s)
    return found


def _packets(seed: int) -> Iterator[Observation]:
    """Give a packet every `PACKET_GAP_S`, by turns in both queues."""
    rng = random.Random(seed)  # noqa: S311  (a load, not cryptography)
    for number in count():
        sent_s, delay_s = number * PACKET_GAP_S, 0.02 + rng.expovariate(200)
        known_s = sent_s + delay_s + 0.02
        yield Observation(number, sent_s, PACKET_BYTES, Queue(number % 2), delay_s, known_s)


def _send(outlook: Outlook, packet: Observation) -> None:
    outlook.on_sent(packet.number, packet.sent_s, packet.size, packet.queue)


def _tell(outlook: Outlook, packet: Observation) -> None:
    _send(outlook, packet)
    outlook.on_observation(packet)
