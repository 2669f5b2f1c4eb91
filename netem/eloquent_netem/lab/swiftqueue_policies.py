"""Marking policies over the same bottlenecks with the same seeds: what each packet took."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.cases import Figures, Job, Results
from eloquent_netem.lab.measures import measure_stalls
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.swiftqueue_flow import FlowRun, run_crowd, run_flow
from eloquent_netem.lab.swiftqueue_markings import (
    ABLATIONS,
    ALL_L,
    ORACLE,
    PLAIN,
    POLICIES,
    SWIFTQUEUE,
    compared,
)
from eloquent_netem.rate import MS_PER_S
from eloquent_netem.scenario_parts import DualPi2Spec

SCHEDULERS = ("wrr", "time-shifted")

CROWD_FLOWS = 20

CURVE_SHARES = tuple(1 - 10 ** (-step / 10) for step in range(36))
"The quantiles that are kept of each run: from the least latency to 99.97 %."
TIMELINE_S = 8.0
"So much of a run is kept packet by packet, around its longest delay in L."
TIMELINE_SEED = 0

_CURVE, _TIMELINE = "curve_ms", "timeline"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    """One run: a row of `policies` in `--json`. Shares are of one."""

    scenario: str
    scheduler: str
    policy: str
    seed: int
    latency_p50_ms: float
    latency_p99_ms: float
    latency_p999_ms: float
    "Arrival less sending. Copies that leave together count once, by the first that arrives."
    latency_every_packet_p99_ms: float
    "With copies counted by themselves."
    token_delay_p99_ms: float
    "Rendered less generated less the path's base delay."
    c_share: float
    "Of the packets, copies included, that left by the classic queue."
    copies_share: float
    lost_share: float
    packets_per_token: float
    wire_bytes_per_token: float
    cross_goodput_mbit: float
    cross_goodput_l_mbit: float
    cross_goodput_c_mbit: float
    "Of the cross traffic in either queue."


MEASURED = tuple(
    one.name
    for one in fields(PolicyRow)
    if one.name not in ("scenario", "scheduler", "policy", "seed")
)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Some seconds of a run, a packet each: both queues' delays, and where it went."""

    time_s: tuple[float, ...]
    l_ms: tuple[float, ...]
    c_ms: tuple[float, ...]
    "NaN as None in the file: it would have been lost there."
    queue: tuple[int, ...]
    is_copy: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyCase:
    """One bottleneck: a case of `eloquent_netem.lab.cases` whose schemes are marking policies.

    `is_race` makes it the oracle's: each packet waits in both queues and leaves by the first that
    does not drop it.
    """

    place: Place
    is_race: bool = False
    weights: Path | None = None
    "Of SwiftQueue's model; None: those that are shipped."
    weights_digest: str = ""
    flows: int = 1

    @property
    def title(self) -> str:
        """See `Case.title`."""
        return f"{self.place.name}, {scheduler_of(self.place)}"

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`; the scheme is a policy, which the oracle's case has too."""
        marking = compared(scheme, seed, self.weights)
        scenario = self.place.scenario
        if self.flows > 1:
            return _figures(run_crowd(scenario, marking, flows=self.flows, seed=seed))
        run = run_flow(scenario, marking, seed=seed, is_race=self.is_race)
        figures = _figures([run])
        if seed == TIMELINE_SEED and scheme == SWIFTQUEUE:
            figures[_TIMELINE] = _timeline(run)
        return figures


def scheduler_of(place: Place) -> str:
    """Return the scheduler of a place's downlink.

    Raises:
        ConfigurationError: it has no DualPI2.
    """
    return _queue_of(place).scheduler


def with_scheduler(place: Place, scheduler: str) -> Place:
    """Return the place with another scheduler on its downlink.

    Raises:
        ConfigurationError: it has no DualPI2.
    """
    queue = replace(_queue_of(place), scheduler=scheduler)
    down = replace(place.scenario.down, queue=queue)
    return replace(place, scenario=replace(place.scenario, down=down))


def _queue_of(place: Place) -> DualPi2Spec:
    queue = place.scenario.down.queue
    if not isinstance(queue, DualPi2Spec):
        raise ConfigurationError(
            f"{place.name} has no DualPI2 on its downlink, so there is no queue to choose: write "
            'queue = { kind = "dualpi2" } into its [down].'
        )
    return queue


def check_schedulers(names: Sequence[str]) -> None:
    """Refuse names of no scheduler.

    Raises:
        ConfigurationError: there is one.
    """
    for name in names:
        if name not in SCHEDULERS:
            raise ConfigurationError(
                f"There is no scheduler {name!r}: choose {' or '.join(SCHEDULERS)}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyPlan:
    """What to run."""

    places: Sequence[Place]
    schedulers: Sequence[str] = SCHEDULERS
    policies: Sequence[str] = (*POLICIES, *ABLATIONS)
    seeds: Sequence[int] = range(5)
    weights: Path | None = None
    crowded: Place | None = None
    "Where many flows share a bottleneck; None: nowhere."

    def jobs(self) -> list[Job]:
        """Return a job for each run, those of one network and seed together.

        Raises:
            ConfigurationError: a policy is unknown, a network has no DualPI2, or there are no
                weights.
        """
        has_model = any(name not in PLAIN and name != ORACLE for name in self.policies)
        digest = _weights_digest(self.weights) if has_model else ""
        jobs = []
        for place in self.places:
            for scheduler in self.schedulers:
                here = with_scheduler(place, scheduler)
                for seed in self.seeds:
                    jobs += [self._job(here, policy, seed, digest) for policy in self.policies]
        if self.crowded is not None:
            for scheduler in self.schedulers:
                here = with_scheduler(self.crowded, scheduler)
                for seed in self.seeds:
                    jobs += [
                        self._job(here, policy, seed, digest, flows=CROWD_FLOWS)
                        for policy in (ALL_L, SWIFTQUEUE)
                        if policy in self.policies
                    ]
        return jobs

    def _job(self, place: Place, policy: str, seed: int, digest: str, flows: int = 1) -> Job:
        if policy == ORACLE:
            return Job(PolicyCase(place=place, is_race=True), ALL_L, seed)
        if policy in PLAIN:
            return Job(PolicyCase(place=place, flows=flows), policy, seed)
        case = PolicyCase(place=place, weights=self.weights, weights_digest=digest, flows=flows)
        return Job(case, policy, seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStudy:
    """What the runs found."""

    rows: tuple[PolicyRow, ...] = ()
    crowd: tuple[PolicyRow, ...] = ()
    "Rows of `CROWD_FLOWS` flows at once, all of them together; cross traffic is the others'."
    curves_ms: dict[tuple[str, str, str], tuple[float, ...]] = field(default_factory=dict)
    "Latency at `CURVE_SHARES`, the mean over the seeds, by scenario, scheduler and policy."
    timelines: dict[tuple[str, str], Timeline] = field(default_factory=dict)
    "Of SwiftQueue, by scenario and scheduler."


def study_of(jobs: Sequence[Job], results: Results) -> PolicyStudy:
    """Put the runs' figures into rows, in the jobs' order."""
    rows: list[PolicyRow] = []
    crowd: list[PolicyRow] = []
    curves: dict[tuple[str, str, str], list[list[float]]] = {}
    timelines = {}
    for job in jobs:
        if not isinstance(job.case, PolicyCase) or job not in results.figures:
            continue
        figures = results.figures[job]
        row = _row(job.case, job.scheme, job.seed, figures)
        if job.case.flows > 1:
            crowd.append(row)
            continue
        rows.append(row)
        key = (row.scenario, row.scheduler, row.policy)
        curves.setdefault(key, []).append(figures[_CURVE])
        if _TIMELINE in figures:
            timelines[row.scenario, row.scheduler] = Timeline(**figures[_TIMELINE])
    means = {key: tuple(map(fmean, zip(*several, strict=True))) for key, several in curves.items()}
    return PolicyStudy(rows=tuple(rows), crowd=tuple(crowd), curves_ms=means, timelines=timelines)


def _row(case: PolicyCase, scheme: str, seed: int, figures: Figures) -> PolicyRow:
    measured: dict[str, Any] = {name: figures[name] for name in MEASURED}
    return PolicyRow(
        scenario=case.place.name,
        scheduler=scheduler_of(case.place),
        policy=ORACLE if case.is_race else scheme,
        seed=seed,
        **measured,
    )


def _figures(runs: Sequence[FlowRun]) -> Figures:
    """Measure the packets of one flow, or of several together."""
    took_ms = np.sort(np.concatenate([run.latency_s for run in runs])) * MS_PER_S
    every_ms = np.sort(np.concatenate([run.latency_every_packet_s for run in runs])) * MS_PER_S
    packets = sum(len(run.arrived_s) for run in runs)
    tokens = sum(len(run.generated_s) for run in runs)
    by_queue = {
        queue: sum(mbit for kind, mbit in runs[0].cross_mbit.items() if kind.endswith(queue))
        for queue in "LC"
    }
    token_delay_s = [
        measure_stalls(run.generated_s, run.rendered_s, run.base_delay_s).delay_p99_s
        for run in runs
    ]
    return {
        "latency_p50_ms": _quantile(took_ms, 0.5),
        "latency_p99_ms": _quantile(took_ms, 0.99),
        "latency_p999_ms": _quantile(took_ms, 0.999),
        "latency_every_packet_p99_ms": _quantile(every_ms, 0.99),
        "token_delay_p99_ms": fmean(token_delay_s) * MS_PER_S,
        "c_share": sum(run.c_share * len(run.arrived_s) for run in runs) / packets,
        "copies_share": float(sum(run.is_copy.sum() for run in runs)) / packets,
        "lost_share": float(sum(np.isnan(run.arrived_s).sum() for run in runs)) / packets,
        "packets_per_token": sum(run.wire_packets for run in runs) / tokens,
        "wire_bytes_per_token": sum(run.wire_bytes for run in runs) / tokens,
        "cross_goodput_mbit": sum(by_queue.values()),
        "cross_goodput_l_mbit": by_queue["L"],
        "cross_goodput_c_mbit": by_queue["C"],
        _CURVE: [round(_quantile(took_ms, share), 3) for share in CURVE_SHARES],
    }


def _quantile(ordered: NDArray[np.float64], share: float) -> float:
    return float(np.quantile(ordered, share, method="inverted_cdf"))


def _timeline(run: FlowRun) -> dict[str, list[Any]]:
    """Return what `Timeline` holds, around the longest delay in L, as JSON has it."""
    flow = run.flow
    delay_ms = flow.delay_s.astype(np.float64) * MS_PER_S
    peak = int(np.argmax(np.nan_to_num(delay_ms[:, 0], nan=-np.inf)))
    since_s = flow.sent_s - flow.sent_s[0]
    begin_s = max(since_s[peak] - TIMELINE_S / 2, 0.0)
    shown = (since_s >= begin_s) & (since_s < begin_s + TIMELINE_S)
    l_ms, c_ms = (
        [
            None if math.isnan(value) else round(value, 2)
            for value in delay_ms[shown, queue].tolist()
        ]
        for queue in (0, 1)
    )
    return {
        "time_s": np.round(since_s[shown], 4).tolist(),
        "l_ms": l_ms,
        "c_ms": c_ms,
        "queue": flow.queue[shown].tolist(),
        "is_copy": run.is_copy[shown].tolist(),
    }


def _weights_digest(weights: Path | None) -> str:
    """Return a hash of the model's weights, those that are shipped if None."""
    if weights is None:
        from eloquent.swiftqueue.inference import SHIPPED

        weights = SHIPPED
    try:
        return hashlib.blake2b(weights.read_bytes(), digest_size=12).hexdigest()
    except OSError as error:
        raise ConfigurationError(
            f"The weights {weights} cannot be read: {error.strerror}. `eloquent swiftqueue train` "
            "makes some."
        ) from error
