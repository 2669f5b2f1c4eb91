"""The grid: how long a reader waits, for every loss, round trip and rate, against every scheme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Protocol

from eloquent_netem.lab.answer import LabPath, send_answer
from eloquent_netem.lab.cases import Case, Figures, Job, Results, all_jobs
from eloquent_netem.lab.cells import Cell, cell_path, oracle_times
from eloquent_netem.lab.findings import Finding, Report, Sheet, mean_half
from eloquent_netem.lab.measures import measure_stalls
from eloquent_netem.lab.sources import Token
from eloquent_netem.lab.statistics import RATIO_FLOOR, ratio

OURS = "eloquent"
SCHEMES = (OURS, "retransmit", "duplicate", "tcp")
"Every run measures the oracle too, for the tokens that it generated itself."

LOSSES = (0.01, 0.05, 0.10, 0.20)
BURST_S = 0.15
RTTS_S = (0.05, 0.1, 0.3)
RATES = (10.0, 30.0, 100.0)
TOKENS = 400

LEAST_REDUCTION = {"retransmit": 0.90, "tcp": 0.90, "duplicate": 0.60}
"By which share our summed excess over the oracle is below theirs, at least."

WORSE_BY_MOST = 0.002
"In no cell is a ratio above another scheme's by more."

PACKETS_WITHOUT_LOSS = 1.1
P99_FACTOR = 1.1
P99_SLACK_S = 0.015
LIGHT_LOSS = 0.05
"Up to this independent loss the p99 delay may exceed the oracle's by `P99_SLACK_S`, else by a gap."

NOTES = (
    f"{TOKENS} tokens of 10 bytes in each answer; ours is padded, those of the others are not, "
    "which is in their favour; loss both ways, independent or in bursts of "
    f"{1000 * BURST_S:g} ms, which are a function of time. *Excess* is a ratio minus the oracle's "
    "for the same tokens; *ratio* compares our excess with another scheme's in the cell, both at "
    f"least {100 * RATIO_FLOOR:g} percentage points."
)
"How the grid's figures are made."

MEASURES = {"strict": "stall_ratio", "200 ms": "stall_ratio_200ms"}


class StallCase(Case, Protocol):
    """A case in which answers are sent and their stalls measured."""

    @property
    def tokens_per_s(self) -> float:
        """The token source's rate."""

    @property
    def p99_slack_s(self) -> float:
        """By how much the p99 token delay may exceed 1.1 times the oracle's."""

    @property
    def is_lossy(self) -> bool:
        """Whether the path loses packets."""


@dataclass(frozen=True, slots=True)
class GridCase:
    """A cell of the grid."""

    cell: Cell

    @property
    def title(self) -> str:
        """See `Case.title`."""
        cell = self.cell
        kind = "" if not cell.loss else " in bursts" if cell.burst_s else " independent"
        return f"{1000 * cell.rtt_s:g} ms, {cell.tokens_per_s:g} tok/s, {100 * cell.loss:g} %{kind}"

    @property
    def tokens_per_s(self) -> float:
        """See `StallCase.tokens_per_s`."""
        return self.cell.tokens_per_s

    @property
    def is_lossy(self) -> bool:
        """See `StallCase.is_lossy`."""
        return self.cell.loss > 0

    @property
    def p99_slack_s(self) -> float:
        """See `StallCase.p99_slack_s`."""
        is_light = self.cell.burst_s is None and self.cell.loss <= LIGHT_LOSS
        return P99_SLACK_S if is_light else 1 / self.cell.tokens_per_s

    def run(self, scheme: str, seed: int) -> Figures:
        """See `Case.run`."""
        cell = self.cell
        return stall_figures(cell_path(cell, seed), scheme, cell.plan)


