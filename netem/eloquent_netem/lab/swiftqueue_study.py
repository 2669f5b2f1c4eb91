"""SwiftQueue's evaluation: its two parts over the networks that are asked for, and their files."""

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eloquent.errors import ConfigurationError
from eloquent.swiftqueue.inference import SHIPPED, Model
from eloquent_netem.errors import NetemError
from eloquent_netem.lab.cases import Cache, Progress, run_jobs
from eloquent_netem.lab.findings import (
    Finding,
    Sheet,
    missed_table,
    summary_table,
    to_json,
)
from eloquent_netem.lab.paper import commit_of
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.statistics import HOW
from eloquent_netem.lab.swiftqueue_collect import (
    MANIFEST,
    check_families,
    collect,
    family_jobs,
    judged_data,
    versions,
)
from eloquent_netem.lab.swiftqueue_markings import (
    ABLATIONS,
    POLICIES,
    check_policies,
)
from eloquent_netem.lab.swiftqueue_measures import PredictionRow, accuracy_bars
from eloquent_netem.lab.swiftqueue_page import LEGEND, findings, sheets
from eloquent_netem.lab.swiftqueue_places import (
    CROWDED,
    TEST,
    congested_places,
    named_place,
    other_places,
    traced_place,
)
from eloquent_netem.lab.swiftqueue_policies import (
    SCHEDULERS,
    PolicyPlan,
    PolicyRow,
    PolicyStudy,
    check_schedulers,
    scheduler_of,
    study_of,
)
from eloquent_netem.lab.swiftqueue_speed import Row, Speed, measure
from eloquent_netem.lab.swiftqueue_speed import findings as speed_findings
from eloquent_netem.lab.swiftqueue_speed import sheet as speed_sheet
from eloquent_netem.scenario_parts import TraceRateSpec

FEW_FLOWS = 6
"Of each family, where nothing has been collected."

MISSED_SHOWN = 12

