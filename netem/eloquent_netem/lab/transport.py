"""All that the transport must show, part by part: run, judged, printed, written."""

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from eloquent_netem.lab.cancel import cancel_jobs, cancel_report
from eloquent_netem.lab.cases import Cache, Job, Progress, Results, run_jobs
from eloquent_netem.lab.fairness import fairness_jobs, fairness_report
from eloquent_netem.lab.findings import (
    Report,
    markdown_page,
    missed_table,
    summary_table,
    to_json,
)
from eloquent_netem.lab.liveness import liveness_jobs, liveness_report
from eloquent_netem.lab.outages import outage_jobs, outage_report
from eloquent_netem.lab.traces import whole_grid_jobs, whole_grid_report
from eloquent_netem.lab.wire import wire_jobs, wire_report

EXIT_MISSED = 1
EXIT_INTERRUPTED = 130

MISSED_SHOWN = 8
"Of the cases that miss a bound so many are listed on the terminal; the files have all."


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the command."""

    name: str
    jobs: Callable[[Sequence[int]], list[Job]]
    "The jobs for these seeds."
    report: Callable[[Results], Report]


def make_parts(traces: Path) -> dict[str, Part]:
    """Return all parts, in the order in which they run; `traces` is the folder of recordings."""
    parts = (
        Part(
            "grid",
            partial(whole_grid_jobs, folder=traces),
            partial(whole_grid_report, folder=traces),
        ),
        Part("wire", wire_jobs, wire_report),
        Part("outages", outage_jobs, outage_report),
        Part("fairness", fairness_jobs, fairness_report),
        Part("cancel", cancel_jobs, cancel_report),
        Part("liveness", liveness_jobs, liveness_report),
    )
    return {part.name: part for part in parts}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run."""

    seeds: Sequence[int]
    workers: int
    schemes: tuple[str, ...] = ()
    "Run only these; a bound that needs another is left out."
    json: Path | None = None
    markdown: Path | None = None
    cache: Path | None = None


def transport(parts: Sequence[Part], options: Options) -> int:
    """Run parts, print their findings, write the files; return the exit code.

    It is 0 if all bounds are met, 1 if one is missed, 130 after Ctrl-C, which keeps what is done.
    """
    cache = Cache(options.cache)
    reports: list[Report] = []
    rows: list[dict[str, Any]] = []
    is_complete = True
    begun_s = time.monotonic()
    for part in parts:
        jobs = [
            job
            for job in part.jobs(options.seeds)
            if not options.schemes or job.scheme in options.schemes
        ]
        with Progress(sys.stderr, part.name) as progress:
            results = run_jobs(jobs, workers=options.workers, cache=cache, progress=progress)
        reports.append(part.report(results))
        rows += _rows(part.name, results)
        is_complete = results.is_complete
        _write(options, reports, rows, took_s=time.monotonic() - begun_s, is_complete=is_complete)
        for failure in list(results.failures.values())[:MISSED_SHOWN]:
            _say(failure)
        if not is_complete:
            break
    _print(reports)
    if not is_complete:
        _say("Ended before its time: the figures are of the runs that were done.")
        return EXIT_INTERRUPTED
    return 0 if all(report.is_met for report in reports) else EXIT_MISSED


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _print(reports: Sequence[Report]) -> None:
    findings = [finding for report in reports for finding in report.findings]
    # A pipe or a file has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 160)
    missed = missed_table(findings, MISSED_SHOWN)
    if missed is not None:
        console.print(missed)
    console.print(summary_table(findings))


def _rows(part: str, results: Results) -> list[dict[str, Any]]:
    return [
        {
            "part": part,
            "case": job.case.title,
            "scheme": job.scheme,
            "seed": job.seed,
            **figures,
        }
        for job, figures in results.figures.items()
    ]


def _write(
    options: Options,
    reports: Sequence[Report],
    rows: Sequence[dict[str, Any]],
    *,
    took_s: float,
    is_complete: bool,
) -> None:
    """Write what there is so far."""
    command = " ".join(["eloquent", *sys.argv[1:]])
    if options.markdown is not None:
        options.markdown.write_text(markdown_page(reports, command), encoding="utf-8")
    if options.json is not None:
        content = {
            "meta": {
                "command": command,
                "aioquic": version("aioquic"),
                "eloquent-stream": version("eloquent-stream"),
                "python": platform.python_version(),
                "is_complete": is_complete,
                "took_s": round(took_s, 1),
            },
            "findings": [to_json(one) for report in reports for one in report.findings],
            "rows": rows,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