def stall_figures(path: LabPath, scheme: str, plan: Sequence[Token]) -> Figures:
    """Send one answer and return its figures, and those of the oracle for the same tokens."""
    tokens = len(plan)
    answer = send_answer(path, scheme, plan)
    mine = measure_stalls(answer.generated_s, answer.rendered_s, path.base_delay_s)
    ideal_s = oracle_times(path, answer.generated_s)
    oracle = measure_stalls(answer.generated_s, ideal_s, path.base_delay_s)
    return {
        "stall_ratio": mine.stall_ratio,
        "stall_ratio_200ms": mine.stall_ratio_200ms,
        "delay_p50_s": mine.delay_p50_s,
        "delay_p99_s": mine.delay_p99_s,
        "delay_max_s": mine.delay_max_s,
        "oracle_stall_ratio": oracle.stall_ratio,
        "oracle_stall_ratio_200ms": oracle.stall_ratio_200ms,
        "oracle_delay_p99_s": oracle.delay_p99_s,
        "data_packets_per_token": answer.data_packets / tokens,
        "packets_per_token": answer.downlink_packets / tokens,
        "bytes_per_token": answer.downlink_bytes / tokens,
        "uplink_bytes_per_token": answer.uplink_bytes / tokens,
    }


def grid_cases() -> list[GridCase]:
    """Return the grid: the lossy cells, then those without loss."""
    base = [
        Cell(rtt_s=rtt_s, tokens_per_s=rate, tokens=TOKENS) for rtt_s in RTTS_S for rate in RATES
    ]
    lossy = [
        replace(cell, loss=loss, burst_s=burst_s)
        for burst_s in (None, BURST_S)
        for loss in LOSSES
        for cell in base
    ]
    return [GridCase(cell) for cell in (*lossy, *base)]


def grid_jobs(seeds: Sequence[int], schemes: Sequence[str] = SCHEMES) -> list[Job]:
    """Return the grid's jobs; without loss all seeds are alike, and one is enough."""
    cases = grid_cases()
    lossy = [case for case in cases if case.is_lossy]
    clean = [case for case in cases if not case.is_lossy]
    return all_jobs(lossy, schemes, seeds) + all_jobs(clean, schemes, seeds[:1])


def stall_report(part: str, cases: Sequence[StallCase], results: Results) -> Report:
    """Judge answers on several cases: sums over all, and each."""
    report = Report(part)
    found = {
        case: {scheme: seeds for scheme in SCHEMES if (seeds := results.seeds(case, scheme))}
        for case in cases
    }
    lossy = [case for case in cases if case.is_lossy]
    for scheme, least in LEAST_REDUCTION.items():
        for name in MEASURES:
            report.findings += _reductions(part, scheme, name, least, lossy=lossy, found=found)
    for case, schemes in found.items():
        if OURS in schemes:
            report.findings += _of_case(part, case, schemes)
    report.findings.append(
        Finding(part=part, what="runs that failed", figure=len(results.failures), bound=0)
    )
    report.sheets.append(_sheet(found))
    return report


def excess(figures: Figures, measure: str) -> float:
    """Return a ratio minus the oracle's for the same tokens."""
    ratio: float = figures[measure] - figures[f"oracle_{measure}"]
    return ratio


BySchemeAndSeed = Mapping[str, Mapping[int, Figures]]


def _reductions(
    part: str,
    scheme: str,
    name: str,
    least: float,
    *,
    lossy: Sequence[StallCase],
    found: Mapping[StallCase, BySchemeAndSeed],
) -> list[Finding]:
    """Compare the excess summed over the cases, seed by seed."""
    measure = MEASURES[name]
    sums: list[tuple[float, float]] = []
    both = [found[case] for case in lossy if {OURS, scheme} <= found[case].keys()]
    if not both:
        return []
    common = set.intersection(
        *(set(by_scheme[which]) for by_scheme in both for which in (OURS, scheme))
    )
    for seed in sorted(common):
        mine, theirs = (
            sum(excess(by_scheme[which][seed], measure) for by_scheme in both)
            for which in (OURS, scheme)
        )
        sums.append((mine, theirs))
    if not sums:
        return []
    mine, half_mine = mean_half([100 * pair[0] / len(both) for pair in sums])
    theirs, half_theirs = mean_half([100 * pair[1] / len(both) for pair in sums])
    findings = [
        Finding(
            part=part,
            what=f"mean excess, {name}, {which}",
            figure=figure,
            half=half,
            unit="%",
        )
        for which, figure, half in ((OURS, mine, half_mine), (scheme, theirs, half_theirs))
    ]
    if theirs > 0:
        reductions = [100 * (1 - pair[0] / pair[1]) for pair in sums if pair[1] > 0]
        findings.append(
            Finding(
                part=part,
                what=f"summed excess, {name}: below {scheme} by",
                figure=100 * (1 - mine / theirs),
                half=mean_half(reductions)[1],
                bound=100 * least,
                is_least=True,
                unit="%",
            )
        )
    return findings[0 if scheme == "retransmit" else 1 :]