PREDICTION_HEADER = (
    "model",
    "split",
    "error ms",
    "on changes ms",
    "spikes F1",
    "pinball 0.99 ms",
    "below it %",
    "other queue ms",
    "on changes ms",
    "packets",
    "changes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to judge, and how."""

    parts: Sequence[str]
    seeds: Sequence[int]
    data: Path
    "The collected flows."
    cache: Path | None
    traces: Path | None = None
    "The folder with the recordings of the evaluation; None: it goes without."
    scenarios: Sequence[str] = ()
    down_trace: Path | None = None
    up_trace: Path | None = None
    policies: Sequence[str] = ()
    schedulers: Sequence[str] = ()
    models: Sequence[str] = ()
    "Of these, empty: all."
    weights: Path | None = None
    workers: int | None = None
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What an evaluation found."""

    prediction: tuple[PredictionRow, ...] = ()
    policies: PolicyStudy = field(default_factory=PolicyStudy)
    speed: Speed | None = None
    findings: tuple[Finding, ...] = ()
    failures: tuple[str, ...] = ()
    is_complete: bool = True
    meta: dict[str, Any] = field(default_factory=dict)


def evaluate(options: Options) -> Found:
    """Run what the cache does not know; Ctrl-C keeps what is done.

    Raises:
        ConfigurationError: an option is impossible, or something is missing.
    """
    begun_at = datetime.now(UTC)
    own = own_places(options)
    plan = _plan(options, own)
    prediction: list[PredictionRow] = []
    found: list[Finding] = []
    study, is_complete = PolicyStudy(), True
    failures: list[str] = []
    if "prediction" in options.parts:
        prediction = _predictions(options, own)
        found += _accuracy(prediction)
    if "policies" in options.parts:
        jobs = plan.jobs()
        with Progress(sys.stderr, "policies") as progress:
            results = run_jobs(
                jobs,
                workers=options.workers or os.cpu_count() or 1,
                cache=Cache(options.cache),
                progress=progress,
            )
        study = study_of(jobs, results)
        failures += results.failures.values()
        is_complete = results.is_complete
        found += findings(study, {place.name for place in congested(options.traces)})
    speed = None
    if "speed" in options.parts:
        speed = measure(Model.load(options.weights or SHIPPED))
        found += speed_findings(speed)
    return Found(
        prediction=tuple(prediction),
        policies=study,
        speed=speed,
        findings=tuple(found),
        failures=tuple(failures),
        is_complete=is_complete,
        meta=_meta(options, plan, begun_at, is_complete=is_complete),
    )


def read_found(path: Path) -> Found:
    """Return what an earlier evaluation found, but for its curves, from the file of `dumps`.

    Raises:
        ConfigurationError: the file cannot be read, or is something else.
    """
    try:
        return _loads(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"{path} has no figures of eloquent lab swiftqueue ({error}): name a file that --json "
            "wrote."
        ) from error


def joined(found: Found, earlier: Sequence[Found]) -> Found:
    """Return what was found, and beside it what others found that it lacks, the first first."""
    for one in earlier:
        new = [finding for finding in one.findings if finding not in found.findings]
        found = replace(
            found,
            prediction=found.prediction or one.prediction,
            policies=replace(
                found.policies,
                rows=_together(found.policies.rows, one.policies.rows),
                crowd=_together(found.policies.crowd, one.policies.crowd),
            ),
            speed=found.speed or one.speed,
            findings=(*found.findings, *new),
            meta={**found.meta, "also": [*found.meta.get("also", ()), one.meta]},
        )
    return found


def _together(rows: Sequence[PolicyRow], more: Sequence[PolicyRow]) -> tuple[PolicyRow, ...]:
    """Return rows and those of more that they lack, run by run."""
    there = {_run_of(row) for row in rows}
    return (*rows, *(row for row in more if _run_of(row) not in there))


def _run_of(row: PolicyRow) -> tuple[str, str, str, int]:
    return row.scenario, row.scheduler, row.policy, row.seed


def _loads(content: Mapping[str, Any]) -> Found:
    speed = content["speed"]
    rows = [Row(**row) for row in speed["rows"]] if speed else []
    return Found(
        prediction=tuple(PredictionRow(**row) for row in content["prediction"]),
        policies=PolicyStudy(
            rows=tuple(PolicyRow(**row) for row in content["policies"]),
            crowd=tuple(PolicyRow(**row) for row in content["many_flows"]),
        ),
        speed=Speed(rows=tuple(rows), held_bytes=speed["held_bytes"]) if speed else None,
        findings=tuple(
            Finding(**{name: value for name, value in one.items() if name != "is_met"})
            for one in content["findings"]
        ),
        meta=content["meta"],
    )


def own_places(options: Options) -> list[Place]:
    """Return the networks that the options name; none: those of the evaluation are meant.

    Raises:
        ConfigurationError: there is no such network, or it cannot be used.
    """
    if options.up_trace is not None and options.down_trace is None:
        raise ConfigurationError("--up-trace goes with --down-trace: tokens come down the link.")
    places = [named_place(name) for name in dict.fromkeys(options.scenarios)]
    if options.down_trace is not None:
        places.append(traced_place(options.down_trace, options.up_trace))
    for place in places:
        scheduler_of(place)
        try:
            place.scenario.links()  # A recording may be missing, or none.
        except NetemError as error:
            raise ConfigurationError(str(error)) from error
    return places


def congested(recordings: Path | None) -> list[Place]:
    """Return the networks where there is something to win, with the recordings that are there."""
    return _present(congested_places(recordings))


def _present(places: Iterable[Place]) -> list[Place]:
    """Leave out the recordings that a folder does not have."""
    rates = [(place, place.scenario.down.rate) for place in places]
    return [
        place
        for place, rate in rates
        if not isinstance(rate, TraceRateSpec) or Path(rate.file).exists()
    ]


def show(found: Found) -> None:
    """Print tables, and which bars are met."""
    # A pipe or a file has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if found.prediction:
        console.print(terminal(prediction_sheet(found.prediction)))
    for sheet in sheets(found.policies):
        console.print(terminal(sheet))
    if found.speed:
        console.print(terminal(speed_sheet(found.speed)))
    if found.policies.rows:
        console.print(LEGEND, style="dim")
    if found.findings:
        missed = missed_table(found.findings, MISSED_SHOWN)
        if missed is not None:
            console.print(missed)
        console.print(summary_table(found.findings))


def dumps(found: Found) -> str:
    """Return the JSON file: "meta", "prediction", "policies", "many_flows", "speed", "findings"."""
    content = {
        "meta": found.meta,
        "prediction": [asdict(row) for row in found.prediction],
        "policies": [asdict(row) for row in found.policies.rows],
        "many_flows": [asdict(row) for row in found.policies.crowd],
        "speed": None if found.speed is None else asdict(found.speed),
        "findings": [to_json(one) for one in found.findings],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def prediction_sheet(rows: Sequence[PredictionRow]) -> Sheet:
    """Return the table of the predictors."""
    lines = [
        (
            row.model,
            row.split,
            _told(row.mae_ms),
            _told(row.mae_change_ms),
            _told(row.spike_f1),
            _told(row.pinball_99),
            _told(None if row.coverage_99 is None else 100 * row.coverage_99),
            _told(row.other_mae_ms),
            _told(row.other_mae_change_ms),
            str(row.packets),
            str(row.changes),
        )
        for row in rows
        if "/" not in row.split  # Each family's rows are in the file.
    ]
    return Sheet("How well delays are foretold", PREDICTION_HEADER, tuple(lines))


def terminal(sheet: Sheet) -> Table:
    """Return a table for a terminal."""
    table = Table(title=sheet.title, title_justify="left", title_style="bold")
    for index, name in enumerate(sheet.header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for line in sheet.rows:
        table.add_row(*line)
    return table


def _plan(options: Options, own: Sequence[Place]) -> PolicyPlan:
    """Return the policies' plan; whatever is wrong with the options is found here."""
    check_policies(options.policies)
    check_schedulers(options.schedulers)
    plan = PolicyPlan(
        places=own or (*congested(options.traces), *_present(other_places(options.traces))),
        schedulers=options.schedulers or SCHEDULERS,
        policies=options.policies or (*POLICIES, *ABLATIONS),
        seeds=options.seeds,
        weights=options.weights,
        crowded=None if own else CROWDED,
    )
    if "policies" in options.parts:
        plan.jobs()
    return plan


def _predictions(options: Options, own: Sequence[Place]) -> list[PredictionRow]:
    """Judge the predictors on the test families and traces, or on flows of one's own networks."""
    from eloquent_netem.lab.swiftqueue_prediction import MODELS, check_models
    from eloquent_netem.lab.swiftqueue_prediction import evaluate as judge

    models = options.models or MODELS
    check_models(models)
    data = options.data
    if not (data / MANIFEST).exists():
        jobs = family_jobs(check_families(()), data, flows=FEW_FLOWS, seed=1)
        collect(jobs, data, workers=options.workers, command=options.command)
    if own:
        data = judged_data(
            data, own, flows=len(options.seeds), workers=options.workers, command=options.command
        )
    weights = SHIPPED if options.weights is None else options.weights
    return judge(data, weights=weights, models=models, split=TEST, progress=_say)


def _accuracy(rows: Sequence[PredictionRow]) -> list[Finding]:
    """Hold ours against the others, over all that is judged, and over families and traces."""
    found: list[Finding] = []
    for split in dict.fromkeys(row.split for row in rows):
        try:
            found += accuracy_bars(rows, split=split) if "/" not in split else []
        except ValueError as error:  # Not all models were asked for, or nothing changed.
            _say(f"No accuracy bars: {error}")
    return found


def _meta(
    options: Options, plan: PolicyPlan, begun_at: datetime, *, is_complete: bool
) -> dict[str, Any]:
    return {
        "command": options.command,
        "commit": commit_of(Path(__file__).parent),
        "begun_at": begun_at.isoformat(timespec="seconds"),
        "took_s": round((datetime.now(UTC) - begun_at).total_seconds(), 1),
        "versions": versions(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "parts": list(options.parts),
        "scenarios": [place.name for place in plan.places],
        "congested": [place.name for place in congested(options.traces)],
        "schedulers": list(plan.schedulers),
        "policies": list(plan.policies),
        "seeds": list(options.seeds),
        "weights": "shipped" if options.weights is None else str(options.weights),
        "intervals": HOW,
        "is_complete": is_complete,
    }


def _told(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
