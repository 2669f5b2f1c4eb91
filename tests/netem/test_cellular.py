"""The synthetic cellular link is a trace, the same per seed, and resembles recordings."""

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import correlation, fmean, median, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent_netem.cellular import synthetic_cellular
from eloquent_netem.link import Link
from eloquent_netem.packet import Packet
from eloquent_netem.rate import TraceRate, load_trace

RECORDINGS = Path(__file__).parents[3] / "shared" / "traces"
NAMES = (
    "ATT-LTE-driving-2016.down",
    "ATT-LTE-driving-2016.up",
    "TMobile-UMTS-driving.down",
    "TMobile-UMTS-driving.up",
    "Verizon-LTE-short.down",
    "Verizon-LTE-short.up",
    "nyc-taxi3.down",
    "nyc-timessquare-3204803.down",
)

IN_A_PROCESS = """
from eloquent_netem.cellular import synthetic_cellular
from eloquent_netem.link import stage_rng
rng = stage_rng(7, "down", "rate")
print(synthetic_cellular(rng=rng, mean_bits_per_s=1e6, length_s=20, stall_share=0.1))
"""


def synthetic(
    seed: int, mean_bits_per_s: float = 5e6, length_s: float = 120.0, **options: float
) -> list[int]:
    rng = random.Random(seed)
    return synthetic_cellular(
        rng=rng, mean_bits_per_s=mean_bits_per_s, length_s=length_s, **options
    )


def bits_per_s(times_ms: list[int]) -> float:
    return len(times_ms) * 1500 * 8 / (times_ms[-1] / 1000)


def long_gaps(times_ms: list[int]) -> list[int]:
    """Return in milliseconds the gaps over 200 ms."""
    return [gap for before, after in pairwise(times_ms) if (gap := after - before) > 200]


def long_share(times_ms: list[int]) -> float:
    return sum(long_gaps(times_ms)) / times_ms[-1]


def longest(times_ms: list[int]) -> float:
    return max(after - before for before, after in pairwise(times_ms))


