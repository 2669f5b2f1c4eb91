"""The report of a comparison: a page with figures and tables, and the figures as files.

`write_report` is all that others call; `figures` and `sheets` are what other pages are made of.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

from eloquent_netem.lab.findings import Sheet
from eloquent_netem.lab.measures import measure_stalls
from eloquent_netem.lab.report_figures import (
    Cost,
    Curve,
    Stairs,
    cost_curve,
    delay_cdf,
    staircase,
    stalls_by_network,
    stalls_by_place,
)
from eloquent_netem.lab.report_page import Card, Picture, html_page
from eloquent_netem.lab.report_style import in_order, style_of
from eloquent_netem.lab.rows import ORACLE, Arrivals, Row
from eloquent_netem.lab.statistics import (
    HOW,
    MEASURES,
    Interval,
    Key,
    Reduction,
    mean_interval,
    over_seeds,
    ratio,
    reduction,
    samples_of,
)

OURS = "eloquent"
PAGE = "report.html"
MOST_CARDS = 6
MOST_PANELS = 3
"So many places have a panel in the figure of delays."

STUCK_S = 0.5

STAIRS_S = 2.0
"How much of a run the staircase shows."


@dataclass(frozen=True, slots=True)
class Study:
    """What a comparison found."""

    rows: Sequence[Row]
    arrivals: Mapping[Key, Arrivals] = field(default_factory=dict)
    "Some of the runs in full, by scenario, scheme and seed: for delays and the staircase."
    meta: Mapping[str, object] = field(default_factory=dict)
    "How it was made; shown at the page's end."


def write_report(study: Study, directory: Path) -> Path:
    """Write the page and its figures (PNG); return the page's path.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pictures = figures(study)
    for picture in pictures:
        (directory / f"{picture.name}.png").write_bytes(picture.captioned_png())
    page = html_page(
        title="How long readers wait",
        summary=_summary(study.rows),
        cards=_cards(study.rows),
        pictures=pictures,
        sheets=sheets(study.rows),
        meta={str(key): _told(value) for key, value in study.meta.items()} | {"intervals": HOW},
    )
    path = directory / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def figures(study: Study) -> list[Picture]:
    """Draw all figures for which there is what they show."""
    rows = [row for row in study.rows if row.loss > 0] or list(study.rows)
    if not rows:
        return []
    pictures = _of_arrivals(study)
    panels, places = _networks(rows)
    for name, (plain, _) in MEASURES.items():
        short = name.replace(" ", "")
        caption = f"Stall ratio, {name}; {_basis(rows)}; {_INTERVALS}."
        if panels:
            curves = _curves(rows, panels, plain)
            pictures.append(
                Picture(
                    f"stalls-{short}",
                    f"Stall ratio by loss and round trip ({name})",
                    caption,
                    partial(stalls_by_network, curves, measure=name),
                )
            )
        if places:
            dots = _dots(rows, places, plain)
            pictures.append(
                Picture(
                    f"places-{short}",
                    f"Stall ratio on each network ({name})",
                    caption,
                    partial(stalls_by_place, dots, measure=name),
                )
            )
    if costs := _costs(rows):
        pictures.append(
            Picture(
                "cost",
                "What it costs: bytes against stalls",
                "Large: means over all networks, with intervals; small: each network. Stall "
                f"ratio, strict; {_basis(rows)}; {_INTERVALS}.",
                partial(cost_curve, costs, measure="strict"),
            )
        )
    return pictures


def sheets(rows: Sequence[Row]) -> list[Sheet]:
    """Return the tables: comparisons, and each place and scheme."""
    found = [
        comparison_sheet(f"Eloquent against the others ({driver})", mine)
        for driver, mine in by_driver(rows).items()
    ]
    found += [
        cell_sheet(f"Each network ({driver})", mine) for driver, mine in by_driver(rows).items()
    ]
    return [sheet for sheet in found if sheet.rows]


COMPARISON_HEADER = (
    "against",
    "measure",
    "excess: ours, pp",
    "theirs, pp",
    "reduction",
    "stall ratio: ours",
    "theirs",
    "reduction",
    "networks",
    "seeds",
)


