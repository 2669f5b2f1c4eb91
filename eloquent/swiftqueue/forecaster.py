"""Forecasts for all connections, made together when feedback has come, and read when packets leave.

The life of a forecast:

1. An observation becomes an event at once (`Outlook.on_observation`), since `History` needs its
   own order; the event waits.
2. `Forecaster.settle`, after a burst of received packets, takes the waiting events of all
   connections into the model, a batch at a time, and asks it what a packet would meet now and
   after each of `SILENCES_S` without news.
3. `Outlook.forecast`, on the send path, reads off the nearest of them. It computes nothing.
"""

from bisect import bisect
from collections import deque
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eloquent.swiftqueue.features import QUERY_FEATURES, SANE_S, History
from eloquent.swiftqueue.inference import Predictor
from eloquent.swiftqueue.records import Observation, Queue
from eloquent.swiftqueue.tuning import Tuning, TuningBudget, corrected

SILENCES_S = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"Times after a settle that forecasts are made for, as if nothing had been heard till then."
MAX_WAITING = 64
"""Events of a connection that one settle takes in. If more wait, the newest of them are all that
the model sees from there on: it forgets what came before, instead of reading over a gap."""
USUAL_BYTES = 1200
"The size that is asked about before anything was sent."

_BETWEEN_S = tuple((before + after) / 2 for before, after in pairwise(SILENCES_S))


class Forecast(NamedTuple):
    """What a packet that leaves now would meet, by `Queue`: L first."""

    delay_s: NDArray[np.float32]
    "(2, 3): quantiles of the queueing delay at `LEVELS`, in seconds."
    point_s: NDArray[np.float32]
    "(2,): one value for the delay, that of a loss which weighs changes."
    drop: NDArray[np.float32]
    "(2,): the probability that it is dropped."
    made_s: float
    "The `settle` it is from."


class _Found(NamedTuple):
    """What one settle foretold a connection, for each of `SILENCES_S`."""

    delay_s: NDArray[np.float32]
    frozen_s: NDArray[np.float32]
    "The like without the connection's correction."
    point_s: NDArray[np.float32]
    drop: NDArray[np.float32]
    is_finite: list[bool]
    made_s: float


class Outlook:
    """One connection's forecasts. Times in seconds by the sender's clock."""

    def __init__(self, forecaster: "Forecaster", slot: int, tuning: Tuning | None) -> None:
        self.history = History()
        self.slot = slot
        self.tuning = tuning
        "What corrects the forecasts by what became of packets; None: they are the model's."
        self.size = USUAL_BYTES
        "Of the packet that is asked about: as the last one."
        self.waiting: deque[tuple[NDArray[np.float32], float]] = deque(maxlen=MAX_WAITING)
        "Events that no settle has taken in yet, and when their packets were sent."
        self.is_behind = False
        "Whether events were given up."
        self.found: _Found | None = None
        self._forecaster: Forecaster | None = forecaster

    def on_sent(self, number: int, sent_s: float, size: int, queue: Queue) -> None:
        """Take note of a packet that left, of `size` bytes, whose fate will be learnt."""
        self.size = size
        if self.tuning is not None and self.found is not None:
            foretold_s = self.found.frozen_s[self._nearest(self.found, sent_s), queue]
            self.tuning.on_sent(number, sent_s, queue, self.history.base_s, foretold_s)
        self.history.on_sent(number, sent_s, size, queue)

    def on_observation(self, seen: Observation) -> None:
        """Take note of a packet's fate; it counts from the next `settle` on.

        One that was sent at an absurd time is left out.
        """
        jumps = self.history.jumps
        event = self.history.on_observation(seen)
        if self.tuning is not None:
            if self.history.jumps > jumps:
                self.tuning.forget_waiting()
            self.tuning.on_observation(seen)
        if self._forecaster is None or not abs(seen.sent_s) <= SANE_S:  # NaN is absurd too
            return
        self.is_behind |= len(self.waiting) == MAX_WAITING
        self.waiting.append((event, seen.sent_s))
        self._forecaster.due[self.slot] = self

    def forecast(self, now: float) -> Forecast | None:
        """Return what was foretold for `now`, or None: nothing yet, or no finite numbers."""
        found = self.found
        if found is None:
            return None
        nearest = self._nearest(found, now)
        if not found.is_finite[nearest]:
            return None
        return Forecast(
            found.delay_s[nearest], found.point_s[nearest], found.drop[nearest], found.made_s
        )

    def close(self) -> None:
        """Give the connection's slot back; nothing is foretold any more. Twice is once."""
        if self._forecaster is not None:
            self._forecaster.release(self)
            self._forecaster = self.found = None
            if self.tuning is not None:
                self.tuning.close()

    @staticmethod
    def _nearest(found: _Found, now: float) -> int:
        return bisect(_BETWEEN_S, now - found.made_s)


class Forecaster:
    """The forecasts of all connections; with a budget for `tuning`, each corrects its own."""

    def __init__(self, predictor: Predictor, tuning: TuningBudget | None = None) -> None:
        self._predictor = predictor
        self._tuning = tuning
        self.due: dict[int, Outlook] = {}
        "Those to which events have come since the last settle, by slot."

    def open(self) -> Outlook:
        """Return the outlook of a new connection."""
        tuning = None if self._tuning is None else Tuning(self._tuning)
        return Outlook(self, self._predictor.open(), tuning)

    def release(self, outlook: Outlook) -> None:
        """Give an outlook's slot back: `Outlook.close`."""
        self.due.pop(outlook.slot, None)
        self._predictor.close(outlook.slot)

    def settle(self, now: float) -> None:
        """Take in what has been observed, and foretell anew for those whom it concerns."""
        if not self.due:
            return
        slots = sorted(self.due)
        outlooks = [self.due[slot] for slot in slots]
        self.due.clear()
        self._push(outlooks)
        queries = np.empty((len(slots), len(SILENCES_S), QUERY_FEATURES), np.float32)
        for row, outlook in enumerate(outlooks):
            for column, silence_s in enumerate(SILENCES_S):
                queries[row, column] = outlook.history.query(now, outlook.size, silence_s)
        frozen_s, point_s, drop = self._predictor.forecast(slots, queries)
        delay_s = frozen_s
        if self._tuning is not None:
            tunings = [outlook.tuning for outlook in outlooks]
            curves = [None if tuning is None else tuning.curves() for tuning in tunings]
            delay_s = corrected(frozen_s, curves)
        # A quantile that is no number makes the higher ones so.
        finite = np.isfinite(delay_s[..., -1] + point_s + drop).all(axis=-1).tolist()
        for row, outlook in enumerate(outlooks):
            # Copies: a connection that falls silent is not to keep what all others were told.
            mine = delay_s[row].copy(), frozen_s[row].copy(), point_s[row].copy(), drop[row].copy()
            outlook.found = _Found(*mine, finite[row], now)

    def _push(self, outlooks: list[Outlook]) -> None:
        slots, events, sent_s = [], [], []
        for outlook in outlooks:
            if outlook.is_behind:
                self._predictor.clear(outlook.slot)
                outlook.is_behind = False
            for event, event_sent_s in outlook.waiting:
                slots.append(outlook.slot)
                events.append(event)
                sent_s.append(event_sent_s)
            outlook.waiting.clear()
        self._predictor.push(slots, np.stack(events), sent_s)
