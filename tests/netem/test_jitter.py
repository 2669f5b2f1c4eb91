"""Jitter in order is a function of time: the same for all senders, however densely they send."""

import random
from itertools import pairwise
from statistics import correlation, fmean, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_netem.jitter import JitterInOrder
from eloquent_netem.link import Link
from eloquent_netem.packet import Packet

LENGTH_S = 30.0


def delays(link: Link, packets_per_s: int, origin_s: float = 0.0) -> dict[float, float]:
    """Return when packets were sent, in seconds from the origin on, and how long each took."""
    for index in range(round(LENGTH_S * packets_per_s)):
        link.send(origin_s + index / packets_per_s, Packet(b"", 100))
    found = {}
    while (time := link.next_time()) is not None:
        for packet in link.poll(time):
            found[round(packet.entered_s - origin_s, 9)] = time - packet.entered_s
    return found


def jittery(seed: int, jitter_s: float, *, origin_s: float = 0.0) -> Link:
    return Link(delay_s=0.05, seed=seed, name="down", jitter_s=jitter_s, origin_s=origin_s)


@pytest.mark.parametrize("jitter_s", [0.15, 0.02, 0.0005])
def test_the_mean_delay_does_not_depend_on_how_densely_one_sends(jitter_s: float) -> None:
    sparse, dense = (
        [fmean(delays(jittery(seed, jitter_s), pace).values()) - 0.05 for seed in range(4)]
        for pace in (20, 2000)
    )
    assert fmean(sparse) == pytest.approx(fmean(dense), rel=0.03)
    assert fmean(dense) == pytest.approx(jitter_s / 2, rel=0.05)


def test_at_an_instant_the_delay_is_the_same_for_every_sender() -> None:
    sparse, dense = (delays(jittery(3, 0.05), pace) for pace in (20, 1000))
    assert len(sparse) == 600
    assert all(dense[time] == pytest.approx(took, abs=1e-12) for time, took in sparse.items())
    assert len({round(took, 6) for took in sparse.values()}) > 500


def test_it_runs_on_the_clock_of_the_run() -> None:
    plain = delays(jittery(3, 0.05), 20)
    late = delays(jittery(3, 0.05, origin_s=100.0), 20, origin_s=100.0)
    assert late == pytest.approx(plain, abs=1e-9)


def test_another_seed_has_another_delay() -> None:
    assert delays(jittery(3, 0.05), 20) != delays(jittery(4, 0.05), 20)


@given(st.integers(0, 1000), st.sampled_from([1e-5, 0.0008, 0.004, 0.15]), st.floats(1e-5, 0.01))
def test_it_stays_within_its_bounds_and_keeps_the_order(
    seed: int, most_s: float, gap_s: float
) -> None:
    jitter = JitterInOrder(most_s, random.Random(seed))
    times = [index * gap_s for index in range(-20, 300)]
    found = [jitter.at(time) for time in times]
    assert all(0 <= delay <= most_s for delay in found)
    arrivals = [time + delay for time, delay in zip(times, found, strict=True)]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(arrivals))


def test_it_is_uniform_at_each_instant() -> None:
    # In the first slot, at a slot's begin and within one; 2000 seeds.
    for time in (0.0, 0.013, 0.5, 0.513):
        found = [JitterInOrder(0.02, random.Random(seed)).at(time) for seed in range(2000)]
        tenths = quantiles(found, n=10)
        assert tenths == pytest.approx([0.002 * part for part in range(1, 10)], abs=0.0012)


def test_it_has_forgotten_itself_after_a_slot_and_not_before() -> None:
    jitter = JitterInOrder(0.02, random.Random(1))
    found = [jitter.at(index * 0.002) for index in range(50_000)]
    assert correlation(found[1:], found[:-1]) > 0.9  # a tenth of a slot
    assert abs(correlation(found[20:], found[:-20])) < 0.05  # two slots


def test_how_often_one_asks_changes_nothing() -> None:
    often, seldom = (JitterInOrder(0.02, random.Random(1)) for _ in range(2))
    answers = {time: often.at(time) for time in (index / 1000 for index in range(5000))}
    for time in (0.7, 0.701, 4.999):
        assert seldom.at(time) == answers[time]


def test_before_the_scenario_s_clock_begins_it_stands_still() -> None:
    jitter = JitterInOrder(0.02, random.Random(1))
    assert jitter.at(-3.0) == jitter.at(-0.001) == jitter.at(0.0)
    assert jitter.at(0.001) != jitter.at(0.0)


def test_a_copy_comes_right_behind_its_packet_and_delays_nothing() -> None:
    single, double = (
        Link(delay_s=0.05, seed=3, name="down", jitter_s=0.05, duplicates=duplicates)
        for duplicates in (0.0, 1.0)
    )
    assert delays(single, 200) == delays(double, 200)


def test_jitter_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0 s, not -1"):
        JitterInOrder(-1, random.Random(1))
