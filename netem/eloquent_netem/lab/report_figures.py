"""The figures: stall ratio by network, delays, the arrival staircase, bytes against stall.

Each takes plain figures and returns a matplotlib figure in the current theme; none of them knows
where the numbers come from. Ratios come as shares of one, times in seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from eloquent_netem.lab.report_style import Theme, colour_of, draw_legend, in_order, style_of
from eloquent_netem.lab.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = 3.1
CDF_TICKS = (0.5, 0.9, 0.99, 0.999, 0.9999)
SHORTEST_DELAY_MS = 1.0
"The delay axis is logarithmic; what comes sooner is drawn here."

NEVER_ZERO = 1e-5

LABEL_SHARE = 0.06
"The height of a label in the cost curve, as a stall ratio."


@dataclass(frozen=True, slots=True)
class Curve:
    """One scheme's stall ratio over the loss."""

    scheme: str
    points: tuple[tuple[float, Interval], ...]
    "Loss as a share of one, and the ratio."


@dataclass(frozen=True, slots=True)
class Stairs:
    """One answer: when its tokens were generated, and when the reader had them."""

    scheme: str
    due_s: tuple[float, ...]
    "Generated, plus what the path takes without loss."
    rendered_s: tuple[float, ...]
    stall_ratio: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What one scheme costs and what it gains, in all places and in each."""

    scheme: str
    wire_bytes: Interval
    "Per token, both ways, all headers."
    stall: Interval
    places: tuple[tuple[float, float], ...]
    "The means of each place: bytes, and the stall ratio."


def stalls_by_network(
    panels: Mapping[tuple[str, str], Sequence[Curve]], theme: Theme, measure: str
) -> "Figure":
    """Draw the stall ratio over the loss; `panels` is keyed by kind of loss and round trip."""
    kinds = list(dict.fromkeys(kind for kind, _ in panels))
    trips = list(dict.fromkeys(trip for _, trip in panels))
    figure, grid = _grid(len(kinds), len(trips), sharey="row", sharex="all")
    for row, kind in enumerate(kinds):
        for column, trip in enumerate(trips):
            axes = grid[row][column]
            for curve in panels.get((kind, trip), ()):
                _curve(axes, curve, theme)
            axes.set_title(trip if row == 0 else "")
            if row == len(kinds) - 1:
                axes.set_xlabel("packets lost each way (%)")
        grid[row][0].set_ylabel(f"{kind}\nstall ratio, {measure} (%)")
        # The row shares its axis: only now all is drawn.
        grid[row][0].set_ylim(bottom=0, top=min(grid[row][0].get_ylim()[1], 101))
    grid[0][0].set_xlim(left=0)
    schemes = in_order(curve.scheme for curves in panels.values() for curve in curves)
    draw_legend(figure, map(style_of, schemes), theme)
    return figure


def stalls_by_place(
    places: Mapping[str, Mapping[str, Interval]], theme: Theme, measure: str
) -> "Figure":
    """Draw the stall ratio for each place, a row of dots each, one for each scheme."""
    names = list(places)
    schemes = in_order(scheme for by_scheme in places.values() for scheme in by_scheme)
    figure, grid = _grid(1, 1, width=8.2, height=1.3 + 0.55 * len(names))
    axes = grid[0][0]
    for row, name in enumerate(names):
        for index, scheme in enumerate(schemes):
            interval = places[name].get(scheme)
            if interval is None:
                continue
            shift = 0.6 * (index - (len(schemes) - 1) / 2) / max(len(schemes), 1)
            percent = interval.times(100)
            _dot(axes, scheme, theme, x=percent, y=Interval(*(row + shift,) * 3))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0, right=min(axes.get_xlim()[1], 101))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"stall ratio, {measure} (%)")
    draw_legend(figure, map(style_of, schemes), theme, has_lines=False)
    return figure


def delay_cdf(panels: Mapping[str, Mapping[str, Sequence[float]]], theme: Theme) -> "Figure":
    """Draw how many tokens have come after which delay; `panels` is by place, then scheme.

    The vertical axis stretches the last percents, which are what a reader notices.
    """
    figure, grid = _grid(1, len(panels), sharey="row", height=3.6)
    for axes, (title, by_scheme) in zip(grid[0], panels.items(), strict=True):
        fewest = NEVER_ZERO
        for scheme in in_order(by_scheme):
            delays_ms = sorted(max(1000 * delay, SHORTEST_DELAY_MS) for delay in by_scheme[scheme])
            count = len(delays_ms)
            fewest = max(fewest, 1 / count)
            axes.step(
                delays_ms,
                [1 - index / count for index in range(count)],
                where="post",
                color=colour_of(scheme, theme),
                linestyle=style_of(scheme).dash,
            )
        axes.set_yscale("log")
        axes.set_xscale("log")
        axes.set_ylim(1.0, fewest)
        axes.set_xlim(left=SHORTEST_DELAY_MS)
        ticks = [share for share in CDF_TICKS if 1 - share >= fewest * 0.99]
        axes.set_yticks([1 - share for share in ticks], [f"{100 * share:g} %" for share in ticks])
        axes.minorticks_off()
        axes.set_xticks([1, 10, 100, 1000, 10000], ["≤1 ms", "10 ms", "100 ms", "1 s", "10 s"])
        axes.set_xlim(right=max(1000.0, axes.get_xlim()[1]))
        axes.set_title(title)
        axes.set_xlabel("token delay beyond the path's own")
    grid[0][0].set_ylabel("tokens that have come")
    schemes = in_order(scheme for by_scheme in panels.values() for scheme in by_scheme)
    draw_legend(figure, map(style_of, schemes), theme, has_markers=False)
    return figure


def staircase(runs: Sequence[Stairs], window_s: tuple[float, float], theme: Theme) -> "Figure":
    """Draw generated against rendered tokens, a panel for each run, within a span of time."""
    columns = min(len(runs), 3)
    lines = -(-len(runs) // columns)
    figure, grid = _grid(lines, columns, sharex="all", sharey="all", height=2.7 * lines)
    flat = [axes for line in grid for axes in line]
    for axes, run in zip(flat, runs, strict=False):
        colour = colour_of(run.scheme, theme)
        count = range(1, len(run.due_s) + 1)
        due = (*run.due_s, window_s[1] + 1)
        came = (*run.rendered_s, window_s[1] + 1)
        levels = (*count, len(run.due_s))
        axes.step(due, levels, where="post", color=theme.muted, linewidth=1.0)
        axes.step(came, levels, where="post", color=colour, linewidth=2.0)
        _shade(axes, run, colour)
        title = f"{style_of(run.scheme).label}: waits {100 * run.stall_ratio:.1f} %"
        axes.set_title(title, color=colour)
    for axes in flat[len(runs) :]:
        axes.set_visible(False)
    visible = [time for run in runs for time in (run.due_s, run.rendered_s)]
    low = min(_count_until(times, window_s[0]) for times in visible)
    high = max(_count_until(times, window_s[1]) for times in visible)
    for axes in flat:
        axes.set_xlim(*window_s)
        axes.locator_params(axis="x", nbins=4)
        axes.set_ylim(max(0, low - 1), high + 2)
    for axes in flat[max(0, len(runs) - columns) : len(runs)]:
        axes.set_xlabel("time since the first token (s)")
        axes.xaxis.set_tick_params(labelbottom=True)
    for line in grid:
        line[0].set_ylabel("tokens")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Line2D(
                [], [], color=theme.muted, linewidth=1.0, label="would come, had none been lost"
            ),
            Line2D([], [], color=theme.ink, linewidth=2.0, label="came"),
            Patch(color=theme.muted, alpha=0.35, linewidth=0, label="due, not yet there"),
        ],
        loc="outside upper left",
        ncols=3,
    )
    return figure


def cost_curve(costs: Sequence[Cost], theme: Theme, measure: str) -> "Figure":
    """Draw stall against bytes: each place small, the mean over the places large."""
    figure, grid = _grid(1, 1, width=7.0, height=4.2)
    axes = grid[0][0]
    for cost in costs:
        colour = colour_of(cost.scheme, theme)
        axes.plot(
            [wire for wire, _ in cost.places],
            [100 * stall for _, stall in cost.places],
            linestyle="none",
            marker=style_of(cost.scheme).marker,
            markersize=4,
            alpha=0.3,
            markeredgewidth=0,
            color=colour,
        )
    for cost, is_below in zip(costs, _labels_below(costs), strict=True):
        _dot(axes, cost.scheme, theme, x=cost.wire_bytes, y=cost.stall.times(100), size=10)
        axes.annotate(
            style_of(cost.scheme).label,
            (cost.wire_bytes.figure, 100 * cost.stall.figure),
            xytext=(0, -17 if is_below else 10),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            fontweight="bold",
            color=colour_of(cost.scheme, theme),
        )
    axes.set_xscale("log")
    ticks = [
        tick for tick in (25, 50, 100, 200, 400, 800, 1600) if _is_within(tick, axes.get_xlim())
    ]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=-4)
    axes.margins(x=0.12)
    axes.set_xlabel("bytes on the wire for each token, both ways, all headers")
    axes.set_ylabel(f"stall ratio, {measure} (%)")
    return figure


def _labels_below(costs: Sequence[Cost]) -> list[bool]:
    """Say which labels go below their dot: those that would cover one that is above its own."""
    above: list[Cost] = []
    for cost in costs:
        is_free = not any(
            2 / 3 < other.wire_bytes.figure / cost.wire_bytes.figure < 3 / 2
            and abs(other.stall.figure - cost.stall.figure) < LABEL_SHARE
            for other in above
        )
        if is_free:
            above.append(cost)
    return [cost not in above for cost in costs]


def _is_within(value: float, span: tuple[float, float]) -> bool:
    return span[0] <= value <= span[1]


Shared = Literal["none", "all", "row", "col"]
"Which panels have an axis in common."


def _grid(
    lines: int,
    columns: int,
    *,
    width: float = 0.0,
    height: float = 0.0,
    sharex: Shared = "none",
    sharey: Shared = "none",
) -> "tuple[Figure, list[list[Axes]]]":
    from matplotlib.figure import Figure

    size = (width or 1.0 + PANEL_INCHES * columns, height or 0.8 + 2.5 * lines)
    figure = Figure(figsize=size, layout="constrained")
    grid: Any = figure.subplots(lines, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return figure, [list(line) for line in grid]


def _curve(axes: "Axes", curve: Curve, theme: Theme) -> None:
    style, colour = style_of(curve.scheme), colour_of(curve.scheme, theme)
    losses = [100 * loss for loss, _ in curve.points]
    ratios = [interval.times(100) for _, interval in curve.points]
    axes.errorbar(
        losses,
        [ratio.figure for ratio in ratios],
        yerr=_bars(ratios),
        color=colour,
        marker=style.marker,
        linestyle=style.dash,
        elinewidth=1.2,
        clip_on=False,
        markeredgewidth=1.6 if style.marker == "_" else 0,
    )


def _bars(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return how far the intervals reach below and above their figures."""
    return [
        [max(one.figure - one.low, 0.0) for one in intervals],
        [max(one.high - one.figure, 0.0) for one in intervals],
    ]


def _dot(
    axes: "Axes", scheme: str, theme: Theme, *, x: Interval, y: Interval, size: float = 6.5
) -> None:
    axes.errorbar(
        [x.figure],
        [y.figure],
        xerr=_bars([x]),
        yerr=_bars([y]),
        color=colour_of(scheme, theme),
        marker=style_of(scheme).marker,
        markersize=size,
        markeredgewidth=2 if style_of(scheme).marker == "_" else 0,
        elinewidth=1.4,
        linestyle="none",
    )


def _shade(axes: "Axes", run: Stairs, colour: str) -> None:
    """Fill between the two stairs: its width at a token is how late that one came."""
    for index, (due, came) in enumerate(zip(run.due_s, run.rendered_s, strict=True), start=1):
        if came > due:
            axes.fill_between(
                [due, came], index - 1, index, color=colour, alpha=0.28, linewidth=0, step="post"
            )


def _count_until(times: Sequence[float], until: float) -> int:
    return sum(time <= until for time in times)
