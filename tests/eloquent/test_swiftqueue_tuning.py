"""A connection's forecasts are corrected by what became of its packets, within bounds."""

import math
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eloquent.quic.marking import SentPacket
from eloquent.swiftqueue.forecaster import Forecaster, Outlook
from eloquent.swiftqueue.inference import Predictor
from eloquent.swiftqueue.policy import State, SwiftQueueMarking
from eloquent.swiftqueue.records import Observation, Queue
from eloquent.swiftqueue.serving import make
from eloquent.swiftqueue.shape import DELAY_UNIT_S, LEVELS
from eloquent.swiftqueue.tuning import (
    BETTER,
    BURST,
    KNOTS_S,
    LEAST_SEEN,
    MAX_WAITING,
    MEMORY,
    MOST,
    MOST_WEIGHT,
    RATE,
    WORSE,
    Curves,
    Tuning,
    TuningBudget,
    corrected,
)
from tests.eloquent.swiftqueue_line import CLOCK_AHEAD_S, Line
from tests.eloquent.test_swiftqueue_forecaster import MODEL, SHAPE
from tests.eloquent.test_swiftqueue_inference import random_model, write

GAP_S = 0.02
PLENTY = 1.0
"A share of the time that is enough for every packet."
Z = (0.0, 1.2816, 2.3263)
"Quantiles of the normal distribution at LEVELS."


def quantiles_s(middle_s: float, spread: float = 0.3) -> NDArray[np.float32]:
    """Quantiles of a delay whose logarithm is normal."""
    return np.array([middle_s * math.exp(spread * z) for z in Z], np.float32)


class Run:
    """One connection, a packet every `GAP_S` into L, each known before the next.

    Or, if late, all known after the last one.
    """

    def __init__(self, seed: int = 1, share: float = PLENTY) -> None:
        self.rng = np.random.default_rng(seed)
        self.tuning = Tuning(TuningBudget(share))
        self.told: list[NDArray[np.float32]] = []
        self.true_s: list[float] = []
        self._numbers = count()

    def go(
        self, packets: int, foretold_s: float, truly_s: float, *, is_late: bool = False
    ) -> "Run":
        unheard = []
        for number in (next(self._numbers) for _ in range(packets)):
            frozen = quantiles_s(foretold_s)
            curves = self.tuning.curves()
            self.told.append(corrected(frozen * np.ones((1, 1, 2, 1), np.float32), [curves])[0, 0])
            delay_s = truly_s * math.exp(0.3 * self.rng.normal())
            self.true_s.append(delay_s)
            now = number * GAP_S
            self.tuning.on_sent(number, now, Queue.L, 5.0, frozen)
            unheard.append(Observation(number, now, 300, Queue.L, 5.0 + delay_s, now + 0.01))
            if not is_late or len(unheard) == packets:
                for seen in unheard:
                    self.tuning.on_observation(seen)
                unheard.clear()
        return self

    def below(self, last: int) -> list[float]:
        """The share of the last packets' delays that are not above each quantile."""
        told = np.array(self.told[-last:])[:, Queue.L]
        return list(np.mean(np.array(self.true_s[-last:])[:, None] <= told, axis=0))


@pytest.mark.parametrize("truly_s", [0.012, 0.018, 0.06])
def test_quantiles_that_are_off_come_to_hold_what_they_say(truly_s: float) -> None:
    run = Run().go(2500, 0.03, truly_s)
    for level, share in zip(LEVELS, run.below(1000), strict=True):
        assert share == pytest.approx(level, abs=0.04)
    frozen, tuned = run.tuning.losses[Queue.L]
    assert tuned < 0.7 * frozen
    assert run.tuning.resets == 0


def test_the_other_queue_is_left_as_it_was() -> None:
    run = Run().go(1000, 0.03, 0.01)
    curves = run.tuning.curves()
    assert curves is not None
    assert set(curves[Queue.C]) == {(0.0,) * len(KNOTS_S)}
    assert run.told[-1][Queue.C] == pytest.approx(quantiles_s(0.03), rel=1e-5)
    assert run.tuning.losses[Queue.C][0] != run.tuning.losses[Queue.C][0]  # NaN: none


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_that_hold_are_not_made_worse(seed: int) -> None:
    run = Run(seed).go(3000, 0.02, 0.02)
    frozen_s, true_s = quantiles_s(0.02), np.array(run.true_s)[:, None]

    def loss(told_s: NDArray[np.float32]) -> float:
        error = true_s - told_s
        levels = np.array(LEVELS)
        return float(np.maximum(levels * error, (levels - 1) * error).mean())

    assert loss(np.array(run.told)[:, Queue.L]) < 1.02 * loss(frozen_s)


