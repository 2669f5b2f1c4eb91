"""Each rate serves what it says, when it says, through a link too."""

import math
import random
from collections.abc import Iterator
from itertools import accumulate, count, takewhile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_netem.errors import NetemError
from eloquent_netem.link import Link
from eloquent_netem.packet import Packet
from eloquent_netem.rate import (
    OPPORTUNITY_BYTES,
    FixedRate,
    PausedRate,
    Rate,
    SteppedRate,
    TraceRate,
    UnlimitedRate,
    load_trace,
)

traces = st.lists(st.integers(0, 60), min_size=1, max_size=12).map(sorted).filter(lambda ms: ms[-1])
spans = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 60)).map(
        lambda pair: (pair[0] / 1000, sum(pair) / 1000)
    ),
    max_size=4,
)
packets = st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 4000)), max_size=30)
"Pauses before packets, in seconds, and sizes."


def served(rate: Rate, sends: list[tuple[float, int]]) -> list[float]:
    """Return in seconds when packets, each (when it comes, size), leave through a link."""
    link = Link(delay_s=0.0, seed=1, name="down", rate=rate)
    for index, (time, size) in enumerate(sends):
        link.send(time, Packet(index.to_bytes(4, "big"), size))
    times: dict[int, float] = {}
    while (next_time := link.next_time()) is not None:
        for packet in link.poll(next_time):
            times[int.from_bytes(packet.data, "big")] = next_time
    return [times[index] for index in range(len(sends))]


def in_ms(times: list[float]) -> list[float]:
    return [round(1000 * time, 6) for time in times]


def backlog(packets: int, size: int = 1500, start_s: float = 0.0) -> list[tuple[float, int]]:
    return [(start_s, size)] * packets


