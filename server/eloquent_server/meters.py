"""What turns are measured by: counts and times, kept by whoever serves, read by `metrics`.

Plain Python, so that counting costs little and needs no package. Durations are in seconds.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

# Bounds are vLLM's (vllm/v1/metrics/loggers.py), so that histograms of both can be added up.
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
GAP_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
FLUSH_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
FLUSH_WRITES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Histogram:
    """How often a value was within which bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        "By the lowest bound that is not below the value; last, those above all."
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Add a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass(slots=True)
class ModelMeters:
    """What one model's turns were like; sums since the start."""

    waiting: int = 0
    "Turns that have said nothing yet, now."
    running: int = 0
    "Turns that have begun and not ended, now."
    generations: int = 0
    "Turns that a backend took, each once."
    continued: int = 0
    "Turns that another process began, and that were gone on with here."
    prompt_tokens: int = 0
    cached_tokens: int = 0
    "Of these, what a prefix cache had."
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    "By finish reason."
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_S))
    gap: Histogram = field(default_factory=lambda: Histogram(GAP_S))
    "From one event with text to the next."
    latency: Histogram = field(default_factory=lambda: Histogram(LATENCY_S))
    "From the request to the end, of turns that ended by themselves."


class StoreMeters:
    """What the store's writer measures; used by its thread, read by others."""

    def __init__(self) -> None:
        self.flush = Histogram(FLUSH_S)
        "How long a commit took."
        self.writes = Histogram(FLUSH_WRITES)
        "How many writes it had."
        self.failures = 0
        "Commits that failed."

    def on_flush(self, writes: int, seconds: float, *, is_stored: bool) -> None:
        """Take note of a commit."""
        self.flush.observe(seconds)
        self.writes.observe(writes)
        self.failures += not is_stored
