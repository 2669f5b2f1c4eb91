"""Runs many cells, schemes and seeds, and lays the figures out as tables."""

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from statistics import fmean, stdev
from typing import Any, TextIO

from eloquent_netem.lab.stalls import ORACLE, Cell, Run, run_cell

STANDARD_CELLS = (
    Cell(rtt_s=0.1, tokens_per_s=30, loss=0.05),
    Cell(rtt_s=0.1, tokens_per_s=30, loss=0.10),
    Cell(rtt_s=0.1, tokens_per_s=30, loss=0.10, burst_s=0.15),
    Cell(rtt_s=0.3, tokens_per_s=50, loss=0.10),
)

BASELINE = "retransmit"
Z_95 = 1.96
"Standard errors in half a 95 % confidence interval (normal approximation)."

NOTES = """\
Loss both ways, independent or in bursts that are a function of time; the same seeds for all
schemes; the same congestion controller (thin) and pacer for all; virtual time. *Strict* is the
share of the answer's time in which a token is due and not rendered; *200 ms* counts only what lies
beyond 200 ms after the rendering before. ± is half a 95 % confidence interval over the seeds.
*Against* compares with `retransmit` what lies above the `oracle` of the same seed (strict, means);
*worst seed* is that of the 200 ms ratio; *better seeds* counts those on which the strict and the
200 ms ratio are below `retransmit`'s. Token delays are means over the seeds. Downlink bytes include
IP, UDP or TCP, and QUIC; acknowledgements and handshake repeats count. `eloquent` and
`eloquent-queued` are padded, the others are not, which is in their favour. `tcp` is a model of
Linux's TCP with CUBIC, without TLS, held to the kernel by its tests. `oracle` is the link's own
bound: no sender can do better (0 under independent loss)."""

HEADER = (
    "| scheme | strict % | against | 200 ms % | worst seed | better seeds | p50 ms | p99 ms | "
    "packets/token | bytes/token |\n|---|---|---|---|---|---|---|---|---|---|"
)


def run_cells(
    cells: Sequence[Cell],
    *,
    schemes: Sequence[str],
    seeds: Iterable[int],
    tokens: int,
    progress: TextIO | None = None,
) -> list[Run]:
    """Run every cell with every scheme and seed, on all processors.

    Raises:
        DeliveryError: a run lost, doubled or changed a token.
        StuckError: a run did not end.
    """
    jobs = [
        (replace(cell, tokens=tokens), scheme, seed)
        for cell in cells
        for scheme in schemes
        for seed in seeds
    ]
    runs: list[Run] = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for run in pool.map(run_cell, *zip(*jobs, strict=True)):
            runs.append(run)
            if progress is not None and progress.isatty():
                print(f"\r{len(runs)} of {len(jobs)} runs", end="", file=progress, flush=True)
    if progress is not None and progress.isatty():
        print(file=progress)
    return runs


def render(runs: Sequence[Run]) -> str:
    """Return the tables, one for each cell, in Markdown."""
    parts = [NOTES]
    for cell in dict.fromkeys(run.cell for run in runs):
        mine = [run for run in runs if run.cell == cell]
        baseline = [run for run in mine if run.scheme == BASELINE]
        bound = {run.seed: run.measures.stall_ratio for run in mine if run.scheme == ORACLE}
        title = (
            f"\n## {1000 * cell.rtt_s:g} ms round trip, {cell.tokens_per_s:g} tokens/s, "
            f"{100 * cell.loss:g} % loss{_bursts(cell)}\n\n{cell.tokens} tokens, "
            f"{len({run.seed for run in mine})} seeds.\n"
        )
        rows = [
            _row(scheme, [run for run in mine if run.scheme == scheme], baseline, bound)
            for scheme in dict.fromkeys(run.scheme for run in mine)
        ]
        parts += [title, HEADER, *rows]
    return "\n".join(parts)


def to_json(runs: Sequence[Run], command: Sequence[str]) -> dict[str, Any]:
    """Return all runs and how they were made; ratios are shares of one, times milliseconds."""
    meta = {
        "command": ["eloquent", *command],
        "aioquic": version("aioquic"),
        "eloquent-stream": version("eloquent-stream"),
        "python": platform.python_version(),
        "driver": "sim",
    }
    rows = [
        {
            "scenario": {
                key: value for key, value in asdict(run.cell).items() if key != "outages_s"
            },
            "scheme": run.scheme,
            "seed": run.seed,
            "stall_ratio": run.measures.stall_ratio,
            "stall_ratio_200ms": run.measures.stall_ratio_200ms,
            "delay_p50_ms": 1000 * run.measures.delay_p50_s,
            "delay_p99_ms": 1000 * run.measures.delay_p99_s,
            "delay_max_ms": 1000 * run.measures.delay_max_s,
            "packets_per_token": run.downlink_packets / run.cell.tokens,
            "wire_bytes_per_token": run.downlink_bytes / run.cell.tokens,
        }
        for run in runs
    ]
    return {"meta": meta, "rows": rows}


def _bursts(cell: Cell) -> str:
    return "" if cell.burst_s is None else f" in bursts of {1000 * cell.burst_s:g} ms"


def _row(
    scheme: str, runs: Sequence[Run], baseline: Sequence[Run], bound: Mapping[int, float]
) -> str:
    strict = _mean(runs, lambda run: 100 * run.measures.stall_ratio)
    beyond = _mean(runs, lambda run: 100 * run.measures.stall_ratio_200ms)
    worst = max(100 * run.measures.stall_ratio_200ms for run in runs)
    against = better = "—"
    if baseline and scheme != BASELINE:
        reference, mine = (
            fmean(run.measures.stall_ratio - bound.get(run.seed, 0.0) for run in compared)
            for compared in (baseline, runs)
        )
        against = f"{100 * (mine / reference - 1):+.1f} %" if reference else "—"
        by_seed = {run.seed: run.measures for run in baseline}
        is_better = [
            (
                run.measures.stall_ratio < by_seed[run.seed].stall_ratio,
                run.measures.stall_ratio_200ms < by_seed[run.seed].stall_ratio_200ms,
            )
            for run in runs
        ]
        strictly, beyond_200 = (sum(column) for column in zip(*is_better, strict=True))
        better = f"{strictly}, {beyond_200} of {len(runs)}"
    p50, p99 = (
        fmean(1000 * getattr(run.measures, name) for run in runs)
        for name in ("delay_p50_s", "delay_p99_s")
    )
    packets = fmean(run.downlink_packets / run.cell.tokens for run in runs)
    sent_bytes = fmean(run.downlink_bytes / run.cell.tokens for run in runs)
    cost = "— | —" if scheme == ORACLE else f"{packets:.2f} | {sent_bytes:.0f}"
    return (
        f"| {scheme} | {strict} | {against} | {beyond} | {worst:.2f} | {better} | {p50:.0f} | "
        f"{p99:.0f} | {cost} |"
    )


def _mean(runs: Sequence[Run], figure: Callable[[Run], float]) -> str:
    values = [figure(run) for run in runs]
    half = Z_95 * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{fmean(values):.2f} ± {half:.2f}"
