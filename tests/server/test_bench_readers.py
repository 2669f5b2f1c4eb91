"""`eloquent bench readers`: it measures what it says; how much that is decides nothing."""

import pytest

from eloquent.errors import ConfigurationError
from eloquent_server.bench.readers import Cost, Load, describe, measure


def test_a_small_load_is_measured() -> None:
    load = Load(readers=3, tokens_per_s=50.0, seconds=1.0)
    cost = measure(load)
    # The last tick may be late, and no token is told twice.
    assert 0 < cost.tokens <= 3 * 50 * cost.wall_s
    assert cost.cpu_s > 0
    assert describe(load, cost).startswith("3 readers, 50 tokens/s each, ")


def test_the_figures_follow_from_what_was_counted() -> None:
    cost = Cost(tokens=10_000, cpu_s=1.0, wall_s=10.0)
    assert cost.us_per_token == pytest.approx(100.0)
    assert describe(Load(50, 20.0, 10.0), cost) == (
        "50 readers, 20 tokens/s each, 10 s: 100 us of CPU per token and reader (10 % of a core); "
        "450 readers would take 90 %"
    )


@pytest.mark.parametrize("load", [Load(0, 30.0, 1.0), Load(1, 0.0, 1.0), Load(1, 30.0, 0.0)])
def test_nothing_to_measure_is_said(load: Load) -> None:
    with pytest.raises(ConfigurationError, match="above 0"):
        measure(load)
