"""What our predictor is compared with, the learned ones aside, and the noise floors.

Each predicts for each queue by itself, from `Knowledge` alone. Where a queue has shown nothing
yet, the other queue's forecast stands in, else the base. What is tuned, is tuned on the training
families, orders of models on the validation families. Needs scipy.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from eloquent.swiftqueue.records import Queue
from eloquent_netem.lab.swiftqueue_arma import ArmaModel, fit_arma
from eloquent_netem.lab.swiftqueue_knowledge import Floats, Knowledge, Series
from eloquent_netem.lab.swiftqueue_measures import UPPER_LEVEL, Forecasts, changes

CHANGE_WEIGHT = 8.0
"What an error on a change counts where something is fitted, as in our own training."

EWMA_WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
AR_ORDERS = ((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (32, 0))
ARMA_ORDERS = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))


class Baseline(ABC):
    """A model that is fitted once and then predicts flow by flow."""

    name: str
    "A row's `model`."

    @abstractmethod
    def fit(self, train: Sequence[Knowledge], validation: Sequence[Knowledge]) -> None:
        """Learn from the training families; settle what has no gradient on the validation ones."""

    @abstractmethod
    def predict(self, known: Knowledge) -> Forecasts:
        """Predict each packet of a flow, NaN where nothing at all is known."""


class PointBaseline(Baseline):
    """Says a point; its 0.99 quantile lies as far above as 99 % of the training residuals do."""

    def __init__(self) -> None:
        self._above_s = np.zeros(2)

    def fit(self, train: Sequence[Knowledge], validation: Sequence[Knowledge]) -> None:
        """See `Baseline.fit`."""
        self.tune(train, validation)
        residuals: tuple[list[Floats], list[Floats]] = ([], [])
        for known in train:
            residual_s = known.flow.delay_s - self.point(known)
            for queue in Queue:
                counts = (known.is_scored & known.is_own)[:, queue]
                residuals[queue].append(residual_s[counts, queue])
        for queue in Queue:
            found = np.concatenate(residuals[queue]) if residuals[queue] else np.zeros(0)
            if len(found):
                self._above_s[queue] = np.quantile(found, UPPER_LEVEL)

    def predict(self, known: Knowledge) -> Forecasts:
        """See `Baseline.predict`."""
        point_s = known.filled(self.point(known))
        return Forecasts(point_s, point_s + self._above_s)

    def tune(self, train: Sequence[Knowledge], validation: Sequence[Knowledge]) -> None:
        """Choose what there is to choose."""

    @abstractmethod
    def point(self, known: Knowledge) -> Floats:
        """Return (n, 2) one-way delays in seconds; NaN where a queue has shown nothing."""


class LastValue(PointBaseline):
    """The newest delay known of the queue."""

    name = "last-value"

    def point(self, known: Knowledge) -> Floats:
        """See `PointBaseline.point`."""
        return known.last_s


class Ewma(PointBaseline):
    """An exponentially weighted mean of the queue's delays."""

    name = "ewma"

    def __init__(self) -> None:
        super().__init__()
        self.weight = EWMA_WEIGHTS[-1]
        "Of the newest."

    def tune(self, train: Sequence[Knowledge], validation: Sequence[Knowledge]) -> None:
        """See `PointBaseline.tune`."""
        self.weight = min(
            EWMA_WEIGHTS,
            key=lambda weight: _cost(train, [self._at(known, weight) for known in train]),
        )

    def point(self, known: Knowledge) -> Floats:
        """See `PointBaseline.point`."""
        return self._at(known, self.weight)

    def _at(self, known: Knowledge, weight: float) -> Floats:
        means = [known.newest(queue, _ewma(known.series[queue].delay_s, weight)) for queue in Queue]
        return known.filled(np.stack(means, axis=1))