def after(pauses: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Turn pauses before packets into times."""
    now, sends = 0.0, []
    for pause, size in pauses:
        now += pause
        sends.append((now, size))
    return sends


def test_an_unlimited_rate_takes_no_time() -> None:
    assert served(UnlimitedRate(), backlog(3, start_s=2.0)) == [2.0] * 3


def test_a_fixed_rate_takes_time_by_size() -> None:
    times = served(FixedRate(12_000), [(0.0, 1500), (0.0, 750), (5.0, 75)])
    assert times == pytest.approx([1.0, 1.5, 5.05])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0 bit/s"):
        FixedRate(rate)


def test_full_packets_leave_at_the_trace_s_milliseconds() -> None:
    assert in_ms(served(TraceRate([0, 3, 3, 7, 12]), backlog(5))) == [0, 3, 3, 7, 12]


def test_a_trace_starts_over_at_its_last_millisecond() -> None:
    # As in mahimahi: what is at 0 comes at the instant of what is last.
    times = in_ms(served(TraceRate([0, 3, 10]), backlog(9)))
    assert times == [0, 3, 10, 10, 13, 20, 20, 23, 30]
    assert in_ms(served(TraceRate([3, 10]), backlog(5))) == [3, 10, 13, 20, 23]


def test_a_packet_that_comes_at_an_opportunity_takes_it_and_a_later_one_waits() -> None:
    sends = [(0.003, 1500), (0.0031, 1500)]
    assert in_ms(served(TraceRate([0, 3, 7]), sends)) == [3, 7]


def test_opportunities_that_nobody_uses_are_lost() -> None:
    rate = TraceRate([1, 2, 3, 4, 5, 50, 60])
    assert in_ms(served(rate, backlog(3, start_s=0.0045))) == [5, 50, 60]


def test_small_packets_share_an_opportunity() -> None:
    assert in_ms(served(TraceRate([5, 9, 20]), backlog(7, size=500))) == [5] * 3 + [9] * 3 + [20]


def test_a_packet_may_begin_at_one_opportunity_and_end_at_the_next() -> None:
    assert in_ms(served(TraceRate([5, 9, 20]), backlog(4, size=1000))) == [5, 9, 9, 20]
    assert in_ms(served(TraceRate([5, 9, 20]), backlog(1, size=4000))) == [20]


def test_bytes_left_of_an_opportunity_are_lost_when_its_instant_is_over() -> None:
    sends = [(0.0, 500), (0.006, 1500), (0.006, 1500)]
    assert in_ms(served(TraceRate([5, 9, 20]), sends)) == [5, 9, 20]


def test_bytes_left_of_an_opportunity_serve_who_comes_at_its_instant() -> None:
    link = Link(delay_s=0.0, seed=1, name="down", rate=TraceRate([5, 9]))
    link.send(0.0, Packet(b"a", 500))
    assert [packet.data for packet in link.poll(0.005)] == [b"a"]
    link.send(0.005, Packet(b"b", 1000))
    link.send(0.005, Packet(b"c", 1))
    assert [packet.data for packet in link.poll(0.005)] == [b"b"]
    assert link.next_time() == 0.009


def test_an_opportunity_s_bytes_can_be_set() -> None:
    assert in_ms(served(TraceRate([5, 9, 20], packet_bytes=100), backlog(3, size=100))) == [
        5,
        9,
        20,
    ]


def test_the_throughput_of_a_full_link_is_the_trace_s() -> None:
    rng = random.Random(1)
    times_ms = [*sorted(rng.randrange(2000) for _ in range(800)), 2000]
    left = served(TraceRate(times_ms), backlog(5000, size=1200))
    for round_ms in (2000, 4000, 6000):
        by_then = sum(time <= round_ms / 1000 for time in left)
        assert by_then == round_ms // 2000 * 801 * 1500 // 1200


def test_a_trace_goes_on_for_hours() -> None:
    rate = TraceRate([0, 400, 1000])
    for hour in range(1, 10):
        assert rate.ready_from(hour * 3600 - 0.5) == hour * 3600
        assert rate.serve(hour * 3600.0, 1500) == (hour * 3600, 0)
        assert rate.ready_from(hour * 3600 + 0.0001) == pytest.approx(hour * 3600 + 0.4)


@given(traces, packets)
def test_departures_never_go_back_and_never_exceed_the_capacity(
    times_ms: list[int], pauses: list[tuple[float, int]]
) -> None:
    sends = after(pauses)
    left = served(TraceRate(times_ms), sends)
    assert left == sorted(left)
    assert left == pytest.approx(by_hand(times_ms, sends), abs=1e-9)
    sent_bytes = list(accumulate(size for _, size in sends))
    for (came, _), time, total in zip(sends, left, sent_bytes, strict=True):
        assert time >= came
        passed = takewhile(lambda ms: ms / 1000 <= time, opportunities(times_ms))  # noqa: B023
        assert 1500 * len(list(passed)) >= total


def opportunities(times_ms: list[int]) -> Iterator[int]:
    return (turn * times_ms[-1] + ms for turn in count() for ms in times_ms)


def by_hand(times_ms: list[int], sends: list[tuple[float, int]]) -> list[float]:
    """Go through all opportunities and give each's bytes to who waits."""
    waiting: list[list[float]] = [list(send) for send in sends]
    left: list[float] = []
    for ms in opportunities(times_ms):
        if not waiting:
            break
        budget = 1500.0
        while waiting and budget and waiting[0][0] <= ms / 1000:
            taken = min(budget, waiting[0][1])
            budget -= taken
            waiting[0][1] -= taken
            if not waiting[0][1]:
                waiting.pop(0)
                left.append(ms / 1000)
    return left


@pytest.mark.parametrize("times_ms", [[], [0], [0, 0], [-1, 3], [3, 2]])
def test_what_is_no_trace_is_refused(times_ms: list[int]) -> None:
    with pytest.raises(ValueError, match="a trace"):
        TraceRate(times_ms)


def test_an_opportunity_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="1 byte or more"):
        TraceRate([1], packet_bytes=0)


def test_a_pause_holds_what_waits() -> None:
    rate = PausedRate(UnlimitedRate(), [(1.0, 2.0), (2.0, 2.5)])
    sends = [(0.9, 100), (1.0, 100), (1.7, 100), (2.5, 100), (3.0, 100)]
    assert served(rate, sends) == [0.9, 2.5, 2.5, 2.5, 3.0]


