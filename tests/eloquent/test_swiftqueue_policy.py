"""SwiftQueue's policy: its states, its choice of queue, its copies."""

import logging
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import SentPacket
from eloquent.swiftqueue.budgets import C_BYTES_PER_S, C_SHARE, SHARE_WINDOW_S, SLICE_S
from eloquent.swiftqueue.choice import DWELL_S, Tail
from eloquent.swiftqueue.policy import (
    FORECAST_MAX_AGE_S,
    HEDGE_BURST,
    HEDGE_SHARE,
    MAX_OUT,
    PROBE_BURST,
    PROBE_SHARE,
    State,
)
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.trust import DISTRUST_S
from tests.eloquent.swiftqueue_line import (
    BURST,
    CALM,
    STANDING,
    Foretold,
    Line,
    arrives,
    state,
    steered,
)

L, C = Ecn.ECT_1, Ecn.NOT_ECT


def burst_in_l(now: float) -> Foretold:
    return Foretold(BURST, STANDING) if 2 <= now < 4 else Foretold(CALM, STANDING)


# States.


def test_it_learns_before_it_steers() -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM))
    line = Line(policy, waits=lambda now, queue: 0.001)
    assert state(line.run(0.2)) is State.LEARNING
    assert state(line.run(1)) is State.STEERING
    assert line.marks_of(0, 0.25) == {L}
    assert line.marks_of(0.5) == {C}


def test_without_a_forecast_it_does_not_steer() -> None:
    policy, _ = steered(lambda now: None)
    line = Line(policy).run(3)
    assert state(line) is State.STALE
    assert line.marks_of(0) == {L}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_forecast_that_is_no_number_is_none(broken: float) -> None:
    policy, _ = steered(lambda now: Foretold((broken, broken, broken), CALM))
    assert Line(policy).run(3).marks_of(0) == {L}


def test_forecasts_that_turn_into_no_numbers_end_steering() -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM if now < 2 else (1, 2, math.nan)))
    line = Line(policy, waits=lambda now, queue: 0.001).run(3)
    assert state(line) is State.STALE
    assert line.marks_of(1, 2) == {C}
    assert line.marks_of(2) == {L}


@pytest.mark.parametrize("way_s", [0.005, 0.05, 0.3])
def test_absent_feedback_ends_steering_within_a_second(
    way_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM))
    line = Line(
        policy,
        way_s=way_s,
        waits=lambda now, queue: 0.001,
        tells=lambda now, packet, arrived_s: arrived_s if not 3 <= now < 6 else None,
    )
    with caplog.at_level(logging.INFO, logger="eloquent.swiftqueue.policy"):
        assert state(line.run(3)) is State.STEERING
        assert line.marks_of(2) == {C}
        assert state(line.run(4.1)) is State.STALE
        assert state(line.run(7)) is State.STEERING
    assert line.marks_of(4.1, 6) == {L}
    assert line.marks_of(6.5) == {C}
    assert policy.counters.fallbacks == {"silence": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "SwiftQueue hears of no arrivals: packets go into the L queue until it does."
    ]


def test_feedback_that_never_comes_leaves_it_at_all_l_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM))
    with caplog.at_level(logging.INFO, logger="eloquent.swiftqueue.policy"):
        line = Line(policy, tells=lambda now, packet, arrived_s: None).run(30)
    assert line.marks_of(0) == {L}
    assert state(line) is State.LEARNING
    assert len(caplog.records) == 1


def test_after_a_pause_it_does_not_steer_by_old_news() -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM))
    line = Line(policy, waits=lambda now, queue: 0.001).run(3)
    later = line.now + FORECAST_MAX_AGE_S + 5
    assert policy.next_codepoint(later, 250, is_copy=False) is L
    assert policy.state is State.STALE
    assert policy.counters.fallbacks == {}


