"""What the model sees of a connection: one class for training and for serving.

`History` turns what a sender knows (its own packets, and what it learns of them) into numbers of
about one's size. Delays and times are seen as log(1 + t / 5 ms), so that 2 ms beside 4 ms and
200 ms beside 400 ms look alike. Only differences of the receiver's clock count: a delay is seen
over the *base*, the least delay of the last half minute in either queue.
"""

import math

import numpy as np
from numpy.typing import NDArray

from eloquent.swiftqueue.least import Least
from eloquent.swiftqueue.records import Observation, Queue
from eloquent.swiftqueue.shape import DELAY_UNIT_S, MAX_DELAY_S

JUMP_S = 0.5
"A delay that far below what the base or the round trip allow: the receiver's clock was set."
SLOW_S = 3.0
"Time constant of a queue's slow figures."
RATE_SPAN_S = 0.02
"A queue's rate of change is taken over at least this long."
MAX_RATE = 4.0
"Seconds of delay a second, at most."
SENT_SPAN_S = 0.2
"Time constant of the sender's own rate."
LOSS_WEIGHT = 1 / 16
"Weight of the newest packet in the share of losses."
PACKET_BYTES = 1500
"A size of one."
MAX_PENDING = 512
"Packets of a queue whose fate is waited for, and packets whose fate is remembered, at most."
SKIPPED_S = 2.0
"A packet that was overtaken counts as missing for this long."
SANE_S = 1e12
"Beyond this a time or a delay is cut."

EVENT_NAMES = (
    "lost",
    "late",
    "classic",
    "delay",
    "delay_step",
    "delay_rate",
    "over_other_queue",
    "sent_gap_in_queue",
    "sent_gap",
    "known_gap",
    "arrival_gap",
    "feedback_lag",
    "round_trip_excess",
    "round_trip_least",
    "size",
    "own_rate",
    "loss_share",
    "l_pending",
    "c_pending",
    "l_skipped",
    "c_skipped",
)
"What `History.on_observation` gives, in this order."

QUEUE_QUERY_NAMES = (
    "delay",
    "is_known",
    "age",
    "rate",
    "trend",
    "mean",
    "peak",
    "roughness",
    "overdue",
    "pending",
    "skipped",
)
OWN_QUERY_NAMES = (
    "delay",
    "silence",
    "sent_gap",
    "round_trip_least",
    "feedback_lag",
    "size",
    "own_rate",
    "loss_share",
)
QUERY_NAMES = (
    *(f"{queue.name.lower()}_{name}" for queue in Queue for name in QUEUE_QUERY_NAMES),
    *OWN_QUERY_NAMES,
)
"What `History.query` gives, in this order."

EVENT_FEATURES = len(EVENT_NAMES)
QUERY_FEATURES = len(QUERY_NAMES)