def test_a_trace_goes_on_during_a_pause() -> None:
    rate = PausedRate(TraceRate([0, 3, 5, 7, 12]), [(0.003, 0.007)])
    assert in_ms(served(rate, backlog(4))) == [0, 7, 12, 12]


def test_what_a_pause_interrupts_goes_on_after_it() -> None:
    # One packet a second: the second is half through at 1.5 s.
    rate = PausedRate(FixedRate(12_000), [(1.5, 4.0)])
    assert served(rate, backlog(3)) == pytest.approx([1.0, 4.5, 5.5])
    at_its_end = PausedRate(FixedRate(12_000), [(1.0, 3.0)])
    assert served(at_its_end, backlog(2)) == pytest.approx([3.0, 4.0])
    # At 5 the first and half of the second pass, at 20 its other half and the third.
    split = PausedRate(TraceRate([5, 9, 20]), [(0.006, 0.010)])
    assert in_ms(served(split, backlog(3, size=1000))) == [5, 20, 20]
    outer = PausedRate(PausedRate(FixedRate(12_000), [(1.0, 3.0)]), [(2.0, 3.0)])
    assert served(outer, backlog(1, start_s=0.25)) == pytest.approx([3.25])
    both = PausedRate(PausedRate(FixedRate(12_000), [(1.0, 3.0)]), [(1.0, 2.0), (3.0, 4.0)])
    assert served(both, backlog(1, start_s=0.5)) == pytest.approx([4.5])
    nested = PausedRate(PausedRate(FixedRate(12_000), [(2.5, 3.0)]), [(0.5, 1.0)])
    assert served(nested, backlog(2)) == pytest.approx([1.5, 2.5 + 0.5])


def test_a_packet_that_takes_longer_than_the_time_between_pauses_gets_through() -> None:
    # 12 s of service at 1000 bit/s, and every 2 s a pause of 100 ms: five within the first 12 s,
    # whose 0.5 s are made up for after them (the sixth is at 12 s, so 0.6 s).
    rate = PausedRate(FixedRate(1000), [(2.0 * k, 2.0 * k + 0.1) for k in range(1, 1000)])
    assert served(rate, backlog(1)) == pytest.approx([12.6])
    # An opportunity each 10 ms for a packet of five, and a pause every 30 ms that takes one.
    pauses = [(0.03 * k - 0.001, 0.03 * k + 0.001) for k in range(1, 1000)]
    trace = PausedRate(TraceRate([10]), pauses)
    assert in_ms(served(trace, backlog(2, size=7500))) == [70, 140]


def test_a_rate_of_steps_serves_each_part_of_a_packet_at_its_rate() -> None:
    # 1500 bytes take 1 s, from 1.5 s on 2 s, and from 4.5 s on 0.5 s.
    rate = SteppedRate([(0.0, 12_000), (1.5, 6_000), (4.5, 24_000)])
    assert served(rate, backlog(5)) == pytest.approx([1.0, 2.5, 4.5, 5.0, 5.5])
    assert served(rate, [(1.0, 1500), (10.0, 3000)]) == pytest.approx([2.5, 11.0])
    long = SteppedRate([(0.0, 12_000), (1.0, 6_000), (2.0, 12_000)])
    assert served(long, backlog(1, size=4500)) == pytest.approx([3.5])
    assert [rate.bits_per_s(now) for now in (0, 1.4, 1.5, 4.4, 4.5, 99)] == pytest.approx(
        [12_000, 12_000, 6_000, 6_000, 24_000, 24_000]
    )
    assert rate.greatest_bits_per_s == 24_000


def test_a_rate_of_steps_may_be_interrupted() -> None:
    rate = PausedRate(SteppedRate([(0.0, 12_000), (1.5, 6_000)]), [(1.25, 2.0)])
    # The second packet: a quarter by 1.25, nothing at the better rate after, the rest from 2 on.
    assert served(rate, backlog(2)) == pytest.approx([1.0, 3.5])
    assert SteppedRate([(0.0, 12_000)]).serve(0.0, 1500, 0.25) == (0.25, 1125)


