"""The grid's judgement, on figures made up, and a small part of the grid itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.cases import Cache, Figures, Job, Results, run_jobs
from eloquent_netem.lab.cells import Cell
from eloquent_netem.lab.commands import transport
from eloquent_netem.lab.findings import Finding, Report, markdown_page, summary_rows
from eloquent_netem.lab.grid import (
    SCHEMES,
    GridCase,
    excess,
    grid_cases,
    grid_jobs,
    stall_report,
)

CELL = Cell(rtt_s=0.1, tokens_per_s=30, loss=0.1, tokens=60)
CASE = GridCase(CELL)


def figures(stall: float, **others: float) -> Figures:
    return {
        "stall_ratio": stall + 0.1,
        "stall_ratio_200ms": stall / 2 + 0.05,
        "oracle_stall_ratio": 0.1,
        "oracle_stall_ratio_200ms": 0.05,
        "delay_p50_s": 0.0,
        "delay_p99_s": 0.1,
        "oracle_delay_p99_s": 0.08,
        "data_packets_per_token": 2.0,
        "packets_per_token": 2.1,
        "bytes_per_token": 200.0,
        **others,
    }


def judged(
    case: GridCase = CASE, *, ours: Figures, others: float = 0.5, seeds: int = 2
) -> dict[str, Finding]:
    results = Results()
    for scheme in SCHEMES:
        for seed in range(seeds):
            found = ours if scheme == "eloquent" else figures(others)
            results.figures[Job(case, scheme, seed)] = found
    return {finding.what: finding for finding in stall_report("grid", [case], results).findings}


def test_excess_is_what_lies_above_the_oracle() -> None:
    assert excess(figures(0.3), "stall_ratio") == pytest.approx(0.3)


@pytest.mark.parametrize(("ours", "is_met"), [(0.049, True), (0.051, False)])
def test_our_summed_excess_is_a_tenth_of_retransmissions_at_most(ours: float, is_met: bool) -> None:
    found = judged(ours=figures(ours))
    assert found["summed excess, strict: below retransmit by"].is_met is is_met
    assert found["summed excess, strict: below duplicate by"].is_met


@pytest.mark.parametrize(("ours", "is_met"), [(0.5019, True), (0.5021, False)])
def test_no_cell_is_worse_by_more_than_a_fifth_of_a_point(ours: float, is_met: bool) -> None:
    found = judged(ours=figures(ours))
    assert found["worse than the best other scheme, strict, by"].is_met is is_met


@pytest.mark.parametrize(
    ("cell", "p99_s", "is_met"),
    [
        (CELL, 0.088 + 1 / 30, True),  # a token's gap where loss is heavy
        (CELL, 0.089 + 1 / 30, False),
        (replace(CELL, loss=0.05), 0.103, True),  # 15 ms where it is light
        (replace(CELL, loss=0.05), 0.104, False),
        (replace(CELL, loss=0.05, burst_s=0.15), 0.104, True),
    ],
)
def test_the_slowest_tokens_are_held_to_the_oracles(cell: Cell, p99_s: float, is_met: bool) -> None:
    found = judged(GridCase(cell), ours=figures(0.01, delay_p99_s=p99_s - 1e-6))
    assert found["p99 token delay beyond 1.1 oracle + slack"].is_met is is_met


@pytest.mark.parametrize(
    ("loss", "packets", "what", "is_met"),
    [
        (0.1, 2.0, "data packets per token, over duplicate's", True),
        (0.1, 2.01, "data packets per token, over duplicate's", False),
        (0.0, 1.1, "data packets per token without loss", True),
        (0.0, 1.11, "data packets per token without loss", False),
    ],
)
def test_packets_are_bounded(loss: float, packets: float, what: str, is_met: bool) -> None:
    case = GridCase(replace(CELL, loss=loss))
    found = judged(case, ours=figures(0.01, data_packets_per_token=packets))
    assert found[what].is_met is is_met


def test_the_grid_has_every_cell_once_and_needs_no_seeds_without_loss() -> None:
    cases = grid_cases()
    assert len(set(cases)) == len(cases) == (2 * 4 + 1) * 9
    assert len(grid_jobs(range(3), ["eloquent"])) == 72 * 3 + 9


def test_a_cell_runs_with_every_scheme_and_the_cache_remembers_it(tmp_path: Path) -> None:
    file = tmp_path / "cache.jsonl"
    jobs = [Job(CASE, scheme, 0) for scheme in SCHEMES]
    first = run_jobs(jobs, workers=2, cache=Cache(file))
    assert first.figures.keys() == set(jobs)
    assert not first.failures
    assert first.figures[jobs[0]]["stall_ratio"] < first.figures[jobs[1]]["stall_ratio"]
    assert first.figures[jobs[0]]["data_packets_per_token"] >= 1
    said: list[tuple[int, int]] = []
    again = run_jobs(
        jobs, workers=2, cache=Cache(file), progress=lambda *counts: said.append(counts)
    )
    assert again.figures == first.figures
    assert said == [(4, 4)]
    row = json.loads(file.read_text().split("\n")[1])
    file.write_text(json.dumps({**row, "key": "of other code"}) + "\n")
    assert Cache(file).get(jobs[0]) is None


def test_a_group_of_findings_is_shown_as_its_worst() -> None:
    group = [
        Finding(part="p", what="w", where=f"case {figure}", figure=figure, bound=2)
        for figure in (1, 3, 2)
    ]
    told = Finding(part="p", what="x", figure=7, half=0.5, unit="ms")
    assert summary_rows([*group, told]) == [
        ("p", "w", "3", "<= 2", "NO (2 of 3)", "case 3"),
        ("p", "x", "7 ± 0.5 ms", "—", "—", ""),
    ]
    page = markdown_page([Report("p", [*group, told])], "eloquent lab transport")
    assert "| p | w | 3 | <= 2 | NO (2 of 3) | case 3 |" in page


@pytest.mark.parametrize(
    "options", [{"part": ("nosuch",)}, {"seeds": 0}, {"json": Path("/nowhere/at/all.json")}]
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        transport(**options)  # type: ignore[arg-type]