@dataclass(frozen=True, slots=True)
class Compared:
    """Ours and another scheme over all places, in one measure."""

    measure: str
    excess: Reduction
    plain: Reduction
    "Of the stall ratio itself."


def comparisons(rows: Sequence[Row]) -> list[Compared]:
    """Compare ours with every other scheme, in both measures."""
    found = []
    for against in in_order(row.scheme for row in rows):
        for measure, fields in MEASURES.items():
            plain, excess = (reduction(samples_of(rows, name), OURS, against) for name in fields)
            if against not in (OURS, ORACLE) and plain is not None and excess is not None:
                found.append(Compared(measure, excess, plain))
    return found


def comparison_sheet(title: str, rows: Sequence[Row]) -> Sheet:
    """Compare ours with every other scheme over all places: excess, and the plain ratio."""
    lines = tuple(
        (
            style_of(found.excess.against).label,
            found.measure,
            percent(found.excess.ours, unit=""),
            percent(found.excess.theirs, unit=""),
            percent_range(found.excess.share),
            percent(found.plain.ours),
            percent(found.plain.theirs),
            percent_range(found.plain.share),
            str(found.excess.scenarios),
            str(found.excess.seeds),
        )
        for found in comparisons(rows)
    )
    return Sheet(title, COMPARISON_HEADER, lines)


CELL_HEADER = (
    "network",
    "scheme",
    "strict %",
    "200 ms %",
    "excess strict, pp",
    "ours / this",
    "excess 200 ms, pp",
    "ours / this",
    "p50 ms",
    "p99 ms",
    "gap p99 ms",
    "first token ms",
    "bytes/token",
    "packets/token",
)


def cell_sheet(title: str, rows: Sequence[Row]) -> Sheet:
    """Return a row for each place and scheme."""
    samples = {name: samples_of(rows, name) for pair in MEASURES.values() for name in pair}
    lines = []
    for scenario in dict.fromkeys(row.scenario for row in rows):
        here = [row for row in rows if row.scenario == scenario]
        for scheme in in_order(row.scheme for row in here):
            mine = [row for row in here if row.scheme == scheme]
            cells = [scenario, style_of(scheme).label]
            for plain, _ in MEASURES.values():
                cells.append(percent(over_seeds(samples[plain], scenario, scheme), unit=""))
            for _, excess in MEASURES.values():
                theirs = over_seeds(samples[excess], scenario, scheme)
                ours = over_seeds(samples[excess], scenario, OURS)
                cells.append(percent(theirs, unit=""))
                is_ratio = theirs and ours and scheme not in (OURS, ORACLE)
                cells.append(
                    f"{ratio(ours.figure, theirs.figure):.2f}"
                    if is_ratio and ours and theirs
                    else "—"
                )
            cells += [
                f"{fmean(getattr(row, name) for row in mine):.0f}"
                for name in ("delay_p50_ms", "delay_p99_ms", "gap_p99_ms", "ttft_ms")
            ]
            is_real = scheme != ORACLE
            wire = fmean(row.wire_bytes_per_token + row.uplink_bytes_per_token for row in mine)
            cells.append(f"{wire:.0f}" if is_real else "—")
            packets = fmean(row.packets_per_token for row in mine)
            cells.append(f"{packets:.2f}" if is_real else "—")
            lines.append(tuple(cells))
    return Sheet(title, CELL_HEADER, tuple(lines))


def percent(interval: Interval | None, unit: str = " %") -> str:
    """Return a share as a percentage with half its interval."""
    if interval is None:
        return "—"
    scaled = interval.times(100)
    return f"{scaled.figure:.2f} ± {scaled.half:.2f}{unit}"


def percent_range(interval: Interval) -> str:
    """Return a share as a percentage with its interval's ends."""
    scaled = interval.times(100)
    return f"{scaled.figure:.1f} % ({scaled.low:.1f} to {scaled.high:.1f})"