@pytest.mark.parametrize("steps", [[], [(0.0, 1.0), (0.0, 2.0)], [(0.0, 0.0)]])
def test_steps_without_order_or_rate_are_refused(steps: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="rate"):
        SteppedRate(steps)


def test_the_present_rate_of_a_trace_is_that_of_the_last_200_ms() -> None:
    rate = TraceRate([100, 150, 200, 200, 1000])
    packet = OPPORTUNITY_BYTES * 8 / 0.2
    # At 0.305 s that at 100 ms is over; at 0.5 all are: one is the least. At 1.155 s there are
    # those at 1000, 1100 and 1150 ms.
    for now, passed in ((0.0, 4), (0.2, 4), (0.305, 3), (0.395, 2), (0.5, 1), (1.0, 1), (1.155, 3)):
        assert rate.bits_per_s(now) == pytest.approx(passed * packet), now
    assert rate.mean_bits_per_s == pytest.approx(5 * OPPORTUNITY_BYTES * 8)
    assert rate.ready_from(0.0) == 0.1  # To ask changes nothing.


def test_the_present_rate_of_others() -> None:
    assert FixedRate(3e6).bits_per_s(7.0) == pytest.approx(3e6)
    assert PausedRate(FixedRate(3e6), [(1.0, 2.0)]).bits_per_s(1.5) == pytest.approx(3e6)
    assert UnlimitedRate().bits_per_s(0.0) == math.inf


def test_a_pause_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        PausedRate(UnlimitedRate(), [(2.0, 1.0)])


@given(traces, spans, spans, packets, st.booleans())
def test_pauses_in_pauses_are_as_all_of_them_at_once(
    times_ms: list[int],
    first_s: list[tuple[float, float]],
    second_s: list[tuple[float, float]],
    pauses: list[tuple[float, int]],
    is_fixed: bool,
) -> None:
    def inner() -> Rate:
        return FixedRate(3e6) if is_fixed else TraceRate(times_ms)

    sends = after(pauses)
    nested = PausedRate(PausedRate(inner(), first_s), second_s)
    at_once = PausedRate(inner(), first_s + second_s)
    assert served(nested, sends) == pytest.approx(served(at_once, sends), abs=1e-9)


@given(traces, spans, packets, st.booleans())
def test_nothing_leaves_in_a_pause_and_none_makes_the_link_faster(
    times_ms: list[int],
    spans_s: list[tuple[float, float]],
    pauses: list[tuple[float, int]],
    is_fixed: bool,
) -> None:
    def inner() -> Rate:
        return FixedRate(3e6) if is_fixed else TraceRate(times_ms)

    sends = after(pauses)
    left = served(PausedRate(inner(), spans_s), sends)
    assert left == sorted(left)
    assert not any(start <= time < stop for time in left for start, stop in spans_s)
    free = served(inner(), sends)
    assert all(time >= sooner for time, sooner in zip(left, free, strict=True))


def test_a_trace_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.down"
    path.write_bytes(b"0\n0\r\n 7\n12")
    assert load_trace(path) == [0, 0, 7, 12]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"1\n\n3\n", 2, "'' is no millisecond"),
        (b"1\n2.5\n", 2, "'2.5' is no millisecond"),
        (b"1\n2\n-3\n", 3, "'-3' is no millisecond"),
        (b"1\n\xff\n", 2, r"'\\xff' is no millisecond"),
        (b"1\n5\n4\n", 3, "4 comes after 5"),
        (b"0\n0\n", 2, "above 0"),
        (b"", 0, "above 0"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_name_and_line(
    tmp_path: Path, content: bytes, line: int, reason: str
) -> None:
    path = tmp_path / "b.down"
    path.write_bytes(content)
    with pytest.raises(NetemError, match=rf"b\.down, line {line}: .*{reason}"):
        load_trace(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NetemError, match=r"c\.down cannot be read: No such file"):
        load_trace(tmp_path / "c.down")
