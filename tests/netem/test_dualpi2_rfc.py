"""DualPI2 decides as the pseudo-code of RFC 9332 (appendix A.1) does: tables worked out by hand.

In the RFC's words, with its example constants k = 2, p_Cmax = 1/4, p_Lmax = min(k sqrt(p_Cmax), 1)
= 1, for a packet taken by the scheduler when the controller is at p' (p_C = p'^2, p_CL = 2 p'):

    C:                     with p_C: drop if Not-ECT or p_C >= p_Cmax, else mark
    L, while p_CL < 1:     with max(p'_L, p_CL): mark; p'_L is 1 for a sojourn above 1 ms, else 0
    L, saturated:          with p_C: drop; else with p_CL: mark
    update:                p' += alpha (curq - target) + beta (curq - prevq), within 0 and 1

"with p" is `recur`, an accumulator that comes true in the share p of all calls. The shares below
are the RFC's; the test counts how many draws, of all on a grid, lead to each fate.

Where `DualPi2` follows Linux instead, a test whose name begins with `test_differs` pins both sides:

- draws are random, and p'^2 is two draws of p', where the RFC's `recur` spaces them evenly;
- the update takes the longer delay of both heads, the RFC's that of C;
- nothing is marked or dropped while less than 2 MTU is left;
- saturation begins above 2 p' = 1, in the RFC at it;
- the limit counts packets, in the RFC bytes.

Where the words differ, but not what comes of it: in saturation Linux marks all of L that it does
not drop, the RFC with p_CL >= 1; Linux gives up marking C when 2 p' > 1, the RFC when p_C >= 1/4.
"""

import random
from collections.abc import Iterable
from itertools import chain, repeat

import pytest

from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.packet import Ecn, Packet

NOT_ECT, ECT_0, ECT_1, CE = Ecn.NOT_ECT, Ecn.ECT_0, Ecn.ECT_1, Ecn.CE
MTU = 1500
FORWARD, MARK, DROP = "forward", "mark", "drop"

GRID = [0.05 + 0.1 * step for step in range(10)]
"The middles of ten equal parts: of all draws, the share p is below p if p is a multiple of 0.1."

FRESH_S, STALE_S = 0.0004, 0.0011
"Sojourn times in L, below and above the step of 1 ms."


class Script(random.Random):
    """Draws what it is told to, and then what lets a packet pass."""

    def __init__(self, draws: Iterable[float] = ()) -> None:
        super().__init__()
        self._draws = chain(draws, repeat(0.9999))

    def random(self) -> float:
        return next(self._draws)


def put(queue: DualPi2, now: float, ecn: Ecn, label: int = 0, size: int = MTU) -> bool:
    packet = Packet(bytes((label,)), size, ecn)
    packet.entered_s = now
    return queue.enqueue(now, packet)


def fate(p: float, ecn: Ecn, sojourn_s: float, draws: Iterable[float], *, behind: int = 4) -> str:
    """Return what becomes of one packet at p' = `p` with full packets of C `behind` it.

    Updates are 1 s apart and alpha is 0, so after a wait of 1 s the only update leaves
    p' = beta * 1.
    """
    queue = DualPi2(rng=Script(draws), alpha=0.0, beta=p, update_s=1.0)
    now = 1.0 + sojourn_s
    is_l = ecn in (ECT_1, CE)
    if not is_l:
        put(queue, 0.0, ecn, label=1)
    for _ in range(behind):
        put(queue, 0.0, NOT_ECT)
    if is_l:
        put(queue, 1.0, ecn, label=1)
    out = queue.dequeue(now)
    assert queue.p == p
    if out is None or out.data == b"\0":
        assert queue.drops
        return DROP
    return MARK if out.ecn is not ecn else FORWARD


def shares(p: float, ecn: Ecn, sojourn_s: float, *, behind: int = 4) -> dict[str, float]:
    """Return the share of each fate over all pairs of draws on the grid."""
    fates = [
        fate(p, ecn, sojourn_s, (first, second), behind=behind) for first in GRID for second in GRID
    ]
    return {name: fates.count(name) / len(fates) for name in (FORWARD, MARK, DROP)}


