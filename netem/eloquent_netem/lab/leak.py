"""How much do packets tell of an answer's topic? The figures behind `eloquent lab leak`."""

import os
import platform
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import fmean
from typing import Any

import numpy as np

from eloquent_netem.lab.leak_attack import Verdict, auroc, judge
from eloquent_netem.lab.leak_run import Listening, Sighting, overhear
from eloquent_netem.lab.leak_text import Tokenizer, load_topics, make_answer

MIN_TOKENS, MAX_TOKENS = 60, 180
"""Answers have a length between these, whatever their topic: the length shows in the number of
packets, padded or not, so topics that differ in it could be told apart by that alone."""

RATE_SPREAD = 0.2
"Answers are generated this much faster or slower than the mean, at most."


@dataclass(frozen=True, slots=True)
class Leak:
    """What one way of listening brings."""

    listening: Listening
    verdicts: list[Verdict]
    answers: int
    topics: int
    sizes: int
    "Distinct packet sizes among all answers."
    bytes_per_token: float
    "On the downlink, headers included."
    length_auroc: float
    "How well the number of packets tells the longer half of the answers: padding does not hide it."

    @property
    def best(self) -> Verdict:
        """The attacker who does best: chosen afterwards, in the attacker's favour."""
        return max(self.verdicts, key=lambda verdict: verdict.auroc)


def measure(
    rtts_s: Sequence[float], *, loss: float, tokens_per_s: float, answers: int, workers: int
) -> list[Leak]:
    """Listen to `answers` answers of every topic, for each round trip, unpadded and padded.

    The same answers at the same times each time. One processor for each of `workers`.
    """
    rng = random.Random("leak")  # noqa: S311  (emulation, not cryptography)
    topics = load_topics()
    tokenizer = Tokenizer(topics.values(), rng)
    labels = [label for label in range(len(topics)) for _ in range(answers)]
    said = [
        make_answer(topic, tokenizer, rng.randint(MIN_TOKENS, MAX_TOKENS), rng)
        for topic in topics.values()
        for _ in range(answers)
    ]
    rates = [tokens_per_s * rng.uniform(1 - RATE_SPREAD, 1 + RATE_SPREAD) for _ in said]
    leaks = []
    with ProcessPoolExecutor(workers) as pool:
        for rtt_s in rtts_s:
            for padding in (False, True):
                paths = [
                    Listening(rtt_s=rtt_s, loss=loss, tokens_per_s=rate, padding=padding)
                    for rate in rates
                ]
                sightings = list(pool.map(overhear, said, paths, range(len(said)), chunksize=4))
                listening = Listening(
                    rtt_s=rtt_s, loss=loss, tokens_per_s=tokens_per_s, padding=padding
                )
                leaks.append(
                    Leak(
                        listening=listening,
                        verdicts=judge(sightings, labels, seed=0),
                        answers=len(said),
                        topics=len(topics),
                        sizes=len({size for sighting in sightings for size in sighting.sizes}),
                        bytes_per_token=_bytes_per_token(sightings, said),
                        length_auroc=_length_auroc(sightings, said),
                    )
                )
    return leaks


def _bytes_per_token(sightings: Sequence[Sighting], said: Sequence[Sequence[str]]) -> float:
    return fmean(
        sum(sighting.sizes) / len(tokens) for sighting, tokens in zip(sightings, said, strict=True)
    )


def _length_auroc(sightings: Sequence[Sighting], said: Sequence[Sequence[str]]) -> float:
    lengths = np.array([len(tokens) for tokens in said])
    packets = np.array([float(len(sighting.sizes)) for sighting in sightings])
    return auroc(packets, lengths > np.median(lengths))


HEADER = (
    "| round trip | packets | topic: AUROC | AUPRC | named | length: AUROC | sizes | "
    "downlink bytes/token |\n|---|---|---|---|---|---|---|---|"
)


def render(leaks: Sequence[Leak]) -> str:
    """Return the figures as a table in Markdown, and what guessing gives."""
    first = leaks[0]
    rows = [
        f"| {1000 * leak.listening.rtt_s:g} ms | {'padded' if leak.listening.padding else 'bare'} "
        f"| {leak.best.auroc:.3f} ({leak.best.auroc_low:.3f} to {leak.best.auroc_high:.3f}) "
        f"| {leak.best.auprc:.3f} | {100 * leak.best.accuracy:.1f} % | {leak.length_auroc:.3f} "
        f"| {leak.sizes} | {leak.bytes_per_token:.0f} |"
        for leak in leaks
    ]
    guess = 1 / first.topics
    notes = (
        f"\n{first.answers} answers of {first.topics} topics, {MIN_TOKENS} to {MAX_TOKENS} tokens, "
        f"{first.listening.tokens_per_s:g} tokens/s, {100 * first.listening.loss:g} % loss. "
        f"Guessing gives an AUROC of 0.500, an AUPRC of {guess:.3f} and {100 * guess:.1f} % named. "
        "In parentheses: 95 % intervals."
    )
    return "\n".join([HEADER, *rows, notes])


def to_json(leaks: Sequence[Leak], command: Sequence[str]) -> dict[str, Any]:
    """Return all figures and how they were made; times in seconds."""
    meta = {
        "command": ["eloquent", *command],
        "aioquic": version("aioquic"),
        "eloquent-stream": version("eloquent-stream"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
    }
    return {"meta": meta, "rows": [asdict(leak) for leak in leaks]}


def workers() -> int:
    """Return how many processes to run on."""
    return os.cpu_count() or 1
