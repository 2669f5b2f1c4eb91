"""The report of a comparison: a page with figures and tables, and the figures as files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

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
from eloquent_netem.lab.report_page import PAGE, Card, Picture, html_page
from eloquent_netem.lab.report_style import in_order, style_of
from eloquent_netem.lab.report_tables import by_driver, comparisons, sheets, wire_bytes
from eloquent_netem.lab.rows import ORACLE, Arrivals, Row
from eloquent_netem.lab.statistics import (
    HOW,
    MEASURES,
    Interval,
    Key,
    Reduction,
    mean_interval,
    over_seeds,
    samples_of,
)

MOST_CARDS = 6
MOST_PANELS = 3
"So many places have a panel in the figure of delays."

STUCK_S = 0.5
"A token counts as no later than this where the staircase's span is chosen."

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
        meta={**study.meta, "intervals": HOW},
    )
    path = directory / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def figures(study: Study) -> list[Picture]:
    """Draw all figures for which there is what they show."""
    rows = study.rows
    if not rows:
        return []
    pictures = _of_arrivals(study)
    panels, places = _networks(rows)
    for name, (plain, _) in MEASURES.items():
        short = name.replace(" ", "")
        caption = f"Stall ratio, {name}; {_basis(rows)}{_bars(rows)}."
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
                "Large: means over all networks; small: each network. Stall ratio, strict; "
                f"{_basis(rows)}{_bars(rows)}.",
                partial(cost_curve, costs, measure="strict"),
            )
        )
    return pictures


def _basis(rows: Iterable[Row]) -> str:
    """Say what the figures rest on."""
    rows = list(rows)
    drivers = " and ".join(sorted({row.driver for row in rows}))
    sources = ", ".join(sorted({row.source for row in rows}))
    return f"driver {drivers}, {_counted(len({row.seed for row in rows}), 'seed')}, {sources}"


def _bars(rows: Iterable[Row]) -> str:
    """Say what the bars are, if there are any."""
    is_one = len({row.seed for row in rows}) == 1
    return "" if is_one else "; bars: 95 % intervals of the means (Student's t over seeds)"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _summary(rows: Sequence[Row]) -> str:
    places = len({row.scenario for row in rows})
    return (
        f"The same answers, token by token, over {_counted(places, 'emulated network')}: "
        f"{_basis(rows)}. The stall ratio is the share of an "
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
    ends = f", {share.low:.1f} to {share.high:.1f} %" if found.seeds > 1 else ""
    return Card(
        f"{abs(share.figure):.1f} %",
        f"{word} excess stall than {style_of(found.against).label}",
        f"strict{ends}; {_counted(found.scenarios, 'network')}, {_counted(found.seeds, 'seed')}, "
        f"{driver}",
    )


def _networks(rows: Sequence[Row]) -> tuple[set[str], list[str]]:
    """Sort the places: those that differ by loss and round trip alone, and the others.

    What loses nothing is no point of a curve: outages or queues may be what ails it.
    """
    at: dict[tuple[float, float | None, float], set[str]] = {}
    losses: dict[tuple[float, float | None], set[float]] = {}
    for row in (row for row in rows if row.loss > 0):
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
    seeds = len({number for _, _, number in study.arrivals})
    drivers = " and ".join(sorted({row.driver for row in study.rows}))
    delay = Picture(
        "delays",
        "Token delay",
        f"How many tokens have come after which delay: every token of {_counted(seeds, 'seed')}, "
        f"driver {drivers}. The delay is that beyond the path's own; no interval, since these are "
        "counts.",
        partial(delay_cdf, delays),
    )
    if not stairs:
        return [delay]
    window_s = _window(stairs)
    stair = Picture(
        "staircase",
        f"The same {window_s[1] - window_s[0]:.2g} seconds, scheme by scheme",
        f"{place}, seed {seed}, driver {drivers}: one run of each scheme. Grey: when tokens "
        "would come had none been lost; colour: when the reader had them; shaded: what the "
        "reader waits for. Above each: the run's stall ratio, strict.",
        partial(staircase, stairs, window_s),
    )
    return [stair, delay]


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
    if not schemes:
        return []
    common = set.intersection(
        *({row.scenario for row in rows if row.scheme == scheme} for scheme in schemes)
    )
    costs = []
    for scheme in schemes if common else ():
        mine = [row for row in rows if row.scheme == scheme and row.scenario in common]
        seeds = sorted({row.seed for row in mine})
        by_seed = [[row for row in mine if row.seed == seed] for seed in seeds]
        places = [[row for row in mine if row.scenario == place] for place in sorted(common)]
        costs.append(
            Cost(
                scheme,
                mean_interval([_mean_wire(some) for some in by_seed]),
                mean_interval([_mean_stall(some) for some in by_seed]),
                tuple((_mean_wire(some), _mean_stall(some)) for some in places),
            )
        )
    return costs


def _mean_wire(rows: Iterable[Row]) -> float:
    return fmean(map(wire_bytes, rows))


def _mean_stall(rows: Iterable[Row]) -> float:
    return fmean(row.stall_ratio for row in rows)