def test_where_marks_are_taken_off_it_wants_nothing() -> None:
    policy, _ = steered(lambda now: Foretold(BURST, BURST), has_copies=True, has_probes=True)
    line = Line(policy, marks=lambda now: not 3 <= now < 5, waits=lambda now, queue: 0.001)
    line.run(2.9)
    assert policy.wants_times
    line.run(5)
    assert state(line) is State.UNMARKED
    assert not policy.wants_times
    assert not line.copies_of(3.1, 5)
    line.run(6)
    assert policy.wants_times
    assert state(line) is State.STEERING


def lies(now: float, packet: SentPacket, arrived_s: float) -> float:
    return arrived_s if not 2 <= now < 3 else 1e9 * math.sin(now)


def test_false_feedback_is_distrusted_for_a_while_and_then_learnt_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy, outlooks = steered(lambda now: Foretold(BURST, CALM))
    line = Line(policy, waits=lambda now, queue: 0.001, tells=lies)
    with caplog.at_level(logging.INFO, logger="eloquent.swiftqueue.policy"):
        line.run(2.5)
        assert state(line) is State.DISTRUST
        assert outlooks.opened[0].is_closed
        line.run(2 + DISTRUST_S + 2)
    assert line.marks_of(2.3, 2 + DISTRUST_S) == {L}
    assert state(line) is State.STEERING
    assert line.marks_of(line.now - 0.5) == {C}
    assert len(outlooks.opened) == 2
    assert policy.counters.fallbacks == {"feedback": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "SwiftQueue does not steer for 5 s: an arrival is a minute off. "
        "Packets go into the L queue."
    ]


def test_marks_that_are_taken_off_during_distrust_do_not_end_steering_for_good() -> None:
    policy, outlooks = steered(lambda now: Foretold(BURST, CALM))
    line = Line(
        policy,
        marks=lambda now: not 3 <= now < 4,
        waits=lambda now, queue: 0.001,
        tells=lies,
    )
    assert state(line.run(2.5)) is State.DISTRUST
    assert state(line.run(3.5)) is State.UNMARKED
    line.run(2 + DISTRUST_S + 3)
    assert state(line) is State.STEERING
    assert len(outlooks.opened) == 2


def test_forecasts_that_are_exceeded_too_often_are_distrusted_ever_longer() -> None:
    policy, outlooks = steered(lambda now: Foretold(BURST, CALM))
    line = Line(policy, waits=lambda now, queue: 0.02 * (int(now * 10) % 3 > 0)).run(120)
    assert 4 <= policy.counters.fallbacks["forecasts"] <= 5
    assert len(outlooks.opened) in (4, 5, 6)
    shares = [left.ecn is C for left in line.left]
    assert sum(shares) / len(shares) < 0.2


def test_observations_reach_the_outlook_and_lost_packets_too() -> None:
    policy, outlooks = steered()
    waits = iter([0.001, None, 0.001] * 10)
    Line(policy, waits=lambda now, queue: next(waits)).run(0.99)
    policy_seen = outlooks.opened[0].seen
    assert [seen.number for seen in policy_seen if seen.is_lost][:3] == [1, 4, 7]
    arrived = next(seen for seen in policy_seen if seen.number == 3)
    assert arrived.queue is Queue.L
    assert arrived.delay_s == pytest.approx(1000.021)


def test_a_packet_that_is_not_timed_is_not_waited_for() -> None:
    policy, outlooks = steered()
    ecn = policy.next_codepoint(1.0, 40, is_copy=False)
    policy.on_sent(SentPacket(1, 1.0, 40, ecn))
    assert outlooks.opened[0].sent == []
    assert policy.counters.packets == 1


def test_closing_lets_go_of_the_outlook() -> None:
    policy, outlooks = steered()
    policy.close()
    policy.close()
    assert outlooks.opened[0].is_closed


# The choice.


