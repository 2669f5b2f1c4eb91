"""Does the lab tell the truth? The simulator beside the TUN router, the TCP model beside a kernel.

One run makes a table: what came through the kernel and the router, what the simulator, the model
or a formula says, by which rule the two agree, and whether they do. A run in which the router was
too late is refused and counted, never reported.
"""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from eloquent_netem.bench import dualpi2_packets_per_s
from eloquent_netem.errors import NetemError
from eloquent_netem.fidelity_ends import DATAGRAM_BYTES, TOKEN_BYTES, US_PER_S
from eloquent_netem.namespaces import CLIENT_ADDRESS, SERVER_ADDRESS, Side
from eloquent_netem.packet import udp_packet
from eloquent_netem.realtime import LATENESS_BOUND_S, DriverStats, LatenessError, OverloadError
from eloquent_netem.scenario import Scenario, load_scenario, parse_scenario
from eloquent_netem.tcp.tokens import START_S, send_tokens
from eloquent_netem.tun import TunNetwork, tun_network

AGREES, DIFFERS, REFUSED = "agrees", "differs", "refused"

UDP_SCENARIOS = ("lossy-5", "bursts-150ms", "wifi-far")
INTERVAL_S = 0.02
TCP_LOSSES = (0.01, 0.05)
RTT_S = 0.05
LATE_S = 0.1
"A token with a greater delay is late."

MSS_BYTES = 1448
"Ethernet's 1500 bytes without the headers of IPv4 and TCP and the timestamps option."
RENO_LOSS = 0.01
FLOOD_PACKETS_PER_S = 10_000
DUALPI2_PACKETS_PER_S = 200_000

AT_ONCE = 10
"Networks that run at the same time; each carries some hundred packets a second."
END_WITHIN_S = 600.0
"Ends a hang; decides nothing."
Z_95 = 1.96


class FidelityError(NetemError):
    """A program inside the namespaces failed, so there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How much each run sends."""

    datagrams: int = 750
    tokens: int = 2000
    greedy_s: float = 30.0
    flood_s: float = 5.0


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


