"""The subcommands `eloquent swiftqueue` and `eloquent lab swiftqueue`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.stalls_commands import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    FAILURES_SHOWN,
    check_writable,
    user_cache,
)

if TYPE_CHECKING:
    from eloquent.swiftqueue.training import Progress

Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True)]
Paths = Annotated[tuple[Path, ...], Parameter(consume_multiple=True)]

PARTS = ("prediction", "policies", "speed")
CACHE = "swiftqueue.jsonl"
DATA = "swiftqueue/data"
WEIGHTS = "swiftqueue/swiftqueue.safetensors"
REPLAYS = "swiftqueue/replays"
"In the user's cache folder."

LOOKS_A_LINE = 10
"Preparing is told every so many times, since it is told for each flow."

swiftqueue = App(
    name="swiftqueue",
    help="The predictor behind --ecn swiftqueue: collect records, train it.",
)


@swiftqueue.command
def collect(
    *,
    families: Names = (),
    flows: int = 24,
    seed: int = 1,
    out: Path | None = None,
    traces: Paths = (),
    length_s: float = 60.0,
    workers: int | None = None,
) -> None:
    """Run scenarios in virtual time and write what each packet met, in both queues.

    Each flow is an answer over a DualPI2 bottleneck with cross traffic, its packets marked by a
    policy that explores. Families, never packets, are split into train, validation and test.
    Ctrl-C keeps what is done; the same command goes on where it ended.

    Parameters
    ----------
    families
        The scenario families; by default all.
    flows
        How many flows of each family, and of each trace.
    seed
        The first flow's; those after it follow.
    out
        The folder to write to; by default one in the user's cache folder.
    traces
        Recordings of links in mahimahi's format, or folders of them: NAME.down, and beside it
        NAME.up if there is one. What is recorded is always for testing.
    length_s
        How long each answer lasts.
    workers
        Processes to run on; by default one for each processor.
    """
    from eloquent_netem.lab.swiftqueue_collect import (
        check_families,
        family_jobs,
        held_out_jobs,
        recorded_networks,
    )
    from eloquent_netem.lab.swiftqueue_collect import collect as run

    if flows < 1 or seed < 0 or length_s < 1 or (workers is not None and workers < 1):
        raise ConfigurationError("--flows, --length-s and --workers must be at least 1.")
    folder = _made(_default(DATA) if out is None else out)
    jobs = family_jobs(
        check_families(families), folder, flows=flows, seed=seed, length_s=length_s
    ) + held_out_jobs(recorded_networks(traces), folder, flows=flows, seed=seed, length_s=length_s)
    results = run(jobs, folder, workers=workers, command=_command())
    _say(f"{len(results.figures)} flows: {folder}")
    _end(results.is_complete, list(results.failures.values()))


@swiftqueue.command
def train(
    *,
    data: Path | None = None,
    out: Path | None = None,
    minutes: float = 30.0,
    threads: int | None = None,
    seed: int = 1,
) -> None:
    """Train the predictor on collected records, and write its weights.

    The best weights on the validation families are kept; test families are not looked at. Beside
    the weights go a .json that describes them and the curves of the training.

    Parameters
    ----------
    data
        The folder that `eloquent swiftqueue collect` wrote.
    out
        Where the weights go (.safetensors); by default into the user's cache folder.
    minutes
        The longest it may take.
    threads
        Of the processor; by default torch's own choice.
    seed
        The same seed on the same machine makes the same weights, if time does not run out.
    """
    try:
        from eloquent.swiftqueue.training import Options
        from eloquent.swiftqueue.training import train as run
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"Training needs the package {error.name!r}: pip install 'eloquent-stream[engine]'."
        ) from error
    from eloquent_netem.lab.paper import commit_of

    if minutes <= 0 or (threads is not None and threads < 1):
        raise ConfigurationError("--minutes must be above 0, --threads at least 1.")
    weights = _default(WEIGHTS) if out is None else out
    curves = _made(weights.parent / f"{weights.stem}-curves")
    report = run(
        Options(
            data=_default(DATA) if data is None else data,
            out=weights,
            cache=_made(_default(REPLAYS)),
            curves=curves,
            seed=seed,
            time_limit_s=60 * minutes,
            threads=threads,
            about={"command": _command(), "commit": commit_of(Path(__file__).parent)},
        ),
        _tell_training,
    )
    figures = report.validation
    _say(
        f"{report.parameters} parameters, {report.steps} steps in {report.elapsed_s:.0f} s "
        f"(ended by {report.stopped}). On the validation families: error "
        f"{figures['mae_ms']:.2f} ms, on changes {figures['mae_change_ms']:.2f} ms; the last value "
        f"has {figures['last_value_mae_ms']:.2f} and {figures['last_value_mae_change_ms']:.2f}."
    )
    _say(f"The weights: {weights}; the curves: {curves}")


def lab_swiftqueue(
    *,
    scenario: Names = (),
    down_trace: Path | None = None,
    up_trace: Path | None = None,
    traces: Path = Path("../shared/traces"),
    part: Names = (),
    seeds: int = 5,
    policies: Names = (),
    schedulers: Names = (),
    models: Names = (),
    weights: Path | None = None,
    data: Path | None = None,
    also: Paths = (),
    json: Path | None = None,
    markdown: Path | None = None,
    report: Path | None = None,
    workers: int | None = None,
    cache: Path | None = None,
) -> None:
    """Judge SwiftQueue: how well it foretells delays, and what choosing queues by it gains.

    Predictions and policies are judged on emulated DualPI2 bottlenecks with cross traffic, in
    virtual time, Prague on both sides: `prediction` beside other predictors on families that none
    has seen, `policies` beside other ways to mark, and beside an oracle whose packets wait in both
    queues. Ctrl-C ends it and keeps what is done. The exit code is 1 if a run failed.

    Parameters
    ----------
    scenario
        Networks with DualPI2: those of the evaluation by name, names of the library
        (`eloquent netem list`), or paths of scenario files. By default all of the evaluation.
    down_trace
        A recording of a downlink in mahimahi's format, as the network: DualPI2 with cross traffic
        in front of it. It is judged on, never trained on.
    up_trace
        The same for its uplink.
    traces
        The folder with the evaluation's own recordings; if there is none, it goes without them.
    part
        `prediction`, `policies`, `speed` (what a prediction costs; wants an idle machine); by
        default all.
    seeds
        How many seeds, from 0 on; for `prediction`, flows of each network that is named.
    policies
        What to compare: all-l, all-c, random (10 % into C), last-rtt, swiftqueue, oracle, and
        swiftqueue-no-copies and swiftqueue-no-probes. By default all.
    schedulers
        wrr, time-shifted; by default both.
    models
        The predictors to judge; by default all.
    weights
        Of SwiftQueue's model (.safetensors); by default those that are shipped.
    data
        For `prediction`, the folder that `eloquent swiftqueue collect` wrote. By default one in the
        user's cache folder, and if there is none, a few flows of each family are collected.
    also
        Files that --json wrote at other times: the runs and parts that they have more are shown
        beside.
    json
        Write all rows to this file: {"meta", "prediction", "policies", ...}.
    markdown
        Write the page of figures to this file; docs/results-swiftqueue.md is one.
    report
        Write a page with figures, and the figures, into this folder.
    workers
        Processes to run on; by default one for each processor.
    cache
        Remember every run in this file, and take from it those that ran on the same code; by
        default swiftqueue.jsonl in the user's cache folder.
    """
    from eloquent_netem.lab.report_style import check_can_draw
    from eloquent_netem.lab.swiftqueue_study import Options, dumps, joined, read_found, show
    from eloquent_netem.lab.swiftqueue_study import evaluate as run

    if seeds < 1 or (workers is not None and workers < 1):
        raise ConfigurationError("--seeds and --workers must be at least 1.")
    for name in part:
        if name not in PARTS:
            raise ConfigurationError(f"There is no part {name!r}: choose {' or '.join(PARTS)}.")
    cache = user_cache().with_name(CACHE) if cache is None else cache
    for output in (json, markdown, cache):
        if output is not None:
            check_writable(output)
    if report is not None:
        check_can_draw()
        _made(report)
    earlier = [read_found(path) for path in also]
    found = run(
        Options(
            scenarios=scenario,
            down_trace=down_trace,
            up_trace=up_trace,
            traces=traces if traces.is_dir() else None,
            parts=part or PARTS,
            seeds=range(seeds),
            policies=policies,
            schedulers=schedulers,
            models=models,
            weights=weights,
            data=_made(_default(DATA)) if data is None else data,
            workers=workers,
            cache=cache,
            command=_command(),
        )
    )
    found = joined(found, earlier)
    show(found)
    if json is not None:
        json.write_text(dumps(found), encoding="utf-8")
    if markdown is not None:
        from eloquent_netem.lab.swiftqueue_markdown import results_page

        markdown.write_text(results_page(found), encoding="utf-8")
    if report is not None:
        from eloquent_netem.lab.swiftqueue_report import write_report

        _say(f"The report: {write_report(found, report)}")
    _end(found.is_complete, found.failures)


def _tell_training(progress: "Progress") -> None:
    if progress.stage == "prepare" and progress.done % LOOKS_A_LINE and progress.done < progress.of:
        return
    shown = ("loss", "mae_ms", "mae_change_ms")
    figures = "".join(
        f", {name} {progress.figures[name]:.3f}" for name in shown if name in progress.figures
    )
    _say(
        f"{progress.stage}: {progress.done} of {progress.of} after {progress.elapsed_s:.0f} s"
        f"{figures}"
    )


def _end(is_complete: bool, failures: Sequence[str]) -> None:
    """Say what failed, and exit if not all is well."""
    for failure in failures[:FAILURES_SHOWN]:
        _say(f"FAILED: {failure}")
    if len(failures) > FAILURES_SHOWN:
        _say(f"and {len(failures) - FAILURES_SHOWN} more runs failed")
    if not is_complete:
        _say("Ended before its time: what is done is kept.")
        sys.exit(EXIT_INTERRUPTED)
    if failures:
        sys.exit(EXIT_FAILED)


def _default(name: str) -> Path:
    return user_cache().parent / name


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"Cannot write to {folder}: {error.strerror}.") from error
    return folder


def _command() -> str:
    return " ".join(["eloquent", *sys.argv[1:]])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