def by_second(times_ms: list[int]) -> list[int]:
    counts = Counter(ms // 1000 for ms in times_ms)
    return [counts[second] for second in range(times_ms[-1] // 1000)]


def variation(times_ms: list[int]) -> float:
    """Return the coefficient of variation of the rate, second by second."""
    return pstdev(by_second(times_ms)) / fmean(by_second(times_ms))


def persistence(times_ms: list[int]) -> float:
    """Return how much a second's rate is like that of the second before."""
    counts = by_second(times_ms)
    return correlation(counts[:-1], counts[1:])


@given(
    st.integers(0, 10_000),
    st.floats(1e4, 2e7),
    st.floats(0.5, 70),
    st.floats(0, 0.3),
    st.floats(1, 8),
)
@settings(max_examples=15, deadline=None)
def test_it_is_a_trace_of_the_length_asked_for(
    seed: int, mean: float, length_s: float, stall_share: float, grant_packets: float
) -> None:
    times_ms = synthetic(seed, mean, length_s, stall_share=stall_share, grant_packets=grant_packets)
    TraceRate(times_ms)
    assert times_ms[-1] == round(length_s * 1000)


@pytest.mark.parametrize("stall_share", [0.0, 0.1])
@pytest.mark.parametrize("mean", [0.5e6, 5e6, 20e6])
def test_its_mean_rate_is_the_one_asked_for_stalls_included(
    mean: float, stall_share: float
) -> None:
    times_ms = synthetic(3, mean, stall_share=stall_share)
    # Grants of 1.5 packets in the mean: counts deviate by sqrt(2 n); 4 deviations.
    assert bits_per_s(times_ms) == pytest.approx(mean, rel=4 * (2 / len(times_ms)) ** 0.5)


def test_a_short_trace_is_the_beginning_of_a_minute() -> None:
    assert synthetic(3, length_s=10.0)[:-1] == [
        ms for ms in synthetic(3, length_s=60.0) if ms < 1e4
    ]


def test_a_seed_gives_the_same_trace_and_another_another() -> None:
    assert synthetic(1) == synthetic(1) != synthetic(2)


def test_a_seed_gives_the_same_trace_in_every_process() -> None:
    traces = {
        subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "4242")
    }
    assert len(traces) == 1
    assert len(traces.pop()) > 1000


def test_stalls_take_their_share_of_the_time_and_are_as_long_as_asked() -> None:
    # A fast link, so that gaps over 200 ms are stalls; those have a shortest of 0.56 s here.
    times_ms = synthetic(2, 20e6, 1000.0, stall_share=0.2, stall_s=1.0)
    assert long_share(times_ms) == pytest.approx(0.2, abs=0.04)
    assert fmean(long_gaps(times_ms)) == pytest.approx(1000, rel=0.2)
    share_over_1_s = fmean(gap > 1000 for gap in long_gaps(times_ms))
    assert share_over_1_s == pytest.approx(0.56**2.27, abs=0.08)
    assert long_gaps(synthetic(2, 50e6, 100.0, stall_share=0.0)) == []


def test_the_capacity_is_bounded_and_wanders_from_second_to_second() -> None:
    # Uniform between 0 and twice the mean in the long run: a coefficient of 1 / sqrt(3).
    times_ms = synthetic(4, 5e6, 1000.0, stall_share=0.0)
    assert variation(times_ms) == pytest.approx(3**-0.5, abs=0.06)
    assert max(by_second(times_ms)) < 2.6 * fmean(by_second(times_ms))
    assert persistence(times_ms) > 0.8
    hasty = synthetic(4, 5e6, 1000.0, stall_share=0.0, wander=2.0)
    assert persistence(hasty) < 0.3


def test_grants_shift_neither_the_capacity_nor_the_stalls() -> None:
    single, several = synthetic(5, grant_packets=1.0), synthetic(5, grant_packets=4.0)
    assert correlation(by_second(single), by_second(several)) > 0.95
    assert correlation(by_second(single), by_second(synthetic(6, grant_packets=1.0))) < 0.5
    assert max(Counter(several).values()) > 2 * max(Counter(single).values())


def test_a_full_link_passes_what_the_trace_offers() -> None:
    times_ms = synthetic(7, 2e6, 20.0)
    link = Link(delay_s=0.0, seed=1, name="down", rate=TraceRate(times_ms))
    for _ in range(2 * len(times_ms)):
        link.send(0.0, Packet(b"", 1500))
    assert len(link.poll(20.0)) == len(times_ms)
    assert len(link.poll(40.0)) == len(times_ms)


@pytest.mark.parametrize(
    "options",
    [
        {"mean_bits_per_s": 0.0},
        {"length_s": 0.0},
        {"length_s": float("inf")},
        {"wander": float("nan")},
        {"stall_share": 1.0},
        {"stall_share": -0.1},
        {"stall_s": 0.0},
        {"grant_packets": 0.9},
        {"stall_share": 1 - 1e-12, "stall_s": 10.0},
    ],
)
def test_impossible_values_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"mean_bits|length_s|wander|stall|grant_packets"):
        synthetic(1, **options)


@pytest.mark.parametrize("name", NAMES)
def test_it_resembles_a_recording(name: str) -> None:
    path = RECORDINGS / name
    if not path.exists():
        pytest.skip(f"the recorded traces are not here: no {path}")
    recorded = load_trace(path)
    made = [
        synthetic(
            seed,
            bits_per_s(recorded),
            recorded[-1] / 1000,
            stall_share=long_share(recorded),
            stall_s=fmean(long_gaps(recorded)) / 1000,
        )
        for seed in range(5)
    ]

    def typical(figure: Callable[[list[int]], float]) -> float:
        return median(figure(times_ms) for times_ms in made)

    assert typical(bits_per_s) == pytest.approx(bits_per_s(recorded), rel=0.02)
    assert 1 / 1.8 < typical(long_share) / long_share(recorded) < 1.8
    assert 1 / 3 < typical(longest) / longest(recorded) < 3
    assert typical(variation) == pytest.approx(variation(recorded), abs=0.26)
