"""The marking policies without a model."""

import random
from itertools import pairwise

import pytest

from eloquent.quic.ecn import Ecn
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.simple_policies import (
    NEWS_S,
    PROBE_S,
    AlternatingMarking,
    LastRttMarking,
    ProbingMarking,
    ShareMarking,
)
from tests.eloquent.swiftqueue_line import Line

L, C = Ecn.ECT_1, Ecn.NOT_ECT
MS = 1e-3


def test_a_share_goes_into_c_and_the_seed_says_which() -> None:
    first, second = (
        [left.ecn for left in Line(ShareMarking(0.1, random.Random(5))).run(100).left]
        for _ in range(2)
    )
    assert first == second
    assert 0.08 < first.count(C) / len(first) < 0.12


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_may_go_into_one_queue(share: float) -> None:
    line = Line(ShareMarking(share, random.Random(5))).run(3)
    assert line.marks_of(0) == {C if share else L}


@pytest.mark.parametrize(("queue", "here", "there"), [(Queue.L, L, C), (Queue.C, C, L)])
def test_probing_sends_a_copy_into_the_other_queue_now_and_then(
    queue: Queue, here: Ecn, there: Ecn
) -> None:
    line = Line(ProbingMarking(queue)).run(10)
    assert line.marks_of(0) == {here}
    copies = line.copies_of(0)
    assert set(copies) == {there}
    assert 0.8 * 10 / PROBE_S <= len(copies) <= 10 / PROBE_S + 1


def test_alternating_sees_both_queues_for_long() -> None:
    line = Line(AlternatingMarking(random.Random(5), mean_s=0.5)).run(100)
    marks = [left.ecn for left in line.left]
    assert 0.3 < marks.count(C) / len(marks) < 0.7
    turns = sum(before is not after for before, after in pairwise(marks))
    assert 100 < turns < 300


# The last round trip.


def bursts(low_ms: float, classic_ms: float) -> Line:
    """Return a run in which the queues wait so long from 2 s to 4 s, else 0.5 and 3 ms."""

    def waits(now: float, queue: Queue) -> float:
        if 2 <= now < 4:
            return (low_ms, classic_ms)[queue] * MS
        return (0.5, 3)[queue] * MS

    return Line(LastRttMarking(), waits=waits).run(7)


def test_last_rtt_goes_into_c_while_l_is_slow_and_back_without_paying_for_it() -> None:
    line = bursts(40, 8)
    assert line.marks_of(0, 2) == {L}
    assert line.marks_of(2.15, 4) == {C}
    assert line.marks_of(4 + PROBE_S + 0.15) == {L}
    assert set(line.copies_of(0)) == {L}


def test_last_rtt_stays_in_l_while_that_is_slow_by_little() -> None:
    assert bursts(4, 0).marks_of(0) == {L}


def test_last_rtt_leaves_a_c_that_turns_out_slower_and_tries_it_seldom() -> None:
    line = bursts(40, 90)
    classic = [left for left in line.since(2, 4) if left.ecn is C]
    assert classic
    assert len(classic) < 0.25 * len(line.since(2, 4))
    assert line.marks_of(5) == {L}


def test_last_rtt_takes_an_overdue_packet_for_a_slow_one() -> None:
    line = bursts(400, 8)
    assert line.marks_of(2.15, 2.3) == {C}


def test_last_rtt_does_not_believe_old_news() -> None:
    policy = LastRttMarking()
    line = Line(policy, waits=lambda now, queue: 0.001 if now < 1 else 0.05).run(3)
    assert policy.next_codepoint(line.now + NEWS_S + 1, 250, is_copy=False) is L


def test_last_rtt_sends_the_transports_copies_into_the_other_queue() -> None:
    line = Line(LastRttMarking(), copies=lambda now: True).run(2)
    assert set(line.copies_of(0)) == {C}