def by_driver(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each driver: figures of different ones are never mixed."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.driver, []).append(row)
    return found


_INTERVALS = "bars: 95 % intervals of the means (Student's t over seeds)"


def _basis(rows: Iterable[Row]) -> str:
    """Say what the figures rest on."""
    rows = list(rows)
    seeds = len({row.seed for row in rows})
    drivers = " and ".join(sorted({row.driver for row in rows}))
    sources = ", ".join(sorted({row.source for row in rows}))
    return f"driver {drivers}, {seeds} seed{'s' if seeds != 1 else ''}, {sources}"


def _summary(rows: Sequence[Row]) -> str:
    places = len({row.scenario for row in rows})
    return (
        f"The same answers, token by token, over {places} emulated network"
        f"{'s' if places != 1 else ''}: {_basis(rows)}. The stall ratio is the share of an "
        "answer's time in which the reader waits for a token that, had nothing been lost, would be "
        "there; the 200 ms ratio counts only what lies beyond a gap of 200 ms. Excess is what is "
        "above the oracle, the link's own bound on the same seed."
    )


def _cards(rows: Sequence[Row]) -> list[Card]:
    """Return the headline figures: how far our excess is below the others'."""
    cards = []
    for driver, mine in by_driver(rows).items():
        cards += [
            _card(found.excess, driver)
            for found in comparisons(mine)
            if found.measure == "strict" and found.excess.against != "eloquent-queued"
        ]
    return cards[:MOST_CARDS]


def _card(found: Reduction, driver: str) -> Card:
    share = found.share.times(100)
    word = "less" if share.figure >= 0 else "more"
    return Card(
        f"{abs(share.figure):.1f} %",
        f"{word} excess stall than {style_of(found.against).label}",
        f"strict, {share.low:.1f} to {share.high:.1f} %; {found.scenarios} networks, "
        f"{found.seeds} seeds, {driver}",
    )


def _networks(rows: Sequence[Row]) -> tuple[set[str], list[str]]:
    """Sort the places: those that differ by loss and round trip alone, and the others."""
    at: dict[tuple[float, float | None, float], set[str]] = {}
    losses: dict[tuple[float, float | None], set[float]] = {}
    for row in rows:
        at.setdefault((row.rtt_ms, row.burst_ms, row.loss), set()).add(row.scenario)
        losses.setdefault((row.rtt_ms, row.burst_ms), set()).add(row.loss)
    panels = {
        scenario
        for (rtt_ms, burst_ms, _), scenarios in at.items()
        if len(scenarios) == 1 and len(losses[rtt_ms, burst_ms]) > 1
        for scenario in scenarios
    }
    others = [name for name in dict.fromkeys(row.scenario for row in rows) if name not in panels]
    return panels, others


def _curves(
    rows: Sequence[Row], places: set[str], figure: str
) -> dict[tuple[str, str], list[Curve]]:
    samples = samples_of(rows, figure)
    networks = {
        row.scenario: (row.burst_ms, row.rtt_ms, row.loss) for row in rows if row.scenario in places
    }
    panels: dict[tuple[str, str], list[Curve]] = {}
    keys = sorted({network[:2] for network in networks.values()}, key=lambda k: (k[0] or 0, k[1]))
    for burst_ms, rtt_ms in keys:
        kind = "independent loss" if burst_ms is None else f"loss in {burst_ms:g} ms bursts"
        for scheme in in_order(row.scheme for row in rows):
            points = sorted(
                (loss, interval)
                for name, (burst, rtt, loss) in networks.items()
                if (burst, rtt) == (burst_ms, rtt_ms)
                and (interval := over_seeds(samples, name, scheme)) is not None
            )
            is_flat = scheme == ORACLE and burst_ms is None  # nothing binds it: 0 by definition
            if points and not is_flat:
                panel = panels.setdefault((kind, f"{rtt_ms:g} ms round trip"), [])
                panel.append(Curve(scheme, tuple(points)))
    return panels


def _dots(
    rows: Sequence[Row], places: Sequence[str], figure: str
) -> dict[str, dict[str, Interval]]:
    samples = samples_of(rows, figure)
    schemes = in_order(row.scheme for row in rows)
    found = {}
    for name in places:
        intervals = {scheme: over_seeds(samples, name, scheme) for scheme in schemes}
        found[name] = {scheme: one for scheme, one in intervals.items() if one is not None}
    return found


def _of_arrivals(study: Study) -> list[Picture]:
    """Draw what needs whole runs."""
    places = list(dict.fromkeys(place for place, _, _ in study.arrivals))[:MOST_PANELS]
    if not places:
        return []
    delays = {
        place: {
            scheme: [
                delay
                for (where, which, _), run in study.arrivals.items()
                if (where, which) == (place, scheme)
                for delay in _delays_s(run)
            ]
            for scheme in in_order(which for where, which, _ in study.arrivals if where == place)
        }
        for place in places
    }
    place = places[-1]
    seed = min(seed for where, _, seed in study.arrivals if where == place)
    runs = {
        scheme: run
        for (where, scheme, number), run in study.arrivals.items()
        if (where, number) == (place, seed)
    }
    stairs = [_stairs(scheme, runs[scheme]) for scheme in in_order(runs) if scheme != ORACLE]
    window_s = _window(stairs)
    seeds = len({number for _, _, number in study.arrivals})
    drivers = " and ".join(sorted({row.driver for row in study.rows}))
    return [
        Picture(
            "staircase",
            f"The same {window_s[1] - window_s[0]:.2g} seconds, scheme by scheme",
            f"{place}, seed {seed}, driver {drivers}: one run of each scheme. Grey: when tokens "
            "would come had none been lost; colour: when the reader had them; shaded: what the "
            "reader waits for. Above each: the run's stall ratio, strict.",
            partial(staircase, stairs, window_s),
        ),
        Picture(
            "delays",
            "Token delay",
            f"How many tokens have come after which delay: every token of {seeds} "
            f"seed{'s' if seeds != 1 else ''}, driver {drivers}. The delay is that beyond the "
            "path's own; no interval, since these are counts.",
            partial(delay_cdf, delays),
        ),
    ]


def _delays_s(run: Arrivals) -> list[float]:
    return [
        rendered - generated - run.base_delay_s
        for generated, rendered in zip(run.generated_s, run.rendered_s, strict=True)
    ]


def _stairs(scheme: str, run: Arrivals) -> Stairs:
    first_s = run.generated_s[0] + run.base_delay_s
    found = measure_stalls(run.generated_s, run.rendered_s, run.base_delay_s)
    return Stairs(
        scheme,
        tuple(time + run.base_delay_s - first_s for time in run.generated_s),
        tuple(time - first_s for time in run.rendered_s),
        found.stall_ratio,
    )


def _window(stairs: Sequence[Stairs]) -> tuple[float, float]:
    """Return the span in which the readers of all runs together wait longest.

    A run that is stuck for long does not decide alone.
    """

    def late_s(begin: float) -> float:
        return sum(
            min(came - due, STUCK_S)
            for run in stairs
            for due, came in zip(run.due_s, run.rendered_s, strict=True)
            if begin <= due < begin + STAIRS_S
        )

    last_s = max(run.due_s[-1] for run in stairs)
    starts = [step / 2 for step in range(max(1, int(2 * (last_s - STAIRS_S)) + 1))]
    begin = max(starts, key=late_s)
    return begin, min(begin + STAIRS_S, max(last_s, 1.0))


def _costs(rows: Sequence[Row]) -> list[Cost]:
    """Return bytes and stalls of each scheme, over the places that all of them have."""
    schemes = [scheme for scheme in in_order(row.scheme for row in rows) if scheme != ORACLE]
    common = set.intersection(
        *({row.scenario for row in rows if row.scheme == scheme} for scheme in schemes)
    )
    costs = []
    for scheme in schemes if common else ():
        mine = [row for row in rows if row.scheme == scheme and row.scenario in common]
        seeds = sorted({row.seed for row in mine})
        places = [[row for row in mine if row.scenario == place] for place in sorted(common)]
        costs.append(
            Cost(
                scheme,
                mean_interval([fmean(_wire(row) for row in mine if row.seed == s) for s in seeds]),
                mean_interval(
                    [fmean(row.stall_ratio for row in mine if row.seed == s) for s in seeds]
                ),
                tuple(
                    (fmean(map(_wire, here)), fmean(r.stall_ratio for r in here)) for here in places
                ),
            )
        )
    return costs


def _wire(row: Row) -> float:
    return row.wire_bytes_per_token + row.uplink_bytes_per_token


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_told, value))
    return str(value)