# p', what (C: Not-ECT and ECT(0); L: ECT(1) and CE), sojourn, (forward, mark, drop) by the RFC.
DECISIONS = [
    # p' = 0: p_C = 0, p_CL = 0; L's own AQM is the step alone.
    (0.0, NOT_ECT, FRESH_S, (1, 0, 0)),
    (0.0, ECT_0, FRESH_S, (1, 0, 0)),
    (0.0, ECT_1, FRESH_S, (1, 0, 0)),
    (0.0, ECT_1, STALE_S, (0, 1, 0)),  # max(1, 0) = 1
    # p' = 0.1: p_C = 0.1 * 0.1 = 0.01, p_CL = 2 * 0.1 = 0.2
    (0.1, NOT_ECT, FRESH_S, (0.99, 0, 0.01)),
    (0.1, ECT_0, FRESH_S, (0.99, 0.01, 0)),  # 0.01 < 1/4
    (0.1, ECT_1, FRESH_S, (0.8, 0.2, 0)),  # max(0, 0.2) = 0.2
    (0.1, ECT_1, STALE_S, (0, 1, 0)),  # max(1, 0.2) = 1
    # p' = 0.3: p_C = 0.09, p_CL = 0.6
    (0.3, NOT_ECT, FRESH_S, (0.91, 0, 0.09)),
    (0.3, NOT_ECT, STALE_S, (0.91, 0, 0.09)),  # C knows no step
    (0.3, ECT_0, STALE_S, (0.91, 0.09, 0)),
    (0.3, ECT_1, FRESH_S, (0.4, 0.6, 0)),
    (0.3, CE, FRESH_S, (1, 0, 0)),  # a mark on a mark changes nothing, and 0.6 < p_Lmax
    # p' = 0.4: p_C = 0.16, p_CL = 0.8
    (0.4, NOT_ECT, FRESH_S, (0.84, 0, 0.16)),
    (0.4, ECT_0, FRESH_S, (0.84, 0.16, 0)),
    (0.4, ECT_1, FRESH_S, (0.2, 0.8, 0)),
    # p' = 0.6: p_C = 0.36 >= 1/4, p_CL = 1.2 >= 1: saturated; ECT(0) is dropped as well,
    # L is dropped with 0.36, and what is left of it, 0.64, is marked with min(1.2, 1) = 1.
    (0.6, NOT_ECT, FRESH_S, (0.64, 0, 0.36)),
    (0.6, ECT_0, FRESH_S, (0.64, 0, 0.36)),
    (0.6, ECT_1, FRESH_S, (0, 0.64, 0.36)),
    (0.6, ECT_1, STALE_S, (0, 0.64, 0.36)),
    (0.6, CE, FRESH_S, (0.64, 0, 0.36)),
    # p' = 0.9: p_C = 0.81, p_CL = 1.8
    (0.9, ECT_0, FRESH_S, (0.19, 0, 0.81)),
    (0.9, ECT_1, FRESH_S, (0, 0.19, 0.81)),
    # p' = 1: p_C = 1, p_CL = 2: nothing passes while there is more behind it.
    (1.0, NOT_ECT, FRESH_S, (0, 0, 1)),
    (1.0, ECT_1, FRESH_S, (0, 0, 1)),
]


@pytest.mark.parametrize(("p", "ecn", "sojourn_s", "by_the_rfc"), DECISIONS)
def test_the_share_of_each_fate_is_the_rfc_s(
    p: float, ecn: Ecn, sojourn_s: float, by_the_rfc: tuple[float, float, float]
) -> None:
    forward, mark, drop = by_the_rfc
    expected = {FORWARD: forward, MARK: mark, DROP: drop}
    assert shares(p, ecn, sojourn_s) == pytest.approx(expected, abs=1e-12)


# p', what, sojourn, the draws of random(), and what the RFC's steps give when a draw below p' (C,
# and L when saturated; both needed) or 2 p' (L) stands for a `recur` that comes true.
STEPS = [
    # p' = 0.3, C: recur(cq, p_C) is two draws below 0.3.
    (0.3, NOT_ECT, FRESH_S, (0.29, 0.29), DROP),  # true, and Not-ECT: drop
    (0.3, NOT_ECT, FRESH_S, (0.29, 0.31), FORWARD),  # 0.31 > 0.3: false
    (0.3, NOT_ECT, FRESH_S, (0.31,), FORWARD),
    (0.3, ECT_0, FRESH_S, (0.29, 0.29), MARK),  # true, 0.09 < 1/4: mark
    (0.3, ECT_0, FRESH_S, (0.29, 0.31), FORWARD),
    # p' = 0.3, L: recur(lq, max(p'_L, 0.6)) is one draw below 0.6, or a sojourn above 1 ms.
    (0.3, ECT_1, FRESH_S, (0.59,), MARK),
    (0.3, ECT_1, FRESH_S, (0.61,), FORWARD),
    (0.3, ECT_1, STALE_S, (0.61,), MARK),
    # p' = 0.6, saturated: recur(lq, p_C) is two draws below 0.6; then p_CL = 1.2 marks for certain.
    (0.6, ECT_1, FRESH_S, (0.59, 0.59), DROP),
    (0.6, ECT_1, FRESH_S, (0.59, 0.61), MARK),
    (0.6, ECT_1, FRESH_S, (0.61,), MARK),
    (0.6, CE, FRESH_S, (0.59, 0.59), DROP),
    (0.6, ECT_0, FRESH_S, (0.59, 0.59), DROP),  # 0.36 >= 1/4
    (0.6, ECT_0, FRESH_S, (0.61,), FORWARD),
]


