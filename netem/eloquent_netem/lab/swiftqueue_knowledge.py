"""What a sender knows of both queues when each of its packets leaves, for a whole flow at once.

Every baseline predicts from this, and the measures define by it what a change and a spike are. A
packet's row holds nothing that became known after its sending (`Flow.known_s`).
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eloquent.swiftqueue.dataset import Replay, replay
from eloquent.swiftqueue.records import Flow, Queue

BASE_SPAN_S = 30.0
RECENT_SPAN_S = 1.0
LAG_SHARE = 0.9

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A queue's delivered packets in the order in which the sender learnt of them.

    A packet that was sent before one already known is left out, so sending times rise too. Arrays
    have length m.
    """

    index: Ints
    "The packet's row in its flow."
    known_s: Floats
    sent_s: Floats
    delay_s: Floats
    waited_s: Floats
    "Delay less the base, as the sender saw it when it learnt of the packet."


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Arrays have n rows, one for each packet of the flow, and a column for each `Queue`.

    Where nothing is known, times are NaN.
    """

    flow: Flow
    series: tuple[Series, Series]
    base_s: Floats
    "(n,): the least delay that became known in the last 30 s, both queues together."
    lag_s: Floats
    "(n,): what most reports of the last second took, from arrival until the sender knew."
    position: Ints
    "(n, 2): the newest known packet's place in the queue's series; -1: none."
    last_s: Floats
    "(n, 2): its delay; where there is none, the other queue's."
    last_sent_s: Floats
    "(n, 2): when it left; NaN where there is none in this queue."
    recent_s: Floats
    "(n, 2): the median delay of what became known in the last second; else `last_s`."
    in_flight: Ints
    "(n, 2): packets in this queue that left after the newest whose fate is known."
    oldest_sent_s: Floats
    "(n, 2): when the oldest of these left."

    @property
    def now_s(self) -> Floats:
        """(n,): when each packet left."""
        return self.flow.sent_s

    @property
    def is_scored(self) -> NDArray[np.bool_]:
        """(n, 2): whether the delay is known and the sender had any delay to predict it from."""
        return np.isfinite(self.flow.delay_s) & np.isfinite(self.base_s)[:, None]

    @property
    def is_own(self) -> NDArray[np.bool_]:
        """(n, 2): whether this is the queue that the packet went into."""
        is_own: NDArray[np.bool_] = np.arange(2) == self.flow.queue[:, None]
        return is_own

    @cached_property
    def replayed(self) -> Replay:
        """The flow as our model sees it."""
        return replay(self.flow)

    def newest(self, queue: int, values: Floats) -> Floats:
        """Return (n,): of `values` along the queue's series the newest known; NaN: none."""
        position = self.position[:, queue]
        if not len(values):
            return np.full(len(position), np.nan)
        return np.where(position >= 0, values[position], np.nan)

    def filled(self, forecast_s: Floats) -> Floats:
        """Fill (n, 2) forecasts where they are NaN: with the other queue's, else the base."""
        forecast_s = np.where(np.isnan(forecast_s), forecast_s[:, ::-1], forecast_s)
        return np.where(np.isnan(forecast_s), self.base_s[:, None], forecast_s)


