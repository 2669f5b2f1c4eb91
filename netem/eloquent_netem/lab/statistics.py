"""Means over seeds and their intervals: the one way in which the lab's figures are told.

A *sample* is what one scheme had on one scenario with one seed; schemes are compared on the
scenarios and seeds that all of them have, so that luck with the network is shared.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev

from eloquent_netem.lab.rows import Row

CONFIDENCE = 0.95
DRAWS = 4000
"Of the bootstrap; the ends of its intervals then vary by less than a twentieth of their width."

RATIO_FLOOR = 0.001
"Ratios between cells take smaller figures for this: 0.1 percentage points."

HOW = (
    "Intervals are of 95 %: of means by Student's t over the seeds, of reductions by a bootstrap "
    f"over the seeds ({DRAWS} draws, percentiles)"
)
"For whatever shows figures of this module."

Key = tuple[str, str, int]
"Scenario, scheme and seed."

Samples = Mapping[Key, float]


MEASURES = {
    "strict": ("stall_ratio", "excess_strict"),
    "200 ms": ("stall_ratio_200ms", "excess_200ms"),
}
"The two stall measures, and the rows' fields for the plain ratio and for the excess."


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its confidence interval, in the figure's unit."""

    figure: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def times(self, factor: float) -> "Interval":
        """Return it in another unit."""
        return Interval(self.figure * factor, self.low * factor, self.high * factor)

    def is_apart(self, other: "Interval") -> bool:
        """Whether the two intervals have no value in common."""
        return self.high < other.low or other.high < self.low


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """How far the figures of one scheme, summed over scenarios, are below another's."""

    scheme: str
    against: str
    share: Interval
    "1 minus ours over theirs: 1 is none left, 0 is the same."
    ours: Interval
    theirs: Interval
    "Means over the scenarios, then over the seeds."
    scenarios: int
    seeds: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean and its interval by Student's t; of one value, an interval without width.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("There are no values to take a mean of.")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, mean, mean)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def samples_of(rows: Iterable[Row], field: str) -> dict[Key, float]:
    """Return one of the rows' figures, of those that have it."""
    found = {(row.scenario, row.scheme, row.seed): getattr(row, field) for row in rows}
    return {key: value for key, value in found.items() if value is not None}


def over_seeds(samples: Samples, scenario: str, scheme: str) -> Interval | None:
    """Return one scheme's mean on one scenario, or None where it did not run."""
    values = [
        value
        for (where, which, _), value in samples.items()
        if (where, which) == (scenario, scheme)
    ]
    return mean_interval(values) if values else None


def reduction(samples: Samples, scheme: str, against: str) -> Reduction | None:
    """Compare two schemes' samples, summed over the scenarios, seed by seed.

    Only scenarios on which both ran count, and seeds that both have on all of these. None: there
    are none, or the other scheme's sum is 0.
    """
    both = _common_scenarios(samples, scheme, against)
    seeds = _common_seeds(samples, (scheme, against), both)
    if not both or not seeds:
        return None
    ours, theirs = (
        [fmean(samples[where, which, seed] for where in sorted(both)) for seed in seeds]
        for which in (scheme, against)
    )
    if fmean(theirs) <= 0:
        return None
    return Reduction(
        scheme=scheme,
        against=against,
        share=bootstrap(list(zip(ours, theirs, strict=True)), _reduced_by),
        ours=mean_interval(ours),
        theirs=mean_interval(theirs),
        scenarios=len(both),
        seeds=len(seeds),
    )


def ratio(ours: float, theirs: float, floor: float = RATIO_FLOOR) -> float:
    """Return one figure over another, both at least `floor`, so that noise makes no ratio."""
    return max(ours, floor) / max(theirs, floor)


def bootstrap(
    pairs: Sequence[tuple[float, float]],
    statistic: Callable[[Sequence[tuple[float, float]]], float],
) -> Interval:
    """Return a statistic of pairs, one for each seed, and its interval by percentiles.

    The draws are the same for the same number of pairs.
    """
    rng = random.Random(len(pairs))  # noqa: S311  (no secret)
    drawn = sorted(statistic(rng.choices(pairs, k=len(pairs))) for _ in range(DRAWS))
    tail = round(DRAWS * (1 - CONFIDENCE) / 2)
    return Interval(statistic(pairs), drawn[tail], drawn[-1 - tail])


@lru_cache
def t_quantile(degrees: int) -> float:
    """Return what |t| of so many degrees of freedom exceeds in 5 % of cases.

    Raises:
        ValueError: `degrees` is below 1.
    """
    if degrees < 1:
        raise ValueError(f"Student's t has at least one degree of freedom, not {degrees}.")
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(log_scale) / math.sqrt(degrees * math.pi)

    def within(t: float, steps: int = 400) -> float:
        # The probability of 0..t, by Simpson's rule.
        width = t / steps
        weights = (1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1))
        heights = (
            math.pow(1 + (i * width) ** 2 / degrees, -(degrees + 1) / 2) for i in range(steps + 1)
        )
        return scale * width / 3 * sum(w * h for w, h in zip(weights, heights, strict=True))

    low, high = 0.0, 16.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < CONFIDENCE / 2 else (low, middle)
    return low


def _reduced_by(pairs: Sequence[tuple[float, float]]) -> float:
    ours, theirs = (sum(values) for values in zip(*pairs, strict=True))
    # A draw may hold only seeds on which the other scheme lost nothing.
    return 1 - ours / theirs if theirs > 0 else 0.0


def _common_scenarios(samples: Samples, *schemes: str) -> set[str]:
    return set.intersection(
        *({where for where, which, _ in samples if which == scheme} for scheme in schemes)
    )


def _common_seeds(samples: Samples, schemes: Sequence[str], scenarios: set[str]) -> list[int]:
    of_each = [
        {seed for where, which, seed in samples if (where, which) == (scenario, scheme)}
        for scenario in scenarios
        for scheme in schemes
    ]
    return sorted(set.intersection(*of_each)) if of_each else []