class History:
    """What a connection's sender knows of the two queues at any moment.

    Times are in seconds by the sender's clock. Nothing it is told can break it: what is no number
    counts as unknown, what is absurd is cut, and memory is bounded.
    """

    def __init__(self) -> None:
        self._queues = (_QueueHistory(), _QueueHistory())
        self._base = Least()
        self._back = Least()
        self._round_trip = Least()
        self._fates: dict[int, bool] = {}
        self._known_s = self._event_sent_s = self._arrived_s = self._sent_s = math.nan
        self._newest_delay_s = math.nan
        self._lag_s = 0.0
        self._recent_bytes = 0.0
        self._loss_share = 0.0
        self.jumps = 0
        "How often the receiver's clock was found to have been set."

    @property
    def base_s(self) -> float:
        """The least one-way delay of the last half minute, by both clocks; NaN: none is known."""
        return self._base.least

    def last_s(self, queue: Queue) -> float:
        """Return the one-way delay last known of a queue, by both clocks; NaN: none is known."""
        return self._queues[queue].delay_s

    def on_sent(self, number: int, sent_s: float, size: int, queue: Queue) -> None:
        """Take note of a packet that left, of `size` bytes, and whose fate will be learnt."""
        sent_s = _sane(sent_s, self._sent_s)
        self._recent_bytes = self._bytes_at(sent_s) + _sane(size, 0.0)
        self._sent_s = sent_s
        pending = self._queues[queue].pending
        pending[number] = sent_s
        if len(pending) > MAX_PENDING:
            del pending[next(iter(pending))]

    def on_observation(self, observation: Observation) -> NDArray[np.float32]:
        """Take note of a packet's fate; return the model's next event, (EVENT_FEATURES,).

        A packet that arrives after it was taken for lost is an event of its own, and so is a
        fate that is told twice.
        """
        number, sent_s, size, queue, delay_s, known_s = observation
        known_s = _sane(known_s, self._known_s)
        sent_s = _sane(sent_s, known_s)
        lost = not math.isfinite(delay_s)
        late = self._fates.get(number)
        own, other = self._queues[queue], self._queues[1 - queue]
        own.settle(number, sent_s, is_lost=lost)
        if late is None:
            self._loss_share += LOSS_WEIGHT * (lost - self._loss_share)
        elif late and not lost:
            self._loss_share *= 1 - LOSS_WEIGHT
        self._remember(number, is_lost=lost)

        round_trip_s = known_s - sent_s
        over = step = beside = arrival_gap = 0.0
        own_gap_s = sent_s - own.sent_s
        if not lost:
            delay_s = _sane(delay_s, 0.0)
            self._learn_delay(known_s, delay_s, round_trip_s)
            base_s = self._base.least
            over = _log(delay_s - base_s)
            step = _signed(delay_s - own.delay_s)
            beside = _signed(delay_s - other.delay_s)
            arrival_gap = _signed(sent_s + delay_s - self._arrived_s)
            own.learn(sent_s, delay_s, base_s)
            self._newest_delay_s = delay_s
            self._lag_s = round_trip_s - delay_s - self._back.least
            self._arrived_s = sent_s + delay_s
        low, classic = self._queues
        event = np.array(
            (
                lost,
                late is not None,
                queue,
                over,
                step,
                own.rate,
                beside,
                _signed(own_gap_s),
                _signed(sent_s - self._event_sent_s),
                _log(known_s - self._known_s),
                arrival_gap,
                0.0 if lost else _log(self._lag_s),
                _log(round_trip_s - self._round_trip.least),
                _log(self._round_trip.least),
                _size(size),
                self._rate_at(known_s),
                self._loss_share,
                _count(low.pending),
                _count(classic.pending),
                _count(low.skipped),
                _count(classic.skipped),
            ),
            np.float32,
        )
        self._known_s = known_s
        self._event_sent_s = sent_s
        return event

    def query(self, now: float, size: int, silence_s: float = 0.0) -> NDArray[np.float32]:
        """Return what is known at `now + silence_s` if nothing is sent or heard till then.

        Beside the events, about a packet of `size` bytes that is sent then: (QUERY_FEATURES,).
        """
        now = _sane(now + silence_s, self._known_s)
        base_s, round_trip_s = self._base.least, self._round_trip.least
        low, classic = self._queues
        return np.array(
            (
                *low.query(now, base_s, round_trip_s),
                *classic.query(now, base_s, round_trip_s),
                _log(self._newest_delay_s - base_s),
                _log(now - self._known_s),
                _log(now - self._sent_s),
                _log(round_trip_s),
                _log(self._lag_s),
                _size(size),
                self._rate_at(now),
                self._loss_share,
            ),
            np.float32,
        )

    def _learn_delay(self, known_s: float, delay_s: float, round_trip_s: float) -> None:
        """Keep the least delays; start again where the receiver's clock has been set.

        A clock set back makes a delay less than any path has; one set forward, a delay so long
        that less time than ever is left of the round trip for the way back.
        """
        back_s = round_trip_s - delay_s
        if delay_s < self._base.least - JUMP_S or back_s < self._back.least - JUMP_S:
            self.jumps += 1
            self._base, self._back = Least(), Least()
            self._newest_delay_s = self._arrived_s = math.nan
            for queue in self._queues:
                queue.forget_delays()
        self._base.learn(known_s, delay_s)
        self._back.learn(known_s, back_s)
        self._round_trip.learn(known_s, round_trip_s)

    def _remember(self, number: int, *, is_lost: bool) -> None:
        self._fates[number] = is_lost
        if len(self._fates) > MAX_PENDING:
            del self._fates[next(iter(self._fates))]

    def _bytes_at(self, now: float) -> float:
        """Return the bytes sent lately, older ones counting less."""
        gap_s = now - self._sent_s
        return (
            self._recent_bytes * math.exp(-gap_s / SENT_SPAN_S)
            if gap_s > 0
            else (self._recent_bytes)
        )

    def _rate_at(self, now: float) -> float:
        return math.log1p(max(0.0, self._bytes_at(now)) / PACKET_BYTES)


