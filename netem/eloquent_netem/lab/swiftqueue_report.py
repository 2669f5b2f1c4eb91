"""The report of SwiftQueue's evaluation: a page with figures and tables, and figures as files."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eloquent_netem.lab.findings import SUMMARY_HEADER, Finding, Sheet, summary_rows
from eloquent_netem.lab.report_page import Card, Picture, html_page
from eloquent_netem.lab.report_style import Style, Theme, draw_legend
from eloquent_netem.lab.statistics import Interval, mean_interval
from eloquent_netem.lab.swiftqueue_markings import ALL_L, ORACLE, SWIFTQUEUE
from eloquent_netem.lab.swiftqueue_page import LEGEND, cells_of, share_of_oracle, sheets
from eloquent_netem.lab.swiftqueue_policies import CURVE_SHARES, PolicyStudy, Timeline
from eloquent_netem.lab.swiftqueue_study import Found, prediction_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = "report.html"
MOST_PANELS = 4
MOST_TIMELINES = 2
MOST_CARDS = 6

CDF_TICKS = (0.5, 0.9, 0.99, 0.999)

STYLES = {
    ALL_L: Style("all L", "#c44700", "#ff8652", "s"),
    "all-c": Style("all C", "#6b4a2f", "#cfa887", "p", "--"),
    "random": Style("random, 10 % C", "#b05a8c", "#e79cc6", "D", "-."),
    "last-rtt": Style("last RTT", "#00855f", "#2fd3a4", "^", "--"),
    SWIFTQUEUE: Style("SwiftQueue", "#0063a6", "#5ab4ff", "o"),
    "swiftqueue-no-copies": Style("without copies", "#4aa8dd", "#9ad7ff", "v", ":"),
    "swiftqueue-no-probes": Style("without probes", "#4aa8dd", "#9ad7ff", "X", "-."),
    ORACLE: Style("oracle (bound)", "#767676", "#9a9a9a", "_", ":"),
}
"In the order of every legend; as in `report_style`, none hangs on its colour."

QUEUES = {"L": STYLES[ALL_L], "C": STYLES[SWIFTQUEUE]}
"Whose colours the queues have."


def write_report(found: Found, directory: Path) -> Path:
    """Write the page and its figures (PNG); return the page's path.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pictures = figures(found.policies)
    for picture in pictures:
        (directory / f"{picture.name}.png").write_bytes(picture.captioned_png())
    shown = sheets(found.policies)
    if found.prediction:
        shown.insert(0, prediction_sheet(found.prediction))
    if found.findings:
        shown.insert(0, Sheet("The bars", SUMMARY_HEADER, tuple(summary_rows(found.findings))))
    page = html_page(
        title="Which queue: what SwiftQueue gains",
        summary=_summary(found),
        cards=_cards(found),
        pictures=pictures,
        sheets=shown,
        meta=found.meta,
    )
    path = directory / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def figures(study: PolicyStudy) -> list[Picture]:
    """Draw all figures for which there is what they show."""
    if not study.rows:
        return []
    seeds = len({row.seed for row in study.rows})
    basis = f"{seeds} seed{'s' if seeds > 1 else ''}, virtual time, propagation included"
    cells = cells_of(study.rows)
    latencies = {
        str(cell): {
            policy: mean_interval([row.latency_p99_ms for row in rows if row.policy == policy])
            for policy in _in_order(row.policy for row in rows)
        }
        for cell, rows in cells.items()
    }
    panels: dict[str, dict[str, Sequence[float]]] = {}
    for (scenario, scheduler, policy), curve in study.curves_ms.items():
        panels.setdefault(f"{scenario}, {scheduler}", {})[policy] = curve
    pictures = [
        Picture(
            "p99",
            "P99 of the packets' latency, network by network",
            f"{basis}; bars: 95 % intervals of the means (Student's t over the seeds).",
            partial(p99_by_cell, latencies),
        ),
        Picture(
            "latency",
            "How many packets have come after which time",
            f"{basis}: the mean over the seeds at each share. Of copies that leave together the "
            "first to arrive counts; what is lost counts until a later packet brings it.",
            partial(latency_cdf, dict(list(panels.items())[:MOST_PANELS])),
        ),
    ]
    for index, (cell, timeline) in enumerate(list(study.timelines.items())[:MOST_TIMELINES]):
        pictures.append(
            Picture(
                f"timeline-{index + 1}",
                f"Both queues, and where SwiftQueue sent its packets: {', '.join(cell)}",
                "Seed 0, around the longest delay in L. Lines: what each packet met, or would have "
                "met, in either queue, gaps being losses; below: the queue that it was marked for, "
                "copies hollow.",
                partial(timeline_of, timeline),
            )
        )
    return pictures


