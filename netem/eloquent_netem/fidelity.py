"""Does the lab tell the truth? The simulator beside the TUN router, the TCP model beside a kernel.

One run makes a table: what came through the kernel and the router, what the simulator, the model
or a formula says, by which rule the two agree, and whether they do. A run in which the router was
too late is refused and counted, never reported.
"""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from eloquent_netem.fidelity_rows import (
    Row,
    lateness_rows,
    markdown,
    reno_row,
    tcp_rows,
    udp_rows,
)
from eloquent_netem.fidelity_runs import FidelityError, Runs, clocked_loss, simulated_tcp
from eloquent_netem.realtime import LatenessError, OverloadError
from eloquent_netem.run import EXIT_SIGNAL, sigterm_as_exit
from eloquent_netem.scenario import load_scenario

UDP_SCENARIOS = ("lossy-5", "bursts-150ms", "wifi-far")
TCP_NETWORKS = {0.01: 1, 0.05: 8}
"""Loss, and how many networks TCP has there for each seed that was asked for. At 5% rare timeouts
in a row, of seconds each, make the standard deviation of a network's mean delay a third to a half
of that mean: of ten networks, two equal sides would often be more than 15% apart."""
MODEL_RUNS = 4
"Of the TCP model for each of the kernel's: they take a fraction of a second."

AT_ONCE = 20
"Networks that run at the same time; each carries some hundred packets a second."


@dataclass(frozen=True, slots=True)
class Lengths:
    """How much each run sends."""

    datagrams: int = 750
    tokens: int = 2000
    greedy_s: float = 30.0
    flood_s: float = 5.0


def compare(
    seeds: int, lengths: Lengths, progress: Callable[[str], None], runs: Runs
) -> Iterator[Row]:
    """Make all runs, and give the table's rows as they are done.

    Raises:
        NetemError: the namespaces cannot be made, or a program inside them failed.
    """
    all_seeds = range(1, seeds + 1)
    progress("The router alone")
    floods, _ = unrefused([partial(runs.flood_stats, lengths.flood_s)], runs)
    yield from lateness_rows(floods[0] if floods else None)
    for name in UDP_SCENARIOS:
        progress(f"UDP over {name}, {seeds} seeds")
        udp = partial(runs.udp_pair, load_scenario(name), lengths.datagrams)
        pairs, refused = unrefused([partial(udp, seed) for seed in all_seeds], runs)
        yield from udp_rows(name, pairs, lengths.datagrams, refused)
    for loss, times in TCP_NETWORKS.items():
        progress(f"TCP at {loss:.0%} loss, {times * seeds} seeds")
        scenario = clocked_loss(loss)
        tcp = partial(runs.tcp_delays, scenario, lengths.tokens)
        kernel_seeds = range(1, times * seeds + 1)
        kernel, refused = unrefused([partial(tcp, seed) for seed in kernel_seeds], runs)
        model_seeds = range(1, MODEL_RUNS * times * seeds + 1)
        model = [simulated_tcp(scenario, lengths.tokens, seed) for seed in model_seeds]
        yield from tcp_rows(loss, kernel, model, refused)
    progress(f"Reno, {seeds} seeds")
    reno = partial(runs.reno_bits_per_s, lengths.greedy_s)
    rates, refused = unrefused([partial(reno, seed) for seed in all_seeds], runs)
    yield reno_row(rates, refused)


def unrefused(calls: Sequence[Callable[[], Any]], runs: Runs) -> tuple[list[Any], int]:
    """Make runs, some at once; return what those found that can be trusted, and how many cannot.

    An exception, Ctrl-C included, stops the other runs; it passes when nothing is left of them.
    """

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (LatenessError, OverloadError):
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            found = [result for result in pool.map(attempt, calls) if result is not None]
        except BaseException:
            runs.stopped.set()
            raise
    return found, len(calls) - len(found)


def fidelity(*, seeds: int, json_path: Path | None, lengths: Lengths | None = None) -> int:
    """Make all comparisons, print them as a table, and perhaps write them as JSON.

    On Ctrl-C or SIGTERM it ends the runs, and prints and writes the rows that are done; `meta` in
    the JSON says so (`is_complete`). Returns the exit code: 0, or 128 plus the signal's number.

    Raises:
        NetemError: see `compare`; or the file cannot be written.
    """
    if seeds < 1:
        raise FidelityError(f"{seeds} seeds compare nothing: give --seeds 1 or more.")
    begun_s = time.monotonic()
    load_before = os.getloadavg()[0]
    chosen = lengths or Lengths()
    rows: list[Row] = []
    code: Any = 0
    try:
        with sigterm_as_exit():
            for row in compare(seeds, chosen, _progress, Runs()):
                rows.append(row)  # noqa: PERF402  (so that those before an exception stay)
    except KeyboardInterrupt:
        code = EXIT_SIGNAL + signal.SIGINT
    except SystemExit as end:
        code = end.code
    meta = {
        "is_complete": code == 0,
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
    if code:
        _print("Ended before its time: what is above is not the whole report.", file=sys.stderr)
    if json_path is not None:
        write_json(json_path, meta, rows)
    return int(code)


def _progress(text: str) -> None:
    _print(f"{text} ...", file=sys.stderr)


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