def test_a_burst_in_l_sends_packets_into_c_and_its_end_back() -> None:
    policy, _ = steered(burst_in_l)
    line = Line(policy).run(6)
    assert line.marks_of(0, 2) == {L}
    assert line.marks_of(2.05, 4) == {C}
    assert line.marks_of(4.05 + DWELL_S) == {L}
    assert policy.switches == 2


def test_unforeseeable_bursts_in_l_make_a_reliable_short_c_the_better_queue() -> None:
    policy, _ = steered(lambda now: Foretold((0.5, 1, 40), (3, 4, 5)))
    line = Line(policy, waits=lambda now, queue: 0.0005 if queue is Queue.L else 0.003).run(3)
    assert line.marks_of(1) == {C}


def test_drops_count_as_delay() -> None:
    policy, _ = steered(lambda now: Foretold(STANDING, CALM, drop=(0.0, 0.2)))
    assert Line(policy).run(3).marks_of(0) == {L}


def test_bursts_that_no_forecast_knows_of_are_learnt_on_the_path() -> None:
    policy, _ = steered(lambda now: Foretold((0.5, 1, 2), (3, 6, 12)))

    def waits(now: float, queue: Queue) -> float:
        return (0.06 * (now % 2 < 0.1), 0.005)[queue]

    line = Line(policy, gap_s=0.02, waits=waits).run(12)
    assert line.marks_of(0, 2) == {L}
    assert line.marks_of(10) == {C}
    assert policy.counters.fallbacks == {}


@pytest.mark.parametrize("foretold_s", [0.001, 0.03, 0.3])
def test_whatever_is_foretold_the_corrected_tail_is_exceeded_as_often_as_it_should(
    foretold_s: float,
) -> None:
    rng = random.Random(5)
    tail, misses = Tail(), 0
    for index in range(20_000):
        delay_s, highest_s = rng.expovariate(1 / 0.02), foretold_s + tail.beyond_s
        tail.learn(delay_s, highest_s)
        misses += index >= 10_000 and delay_s > highest_s
    assert 0.005 < misses / 10_000 < 0.015


def test_a_short_queue_is_not_left_for_being_a_little_longer_than_foretold() -> None:
    rng = random.Random(5)
    policy, _ = steered(lambda now: Foretold((2, 2.3, 2.5), (5, 5.5, 6)))

    def waits(now: float, queue: Queue) -> float:
        return 0.0026 if rng.random() < 0.02 else rng.uniform(0, 0.0024)

    assert Line(policy, waits=waits).run(20).marks_of(0) == {L}


@pytest.mark.parametrize(("gap_s", "queue"), [(0.1, L), (0.005, C)])
def test_a_drop_costs_the_wait_for_the_next_bundle(gap_s: float, queue: Ecn) -> None:
    policy, _ = steered(lambda now: Foretold((10, 12, 14), (1, 2, 3), drop=(0.0, 0.02)))
    line = Line(policy, gap_s=gap_s, size=100, waits=lambda now, queue: 0.001).run(6)
    assert line.marks_of(4) == {queue}


@pytest.mark.parametrize("seed", range(5))
def test_noisy_forecasts_do_not_make_it_flap(seed: int) -> None:
    rng = random.Random(seed)

    def noisy(now: float) -> Foretold:
        low, classic = (10 * math.exp(rng.gauss(0, 0.03)) for _ in range(2))
        return Foretold((low, 2 * low, 3 * low), (classic, 2 * classic, 3 * classic))

    policy, _ = steered(noisy)
    Line(policy, gap_s=0.005, waits=lambda now, queue: 0.001).run(20)
    assert policy.state is State.STEERING
    assert policy.switches <= 10  # One in two seconds, of 4000 chances.


def test_however_wild_the_forecasts_a_queue_is_kept_for_the_dwell_time() -> None:
    rng = random.Random(3)
    policy, _ = steered(
        lambda now: Foretold(BURST, CALM) if rng.random() < 0.5 else Foretold(CALM, BURST)
    )
    Line(policy, gap_s=0.002, waits=lambda now, queue: 0.0).run(10)
    assert 20 < policy.switches <= 10 / DWELL_S


