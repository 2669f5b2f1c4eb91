"""The measures, against figures computed by hand and against their definition."""

from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent_netem.lab.measures import DeliveryError, measure_stalls, quantile

BASE_S = 0.05

GRID_S = Fraction(1, 100)
"The brute-force check walks time in steps of this; its times are multiples of it."


def test_nobody_waits_on_a_loss_free_path() -> None:
    generated = [0.0, 0.1, 0.2]
    measures = measure_stalls(generated, [time + BASE_S for time in generated], BASE_S)
    assert measures.stall_ratio == pytest.approx(0, abs=1e-12)
    assert measures.stall_ratio_200ms == pytest.approx(0, abs=1e-12)
    assert measures.delay_max_s == pytest.approx(0, abs=1e-12)


def test_one_late_token() -> None:
    # Due 0.05, 0.15, 0.25, 0.35. The second comes 0.06 s late, at 0.21, before the third is due:
    # 0.06 s of waiting in 0.35 - 0.05 = 0.30 s.
    measures = measure_stalls([0.0, 0.1, 0.2, 0.3], [0.05, 0.21, 0.25, 0.35], BASE_S)
    assert measures.stall_ratio == pytest.approx(0.06 / 0.30)
    assert measures.stall_ratio_200ms == 0
    assert measures.delay_max_s == pytest.approx(0.06)
    assert measures.delay_p50_s == pytest.approx(0)


def test_head_of_line_blocking_counts_the_wait_once() -> None:
    # Due 0.05, 0.15, 0.25, 0.35, 0.45. Tokens 2 to 4 come together at 0.45 with the fifth: the
    # reader waits from 0.15 to 0.45, once, though four tokens are missing for a part of it.
    measures = measure_stalls([0.0, 0.1, 0.2, 0.3, 0.4], [0.05, 0.45, 0.45, 0.45, 0.45], BASE_S)
    assert measures.stall_ratio == pytest.approx(0.30 / 0.40)
    # The gap's first 0.2 s, up to 0.25, are allowed: 0.45 - 0.25 remain.
    assert measures.stall_ratio_200ms == pytest.approx(0.20 / 0.40)
    assert measures.delay_p50_s == pytest.approx(0.10)
    assert measures.delay_max_s == pytest.approx(0.30)


def test_a_token_due_before_the_one_in_front_of_it_came_waits_from_then_on() -> None:
    # Due 0.05, 0.15, 0.25. The second comes at 0.30 and the third at 0.34: the reader waits from
    # 0.15 to 0.30 for the second and on to 0.34 for the third.
    measures = measure_stalls([0.0, 0.1, 0.2], [0.05, 0.30, 0.34], BASE_S)
    assert measures.stall_ratio == pytest.approx((0.15 + 0.04) / 0.29)
    assert measures.stall_ratio_200ms == pytest.approx(0.05 / 0.29)


def test_a_model_s_own_slow_gaps_are_no_stalls() -> None:
    generated = [0.0, 3.0, 3.1, 9.0]
    measures = measure_stalls(generated, [time + BASE_S for time in generated], BASE_S)
    assert measures.stall_ratio == pytest.approx(0, abs=1e-12)
    assert measures.stall_ratio_200ms == pytest.approx(0, abs=1e-12)


def test_a_stall_after_a_slow_gap_is_not_forgiven() -> None:
    # Due 0.05 and 3.05; the second comes at 3.15, in a gap of 3.1 s that is 3.0 s the model's.
    measures = measure_stalls([0.0, 3.0], [0.05, 3.15], BASE_S)
    assert measures.stall_ratio == pytest.approx(0.10 / 3.10)
    assert measures.stall_ratio_200ms == pytest.approx(0.10 / 3.10)


@pytest.mark.parametrize(("gap_s", "beyond_s"), [(0.19, 0.0), (0.2, 0.0), (0.21, 0.01)])
def test_gaps_up_to_200_ms_are_allowed(gap_s: float, beyond_s: float) -> None:
    measures = measure_stalls([0.0, 0.1], [0.05, 0.05 + gap_s], BASE_S)
    assert measures.stall_ratio == pytest.approx((gap_s - 0.1) / gap_s)
    assert measures.stall_ratio_200ms == pytest.approx(beyond_s / gap_s, abs=1e-12)


def test_the_wait_for_the_first_token_counts() -> None:
    # Due 0.05, rendered 0.15; no rendering before it, so that no gap is allowed. Then 0.25.
    measures = measure_stalls([0.0, 0.2], [0.15, 0.25], BASE_S)
    assert measures.stall_ratio == pytest.approx(0.10 / 0.20)
    assert measures.stall_ratio_200ms == pytest.approx(0.10 / 0.20)


