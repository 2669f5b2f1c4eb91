"""Loss in bursts: nobody beats the link, and all schemes meet the same bursts."""

from pathlib import Path
from statistics import fmean

import pytest

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.commands import stalls
from eloquent_netem.lab.stalls import ORACLE, Cell, run_cell

BURSTY = Cell(rtt_s=0.1, tokens_per_s=30, loss=0.1, burst_s=0.15, tokens=200)


def test_in_a_burst_every_scheme_waits_for_the_link_at_least() -> None:
    bounds = []
    for seed in range(4):
        bound = run_cell(BURSTY, ORACLE, seed).measures
        bounds.append(bound.stall_ratio)
        for scheme in ("eloquent", "retransmit"):
            found = run_cell(BURSTY, scheme, seed).measures
            assert found.stall_ratio >= bound.stall_ratio - 1e-9
            assert found.delay_max_s >= bound.delay_max_s - 1e-9
    assert fmean(bounds) > 0.02


def test_the_command_says_that_loss_comes_in_bursts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    stalls(rtt_ms=100, loss=0.1, burst_ms=150, schemes=(ORACLE,), seeds=1, tokens=20, markdown=page)
    assert "bursts of 150 ms" in capsys.readouterr().out
    assert "bursts of 150 ms" in page.read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"burst_ms": 150.0}, "give the network with --rtt-ms"),
        ({"rtt_ms": 100.0, "burst_ms": 0.5}, "a burst lasts"),
        ({"rtt_ms": 100.0, "burst_ms": 1.0, "loss": 0.9}, "make the bursts longer"),
    ],
)
def test_impossible_bursts_are_refused(options: dict[str, float], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        stalls(**options)  # type: ignore[arg-type]
