"""How good predictions of packets' delays are: measures, their intervals, and the accuracy bars.

Each measure is a sum over packets over another, so that flows are what its interval's bootstrap
draws: packets of one flow are not independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eloquent.swiftqueue.dataset import is_change
from eloquent_netem.lab.findings import Finding
from eloquent_netem.lab.statistics import bootstrap
from eloquent_netem.lab.swiftqueue_knowledge import Floats, Knowledge
from eloquent_netem.rate import MS_PER_S

SPIKE_S = 0.02
SPIKE_FACTOR = 2.0
"A spike: the queueing delay exceeds the first, and the second times the last second's median."

UPPER_LEVEL = 0.99
"The quantile that models foretell beside the point."

OURS = "swiftqueue"
LAST_VALUE = "last-value"
EWMA = "ewma"
FLOOR = "state"
"So begin the names of what knows the router's true state: noise floors, no baselines."

LESS_THAN_LAST_VALUE = 0.65
LESS_THAN_BEST = 0.2
"By so much our error on changes is to be lower than that of last value and EWMA, of the best."

MEASURES = (
    "mae_ms",
    "mae_change_ms",
    "spike_f1",
    "pinball_99",
    "coverage_99",
    "other_mae_ms",
    "other_mae_change_ms",
)
Tally = Mapping[str, tuple[float, float]]
"One model on one flow: each measure's sums, above and below the line."


class Forecasts(NamedTuple):
    """What a model says at each packet's sending, in seconds of one-way delay; (n, 2), by queue."""

    point_s: Floats
    upper_s: Floats
    "The 0.99 quantile."


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRow:
    """How good one model is on one split: a line of `--json`. None: there is nothing to judge.

    Each packet counts whose delay is known, from the first feedback of its flow on. All measures
    are of the packet's own queue, but those named `other`.
    """

    model: str
    split: str
    mae_ms: float | None
    "Mean absolute error of the point forecast."
    mae_change_ms: float | None
    "The same over changes (`eloquent.swiftqueue.dataset.is_change`)."
    spike_f1: float | None
    "Of the forecast that the packet meets a spike (`SPIKE_S`), said by the point."
    pinball_99: float | None
    "Mean pinball loss of the 0.99 quantile, in milliseconds."
    coverage_99: float | None
    "The share of packets whose delay did not exceed it."
    other_mae_ms: float | None
    other_mae_change_ms: float | None
    "What the packet would have met in the other queue."
    packets: int
    changes: int
    spikes: int
    flows: int
    intervals: Mapping[str, tuple[float, float]]
    "Of 95 %, by measure, by a bootstrap over the flows."


def changes(known: Knowledge) -> NDArray[np.bool_]:
    """Return (n, 2): whether a queueing delay is a change: 20 ms and 20 % off the last known one.

    What nothing was known of in its own queue is none. Queueing delays, and not delays, since how
    the two clocks are set is not known.
    """
    base_s = known.base_s[:, None]
    last_s = np.where(known.position >= 0, known.last_s, np.nan)
    return is_change(
        (known.flow.delay_s - base_s).astype(np.float32), (last_s - base_s).astype(np.float32)
    )


def spike_threshold_s(known: Knowledge) -> Floats:
    """Return (n, 2): the one-way delay beyond which a packet would meet a spike.

    It is known at the packet's sending: what the last second's reports said of the queue.
    """
    base_s = known.base_s[:, None]
    return base_s + np.maximum(SPIKE_S, SPIKE_FACTOR * (known.recent_s - base_s))


def tally(known: Knowledge, forecasts: Forecasts) -> Tally:
    """Judge one model on one flow.

    Raises:
        ValueError: the model said nothing (NaN) of a packet that counts.
    """
    truth_s = known.flow.delay_s.astype(np.float64)
    own = known.is_scored & known.is_own
    other = known.is_scored & ~known.is_own
    if np.isnan(forecasts.point_s[own | other]).any() or np.isnan(forecasts.upper_s[own]).any():
        raise ValueError("A model must say something of every packet that counts.")
    error_ms = MS_PER_S * np.abs(truth_s - forecasts.point_s)
    over_ms = MS_PER_S * (truth_s - forecasts.upper_s)
    pinball_ms = np.maximum(UPPER_LEVEL * over_ms, (UPPER_LEVEL - 1) * over_ms)
    changed = changes(known)
    threshold_s = spike_threshold_s(known)
    spikes = own & (truth_s > threshold_s)
    foretold = own & (forecasts.point_s > threshold_s)
    return {
        "mae_ms": _sums(error_ms, own),
        "mae_change_ms": _sums(error_ms, own & changed),
        "spike_f1": (2.0 * np.sum(spikes & foretold), float(np.sum(spikes) + np.sum(foretold))),
        "pinball_99": _sums(pinball_ms, own),
        "coverage_99": _sums(over_ms <= 0, own),
        "other_mae_ms": _sums(error_ms, other),
        "other_mae_change_ms": _sums(error_ms, other & changed),
        "spikes": (0.0, float(np.sum(spikes))),
    }