class Arma(PointBaseline):
    """An ARMA model of the queue's delays over the base, packet by packet.

    A packet is as many steps ahead of the newest one known as there are packets of its queue in
    flight, itself included. Coefficients are by least squares over all training flows, those of the
    moving average on residuals of a long autoregression (Hannan and Rissanen 1982); orders p and
    q are those of the least error on the validation families.
    """

    def __init__(self, name: str, orders: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.name = name
        self._orders = orders
        self._models = (ArmaModel.white(), ArmaModel.white())

    def tune(self, train: Sequence[Knowledge], validation: Sequence[Knowledge]) -> None:
        """See `PointBaseline.tune`."""
        judged = validation or train
        candidates = []
        for p, q in self._orders:
            low, classic = (
                fit_arma((one.series[queue].waited_s for one in train), p, q) for queue in Queue
            )
            self._models = (low, classic)
            candidates.append((_cost(judged, [self.point(one) for one in judged]), self._models))
        self._models = min(candidates, key=lambda one: one[0])[1]

    def point(self, known: Knowledge) -> Floats:
        """See `PointBaseline.point`."""
        waits_s = [
            self._models[queue].ahead(
                known.series[queue].waited_s,
                known.position[:, queue],
                known.in_flight[:, queue] + 1,
            )
            for queue in Queue
        ]
        base_s = known.base_s[:, None]
        return known.filled(base_s + np.maximum(np.stack(waits_s, axis=1), 0.0))


class Physics(PointBaseline):
    """A fluid queue, from what FIFO and a server that never rests tell.

    At the newest known packet's sending s the wait was w, and grew by g seconds a second. Since
    then it has gone on for a while, rising or falling, and returns to what it mostly is:

        grown = w + g * hold * (1 - exp(-(now - s) / hold))    hold is rise_s or fall_s
        w(now) = mean + (grown - mean) * exp(-(now - s) / back_s)

    no lower than what a queue that nothing more enters would be: w - (now - s), and 0. If the
    oldest packet in flight has been out for longer than the least delay and a report take, the
    wait was at least that excess when it left, and as a rule `share` times that; what the forecast
    for that time lacks is added, less what has gone since. Constants are chosen on the training
    families.
    """

    name = "physics"
    GRID: ClassVar[dict[str, tuple[float, ...]]] = {
        "span_s": (0.06, 0.12, 0.25, 0.5, 1.0),
        "rise_s": (1e-4, 0.01, 0.02, 0.04, 0.08),
        "fall_s": (1e-4, 0.02, 0.05, 0.1, 0.3, 1.0),
        "back_s": (0.05, 0.1, 0.3, 1.0, 1e9),
        "share": (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0),
        "mean_weight": (0.001, 0.003, 0.01, 0.03, 0.1),
    }
    MAX_GROWTH = 4.0
    "Seconds a second: as much as five times what the link carries."

    def __init__(self) -> None:
        super().__init__()
        self.constants = {
            "span_s": 0.12,
            "rise_s": 0.02,
            "fall_s": 0.1,
            "back_s": 1e9,
            "share": 1.0,
            "mean_weight": 0.01,
        }

    def tune(self, train: Sequence[Knowledge], validation: Sequence[Knowledge]) -> None:
        """See `PointBaseline.tune`."""
        # One constant after the other, until none helps: they hardly depend on each other.
        least = _cost(train, [self.point(known) for known in train])
        for _ in range(3):
            before = least
            for name, values in self.GRID.items():
                for value in values:
                    kept = self.constants
                    self.constants = {**kept, name: value}
                    cost = _cost(train, [self.point(known) for known in train])
                    if cost < least:
                        least = cost
                    else:
                        self.constants = kept
            if least == before:
                break

    def point(self, known: Knowledge) -> Floats:
        """See `PointBaseline.point`."""
        return known.filled(np.stack([self._of(known, queue) for queue in Queue], axis=1))

    def _of(self, known: Knowledge, queue: Queue) -> Floats:
        constants = self.constants
        series = known.series[queue]
        growth = known.newest(queue, slopes(series, constants["span_s"]))
        growth = growth.clip(-1.0, self.MAX_GROWTH)
        hold_s = np.where(growth > 0, constants["rise_s"], constants["fall_s"])
        last_s = known.newest(queue, series.delay_s) - known.base_s
        mean_s = known.newest(queue, _ewma(series.waited_s, constants["mean_weight"]))

        def wait_s(gone_s: Floats) -> Floats:
            grown_s = last_s + growth * hold_s * -np.expm1(-gone_s / hold_s)
            found_s = mean_s + (grown_s - mean_s) * np.exp(-gone_s / constants["back_s"])
            return np.maximum(found_s, np.maximum(last_s - gone_s, 0.0))

        found_s = wait_s(known.now_s - known.last_sent_s[:, queue])
        # What the oldest packet in flight waited for longer than it would have.
        out_s = constants["share"] * overdue_s(known, queue)
        oldest_s = known.oldest_sent_s[:, queue]
        lacks_s = out_s - np.nan_to_num(wait_s(oldest_s - known.last_sent_s[:, queue]))
        lacks_s = np.maximum(lacks_s, 0.0) * np.exp(-(known.now_s - oldest_s) / constants["back_s"])
        is_more = lacks_s > 0
        return known.base_s + np.where(is_more, np.nan_to_num(found_s) + lacks_s, found_s)


class StateFloor(PointBaseline):
    """Noise floor: the router's true state when the packet enters; what comes later is unknown."""

    name = "state"

    def point(self, known: Knowledge) -> Floats:
        """See `PointBaseline.point`."""
        return known.flow.state_s.astype(np.float64)


class LaggedStateFloor(PointBaseline):
    """Noise floor: the true state at the newest packet of which the sender knows, drained since.

    How fast it drains, of the link's rate, is chosen on the training families: others' packets
    came meanwhile.
    """

    name = "state-lagged"
    DRAINS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.drain = 0.0

    def tune(self, train: Sequence[Knowledge], validation: Sequence[Knowledge]) -> None:
        """See `PointBaseline.tune`."""
        self.drain = min(
            self.DRAINS,
            key=lambda drain: _cost(train, [self._at(known, drain) for known in train]),
        )

    def point(self, known: Knowledge) -> Floats:
        """See `PointBaseline.point`."""
        return self._at(known, self.drain)

    def _at(self, known: Knowledge, drain: float) -> Floats:
        state_s, gone_s = lagged_state_s(known)
        base_s = known.base_s[:, None]
        wait_s = state_s - base_s
        wait_s = np.maximum(wait_s - drain * gone_s[:, None], np.minimum(wait_s, 0.0))
        return known.filled(base_s + wait_s)


PLAIN: dict[str, Callable[[], PointBaseline]] = {
    "last-value": LastValue,
    "ewma": Ewma,
    "ar": partial(Arma, "ar", AR_ORDERS),
    "arma": partial(Arma, "arma", ARMA_ORDERS),
    "physics": Physics,
    "state": StateFloor,
    "state-lagged": LaggedStateFloor,
}
"By name; the noise floors last."


def lagged_state_s(known: Knowledge) -> tuple[Floats, Floats]:
    """Return what the true state at the newest known packet foretold, and how long ago that was.

    (n, 2) and (n,), in seconds; NaN: none is known.
    """
    rows = [known.newest(queue, known.series[queue].index.astype(np.float64)) for queue in Queue]
    newest = np.fmax(*rows)
    row = np.where(np.isnan(newest), 0, newest).astype(np.int64)
    gone_s = np.where(np.isnan(newest), np.nan, known.now_s - known.now_s[row])
    state_s = np.where(np.isnan(newest)[:, None], np.nan, known.flow.state_s[row])
    return state_s, gone_s


def overdue_s(known: Knowledge, queue: Queue) -> Floats:
    """Return (n,): by how much the oldest packet in flight has been out too long; 0: it has not.

    Too long: longer than the base and what most reports take to come back.
    """
    out_s = known.now_s - known.oldest_sent_s[:, queue] - known.base_s - known.lag_s
    return np.maximum(np.nan_to_num(out_s, nan=0.0), 0.0)


def slopes(series: Series, span_s: float) -> Floats:
    """Return (m,): how fast the delay grew over the `span_s` before each packet, in s/s.

    By least squares; 0 where fewer than two packets were sent in that time.
    """
    if not len(series.index):
        return np.zeros(0)
    time_s = series.sent_s - series.sent_s[0]
    delay_s = series.delay_s - series.delay_s[0]
    first = np.searchsorted(time_s, time_s - span_s, side="left")
    count = np.arange(1, len(time_s) + 1) - first

    def windowed(values: Floats) -> Floats:
        sums = np.concatenate(([0.0], np.cumsum(values)))
        found: Floats = sums[1:] - sums[first]
        return found

    sum_t, sum_d = windowed(time_s), windowed(delay_s)
    scatter = windowed(time_s**2) - sum_t**2 / count
    joint = windowed(time_s * delay_s) - sum_t * sum_d / count
    fit = (count >= 2) & (scatter > 1e-9)
    return np.where(fit, joint / np.where(fit, scatter, 1.0), 0.0)


def _ewma(x: Floats, weight: float) -> Floats:
    from scipy.signal import lfilter

    if not len(x):
        return x
    found: Floats = lfilter([weight], [1.0, weight - 1.0], x, zi=np.array([(1.0 - weight) * x[0]]))[
        0
    ]
    return found


def _cost(flows: Sequence[Knowledge], points: Sequence[Floats]) -> float:
    """Return the mean error over flows in seconds, an error on a change counting for more."""
    above = below = 0.0
    for known, point_s in zip(flows, points, strict=True):
        counts = known.is_scored & known.is_own
        weights = np.where(changes(known), CHANGE_WEIGHT, 1.0)[counts]
        above += float(np.sum(weights * np.abs(known.flow.delay_s - point_s)[counts]))
        below += float(np.sum(weights))
    return above / below if below else 0.0
