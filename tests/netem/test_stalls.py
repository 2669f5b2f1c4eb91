"""The first proof: both real QUIC ends over seeded bad links, in virtual time.

`run_cell` itself raises if the text does not arrive whole, in order and once.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from eloquent.core.schemes import SCHEMES
from eloquent.errors import ConfigurationError
from eloquent_netem.lab.commands import stalls
from eloquent_netem.lab.stalls import ORACLE, Cell, Run, run_cell
from eloquent_netem.lab.table import render, run_cells, to_json

HARD_CELLS = {
    "10 % loss": Cell(rtt_s=0.1, tokens_per_s=30, loss=0.1, tokens=120),
    "30 % loss": Cell(rtt_s=0.1, tokens_per_s=30, loss=0.3, tokens=120),
    "30 % loss, 300 ms": Cell(rtt_s=0.3, tokens_per_s=50, loss=0.3, tokens=120),
    "reordering": Cell(rtt_s=0.1, tokens_per_s=50, jitter_s=0.08, loss=0.02, tokens=120),
    "duplication": Cell(rtt_s=0.1, tokens_per_s=50, duplicates=0.3, loss=0.02, tokens=120),
    "3 s outage": Cell(rtt_s=0.1, tokens_per_s=30, outages_s=((1.0, 4.0),), tokens=120),
    "outage at the end": Cell(rtt_s=0.1, tokens_per_s=30, outages_s=((3.0, 6.0),), tokens=100),
    "all at once": Cell(
        rtt_s=0.1,
        tokens_per_s=30,
        loss=0.1,
        jitter_s=0.05,
        duplicates=0.1,
        outages_s=((1.0, 4.0),),
        tokens=120,
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", HARD_CELLS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_text_arrives_whole_in_order_and_once(scheme: str, name: str, seed: int) -> None:
    run = run_cell(HARD_CELLS[name], scheme, seed)
    assert run.downlink_packets > 0


def runs(cell: Cell, scheme: str, seeds: int = 5) -> list[Run]:
    return [run_cell(cell, scheme, seed) for seed in range(seeds)]


@pytest.mark.parametrize("loss", [0.05, 0.10])
def test_eloquent_stalls_at_least_71_percent_less_than_retransmission(loss: float) -> None:
    cell = Cell(rtt_s=0.1, tokens_per_s=30, loss=loss)
    ours = fmean(run.measures.stall_ratio for run in runs(cell, "eloquent"))
    theirs = fmean(run.measures.stall_ratio for run in runs(cell, "retransmit"))
    assert ours <= (1 - 0.71) * theirs


def test_on_a_long_fast_lossy_path_a_reader_hardly_notices() -> None:
    cell = Cell(rtt_s=0.3, tokens_per_s=50, loss=0.1)
    ours = [run.measures.stall_ratio_200ms for run in runs(cell, "eloquent")]
    theirs = [run.measures.stall_ratio_200ms for run in runs(cell, "retransmit")]
    assert all(our < their for our, their in zip(ours, theirs, strict=True))
    assert fmean(ours) < 0.01


def test_late_binding_makes_a_difference_where_the_window_binds() -> None:
    cell = Cell(rtt_s=0.3, tokens_per_s=100, loss=0.2)
    ours = [run.measures.stall_ratio for run in runs(cell, "eloquent")]
    queued = [run.measures.stall_ratio for run in runs(cell, "eloquent-queued")]
    assert fmean(queued) > 2 * fmean(ours)


def test_without_loss_nobody_waits_and_nothing_is_repeated() -> None:
    cell = Cell(rtt_s=0.1, tokens_per_s=30)
    for scheme in ("eloquent", "retransmit"):
        run = run_cell(cell, scheme, 0)
        assert run.measures.stall_ratio == pytest.approx(0, abs=1e-9)
        assert run.downlink_packets / cell.tokens < 1.2  # its own acknowledgements included


def test_the_oracle_waits_for_the_link_and_for_nothing_else() -> None:
    outage = Cell(rtt_s=0.1, tokens_per_s=30, outages_s=((1.0, 4.0),), tokens=150)
    oracle = run_cell(outage, ORACLE, 0).measures
    assert oracle.delay_max_s == pytest.approx(3.0, abs=1 / 30)
    assert run_cell(outage, "eloquent", 0).measures.stall_ratio >= oracle.stall_ratio
    lossy = Cell(rtt_s=0.1, tokens_per_s=30, loss=0.1, tokens=100)
    assert run_cell(lossy, ORACLE, 0).measures.stall_ratio == pytest.approx(0, abs=1e-9)


def test_the_same_seed_gives_the_same_run() -> None:
    cell = HARD_CELLS["all at once"]
    assert run_cell(cell, "eloquent", 7) == run_cell(cell, "eloquent", 7)
    assert run_cell(cell, "eloquent", 7) != run_cell(cell, "eloquent", 8)


def test_the_table_has_every_scheme_and_its_figures() -> None:
    cell = Cell(rtt_s=0.1, tokens_per_s=30, loss=0.1)
    schemes = ("eloquent", "retransmit", ORACLE)
    found = run_cells((cell,), schemes=schemes, seeds=range(2), tokens=60)
    text = render(found)
    for scheme in schemes:
        assert f"| {scheme} |" in text
    rows = to_json(found, ["lab", "stalls"])["rows"]
    assert len(rows) == 6
    assert rows[0]["stall_ratio"] == found[0].measures.stall_ratio
    assert {row["scheme"] for row in rows} == set(schemes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rtt_ms": 100.0, "rate": float("nan")}, "--rate"),
        ({"rtt_ms": float("inf")}, "--rtt-ms"),
        ({"loss": 1.0}, "--loss"),
        ({"schemes": ("nosuch",)}, "nosuch"),
        ({"json": Path("/nowhere/at/all.json")}, "/nowhere/at/all.json"),
    ],
)
def test_impossible_options_are_refused_before_the_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        stalls(**options)