def row_of(model: str, split: str, tallies: Sequence[Tally]) -> PredictionRow:
    """Sum one model's tallies, one for each flow, up to its row."""
    figures: dict[str, float | None] = {}
    intervals = {}
    for measure in MEASURES:
        pairs = [one[measure] for one in tallies if one[measure][1] > 0]
        if not pairs:
            figures[measure] = None
            continue
        found = bootstrap(pairs, _ratio_of_sums)
        figures[measure] = found.figure
        intervals[measure] = (found.low, found.high)

    def count(measure: str) -> int:
        return round(sum(one[measure][1] for one in tallies))

    return PredictionRow(
        model=model,
        split=split,
        mae_ms=figures["mae_ms"],
        mae_change_ms=figures["mae_change_ms"],
        spike_f1=figures["spike_f1"],
        pinball_99=figures["pinball_99"],
        coverage_99=figures["coverage_99"],
        other_mae_ms=figures["other_mae_ms"],
        other_mae_change_ms=figures["other_mae_change_ms"],
        packets=count("mae_ms"),
        changes=count("mae_change_ms"),
        spikes=count("spikes"),
        flows=len(tallies),
        intervals=intervals,
    )


def accuracy_bars(
    rows: Sequence[PredictionRow], *, split: str = "test", model: str = OURS
) -> list[Finding]:
    """Hold a model's error against the others', above all on changes.

    The error on changes alone could be had for nothing, by always foretelling a change: so the
    error overall must be below that of the last value too.

    Raises:
        ValueError: a row that it needs is missing, or has no changes.
    """
    judged = {row.model: row for row in rows if row.split == split}
    errors = {
        name: row.mae_change_ms for name, row in judged.items() if row.mae_change_ms is not None
    }
    baselines = [name for name in errors if not name.startswith((OURS, FLOOR))]
    missing = {model, LAST_VALUE, EWMA} - errors.keys()
    if missing:
        raise ValueError(f"The rows of '{split}' lack {', '.join(sorted(missing))}.")
    best = min(baselines, key=lambda name: errors[name])
    overall, of_last = judged[model].mae_ms or 0.0, judged[LAST_VALUE].mae_ms or 0.0
    return [
        Finding(
            part="prediction",
            what="error overall below that of last value",
            where=f"{split}, {LAST_VALUE}",
            figure=100 * _reduced_by(overall, of_last),
            bound=0.0,
            is_least=True,
            unit="%",
        ),
        *(
            Finding(
                part="prediction",
                what=f"error on changes below that of {what}",
                where=f"{split}, {against}",
                figure=100 * _reduced_by(errors[model], errors[against]),
                bound=100 * bound,
                is_least=True,
                unit="%",
            )
            for what, against, bound in (
                ("last value", LAST_VALUE, LESS_THAN_LAST_VALUE),
                ("EWMA", EWMA, LESS_THAN_LAST_VALUE),
                ("the best baseline", best, LESS_THAN_BEST),
            )
        ),
        *(
            Finding(
                part="prediction",
                what=f"error on changes below that of last value: the noise floor '{name}'",
                where=split,
                figure=100 * _reduced_by(error, errors[LAST_VALUE]),
                unit="%",
            )
            for name, error in errors.items()
            if name.startswith(FLOOR)
        ),
    ]


def _sums(values: NDArray[np.generic], where: NDArray[np.bool_]) -> tuple[float, float]:
    return float(np.sum(values[where])), float(np.sum(where))


def _ratio_of_sums(pairs: Sequence[tuple[float, float]]) -> float:
    above, below = (sum(values) for values in zip(*pairs, strict=True))
    return float(above / below)


def _reduced_by(ours: float, theirs: float) -> float:
    return 1 - ours / theirs if theirs > 0 else 0.0
