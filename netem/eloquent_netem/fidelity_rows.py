"""What a fidelity report's rows are: the rules by which two sides agree, and the table's layout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from eloquent_netem.fidelity_ends import US_PER_S
from eloquent_netem.realtime import LATENESS_BOUND_S, DriverStats

AGREES, DIFFERS, REFUSED = "agrees", "differs", "refused"

RTT_S = 0.05
LATE_S = 0.1
"A token with a greater delay is late."
MSS_BYTES = 1448
"Ethernet's 1500 bytes without the headers of IPv4 and TCP and the timestamps option."
RENO_LOSS = 0.01
FLOOD_PACKETS_PER_S = 10_000
Z_95 = 1.96


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison."""

    name: str
    unit: str
    measured: float | None
    "Through the kernel and the router; None if all its runs were refused."
    reference: float | None
    "What the simulator, the TCP model or the formula says, or the bound."
    rule: str
    verdict: str
    spread: tuple[float, float] | None = None
    "The least and the greatest of the runs' own figures: one seed is one network."
    runs: int = 1
    refused: int = 0
    "Runs left out, because the router was too late or lost packets."


@dataclass(frozen=True, slots=True)
class Pair:
    """The delays that one seed gave through the TUN router and in the simulator, in seconds."""

    tun_s: Sequence[float]
    model_s: Sequence[float]


# The rules.


def wilson_interval(lost: int, sent: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson, 1927), as though each packet had its own luck.

    In bursts the truth is wider, so this is the stricter rule.
    """
    share, z2 = lost / sent, Z_95**2
    middle = (share + z2 / (2 * sent)) / (1 + z2 / sent)
    half = Z_95 / (1 + z2 / sent) * math.sqrt(share * (1 - share) / sent + z2 / (4 * sent**2))
    return middle - half, middle + half


def udp_rows(name: str, pairs: Sequence[Pair], sent: int, refused: int) -> list[Row]:
    """Compare mean delay and loss; `sent` is per seed."""
    delay, loss = f"UDP {name}: mean delay", f"UDP {name}: loss"
    rules = "within 10% + 1 ms", "within the 95% interval"
    if not pairs:
        return [_refused(delay, "ms", rules[0], refused), _refused(loss, "%", rules[1], refused)]
    tun_ms, model_ms = _mean_ms(pairs)
    losses = [100 * (1 - len(pair.tun_s) / sent) for pair in pairs]
    model_loss = 100 * fmean(1 - len(pair.model_s) / sent for pair in pairs)
    total = sent * len(pairs)
    interval = wilson_interval(total - sum(len(pair.tun_s) for pair in pairs), total)
    low, high = (100 * end for end in interval)
    return [
        _compared(
            delay,
            "ms",
            tun_ms,
            model_ms,
            rule=rules[0],
            agrees=abs(tun_ms - model_ms) <= 0.1 * model_ms + 1,
            runs=_means_ms(pairs),
            refused=refused,
        ),
        _compared(
            loss,
            "%",
            fmean(losses),
            model_loss,
            rule=f"{rules[1]}: {low:.2f} to {high:.2f}",
            agrees=low <= model_loss <= high,
            runs=losses,
            refused=refused,
        ),
    ]


def tcp_rows(
    loss: float,
    kernel_s: Sequence[Sequence[float]],
    model_s: Sequence[Sequence[float]],
    refused: int,
) -> list[Row]:
    """Compare the kernel's mean token delay and share of late tokens with the model's.

    Both sides are given as one sequence of delays in seconds for each run, all of one length.
    """
    delay = f"CUBIC, {loss:.0%} loss: mean token delay"
    late = f"CUBIC, {loss:.0%} loss: share over 100 ms"
    rules = "within 15%", "within 2 points"
    if not kernel_s:
        return [_refused(delay, "ms", rules[0], refused), _refused(late, "%", rules[1], refused)]
    means, model_means = ([1e3 * fmean(run) for run in runs] for runs in (kernel_s, model_s))
    mean, model_mean = fmean(means), fmean(model_means)
    shares = [_late_percent(run) for run in kernel_s]
    share, model_share = fmean(shares), fmean(_late_percent(run) for run in model_s)
    return [
        _compared(
            delay,
            "ms",
            mean,
            model_mean,
            rule=rules[0] + _difference_interval(means, model_means),
            agrees=abs(mean - model_mean) <= 0.15 * model_mean,
            runs=means,
            refused=refused,
        ),
        _compared(
            late,
            "%",
            share,
            model_share,
            rule=rules[1],
            agrees=abs(share - model_share) <= 2,
            runs=shares,
            refused=refused,
        ),
    ]


def _difference_interval(runs: Sequence[float], reference: Sequence[float]) -> str:
    """Say between what the difference of two means lies, in percent of the reference's."""
    if min(len(runs), len(reference)) < 2:
        return ""
    middle = fmean(runs) - fmean(reference)
    half = Z_95 * math.sqrt(variance(runs) / len(runs) + variance(reference) / len(reference))
    low, high = (100 * end / fmean(reference) for end in (middle - half, middle + half))
    return f"; 95% interval: {low:+.0f}% to {high:+.0f}%"


