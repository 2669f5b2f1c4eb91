"""Padding: the sizes alone, and on the wire between both real QUIC ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent.core.padding import HOLD_S, SIZES, SLOT_S, Padding

PACKETS = st.integers(1, 1200)
RTT_S = 0.1
STEPS = st.lists(st.tuples(PACKETS, st.floats(0, 3 * HOLD_S)), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("size", "padded"),
    [(1, 112), (112, 112), (113, 160), (160, 160), (161, 224), (1200, 1280), (1400, 1280)],
)
def test_a_size_goes_up_to_the_next_step(size: int, padded: int) -> None:
    assert Padding().padded_size(size, 0.0, RTT_S) == padded


@settings(deadline=None)
@given(STEPS)
def test_sizes_are_large_enough_and_from_the_few_steps(steps: list[tuple[int, float]]) -> None:
    padding, now = Padding(), 0.0
    for size, wait_s in steps:
        now += wait_s
        padded = padding.padded_size(size, now, RTT_S)
        assert padded >= size
        assert padded in SIZES


@settings(deadline=None)
@given(STEPS)
def test_a_size_is_what_the_last_spans_needed(steps: list[tuple[int, float]]) -> None:
    """Held for one span at least, forgotten after two, and never more than was needed."""
    padding, forgetful, now = Padding(), Padding(hold_s=1e-9), 0.0
    alone: list[tuple[float, int]] = []
    for size, wait_s in steps:
        now += wait_s
        padded = padding.padded_size(size, now, RTT_S)
        alone.append((now, forgetful.padded_size(size, now, RTT_S)))
        # The margin is for sums of floats at the very edge of a span.
        must = [needed for time, needed in alone if now - time < HOLD_S - 1e-9]
        may = [needed for time, needed in alone if now - time <= 2 * HOLD_S + 1e-9]
        assert max(must) <= padded <= max(may)


@settings(deadline=None)
@given(st.lists(st.integers(1, SIZES[0]), min_size=1))
def test_small_packets_look_alike(sizes: list[int]) -> None:
    padding = Padding()
    padded = {padding.padded_size(size, index / 30, RTT_S) for index, size in enumerate(sizes)}
    assert padded == {SIZES[0]}


def test_what_is_released_is_held_no_more() -> None:
    padding = Padding(hold_s=2.0)
    assert padding.padded_size(600, 1.0, 0.0) == 640
    assert padding.padded_size(50, 1.1, 0.0) == 640
    padding.release()
    assert padding.padded_size(50, 1.2, 0.0) == SIZES[0]


def test_after_a_pause_nothing_is_held() -> None:
    padding = Padding()
    assert padding.padded_size(1000, 0.0, RTT_S) == 1280
    assert padding.padded_size(10, HOLD_S, RTT_S) == 1280
    assert padding.padded_size(10, 2 * HOLD_S, RTT_S) == SIZES[0]


def steady(count: int, gap_s: float, rtt_s: float, size: int = 40) -> list[int]:
    padding = Padding()
    return [padding.padded_size(size, index * gap_s, rtt_s) for index in range(count)]


@pytest.mark.parametrize(
    ("rate", "rtt_s", "padded"),
    [(30, 0.02, 112), (30, 0.1, 112), (10, 0.3, 112), (30, 0.3, 160), (100, 0.3, 448)],
)
def test_the_least_size_follows_from_the_packets_in_flight(
    rate: int, rtt_s: float, padded: int
) -> None:
    assert steady(200, 1 / rate, rtt_s)[-50:] == [padded] * 50


def test_repeats_do_not_count_as_tokens() -> None:
    padding, times = (
        Padding(),
        [index / 30 + repeat for index in range(60) for repeat in (0, 0.003)],
    )
    assert {padding.padded_size(60, time, RTT_S) for time in times} == {SIZES[0]}


def test_at_any_rate_the_packets_that_are_remembered_are_bounded() -> None:
    padding = Padding()
    for index in range(10_000):
        padding.padded_size(40, index * 1e-4, RTT_S)
    assert len(padding._sent_at) <= 1.1 * RTT_S / SLOT_S + 1
