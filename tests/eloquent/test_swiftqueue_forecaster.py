"""Forecasts of all connections are made at once in `settle`, and only read off in between."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eloquent.swiftqueue.features import EVENT_FEATURES, QUERY_FEATURES, History
from eloquent.swiftqueue.forecaster import (
    MAX_WAITING,
    SILENCES_S,
    USUAL_BYTES,
    Forecaster,
    Outlook,
)
from eloquent.swiftqueue.inference import Head, Predictor
from eloquent.swiftqueue.records import Observation, Queue
from eloquent.swiftqueue.shape import Shape
from eloquent.swiftqueue.stored import Model, tensor_shapes

SHAPE = Shape(
    event_features=EVENT_FEATURES,
    query_features=QUERY_FEATURES,
    width=8,
    heads=2,
    feed=6,
    hidden=7,
    middle=5,
    window=40,
)


def make_model() -> Model:
    rng = np.random.default_rng(1)
    tensors = {
        name: rng.normal(0, 0.7, size).astype(np.float32)
        for name, size in tensor_shapes(SHAPE).items()
    }
    return Model(SHAPE, tensors)


MODEL = make_model()


def observations(seed: int, count: int) -> Iterator[Observation]:
    """A flow's packets, a few milliseconds apart, some of them lost."""
    rng = np.random.default_rng(seed)
    sent_s = rng.uniform(0, 1e5)
    for number in range(count):
        sent_s += rng.exponential(0.01)
        delay_s = 0.03 + rng.exponential(0.01) if rng.random() < 0.95 else math.nan
        queue = Queue(int(rng.integers(2)))
        yield Observation(number, sent_s, 300 + number, queue, delay_s, sent_s + 0.2)


def tell(outlook: Outlook, seen: Observation) -> None:
    outlook.on_sent(seen.number, seen.sent_s, seen.size, seen.queue)
    outlook.on_observation(seen)


def alone(seen: list[Observation], now: float) -> NDArray[np.float32]:
    """What a connection of its own, told everything one by one, hears: (7, 2, 5)."""
    predictor = Predictor(MODEL)
    slot, history, size = predictor.open(), History(), USUAL_BYTES
    for one in seen:
        size = one.size
        history.on_sent(one.number, one.sent_s, one.size, one.queue)
        predictor.push([slot], [history.on_observation(one)], [one.sent_s])
    queries = [history.query(now, size, silence_s) for silence_s in SILENCES_S]
    delay_s, point_s, drop = predictor.forecast([slot], [queries])
    return np.concatenate((delay_s[0], point_s[0, ..., None], drop[0, ..., None]), axis=-1)


def heard(outlook: Outlook, now: float, silence_s: float) -> NDArray[np.float32]:
    forecast = outlook.forecast(now + silence_s)
    assert forecast is not None
    assert forecast.made_s == now
    parts = (forecast.delay_s, forecast.point_s[:, None], forecast.drop[:, None])
    return np.concatenate(parts, axis=-1)


def test_nothing_is_foretold_before_the_first_news_has_settled() -> None:
    forecaster = Forecaster(Predictor(MODEL))
    outlook = forecaster.open()
    forecaster.settle(1.0)
    assert outlook.forecast(1.0) is None
    tell(outlook, next(observations(1, 1)))
    assert outlook.forecast(1.0) is None
    forecaster.settle(2.0)
    assert outlook.forecast(2.0) is not None


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=8))
def test_connections_settled_together_hear_what_each_would_alone(counts: list[list[int]]) -> None:
    """Row by row: how many packets of each of three connections are learnt of before a settle."""
    forecaster = Forecaster(Predictor(MODEL))
    outlooks = [forecaster.open() for _ in range(3)]
    flows = [observations(seed, 100) for seed in range(3)]
    told: list[list[Observation]] = [[], [], []]
    now = 2e5
    for row in counts:
        now += 0.1
        for outlook, flow, seen, count in zip(outlooks, flows, told, row, strict=True):
            for one in (next(flow) for _ in range(count)):
                seen.append(one)
                tell(outlook, one)
        forecaster.settle(now)
        for outlook, seen, count in zip(outlooks, told, row, strict=True):
            if not count:
                continue
            wants = alone(seen, now)
            for index, silence_s in enumerate(SILENCES_S):
                assert heard(outlook, now, silence_s) == pytest.approx(wants[index], abs=1e-4)


def test_in_silence_the_nearest_of_the_forecasts_counts() -> None:
    forecaster = Forecaster(Predictor(MODEL))
    outlook = forecaster.open()
    seen = list(observations(2, 30))
    for one in seen:
        tell(outlook, one)
    now = seen[-1].known_s
    forecaster.settle(now)
    wants = alone(seen, now)
    assert len({tuple(row.ravel()) for row in wants}) == len(SILENCES_S)
    nearest = {-1.0: 0, 0.0: 0, 0.004: 0, 0.006: 1, 0.014: 1, 0.016: 2, 0.034: 2, 0.036: 3}
    nearest |= {0.074: 3, 0.076: 4, 0.14: 4, 0.16: 5, 0.34: 5, 0.36: 6, 0.5: 6, 1e9: 6}
    for silence_s, index in nearest.items():
        assert heard(outlook, now, silence_s) == pytest.approx(wants[index], abs=1e-4)


