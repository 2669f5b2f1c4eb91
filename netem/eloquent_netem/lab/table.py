"""The comparison's tables, for the terminal."""

from collections.abc import Callable, Sequence
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from eloquent_netem.lab.findings import Sheet
from eloquent_netem.lab.rows import ORACLE, Row
from eloquent_netem.lab.statistics import (
    MEASURES,
    Interval,
    mean_interval,
    reduction,
    samples_of,
)

OURS = "eloquent"

LEGEND = (
    "strict: share of the answer's time in which the reader waits for a token that is due; 200 ms: "
    "what of that lies beyond a gap of 200 ms; excess: what is above the oracle, the link's own "
    "bound; delays are those beyond the path's own; first: from connecting to the first token; "
    "recovery: from the link's return to being up to date; packets and bytes: downlink, per token, "
    "all headers. ±: 95 % intervals over the seeds."
)

CELL_HEADER = (
    "scheme",
    "strict %",
    "excess",
    "200 ms %",
    "excess",
    "p50 ms",
    "p99 ms",
    "gap p99",
    "first ms",
    "recovery",
    "packets",
    "bytes",
)

CELL_ORDER = (0, 1, 3, 6, 10, 11, 2, 4, 8, 9, 7, 5)
"The columns, those that say most first: in a narrow terminal the last ones are left out."

SUM_HEADER = ("against", "measure", "excess: ours", "theirs", "less by", "networks", "seeds")
SUM_ORDER = (0, 1, 4, 2, 3, 5, 6)


def tables(rows: Sequence[Row]) -> list[Sheet]:
    """Return a table for each network, and, where there are several, one of their sums."""
    found = []
    for scenario in dict.fromkeys(row.scenario for row in rows):
        mine = [row for row in rows if row.scenario == scenario]
        lines = [
            _line(scheme, [row for row in mine if row.scheme == scheme])
            for scheme in dict.fromkeys(row.scheme for row in mine)
        ]
        seeds = len({row.seed for row in mine})
        title = (
            f"{scenario}: {mine[0].tokens} tokens, {mine[0].source}, "
            f"{seeds} seed{'s' if seeds > 1 else ''}, {mine[0].driver}"
        )
        found.append(Sheet(title, CELL_HEADER, tuple(lines)))
    if sums := _sums(rows):
        found.append(Sheet(f"`{OURS}` against the others, all networks", SUM_HEADER, sums))
    return found


def terminal(sheet: Sheet, width: int) -> Table:
    """Return a table for a terminal of so many columns; what does not fit is left out."""
    shown = _fitting(sheet, width)
    table = Table(title=sheet.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for index in shown:
        justify: JustifyMethod = "left" if index == 0 else "right"
        table.add_column(sheet.header[index], justify=justify, no_wrap=True)
    for line in sheet.rows:
        style = "bold" if line[0] == OURS else None
        table.add_row(*(line[index] for index in shown), style=style)
    return table


def _fitting(sheet: Sheet, width: int) -> list[int]:
    """Return the columns to show, in their order: those that say most, as far as there is room."""
    order = {CELL_HEADER: CELL_ORDER, SUM_HEADER: SUM_ORDER}[sheet.header]
    room = width - 1
    shown = []
    for index in order:
        cells = [sheet.header[index], *(line[index] for line in sheet.rows)]
        room -= max(map(len, cells)) + 3  # Spaces, and the line between two columns.
        if room < 0:
            break
        shown.append(index)
    return sorted(shown)


def _line(scheme: str, rows: Sequence[Row]) -> tuple[str, ...]:
    cells = [scheme]
    for plain, excess in MEASURES.values():
        cells += [_percent(rows, plain), _percent(rows, excess)]
    for name in ("delay_p50_ms", "delay_p99_ms", "gap_p99_ms", "ttft_ms"):
        cells.append(_mean(rows, name, "{:.0f}".format))
    cells.append(_mean(rows, "recovery_rtts", "{:.1f} RTT".format))
    is_real = scheme != ORACLE
    cells.append(_mean(rows, "packets_per_token", "{:.2f}".format) if is_real else "—")
    cells.append(_mean(rows, "wire_bytes_per_token", "{:.0f}".format) if is_real else "—")
    return tuple(cells)


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := getattr(row, name)) is not None]


def _mean(rows: Sequence[Row], name: str, shown: Callable[[float], str]) -> str:
    values = _values(rows, name)
    return shown(fmean(values)) if values else "—"


def _percent(rows: Sequence[Row], name: str) -> str:
    values = _values(rows, name)
    return _told(mean_interval(values), len(values)) if values else "—"


def _told(interval: Interval, seeds: int) -> str:
    """Return a share in percent, with its interval if there is more than one seed."""
    scaled = interval.times(100)
    return f"{scaled.figure:.2f}" + (f" ± {scaled.half:.2f}" if seeds > 1 else "")


def _sums(rows: Sequence[Row]) -> tuple[tuple[str, ...], ...]:
    lines = []
    for scheme in dict.fromkeys(row.scheme for row in rows):
        for measure, (_, excess) in MEASURES.items():
            found = reduction(samples_of(rows, excess), OURS, scheme)
            if scheme in (OURS, ORACLE) or found is None:
                continue
            share, seeds = found.share.times(100), found.seeds
            spread = f" ({share.low:.1f} to {share.high:.1f})" if seeds > 1 else ""
            lines.append(
                (
                    scheme,
                    measure,
                    _told(found.ours, seeds),
                    _told(found.theirs, seeds),
                    f"{share.figure:.1f} %{spread}",
                    str(found.scenarios),
                    str(seeds),
                )
            )
    return tuple(lines)
