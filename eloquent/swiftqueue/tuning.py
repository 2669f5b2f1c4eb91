"""Online fine-tuning: a connection's forecasts, corrected by what became of its own packets.

What is learnt is a last layer on top of the head's quantiles: for each queue and level a curve in
the delay's scale, by which the head's output goes up or down, linear between its values at `KNOTS`
(24 numbers in all). A single bias would do for the share of packets below a quantile, and pay for
it in milliseconds, since what is wrong on an empty queue is not what is wrong on a full one; the
head's own last layer has 400 weights, and a minute of tokens is a few hundred observations that do
not depend on each other. Each packet whose arrival is known moves the two nearest values of its
queue by the gradient of the pinball loss, the model's own in training.

A peer may report what it likes, and paths differ, so nothing is shared: each connection learns for
itself, and forgets with its `Outlook`, which the policy gives up when it loses trust. Within that,
a lie moves a forecast by `RATE` times `MOST_WEIGHT` a packet, and by `MOST` in all.

    state of a queue   its forecasts    why                                           next
    frozen             the model's      fewer than `LEAST_SEEN` packets, or the       tuned, reset
                                        correction is not better than none
    tuned              corrected        its loss is below the frozen head's           frozen, reset
    reset              the model's      its loss was above it by `WORSE`: begins      frozen
                                        anew, from the weights that are shipped

Both losses are of the same packets, by what either said before the packet's fate was known.
Nothing here is random.
"""

import math
from bisect import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eloquent.swiftqueue.records import Observation, Queue
from eloquent.swiftqueue.shape import DELAY_UNIT_S, LEVELS, MAX_DELAY_S, MAX_SCALED

KNOTS_S = (0.0, 0.01, 0.05, 0.25)
"Foretold delays at which a correction has values of its own."
RATE = 0.02
MOST_WEIGHT = 4.0
"What a step counts at most: more for longer delays, as the loss has a part in seconds."
MOST = 1.0
"The trust region: a correction changes delay + 5 ms by a factor of e at most."
LEAST_SEEN = 50
"Packets of a queue before its correction is used."
BETTER = 0.98
WORSE = 1.05
"The correction is used below so much of the frozen head's loss, and begins anew above so much."
MEMORY = 500
"Packets over which the losses are taken."
ERROR_UNIT_S = 0.1
"A loss in seconds counts over this beside that in the delay's scale, as in training."

SHARE = 0.01
"Of one processor's time, for all connections."
STEP_S = 1e-5
"What learning from a packet costs of it. Corrections, once learnt, cost 3 to 20 us a settle more."
BURST = 50.0
"Packets of a connection that are learnt from at once, at most."
MAX_WAITING = 512
"Packets of a connection whose fate is waited for, at most."

Curve = tuple[float, ...]
"A correction's values at `KNOTS_S`."
Curves = tuple[Curve, ...]
"Those of a queue, by level."

_KNOTS = tuple(math.log1p(knot_s / DELAY_UNIT_S) for knot_s in KNOTS_S)
_LOW = np.array(_KNOTS[:-1], np.float32)
_WIDTH = np.diff(np.array(_KNOTS, np.float32))
_NONE: Curves = ((0.0,) * len(KNOTS_S),) * len(LEVELS)


class TuningBudget:
    """The packets that all connections of an endpoint may learn from, dealt evenly."""

    def __init__(self, share: float = SHARE, step_s: float = STEP_S) -> None:
        """`share` of one processor's time is spent at most, if a packet costs `step_s`.

        Raises:
            ValueError: the share is not above 0.
        """
        if not share > 0:
            raise ValueError(f"A share of {share} of the time is none to learn in.")
        self._steps_per_s = share / step_s
        self.connections = 0

    @property
    def steps_per_s(self) -> float:
        """Of each connection."""
        return self._steps_per_s / max(self.connections, 1)


