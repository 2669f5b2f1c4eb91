"""The first proof: both real QUIC ends over seeded bad links, in virtual time.

A driver raises by itself if the text does not arrive whole, in order and once.
"""

from statistics import fmean

import pytest

from eloquent_netem.lab.places import synthetic
from eloquent_netem.lab.rows import ORACLE, Arrivals, Place, Row
from eloquent_netem.lab.simulated import SimDriver
from eloquent_netem.lab.sources import ConstantRate
from eloquent_netem.lab.stalls import Comparison
from eloquent_netem.scenario import parse_scenario

SIM = SimDriver()
QUIC_SCHEMES = [scheme for scheme in SIM.schemes if not scheme.startswith("tcp")]

LOSSY = synthetic(rtt_ms=100, loss=0.1)
BURSTY = synthetic(rtt_ms=100, loss=0.1, burst_ms=150)


def place(name: str, path: str, rest: str = "") -> Place:
    """Return a network, the same both ways, whose clock starts when the reader connects."""
    toml = f"{rest}\n[up]\n{path}\n[down]\n{path}"
    return Place(name=name, scenario=parse_scenario(toml, name=name), begins_s=0.0)


def outage(start_s: float, stop_s: float, effect: str = "drop") -> str:
    return (
        f'outages = [{{ kind = "spans", spans_s = [[{start_s}, {stop_s}]], effect = "{effect}"}}]'
    )


LOSS = 'loss = { kind = "independent", probability = 0.02 }'
HARD_PLACES = {
    one.name: (one, rate)
    for one, rate in (
        (LOSSY, 30),
        (synthetic(rtt_ms=100, loss=0.3), 30),
        (synthetic(rtt_ms=300, loss=0.3), 50),
        (place("reordering", f"delay_ms = 50\njitter_ms = 80\nreorder = true\n{LOSS}"), 50),
        (place("duplication", f"delay_ms = 50\nduplicate = 0.3\n{LOSS}"), 50),
        (place("3 s outage", "delay_ms = 50", outage(1.15, 4.15)), 30),
        (place("held", "delay_ms = 50", outage(1.15, 2.15, "hold")), 30),
        (place("outage at the end", "delay_ms = 50", outage(3.65, 6.65)), 30),
        (
            place(
                "all at once",
                f"delay_ms = 50\njitter_ms = 50\nreorder = true\nduplicate = 0.1\n{LOSS}",
                outage(1.15, 4.15),
            ),
            30,
        ),
    )
}


def run(where: Place, scheme: str, seed: int, *, rate: float = 30, tokens: int = 400) -> Row:
    case = Comparison(where, ConstantRate(rate, tokens), SIM)
    return case.row(scheme, seed, *case.answer(scheme, seed))


