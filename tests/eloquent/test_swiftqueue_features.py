"""`History`: what the model sees; and flows replayed as it sees them."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eloquent.swiftqueue.dataset import replay, varied
from eloquent.swiftqueue.features import (
    EVENT_FEATURES,
    EVENT_NAMES,
    MAX_PENDING,
    QUERY_FEATURES,
    QUERY_NAMES,
    History,
)
from eloquent.swiftqueue.records import Observation, Queue
from tests.eloquent.swiftqueue_flows import made_flow

BACK_S = 0.02


def seen(
    number: int, delay_s: float, *, queue: Queue = Queue.L, gap_s: float = 0.02
) -> Observation:
    """The packet that left at `number * gap_s` and is reported at once."""
    sent_s = number * gap_s
    known_s = sent_s + (0.3 if math.isnan(delay_s) else delay_s + BACK_S)
    return Observation(number, sent_s, 500, queue, delay_s, known_s)


def told(history: History, *observations: Observation) -> list[NDArray[np.float32]]:
    events = []
    for one in observations:
        history.on_sent(one.number, one.sent_s, one.size, one.queue)
        events.append(history.on_observation(one))
    return events


def event(values: NDArray[np.float32], name: str) -> float:
    return float(values[EVENT_NAMES.index(name)])


def query(history: History, now: float, name: str) -> float:
    return float(history.query(now, 500)[QUERY_NAMES.index(name)])


def scaled(delay_s: float) -> float:
    return math.log1p(delay_s / 0.005)


def test_names_and_widths_agree() -> None:
    history = History()
    assert len(set(EVENT_NAMES)) == EVENT_FEATURES
    assert len(set(QUERY_NAMES)) == QUERY_FEATURES
    assert history.on_observation(seen(1, 0.02)).shape == (EVENT_FEATURES,)
    assert history.query(1.0, 100).shape == (QUERY_FEATURES,)
    assert history.query(1.0, 100).dtype == np.float32


def test_nothing_is_known_at_first() -> None:
    history = History()
    assert math.isnan(history.base_s)
    assert all(math.isnan(history.last_s(queue)) for queue in Queue)
    found = history.query(5.0, 1500)
    assert found[QUERY_NAMES.index("size")] == 1.0
    assert np.count_nonzero(found) == 1


def test_a_delay_counts_over_the_least_of_both_queues() -> None:
    history = History()
    *_, third = told(
        history, seen(1, 0.03), seen(2, 0.02, queue=Queue.C), seen(3, 0.06, queue=Queue.C)
    )
    assert history.base_s == 0.02
    assert event(third, "delay") == pytest.approx(scaled(0.04))
    assert event(third, "delay_step") == pytest.approx(scaled(0.04))
    assert event(third, "over_other_queue") == pytest.approx(scaled(0.03))
    assert query(history, 0.2, "l_delay") == pytest.approx(scaled(0.01))
    assert query(history, 0.2, "c_delay") == pytest.approx(scaled(0.04))
    assert history.last_s(Queue.C) == 0.06


def test_the_base_is_forgotten_after_half_a_minute() -> None:
    history = History()
    told(history, seen(1, 0.02))
    told(history, *(seen(number, 0.05) for number in range(50, 1600, 50)))
    assert history.base_s == pytest.approx(0.05)


def test_silence_shows_as_overdue_before_any_delay_is_reported() -> None:
    history = History()
    told(history, seen(1, 0.02))
    history.on_sent(2, 0.04, 500, Queue.L)
    history.on_sent(3, 0.06, 500, Queue.C)
    round_trip_s = 0.02 + BACK_S
    assert query(history, 0.04 + round_trip_s, "l_overdue") == pytest.approx(0.0, abs=1e-6)
    assert query(history, 0.24 + round_trip_s, "l_overdue") == pytest.approx(scaled(0.2))
    assert query(history, 0.24 + round_trip_s, "c_overdue") == pytest.approx(scaled(0.18))
    assert query(history, 1.0, "l_pending") == pytest.approx(math.log1p(1))


def test_a_silence_is_as_the_time_that_passes() -> None:
    history = History()
    told(history, seen(1, 0.02), seen(2, 0.07, queue=Queue.C))
    history.on_sent(3, 0.06, 500, Queue.L)
    np.testing.assert_array_equal(history.query(0.2, 500, 0.1), history.query(0.2 + 0.1, 500))


def test_an_overtaken_packet_is_missing_not_in_flight_and_only_in_its_own_queue() -> None:
    history = History()
    history.on_sent(1, 0.02, 500, Queue.L)
    history.on_sent(2, 0.04, 500, Queue.C)
    history.on_sent(3, 0.06, 500, Queue.L)
    history.on_sent(4, 0.08, 500, Queue.L)
    history.on_observation(seen(3, 0.02))
    assert query(history, 0.2, "l_pending") == pytest.approx(math.log1p(1))
    assert query(history, 0.08 + 0.02 + BACK_S + 0.1, "l_overdue") == pytest.approx(scaled(0.1))
    assert query(history, 0.2, "l_skipped") == pytest.approx(math.log1p(1))
    assert query(history, 0.2, "c_pending") == pytest.approx(math.log1p(1))
    assert query(history, 0.2, "c_skipped") == 0


def test_a_packet_that_arrives_after_it_was_taken_for_lost() -> None:
    history = History()
    told(history, seen(1, 0.02), seen(2, math.nan))
    share = query(history, 0.5, "loss_share")
    late = history.on_observation(seen(2, 0.5))
    assert event(late, "lost") == 0
    assert event(late, "late") == 1
    assert event(late, "delay") == pytest.approx(scaled(0.48))
    assert query(history, 0.5, "loss_share") < share
    assert query(history, 0.5, "l_delay") == pytest.approx(scaled(0.48))


def test_a_fate_that_is_told_twice_changes_nothing_of_the_queue() -> None:
    history = History()
    told(history, seen(1, 0.02), seen(2, 0.03))
    before = history.query(0.2, 500)
    again = history.on_observation(seen(2, 0.03))
    assert event(again, "late") == 1
    changed = before != history.query(0.2, 500)
    names = {name for name, is_changed in zip(QUERY_NAMES, changed, strict=True) if is_changed}
    assert names <= {"l_roughness"}


def test_an_older_packet_does_not_replace_what_is_known_of_a_newer() -> None:
    history = History()
    told(history, seen(1, 0.02))
    history.on_sent(2, 0.04, 500, Queue.L)
    told(history, seen(3, 0.03))
    history.on_observation(seen(2, 0.3))
    assert history.last_s(Queue.L) == 0.03


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, 0.7, -0.7])
def test_a_clock_that_jumps_resets_the_base_once(jump_s: float) -> None:
    history = History()
    told(history, *(seen(number, 0.02 + 0.001 * (number % 3)) for number in range(50)))
    for number in range(50, 100):
        delay_s = 0.02 + 0.001 * (number % 3)
        one = seen(number, delay_s)
        told(history, one._replace(delay_s=delay_s + jump_s))
    assert history.jumps == 1
    assert history.base_s == pytest.approx(0.02 + jump_s)
    assert query(history, 2.1, "l_peak") < scaled(0.01)


def test_a_stall_of_seconds_is_no_jump() -> None:
    history = History()
    told(history, *(seen(number, 0.02) for number in range(50)))
    told(history, *(seen(number, 0.02 + (100 - number) * 0.1) for number in range(50, 100)))
    assert history.jumps == 0
    assert history.base_s == 0.02


@pytest.mark.parametrize("offset_s", [0.0, 12.5, -86_400.0])
def test_the_receiver_s_clock_may_be_off(offset_s: float) -> None:
    flow = made_flow(3, packets=300)
    plain = replay(flow)
    shifted = replay(replace(flow, delay_s=(flow.delay_s + offset_s)))
    # What is left is float32's precision in the record.
    precision = 2 * float(np.spacing(np.float32(abs(offset_s) + 1)))
    np.testing.assert_allclose(shifted.delay_s, plain.delay_s, atol=precision)
    coarse = 1e-4 + 400 * precision
    known = [name for name in range(EVENT_FEATURES) if EVENT_NAMES[name] != "delay_rate"]
    np.testing.assert_allclose(shifted.events[:, known], plain.events[:, known], atol=coarse)


def test_memory_is_bounded() -> None:
    history = History()
    sizes = []
    for number in range(9 * MAX_PENDING):
        history.on_sent(number, number * 1e-4, 100, Queue(number % 2))
        if number % 3 == 0:  # of the others nothing is ever heard
            history.on_observation(seen(number, 0.02, queue=Queue(number % 2), gap_s=1e-4))
        if number % (3 * MAX_PENDING) == 3 * MAX_PENDING - 1:
            sizes.append(len(pickle.dumps(history)))
    assert max(sizes) < 1.1 * sizes[0] < 100_000


odd = st.floats(allow_nan=True, allow_infinity=True)
observations = st.builds(
    Observation,
    number=st.integers(-5, 40),
    sent_s=st.one_of(st.floats(0, 10), odd),
    size=st.integers(-10, 100_000),
    queue=st.sampled_from(Queue),
    delay_s=st.one_of(st.floats(0, 1), odd),
    known_s=st.one_of(st.floats(0, 10), odd),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(observations, max_size=30), odd, odd)
def test_garbage_gives_finite_numbers(
    told_of: list[Observation], now: float, silence_s: float
) -> None:
    history = History()
    for one in told_of:
        if one.number % 2:
            history.on_sent(one.number, one.sent_s, one.size, one.queue)
        found = history.on_observation(one)
        assert np.isfinite(found).all()
        assert np.abs(found).max() < 50
    found = history.query(now, 100, silence_s)
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 50


def test_after_garbage_the_features_are_those_of_a_sound_flow_again() -> None:
    sound, upset = History(), History()
    garbage = [
        Observation(number, math.nan, -1, Queue.L, value, math.inf)
        for number, value in enumerate((math.inf, -1e300, 1e300, math.nan, 0.0))
    ]
    for one in garbage:
        upset.on_observation(one)
    for history in (sound, upset):
        told(history, *(seen(number, 0.02 + number % 5 * 0.01) for number in range(100, 4000)))
    np.testing.assert_allclose(upset.query(81.0, 500), sound.query(81.0, 500), atol=1e-4)


def test_a_replay_is_the_same_each_time_and_sees_no_future() -> None:
    flow = made_flow(5, packets=400)
    whole, again = replay(flow), replay(flow)
    np.testing.assert_array_equal(whole.events, again.events)
    np.testing.assert_array_equal(whole.queries, again.queries)
    cut = 200
    blind = replace(flow, known_s=np.where(flow.known_s > flow.sent_s[cut], np.inf, flow.known_s))
    partial = replay(blind)
    np.testing.assert_array_equal(partial.queries[: cut + 1], whole.queries[: cut + 1])
    np.testing.assert_array_equal(partial.newest[: cut + 1], whole.newest[: cut + 1])
    assert (partial.newest[cut:] == partial.newest[cut]).all()


def test_each_query_is_asked_when_exactly_what_was_known_by_then_is_known() -> None:
    flow = made_flow(6, packets=400)
    found = replay(flow)
    known = np.sort(flow.known_s[np.isfinite(flow.known_s)])
    np.testing.assert_array_equal(
        found.newest, np.searchsorted(known, flow.sent_s, side="right") - 1
    )
    assert len(found.events) == len(known)
    before = found.newest < 0
    assert before.any()
    assert np.isnan(found.delay_s[before]).all()
    assert not found.changed[before].any()


def test_a_served_query_does_not_know_of_packets_sent_since_the_last_report() -> None:
    flow = made_flow(7, packets=400)
    exact, served = replay(flow), replay(flow, np.ones(400, np.bool_))
    np.testing.assert_array_equal(exact.events, served.events)
    first = np.diff(exact.newest, prepend=-2) > 0  # nothing was sent since the report
    heard = exact.newest >= 0
    np.testing.assert_allclose(
        served.queries[first & heard], exact.queries[first & heard], atol=1e-3
    )
    later = ~first & heard
    place = QUERY_NAMES.index("own_rate")
    assert (served.queries[later, place] < exact.queries[later, place]).all()


def test_labels_are_over_the_base_and_changes_are_large() -> None:
    flow = made_flow(8, packets=600)
    found = replay(flow)
    asked = found.newest > 50
    over = flow.delay_s - found.base_s[:, None]
    np.testing.assert_allclose(found.delay_s[asked], np.maximum(over, 0)[asked], atol=1e-6)
    step = np.abs(found.delay_s - found.last_s)
    assert found.changed.any()
    assert (step[found.changed] > 0.02).all()
    assert not found.changed[step < 0.02].any()


def test_a_varied_flow_is_another_but_alike() -> None:
    flow = made_flow(9)
    other = varied(flow, np.random.default_rng(1))
    scale = np.ptp(other.sent_s) / np.ptp(flow.sent_s)
    assert 0.5 <= scale <= 2.0
    assert scale != 1.0
    np.testing.assert_allclose(other.delay_s, flow.delay_s * scale, rtol=1e-5)
    heard = np.isfinite(other.known_s)
    assert heard.mean() > 0.85
    np.testing.assert_allclose(
        (other.known_s - other.sent_s)[heard],
        (flow.known_s - flow.sent_s)[heard] * scale,
        rtol=1e-6,
    )
