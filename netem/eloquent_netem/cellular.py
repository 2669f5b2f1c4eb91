"""A seeded synthetic cellular link, for those who have no recording: opportunities for `TraceRate`.

The capacity wanders as a Brownian motion between 0 and a ceiling, opportunities come as a Poisson
process at that rate, and at times the link stalls: the model of Winstein, Sivaraman and
Balakrishnan, "Stochastic Forecasts Achieve High Throughput and Low Delay over Cellular Networks"
(NSDI 2013), with two changes. Several packets may pass at once, and stalls are a process of their
own, whose lengths have the tail that the paper found between packets.

How near it comes to eight LTE and 3G recordings, given a recording's mean rate, the share of its
time in gaps over 200 ms and their mean length (medians of 5 seeds; a test holds it): the mean rate
within 2 %; that share, 0.1 to 13 %, within a factor of 1.8 (mostly above: the capacity near 0
makes gaps too); the longest gap, 0.3 to 5.8 s, within a factor of 3; the coefficient of variation
of the rate from second to second, 0.46 to 0.88, within 0.26 (below in a drive, above in a steady
3G uplink).
"""

import math
import random
from bisect import bisect_left
from itertools import accumulate

from eloquent_netem.rate import MS_PER_S, OPPORTUNITY_BYTES

MIN_LENGTH_S = 60.0
"A shorter trace is the beginning of one this long, lest its mean be made of a few packets."

TICK_MS = 20
"The capacity steps this often, as in the paper."

WANDER = 0.2
"Standard deviation of the capacity's step over a second, over its ceiling (paper: 200 of 1000)."

STALL_TAIL = 2.27
"Shape of the stalls' Pareto distribution: the density falls with length to the -3.27 (figure 2)."


def synthetic_cellular(
    *,
    rng: random.Random,
    mean_bits_per_s: float,
    length_s: float,
    wander: float = WANDER,
    stall_share: float = 0.03,
    stall_s: float = 0.4,
    grant_packets: float = 1.5,
) -> list[int]:
    """Return in milliseconds the opportunities of a cellular link, a packet of 1500 bytes each.

    The mean rate is that of the whole trace, stalls included (of its first 60 s, if it is shorter).
    `wander` says how fast the capacity changes; `stall_share` is the part of the time that stalls
    of `stall_s` in the mean take; `grant_packets` is the mean number of packets at once. Capacity,
    stalls and grants have random streams of their own: none shifts another.

    Raises:
        ValueError: a value is out of range, or the stalls leave no time to send.
    """
    _check(
        stall_share,
        grant_packets,
        mean_bits_per_s=mean_bits_per_s,
        length_s=length_s,
        wander=wander,
        stall_s=stall_s,
    )
    wanted_ms = max(1, round(length_s * MS_PER_S))
    length_ms = max(wanted_ms, round(MIN_LENGTH_S * MS_PER_S))
    walk_rng, stall_rng, grant_rng = (
        random.Random(rng.getrandbits(64))  # noqa: S311  (emulation)
        for _ in range(3)
    )
    capacity = _walk(length_ms, wander, walk_rng)
    for start_ms, stop_ms in _stalls(length_ms, stall_share, stall_s * MS_PER_S, stall_rng):
        capacity[start_ms:stop_ms] = [0.0] * (stop_ms - start_ms)
    if not any(capacity):
        raise ValueError(f"stalls of {stall_s} s for {stall_share} of the time leave none to send")
    packets = mean_bits_per_s / 8 / OPPORTUNITY_BYTES * length_ms / MS_PER_S
    times_ms = _grants(capacity, packets, grant_packets, grant_rng)
    # The last line of a trace is its length, also where it ends in a stall.
    return [*times_ms[: bisect_left(times_ms, wanted_ms)], wanted_ms]


def _walk(length_ms: int, wander: float, rng: random.Random) -> list[float]:
    """Return for each millisecond the capacity over its ceiling: it is reflected at 0 and 1."""
    step = wander * math.sqrt(TICK_MS / MS_PER_S)
    position = rng.uniform(0, 2)
    capacity: list[float] = []
    while len(capacity) < length_ms:
        # Unfolded, the reflected motion is a free one: 0 to 1 leads up, 1 to 2 back down.
        position = (position + rng.gauss(0, step)) % 2
        capacity += [1 - abs(1 - position)] * TICK_MS
    return capacity[:length_ms]


def _stalls(
    length_ms: int, share: float, mean_ms: float, rng: random.Random
) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    if share == 0:
        return spans
    shortest_ms = mean_ms * (STALL_TAIL - 1) / STALL_TAIL
    between_ms = mean_ms * (1 - share) / share
    start = rng.expovariate(1.0) * between_ms
    while start < length_ms:
        stop = start + shortest_ms * rng.paretovariate(STALL_TAIL)
        spans.append((int(start), min(int(stop), length_ms)))
        start = stop + rng.expovariate(1.0) * between_ms
    return spans


def _grants(
    capacity: list[float], packets: float, grant_packets: float, rng: random.Random
) -> list[int]:
    """Return when packets pass, `packets` of them in the mean: a Poisson process of grants."""
    packets_per_capacity = packets / sum(capacity)
    times_ms: list[int] = []
    next_at = rng.expovariate(1 / grant_packets)
    for ms, passed in enumerate(accumulate(capacity)):
        while next_at <= passed * packets_per_capacity:
            times_ms += [ms] * _geometric(grant_packets, rng)
            next_at += rng.expovariate(1 / grant_packets)
    return times_ms


def _geometric(mean: float, rng: random.Random) -> int:
    """Draw 1, 2, ... with the given mean."""
    if mean == 1:
        return 1
    return 1 + math.floor(math.log1p(-rng.random()) / math.log1p(-1 / mean))


def _check(stall_share: float, grant_packets: float, **above_zero: float) -> None:
    for name, value in above_zero.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is above 0, not {value}")
    if not 0 <= stall_share < 1:
        raise ValueError(f"stall_share is at least 0 and below 1, not {stall_share}")
    if not 1 <= grant_packets < math.inf:
        raise ValueError(f"grant_packets is 1 or more, not {grant_packets}")
