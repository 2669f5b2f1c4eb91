"""Which queue is the better one, by a forecast for both."""

import math
from typing import NamedTuple

from eloquent.swiftqueue.forecaster import Forecast
from eloquent.swiftqueue.queues import other
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.shape import LEVELS

LEVEL_WEIGHTS = (0.1, 0.3, 0.6)
"""A queue's cost is the mean of its quantiles (at `LEVELS`) with these weights. What readers feel
is the 99th percentile, so a queue where bursts come unforeseen costs much even while it is empty,
and a short reliable one is left for it only when it is about to be worse at its worst."""
LOSS_S = 0.05
"""What a drop costs: about the time until a later bundle brings what was lost. A quantile takes all
of it where drops are as likely as what lies beyond the quantile."""
MARGIN_S = 0.001
MARGIN_SHARE = 0.15
"The other queue is better if it costs less by this time and by this share."
DWELL_S = 0.1
"A queue is kept for so long at the least."

_CHANCES = tuple(1 - level for level in LEVELS)


class Prospect(NamedTuple):
    """A queue's forecast, in seconds."""

    quantiles_s: tuple[float, ...]
    "Of the queueing delay, at `LEVELS`."
    drop: float
    "The probability of a drop."
    cost_s: float
    "Below the other queue's: the better one."
    risk_s: float
    "The highest quantile, with what a drop costs."

    @property
    def median_s(self) -> float:
        """The lowest quantile."""
        return self.quantiles_s[0]


def prospects(forecast: Forecast) -> tuple[Prospect, Prospect] | None:
    """Return what a forecast means for each queue, or None if it is no number."""
    low, classic = map(_prospect, forecast.delay_s.tolist(), forecast.drop.tolist())
    if math.isfinite(low.cost_s + classic.cost_s):
        return low, classic
    return None


def _prospect(quantiles_s: list[float], drop: float) -> Prospect:
    cost_s = value_s = 0.0
    for quantile_s, chance, weight in zip(quantiles_s, _CHANCES, LEVEL_WEIGHTS, strict=True):
        value_s = quantile_s + LOSS_S * min(drop / chance, 1.0)
        cost_s += weight * value_s
    return Prospect(tuple(quantiles_s), drop, cost_s, value_s)


class QueueChoice:
    """The queue in use: kept until the other one is better by a margin, and for a least time."""

    def __init__(self) -> None:
        self.queue = Queue.L
        self.switches = 0
        self._since_s = -math.inf

    def choose(self, now: float, both: tuple[Prospect, Prospect]) -> Queue:
        """Return the queue for a packet that leaves at `now`."""
        here_s, there_s = both[self.queue].cost_s, both[other(self.queue)].cost_s
        margin_s = max(MARGIN_S, MARGIN_SHARE * here_s)
        if there_s < here_s - margin_s and now >= self._since_s + DWELL_S:
            self._use(now, other(self.queue))
        return self.queue

    def fall_back(self, now: float) -> None:
        """Use L, whatever it costs."""
        if self.queue is not Queue.L:
            self._use(now, Queue.L)

    def _use(self, now: float, queue: Queue) -> None:
        self.queue = queue
        self.switches += 1
        self._since_s = now
