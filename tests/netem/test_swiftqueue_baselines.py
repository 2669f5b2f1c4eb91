"""What the baselines of prediction say, against figures worked out by hand or by brute force."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from prediction_flows import BASE_S, REPORT_S, busy_flow, flow_of, telling_flow

from eloquent.swiftqueue.features import EVENT_FEATURES, QUERY_FEATURES
from eloquent.swiftqueue.inference import Model, tensor_shapes
from eloquent.swiftqueue.records import Flow, Queue
from eloquent.swiftqueue.shape import Shape
from eloquent_netem.lab.swiftqueue_arma import ArmaModel, fit_arma
from eloquent_netem.lab.swiftqueue_baselines import (
    PLAIN,
    Baseline,
    Ewma,
    LaggedStateFloor,
    LastValue,
    Physics,
    overdue_s,
    slopes,
)
from eloquent_netem.lab.swiftqueue_baselines_learned import Boosting
from eloquent_netem.lab.swiftqueue_knowledge import Knowledge, knowledge_of
from eloquent_netem.lab.swiftqueue_lstm import AggregatedLstm
from eloquent_netem.lab.swiftqueue_measures import OURS, Forecasts, tally
from eloquent_netem.lab.swiftqueue_prediction import ours_forecasts

NAN = float("nan")

SEEING = (
    *(name for name in PLAIN if name != "state"),
    "gradient-boosting",
    "state-lagged-learned",
    "lstm",
    OURS,
)
"All that may not see the future: the state at a packet's entry is no sender's knowledge."


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Several threads are slower here, and far slower where others run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(6))
def test_knowledge_is_what_brute_force_finds(seed: int) -> None:
    flow = busy_flow(seed, 150)
    if seed % 2:
        # Reports may come in any order, late or never.
        rng = np.random.default_rng(seed)
        late_s = flow.known_s + rng.exponential(0.3, 150)
        flow = replace(flow, known_s=np.where(rng.random(150) < 0.1, np.inf, late_s))
    known = knowledge_of(flow)
    own_s = flow.delay_s[np.arange(150), flow.queue].astype(np.float64)
    for row, now in enumerate(flow.sent_s):
        heard = [one for one in range(150) if flow.known_s[one] <= now]
        arrived = [one for one in heard if not np.isnan(own_s[one])]
        recent = [own_s[one] for one in arrived if flow.known_s[one] > now - 30]
        assert np.isnan(known.base_s[row]) if not recent else known.base_s[row] == min(recent)
        for queue in Queue:
            here = [one for one in arrived if flow.queue[one] == queue]
            newest = max(here, default=None)
            other = max((one for one in arrived if flow.queue[one] != queue), default=None)
            if newest is not None:
                assert known.last_s[row, queue] == own_s[newest]
                assert known.last_sent_s[row, queue] == flow.sent_s[newest]
                series = known.series[queue]
                assert series.index[known.position[row, queue]] == newest
            elif other is not None:
                assert known.last_s[row, queue] == own_s[other]
                assert known.position[row, queue] == -1
            settled = max((one for one in heard if flow.queue[one] == queue), default=-1)
            flying = [one for one in range(settled + 1, row) if flow.queue[one] == queue]
            assert known.in_flight[row, queue] == len(flying)
            if flying:
                assert known.oldest_sent_s[row, queue] == flow.sent_s[flying[0]]
            lately = sorted(own_s[one] for one in here if flow.known_s[one] > now - 1)
            if lately:
                assert known.recent_s[row, queue] == lately[len(lately) // 2]


def test_a_base_older_than_half_a_minute_is_forgotten() -> None:
    known = knowledge_of(flow_of([0, 1, 20, 32, 70], [0.02, 0.05, 0.06, 0.07, 0.08]))
    # At 32 s what became known at 0.05 and 1.08 s is too old; at 70 s, all is: the newest counts.
    assert known.base_s.tolist() == pytest.approx([NAN, 0.02, 0.02, 0.06, 0.07], nan_ok=True)


def test_the_last_value_is_that_of_the_same_queue_else_of_the_other() -> None:
    flow = flow_of(
        [0, 1, 2, 3],
        [[0.02, 0.9], [0.9, 0.05], [0.03, 0.9], [0.9, 0.9]],
        queue=[0, 1, 0, 1],
    )
    said = LastValue().predict(knowledge_of(flow)).point_s
    assert np.isnan(said[0]).all()
    assert said[1:] == pytest.approx(np.array([[0.02, 0.02], [0.02, 0.05], [0.03, 0.05]]))


def test_a_lost_packet_does_not_become_the_last_value() -> None:
    flow = flow_of([0, 1, 2], [0.02, NAN, 0.03])
    assert LastValue().point(knowledge_of(flow))[2, 0] == pytest.approx(0.02)


def test_an_ewma_weighs_as_it_says_and_chooses_its_weight_on_the_training_flows() -> None:
    ewma = Ewma()
    ewma.weight = 0.25
    known = knowledge_of(flow_of([0, 1, 2, 3], [0.02, 0.06, 0.10, 0.0]))
    assert ewma.point(known)[:, 0] == pytest.approx([NAN, 0.02, 0.03, 0.0475], nan_ok=True)
    rng = np.random.default_rng(1)
    noise = knowledge_of(flow_of(np.arange(500.0), 0.05 + 0.004 * rng.random(500)))
    walk = knowledge_of(flow_of(np.arange(500.0), 5 + np.cumsum(rng.normal(0, 0.004, 500))))
    ewma.tune([noise], [])
    assert ewma.weight <= 0.1
    ewma.tune([walk], [])
    assert ewma.weight >= 0.8


def test_an_ar_model_is_found_again_from_what_it_made() -> None:
    rng = np.random.default_rng(2)
    x = np.zeros(20_000)
    for k in range(2, len(x)):
        x[k] = 0.004 + 1.2 * x[k - 1] - 0.4 * x[k - 2] + rng.normal(0, 0.002)
    model = fit_arma([x[:12_000], x[12_000:]], 2, 0)
    # One and two steps after the third value, by the recursion itself.
    first = 0.004 + 1.2 * x[2] - 0.4 * x[1]
    second = 0.004 + 1.2 * first - 0.4 * x[2]
    said = model.ahead(x[:3], np.array([2, 2, -1]), np.array([1, 2, 1]))
    assert said == pytest.approx([first, second, NAN], rel=0.03, nan_ok=True)


def test_a_moving_average_is_found_again_and_its_innovations_too() -> None:
    rng = np.random.default_rng(3)
    e = rng.normal(0, 0.002, 40_000)
    x = np.zeros(len(e))
    for k in range(1, len(x)):
        x[k] = 0.002 + 0.8 * x[k - 1] + e[k] + 0.5 * e[k - 1]
    model = fit_arma([x], 1, 1)
    assert model.innovations(x)[100:] == pytest.approx(e[100:], abs=2e-4)
    said = model.ahead(x, np.array([999]), np.array([1]))
    assert said[0] == pytest.approx(0.002 + 0.8 * x[999] + 0.5 * e[999], abs=2e-4)


def test_a_model_that_would_grow_without_bound_is_shrunk() -> None:
    grows = fit_arma([1.05 ** np.arange(100.0)], 1, 0)
    far = grows.ahead(np.array([1.0]), np.array([0]), np.array([128]))
    assert 0 <= far[0] < 100
    assert ArmaModel.white().ahead(np.array([3.0]), np.array([0]), np.array([5])) == [0.0]


def test_slopes_are_those_of_least_squares() -> None:
    rng = np.random.default_rng(4)
    series = knowledge_of(busy_flow(4)).series[Queue.L]
    found = slopes(series, 0.25)
    for place in rng.integers(0, len(found), 50):
        window = (series.sent_s >= series.sent_s[place] - 0.25) & (np.arange(len(found)) <= place)
        if window.sum() < 2:
            assert found[place] == 0
            continue
        fit = np.polyfit(series.sent_s[window], series.delay_s[window], 1)
        assert found[place] == pytest.approx(fit[0], rel=1e-4, abs=1e-6)


def test_physics_follows_a_queue_that_fills_as_long_as_it_is_told_to() -> None:
    sent_s = np.arange(0, 1, 0.01)
    known = knowledge_of(flow_of(sent_s, BASE_S + 0.2 * sent_s))
    physics = Physics()
    physics.constants |= {"rise_s": 1e6, "back_s": 1e12, "share": 0.0}
    said = physics.point(known)[40:, 0]
    assert said == pytest.approx(BASE_S + 0.2 * sent_s[40:], abs=1e-5)


def test_physics_lets_a_wait_drain_no_faster_than_time_passes() -> None:
    # The newest known packet waited for 50 ms; 20 ms later 30 are left, whatever the mean is.
    sent_s, delay_s = [0, 1.0, 1.01, 1.02, 1.04], [0.02, 0.09, 0.08, 0.07, 0.5]
    flow = flow_of(sent_s, delay_s, known_s=[0.1, 1.03, 1.03, 1.03, 9])
    physics = Physics()
    physics.constants |= {"fall_s": 1e-9, "back_s": 1e-9, "share": 0.0}
    assert physics.point(knowledge_of(flow))[4, Queue.L] == pytest.approx(0.05)


def test_a_packet_that_is_out_for_too_long_tells_of_a_queue() -> None:
    # Known by 0.5 s: base 20 ms, reports 30 ms. What left at 1 s should be known at 1.05 s.
    sent_s = [0, 0.1, 0.2, 1.0, 1.04, 1.2]
    flow = flow_of(sent_s, [0.02, 0.02, 0.02, 0.3, 0.3, 0.3])
    known = knowledge_of(flow)
    assert overdue_s(known, Queue.L) == pytest.approx([0, 0, 0, 0, 0, 0.15])
    physics = Physics()
    physics.constants |= {"share": 1.0}
    said = physics.point(known)[:, 0]
    assert said[4] == pytest.approx(BASE_S)
    assert said[5] == pytest.approx(BASE_S + 0.15)
    assert known.lag_s[5] == pytest.approx(REPORT_S)


def test_the_lagged_floor_drains_the_state_of_the_newest_known_packet() -> None:
    state_s = [[0.02, 0.02], [0.07, 0.04], [0.9, 0.9]]
    flow = flow_of([0, 1, 1.1], [0.02, 0.07, 0.9], known_s=[0.05, 1.09, 9], state_s=state_s)
    floor = LaggedStateFloor()
    floor.drain = 0.5
    # 50 and 20 ms waited at 1 s; 0.1 s later 50 ms of work are done.
    assert floor.point(knowledge_of(flow))[2] == pytest.approx([0.02, 0.02], abs=1e-6)
    floor.drain = 0.1
    assert floor.point(knowledge_of(flow))[2] == pytest.approx([0.06, 0.03], abs=1e-6)


@pytest.fixture(scope="module")
def fitted() -> dict[str, Baseline]:
    train = [knowledge_of(busy_flow(seed)) for seed in range(100, 104)]
    validation = [knowledge_of(busy_flow(seed)) for seed in range(200, 202)]
    models: dict[str, Baseline] = {name: make() for name, make in PLAIN.items()}
    models["gradient-boosting"] = Boosting(1, most_trees=20)
    models["state-lagged-learned"] = Boosting(1, most_trees=20, state="lagged")
    models["lstm"] = AggregatedLstm(1, steps=10)
    for model in models.values():
        model.fit(train, validation)
    return models


def _says(name: str, fitted: dict[str, Baseline], known: Knowledge) -> np.ndarray:
    if name == OURS:
        forecasts = ours_forecasts(_untrained(), [known])[0][0]
    else:
        forecasts = fitted[name].predict(known)
    return np.concatenate((forecasts.point_s, forecasts.upper_s), axis=1)


def _untrained() -> Model:
    rng = np.random.default_rng(5)
    shape = Shape(event_features=EVENT_FEATURES, query_features=QUERY_FEATURES)
    return Model(
        shape,
        {
            name: rng.normal(0, 0.2, size).astype(np.float32)
            for name, size in tensor_shapes(shape).items()
        },
    )


def _with_another_future(flow: Flow, now: float, rng: np.random.Generator) -> Flow:
    """Change all that nobody can know at `now`."""
    is_open = flow.known_s > now
    delay_s = flow.delay_s.copy()
    delay_s[is_open] = rng.uniform(0.02, 3.0, (int(is_open.sum()), 2))
    known_s = np.where(is_open, now + rng.uniform(1e-6, 3.0, len(is_open)), flow.known_s)
    state_s = flow.state_s.copy()
    state_s[is_open] *= 3
    later = flow.sent_s > now
    queue = np.where(later, 1 - flow.queue, flow.queue).astype(np.int8)
    size = np.where(later, 77, flow.size).astype(np.int32)
    sent_s = np.where(later, now + 2 * (flow.sent_s - now), flow.sent_s)
    known_s = np.maximum(known_s, np.where(is_open, sent_s + 1e-6, 0.0))
    return replace(
        flow,
        delay_s=delay_s,
        known_s=known_s,
        state_s=state_s,
        queue=queue,
        size=size,
        sent_s=sent_s,
    )


@pytest.mark.parametrize("name", SEEING)
def test_nothing_sees_the_future(name: str, fitted: dict[str, Baseline]) -> None:
    for seed in range(3):
        flow = busy_flow(seed, 200)
        rng = np.random.default_rng(seed)
        now = flow.sent_s[rng.integers(60, 190)]
        before = _says(name, fitted, knowledge_of(flow))
        after = _says(name, fitted, knowledge_of(_with_another_future(flow, now, rng)))
        past = flow.sent_s <= now
        np.testing.assert_allclose(before[past], after[past], rtol=1e-5, atol=1e-6)
        assert not np.allclose(before[~past], after[~past], equal_nan=True)


def test_nothing_sees_a_queue_that_it_was_not_in(fitted: dict[str, Baseline]) -> None:
    """What a packet would have met in the other queue is for judging alone."""
    flow = busy_flow(7)
    other_s = flow.delay_s.copy()
    other_s[np.arange(len(other_s)), 1 - flow.queue] += 1.0
    for name in SEEING:
        before = _says(name, fitted, knowledge_of(flow))
        after = _says(name, fitted, knowledge_of(replace(flow, delay_s=other_s)))
        np.testing.assert_array_equal(before, after)


def test_a_clock_that_is_set_otherwise_changes_only_the_clock(fitted: dict[str, Baseline]) -> None:
    flow = busy_flow(8)
    ahead = replace(
        flow, delay_s=flow.delay_s + np.float32(4), state_s=flow.state_s + np.float32(4)
    )
    for name in ("state", *SEEING):
        before = _says(name, fitted, knowledge_of(flow))
        after = _says(name, fitted, knowledge_of(ahead)) - 4
        # Delays are stored as 32-bit numbers.
        wrong = np.abs(before - after)[np.isfinite(before)]
        assert np.quantile(wrong, 0.9) < 2e-5, name
        assert tally(knowledge_of(flow), _forecasts_of(before))["mae_change_ms"][
            1
        ] == pytest.approx(
            tally(knowledge_of(ahead), _forecasts_of(after + 4))["mae_change_ms"][1], rel=0.01
        )


def _forecasts_of(said: np.ndarray) -> Forecasts:
    return Forecasts(said[:, :2], said[:, 2:])


def test_quantiles_of_points_cover_the_training_flows(fitted: dict[str, Baseline]) -> None:
    for name in ("last-value", "ewma", "ar", "arma", "physics"):
        covered = counted = 0.0
        for seed in range(100, 104):
            known = knowledge_of(busy_flow(seed))
            one = tally(known, fitted[name].predict(known))["coverage_99"]
            covered, counted = covered + one[0], counted + one[1]
        assert covered / counted == pytest.approx(0.99, abs=0.004), name


@pytest.mark.parametrize("model", [Boosting(1), AggregatedLstm(1, steps=200, batch=64)])
def test_a_learned_baseline_learns(model: Baseline) -> None:
    train = [knowledge_of(telling_flow(seed)) for seed in range(4)]
    validation = [knowledge_of(telling_flow(10))]
    judged = knowledge_of(telling_flow(20))
    model.fit(train, validation)
    above, below = tally(judged, model.predict(judged))["mae_change_ms"]
    last_above, last_below = tally(judged, LastValue().predict(judged))["mae_change_ms"]
    assert above / below < 0.6 * last_above / last_below


def test_our_model_says_the_same_of_flows_side_by_side_as_of_each_alone() -> None:
    flows = [knowledge_of(busy_flow(seed, 50 + 40 * seed)) for seed in range(5)]
    model = _untrained()
    together = ours_forecasts(model, flows)
    for place, one in enumerate(flows):
        alone = ours_forecasts(model, [one])
        for kind in (0, 1):
            np.testing.assert_allclose(
                together[kind][place].point_s, alone[kind][0].point_s, rtol=1e-4, atol=1e-6
            )
    assert np.isfinite(together[0][0].point_s[flows[0].is_scored]).all()
