"""Which queue is the better one, by a forecast for both."""

from math import inf, isfinite
from typing import NamedTuple

from eloquent.swiftqueue.forecaster import Forecast
from eloquent.swiftqueue.queues import other
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.shape import LEVELS

LEVEL_WEIGHTS = (0.1, 0.3, 0.6)
"""A queue's cost is the mean of its quantiles (at `LEVELS`) with these weights. What readers feel
is the 99th percentile, so a queue where bursts come unforeseen costs much even while it is empty,
and a short reliable one is left for it only when it is about to be worse at its worst."""
MARGIN_S = 0.001
MARGIN_SHARE = 0.15
"The other queue is better if it costs less by this time and by this share."
TAIL_STEP_S = 0.01
TAIL_STEP_SHARE = 0.2
TAIL_MAX_S = 0.2
"""The highest quantile moves up by this step for each delay beyond it, at most to so much more than
was foretold, and down by the step times the quantile's chance for each that is not. The step is no
more than this share of the delay or the quantile: where a queue is short by a little more than was
foretold, it is short all the same."""
DWELL_S = 0.05
"A queue is kept for so long at the least."

_MEDIAN_WEIGHT, _UPPER_WEIGHT, _HIGHEST_WEIGHT = LEVEL_WEIGHTS
_MEDIAN_CHANCE, _UPPER_CHANCE, _HIGHEST_CHANCE = (1 - level for level in LEVELS)


class Prospect(NamedTuple):
    """A queue's forecast, in seconds."""

    median_s: float
    upper_s: float
    highest_s: float
    "Quantiles of the queueing delay, at `LEVELS`."
    cost_s: float
    "Of all that may happen to a packet: the better queue is the one that costs less."
    risk_s: float
    "Of the worst that may."
    drop: float
    "The probability of a drop."


class Tail:
    """What a queue's worst is beyond its forecast, on this path and lately.

    Adaptive conformal inference (Gibbs and Candes 2021): whatever the model foretells, the share of
    delays above the corrected quantile tends to the quantile's chance. So a queue whose bursts the
    model does not know is left for one that keeps what was foretold of it.
    """

    __slots__ = ("beyond_s",)

    def __init__(self) -> None:
        self.beyond_s = 0.0
        "Is added to the highest quantile."

    def learn(self, delay_s: float, highest_s: float) -> None:
        """Take note of a queueing delay, and of the corrected quantile that was foretold for it."""
        step_s = min(TAIL_STEP_S, TAIL_STEP_SHARE * max(delay_s, highest_s))
        beyond_s = self.beyond_s + step_s * ((delay_s > highest_s) - _HIGHEST_CHANCE)
        self.beyond_s = min(max(beyond_s, -TAIL_MAX_S), TAIL_MAX_S)


def prospects(
    forecast: Forecast, loss_s: float, tails: tuple[Tail, Tail]
) -> tuple[Prospect, Prospect] | None:
    """Return what a forecast means for each queue, or None if it is no number.

    `loss_s` is what a drop costs: the time until another bundle brings what was lost. A quantile
    takes all of it where drops are as likely as what lies beyond the quantile.
    """
    low_s, classic_s = forecast.delay_s.tolist()
    low_drop, classic_drop = forecast.drop.tolist()
    low = _prospect(low_s, low_drop, loss_s, tails[0].beyond_s)
    classic = _prospect(classic_s, classic_drop, loss_s, tails[1].beyond_s)
    return (low, classic) if isfinite(low.cost_s + classic.cost_s) else None


def _prospect(quantiles_s: list[float], drop: float, loss_s: float, beyond_s: float) -> Prospect:
    median_s, upper_s, highest_s = quantiles_s
    highest_s = max(highest_s + beyond_s, upper_s)
    # Written out, since it is on the send path.
    risk_s = highest_s + loss_s * min(drop / _HIGHEST_CHANCE, 1.0)
    cost_s = (
        _MEDIAN_WEIGHT * (median_s + loss_s * min(drop / _MEDIAN_CHANCE, 1.0))
        + _UPPER_WEIGHT * (upper_s + loss_s * min(drop / _UPPER_CHANCE, 1.0))
        + _HIGHEST_WEIGHT * risk_s
    )
    return Prospect(median_s, upper_s, highest_s, cost_s, risk_s, drop)


class QueueChoice:
    """The queue in use: kept until the other one is better by a margin, and for a least time."""

    def __init__(self) -> None:
        self.queue = Queue.L
        self.switches = 0
        self._since_s = -inf

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