class _QueueHistory:
    """What is known of one queue."""

    __slots__ = (
        "delay_s",
        "mean_s",
        "peak_s",
        "pending",
        "rate",
        "roughness_s",
        "sent_s",
        "skipped",
        "span_delay_s",
        "span_sent_s",
    )

    def __init__(self) -> None:
        self.pending: dict[int, float] = {}
        "When the packets were sent that nothing is known of, by number."
        self.skipped: dict[int, float] = {}
        "The like of those that were overtaken: probably lost."
        self.forget_delays()

    def forget_delays(self) -> None:
        self.delay_s = self.sent_s = math.nan
        self.mean_s = self.peak_s = self.span_delay_s = self.span_sent_s = math.nan
        self.rate = self.roughness_s = 0.0

    def settle(self, number: int, sent_s: float, *, is_lost: bool) -> None:
        """Take a packet off what is waited for; one that arrives has overtaken those before it."""
        self.pending.pop(number, None)
        self.skipped.pop(number, None)
        if is_lost:
            return
        while self.pending:
            oldest = next(iter(self.pending))
            if oldest > number:
                break
            self.skipped[oldest] = self.pending.pop(oldest)
        while self.skipped:
            oldest = next(iter(self.skipped))
            if self.skipped[oldest] >= sent_s - SKIPPED_S and len(self.skipped) <= MAX_PENDING:
                break
            del self.skipped[oldest]

    def learn(self, sent_s: float, delay_s: float, base_s: float) -> None:
        """Take note of a delay; of an older packet's only if nothing newer is known."""
        gap_s = sent_s - self.sent_s
        if gap_s < 0:
            return
        if gap_s >= 0:
            keep = math.exp(-gap_s / SLOW_S)
            self.mean_s = delay_s + (self.mean_s - delay_s) * keep
            self.peak_s = max(delay_s, base_s + (self.peak_s - base_s) * keep)
            change_s = min(abs(delay_s - self.delay_s), MAX_DELAY_S)
            self.roughness_s += (change_s - self.roughness_s) * LOSS_WEIGHT
            span_s = sent_s - self.span_sent_s
            if span_s >= RATE_SPAN_S:
                rate = (delay_s - self.span_delay_s) / span_s
                self.rate = min(max(rate, -MAX_RATE), MAX_RATE)
                self.span_delay_s, self.span_sent_s = delay_s, sent_s
        else:  # the first
            self.mean_s = self.peak_s = self.span_delay_s = delay_s
            self.span_sent_s = sent_s
        self.delay_s, self.sent_s = delay_s, sent_s

    def query(self, now: float, base_s: float, round_trip_s: float) -> tuple[float, ...]:
        """Return what `QUEUE_QUERY_NAMES` names."""
        overdue_s = 0.0
        if self.pending:
            overdue_s = now - self.pending[next(iter(self.pending))] - round_trip_s
        age_s = now - self.sent_s
        over_s = self.delay_s - base_s
        keep = math.exp(-age_s / SLOW_S) if age_s > 0 else 1.0
        return (
            _log(over_s),
            self.sent_s == self.sent_s,
            _log(age_s),
            self.rate,
            _log(over_s + self.rate * min(max(age_s, 0.0), SENT_SPAN_S)),
            _log(self.mean_s - base_s),
            _log((self.peak_s - base_s) * keep),
            _log(self.roughness_s),
            _log(overdue_s),
            _count(self.pending),
            _count(self.skipped),
        )


def _sane(value: float, otherwise: float) -> float:
    """Return a finite number that is not absurd, in the place of one that may be neither."""
    if math.isfinite(value):
        return min(max(value, -SANE_S), SANE_S)
    return otherwise if math.isfinite(otherwise) else 0.0


def _log(time_s: float) -> float:
    """Scale a time; what is below zero, or unknown (NaN), counts as zero."""
    return math.log1p(min(time_s, MAX_DELAY_S) / DELAY_UNIT_S) if time_s > 0 else 0.0


def _signed(time_s: float) -> float:
    """Scale a difference; an unknown one (NaN) counts as zero."""
    return _log(time_s) - _log(-time_s)


def _size(size: int) -> float:
    return min(max(size, 0), 65_535) / PACKET_BYTES


def _count(packets: dict[int, float]) -> float:
    return math.log1p(len(packets))