class Tuning:
    """One connection's correction. Times in seconds by the sender's clock."""

    def __init__(self, budget: TuningBudget) -> None:
        self.steps = 0
        "Packets that were learnt from."
        self.skipped = 0
        "Packets that there was no budget for."
        self._budget = budget
        self._tokens = BURST
        self._filled_s = math.inf
        self._queues = tuple(_QueueTuning() for _ in Queue)
        self._waiting: dict[int, _Told] = {}
        budget.connections += 1

    @property
    def resets(self) -> int:
        """How often a correction was worse than none."""
        return sum(queue.resets for queue in self._queues)

    @property
    def losses(self) -> tuple[tuple[float, float], ...]:
        """By queue: the recent loss of the frozen head, and of the corrected one; NaN: none."""
        return tuple((queue.frozen_loss, queue.tuned_loss) for queue in self._queues)

    def curves(self) -> tuple[Curves, ...] | None:
        """Return the corrections, (2, 3, knots), in the delay's scale; None: there is none."""
        if not any(queue.is_used for queue in self._queues):
            return None
        return tuple(queue.curves if queue.is_used else _NONE for queue in self._queues)

    def on_sent(
        self, number: int, now: float, queue: Queue, base_s: float, delay_s: NDArray[np.float32]
    ) -> None:
        """Take note of a packet that leaves at `now`, if there is budget to learn from it.

        That is decided here, since later is too late: packets that are heard of in bursts are the
        slow ones.

        Args:
            number: the packet's.
            now: its sending.
            queue: where it went.
            base_s: the one-way delay over which quantiles are foretold.
            delay_s: (3,), what the frozen head foretold of its queueing delay there.
        """
        elapsed_s = max(now - self._filled_s, 0.0)
        self._filled_s = now
        self._tokens = min(self._tokens + elapsed_s * self._budget.steps_per_s, BURST)
        if self._tokens < 1:
            self.skipped += 1
            return
        self._tokens -= 1
        self._waiting[number] = _Told(base_s, delay_s, self._queues[queue].curves)
        if len(self._waiting) > MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]

    def on_observation(self, seen: Observation) -> None:
        """Learn from a packet's fate; a lost packet teaches nothing, nor one that is no number."""
        told = self._waiting.pop(seen.number, None)
        if told is None:
            return
        delay_s = seen.delay_s - told.base_s
        foretold_s = told.delay_s.tolist()
        if not math.isfinite(delay_s + foretold_s[-1]):
            return
        self.steps += 1
        delay_s = min(max(delay_s, 0.0), MAX_DELAY_S)
        self._queues[seen.queue].learn(delay_s, foretold_s, told.curves)

    def forget_waiting(self) -> None:
        """Learn nothing from what is under way: the peer's clock was set."""
        self._waiting.clear()

    def close(self) -> None:
        """Leave the budget to the others."""
        self._budget.connections -= 1


class _Told:
    """What was foretold of a packet."""

    __slots__ = ("base_s", "curves", "delay_s")

    def __init__(self, base_s: float, delay_s: NDArray[np.float32], curves: Curves) -> None:
        self.base_s = base_s
        self.delay_s = delay_s
        self.curves = curves
        "What the correction was then, used or not."


