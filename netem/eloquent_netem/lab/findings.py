"""Findings: a figure, its bound, and whether it is met; and how they are shown."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from rich.table import Table

from eloquent_netem.lab.statistics import mean_interval

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One figure; those with the same `part` and `what` are shown together, as the worst."""

    part: str
    what: str
    where: str = ""
    "The case, if there are several."
    figure: float
    half: float | None = None
    "Half a 95 % confidence interval over the seeds."
    bound: float | None = None
    "None: the figure is only told."
    is_least: bool = False
    "The bound is what the figure must reach; else what it must not exceed."
    unit: str = ""

    @property
    def excess(self) -> float:
        """How far the figure is on the wrong side of its bound; 0 or less: it is met."""
        if self.bound is None:
            return float("-inf")
        return self.bound - self.figure if self.is_least else self.figure - self.bound

    @property
    def is_met(self) -> bool:
        """Whether the bound, if any, is met."""
        return self.excess <= ROUNDING


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of texts that goes with the findings."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(slots=True)
class Report:
    """What one part found."""

    part: str
    findings: list[Finding] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    notes: str = ""
    "How it was measured, for the page."

    @property
    def is_met(self) -> bool:
        """Whether every bound is met."""
        return all(finding.is_met for finding in self.findings)


def mean_half(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half its 95 % confidence interval."""
    interval = mean_interval(values)
    return interval.figure, interval.half


SUMMARY_HEADER = ("part", "what", "figure", "bound", "met", "worst at")


def summary_rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """Return a row for each part and what, with its worst figure."""
    rows: list[tuple[str, ...]] = []
    ordered = sorted(findings, key=lambda one: (one.part, one.what))
    # Python's sort is stable: within a group the findings stay in their order.
    for (part, what), together in groupby(ordered, key=lambda one: (one.part, one.what)):
        group = list(together)
        worst = max(group, key=lambda one: (one.excess, one.figure))
        met = sum(one.is_met for one in group)
        verdict = "yes" if met == len(group) else "NO"
        if worst.bound is None:
            verdict = "—"
        elif len(group) > 1:
            verdict += f" ({met} of {len(group)})"
        rows.append((part, what, _figure(worst), _bound(worst), verdict, worst.where))
    return rows


def summary_table(findings: Iterable[Finding]) -> Table:
    """Return the summary for a terminal."""
    table = Table(*SUMMARY_HEADER)
    for row in summary_rows(findings):
        style = "red" if row[4].startswith("NO") else None
        table.add_row(*row, style=style)
    return table


def missed_rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """Return a row for each finding that misses its bound, the worst of each kind first."""
    missed = [one for one in findings if not one.is_met]
    missed.sort(key=lambda one: (one.part, one.what, -one.excess))
    return [(one.part, one.what, one.where, _figure(one), _bound(one)) for one in missed]


def missed_table(findings: Iterable[Finding], most: int) -> Table | None:
    """Return the worst of what is missed, `most` for each part and what, or None."""
    table = Table("part", "what", "where", "figure", "bound", title="Missed")
    missed = missed_rows(findings)
    for kind, together in groupby(missed, key=lambda row: row[:2]):
        group = list(together)
        for row in group[:most]:
            table.add_row(*row)
        if len(group) > most:
            table.add_row(*kind, f"and {len(group) - most} more", "", "")
    return table if missed else None


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def markdown_page(reports: Sequence[Report], command: str) -> str:
    """Return all parts as a page: first all bounds, then each part's tables."""
    findings = [finding for report in reports for finding in report.findings]
    parts = [
        "# The transport's bounds",
        f"Made by `{command}`; do not edit. Virtual time, both real QUIC ends; ± is half a 95 % "
        "confidence interval over the seeds. Where a row stands for several cases, it has the "
        "worst, and how many meet the bound.",
        markdown_table(SUMMARY_HEADER, summary_rows(findings)),
    ]
    for report in reports:
        parts.append(f"## {report.part}")
        if report.notes:
            parts.append(report.notes)
        for sheet in report.sheets:
            parts += [f"### {sheet.title}", markdown_table(sheet.header, sheet.rows)]
    return "\n\n".join(parts) + "\n"


def to_json(finding: Finding) -> dict[str, Any]:
    """Return a finding as it goes into the JSON file."""
    return {**asdict(finding), "is_met": finding.is_met}


def _figure(finding: Finding) -> str:
    half = "" if not finding.half else f" ± {finding.half:.2g}"
    return f"{_short(finding.figure)}{half}{finding.unit and ' '}{finding.unit}"


def _bound(finding: Finding) -> str:
    if finding.bound is None:
        return "—"
    sign = ">=" if finding.is_least else "<="
    return f"{sign} {_short(finding.bound)}{finding.unit and ' '}{finding.unit}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
