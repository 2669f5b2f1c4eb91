"""Gradient boosting on engineered features, with all that our model is told of a packet.

It learns from the same families, by `History.query` as our model is asked, and an error on a
change weighs as much for it. Needs scikit-learn.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eloquent.swiftqueue.records import Queue
from eloquent_netem.lab.swiftqueue_baselines import (
    CHANGE_WEIGHT,
    Baseline,
    Physics,
    lagged_state_s,
    overdue_s,
    slopes,
)
from eloquent_netem.lab.swiftqueue_knowledge import Floats, Knowledge
from eloquent_netem.lab.swiftqueue_measures import UPPER_LEVEL, Forecasts, changes

LAGS = 12
OTHER_LAGS = 4
SLOPE_SPANS_S = (0.05, 0.2, 1.0)

MOST_ROWS = 250_000
"A forest grows from no more questions than this, drawn at random."


class Boosting(Baseline):
    """Gradient-boosted trees on `History.query`, lags, slopes and the fluid queue's forecast.

    One forest says the point, by absolute error, and one the 0.99 quantile, both as a difference
    from the last delay known. They grow until the validation families gain no more.

    `state` gives them the router's true state too, when the packet enters (`"entry"`) or when the
    newest known one did (`"lagged"`): a noise floor that has learnt what mostly comes of a state.
    """

    name = "gradient-boosting"

    def __init__(
        self,
        seed: int,
        *,
        most_trees: int = 500,
        state: Literal["none", "lagged", "entry"] = "none",
    ) -> None:
        self._seed = seed
        self._state = state
        self._most_trees = most_trees
        self._physics = Physics()
        self._point: Any = None
        self._upper: Any = None

    def fit(self, train: Sequence[Knowledge], validation: Sequence[Knowledge]) -> None:
        """See `Baseline.fit`."""
        self._physics.tune(train, validation)
        rng = np.random.default_rng(self._seed)
        x, y, weights = self._questions(train, rng)
        x_val, y_val, weights_val = self._questions(validation or train, rng)
        self._point = self._forest(loss="absolute_error")
        # A quantile by weighted questions would be another quantile.
        self._upper = self._forest(loss="quantile", quantile=UPPER_LEVEL)
        with _one_thread():
            self._point.fit(x, y, weights, X_val=x_val, y_val=y_val, sample_weight_val=weights_val)
            self._upper.fit(x, y, X_val=x_val, y_val=y_val)

    def predict(self, known: Knowledge) -> Forecasts:
        """See `Baseline.predict`."""
        physics_s = self._physics.point(known)
        point_s, upper_s = known.last_s.copy(), known.last_s.copy()
        for queue in Queue:
            x = self._features(known, queue, physics_s)
            with _one_thread():
                point_s[:, queue] += self._point.predict(x)
                upper_s[:, queue] += self._upper.predict(x)
        return Forecasts(np.maximum(point_s, known.base_s[:, None]), np.maximum(point_s, upper_s))

    def _features(self, known: Knowledge, queue: Queue, physics_s: Floats) -> NDArray[np.float32]:
        found = features(known, queue, physics_s)
        if self._state == "none":
            return found
        state_s: NDArray[np.floating[Any]] = known.flow.state_s
        gone_s = np.zeros(len(found))
        if self._state == "lagged":
            state_s, gone_s = lagged_state_s(known)
        told = (
            state_s[:, queue] - known.base_s,
            state_s[:, 1 - queue] - known.base_s,
            state_s[:, queue] - known.last_s[:, queue],
            gone_s,
        )
        return np.concatenate((found, np.stack(told, axis=1).astype(np.float32)), axis=1)

    def _forest(self, **settings: Any) -> Any:
        from sklearn.ensemble import HistGradientBoostingRegressor

        return HistGradientBoostingRegressor(
            learning_rate=0.08,
            max_iter=self._most_trees,
            min_samples_leaf=40,
            early_stopping=True,
            n_iter_no_change=25,
            random_state=self._seed,
            **settings,
        )

    def _questions(
        self, flows: Sequence[Knowledge], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], Floats, Floats]:
        """Return features, answers and weights: of both queues, where it is known."""
        count = sum(int(known.is_scored.sum()) for known in flows)
        share = min(1.0, MOST_ROWS / max(count, 1))
        parts = []
        for known in flows:
            physics_s = self._physics.point(known)
            weights = np.where(changes(known), CHANGE_WEIGHT, 1.0)
            for queue in Queue:
                kept = known.is_scored[:, queue] & (rng.random(len(known.now_s)) < share)
                over_s = known.flow.delay_s[:, queue] - known.last_s[:, queue]
                x = self._features(known, queue, physics_s)
                parts.append((x[kept], over_s[kept], weights[kept, queue]))
        x, y, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        return x, y, weights


def _one_thread() -> AbstractContextManager[object]:
    """Keep forests to one thread: on a busy machine several take many times as long, spinning."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(1, user_api="openmp")
    return limits


def features(known: Knowledge, queue: Queue, physics_s: Floats) -> NDArray[np.float32]:
    """Return (n, features) about one queue: what our model is told, and more, in seconds.

    Unknown is NaN. `physics_s` is what `Physics` says, (n, 2).
    """
    now_s, base_s = known.now_s, known.base_s
    columns: list[NDArray[Any]] = [
        np.full(len(now_s), float(queue)),
        known.is_own[:, queue],
        known.last_s[:, queue] - base_s,
        physics_s[:, queue] - known.last_s[:, queue],
        physics_s[:, 1 - queue] - base_s,
        known.lag_s,
    ]
    for which, lags in ((queue, LAGS), (Queue(1 - queue), OTHER_LAGS)):
        series, position = known.series[which], known.position[:, which]
        columns += [
            known.recent_s[:, which] - base_s,
            overdue_s(known, which),
            known.in_flight[:, which],
            *(known.newest(which, slopes(series, span_s)) for span_s in SLOPE_SPANS_S),
        ]
        for lag in range(lags):
            there = position >= lag
            at = np.maximum(position - lag, 0)
            for values, since in ((series.delay_s, base_s), (series.sent_s, now_s)):
                found = values[at] - since if len(values) else np.full(len(now_s), np.nan)
                columns.append(np.where(there, found, np.nan))
    return np.concatenate(
        (known.replayed.queries, np.stack(columns, axis=1).astype(np.float32)), axis=1
    )
