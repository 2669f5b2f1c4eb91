"""Virtual time beside the TUN router, on rows made by hand."""

from collections.abc import Sequence

import pytest

from eloquent_netem.lab.places import synthetic
from eloquent_netem.lab.rows import Arrivals, Bound, Row, measure
from eloquent_netem.lab.tun_agree import agreement, agreement_sheets

PLACE = synthetic(rtt_ms=100, loss=0.05)
SEEDS = 5
TOKENS = 50


def rows(
    driver: str, scheme: str, waits_s: Sequence[float], *, programs_s: float = 0.0
) -> list[Row]:
    """Return a row for each seed: one of its tokens is so much late, and all behind it with it."""
    return [row(driver, scheme, seed, wait_s, programs_s) for seed, wait_s in enumerate(waits_s)]


def row(driver: str, scheme: str, seed: int, wait_s: float, programs_s: float = 0.0) -> Row:
    generated_s = tuple(0.1 * index for index in range(TOKENS))
    base_s = PLACE.base_delay_s + programs_s
    late_until_s = generated_s[10] + base_s + wait_s
    arrivals = Arrivals(
        generated_s=generated_s,
        rendered_s=tuple(
            max(time_s + base_s, late_until_s) if index >= 10 else time_s + base_s
            for index, time_s in enumerate(generated_s)
        ),
        requested_s=-1.0,
        base_delay_s=base_s,
        origin_s=-1.0,
        downlink_packets=TOKENS,
        downlink_bytes=TOKENS,
        uplink_bytes=0,
        programs_s=programs_s,
    )
    oracle = Bound(
        passes_s=generated_s,
        rendered_s=tuple(time_s + PLACE.base_delay_s for time_s in generated_s),
    )
    return measure(
        PLACE, arrivals, oracle, scheme=scheme, driver=driver, seed=seed, source="by hand"
    )


def around(wait_s: float, spread_s: float = 0.001) -> list[float]:
    return [wait_s + spread_s * (seed - SEEDS // 2) for seed in range(SEEDS)]


def test_the_same_order_agrees_and_both_tables_say_so() -> None:
    found = [
        *rows("sim", "eloquent", around(0.005)),
        *rows("tun", "eloquent", around(0.006), programs_s=0.0015),
        *rows("sim", "retransmit", around(0.4)),
        *rows("tun", "retransmit", around(0.5)),
    ]
    result = agreement(found)
    assert result.holds
    # Strict it is clear; a gap of 200 ms is not reached by one, and by the other always.
    assert [ranking.is_clear for ranking in result.rankings] == [True, True]
    ranking, delay = agreement_sheets(found)
    assert ranking.rows[0] == (PLACE.name, "strict", "1", "1", "none")
    # One token is 5 ms late in the mean, of 50: 0.1 ms.
    assert delay.rows[0][0] == PLACE.name
    assert delay.rows[0][1].startswith("0.10 ")
    assert delay.rows[0][2].startswith("0.12 ")
    assert delay.rows[0][3:] == ("1.01", "alike", "1.50")


def test_a_reversed_order_is_found_and_named() -> None:
    found = [
        *rows("sim", "eloquent", around(0.05)),
        *rows("sim", "duplicate", around(0.08)),
        *rows("tun", "eloquent", around(0.08)),
        *rows("tun", "duplicate", around(0.05)),
    ]
    result = agreement(found)
    assert not result.holds
    assert [ranking.is_reversed for ranking in result.rankings] == [True, False]
    assert agreement_sheets(found)[0].rows[0][-1] == "eloquent and duplicate"


def test_an_order_that_is_not_clear_with_one_driver_is_no_disagreement() -> None:
    found = [
        *rows("sim", "eloquent", around(0.05, spread_s=0.05)),
        *rows("sim", "duplicate", around(0.08, spread_s=0.05)),
        *rows("tun", "eloquent", around(0.08)),
        *rows("tun", "duplicate", around(0.05)),
    ]
    result = agreement(found)
    assert not any(ranking.is_clear or ranking.is_reversed for ranking in result.rankings)
    assert result.holds


def test_the_models_tcp_stands_where_the_kernels_does() -> None:
    found = [
        *rows("sim", "eloquent", around(0.01)),
        *rows("sim", "tcp", around(0.3)),
        *rows("tun", "eloquent", around(0.3)),
        *rows("tun", "tcp-sse", around(0.01)),
        *rows("tun", "tcp-websocket", around(0.01)),
    ]
    reversed_pairs = [each.schemes for each in agreement(found).rankings if each.is_reversed]
    assert set(reversed_pairs) == {("eloquent", "tcp")}


@pytest.mark.parametrize(("tun_wait_s", "is_alike"), [(0.1, True), (0.11, False)])
def test_our_mean_delay_may_differ_by_a_tenth_and_a_millisecond(
    tun_wait_s: float, is_alike: bool
) -> None:
    found = [*rows("sim", "eloquent", around(0.05)), *rows("tun", "eloquent", around(tun_wait_s))]
    (delay,) = agreement(found).delays
    assert delay.is_alike == is_alike
    assert delay.allowed_ms == pytest.approx(0.1 * delay.sim.figure + 1.0)
    assert agreement(found).holds == is_alike


def test_only_seeds_that_both_ran_count_and_the_oracle_does_not() -> None:
    found = [
        *rows("sim", "eloquent", around(0.05)),
        row("sim", "oracle", 0, 0.0),
        row("tun", "oracle", 0, 0.0),
        row("tun", "eloquent", 2, 0.05),
        row("tun", "eloquent", 99, 9.0),
    ]
    result = agreement(found)
    assert result.rankings == ()
    (delay,) = result.delays
    assert delay.sim.figure == delay.tun.figure


def test_rows_of_one_driver_alone_make_no_tables() -> None:
    assert agreement_sheets(rows("sim", "eloquent", around(0.05))) == []
    assert agreement_sheets([]) == []