def mathis_bits_per_s(loss: float, rtt_s: float) -> float:
    """Return what Reno gets at a small independent loss (Mathis et al., 1997)."""
    return 8 * MSS_BYTES / rtt_s * math.sqrt(1.5 / loss)


def reno_row(bits_per_s: Sequence[float], refused: int) -> Row:
    """Compare Reno's goodput through the router with Mathis' formula."""
    name, rule = f"Reno, {RENO_LOSS:.0%} independent loss, against Mathis", "within 15%"
    if not bits_per_s:
        return _refused(name, "Mbit/s", rule, refused)
    rates = [rate / 1e6 for rate in bits_per_s]
    wanted = mathis_bits_per_s(RENO_LOSS, RTT_S) / 1e6
    return _compared(
        name,
        "Mbit/s",
        fmean(rates),
        wanted,
        rule=rule,
        agrees=abs(fmean(rates) - wanted) <= 0.15 * wanted,
        runs=rates,
        refused=refused,
    )


def lateness_rows(stats: DriverStats | None) -> list[Row]:
    """Say how late the router was under its full load; None: the run was refused."""
    name = f"Router at {FLOOD_PACKETS_PER_S} packets/s"
    rule = f"p99 below {1e3 * LATENESS_BOUND_S:g} ms, or refused"
    bound_us = US_PER_S * LATENESS_BOUND_S
    if stats is None:
        return [_refused(f"{name}: lateness p99", "us", rule, 1)]
    policy = "SCHED_FIFO" if stats.is_real_time else "no SCHED_FIFO"
    late = stats.lateness
    return [
        Row(f"{name}, {policy}: lateness p50", "us", US_PER_S * late.p50_s, None, "", AGREES),
        Row(
            f"{name}, {policy}: lateness p99",
            "us",
            US_PER_S * late.p99_s,
            bound_us,
            rule,
            _verdict(late.p99_s <= LATENESS_BOUND_S),
        ),
    ]


def _verdict(is_so: bool) -> str:
    return AGREES if is_so else DIFFERS


def _refused(name: str, unit: str, rule: str, runs: int) -> Row:
    return Row(name, unit, None, None, rule, REFUSED, runs=0, refused=runs)


def _compared(
    name: str,
    unit: str,
    measured: float,
    reference: float,
    *,
    rule: str,
    agrees: bool,
    runs: Sequence[float],
    refused: int,
) -> Row:
    spread = min(runs), max(runs)
    return Row(name, unit, measured, reference, rule, _verdict(agrees), spread, len(runs), refused)


def _mean_ms(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Return the means over all that arrived, through the router and in the simulator."""
    tun = [delay for pair in pairs for delay in pair.tun_s]
    model = [delay for pair in pairs for delay in pair.model_s]
    return 1e3 * fmean(tun), 1e3 * fmean(model)


def _means_ms(pairs: Sequence[Pair]) -> list[float]:
    return [1e3 * fmean(pair.tun_s) for pair in pairs]


def _late_percent(delays_s: Sequence[float]) -> float:
    return 100 * fmean(delay > LATE_S for delay in delays_s)


# The layout.


def markdown(rows: Sequence[Row]) -> str:
    """Return the table."""
    head = ("", "measured", "runs from-to", "reference", "rule", "verdict")
    lines = [head, *((_cells(row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.spread is None else " to ".join(_figure(value) for value in row.spread)
    left_out = f", {row.refused} of {row.runs + row.refused} runs refused" if row.refused else ""
    return (
        f"{row.name} ({row.unit})",
        _figure(row.measured),
        spread,
        _figure(row.reference),
        row.rule,
        row.verdict + left_out,
    )


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