def tcp_rows(loss: float, pairs: Sequence[Pair], refused: int) -> list[Row]:
    """Compare the kernel's mean token delay and share of late tokens with the model's."""
    delay = f"CUBIC, {loss:.0%} loss: mean token delay"
    late = f"CUBIC, {loss:.0%} loss: share over 100 ms"
    rules = "within 15%", "within 2 points"
    if not pairs:
        return [_refused(delay, "ms", rules[0], refused), _refused(late, "%", rules[1], refused)]
    tun_ms, model_ms = _mean_ms(pairs)
    shares = [_late_percent(pair.tun_s) for pair in pairs]
    share, model_share = fmean(shares), fmean(_late_percent(pair.model_s) for pair in pairs)
    return [
        _compared(
            delay,
            "ms",
            tun_ms,
            model_ms,
            rule=rules[0],
            agrees=abs(tun_ms - model_ms) <= 0.15 * model_ms,
            runs=_means_ms(pairs),
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


def dualpi2_row(packets_per_s: float) -> Row:
    """Compare DualPI2's speed with what the lab needs of it."""
    return Row(
        "DualPI2: packets per CPU-second",
        "1/s",
        packets_per_s,
        DUALPI2_PACKETS_PER_S,
        "at least",
        _verdict(packets_per_s >= DUALPI2_PACKETS_PER_S),
    )


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


# The runs.


def clocked_loss(loss: float) -> Scenario:
    """Return a path of `RTT_S` whose slots of 1 ms are bad with this probability, both ways."""
    way = f"{{ kind = 'bursts', loss = {loss}, burst_ms = 1 }}"
    return parse_scenario(
        f"up = {{ delay_ms = {500 * RTT_S}, loss = {way} }}\n"
        f"down = {{ delay_ms = {500 * RTT_S}, loss = {way} }}\n"
    )


def independent_loss(loss: float) -> Scenario:
    """Return a path of `RTT_S` that loses this share of the packets down, and nothing up."""
    return parse_scenario(
        f"up = {{ delay_ms = {500 * RTT_S} }}\n"
        f"down = {{ delay_ms = {500 * RTT_S}, "
        f"loss = {{ kind = 'independent', probability = {loss} }} }}\n"
    )


def run_ends(
    scenario: Scenario,
    seed: int,
    server: Sequence[str],
    client: Sequence[str],
    lateness_bound_s: float = LATENESS_BOUND_S,
) -> tuple[str, DriverStats]:
    """Run two programs of `fidelity_ends`; return what the client's printed.

    They start `START_S` after the scenario's clock, as in the simulator.

    Raises:
        NetemError: the run was refused, could not be made, or a program failed.
    """
    with contextlib.ExitStack() as stack:
        ends: list[subprocess.Popen[str]] = []
        stack.callback(_close_pipes, ends)
        links = partial(scenario.links, seed)
        with tun_network(links, lateness_bound_s=lateness_bound_s) as network:
            _start_end(network, "server", server, ends)
            _start_end(network, "client", client, ends)
            start_s = time.monotonic() + START_S
            network.start()
            for end in ends:
                assert end.stdin is not None
                end.stdin.write(f"{start_s}\n")
                end.stdin.flush()
            # The client's end ends the server's.
            said = _finish(ends[1])
            _finish(ends[0])
    return said, network.stats().driver


def udp_pair(
    scenario: Scenario, count: int, seed: int, lateness_bound_s: float = LATENESS_BOUND_S
) -> Pair:
    """Send datagrams down, through the router and in the simulator."""
    amount = (str(count), str(INTERVAL_S))
    said, _ = run_ends(
        scenario,
        seed,
        ("send_datagrams", CLIENT_ADDRESS, *amount),
        ("receive_datagrams", CLIENT_ADDRESS, *amount),
        lateness_bound_s,
    )
    return Pair(_seconds(said), simulated_udp(scenario, count, seed))


def simulated_udp(scenario: Scenario, count: int, seed: int) -> list[float]:
    """Return the delays of the datagrams that arrive in the simulator."""
    _, link = scenario.links(seed)
    delays: list[float] = []
    for index in range(count + 1):
        now = START_S + index * INTERVAL_S if index < count else math.inf
        while (due := link.next_time()) is not None and due <= now:
            delays += [due - packet.entered_s for packet in link.poll(due)]
        if index < count:
            link.send(now, udp_packet(bytes(DATAGRAM_BYTES)))
    return delays


def tcp_pair(
    scenario: Scenario, count: int, seed: int, lateness_bound_s: float = LATENESS_BOUND_S
) -> Pair:
    """Send tokens down, with the kernel's CUBIC through the router and with the model."""
    said, _ = run_ends(
        scenario,
        seed,
        ("serve_tokens", SERVER_ADDRESS, str(count), str(INTERVAL_S), "cubic"),
        ("read_tokens", SERVER_ADDRESS),
        lateness_bound_s,
    )
    up, down = scenario.links(seed)
    times = send_tokens(
        up=up, down=down, tokens=count, interval_s=INTERVAL_S, token_bytes=TOKEN_BYTES
    )
    model = [seen - made for made, seen in zip(times.generated_s, times.rendered_s, strict=True)]
    tun = _seconds(said)
    if len(tun) != count:
        raise FidelityError(
            f"Only {len(tun)} of {count} tokens came through TCP, so the connection broke and its "
            "delays mean nothing: run it again."
        )
    return Pair(tun, model)


def reno_bits_per_s(seconds: float, seed: int) -> float:
    """Return the goodput of one greedy Reno flow of the kernel's, through the router."""
    said, _ = run_ends(
        independent_loss(RENO_LOSS),
        seed,
        ("serve_greedy", SERVER_ADDRESS, "reno"),
        ("read_greedy", SERVER_ADDRESS, str(seconds)),
    )
    return 8 * float(json.loads(said))


def flood_stats(seconds: float) -> DriverStats:
    """Return how the router fared under `FLOOD_PACKETS_PER_S`."""
    server = ("flood", CLIENT_ADDRESS, str(seconds), str(FLOOD_PACKETS_PER_S))
    client = ("sink", CLIENT_ADDRESS, str(seconds))
    return run_ends(load_scenario("clean"), 1, server, client)[1]


def compare(seeds: int, lengths: Lengths, progress: Callable[[str], None]) -> list[Row]:
    """Make all runs, and return the table's rows.

    Raises:
        NetemError: the namespaces cannot be made, or a program inside them failed.
    """
    rows: list[Row] = []
    progress("DualPI2 and the router alone")
    rows.append(dualpi2_row(dualpi2_packets_per_s()))
    floods, _ = unrefused([partial(flood_stats, lengths.flood_s)])
    rows += lateness_rows(floods[0] if floods else None)
    for name in UDP_SCENARIOS:
        progress(f"UDP over {name}, {seeds} seeds")
        runs = [partial(udp_pair, load_scenario(name), lengths.datagrams, s) for s in _seeds(seeds)]
        pairs, refused = unrefused(runs)
        rows += udp_rows(name, pairs, lengths.datagrams, refused)
    progress(f"TCP, {seeds} seeds")
    for loss in TCP_LOSSES:
        runs = [partial(tcp_pair, clocked_loss(loss), lengths.tokens, s) for s in _seeds(seeds)]
        pairs, refused = unrefused(runs)
        rows += tcp_rows(loss, pairs, refused)
    progress(f"Reno, {seeds} seeds")
    rates, refused = unrefused(
        [partial(reno_bits_per_s, lengths.greedy_s, s) for s in _seeds(seeds)]
    )
    rows.append(reno_row(rates, refused))
    return rows


def _seeds(count: int) -> range:
    return range(1, count + 1)


def unrefused(runs: Sequence[Callable[[], Any]]) -> tuple[list[Any], int]:
    """Make runs, some at once; return what those found that can be trusted, and how many cannot."""

    def attempt(run: Callable[[], Any]) -> Any:
        try:
            return run()
        except (LatenessError, OverloadError):
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [result for result in pool.map(attempt, runs) if result is not None]
    return found, len(runs) - len(found)


def _start_end(
    network: TunNetwork, side: Side, role: Sequence[str], ends: "list[subprocess.Popen[str]]"
) -> None:
    """Start a program in a namespace, and wait until it is ready."""
    end = network.popen(
        side,
        [sys.executable, "-m", "eloquent_netem.fidelity_ends", *role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ends.append(end)
    assert end.stdout is not None
    if end.stdout.readline() != "ready\n":
        _finish(end)
        raise FidelityError(f"{role[0]} ended before it was ready: run it again.")


def _finish(end: "subprocess.Popen[str]") -> str:
    """Wait for a program's end; return what it printed."""
    try:
        said, complaint = end.communicate(timeout=END_WITHIN_S)
    except subprocess.TimeoutExpired as error:
        raise FidelityError(
            "A program in the namespaces did not end; is the machine too busy? Run it again."
        ) from error
    if end.returncode:
        reason = complaint.strip().splitlines()[-1:] or [f"exit code {end.returncode}"]
        raise FidelityError(
            f"A program in the namespaces failed ({reason[0]}), so there is nothing to compare: "
            "as root every congestion control of the kernel's may be used, else see "
            "net.ipv4.tcp_allowed_congestion_control."
        )
    return said


def _close_pipes(ends: "Sequence[subprocess.Popen[str]]") -> None:
    for end in ends:
        for pipe in (end.stdin, end.stdout, end.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _seconds(said: str) -> list[float]:
    return [delay_us / US_PER_S for delay_us in json.loads(said)]


# The report.


def fidelity(*, seeds: int, json_path: Path | None, lengths: Lengths | None = None) -> None:
    """Make all comparisons, print them as a table, and perhaps write them as JSON.

    Raises:
        NetemError: see `compare`; or the file cannot be written.
    """
    if seeds < 1:
        raise FidelityError(f"{seeds} seeds compare nothing: give --seeds 1 or more.")
    begun_s = time.monotonic()
    load_before = os.getloadavg()[0]
    chosen = lengths or Lengths()
    rows = compare(seeds, chosen, lambda text: _print(f"{text} ...", file=sys.stderr))
    meta = {
        "seeds": seeds,
        "lengths": asdict(chosen),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_before": round(load_before, 2),
        "took_s": round(time.monotonic() - begun_s, 1),
    }
    _print(markdown(rows))
    _print(
        f"\n{seeds} seeds; Linux {meta['kernel']}, Python {meta['python']}, {meta['cores']} cores, "
        f"load {meta['load_before']} before; took {meta['took_s']} s."
    )
    if json_path is not None:
        write_json(json_path, meta, rows)


def _print(text: str, file: TextIO | None = None) -> None:
    print(text, file=file, flush=True)


def write_json(path: Path, meta: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the comparisons: an object with `meta` and `rows`, whose keys are `Row`'s fields.

    Raises:
        FidelityError: the file cannot be written.
    """
    content = {"meta": meta, "rows": [asdict(row) for row in rows]}
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise FidelityError(
            f"{path} cannot be written ({error.strerror}); the figures are above: give another "
            "path for --json."
        ) from error


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