def test_a_settle_without_news_leaves_what_was_foretold() -> None:
    forecaster = Forecaster(Predictor(MODEL))
    quiet, busy = forecaster.open(), forecaster.open()
    flow = observations(3, 3)
    tell(quiet, next(flow))
    forecaster.settle(1.0)
    tell(busy, next(flow))
    forecaster.settle(2.0)
    for outlook, made_s in ((quiet, 1.0), (busy, 2.0)):
        forecast = outlook.forecast(2.0)
        assert forecast is not None
        assert forecast.made_s == made_s


@pytest.mark.parametrize("more", [0, 1, 40])
def test_of_too_many_events_the_newest_are_all_that_counts(more: int) -> None:
    """The model is as if only those had ever been; what `History` knows is not forgotten."""
    forecaster, fresh = Forecaster(Predictor(MODEL)), Forecaster(Predictor(MODEL))
    outlook, newest_only = forecaster.open(), fresh.open()
    seen = list(observations(4, 20 + more + MAX_WAITING))
    now = seen[-1].known_s
    for count, one in enumerate(seen):
        if count == 20:
            forecaster.settle(now)
        tell(outlook, one)
        if count < 20 + more:
            newest_only.history.on_sent(one.number, one.sent_s, one.size, one.queue)
            newest_only.history.on_observation(one)
        else:
            tell(newest_only, one)
    forecaster.settle(now)
    fresh.settle(now)
    wants = heard(newest_only, now, 0.0)
    is_same = heard(outlook, now, 0.0) == pytest.approx(wants, abs=1e-6)
    assert is_same is (more > 0)
    tell_both = next(observations(5, 1))
    for each, its_forecaster in ((outlook, forecaster), (newest_only, fresh)):
        tell(each, tell_both)
        its_forecaster.settle(now)
    wants = heard(newest_only, now, 0.0)
    assert (heard(outlook, now, 0.0) == pytest.approx(wants, abs=1e-6)) is (more > 0)


def test_a_closed_connection_hears_nothing_and_its_slot_is_used_again() -> None:
    forecaster = Forecaster(Predictor(MODEL))
    outlook, other = forecaster.open(), forecaster.open()
    seen = list(observations(5, 4))
    for one in seen[:2]:
        tell(outlook, one)
    forecaster.settle(1.0)
    tell(outlook, seen[2])
    tell(other, seen[2])
    outlook.close()
    outlook.close()
    tell(outlook, seen[3])
    forecaster.settle(2.0)
    assert outlook.forecast(2.0) is None
    assert other.forecast(2.0) is not None
    again = forecaster.open()
    assert again.slot == outlook.slot
    for one in seen:
        tell(again, one)
    forecaster.settle(3.0)
    assert heard(again, 3.0, 0.0) == pytest.approx(alone(seen, 3.0)[0], abs=1e-4)


def test_a_silent_connection_does_not_keep_what_the_others_were_told() -> None:
    forecaster = Forecaster(Predictor(MODEL))
    outlooks = [forecaster.open() for _ in range(50)]
    for outlook in outlooks:
        tell(outlook, next(observations(8, 1)))
    forecaster.settle(1.0)
    found = outlooks[0].found
    assert found is not None
    assert all(each.base is None for each in (found.delay_s, found.point_s, found.drop))


class Spoilt(Head):
    """Answers the third silence of the first connection with one that is no number."""

    where: tuple[int, int, int, int]

    def __call__(
        self, summaries: NDArray[np.float32], queries: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        found = super().__call__(summaries, queries)
        found[self.where] = np.nan
        return found


@pytest.mark.parametrize("kind", [2, 3, 4])
@pytest.mark.parametrize("queue", list(Queue))
def test_a_forecast_that_is_not_finite_is_none(kind: int, queue: Queue) -> None:
    predictor = Predictor(MODEL)
    predictor.head = Spoilt(MODEL)
    predictor.head.where = (kind, queue, 0, 2)
    forecaster = Forecaster(predictor)
    outlooks = [forecaster.open(), forecaster.open()]
    for outlook in outlooks:
        tell(outlook, next(observations(6, 1)))
    forecaster.settle(1.0)
    assert outlooks[0].forecast(1.02) is None
    assert outlooks[0].forecast(1.0) is not None
    assert outlooks[1].forecast(1.02) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -1e300])
@pytest.mark.parametrize("field", ["sent_s", "delay_s", "known_s"])
def test_absurd_times_reach_no_other_connection_and_pass_at_once(field: str, value: float) -> None:
    forecaster = Forecaster(Predictor(MODEL))
    outlook, other = forecaster.open(), forecaster.open()
    seen = list(observations(7, 10))
    absurd: dict[str, Any] = {field: value}
    tell(outlook, seen[0]._replace(**absurd))
    tell(other, seen[0])
    forecaster.settle(1.0)
    assert heard(other, 1.0, 0.0) == pytest.approx(alone(seen[:1], 1.0)[0], abs=1e-4)
    for one in seen[1:]:
        tell(outlook, one)
        forecaster.settle(one.known_s)
        assert np.isfinite(heard(outlook, one.known_s, 0.0)).all()
