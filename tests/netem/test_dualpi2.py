"""DualPI2 decides as RFC 9332 and Linux do; the expected figures are worked out by hand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.packet import Ecn, Packet

MTU = 1500
CLASSIC, L4S, ECT_0, CE = Ecn.NOT_ECT, Ecn.ECT_1, Ecn.ECT_0, Ecn.CE


class Script(random.Random):
    """Draws what it is told to, and no more."""

    def __init__(self, *draws: float) -> None:
        super().__init__()
        self.draws = list(draws)

    def random(self) -> float:
        return self.draws.pop(0)


def packet(ecn: Ecn, size: int = MTU, label: int = 0) -> Packet:
    return Packet(label.to_bytes(4, "big"), size, ecn)


def put(queue: DualPi2, now: float, item: Packet) -> bool:
    item.entered_s = now
    return queue.enqueue(now, item)


def labels(queue: DualPi2, now: float) -> list[int]:
    out = []
    while queue.packets:
        item = queue.dequeue(now)
        if item is not None:
            out.append(int.from_bytes(item.data, "big"))
    return out


# One packet came at 0 and waits: at the n-th update it has waited for q = n * 16 ms, so
# p grows by 0.16 * (q - 0.015) + 3.2 * 0.016.
P_AFTER_UPDATES = [
    0.0,
    0.05136,  # 0.16 * 0.001 = 0.00016, + 0.0512
    0.10528,  # 0.16 * 0.017 = 0.00272, + 0.0512
    0.16176,  # 0.16 * 0.033 = 0.00528, + 0.0512
    0.22080,  # 0.16 * 0.049 = 0.00784, + 0.0512
    0.28240,  # 0.16 * 0.065 = 0.01040, + 0.0512
    0.34656,  # 0.16 * 0.081 = 0.01296, + 0.0512
    0.41328,  # 0.16 * 0.097 = 0.01552, + 0.0512
    0.48256,  # 0.16 * 0.113 = 0.01808, + 0.0512
    0.55440,  # 0.16 * 0.129 = 0.02064, + 0.0512
]
OVERLOAD = 9
"Updates until 2p > 1."


def waiting(updates: int, ecn: Ecn, script: Script) -> tuple[DualPi2, float]:
    """Return a queue after that many updates, and the time: a packet of `ecn` is next.

    The packet has waited for 0.4 ms in L, or since 0 in C; four full packets of C are behind it.
    """
    queue = DualPi2(rng=script)
    now = 0.016 * updates + 0.0005
    if ecn not in (L4S, CE):
        put(queue, 0.0, packet(ecn, label=1))
    for _ in range(4):
        put(queue, 0.0, packet(CLASSIC))
    if ecn in (L4S, CE):
        put(queue, now - 0.0004, packet(ecn, label=1))
    return queue, now


@pytest.mark.parametrize("updates", range(len(P_AFTER_UPDATES)))
@pytest.mark.parametrize("ecn", [CLASSIC, L4S])
def test_p_grows_with_the_delay_and_its_change(updates: int, ecn: Ecn) -> None:
    queue = DualPi2(rng=random.Random(1))
    put(queue, 0.0, packet(ecn))
    put(queue, 0.016 * updates + 0.015, packet(ecn))  # nothing had happened before
    assert queue.p == pytest.approx(P_AFTER_UPDATES[updates], abs=1e-12)


def test_p_counts_updates_from_the_first_packet() -> None:
    queue = DualPi2(rng=random.Random(1))
    put(queue, 1000.005, packet(CLASSIC))
    put(queue, 1000.0205, packet(CLASSIC))
    assert queue.p == 0
    put(queue, 1000.0215, packet(CLASSIC))
    assert queue.p == pytest.approx(0.05136, abs=1e-9)


def test_p_follows_the_longer_of_the_two_queues_delays() -> None:
    queue = DualPi2(rng=random.Random(1))
    put(queue, 0.0, packet(L4S))
    put(queue, 0.006, packet(CLASSIC))
    assert queue.dequeue(0.010) is not None  # the L packet; the C packet has waited since 0.006
    put(queue, 0.012, packet(L4S))
    put(queue, 0.017, packet(L4S))
    # q = 0.010: 0.16 * -0.005 + 3.2 * 0.010
    assert queue.p == pytest.approx(0.0312, abs=1e-12)


@pytest.mark.parametrize("first", [CLASSIC, L4S])
def test_p_follows_whichever_queue_has_the_older_head(first: Ecn) -> None:
    queue = DualPi2(rng=random.Random(1))
    put(queue, 0.0, packet(first))
    put(queue, 0.006, packet(CLASSIC if first is L4S else L4S))
    put(queue, 0.017, packet(CLASSIC))
    assert queue.p == pytest.approx(P_AFTER_UPDATES[1], abs=1e-12)


def test_p_falls_when_the_queue_is_empty_and_rests_at_zero() -> None:
    queue = DualPi2(rng=Script(*[0.99] * 8))
    for _ in range(3):
        put(queue, 0.0, packet(CLASSIC))
    while queue.packets:
        queue.dequeue(0.065)  # four updates: p = 0.2208
    put(queue, 0.0801, packet(CLASSIC))
    # The fifth at 0.080, empty: 0.16 * -0.015 + 3.2 * (0 - 0.064) = -0.2072
    assert queue.p == pytest.approx(0.0136, abs=1e-12)
    queue.dequeue(0.0802)
    # The sixth to eleventh: -0.0024 each, so 0 from the eleventh on.
    put(queue, 0.1761, packet(CLASSIC))
    assert queue.p == 0
    queue.dequeue(0.1762)
    put(queue, 1e6, packet(CLASSIC))
    # A long rest moves neither p nor the grid of the updates: 0.016 * 62,500,001 is the next.
    put(queue, 1e6 + 0.0155, packet(CLASSIC))
    assert queue.p == 0
    put(queue, 1e6 + 0.0165, packet(CLASSIC))
    assert queue.p == pytest.approx(0.05136, abs=1e-6)


DECISIONS = [
    # updates, what, draws, outcome; p = 0.16176, 2p = 0.32352
    (3, CLASSIC, (0.1618,), CLASSIC),
    (3, CLASSIC, (0.1617, 0.1618), CLASSIC),
    (3, CLASSIC, (0.1617, 0.1617), "dropped"),
    (3, ECT_0, (0.1618,), ECT_0),
    (3, ECT_0, (0.1617, 0.1618), ECT_0),
    (3, ECT_0, (0.1617, 0.1617), CE),
    (3, L4S, (0.3236,), L4S),
    (3, L4S, (0.3235,), CE),
    (3, CE, (0.3235,), CE),
    # p = 0.48256, 2p = 0.96512: not yet overloaded
    (8, ECT_0, (0.4825, 0.4825), CE),
    (8, L4S, (0.9652,), L4S),
    (8, L4S, (0.9651,), CE),
    # p = 0.5544: overloaded, L has drops as well and is marked otherwise
    (9, CLASSIC, (0.5545,), CLASSIC),
    (9, CLASSIC, (0.5543, 0.5543), "dropped"),
    (9, ECT_0, (0.5545,), ECT_0),
    (9, ECT_0, (0.5543, 0.5545), ECT_0),
    (9, ECT_0, (0.5543, 0.5543), "dropped"),
    (9, L4S, (0.5545,), CE),
    (9, L4S, (0.5543, 0.5545), CE),
    (9, L4S, (0.5543, 0.5543), "dropped"),
    (9, CE, (0.5543, 0.5543), "dropped"),
]


@pytest.mark.parametrize(("updates", "ecn", "draws", "outcome"), DECISIONS)
def test_a_decision_is_the_one_worked_out_by_hand(
    updates: int, ecn: Ecn, draws: tuple[float, ...], outcome: Ecn | str
) -> None:
    is_l = ecn in (L4S, CE)
    is_dropped = outcome == "dropped"
    # The packet behind one that is dropped passes with one draw more.
    script = Script(*draws, *([0.999] if is_dropped else []))
    queue, now = waiting(updates, ecn, script)
    item = queue.dequeue(now)
    assert item is not None
    assert queue.p == pytest.approx(P_AFTER_UPDATES[updates], abs=1e-12)
    assert script.draws == []
    drops = (1, 0) if is_l else (0, 1)
    assert (queue.l_drops, queue.c_drops) == (drops if is_dropped else (0, 0))
    if is_dropped:
        assert item.data == bytes(4)
        assert queue.packets == 3
    else:
        assert (item.data, item.ecn) == (b"\0\0\0\1", outcome)
        assert queue.packets == 4
        marks = drops if outcome is CE and ecn is not CE else (0, 0)
        assert (queue.l_marks, queue.c_marks) == marks
    assert queue.drops == queue.l_drops + queue.c_drops
    assert queue.marks == queue.l_marks + queue.c_marks


@pytest.mark.parametrize("ecn", [CLASSIC, ECT_0, L4S])
def test_with_less_than_two_full_packets_left_nothing_is_marked_or_dropped(ecn: Ecn) -> None:
    queue = DualPi2(rng=Script())  # no draws
    put(queue, 0.0, packet(ECT_0, 100))
    now = 0.016 * OVERLOAD + 0.0005
    put(queue, now - 0.0001, packet(ecn, 100))
    put(queue, now - 0.0001, packet(ecn, 2899))
    out = [queue.dequeue(now) for _ in range(3)]
    assert [item.ecn for item in out if item is not None] == (
        [ecn, ecn, ECT_0] if ecn is L4S else [ECT_0, ecn, ecn]
    )
    assert queue.p > 0.5


def test_what_is_left_does_not_count_the_packet_in_hand() -> None:
    for behind, is_drawn in ((2999, False), (3000, True)):
        queue = DualPi2(rng=Script(*([0.999] if is_drawn else [])))
        put(queue, 0.0, packet(CLASSIC))
        put(queue, 0.0, packet(CLASSIC, behind))
        assert queue.dequeue(0.2) is not None


@pytest.mark.parametrize(
    ("bits_per_s", "step_s"), [(None, 0.001), (100e6, 0.001), (20e6, 0.0012), (2e6, 0.012)]
)
def test_the_step_is_two_packets_long_on_a_slow_link(
    bits_per_s: float | None, step_s: float
) -> None:
    queue = DualPi2(rng=random.Random(1), bits_per_s=bits_per_s)
    assert queue.step_s == pytest.approx(step_s)
    for waited, ecn in ((step_s - 1e-6, L4S), (step_s + 1e-6, CE)):
        put(queue, 5.0, packet(L4S))
        item = queue.dequeue(5.0 + waited)
        assert item is not None
        assert item.ecn is ecn
    assert queue.marks == 1


def test_a_packet_over_the_step_counts_as_one_mark() -> None:
    queue, _ = waiting(3, L4S, Script(0.0))
    item = queue.dequeue(0.062)  # 14 ms in L, and a draw that marks
    assert item is not None
    assert item.ecn is CE
    assert queue.marks == 1


@pytest.mark.parametrize(
    ("ecn", "is_l"), [(CLASSIC, False), (ECT_0, False), (L4S, True), (CE, True)]
)
def test_ect1_and_ce_go_to_l_the_rest_to_c(ecn: Ecn, is_l: bool) -> None:
    queue = DualPi2(rng=random.Random(1))
    put(queue, 0.0, packet(ecn))
    assert (queue.l_packets, queue.c_packets) == ((1, 0) if is_l else (0, 1))


def test_the_round_robin_gives_l_nine_packets_for_each_of_c() -> None:
    queue = DualPi2(rng=random.Random(1))
    for _ in range(20):
        put(queue, 0.0, packet(CLASSIC, label=0))
        put(queue, 0.0, packet(L4S, label=1))
    # Credit: -120,000, and 15,000 more for each L: the ninth finds 0 and leaves 15,000 to C,
    # which takes 135,000.
    assert labels(queue, 0.0) == ([1] * 9 + [0]) * 2 + [1] * 2 + [0] * 18


def test_the_round_robin_s_credit_counts_bytes_and_starts_anew_when_empty() -> None:
    queue = DualPi2(rng=random.Random(1))
    for _ in range(2):
        for _ in range(12):
            put(queue, 0.0, packet(L4S, 3000, label=1))
            put(queue, 0.0, packet(CLASSIC, 500, label=0))
        # -120,000 + 5 * 30,000 = 30,000; C takes 45,000: -15,000; one L: 15,000; C: -30,000;
        # two L (the second at 0): 30,000; and so on.
        assert labels(queue, 0.0)[:13] == [1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0]


def test_a_packet_that_is_dropped_costs_no_credit() -> None:
    # Overload; nine L packets are marked (one draw each), then C's first is dropped (two draws):
    # it is still C's turn.
    queue = DualPi2(rng=Script(*[0.9] * 9, 0.0, 0.0, 0.9, 0.9))
    now = 0.016 * OVERLOAD + 0.0005
    for label in range(6):
        put(queue, 0.0, packet(CLASSIC, label=label))
    for _ in range(10):
        put(queue, now, packet(L4S, label=100))
    out = [queue.dequeue(now) for _ in range(11)]
    order = [int.from_bytes(item.data, "big") for item in out if item is not None]
    assert order == [100] * 9 + [1, 100]
    assert queue.c_drops == 1


@pytest.mark.parametrize(
    ("l_entered_s", "order"), [(0.049, [1, 0]), (0.05, [1, 0]), (0.051, [0, 1])]
)
def test_the_time_shifted_scheduler_takes_l_as_if_it_had_waited_50_ms_longer(
    l_entered_s: float, order: list[int]
) -> None:
    queue = DualPi2(rng=random.Random(1), scheduler="time-shifted")
    put(queue, 0.0, packet(CLASSIC, label=0))
    put(queue, l_entered_s, packet(L4S, label=1))
    assert labels(queue, 0.06) == order


def test_the_limit_is_shared_by_both_queues() -> None:
    queue = DualPi2(rng=random.Random(1), limit_packets=3)
    assert [put(queue, 0.0, packet(ecn)) for ecn in (L4S, CLASSIC, L4S)] == [True] * 3
    assert [put(queue, 0.0, packet(ecn)) for ecn in (L4S, CLASSIC, CE)] == [False] * 3
    assert (queue.packets, queue.l_packets, queue.c_packets) == (3, 2, 1)
    assert (queue.drops, queue.l_drops, queue.c_drops) == (3, 2, 1)


def test_dequeue_may_find_nothing_but_packets_to_drop() -> None:
    queue = DualPi2(rng=Script(*[0.0] * 2))
    put(queue, 0.0, packet(CLASSIC))
    put(queue, 0.0, packet(CLASSIC, 3000))
    assert queue.dequeue(0.2) is not None  # the second, which is alone
    assert (queue.drops, queue.packets) == (1, 0)
    assert queue.dequeue(0.2) is None


@pytest.mark.parametrize(
    "options",
    [{"scheduler": "fifo"}, {"limit_packets": 0}, {"update_s": 0.0}, {"bits_per_s": 0.0}],
)
def test_it_refuses_what_makes_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"scheduler|limit"):
        DualPi2(rng=random.Random(1), **options)  # type: ignore[arg-type]


STEPS = st.lists(
    st.tuples(
        st.floats(0, 0.03),
        st.one_of(st.none(), st.tuples(st.sampled_from(Ecn), st.integers(40, 1500))),
    ),
    max_size=120,
)


@given(STEPS, st.integers(0, 1000), st.sampled_from(["wrr", "time-shifted"]))
def test_no_packet_is_lost_duplicated_or_reordered_within_its_queue(
    steps: list[tuple[float, tuple[Ecn, int] | None]], seed: int, scheduler: str
) -> None:
    queue = DualPi2(
        rng=random.Random(seed),
        scheduler=scheduler,  # type: ignore[arg-type]
        limit_packets=20,
    )
    now = 0.0
    entered: dict[int, Ecn] = {}
    out: list[int] = []
    for label, (gap_s, arrival) in enumerate(steps):
        now += gap_s
        if arrival is not None:
            ecn, size = arrival
            entered[label] = ecn
            put(queue, now, packet(ecn, size, label))
        elif queue.packets:
            item = queue.dequeue(now)
            if item is not None:
                label_out = int.from_bytes(item.data, "big")
                out.append(label_out)
                assert item.ecn in (entered[label_out], CE)
                assert item.ecn is entered[label_out] or entered[label_out] is not CLASSIC
        assert 0 <= queue.p <= 1
    out += labels(queue, now)
    assert len(set(out)) == len(out)
    assert len(out) + queue.drops == len(entered)
    for kind in ((L4S, CE), (CLASSIC, ECT_0)):
        of_kind = [label for label in out if entered[label] in kind]
        assert of_kind == sorted(of_kind)
