"""Drop-tail is full when it is full; CoDel drops by sojourn time, as RFC 8289 has it."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.queues import CoDel, DropTail, Queue

MTU = 1500


def put(queue: Queue, now: float, label: int, size: int = MTU, ecn: Ecn = Ecn.NOT_ECT) -> bool:
    return queue.enqueue(now, Packet(label.to_bytes(4, "big"), size, ecn, entered_s=now))


def take(queue: Queue, now: float) -> int | None:
    packet = queue.dequeue(now)
    return None if packet is None else int.from_bytes(packet.data, "big")


def test_drop_tail_is_full_by_packets_or_by_bytes() -> None:
    by_packets = DropTail(limit_packets=2)
    assert [put(by_packets, 0.0, label) for label in range(3)] == [True, True, False]
    by_bytes = DropTail(limit_bytes=3000)
    assert [put(by_bytes, 0.0, label, 1001) for label in range(3)] == [True, True, False]
    assert put(by_bytes, 0.0, 3, 998)
    for queue, order in ((by_packets, [0, 1]), (by_bytes, [0, 1, 3])):
        assert queue.drops == 1
        assert [take(queue, 9.0) for _ in range(queue.packets)] == order
        assert put(queue, 9.0, 4)


def served_every_9_ms(queue: CoDel, ecn: Ecn = Ecn.NOT_ECT) -> dict[float, int]:
    """Keep 20 packets waiting, serve one each 9 ms; return at which times how many were hit."""
    for label in range(20):
        put(queue, 0.0, label, ecn=ecn)
    changes: dict[float, int] = {}
    before = 0
    for step in range(54):
        now = 1.0 + 0.009 * step
        queue.dequeue(now)
        for _ in range(20 - queue.packets):
            put(queue, now, 1000 + step, ecn=ecn)
        if queue.drops + queue.marks != before:
            before = queue.drops + queue.marks
            changes[round(now, 3)] = before
    return changes


# From the pseudo-code: the first packet is seen above the target at 1.000, so dropping starts at
# the first service from 1.100 on, 1.108, then it is due 100 ms / sqrt(n) after it was due before:
# 1.108 + 100 = 1.208, + 70.711 = 1.27871, + 57.735 = 1.33645, + 50 = 1.38645, + 44.721 = 1.43117,
# + 40.825 = 1.47199; each time at the next service.
FIRST_DROPS = {1.108: 1, 1.216: 2, 1.279: 3, 1.342: 4, 1.387: 5, 1.432: 6, 1.477: 7}


def test_codel_drops_more_and_more_often_while_the_queue_stands() -> None:
    queue = CoDel()
    assert served_every_9_ms(queue) == FIRST_DROPS
    assert queue.marks == 0


@pytest.mark.parametrize("ecn", [Ecn.ECT_0, Ecn.ECT_1])
def test_codel_marks_at_the_same_times_what_can_be_marked(ecn: Ecn) -> None:
    queue = CoDel(ecn=True)
    assert served_every_9_ms(queue, ecn) == FIRST_DROPS
    assert (queue.drops, queue.marks) == (0, 7)


def test_codel_with_ecn_drops_what_cannot_be_marked() -> None:
    queue = CoDel(ecn=True)
    assert len(served_every_9_ms(queue)) == 7
    assert (queue.drops, queue.marks) == (7, 0)


def test_codel_does_not_mark_unless_asked() -> None:
    queue = CoDel()
    served_every_9_ms(queue, Ecn.ECT_1)
    assert (queue.drops, queue.marks) == (7, 0)


def test_codel_passes_over_ce_that_was_set_elsewhere() -> None:
    queue = CoDel(ecn=True)
    served_every_9_ms(queue, Ecn.CE)
    assert (queue.drops, queue.marks) == (0, 0)


def test_codel_gives_the_packet_behind_the_one_it_drops() -> None:
    queue = CoDel()
    for label in range(6):
        put(queue, 0.0, label)
    assert take(queue, 1.0) == 0
    assert take(queue, 1.099) == 1
    assert take(queue, 1.1) == 3
    assert (queue.drops, queue.packets) == (1, 2)


def test_codel_leaves_a_short_wait_alone() -> None:
    queue = CoDel()
    for step in range(1000):
        now = step / 100
        for label in range(5):
            put(queue, now, label)
        for _ in range(5):
            assert take(queue, now + 0.0049) is not None
    assert queue.drops == 0


def test_codel_leaves_the_last_full_packet_alone() -> None:
    queue = CoDel()
    for step in range(100):
        put(queue, step / 10, step)
        put(queue, step / 10, step)
        for _ in range(2):
            assert take(queue, step / 10 + 0.09) is not None
    assert queue.drops == 0


def test_codel_starts_anew_when_one_packet_was_in_time() -> None:
    queue = CoDel()
    for label in range(5):
        put(queue, 0.0, label)
    assert take(queue, 1.0) == 0
    assert take(queue, 1.05) == 1
    for label in (10, 11, 12, 13):
        put(queue, 1.05, label)
    assert [take(queue, 1.052) for _ in range(3)] == [2, 3, 4]
    assert take(queue, 1.054) == 10  # 4 ms: in time
    # Above the target from 1.08 on, so not yet for an interval.
    for label in range(20, 26):
        put(queue, 1.06, label)
    assert take(queue, 1.08) == 11
    assert take(queue, 1.12) == 12
    assert take(queue, 1.17) == 13
    assert queue.drops == 0
    assert take(queue, 1.1801) == 21
    assert queue.drops == 1


def test_codel_goes_on_at_its_pace_when_the_queue_is_soon_back() -> None:
    queue = CoDel()
    served_every_9_ms(queue)
    while queue.packets:
        queue.dequeue(1.479)
    for label in range(20):
        put(queue, 1.48, label)
    drops = queue.drops
    queue.dequeue(1.5)
    queue.dequeue(1.601)
    assert queue.drops == drops + 1
    # Seven drops, one of them the count at the start: the pace is now that of the sixth.
    queue.dequeue(1.601 + 0.1 / sqrt(6) - 0.001)
    assert queue.drops == drops + 1
    queue.dequeue(1.601 + 0.1 / sqrt(6) + 0.001)
    assert queue.drops == drops + 2


def test_codel_is_full_when_it_is_full() -> None:
    queue = CoDel(limit_packets=2)
    assert [put(queue, 0.0, label) for label in range(3)] == [True, True, False]
    assert (queue.drops, queue.packets) == (1, 2)


@pytest.mark.parametrize("options", [{"limit_packets": 0}, {"target_s": -1}, {"interval_s": 0}])
def test_codel_refuses_what_makes_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="CoDel needs"):
        CoDel(**options)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.floats(0, 0.2), st.booleans(), st.sampled_from(Ecn)), max_size=150),
    st.booleans(),
)
def test_codel_loses_and_duplicates_nothing(
    steps: list[tuple[float, bool, Ecn]], ecn: bool
) -> None:
    queue = CoDel(limit_packets=30, ecn=ecn)
    now, sent = 0.0, 0
    out: list[int | None] = []
    for gap_s, is_arrival, codepoint in steps:
        now += gap_s
        if is_arrival:
            put(queue, now, sent, ecn=codepoint)
            sent += 1
        elif queue.packets:
            out.append(take(queue, now))
    while queue.packets:
        out.append(take(queue, now))
    labels = [label for label in out if label is not None]
    assert labels == sorted(set(labels))
    assert len(labels) + queue.drops == sent
