"""Means, intervals and reductions, on rows made by hand."""

import random
from statistics import pstdev

import pytest
from lab_rows import row

from eloquent_netem.lab.statistics import (
    Interval,
    bootstrap,
    mean_interval,
    over_seeds,
    ratio,
    reduction,
    samples_of,
    t_quantile,
)


@pytest.mark.parametrize(
    ("degrees", "known"),
    # Two-sided 5 % points, as printed in any table of Student's t.
    [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (19, 2.093), (29, 2.045), (1000, 1.962)],
)
def test_quantiles_of_students_t_are_those_of_the_tables(degrees: int, known: float) -> None:
    assert t_quantile(degrees) == pytest.approx(known, abs=0.0006)


def test_no_degree_of_freedom_is_an_error() -> None:
    with pytest.raises(ValueError, match="degree"):
        t_quantile(0)


def test_a_mean_has_students_interval() -> None:
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # Standard deviation sqrt(2.5), 4 degrees of freedom: 2.776 * sqrt(2.5 / 5).
    assert interval.figure == 3.0
    assert interval.half == pytest.approx(1.9632, abs=1e-3)
    assert interval.low == pytest.approx(3 - 1.9632, abs=1e-3)


def test_one_value_has_no_width_and_none_is_an_error() -> None:
    assert mean_interval([0.4]) == Interval(0.4, 0.4, 0.4)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_intervals_of_means_cover_the_truth_as_often_as_they_say() -> None:
    rng = random.Random(1)
    covered = 0
    for _ in range(2000):
        interval = mean_interval([rng.gauss(7, 2) for _ in range(5)])
        covered += interval.low <= 7 <= interval.high
    # Binomial with 0.95: five standard deviations are 0.024.
    assert covered / 2000 == pytest.approx(0.95, abs=0.025)


def test_samples_are_taken_from_rows_and_unknown_ones_left_out() -> None:
    rows = [
        row("a", "eloquent", 0, stall_ratio=0.1, excess_strict=None),
        row("a", "eloquent", 1, stall_ratio=0.3, excess_strict=0.2),
    ]
    assert samples_of(rows, "stall_ratio") == {
        ("a", "eloquent", 0): 0.1,
        ("a", "eloquent", 1): 0.3,
    }
    assert samples_of(rows, "excess_strict") == {("a", "eloquent", 1): 0.2}
    found = over_seeds(samples_of(rows, "stall_ratio"), "a", "eloquent")
    assert found is not None
    assert found.figure == pytest.approx(0.2)
    assert over_seeds(samples_of(rows, "stall_ratio"), "b", "eloquent") is None


def test_a_reduction_is_that_of_the_sums_not_the_mean_of_ratios() -> None:
    # Ours 0.01 + 0.09, theirs 0.1 + 0.1: half; the mean of the two reductions would be 50 % too,
    # so the second place is made ten times as heavy.
    samples = {
        ("a", "ours", 0): 0.01,
        ("b", "ours", 0): 0.9,
        ("a", "theirs", 0): 0.1,
        ("b", "theirs", 0): 1.0,
    }
    found = reduction(samples, "ours", "theirs")
    assert found is not None
    assert found.share.figure == pytest.approx(1 - 0.91 / 1.1)
    assert found.ours.figure == pytest.approx(0.455)
    assert found.theirs.figure == pytest.approx(0.55)
    assert (found.scenarios, found.seeds) == (2, 1)


def test_a_reduction_without_scatter_has_an_interval_without_width() -> None:
    samples = {("a", "ours", seed): 0.1 * (seed + 1) for seed in range(10)}
    samples |= {("a", "theirs", seed): 1.0 * (seed + 1) for seed in range(10)}
    found = reduction(samples, "ours", "theirs")
    assert found is not None
    # The networks differ tenfold; paired by seed, the schemes always have the same ratio.
    assert found.share.figure == pytest.approx(0.9)
    assert found.share.half == pytest.approx(0.0, abs=1e-12)
    assert found.theirs.half > 1.0


def test_a_reduction_takes_only_what_both_ran() -> None:
    samples = {
        ("a", "ours", 0): 0.1,
        ("a", "ours", 1): 0.9,  # theirs failed there
        ("a", "theirs", 0): 0.2,
        ("b", "theirs", 0): 0.9,  # ours never ran there
    }
    found = reduction(samples, "ours", "theirs")
    assert found is not None
    assert found.share.figure == pytest.approx(0.5)
    assert (found.scenarios, found.seeds) == (1, 1)


def test_a_reduction_against_nothing_is_none() -> None:
    samples = {("a", "ours", 0): 0.1, ("a", "theirs", 0): 0.0}
    assert reduction(samples, "ours", "theirs") is None
    assert reduction(samples, "ours", "absent") is None


def test_the_bootstrap_is_seeded_and_covers_the_truth() -> None:
    rng = random.Random(2)
    covered = 0
    for _ in range(60):
        theirs = [rng.uniform(0.5, 1.5) for _ in range(30)]
        samples = {("a", "theirs", seed): value for seed, value in enumerate(theirs)}
        samples |= {
            ("a", "ours", seed): 0.2 * value + rng.uniform(-0.1, 0.1)
            for seed, value in enumerate(theirs)
        }
        found = reduction(samples, "ours", "theirs")
        assert found is not None
        covered += found.share.low <= 0.8 <= found.share.high
        assert found == reduction(samples, "ours", "theirs")
    # Binomial with 0.95 in 60: below 50 has a probability of less than 0.01 %.
    assert covered >= 50


def test_the_bootstrap_is_as_wide_as_theory_has_it() -> None:
    rng = random.Random(4)
    pairs = [(rng.gauss(3, 2), 1.0) for _ in range(100)]
    interval = bootstrap(pairs, lambda drawn: sum(ours for ours, _ in drawn) / len(drawn))
    spread = pstdev(ours for ours, _ in pairs)
    # A mean of 100 is normal enough; the ends of 4000 draws are good to a twentieth.
    assert interval.half == pytest.approx(1.96 * spread / 10, rel=0.08)


def test_the_bootstrap_of_pairs_without_scatter_is_the_statistic() -> None:
    assert bootstrap([(1.0, 2.0)] * 5, lambda pairs: pairs[0][0]) == Interval(1.0, 1.0, 1.0)


def test_ratios_have_a_floor_so_that_noise_makes_none() -> None:
    assert ratio(0.02, 0.1) == pytest.approx(0.2)
    assert ratio(0.0002, 0.00001) == 1.0  # both below 0.1 percentage points
    assert ratio(-0.01, 0.1) == pytest.approx(0.01)
    assert Interval(2.0, 1.0, 4.0).times(10) == Interval(20.0, 10.0, 40.0)
    assert Interval(1, 0, 2).is_apart(Interval(4, 3, 5))
    assert not Interval(1, 0, 2).is_apart(Interval(2.5, 2, 3))