def knowledge_of(flow: Flow) -> Knowledge:
    """Find out what the sender knew at each sending."""
    now_s = flow.sent_s
    queue = flow.queue.astype(np.int64)
    delay_s = np.take_along_axis(flow.delay_s, queue[:, None], axis=1)[:, 0].astype(np.float64)
    order = np.lexsort((np.arange(len(now_s)), flow.known_s))
    order = order[np.isfinite(flow.known_s[order])]
    delivered = order[np.isfinite(delay_s[order])]
    known_s = flow.known_s[delivered]
    base_at_known_s = _windowed(known_s, delay_s[delivered], known_s, BASE_SPAN_S, share=0.0)
    base_s = _windowed(known_s, delay_s[delivered], now_s, BASE_SPAN_S, share=0.0)
    # After 30 s without a report the base is what the newest one says.
    newest_s = _newest(known_s, delay_s[delivered], now_s)
    base_s = np.where(np.isnan(base_s), newest_s, base_s)
    lags_s = known_s - flow.sent_s[delivered] - delay_s[delivered]
    lag_s = _windowed(known_s, lags_s, now_s, RECENT_SPAN_S, share=LAG_SHARE)
    lag_s = np.where(np.isnan(lag_s), _newest(known_s, lags_s, now_s), lag_s)

    shape = (len(now_s), 2)
    position = np.full(shape, -1, dtype=np.int64)
    in_flight = np.zeros(shape, dtype=np.int64)
    last_s, last_sent_s, recent_s, oldest_sent_s = (np.full(shape, np.nan) for _ in range(4))
    series = []
    for which in Queue:
        is_here = queue[delivered] == which
        here = delivered[is_here]
        recent_s[:, which] = _windowed(
            flow.known_s[here], delay_s[here], now_s, RECENT_SPAN_S, share=0.5
        )
        rises = _rises(here)
        one = Series(
            index=here[rises],
            known_s=flow.known_s[here[rises]],
            sent_s=flow.sent_s[here[rises]],
            delay_s=delay_s[here[rises]],
            waited_s=(delay_s[delivered] - base_at_known_s)[is_here][rises],
        )
        series.append(one)
        position[:, which] = np.searchsorted(one.known_s, now_s, side="right") - 1
        last_s[:, which] = _newest(one.known_s, one.delay_s, now_s)
        last_sent_s[:, which] = _newest(one.known_s, one.sent_s, now_s)
        settled = order[queue[order] == which]
        in_flight[:, which], oldest_sent_s[:, which] = _flying(flow, which, settled)
    last_s = np.where(np.isnan(last_s), last_s[:, ::-1], last_s)
    return Knowledge(
        flow=flow,
        series=(series[0], series[1]),
        base_s=base_s,
        lag_s=lag_s,
        position=position,
        last_s=last_s,
        last_sent_s=last_sent_s,
        recent_s=np.where(np.isnan(recent_s), last_s, recent_s),
        in_flight=in_flight,
        oldest_sent_s=oldest_sent_s,
    )


def _rises(index: Ints) -> NDArray[np.bool_]:
    """Return which packets left after all those that became known before them."""
    highest = np.maximum.accumulate(index) if len(index) else index
    rises: NDArray[np.bool_] = index == highest
    return rises


def _newest(known_s: Floats, values: Floats, now_s: Floats) -> Floats:
    place = np.searchsorted(known_s, now_s, side="right") - 1
    if not len(values):
        return np.full(len(now_s), np.nan)
    return np.where(place >= 0, values[place], np.nan)


def _flying(flow: Flow, which: Queue, settled: Ints) -> tuple[Ints, Floats]:
    """Return how many packets are in flight in a queue at each sending, and the oldest's time.

    `settled`: the queue's packets by when their fate became known. FIFO: what left before the
    newest of them is no longer there.
    """
    count = len(flow.sent_s)
    here = np.flatnonzero(flow.queue == which)
    newest = np.maximum.accumulate(settled) if len(settled) else settled
    place = np.searchsorted(flow.known_s[settled], flow.sent_s, side="right") - 1
    after = np.where(place >= 0, newest[place], -1) if len(newest) else np.full(count, -1)
    first = np.searchsorted(here, after, side="right")
    end = np.searchsorted(here, np.arange(count), side="left")
    flying = np.maximum(end - first, 0)
    oldest_s = np.full(count, np.nan)
    oldest_s[flying > 0] = flow.sent_s[here[first[flying > 0]]]
    return flying, oldest_s


def _windowed(
    known_s: Floats, values: Floats, now_s: Floats, span_s: float, *, share: float
) -> Floats:
    """Return at each time a quantile of what became known in the `span_s` before; NaN: nothing.

    Both `known_s` and `now_s` rise.
    """
    ends = np.searchsorted(known_s, now_s, side="right").tolist()
    starts = np.searchsorted(known_s, now_s - span_s, side="right").tolist()
    found = np.full(len(now_s), np.nan)
    ordered: list[float] = []
    listed = values.tolist()
    start = end = 0
    for row, (first, last) in enumerate(zip(starts, ends, strict=True)):
        for value in listed[end:last]:
            insort(ordered, value)
        for value in listed[start:first]:
            del ordered[bisect_left(ordered, value)]
        start, end = first, last
        if ordered:
            found[row] = ordered[int(share * len(ordered))]
    return found