# The share of C.


def share_is_kept(line: Line) -> None:
    """Check that in no window more of the bytes went into C than may."""
    window_s = SHARE_WINDOW_S + SLICE_S
    for start_s in range(int(line.now)):
        within = line.since(start_s, start_s + SHARE_WINDOW_S)
        around = line.since(start_s + SHARE_WINDOW_S - 2 * window_s, start_s + SHARE_WINDOW_S)
        classic = sum(left.size for left in within if left.ecn is C)
        assert classic <= max(
            C_BYTES_PER_S * SHARE_WINDOW_S, C_SHARE * sum(left.size for left in around)
        )


@pytest.mark.parametrize(
    ("gap_s", "size", "share"), [(0.033, 250, 0.99), (0.001, 1200, 0.5), (0.02, 1200, 0.64)]
)
def test_a_thin_flow_may_stay_in_c_and_a_fat_one_with_half_of_its_bytes(
    gap_s: float, size: int, share: float
) -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM))
    line = Line(policy, gap_s=gap_s, size=size, waits=lambda now, queue: 0.001).run(20)
    classic = [left.ecn is C for left in line.since(8)]
    assert sum(classic) / len(classic) == pytest.approx(share, abs=0.02)
    share_is_kept(line)


# Copies.


def test_the_queue_not_in_use_is_probed_seldom_while_all_is_calm() -> None:
    policy, _ = steered(lambda now: Foretold(CALM, CALM), has_probes=True)
    line = Line(policy, waits=lambda now, queue: 0.0005).run(60)
    assert 10 <= len(line.copies_of(5)) <= 12
    assert set(line.copies_of(0)) == {C}
    assert policy.counters.probes == policy.counters.copies


def test_the_queue_not_in_use_is_probed_often_while_it_matters_within_the_budget() -> None:
    policy, _ = steered(lambda now: Foretold(BURST, STANDING), has_probes=True)
    line = Line(policy).run(60)
    packets, copies = len(line.since(0)), len(line.copies_of(0))
    assert 0.8 * PROBE_SHARE * packets <= copies <= PROBE_SHARE * packets + PROBE_BURST
    assert set(line.copies_of(1)) == {L}


def test_a_queue_that_is_of_no_use_is_probed_all_the_same() -> None:
    policy, _ = steered(lambda now: Foretold(CALM, (300, 400, 500)), has_probes=True)
    line = Line(policy, waits=lambda now, queue: (0.0005, 0.3)[queue]).run(10)
    assert set(line.copies_of(1)) == {C}


def test_where_both_queues_may_be_slow_packets_are_hedged_within_the_budget() -> None:
    policy, _ = steered(lambda now: Foretold((2, 10, 80), (4, 15, 90)), has_copies=True)
    line = Line(policy, waits=lambda now, queue: 0.003).run(60)
    packets, copies = len(line.since(0)), len(line.copies_of(0))
    assert 0.5 * HEDGE_SHARE * packets <= copies <= HEDGE_SHARE * packets + HEDGE_BURST
    assert policy.counters.hedges == copies


def test_where_all_is_calm_nothing_is_hedged() -> None:
    policy, _ = steered(lambda now: Foretold(CALM, CALM), has_copies=True)
    assert not Line(policy, waits=lambda now, queue: 0.0005).run(30).copies_of(0)


def test_hedges_are_kept_for_the_riskiest_packets() -> None:
    def risky_at_times(now: float) -> Foretold:
        scale = 3.0 if now % 10 < 0.5 else 1.0
        return Foretold((4 * scale, 6 * scale, 20 * scale), (5, 8, 40))

    policy, _ = steered(risky_at_times, has_copies=True)
    line = Line(policy, waits=lambda now, queue: 0.003).run(60)
    late = [left for left in line.since(20) if left.is_copy]
    assert late
    assert sum(left.time_s % 10 < 0.5 for left in late) > 0.4 * len(late)