def _of_case(part: str, case: StallCase, schemes: BySchemeAndSeed) -> list[Finding]:
    """Hold one case to its bounds."""
    findings = []
    for name, measure in MEASURES.items():
        mine = fmean(excess(figures, measure) for figures in schemes[OURS].values())
        others = {
            scheme: fmean(excess(figures, measure) for figures in seeds.values())
            for scheme, seeds in schemes.items()
            if scheme != OURS
        }
        if others:
            best = min(others, key=lambda scheme: others[scheme])
            findings.append(
                Finding(
                    part=part,
                    what=f"worse than the best other scheme, {name}, by",
                    where=f"{case.title} ({best})",
                    figure=100 * (mine - others[best]),
                    bound=100 * WORSE_BY_MOST,
                    unit="pp",
                )
            )
    p99_s, half_s = mean_half([run["delay_p99_s"] for run in schemes[OURS].values()])
    oracle_s = fmean(run["oracle_delay_p99_s"] for run in schemes[OURS].values())
    findings.append(
        Finding(
            part=part,
            what="p99 token delay beyond 1.1 oracle + slack",
            where=case.title,
            figure=1000 * (p99_s - P99_FACTOR * oracle_s - case.p99_slack_s),
            half=1000 * half_s,
            bound=0,
            unit="ms",
        )
    )
    packets = _mean(schemes[OURS], "data_packets_per_token")
    if not case.is_lossy:
        findings.append(
            Finding(
                part=part,
                what="data packets per token without loss",
                where=case.title,
                figure=packets,
                bound=PACKETS_WITHOUT_LOSS,
            )
        )
    elif "duplicate" in schemes:
        findings.append(
            Finding(
                part=part,
                what="data packets per token, over duplicate's",
                where=case.title,
                figure=packets / _mean(schemes["duplicate"], "data_packets_per_token"),
                bound=1,
            )
        )
    return findings


def _mean(seeds: Mapping[int, Figures], name: str) -> float:
    return fmean(figures[name] for figures in seeds.values())


def _sheet(found: Mapping[StallCase, BySchemeAndSeed]) -> Sheet:
    header = (
        "cell",
        "scheme",
        "excess strict %",
        "ratio",
        "excess 200 ms %",
        "ratio",
        "p99 ms",
        "oracle p99 ms",
        "data packets/token",
        "bytes/token",
    )
    rows = []
    for case, schemes in found.items():
        for scheme, seeds in schemes.items():
            cells = []
            for measure in MEASURES.values():
                mean, half = mean_half([100 * excess(run, measure) for run in seeds.values()])
                cells += [f"{mean:.2f} ± {half:.2f}", _ratio(schemes, scheme, measure)]
            rows.append(
                (
                    case.title,
                    scheme,
                    *cells,
                    f"{1000 * _mean(seeds, 'delay_p99_s'):.0f}",
                    f"{1000 * _mean(seeds, 'oracle_delay_p99_s'):.0f}",
                    f"{_mean(seeds, 'data_packets_per_token'):.2f}",
                    f"{_mean(seeds, 'bytes_per_token'):.0f}",
                )
            )
    return Sheet("Cells", header, tuple(rows))


def _ratio(schemes: BySchemeAndSeed, scheme: str, measure: str) -> str:
    """Return our excess over this scheme's."""
    if scheme == OURS or OURS not in schemes:
        return "—"
    mine, theirs = (
        fmean(excess(run, measure) for run in schemes[which].values()) for which in (OURS, scheme)
    )
    return f"{ratio(mine, theirs):.2f}"
