"""The marking policies of the comparison, and those that collect records, by their names."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from eloquent.errors import ConfigurationError
from eloquent.quic.marking import EachAlone, Marking, MarkingPolicy
from eloquent.swiftqueue.records import Queue
from eloquent.swiftqueue.simple_policies import (
    RANDOM_SHARE,
    AlternatingMarking,
    LastRttMarking,
    ProbingMarking,
    ShareMarking,
)
from eloquent_netem.link import stage_rng

MakePolicy = Callable[[random.Random], MarkingPolicy]

ALL_L = "all-l"
SWIFTQUEUE = "swiftqueue"
ORACLE = "oracle"
"All into L as far as the sender goes; the emulator lets each packet wait in both queues."

PLAIN: Mapping[str, MakePolicy] = {
    ALL_L: partial(ShareMarking, 0.0),
    "all-c": partial(ShareMarking, 1.0),
    "random": partial(ShareMarking, RANDOM_SHARE),
    "last-rtt": lambda rng: LastRttMarking(),
}
"Policies of the comparison that have no model."

ABLATIONS: Mapping[str, Mapping[str, bool]] = {
    "swiftqueue-no-copies": {"has_copies": False},
    "swiftqueue-no-probes": {"has_probes": False},
}
"SwiftQueue without one of its parts: the options that take it away."

POLICIES = (*PLAIN, SWIFTQUEUE, ORACLE)

EXPLORING: Mapping[str, MakePolicy] = {
    ALL_L: partial(ShareMarking, 0.0, wants_times=True),
    "all-c": partial(ShareMarking, 1.0, wants_times=True),
    "random-0.02": partial(ShareMarking, 0.02, wants_times=True),
    "random-0.1": partial(ShareMarking, 0.1, wants_times=True),
    "random-0.5": partial(ShareMarking, 0.5, wants_times=True),
    "random-0.9": partial(ShareMarking, 0.9, wants_times=True),
    "probing": lambda rng: ProbingMarking(),
    "probing-from-c": lambda rng: ProbingMarking(Queue.C),
    "alternating": partial(AlternatingMarking, mean_s=1.0),
}
"What collects records; all ask for arrival times."


def exploring(name: str, seed: int) -> Marking:
    """Return what collects records, by one of the names in `EXPLORING`."""
    return EachAlone(partial(EXPLORING[name], stage_rng(seed, "marking", name)))


def compared(name: str, seed: int, weights: Path | None) -> Marking:
    """Return a policy of the comparison by its name; that of the oracle is `ALL_L`.

    `weights` are those of SwiftQueue's model; None: those that are shipped.

    Raises:
        ConfigurationError: there is no such policy, or the model cannot be loaded.
    """
    if name in PLAIN:
        return EachAlone(partial(PLAIN[name], stage_rng(seed, "marking", name)))
    check_policies([name])
    from eloquent.swiftqueue.serving import make

    return make(weights, **ABLATIONS.get(name, {}))


def check_policies(names: Sequence[str]) -> None:
    """Refuse names of no policy.

    Raises:
        ConfigurationError: there is one.
    """
    known = (*POLICIES, *ABLATIONS)
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"There is no marking policy {name!r}: choose from {', '.join(known)}."
            )