def test_a_packet_whose_feedback_is_overdue_makes_the_next_ones_hedged() -> None:
    policy, _ = steered(lambda now: Foretold(CALM, CALM), has_copies=True)

    def stalls(now: float, queue: Queue) -> float:
        return 0.4 if 5 <= now < 5.1 and queue is Queue.L else 0.0005

    line = Line(policy, waits=stalls).run(8)
    assert not line.copies_of(0, 5)
    assert set(line.copies_of(5.05, 5.6)) == {C}
    assert not line.copies_of(6)


@pytest.mark.parametrize(
    ("foretold", "there"),
    [
        (Foretold(CALM, STANDING), C),
        (Foretold(CALM, (300, 400, 500)), L),
        (Foretold(CALM, CALM, drop=(0.0, 0.9)), L),
        (Foretold(BURST, CALM), C),
        (Foretold((5, 15, 60), CALM), L),
    ],
)
def test_the_transports_copies_go_into_the_other_queue_unless_it_is_of_no_use(
    foretold: Foretold, there: Ecn
) -> None:
    policy, _ = steered(lambda now: foretold)
    line = Line(policy, copies=lambda now: True, waits=lambda now, queue: 0.0005).run(3)
    assert set(line.copies_of(1)) == {there}


def test_before_anything_is_known_the_transports_copies_go_into_c() -> None:
    policy, _ = steered()
    line = Line(policy, copies=lambda now: True, tells=lambda now, packet, arrived_s: None).run(2)
    assert set(line.copies_of(0)) == {C}


# Whatever is reported.

REPORTS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(-0.1, 0.1),
    st.sampled_from([0.0, -1000.0, 1000.0]),
)
QUANTILES = st.tuples(*[st.floats(allow_nan=True, width=32)] * 3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(REPORTS, st.booleans(), st.booleans()), min_size=1, max_size=40),
    st.lists(st.tuples(QUANTILES, QUANTILES), min_size=1, max_size=5),
    st.sampled_from([(0.03, 250), (0.002, 1200)]),
)
def test_whatever_is_reported_and_foretold_it_goes_on_marking_within_its_bounds(
    reports: list[tuple[float, bool, bool]],
    foretold: list[tuple[tuple[float, float, float], tuple[float, float, float]]],
    pace: tuple[float, int],
) -> None:
    asked = 0

    def script(now: float) -> Foretold:
        nonlocal asked
        asked += 1
        return Foretold(*foretold[asked // 50 % len(foretold)])

    policy, outlooks = steered(script, has_copies=True, has_probes=True)

    def tells(now: float, packet: SentPacket, arrived_s: float) -> float | None:
        off_s, is_absent, is_twice = reports[packet.number // 20 % len(reports)]
        if is_twice:
            policy.on_arrival(now, packet, arrived_s)
        return None if is_absent else arrived_s + off_s

    def waits(now: float, queue: Queue) -> float | None:
        return None if int(now * 100) % 7 == 0 else arrives(now, queue)

    gap_s, size = pace
    line = Line(policy, gap_s=gap_s, size=size, waits=waits, tells=tells).run(400 * gap_s)
    assert {left.ecn for left in line.left} <= {L, C}
    share_is_kept(line)
    packets = sum(not left.is_copy for left in line.left)
    copies = len(line.left) - packets
    most = (PROBE_SHARE + HEDGE_SHARE) * packets + PROBE_BURST + HEDGE_BURST
    assert copies <= most
    assert all(opened.is_closed for opened in outlooks.opened[:-1])


def test_memory_is_bounded_when_nothing_is_ever_heard() -> None:
    policy, _ = steered()
    Line(policy, gap_s=0.001, tells=lambda now, packet, arrived_s: None).run(3)
    assert len(policy._out) <= MAX_OUT
    assert all(len(waiting) <= MAX_OUT for waiting in policy._clock._waiting)
