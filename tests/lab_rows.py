"""Rows and runs of the lab, made by hand."""

from dataclasses import replace
from typing import Any

from eloquent_netem.lab.rows import Arrivals, Row

_ROW = Row(
    scenario="a",
    source="30 tok/s",
    scheme="eloquent",
    driver="sim",
    seed=0,
    rtt_ms=100.0,
    loss=0.05,
    burst_ms=None,
    tokens=400,
    stall_ratio=0.1,
    stall_ratio_200ms=0.02,
    excess_strict=0.1,
    excess_200ms=0.02,
    delay_p50_ms=0.0,
    delay_p99_ms=50.0,
    delay_mean_ms=5.0,
    delay_max_ms=80.0,
    gap_p99_ms=60.0,
    ttft_ms=200.0,
    wire_bytes_per_token=200.0,
    packets_per_token=2.0,
    uplink_bytes_per_token=50.0,
    recovery_rtts=None,
    duplicates=0,
    missing=0,
    programs_ms=0.0,
    lateness_p50_us=None,
    lateness_p99_us=None,
)


def row(scenario: str, scheme: str, seed: int, **fields: Any) -> Row:
    """Return a row with these fields, the others being of no matter."""
    return replace(_ROW, scenario=scenario, scheme=scheme, seed=seed, **fields)


def arrivals(delays_s: list[float], *, tokens_per_s: float = 30.0) -> Arrivals:
    """Return a run whose tokens come so late; none before the one in front of it."""
    generated_s = tuple(1 + index / tokens_per_s for index in range(len(delays_s)))
    rendered_s: list[float] = []
    for generated, delay_s in zip(generated_s, delays_s, strict=True):
        rendered_s.append(max(generated + 0.05 + delay_s, *rendered_s[-1:], 0.0))
    return Arrivals(
        generated_s=generated_s,
        rendered_s=tuple(rendered_s),
        requested_s=0.5,
        base_delay_s=0.05,
        origin_s=0.0,
        downlink_packets=2 * len(delays_s),
        downlink_bytes=200 * len(delays_s),
        uplink_bytes=50 * len(delays_s),
    )
