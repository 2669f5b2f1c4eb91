"""What the policies' runs come to: tables, and the bars that they are held to."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from eloquent_netem.lab.findings import Finding, Sheet
from eloquent_netem.lab.statistics import (
    Interval,
    Key,
    Samples,
    bootstrap,
    mean_interval,
    reduction,
)
from eloquent_netem.lab.swiftqueue_markings import ALL_L, ORACLE, SWIFTQUEUE
from eloquent_netem.lab.swiftqueue_policies import CROWD_FLOWS, PolicyRow, PolicyStudy

OF_ORACLE_PERCENT = 60.0
"So much of the oracle's gain is to be had on the congested networks; the aim is 80."
WORSE_PERCENT = 5.0
"Never is P99 to be so much above that of all-L."
LARGE_GAIN_PERCENT = 60.0
LESS_PERCENT = 45.0
"Where the oracle gains the first or more, ours is to be lower than all-L by the second."
CROSS_LOSS_PERCENT = 5.0
"So much goodput cross traffic may lose."
LITTLE_PERCENT = 5.0
"Where the oracle gains less than this, a share of it says nothing."

PART = "policies"

LEGEND = (
    "Latency of packets, propagation included, in ms; of copies that leave together the first to "
    "arrive counts, and what is lost counts until a later packet brings it. gain: how far P99 is "
    "below that of all-l; of oracle's: as a share of the gain of the oracle, whose packets wait in "
    "both queues. token p99: token delay beyond the path's own. cross: goodput of cross traffic, "
    "and how it differs from that beside all-l. Intervals: 95 % over the seeds."
)

HEADER = (
    "policy",
    "p50 ms",
    "p99 ms",
    "p99.9 ms",
    "gain %",
    "of oracle's %",
    "token p99 ms",
    "in C %",
    "copies %",
    "cross Mbit/s",
    "change %",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One network under one scheduler."""

    scenario: str
    scheduler: str

    def __str__(self) -> str:
        return f"{self.scenario}, {self.scheduler}"


def cells_of(rows: Iterable[PolicyRow]) -> dict[Cell, list[PolicyRow]]:
    """Return the rows of each network and scheduler."""
    found: dict[Cell, list[PolicyRow]] = {}
    for row in rows:
        found.setdefault(Cell(row.scenario, row.scheduler), []).append(row)
    return found


def samples_of(rows: Iterable[PolicyRow], field: str) -> dict[Key, float]:
    """Return one of the rows' figures as `eloquent_netem.lab.statistics` takes them."""
    return {
        (str(Cell(row.scenario, row.scheduler)), row.policy, row.seed): getattr(row, field)
        for row in rows
    }


def gain(rows: Sequence[PolicyRow], policy: str) -> Interval | None:
    """Return how far a policy's P99 is below that of all-L, in percent; None: it is not known."""
    found = reduction(samples_of(rows, "latency_p99_ms"), policy, ALL_L)
    return None if found is None else found.share.times(100)


def cross_loss(rows: Sequence[PolicyRow], policy: str) -> Interval | None:
    """Return how much goodput cross traffic loses by a policy against all-L, in percent."""
    found = reduction(samples_of(rows, "cross_goodput_mbit"), policy, ALL_L)
    return None if found is None else found.share.times(100)


def share_of_oracle(rows: Sequence[PolicyRow], policy: str) -> Interval | None:
    """Return a policy's gain over the oracle's, in percent, each network having the same weight.

    None: it is not known, or the oracle gains less than `LITTLE_PERCENT`.
    """
    samples = samples_of(rows, "latency_p99_ms")
    names = sorted({name for name, _, _ in samples})
    pairs = []
    for seed in sorted({seed for _, _, seed in samples}):
        gains = [_gains(samples, name, policy, seed) for name in names]
        known = [one for one in gains if one is not None]
        if known and len(known) == len(names):
            ours, best = zip(*known, strict=True)
            pairs.append((fmean(ours), fmean(best)))
    if not pairs or fmean(best for _, best in pairs) < LITTLE_PERCENT / 100:
        return None
    return bootstrap(pairs, _ratio).times(100)


def _gains(samples: Samples, name: str, policy: str, seed: int) -> tuple[float, float] | None:
    """Return a policy's gain and the oracle's, as shares of all-L's P99."""
    keys = [(name, one, seed) for one in (ALL_L, policy, ORACLE)]
    if not all(key in samples for key in keys):
        return None
    low, ours, best = (samples[key] for key in keys)
    return 1 - ours / low, 1 - best / low


def _negative(interval: Interval | None) -> Interval | None:
    return interval and Interval(-interval.figure, -interval.high, -interval.low)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    ours, best = (sum(values) for values in zip(*pairs, strict=True))
    # A draw may hold only seeds on which the oracle gained nothing.
    return ours / best if best > 0 else 0.0


