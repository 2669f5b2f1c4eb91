"""The attacker of `eloquent lab leak`: names an answer's topic by the sizes and times of packets.

Two classifiers, as strong as plain ones are on such sequences: naive Bayes on runs of one to three
sizes, and logistic regression on histograms and moments of sizes and gaps. Needs numpy.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eloquent_netem.lab.leak_run import Sighting

FOLDS = 5
MAX_SIZE = 1500
SIZE_BIN_BYTES = 8
GAP_EDGES_S = np.array([0.0, 1e-4, 2e-3, 5e-3, *np.geomspace(0.01, 1.0, 24), np.inf])
RUNS = (1, 2, 3)
"Lengths of the runs of sizes that naive Bayes counts."

STEPS = 400
STEP_SIZE = 0.5
L2 = 0.02

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Attack = Callable[[Sequence[Sighting], Ints, Sequence[Sighting], int], Floats]


def naive_bayes(
    train: Sequence[Sighting], labels: Ints, test: Sequence[Sighting], n: int
) -> Floats:
    """Return the log-probability of each of `n` topics for each tested answer, shape (tests, n)."""
    grams: list[Counter[Any]] = [Counter() for _ in range(n)]
    for sighting, label in zip(train, labels, strict=True):
        grams[label].update(_runs(sighting))
    vocabulary = len(set().union(*grams)) + 1
    totals = [counts.total() for counts in grams]
    scores = np.zeros((len(test), n))
    for row, sighting in enumerate(test):
        for gram, count in _runs(sighting).items():
            for topic in range(n):
                seen = (grams[topic][gram] + 0.5) / (totals[topic] + 0.5 * vocabulary)
                scores[row, topic] += count * np.log(seen)
        scores[row] /= max(1, len(sighting.sizes))
    return _log_softmax(scores)


def logistic_regression(
    train: Sequence[Sighting], labels: Ints, test: Sequence[Sighting], n: int
) -> Floats:
    """Return the log-probability of each of `n` topics for each tested answer, shape (tests, n)."""
    known, unknown = (np.array([features(one) for one in some]) for some in (train, test))
    mean, spread = known.mean(axis=0), known.std(axis=0)
    is_telling = spread > 1e-9
    known, unknown = ((x - mean)[:, is_telling] / spread[is_telling] for x in (known, unknown))
    known, unknown = (np.c_[np.clip(x, -5, 5), np.ones(len(x))] for x in (known, unknown))
    wanted = np.eye(n)[labels]
    weights = np.zeros((known.shape[1], n))
    step = STEP_SIZE / np.sqrt(known.shape[1])
    for _ in range(STEPS):
        error = np.exp(_log_softmax(known @ weights)) - wanted
        weights -= step * (known.T @ error / len(known) + L2 * weights)
    return _log_softmax(unknown @ weights)


ATTACKS: dict[str, Attack] = {
    "naive Bayes": naive_bayes,
    "logistic regression": logistic_regression,
}


def features(sighting: Sighting) -> Floats:
    """Return what logistic regression sees of an answer: shares, moments and memory of sizes."""
    sizes = np.array(sighting.sizes, dtype=float)
    gaps = np.diff(np.array(sighting.times_s), prepend=sighting.times_s[0])
    steps = np.diff(sizes, prepend=sizes[0])
    parts = [
        np.histogram(sizes, bins=np.arange(0, MAX_SIZE + SIZE_BIN_BYTES, SIZE_BIN_BYTES))[0],
        np.histogram(steps, bins=np.arange(-128, 129, 4))[0],
        np.histogram(gaps, bins=GAP_EDGES_S)[0],
    ]
    shares = np.concatenate(parts) / len(sizes)
    moments = [
        *(sizes.mean(), sizes.std(), np.abs(steps).mean(), gaps.mean(), gaps.std()),
        *np.quantile(sizes, (0.05, 0.25, 0.5, 0.75, 0.95)),
        *np.quantile(gaps, (0.05, 0.25, 0.5, 0.75, 0.95)),
        *(_memory(sizes, lag) for lag in range(1, 9)),
        *(_memory(gaps, lag) for lag in range(1, 4)),
        float(len(sizes)),
        float(sizes.sum()),
    ]
    return np.concatenate([shares, moments])


@dataclass(frozen=True, slots=True)
class Verdict:
    """How well an attacker names topics; means over the topics, each against all others."""

    attack: str
    accuracy: float
    "Share of answers whose topic was named."
    auroc: float
    "Area under the ROC curve; 0.5 is guessing."
    auroc_low: float
    auroc_high: float
    "95 % interval, by drawing the answers anew (bootstrap)."
    auprc: float
    "Mean precision over recall; guessing gives a topic's share."


def judge(
    sightings: Sequence[Sighting], labels: Sequence[int], *, seed: int, resamples: int = 400
) -> list[Verdict]:
    """Let every attack learn from four fifths of the answers and name the others' topics, in turn.

    Raises:
        ValueError: there are fewer answers of a topic than folds.
    """
    truth = np.array(labels)
    n = int(truth.max()) + 1
    if min(np.bincount(truth)) < FOLDS:
        raise ValueError(f"every topic needs {FOLDS} answers")
    rng = np.random.default_rng(seed)
    folds = _folds(truth, rng)
    verdicts = []
    for name, attack in ATTACKS.items():
        scores = np.zeros((len(truth), n))
        for fold in range(FOLDS):
            learn, name_them = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            scores[name_them] = attack(
                [sightings[int(i)] for i in learn],
                truth[learn],
                [sightings[int(i)] for i in name_them],
                n,
            )
        drawn = [rng.integers(0, len(truth), len(truth)) for _ in range(resamples)]
        aurocs = [_mean_auroc(scores[rows], truth[rows]) for rows in drawn]
        low, high = np.quantile(aurocs, (0.025, 0.975))
        verdicts.append(
            Verdict(
                attack=name,
                accuracy=float((scores.argmax(axis=1) == truth).mean()),
                auroc=_mean_auroc(scores, truth),
                auroc_low=float(low),
                auroc_high=float(high),
                auprc=float(np.mean([auprc(scores[:, t], truth == t) for t in range(n)])),
            )
        )
    return verdicts


def auroc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Return the share of (positive, negative) pairs that the scores put right; ties count half."""
    ordered, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    del ordered
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int(positive.sum())
    pairs = positives * (len(scores) - positives)
    if not pairs:
        return 0.5
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / pairs)