def runs(where: Place, scheme: str, seeds: int = 5, rate: float = 30) -> list[Row]:
    return [run(where, scheme, seed, rate=rate) for seed in range(seeds)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", HARD_PLACES)
@pytest.mark.parametrize("scheme", QUIC_SCHEMES)
def test_the_text_arrives_whole_in_order_and_once(scheme: str, name: str, seed: int) -> None:
    where, rate = HARD_PLACES[name]
    row = run(where, scheme, seed, rate=rate, tokens=120)
    assert row.packets_per_token > 0
    assert row.duplicates == row.missing == 0


@pytest.mark.parametrize("loss", [0.05, 0.10])
def test_eloquent_stalls_at_least_71_percent_less_than_retransmission(loss: float) -> None:
    where = synthetic(rtt_ms=100, loss=loss)
    ours = fmean(row.stall_ratio for row in runs(where, "eloquent"))
    theirs = fmean(row.stall_ratio for row in runs(where, "retransmit"))
    assert ours <= (1 - 0.71) * theirs


def test_on_a_long_fast_lossy_path_a_reader_hardly_notices() -> None:
    where = synthetic(rtt_ms=300, loss=0.1)
    ours = [row.stall_ratio_200ms for row in runs(where, "eloquent", rate=50)]
    theirs = [row.stall_ratio_200ms for row in runs(where, "retransmit", rate=50)]
    assert all(our < their for our, their in zip(ours, theirs, strict=True))
    assert fmean(ours) < 0.01


def test_late_binding_makes_a_difference_where_the_window_binds() -> None:
    where = synthetic(rtt_ms=300, loss=0.2)
    ours = fmean(row.stall_ratio for row in runs(where, "eloquent", rate=100))
    queued = fmean(row.stall_ratio for row in runs(where, "eloquent-queued", rate=100))
    assert queued > 2 * ours


def test_without_loss_nobody_waits_and_nothing_is_repeated() -> None:
    where = synthetic(rtt_ms=100, loss=0)
    for scheme in ("eloquent", "retransmit", "quic-stream", "tcp"):
        row = run(where, scheme, 0)
        assert row.stall_ratio == pytest.approx(0, abs=1e-9)
        assert row.packets_per_token < 1.2  # its own acknowledgements included
        assert row.ttft_ms == pytest.approx(200)  # a handshake, then the request and the token
        assert row.recovery_rtts is None


def test_one_quic_stream_waits_for_what_is_lost_as_retransmission_does() -> None:
    stream, retransmit, ours = (
        fmean(row.stall_ratio for row in runs(LOSSY, scheme))
        for scheme in ("quic-stream", "retransmit", "eloquent")
    )
    assert 0.5 * retransmit < stream < 2 * retransmit
    assert ours < 0.1 * stream


def test_the_oracle_waits_for_the_link_and_for_nothing_else() -> None:
    where, _ = HARD_PLACES["3 s outage"]
    oracle = run(where, ORACLE, 0, tokens=150)
    assert oracle.delay_max_ms == pytest.approx(3000, abs=1000 / 30)
    assert oracle.recovery_rtts == pytest.approx(0.5)
    assert oracle.excess_strict == 0
    ours = run(where, "eloquent", 0, tokens=150)
    assert ours.stall_ratio >= oracle.stall_ratio
    assert ours.recovery_rtts is not None
    assert ours.recovery_rtts >= 0.5
    assert run(LOSSY, ORACLE, 0, tokens=100).stall_ratio == pytest.approx(0, abs=1e-9)


def test_the_oracle_has_the_jitter_that_nobody_escapes() -> None:
    where = place("jitter", "delay_ms = 50\njitter_ms = 40")
    oracle = run(where, ORACLE, 0, tokens=200)
    assert oracle.stall_ratio > 0.05
    # TCP sends each token at once, so that each meets the jitter of its own instant.
    assert run(where, "tcp", 0, tokens=200).excess_strict == pytest.approx(0, abs=1e-9)


def test_in_a_burst_every_scheme_waits_for_the_link_at_least() -> None:
    bounds, recoveries = [], []
    for seed in range(4):
        oracle = run(BURSTY, ORACLE, seed, tokens=200)
        bounds.append(oracle.stall_ratio)
        for scheme in ("eloquent", "retransmit", "quic-stream", "tcp"):
            row = run(BURSTY, scheme, seed, tokens=200)
            assert row.excess_strict is not None
            assert row.excess_strict >= -1e-9
            recoveries += [row.recovery_rtts] if row.recovery_rtts is not None else []
    assert fmean(bounds) > 0.02
    assert min(recoveries) >= 0.5 - 1e-6


@pytest.mark.parametrize("scheme", ["eloquent", "quic-stream", "tcp"])
def test_cross_traffic_fills_the_queue_and_is_nobodys_cost(scheme: str) -> None:
    link = (
        'delay_ms = 20\nrate = { kind = "fixed", mbit_s = 4 }\n'
        'queue = { kind = "drop-tail", packets = 40 }'
    )
    cross = '[[cross]]\nkind = "cubic"\ndirection = "down"'
    busy = parse_scenario(f"[up]\n{link}\n[down]\n{link}\n{cross}")
    idle = parse_scenario(f"[up]\n{link}\n[down]\n{link}")
    rows = [
        run(Place(name="x", scenario=scenario, begins_s=5.0), scheme, 0, tokens=100)
        for scenario in (busy, idle)
    ]
    # The bulk flow keeps up to 40 packets of 1.5 kB in front of ours, 3 ms each.
    assert rows[0].delay_p50_ms > 10 * max(rows[1].delay_p50_ms, 1)
    assert rows[0].packets_per_token < 5
    assert rows[1].packets_per_token < 1.5


def test_the_same_seed_gives_the_same_run() -> None:
    where, rate = HARD_PLACES["all at once"]

    def arrivals(seed: int) -> Arrivals:
        return SIM.run(where, "eloquent", seed, ConstantRate(rate, 120))

    assert arrivals(7) == arrivals(7)
    assert arrivals(7) != arrivals(8)
