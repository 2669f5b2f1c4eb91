"""What SwiftQueue does not believe: arrivals that cannot be, and forecasts that do not hold."""

import math
import random
from collections.abc import Callable

import pytest

from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import SentPacket
from eloquent.swiftqueue.feedback import FeedbackCheck, FeedbackClock
from eloquent.swiftqueue.least import LEAST_WINDOW_S, Least
from eloquent.swiftqueue.policy import State
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.trust import (
    DISTRUST_MAX_S,
    DISTRUST_S,
    TRUSTED_AFTER_S,
    Backoff,
    Calibration,
)
from tests.eloquent.swiftqueue_line import (
    BURST,
    CALM,
    Foretold,
    Line,
    state,
    steered,
    told_as_it_is,
)

Tells = Callable[[float, SentPacket, float], float | None]


def packet(number: int, sent_s: float, queue: Queue = Queue.L) -> SentPacket:
    ecn = Ecn.ECT_1 if queue is Queue.L else Ecn.NOT_ECT
    return SentPacket(number, sent_s, 250, ecn, is_timed=True)


# Feedback.


def set_forward(now: float, packet: SentPacket, arrived_s: float) -> float:
    return arrived_s + 2.0 * (now > 5)


def set_back(now: float, packet: SentPacket, arrived_s: float) -> float:
    return arrived_s - 2.0 * (now > 5)


def a_fixed_time(now: float, packet: SentPacket, arrived_s: float) -> float:
    return arrived_s if now <= 5 else 1005.0


def at_random() -> Tells:
    rng = random.Random(7)
    return lambda now, packet, arrived_s: rng.uniform(0, 2000) if now > 5 else arrived_s


def sooner_than_possible(now: float, packet: SentPacket, arrived_s: float) -> float:
    return arrived_s - 0.5 * (now > 5 and packet.number % 3 == 0)


def later_than_acknowledged(now: float, packet: SentPacket, arrived_s: float) -> float:
    return arrived_s + 0.5 * (now > 5 and packet.number % 3 == 0)


def no_number(now: float, packet: SentPacket, arrived_s: float) -> float:
    return math.nan if now > 5 else arrived_s


@pytest.mark.parametrize(
    "tells",
    [
        set_forward,
        set_back,
        a_fixed_time,
        at_random(),
        sooner_than_possible,
        later_than_acknowledged,
        no_number,
    ],
)
def test_reports_that_cannot_be_end_steering(tells: Tells) -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM))
    line = Line(policy, waits=lambda now, queue: 0.001, tells=tells)
    assert state(line.run(5)) is State.STEERING
    assert state(line.run(7)) is State.DISTRUST
    assert policy.counters.fallbacks == {"feedback": 1}


@pytest.mark.parametrize(("claims_s", "is_believed"), [(0.0, True), (0.3, False)])
def test_an_arrival_after_its_acknowledgement_is_not_believed_however_late_the_report(
    claims_s: float, *, is_believed: bool
) -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM))
    line = Line(
        policy,
        waits=lambda now, queue: 0.001,
        tells=lambda now, packet, arrived_s: arrived_s + claims_s * (now > 5),
        reports_after_s=0.4,
    ).run(7)
    assert (state(line) is State.STEERING) == is_believed


@pytest.mark.parametrize("tells", [set_forward, set_back])
def test_a_clock_that_was_set_once_is_learnt_anew(tells: Tells) -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM))
    Line(policy, waits=lambda now, queue: 0.001, tells=tells).run(5 + DISTRUST_S + 3)
    assert policy.state is State.STEERING
    assert policy.counters.fallbacks == {"feedback": 1}


def drift(now: float, packet: SentPacket, arrived_s: float) -> float:
    return arrived_s + 2e-4 * now


def outliers_now_and_then(now: float, packet: SentPacket, arrived_s: float) -> float:
    return arrived_s + 40 * (packet.number % 200 == 100)


def reordered_a_little(now: float, packet: SentPacket, arrived_s: float) -> float:
    return arrived_s + 0.025 * (packet.number % 2)


@pytest.mark.parametrize("tells", [told_as_it_is, drift, outliers_now_and_then, reordered_a_little])
def test_what_paths_and_clocks_do_is_believed(tells: Tells) -> None:
    policy, _ = steered(lambda now: Foretold(BURST, CALM))
    Line(policy, waits=lambda now, queue: 0.0, tells=tells).run(100)
    assert policy.counters.fallbacks.get("feedback", 0) == 0