def test_a_few_packets_change_no_forecast() -> None:
    run = Run().go(LEAST_SEEN - 1, 0.03, 0.003)
    assert run.tuning.curves() is None
    assert run.tuning.steps == LEAST_SEEN - 1


def test_what_is_no_longer_true_is_given_up() -> None:
    run = Run().go(1500, 0.03, 0.1)
    assert run.tuning.curves() is not None
    run.go(3500, 0.03, 0.03)
    frozen, tuned = run.tuning.losses[Queue.L]
    assert run.tuning.curves() is None or tuned < frozen
    told = np.array(run.told[-200:])[:, Queue.L]
    assert np.abs(np.log(told / quantiles_s(0.03))).max() < 0.2


def test_a_correction_that_always_comes_too_late_is_reset_and_must_prove_itself_again() -> None:
    run = Run()
    while not run.tuning.resets:
        assert len(run.told) < 3000
        run.go(300, 0.03, (0.045, 0.02)[len(run.told) // 300 % 2], is_late=True)
    assert run.tuning.curves() is None
    frozen = quantiles_s(0.03)
    run.go(1, 0.03, 0.03)
    assert run.told[-1][Queue.L] == pytest.approx(frozen, rel=1e-5)
    assert run.tuning.curves() is None


def test_a_correction_that_is_a_little_worse_is_kept_but_not_used() -> None:
    queue = Run().go(1, 0.03, 0.03).tuning._queues[Queue.L]
    curves = queue.curves

    def judge(tuned_loss: float) -> tuple[bool, int]:
        for _ in range(3 * MEMORY):
            queue._judge(1.0, tuned_loss)
        return queue.is_used, queue.resets

    assert judge((1 + BETTER) / 2) == (False, 0)
    assert judge(BETTER - 0.05) == (True, 0)
    assert judge((1 + BETTER) / 2) == (True, 0)
    assert judge((1 + WORSE) / 2) == (False, 0)
    assert queue.curves is curves
    assert judge(WORSE + 0.05)[1] > 0
    assert queue.curves is not curves


@settings(max_examples=50, deadline=None)
@given(
    delays_s=st.lists(st.floats(), min_size=1, max_size=150),
    foretold_s=st.floats(0, 20, width=32),
)
def test_lies_move_a_forecast_a_little_each_and_no_further_than_the_trust_region(
    delays_s: list[float], foretold_s: float
) -> None:
    tuning = Tuning(TuningBudget(PLENTY))
    queue = tuning._queues[Queue.C]
    frozen = np.full(3, foretold_s, np.float32)
    for number, delay_s in enumerate(delays_s):
        before = np.array(queue.curves)
        tuning.on_sent(number, number * GAP_S, Queue.C, 0.0, frozen)
        tuning.on_observation(Observation(number, number * GAP_S, 1, Queue.C, delay_s, 0.0))
        after = np.array(queue.curves)
        assert np.abs(after).max() <= MOST
        assert not after.any() or np.abs(after - before).max() <= RATE * MOST_WEIGHT


def test_the_worst_lie_reaches_the_bound_and_stays_there() -> None:
    run = Run().go(3000, 0.03, 9.0)
    curves = run.tuning.curves()
    assert curves is not None
    assert np.max(curves) == MOST
    raised = (run.told[-1][Queue.L] + DELAY_UNIT_S) / (quantiles_s(0.03) + DELAY_UNIT_S)
    assert raised.max() <= math.e * 1.0001


def test_a_lost_packet_and_one_that_nothing_was_foretold_of_teach_nothing() -> None:
    tuning = Tuning(TuningBudget(PLENTY))
    tuning.on_sent(1, 0.0, Queue.L, 0.0, quantiles_s(0.01))
    tuning.on_observation(Observation(1, 0.0, 1, Queue.L, math.nan, 0.1))
    tuning.on_observation(Observation(1, 0.0, 1, Queue.L, 0.05, 0.2))
    tuning.on_observation(Observation(2, 0.0, 1, Queue.L, 0.05, 0.2))
    tuning.on_sent(3, 0.3, Queue.L, math.nan, quantiles_s(0.01))
    tuning.on_observation(Observation(3, 0.3, 1, Queue.L, 0.05, 0.4))
    tuning.on_sent(4, 0.3, Queue.L, 0.0, np.full(3, np.nan, np.float32))
    tuning.on_observation(Observation(4, 0.3, 1, Queue.L, 0.05, 0.4))
    assert tuning.steps == 0


def test_packets_without_an_end_are_forgotten() -> None:
    tuning = Tuning(TuningBudget(PLENTY))
    for number in range(2 * MAX_WAITING):
        tuning.on_sent(number, number * GAP_S, Queue.L, 0.0, quantiles_s(0.01))
    assert len(tuning._waiting) == MAX_WAITING


# The budget.


def learnt(budget: TuningBudget, connections: int, seconds: float) -> list[Tuning]:
    """Let so many connections send a packet every millisecond, each known at once."""
    tunings = [Tuning(budget) for _ in range(connections)]
    for number in range(round(seconds * 1000)):
        now = number / 1000
        for tuning in tunings:
            tuning.on_sent(number, now, Queue.L, 0.0, quantiles_s(0.01))
            tuning.on_observation(Observation(number, now, 1, Queue.L, 0.01, now))
    return tunings


@pytest.mark.parametrize("connections", [1, 2, 8])
def test_no_more_is_learnt_than_there_is_time_for_and_all_have_the_same_share(
    connections: int,
) -> None:
    budget = TuningBudget(share=0.001, step_s=1e-5)  # 100 steps a second
    tunings = learnt(budget, connections, 10.0)
    for tuning in tunings:
        assert tuning.steps == pytest.approx(BURST + 1000 / connections, abs=2)
        assert tuning.steps + tuning.skipped == 10_000
    for tuning in tunings[1:]:
        tuning.close()
    assert budget.steps_per_s == pytest.approx(100)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="none to learn in"):
        TuningBudget(0.0)


# Corrections of many connections at once.

a_curve = st.tuples(*[st.floats(-MOST, MOST)] * len(KNOTS_S))
some_curves = st.tuples(*[st.tuples(*[a_curve] * len(LEVELS))] * len(Queue))


@settings(max_examples=50, deadline=None)
@given(curves=st.lists(st.none() | some_curves, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_corrections_are_read_as_they_are_learnt_and_never_cross(
    curves: list[tuple[Curves, ...] | None], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    delay_s = np.sort(rng.exponential(0.05, (len(curves), 7, 2, 3)), axis=-1).astype(np.float32)
    before = delay_s.copy()
    found = corrected(delay_s, curves)
    assert (delay_s == before).all()
    assert found.dtype == np.float32
    assert (np.diff(found, axis=-1) >= 0).all()
    knots = np.log1p(np.array(KNOTS_S) / DELAY_UNIT_S)
    for row, its_curves in enumerate(curves):
        if its_curves is None:
            assert (found[row] == delay_s[row]).all()
            continue
        for queue in Queue:
            scaled = np.log1p(delay_s[row, :, queue] / DELAY_UNIT_S)
            added = [np.interp(scaled[:, at], knots, its_curves[queue][at]) for at in range(3)]
            wants = np.maximum.accumulate(np.maximum(scaled + np.stack(added, -1), 0), axis=-1)
            told = np.log1p(found[row, :, queue] / DELAY_UNIT_S)
            assert told == pytest.approx(wants, abs=1e-4)


# With the forecaster and the policy.


def packets(seed: int, late_s: float = 0.0) -> Iterator[Observation]:
    rng = np.random.default_rng(seed)
    for number in count():
        sent_s = number * GAP_S
        delay_s = 0.03 + rng.exponential(0.004) + (late_s if rng.random() < 0.95 else 0.0)
        yield Observation(number, sent_s, 300, Queue(number % 2), delay_s, sent_s + 0.01)


def tell(outlook: Outlook, seen: Observation) -> None:
    outlook.on_sent(seen.number, seen.sent_s, seen.size, seen.queue)
    outlook.on_observation(seen)


def test_without_a_budget_forecasts_are_the_models() -> None:
    plain = Forecaster(Predictor(MODEL)).open()
    assert plain.tuning is None


def test_forecasts_are_corrected_and_points_and_drops_are_not() -> None:
    worlds = [Forecaster(Predictor(MODEL), budget) for budget in (None, TuningBudget(PLENTY))]
    plain, tuned = (forecaster.open() for forecaster in worlds)
    flow = packets(1)
    for _ in range(600):
        seen = next(flow)
        for outlook, forecaster in zip((plain, tuned), worlds, strict=True):
            tell(outlook, seen)
            forecaster.settle(seen.known_s)
    before, after = (outlook.forecast(seen.known_s) for outlook in (plain, tuned))
    assert before is not None
    assert after is not None
    assert np.abs(after.delay_s - before.delay_s).max() > 0.005
    assert (after.point_s == before.point_s).all()
    assert (after.drop == before.drop).all()


def test_one_peers_lies_change_nobody_elses_forecasts() -> None:
    alone, beside = (Forecaster(Predictor(MODEL), TuningBudget(PLENTY)) for _ in range(2))
    mine, same, liar = alone.open(), beside.open(), beside.open()
    flow, lies = packets(1), packets(2, late_s=5.0)
    for _ in range(400):
        seen = next(flow)
        tell(mine, seen)
        tell(same, seen)
        tell(liar, next(lies))
        alone.settle(seen.known_s)
        beside.settle(seen.known_s)
        wants, found = mine.forecast(seen.known_s), same.forecast(seen.known_s)
        assert wants is not None
        assert found is not None
        assert found.delay_s == pytest.approx(wants.delay_s, rel=1e-3, abs=1e-6)
    assert liar.tuning is not None
    assert liar.tuning.curves() is not None
    assert mine.tuning is not None
    assert mine.tuning.curves() is not None


def test_a_clock_that_was_set_teaches_nothing_of_what_was_under_way() -> None:
    forecaster = Forecaster(Predictor(MODEL), TuningBudget(PLENTY))
    outlook = forecaster.open()
    assert outlook.tuning is not None
    flow = packets(1)
    for _ in range(20):
        seen = next(flow)
        tell(outlook, seen)
        forecaster.settle(seen.known_s)
    steps = outlook.tuning.steps
    assert steps > 0
    late = [next(flow) for _ in range(5)]
    for one in late:
        outlook.on_sent(one.number, one.sent_s, one.size, one.queue)
    for one in late:
        outlook.on_observation(one._replace(delay_s=one.delay_s - 3600))
    assert outlook.tuning.steps == steps


def lying(since_s: float) -> Callable[[float, SentPacket, float], float]:
    return lambda now, packet, arrived_s: arrived_s - (CLOCK_AHEAD_S if now > since_s else 0.0)


def test_what_was_learnt_goes_with_the_policys_trust() -> None:
    budget = TuningBudget(PLENTY)
    forecaster = Forecaster(Predictor(MODEL), budget)
    opened: list[Outlook] = []

    def open_outlook() -> Outlook:
        opened.append(forecaster.open())
        return opened[-1]

    policy = SwiftQueueMarking(open_outlook)
    line = Line(policy, tells=lying(4.0))
    for step in range(1, 90):
        line.run(step * 0.05)
        forecaster.settle(line.now)
    assert policy.state is State.DISTRUST
    assert len(opened) >= 1
    last = opened[-1].tuning
    assert last is not None
    steps = last.steps
    for step in range(90, 110):
        line.run(step * 0.05)
        forecaster.settle(line.now)
    assert last.steps == steps
    assert budget.connections == 0
    policy.close()
    assert budget.connections == 0


def test_serving_tunes_only_when_asked(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("model"), random_model(SHAPE, np.random.default_rng(1)))
    assert make(path)._forecaster.open().tuning is None
    assert make(path, has_tuning=True)._forecaster.open().tuning is not None
