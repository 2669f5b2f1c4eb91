"""The page of SwiftQueue's figures, `docs/results-swiftqueue.md`: all that an evaluation found."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from eloquent_netem.lab.findings import (
    SUMMARY_HEADER,
    Sheet,
    markdown_table,
    missed_rows,
    summary_rows,
)
from eloquent_netem.lab.statistics import Interval
from eloquent_netem.lab.swiftqueue_markings import ALL_L, ORACLE, SWIFTQUEUE
from eloquent_netem.lab.swiftqueue_page import (
    LEGEND,
    cells_of,
    cross_loss,
    gain,
    share_of_oracle,
    sheets,
)
from eloquent_netem.lab.swiftqueue_policies import PolicyRow, PolicyStudy
from eloquent_netem.lab.swiftqueue_speed import sheet as speed_sheet
from eloquent_netem.lab.swiftqueue_study import Found, prediction_sheet

OVERVIEW_HEADER = (
    "network",
    "all L ms",
    "SwiftQueue ms",
    "oracle ms",
    "gain %",
    "oracle's gain %",
    "of oracle's %",
    "P99.9, all L ms",
    "SwiftQueue ms",
    "oracle ms",
    "cross traffic loses %",
)


def results_page(found: Found) -> str:
    """Return the page."""
    meta = found.meta
    parts = [
        "# SwiftQueue's figures",
        "Made by command; do not edit. What is measured, and how, and the caveats that stand "
        "beside every figure here: [swiftqueue.md](swiftqueue.md#what-is-measured).",
        "\n".join(map(_made, [meta, *meta.get("also", ())])),
    ]
    if found.findings:
        parts += [
            "## The bars",
            "Where a row stands for several networks, it has the worst of them, and how many meet "
            "the bar.",
            markdown_table(SUMMARY_HEADER, summary_rows(found.findings)),
        ]
        missed = missed_rows(found.findings)
        if missed:
            header = ("part", "what", "where", "figure", "bar")
            parts += ["### Missed", markdown_table(header, missed)]
    if found.prediction:
        parts += ["## Prediction", _table(prediction_sheet(found.prediction))]
    congested = [name for one in (meta, *meta.get("also", ())) for name in one["congested"]]
    parts += _policies(found.policies, congested)
    if found.speed:
        parts += ["## Cost", _table(speed_sheet(found.speed))]
    return "\n\n".join(parts) + "\n"


def _made(meta: Mapping[str, Any]) -> str:
    parts = " and ".join(meta["parts"])
    return f"- {parts}: `{meta['command']}`, commit {meta['commit']}, {meta['begun_at'][:10]}"


def _policies(study: PolicyStudy, congested: Sequence[str]) -> list[str]:
    if not study.rows:
        return []
    schedulers = dict.fromkeys(row.scheduler for row in study.rows)
    parts = ["## Policies", LEGEND]
    for scheduler in schedulers:
        rows = [row for row in study.rows if row.scheduler == scheduler]
        parts += [
            f"### P99, {scheduler}",
            markdown_table(OVERVIEW_HEADER, overview(rows, congested)),
        ]
    for sheet in sheets(study):
        parts += [f"### {sheet.title}", _bare(sheet)]
    return parts


def overview(rows: Sequence[PolicyRow], congested: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a line for each network of one scheduler, and one for all congested ones."""
    lines = [_line(cell.scenario, here) for cell, here in cells_of(rows).items()]
    together = [row for row in rows if row.scenario in congested]
    if together:
        share = share_of_oracle(together, SWIFTQUEUE)
        lines.append(("*all congested*", *[""] * 5, _percent(share), *[""] * 4))
    return lines


def _line(name: str, rows: Sequence[PolicyRow]) -> tuple[str, ...]:
    shown = (ALL_L, SWIFTQUEUE, ORACLE)
    return (
        name,
        *(_mean(rows, policy, "latency_p99_ms") for policy in shown),
        _percent(gain(rows, SWIFTQUEUE)),
        _percent(gain(rows, ORACLE)),
        _percent(share_of_oracle(rows, SWIFTQUEUE)),
        *(_mean(rows, policy, "latency_p999_ms") for policy in shown),
        _percent(cross_loss(rows, SWIFTQUEUE)),
    )


def _mean(rows: Sequence[PolicyRow], policy: str, field: str) -> str:
    figures = [getattr(row, field) for row in rows if row.policy == policy]
    return f"{fmean(figures):.1f}" if figures else "—"


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "—"
    return f"{interval.figure + 0.0:.1f} ({interval.low:.0f} to {interval.high:.0f})"


def _table(sheet: Sheet) -> str:
    return f"{sheet.title}.\n\n{_bare(sheet)}"


def _bare(sheet: Sheet) -> str:
    return markdown_table(sheet.header, sheet.rows)
