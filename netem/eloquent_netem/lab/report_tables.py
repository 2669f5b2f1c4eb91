"""The report's tables: ours against every other scheme, and each network with each scheme."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from eloquent_netem.lab.findings import Sheet
from eloquent_netem.lab.report_style import in_order, style_of
from eloquent_netem.lab.rows import ORACLE, Row
from eloquent_netem.lab.statistics import (
    MEASURES,
    Interval,
    Reduction,
    Samples,
    over_seeds,
    ratio,
    reduction,
    samples_of,
)

OURS = "eloquent"

NOTHING = "—"
"In a cell for which there is no figure."

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


@dataclass(frozen=True, slots=True)
class Compared:
    """Ours and another scheme over all places, in one measure."""

    measure: str
    excess: Reduction
    plain: Reduction
    "Of the stall ratio itself."


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
    lines = []
    for found in comparisons(rows):
        excess, plain = found.excess, found.plain
        lines.append(
            (
                *excess_cells(found),
                percent(plain.ours, plain.seeds),
                percent(plain.theirs, plain.seeds),
                percent_range(plain.share, plain.seeds),
                str(excess.scenarios),
                str(excess.seeds),
            )
        )
    return Sheet(title, COMPARISON_HEADER, tuple(lines))


def excess_cells(found: Compared) -> tuple[str, ...]:
    """Return a comparison's first cells: against whom, the measure, both excesses, less by."""
    excess = found.excess
    return (
        style_of(excess.against).label,
        found.measure,
        percent(excess.ours, excess.seeds, unit=""),
        percent(excess.theirs, excess.seeds, unit=""),
        percent_range(excess.share, excess.seeds),
    )


def cell_sheet(title: str, rows: Sequence[Row]) -> Sheet:
    """Return a row for each place and scheme."""
    samples = {name: samples_of(rows, name) for pair in MEASURES.values() for name in pair}
    lines = []
    for scenario in dict.fromkeys(row.scenario for row in rows):
        here = [row for row in rows if row.scenario == scenario]
        lines += [
            _cells([row for row in here if row.scheme == scheme], samples)
            for scheme in in_order(row.scheme for row in here)
        ]
    return Sheet(title, CELL_HEADER, tuple(lines))


def _cells(rows: Sequence[Row], samples: Mapping[str, Samples]) -> tuple[str, ...]:
    """Return the cells of one place and scheme, of which these are the rows."""
    scenario, scheme, seeds = rows[0].scenario, rows[0].scheme, len(rows)
    cells = [scenario, style_of(scheme).label]
    for plain, _ in MEASURES.values():
        cells.append(percent(over_seeds(samples[plain], scenario, scheme), seeds, unit=""))
    for _, excess in MEASURES.values():
        ours, theirs = (over_seeds(samples[excess], scenario, one) for one in (OURS, scheme))
        cells.append(percent(theirs, seeds, unit=""))
        if scheme in (OURS, ORACLE) or ours is None or theirs is None:
            cells.append(NOTHING)
        else:
            cells.append(f"{ratio(ours.figure, theirs.figure):.2f}")
    cells += [
        f"{fmean(getattr(row, name) for row in rows):.0f}"
        for name in ("delay_p50_ms", "delay_p99_ms", "gap_p99_ms", "ttft_ms")
    ]
    if scheme == ORACLE:
        return (*cells, NOTHING, NOTHING)
    wire, packets = fmean(map(wire_bytes, rows)), fmean(row.packets_per_token for row in rows)
    return (*cells, f"{wire:.0f}", f"{packets:.2f}")


def percent(interval: Interval | None, seeds: int, *, unit: str = " %") -> str:
    """Return a share as a percentage, with half its interval if there is more than one seed."""
    if interval is None:
        return NOTHING
    scaled = interval.times(100)
    half = f" ± {scaled.half:.2f}" if seeds > 1 else ""
    return f"{scaled.figure:.2f}{half}{unit}"


def percent_range(interval: Interval, seeds: int) -> str:
    """Return a share as a percentage, with its interval's ends if there is more than one seed."""
    scaled = interval.times(100)
    ends = f" ({scaled.low:.1f} to {scaled.high:.1f})" if seeds > 1 else ""
    return f"{scaled.figure:.1f} %{ends}"


def wire_bytes(row: Row) -> float:
    """Return the bytes on the wire for each token, both ways."""
    return row.wire_bytes_per_token + row.uplink_bytes_per_token


def by_driver(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each driver: figures of different ones are never mixed."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.driver, []).append(row)
    return found