class _QueueTuning:
    """The correction of one queue's quantiles."""

    __slots__ = ("curves", "frozen_loss", "is_used", "resets", "seen", "tuned_loss")

    def __init__(self) -> None:
        self.resets = 0
        self._begin()

    def _begin(self) -> None:
        self.curves = _NONE
        self.frozen_loss = self.tuned_loss = math.nan
        self.seen = 0
        self.is_used = False

    def learn(self, delay_s: float, foretold_s: list[float], then: Curves) -> None:
        """Take a step; then see whether the correction is worth it.

        `then` is what it was when the packet left.
        """
        scaled = _scaled(delay_s)
        frozen_loss = tuned_loss = highest = 0.0
        moved = []
        for level, quantile_s, its_curve, curve in zip(
            LEVELS, foretold_s, then, self.curves, strict=True
        ):
            quantile = _scaled(quantile_s)
            frozen_loss += _pinball(level, scaled - quantile, delay_s - quantile_s)
            knot, share = _place(quantile)
            added = its_curve[knot] * (1 - share) + its_curve[knot + 1] * share
            highest = min(max(quantile + added, highest), MAX_SCALED)  # As `corrected` has it.
            tuned_s = DELAY_UNIT_S * math.expm1(highest)
            tuned_loss += _pinball(level, scaled - highest, delay_s - tuned_s)
            step = RATE * min(1 + (tuned_s + DELAY_UNIT_S) / ERROR_UNIT_S, MOST_WEIGHT)
            step *= level if scaled > highest else level - 1
            moved.append(_moved(curve, knot, share, step))
        self.curves = tuple(moved)
        self._judge(frozen_loss, tuned_loss)

    def _judge(self, frozen_loss: float, tuned_loss: float) -> None:
        if self.seen == 0:
            self.frozen_loss, self.tuned_loss = frozen_loss, tuned_loss
        self.seen += 1
        weight = 1 / min(self.seen, MEMORY)
        self.frozen_loss += (frozen_loss - self.frozen_loss) * weight
        self.tuned_loss += (tuned_loss - self.tuned_loss) * weight
        if self.seen < LEAST_SEEN:
            return
        if self.tuned_loss > WORSE * self.frozen_loss:
            self.resets += 1
            self._begin()
        elif self.tuned_loss >= self.frozen_loss:
            self.is_used = False
        elif self.tuned_loss < BETTER * self.frozen_loss:
            self.is_used = True


def _place(scaled: float) -> tuple[int, float]:
    """Return the knot below a foretold delay, and how far it is on the way to the next one."""
    knot = min(bisect(_KNOTS, scaled) - 1, len(_KNOTS) - 2)
    low, high = _KNOTS[knot], _KNOTS[knot + 1]
    return knot, min((scaled - low) / (high - low), 1.0)


def _moved(curve: Curve, knot: int, share: float, step: float) -> Curve:
    found = list(curve)
    found[knot] = min(max(found[knot] + step * (1 - share), -MOST), MOST)
    found[knot + 1] = min(max(found[knot + 1] + step * share, -MOST), MOST)
    return tuple(found)


def _scaled(delay_s: float) -> float:
    return math.log1p(max(delay_s, 0.0) / DELAY_UNIT_S)


def _pinball(level: float, error: float, error_s: float) -> float:
    """Return the loss of an error, in the delay's scale and in seconds: true less foretold."""
    whole = error + error_s / ERROR_UNIT_S
    return level * whole if error > 0 else (level - 1) * whole


def corrected(
    delay_s: NDArray[np.float32], curves: Sequence[tuple[Curves, ...] | None]
) -> NDArray[np.float32]:
    """Return the quantiles of k connections with their corrections; they still do not cross.

    Args:
        delay_s: (k, G, 2, 3), in seconds.
        curves: k of them, from `Tuning.curves`.
    """
    rows = [row for row, one in enumerate(curves) if one is not None]
    if not rows:
        return delay_s
    values = np.array([curves[row] for row in rows], np.float32)[:, np.newaxis]
    slopes = np.diff(values) / _WIDTH
    scaled = np.log1p(delay_s[rows] / np.float32(DELAY_UNIT_S))
    along = np.clip(scaled[..., np.newaxis] - _LOW, 0.0, _WIDTH)
    scaled += values[..., 0] + np.vecdot(along, slopes)
    np.maximum.accumulate(scaled, axis=-1, out=scaled)
    np.clip(scaled, 0.0, MAX_SCALED, out=scaled)
    found = delay_s.copy()
    found[rows] = np.float32(DELAY_UNIT_S) * np.expm1(scaled)
    return found