@pytest.mark.parametrize(("p", "ecn", "sojourn_s", "draws", "by_the_rfc"), STEPS)
def test_a_decision_follows_the_rfc_s_steps(
    p: float, ecn: Ecn, sojourn_s: float, draws: tuple[float, ...], by_the_rfc: str
) -> None:
    assert fate(p, ecn, sojourn_s, draws) == by_the_rfc


@pytest.mark.parametrize("ecn", [NOT_ECT, ECT_1])
def test_after_a_drop_the_next_packet_is_taken_as_the_rfc_s_loop_does(ecn: Ecn) -> None:
    queue = DualPi2(rng=Script((0.0, 0.0)), alpha=0.0, beta=0.6, update_s=1.0)
    for label in range(1, 7):
        put(queue, 0.0, ecn, label)
    out = queue.dequeue(1.0)
    assert out is not None
    assert (out.data, queue.drops, queue.packets) == (b"\2", 1, 4)


# The controller: target 15 ms, an update every 16 ms, alpha 0.16, beta 3.2; q is the sojourn of the
# head of C at the update.
CONTROLLER = [
    # q_s, p' after the update
    (0.016, 0.05136),  # 0 + 0.16 * (0.016 - 0.015) + 3.2 * (0.016 - 0) = 0.00016 + 0.0512
    (0.020, 0.06496),  # + 0.16 * 0.005 + 3.2 * 0.004 = 0.0008 + 0.0128
    (0.030, 0.09936),  # + 0.16 * 0.015 + 3.2 * 0.010 = 0.0024 + 0.032
    (0.015, 0.05136),  # + 0.16 * 0 + 3.2 * -0.015 = -0.048: on target, yet falling
    (0.005, 0.01776),  # + 0.16 * -0.010 + 3.2 * -0.010 = -0.0016 - 0.032
    (None, 0.0),  # empty, q = 0: + 0.16 * -0.015 + 3.2 * -0.005 = -0.0184, -0.00064 is cut to 0
    (0.010, 0.0312),  # + 0.16 * -0.005 + 3.2 * 0.010 = -0.0008 + 0.032
]


def controller_run(ecn: Ecn, rows: list[tuple[float | None, float]]) -> list[float]:
    """Return p' after each update, the head of one queue having waited as the rows say."""
    queue = DualPi2(rng=Script())
    found: list[float] = []
    entered: list[tuple[float, int]] = sorted(
        (round(0.016 * number - wait_s, 9), number)
        for number, (wait_s, _) in enumerate(rows, start=1)
        if wait_s is not None
    )
    for number in range(1, len(rows) + 1):
        update_s = 0.016 * number
        while entered and entered[0][0] < update_s:
            time_s, label = entered.pop(0)
            put(queue, time_s, ecn, label, size=40)
        waits = rows[number - 1][0] is not None
        assert queue.packets >= waits
        if waits:  # It leaves just after the update, which is made first.
            item = queue.dequeue(update_s + 1e-6)
            assert item is not None
            assert item.data == bytes((number,))
        else:
            put(queue, update_s + 1e-6, ecn, 0, size=40)
            queue.dequeue(update_s + 2e-6)
        found.append(queue.p)
    return found


def test_the_controller_goes_where_the_rfc_s_update_leads() -> None:
    found = controller_run(NOT_ECT, CONTROLLER)
    assert found == pytest.approx([p for _, p in CONTROLLER], abs=1e-9)


def test_the_controller_ends_at_one() -> None:
    queue = DualPi2(rng=Script())
    put(queue, 0.0, NOT_ECT)
    put(queue, 0.016 * 25 + 0.001, NOT_ECT)
    # q = n * 16 ms at update n. The sum of 0.16 (q - 0.015) up to n = 15 is 0.16 * (0.016 * 120 -
    # 0.225) = 0.2712, that of 3.2 * (q - q before) is 3.2 * 0.24 = 0.768: 1.0392 is cut to 1.
    assert queue.p == 1.0


# Enqueueing: ecn mod 2 = 1 goes to L.
@pytest.mark.parametrize("ecn", list(Ecn))
def test_a_packet_goes_to_the_queue_that_the_rfc_s_modulo_names(ecn: Ecn) -> None:
    queue = DualPi2(rng=Script())
    put(queue, 0.0, ecn)
    assert (queue.l_packets, queue.c_packets) == ((1, 0) if ecn % 2 == 1 else (0, 1))


