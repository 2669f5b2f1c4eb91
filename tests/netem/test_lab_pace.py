"""The pacer's figures: evenness from arrival times, and the table."""

from statistics import fmean

import pytest

from eloquent.core.pacer import MAX_ADDED_DELAY_S
from eloquent.errors import ConfigurationError
from eloquent_netem.lab.answer import send_answer
from eloquent_netem.lab.cells import Cell, cell_path
from eloquent_netem.lab.leak_commands import pace
from eloquent_netem.lab.pace import TEXT, evenness


def test_off_shows_what_arrives_when_it_arrives() -> None:
    seen = evenness([1.0, 1.1, 1.1, 1.1, 1.4], "off")
    assert seen.gap_p99_s == pytest.approx(0.3)
    assert seen.largest_piece <= 3 * len(TEXT)
    assert (seen.added_delay_mean_s, seen.added_delay_max_s) == (0.0, 0.0)


def test_smooth_halves_the_long_gaps_that_bursts_of_loss_leave() -> None:
    cell = Cell(rtt_s=0.1, tokens_per_s=30, loss=0.10, burst_s=0.15, tokens=300)
    gaps: list[tuple[float, float]] = []
    for seed in range(5):
        answer = send_answer(cell_path(cell, seed), "eloquent", cell.plan)
        off, smooth = (evenness(answer.rendered_s, mode) for mode in ("off", "smooth"))
        gaps.append((off.gap_p99_s, smooth.gap_p99_s))
        assert smooth.largest_piece < off.largest_piece / 2, f"seed {seed}"
        assert smooth.added_delay_mean_s < MAX_ADDED_DELAY_S / 2, f"seed {seed}"
        assert smooth.added_delay_max_s <= MAX_ADDED_DELAY_S + 1e-9, f"seed {seed}"
    mean_off, mean_smooth = (fmean(column) for column in zip(*gaps, strict=True))
    assert mean_smooth < mean_off / 2


def test_the_table_has_a_row_for_each_network_and_pace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pace(seeds=1, tokens=20)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 4 * 3
    assert "100 ms, 30 tokens/s, 10 % in bursts of 150 ms | smooth" in "\n".join(rows)


@pytest.mark.parametrize("options", [{"seeds": 0}, {"tokens": 1}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        pace(**options)