@pytest.mark.parametrize("way_s", [0.005, 0.3])
def test_queues_that_fill_and_empty_are_believed(way_s: float) -> None:
    """L by bursts, C for long; and the way back waits, too."""
    rng = random.Random(11)
    clear_s = [0.0, 0.0]
    arrivals = []
    for number in range(20_000):
        now = number * 0.02
        queue = Queue(number % 2)
        waits_s = 0.3 * (now % 4 < 0.4) if queue is Queue.L else 0.1 * (now % 60 < 40)
        clear_s[queue] = max(clear_s[queue], now + way_s + waits_s * rng.random())
        arrivals.append((clear_s[queue], packet(number, now, queue)))
    check = FeedbackCheck()
    known_s = 0.0
    for arrived_s, one in sorted(arrivals):
        back_s = way_s + 0.2 * (arrived_s % 7 < 2) * rng.random() + rng.uniform(0, 0.01)
        known_s = max(known_s, arrived_s + back_s)
        check.fault(known_s, one, known_s, arrived_s + 50.0)
        assert not check.is_out(known_s)


def test_a_queue_that_is_faster_than_the_first_is_believed_whatever_the_way_back_does() -> None:
    check = FeedbackCheck()
    for number in range(40):
        sent_s = number * 0.033
        is_first = number < 10
        forward_s, back_s = (0.3, 0.02) if is_first else (0.02, 0.06)
        queue = Queue.C if is_first else Queue.L
        arrived_s = sent_s + forward_s
        known_s = arrived_s + back_s
        assert not check.fault(known_s, packet(number, sent_s, queue), known_s, arrived_s)


def test_packets_that_a_link_held_may_arrive_together() -> None:
    check = FeedbackCheck()
    for number in range(25):
        sent_s = 1 + number * 0.033
        assert not check.fault(3.0, packet(number, sent_s), 3.0, 2.5)


def test_feedback_is_overdue_only_beyond_its_usual_time() -> None:
    clock = FeedbackClock()
    clock.on_sent(packet(0, 0.0))
    assert not clock.is_overdue(100.0, Queue.L)
    for number in range(50):
        now = number * 0.1
        clock.on_sent(packet(number, now))
        clock.on_arrival(now + 0.05, packet(number, now))
    clock.on_sent(packet(50, 5.0))
    assert not clock.is_overdue(5.06, Queue.L)
    assert clock.is_overdue(5.07, Queue.L)
    assert not clock.is_overdue(5.07, Queue.C)


# Forecasts.


def misses(calibration: Calibration, share: float, count: int, *, run: int = 1) -> str:
    """Return the verdict on forecasts of which so many are missed, in runs."""
    for index in range(count):
        is_miss = index % (run / share) < run
        calibration.add(0.2 if is_miss else 0.0, (0.01, 0.09))
    return calibration.fault()


@pytest.mark.parametrize(
    ("share", "run", "is_believed"), [(0.005, 1, True), (0.02, 5, True), (0.2, 5, False)]
)
def test_misses_of_the_highest_level_are_judged_by_how_many_there_may_be(
    share: float, run: int, *, is_believed: bool
) -> None:
    assert (misses(Calibration((0.9, 0.99)), share, 256, run=run) == "") == is_believed


def test_a_few_observations_are_no_verdict() -> None:
    assert misses(Calibration((0.9, 0.99)), 1.0, 99) == ""
    assert misses(Calibration((0.9, 0.99)), 1.0, 100) == (
        "100 of 100 packets took longer than 90% of them should"
    )


def test_misses_that_are_long_past_do_not_count() -> None:
    calibration = Calibration((0.9, 0.99))
    misses(calibration, 1.0, 200)
    assert misses(calibration, 0.001, 260) == ""


def test_misses_by_less_than_anybody_notices_do_not_count() -> None:
    calibration = Calibration((0.9, 0.99))
    for _ in range(200):
        calibration.add(0.0015, (0.0, 0.0001))
    assert calibration.fault() == ""


def test_each_fault_costs_twice_the_time_up_to_the_most_and_a_good_while_pardons_it() -> None:
    backoff = Backoff()
    now, lengths = 0.0, []
    for _ in range(8):
        lengths.append(backoff.begin(now))
        assert not backoff.is_over(now + lengths[-1] - 0.01)
        now += lengths[-1] + 1
        assert backoff.is_over(now)
    assert lengths == [5, 10, 20, 40, 80, 160, 300, 300]
    assert lengths[-1] == DISTRUST_MAX_S
    assert backoff.begin(now + TRUSTED_AFTER_S) == DISTRUST_S


def test_a_least_value_is_forgotten_after_its_window() -> None:
    least = Least()
    assert math.isnan(least.least)
    least.learn(100.0, 1.0)
    for step in range(100):
        least.learn(100.0 + step, 2.0)
        if step < LEAST_WINDOW_S / 2:
            assert least.least == 1.0
    assert least.least == 2.0