def test_an_answer_shown_at_one_instant_has_no_stall_by_rounding() -> None:
    assert 0.18 + 0.05 < 0.23
    measures = measure_stalls([0.18, 0.18], [0.23, 0.23], BASE_S)
    assert measures.stall_ratio == measures.stall_ratio_200ms == 0


def test_tokens_generated_together_and_rendered_together() -> None:
    measures = measure_stalls([0.0, 0.0, 0.0, 0.1], [0.05, 0.05, 0.05, 0.15], BASE_S)
    assert measures.stall_ratio == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("rendered", "ratio"), [(0.05, 0.0), (0.04, 0.0), (0.25, 1.0)])
def test_a_single_token(rendered: float, ratio: float) -> None:
    measures = measure_stalls([0.0], [rendered], BASE_S)
    assert measures.stall_ratio == pytest.approx(ratio)
    assert measures.delay_max_s == pytest.approx(max(0.0, rendered - 0.05))


@pytest.mark.parametrize(
    ("generated", "rendered"),
    [([0.0, 0.1], [0.05]), ([0.0], [0.05, 0.15]), ([], []), ([0.0], []), ([], [0.05])],
)
def test_missing_or_doubled_tokens_are_no_measurement(
    generated: list[float], rendered: list[float]
) -> None:
    with pytest.raises(DeliveryError, match=f"{len(generated)} tokens .* {len(rendered)} rendered"):
        measure_stalls(generated, rendered, BASE_S)


def test_tokens_out_of_order_are_no_measurement() -> None:
    with pytest.raises(DeliveryError, match="order"):
        measure_stalls([0.0, 0.1], [0.25, 0.15], BASE_S)


steps = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@settings(deadline=None)
@given(generated_steps=steps, late_steps=st.lists(st.integers(0, 60), min_size=8, max_size=8))
def test_the_ratios_are_the_integral_of_their_definition(
    generated_steps: list[int], late_steps: list[int]
) -> None:
    generated = list(accumulate(generated_steps))
    base = 5
    due = [time + base for time in generated]
    rendered = list(accumulate((d + late for d, late in zip(due, late_steps, strict=False)), max))
    # The reader waits in a cell of the grid if a token is due there that, on a loss-free path,
    # would be there, and is not. The cell counts as beyond 200 ms if nothing was rendered in the
    # 200 ms before its end.
    waited = beyond = 0
    allowed = 20
    for cell in range(due[0], rendered[-1]):
        if any(d <= cell < r for d, r in zip(due, rendered, strict=True)):
            waited += 1
            before = [r for r in rendered if r <= cell]
            beyond += not before or cell - max(before) >= allowed
    total = rendered[-1] - due[0]
    measures = measure_stalls(
        [float(time * GRID_S) for time in generated],
        [float(time * GRID_S) for time in rendered],
        float(base * GRID_S),
    )
    assert measures.stall_ratio == pytest.approx(waited / total if total else 0, abs=1e-9)
    assert measures.stall_ratio_200ms == pytest.approx(beyond / total if total else 0, abs=1e-9)
    delays = sorted(r - d for d, r in zip(due, rendered, strict=True))
    assert measures.delay_max_s == pytest.approx(float(delays[-1] * GRID_S))
    assert measures.delay_p50_s == pytest.approx(float(delays[(len(delays) - 1) // 2] * GRID_S))


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (1, 0.5, 1),
        (2, 0.5, 1),
        (3, 0.5, 2),
        (4, 0.5, 2),
        (99, 0.99, 99),
        (100, 0.99, 99),
        (101, 0.99, 100),
        (200, 0.99, 198),
        (10, 0.0, 1),
        (10, 1.0, 10),
    ],
)
def test_quantiles_of_one_to_n(count: int, share: float, expected: int) -> None:
    assert quantile(range(1, count + 1), share) == expected


@given(
    st.integers(1, 5000) | st.integers(1, 50).map(lambda hundreds: 100 * hundreds),
    st.sampled_from(["0.5", "0.9", "0.95", "0.99", "0.07", "0.29"]),
)
def test_a_quantile_is_the_smallest_value_that_covers_the_share(count: int, share: str) -> None:
    values = range(1, count + 1)
    value = quantile(values, float(share))
    assert Fraction(value, count) >= Fraction(share)
    assert value == 1 or Fraction(value - 1, count) < Fraction(share)