# Time-shifted FIFO with a shift of 50 ms: L is next if lq.time() + 50 ms >= cq.time().
SCHEDULER = [
    # time of L's head in ms, of C's, which is next
    (0, 49, "L"),  # 50 >= 49
    (0, 50, "L"),  # 50 >= 50
    (0, 51, "C"),  # 50 < 51
    (10, 60, "L"),  # 60 >= 60
    (10, 61, "C"),
    (61, 10, "L"),
    (0, None, "L"),
    (None, 0, "C"),
]


@pytest.mark.parametrize(("l_ms", "c_ms", "following"), SCHEDULER)
def test_the_time_shifted_scheduler_picks_as_the_rfc_s(
    l_ms: int | None, c_ms: int | None, following: str
) -> None:
    queue = DualPi2(rng=Script(), scheduler="time-shifted", time_shift_s=50 / 1024)
    heads = [
        (wait_ms, ecn) for wait_ms, ecn in ((l_ms, ECT_1), (c_ms, NOT_ECT)) if wait_ms is not None
    ]
    for wait_ms, ecn in sorted(heads, reverse=True):
        put(queue, 2 - wait_ms / 1024, ecn, size=40)  # in 1/1024 s, which floats have exactly
    queue.dequeue(2.0)
    left = (queue.l_packets, queue.c_packets)
    assert left == ((0, len(heads) - 1) if following == "L" else (len(heads) - 1, 0))


# Where it follows Linux instead; each pins both sides.


def test_differs_draws_are_random_where_the_rfc_spaces_them() -> None:
    # The RFC at p_C = 0.36: the counter goes 0.36, 0.72, 1.08 -> true; 0.44, 0.80, 1.16 -> true.
    count, recur = 0.0, []
    for _ in range(6):
        count += 0.36
        recur.append(count > 1)
        count -= count > 1
    assert recur == [False, False, True, False, False, True]
    # Here two in a row are dropped if the draws say so; the third is marked, for it is of L.
    queue = DualPi2(rng=Script((0.1, 0.1, 0.1, 0.1)), alpha=0.0, beta=0.6, update_s=1.0)
    for label in range(1, 7):
        put(queue, 0.0, ECT_1, label)
    out = queue.dequeue(1.0)
    assert out is not None
    assert (out.data, out.ecn, queue.l_drops) == (b"\3", CE, 2)


def test_differs_the_delay_of_l_drives_the_controller_too() -> None:
    # The RFC: cq.time() is 0 throughout, so p' += 0.16 * -0.015, cut to 0. Here it is as with C.
    by_the_rfc = [0.0] * len(CONTROLLER)
    found = controller_run(ECT_1, CONTROLLER)
    assert found == pytest.approx([p for _, p in CONTROLLER], abs=1e-9)
    assert found != by_the_rfc


@pytest.mark.parametrize(
    ("ecn", "by_the_rfc"),
    [(NOT_ECT, (0.64, 0, 0.36)), (ECT_0, (0.64, 0, 0.36)), (ECT_1, (0, 0.64, 0.36))],
)
def test_differs_nothing_is_dropped_or_marked_when_less_than_two_packets_are_left(
    ecn: Ecn, by_the_rfc: tuple[float, float, float]
) -> None:
    assert tuple(shares(0.6, ecn, FRESH_S).values()) == pytest.approx(by_the_rfc)
    assert shares(0.6, ecn, FRESH_S, behind=1) == {FORWARD: 1, MARK: 0, DROP: 0}


@pytest.mark.parametrize(
    ("ecn", "by_the_rfc", "by_linux"),
    [
        # p' = 0.5: p_C = 0.25 >= 1/4 and p_CL = 1 >= 1; Linux asks for 2 p' > 1.
        (ECT_0, (0.75, 0, 0.25), (0.75, 0.25, 0)),
        (ECT_1, (0, 0.75, 0.25), (0, 1, 0)),
    ],
)
def test_differs_saturation_begins_above_one_half(
    ecn: Ecn, by_the_rfc: tuple[float, float, float], by_linux: tuple[float, float, float]
) -> None:
    # Grid draws below 0.5 are five of ten: 0.25 of all pairs.
    found = tuple(shares(0.5, ecn, FRESH_S).values())
    assert found == pytest.approx(by_linux)
    assert found != pytest.approx(by_the_rfc)


def test_differs_the_limit_counts_packets() -> None:
    # The RFC, limit = 3 MTU: 3 packets of 100 bytes leave 300 + 1500 <= 4500, so a fourth fits;
    # 2 of 1600 bytes do not let a third in: 3200 + 1500 > 4500.
    small, large = (DualPi2(rng=Script(), limit_packets=3) for _ in range(2))
    assert [put(small, 0.0, NOT_ECT, size=100) for _ in range(4)] == [True, True, True, False]
    assert [put(large, 0.0, NOT_ECT, size=1600) for _ in range(3)] == [True, True, True]