def sheets(study: PolicyStudy) -> list[Sheet]:
    """Return a table for each network and scheduler, and one of many flows."""
    found = [
        Sheet(_title(str(cell), rows), HEADER, _lines(rows))
        for cell, rows in cells_of(study.rows).items()
    ]
    found += [
        Sheet(_title(f"{CROWD_FLOWS} flows at once: {cell}", rows), HEADER, _lines(rows))
        for cell, rows in cells_of(study.crowd).items()
    ]
    return found


def findings(study: PolicyStudy, congested: Collection[str]) -> list[Finding]:
    """Judge SwiftQueue by the bars; `congested` are the names of the networks of the first one."""
    found: list[Finding] = []
    cells = cells_of(study.rows)
    for scheduler in dict.fromkeys(cell.scheduler for cell in cells):
        rows = [
            row
            for cell, here in cells.items()
            if cell.scheduler == scheduler and cell.scenario in congested
            for row in here
        ]
        share = share_of_oracle(rows, SWIFTQUEUE)
        found += _judged(
            "share of the oracle's gain, congested networks (aim 80)",
            scheduler,
            share,
            bound=OF_ORACLE_PERCENT,
            is_least=True,
        )
    for cell, rows in cells.items():
        found += _of_cell(cell, rows)
    for cell, rows in cells_of(study.crowd).items():
        ours = gain(rows, SWIFTQUEUE)
        found += _judged(
            f"{CROWD_FLOWS} flows: P99 above that of all-l",
            str(cell),
            _negative(ours),
            bound=WORSE_PERCENT,
        )
        found += _judged(
            f"{CROWD_FLOWS} flows: goodput that cross traffic loses",
            str(cell),
            cross_loss(rows, SWIFTQUEUE),
            bound=CROSS_LOSS_PERCENT,
        )
    return found


def _of_cell(cell: Cell, rows: Sequence[PolicyRow]) -> list[Finding]:
    ours, best = gain(rows, SWIFTQUEUE), gain(rows, ORACLE)
    found = _judged(
        "P99 above that of all-l",
        str(cell),
        _negative(ours),
        bound=WORSE_PERCENT,
    )
    found += _judged(
        "goodput that cross traffic loses",
        str(cell),
        cross_loss(rows, SWIFTQUEUE),
        bound=CROSS_LOSS_PERCENT,
    )
    found += _judged("the oracle's own gain", str(cell), best, bound=None, is_least=True)
    if best is not None and best.figure >= LARGE_GAIN_PERCENT:
        found += _judged(
            f"P99 below that of all-l where the oracle's is by {LARGE_GAIN_PERCENT:.0f} %",
            str(cell),
            ours,
            bound=LESS_PERCENT,
            is_least=True,
        )
    return found


def _judged(
    what: str,
    where: str,
    figure: Interval | None,
    *,
    bound: float | None,
    is_least: bool = False,
) -> list[Finding]:
    """Return a finding in percent, or none if the figure is not known."""
    if figure is None:
        return []
    return [
        Finding(
            part=PART,
            what=what,
            where=where,
            figure=figure.figure,
            half=figure.half,
            bound=bound,
            is_least=is_least,
            unit="%",
        )
    ]


def _title(where: str, rows: Sequence[PolicyRow]) -> str:
    seeds = len({row.seed for row in rows})
    return f"{where}: {seeds} seed{'s' if seeds > 1 else ''}"


def _lines(rows: Sequence[PolicyRow]) -> tuple[tuple[str, ...], ...]:
    return tuple(_line(rows, policy) for policy in dict.fromkeys(row.policy for row in rows))


def _line(rows: Sequence[PolicyRow], policy: str) -> tuple[str, ...]:
    mine = [row for row in rows if row.policy == policy]
    loss = cross_loss(rows, policy)
    is_other = policy != ALL_L
    return (
        policy,
        _mean(mine, "latency_p50_ms"),
        _mean(mine, "latency_p99_ms"),
        f"{fmean(row.latency_p999_ms for row in mine):.1f}",
        _range(gain(rows, policy)) if is_other else "",
        _range(share_of_oracle(rows, policy)) if is_other and policy != ORACLE else "",
        _mean(mine, "token_delay_p99_ms"),
        f"{100 * fmean(row.c_share for row in mine):.1f}",
        f"{100 * fmean(row.copies_share for row in mine):.1f}",
        f"{fmean(row.cross_goodput_mbit for row in mine):.2f}",
        _range(_negative(loss)) if is_other else "",
    )


def _mean(rows: Sequence[PolicyRow], field: str) -> str:
    interval = mean_interval([getattr(row, field) for row in rows])
    return f"{interval.figure:.1f}" + (f" ± {interval.half:.1f}" if len(rows) > 1 else "")


def _range(interval: Interval | None) -> str:
    if interval is None:
        return "—"
    low, high = round(interval.low), round(interval.high)
    # Adding zero takes the sign off one that rounds to it.
    return f"{round(interval.figure, 1) + 0.0:.1f}" + (f" ({low}..{high})" if low < high else "")