def p99_by_cell(cells: Mapping[str, Mapping[str, Interval]], theme: Theme) -> "Figure":
    """Draw P99 for each network and scheduler, a row of dots each, one for each policy."""
    from matplotlib.figure import Figure

    policies = _in_order(policy for by_policy in cells.values() for policy in by_policy)
    figure = Figure(figsize=(8.2, 1.3 + 0.6 * len(cells)), layout="constrained")
    axes = figure.subplots()
    for row, by_policy in enumerate(cells.values()):
        for index, policy in enumerate(policies):
            interval = by_policy.get(policy)
            if interval is None:
                continue
            shift = 0.7 * (index - (len(policies) - 1) / 2) / len(policies)
            below = max(interval.figure - max(interval.low, 0.1), 0.0)
            axes.errorbar(
                [interval.figure],
                [row + shift],
                xerr=[[below], [interval.high - interval.figure]],
                color=STYLES[policy].colour(theme),
                linestyle="none",
                **_marker(policy),
            )
    axes.set_yticks(range(len(cells)), list(cells))
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_xscale("log")
    # Two or three seeds make intervals that would hide all else.
    shown = [one.figure for by_policy in cells.values() for one in by_policy.values()]
    axes.set_xlim(0.8 * min(shown), 1.6 * max(shown))
    _plain_numbers(axes)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("P99 latency (ms)")
    draw_legend(figure, map(STYLES.__getitem__, policies), theme, has_lines=False)
    return figure


def latency_cdf(panels: Mapping[str, Mapping[str, Sequence[float]]], theme: Theme) -> "Figure":
    """Draw how many packets have come after which latency, stretching the last percents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 3.4 * len(panels), 3.8), layout="constrained")
    grid: Any = figure.subplots(1, len(panels), squeeze=False, sharey="row")
    for axes, (title, by_policy) in zip(grid[0], panels.items(), strict=True):
        for policy in _in_order(by_policy):
            axes.step(
                by_policy[policy],
                [1 - share for share in CURVE_SHARES],
                where="post",
                color=STYLES[policy].colour(theme),
                linestyle=STYLES[policy].dash,
            )
        axes.set_yscale("log")
        axes.set_ylim(1.0, 1 - CURVE_SHARES[-1])
        axes.set_yticks(
            [1 - share for share in CDF_TICKS], [f"{100 * share:g} %" for share in CDF_TICKS]
        )
        axes.minorticks_off()
        axes.set_xscale("log")
        _plain_numbers(axes)
        axes.set_title(title, fontsize=8.5)
        axes.set_xlabel("latency (ms)")
    grid[0][0].set_ylabel("packets that have come")
    policies = _in_order(policy for by_policy in panels.values() for policy in by_policy)
    draw_legend(figure, map(STYLES.__getitem__, policies), theme, has_markers=False)
    return figure


def timeline_of(timeline: Timeline, theme: Theme) -> "Figure":
    """Draw both queues' delays over time, and below them the queue of each packet."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    grid: Any = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    above, below = grid
    for name, delays_ms in (("L", timeline.l_ms), ("C", timeline.c_ms)):
        shown = [float("nan") if one is None else one for one in delays_ms]
        above.plot(timeline.time_s, shown, color=QUEUES[name].colour(theme), label=f"in {name}")
    above.set_ylabel("delay (ms)")
    above.set_ylim(bottom=0)
    above.legend(loc="upper right")
    for number, name in enumerate("LC"):
        for is_copy in (False, True):
            times = [
                time
                for time, queue, copied in zip(
                    timeline.time_s, timeline.queue, timeline.is_copy, strict=True
                )
                if queue == number and copied == is_copy
            ]
            colour = QUEUES[name].colour(theme)
            below.plot(
                times,
                [number + 0.25 * is_copy] * len(times),
                linestyle="none",
                marker="o",
                markersize=4,
                color=colour,
                markerfacecolor="none" if is_copy else colour,
            )
    below.set_yticks([0, 1], ["L", "C"])
    below.set_ylim(1.6, -0.4)
    below.set_xlabel("time since the first packet (s)")
    return figure


def _cards(found: Found) -> list[Card]:
    """Return the headline figures: the share of the oracle's gain, network by network."""
    cards = []
    for cell, rows in cells_of(found.policies.rows).items():
        share = share_of_oracle(rows, SWIFTQUEUE)
        if share is not None:
            cards.append(
                Card(
                    f"{share.figure:.0f} %",
                    "of the oracle's gain in P99",
                    f"{cell}: {share.low:.0f} to {share.high:.0f} %",
                )
            )
    return cards[:MOST_CARDS]


def _summary(found: Found) -> str:
    missed = [one for one in found.findings if not one.is_met]
    judged = [one for one in found.findings if one.bound is not None]
    verdict = f"{len(judged) - len(missed)} of {len(judged)} bars are met. " if judged else ""
    return verdict + LEGEND + _worst(missed)


def _worst(missed: Sequence[Finding]) -> str:
    names = dict.fromkeys(one.what for one in missed)
    return f" Missed: {'; '.join(names)}." if names else ""


def _in_order(policies: Any) -> list[str]:
    names = list(STYLES)
    return sorted(set(policies), key=names.index)


def _marker(policy: str) -> dict[str, Any]:
    marker = STYLES[policy].marker
    return {"marker": marker, "markeredgewidth": 1.8 if marker == "_" else 0, "elinewidth": 1.4}


def _plain_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