def auprc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Return the mean precision at each positive, in descending order of score."""
    # Among equal scores negatives come first, so that ties help nobody.
    order = np.lexsort((positive, -scores))
    hits = positive[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean()) if hits.any() else 0.0


def _mean_auroc(scores: Floats, truth: Ints) -> float:
    return float(np.mean([auroc(scores[:, t], truth == t) for t in range(scores.shape[1])]))


def _folds(truth: Ints, rng: np.random.Generator) -> Ints:
    """Deal each topic's answers evenly into the folds."""
    folds = np.zeros(len(truth), dtype=np.int64)
    for topic in np.unique(truth):
        rows = rng.permutation(np.flatnonzero(truth == topic))
        folds[rows] = np.arange(len(rows)) % FOLDS
    return folds


def _runs(sighting: Sighting) -> Counter[Any]:
    sizes = sighting.sizes
    counts: Counter[Any] = Counter()
    for length in RUNS:
        counts.update(sizes[i : i + length] for i in range(len(sizes) - length + 1))
    counts.update(("step", later - earlier) for earlier, later in pairwise(sizes))
    return counts


def _memory(values: Floats, lag: int) -> float:
    """Return the autocorrelation at a lag, 0 where there is none."""
    if len(values) <= lag + 1:
        return 0.0
    centred = values - values.mean()
    power = float(centred @ centred)
    return float(centred[:-lag] @ centred[lag:]) / power if power > 1e-12 else 0.0


def _log_softmax(scores: Floats) -> Floats:
    shifted = scores - scores.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
