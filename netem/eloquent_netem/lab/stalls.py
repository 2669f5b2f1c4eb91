"""The comparison: every scheme over every place with the same seeds, run once and remembered."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eloquent.errors import ConfigurationError
from eloquent_netem.errors import NetemError
from eloquent_netem.lab.answer import START_S
from eloquent_netem.lab.cases import Cache, Figures, Job, Progress, Results, all_jobs, run_jobs
from eloquent_netem.lab.oracle import asked_s, bound
from eloquent_netem.lab.rows import ORACLE, Arrivals, Bound, Driver, Place, Row, measure
from eloquent_netem.lab.simulated import NOT_LIVE, SimDriver
from eloquent_netem.lab.sources import LiveModel, Source

DRIVERS = {"sim": ("simulated", "SimDriver"), "tun": ("tun_driver", "TunDriver")}
"By name: the lab's module and its class, imported when it is asked for."

DEFAULT_SCHEMES = {
    "sim": ("eloquent", "eloquent-queued", "duplicate", "retransmit", "quic-stream", "tcp"),
}
"Where not all that a driver can run is worth a look."

KEPT_SEEDS = 3
"Of so many seeds, from the first on, the arrivals are kept, for reports."

_OF_THE_JOB = ("scenario", "source", "scheme", "driver", "seed", "rtt_ms", "loss", "burst_ms")
"A row's fields that the job has; the rest was measured."

_ARRIVALS = "arrivals"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One place and one source under one driver: a case of `eloquent_netem.lab.cases`."""

    place: Place
    source: Source
    driver: Driver

    @property
    def title(self) -> str:
        """See `Case.title`."""
        return f"{self.place.name}, {self.source.name}, {self.driver.name}"

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`: a row's figures, and for a few seeds when each token came."""
        arrivals, oracle = self.answer(scheme, seed)
        row = asdict(self.row(scheme, seed, arrivals, oracle))
        figures: Figures = {
            name: value
            for name, value in row.items()
            if name not in _OF_THE_JOB and value is not None
        }
        if seed < KEPT_SEEDS:
            figures[_ARRIVALS] = asdict(arrivals)
        return figures

    def answer(self, scheme: str, seed: int) -> tuple[Arrivals, Bound]:
        """Send one answer; return what it did, and what no sender can beat for its tokens."""
        if scheme == ORACLE:
            return self._oracle(seed)
        arrivals = self.driver.run(self.place, scheme, seed, self.source)
        oracle = bound(self.place, seed, arrivals.generated_s, arrivals.origin_s)
        return arrivals, oracle

    def row(self, scheme: str, seed: int, arrivals: Arrivals, oracle: Bound | None) -> Row:
        """Measure an answer.

        Raises:
            DeliveryError: it did not arrive whole, in order and once.
        """
        return measure(
            self.place,
            arrivals,
            oracle,
            scheme=scheme,
            driver=self.driver.name,
            seed=seed,
            source=self.source.name,
        )

    def _oracle(self, seed: int) -> tuple[Arrivals, Bound]:
        if isinstance(self.source, LiveModel):
            raise ConfigurationError(
                "The oracle needs to know when tokens are generated, and a live model does not "
                "tell: leave it out of --schemes; the rows of the others have their excess."
            )
        plan = self.source.plan(seed)
        begin_s = self.place.begin_s(seed, plan[-1].time_s)
        origin_s = START_S - begin_s
        first_s = asked_s(self.place, seed, begin_s) + origin_s
        generated_s = tuple(first_s + token.time_s for token in plan)
        oracle = bound(self.place, seed, generated_s, origin_s)
        arrivals = Arrivals(
            generated_s=generated_s,
            rendered_s=oracle.rendered_s,
            requested_s=START_S,
            base_delay_s=self.place.base_delay_s,
            origin_s=origin_s,
            downlink_packets=0,
            downlink_bytes=0,
            uplink_bytes=0,
        )
        return arrivals, oracle


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a comparison found."""

    rows: tuple[Row, ...]
    arrivals: Mapping[tuple[str, str, int], Arrivals]
    "Of the first seeds, by scenario, scheme and seed."
    failures: tuple[str, ...]
    "Runs that lost, doubled or changed a byte, did not end, or were refused, and how."
    meta: Mapping[str, object]
    is_complete: bool
    "False: the user ended it before its time."


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run."""

    pairs: Sequence[tuple[Place, Source]]
    driver: Driver
    schemes: Sequence[str]
    seeds: Sequence[int]
    workers: int | None = None
    "Processes to run on; None: what the driver bears, or one for each processor."
    cache: Path | None = None

    @property
    def processes(self) -> int:
        """How many processes to run on."""
        most = self.driver.most_workers
        if self.workers is None:
            return most or os.cpu_count() or 1
        return min(self.workers, most or self.workers)


def find_driver(name: str, **options: Any) -> Driver:
    """Return a driver by its name; `options` are the fields of its class.

    Raises:
        ConfigurationError: there is none, or what it needs is not installed.
    """
    if name not in DRIVERS:
        raise ConfigurationError(f"There is no driver {name!r}: choose {' or '.join(DRIVERS)}.")
    module, kind = DRIVERS[name]
    try:
        driver: Driver = getattr(import_module(f"eloquent_netem.lab.{module}"), kind)(**options)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The driver {name!r} needs the package {error.name!r}: install it, or use another "
            "driver."
        ) from error
    return driver


def default_schemes(driver: Driver, source: Source | None) -> tuple[str, ...]:
    """Return what to compare where the user does not say; `source` None is a planned one."""
    schemes = DEFAULT_SCHEMES.get(driver.name, driver.schemes)
    return schemes if isinstance(source, LiveModel) else (*schemes, ORACLE)


def compare(plan: Plan) -> Found:
    """Run what the cache does not know, with a progress bar; Ctrl-C keeps what is done.

    Raises:
        ConfigurationError: two places have one name, a scheme is unknown, or the machine cannot.
    """
    _check(plan)
    for warning in _warnings(plan):
        print(f"Warning: {warning}", file=sys.stderr)  # noqa: T201
    cases = [Comparison(place, source, plan.driver) for place, source in plan.pairs]
    jobs = all_jobs(cases, plan.schemes, plan.seeds)
    begun_at = datetime.now(UTC)
    with Progress(sys.stderr, f"stalls ({plan.driver.name})") as progress:
        results = run_jobs(
            jobs,
            workers=plan.processes,
            cache=Cache(plan.cache),
            progress=progress,
        )
    # In the jobs' order, so that the same seeds give the same file whatever ended first.
    done = [job for job in jobs if job in results.figures]
    rows = tuple(_row(job, results.figures[job]) for job in done)
    return Found(
        rows=rows,
        arrivals=dict(_kept(done, results)),
        failures=tuple(results.failures[job] for job in jobs if job in results.failures),
        meta=_meta(plan, rows, begun_at, results),
        is_complete=results.is_complete,
    )


def dumps(found: Found) -> str:
    """Return the JSON file: `{"meta": {...}, "rows": [...]}`."""
    content = {"meta": dict(found.meta), "rows": [asdict(row) for row in found.rows]}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _warnings(plan: Plan) -> list[str]:
    return [warning for place, _ in plan.pairs for warning in place.scenario.warnings()]


def _check(plan: Plan) -> None:
    names = [place.name for place, _ in plan.pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigurationError(f"Two networks are called {twice!r}: give each a name of its own.")
    known = (*plan.driver.schemes, ORACLE)
    for scheme in plan.schemes:
        if scheme not in known:
            raise ConfigurationError(
                f"There is no scheme {scheme!r} with --driver {plan.driver.name}: choose from "
                f"{', '.join(known)}."
            )
    is_live = any(isinstance(source, LiveModel) for _, source in plan.pairs)
    if is_live and isinstance(plan.driver, SimDriver):
        raise ConfigurationError(NOT_LIVE)
    try:
        plan.driver.check()
    except NetemError as error:
        raise ConfigurationError(str(error)) from error


def _row(job: Job, figures: Figures) -> Row:
    case = _comparison(job)
    place = case.place
    measured: dict[str, Any] = {
        name: figures.get(name) for name in Row.__dataclass_fields__ if name not in _OF_THE_JOB
    }
    return Row(
        scenario=place.name,
        source=case.source.name,
        scheme=job.scheme,
        driver=case.driver.name,
        seed=job.seed,
        rtt_ms=1000 * place.rtt_s,
        loss=place.loss,
        burst_ms=place.burst_ms,
        **measured,
    )


def _kept(jobs: Iterable[Job], results: Results) -> Iterable[tuple[tuple[str, str, int], Arrivals]]:
    for job in jobs:
        kept = results.figures[job].get(_ARRIVALS)
        if kept is not None:
            times: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in kept.items()
            }
            yield (_comparison(job).place.name, job.scheme, job.seed), Arrivals(**times)


def _comparison(job: Job) -> Comparison:
    assert isinstance(job.case, Comparison)
    return job.case


def _meta(
    plan: Plan, rows: Sequence[Row], begun_at: datetime, results: Results
) -> dict[str, object]:
    lateness_us = [row.lateness_p99_us for row in rows if row.lateness_p99_us is not None]
    names = ("aioquic", "cryptography", "eloquent-stream")
    return {
        "command": shlex.join(["eloquent", *sys.argv[1:]]),
        "begun_at": begun_at.isoformat(timespec="seconds"),
        "took_s": round((datetime.now(UTC) - begun_at).total_seconds(), 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "driver": {"name": plan.driver.name, **plan.driver.meta()},
        "fidelity": {"worst_lateness_p99_us": max(lateness_us)} if lateness_us else None,
        "schemes": list(plan.schemes),
        "seeds": list(plan.seeds),
        "sources": list(dict.fromkeys(source.name for _, source in plan.pairs)),
        "warnings": _warnings(plan),
        "is_complete": results.is_complete,
        "failures": list(results.failures.values()),
    }
