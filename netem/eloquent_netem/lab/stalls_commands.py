"""The subcommands `eloquent lab stalls` and `eloquent lab record`."""

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from eloquent.errors import ConfigurationError

if TYPE_CHECKING:
    from eloquent_netem.lab.rows import Place
    from eloquent_netem.lab.sources import LiveModel, Source
    from eloquent_netem.lab.stalls import Found

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

CACHE_MOST_BYTES = 100_000_000
"A cache of one's own that has grown larger starts anew."

FAILURES_SHOWN = 8

Names = Annotated[
    tuple[str, ...], Parameter(consume_multiple=True, negative=(), show_default=False)
]


def stalls(
    *,
    scenario: Names = (),
    schemes: Names = (),
    driver: str = "sim",
    seeds: int = 10,
    down_trace: Path | None = None,
    up_trace: Path | None = None,
    loss: float | None = None,
    burst_ms: float | None = None,
    rtt_ms: float | None = None,
    source: str = "constant",
    rate: float | None = None,
    tokens: int | None = None,
    prompt: str | None = None,
    model: str | None = None,
    json: Path | None = None,
    report: Path | None = None,
    congestion: str | None = None,
    workers: int | None = None,
    cache: Path | None = None,
) -> None:
    """Compare how long a reader waits on bad networks: every scheme, the same seeds.

    Without a network it prints the standard table: 100 ms with 5 % and 10 % loss and with 10 % in
    bursts of 150 ms, 300 ms with 10 % and 50 tokens a second. Ctrl-C ends it and keeps what is
    done. The exit code is 1 if a run lost, doubled or changed a byte, or could not be made, and 130
    after Ctrl-C.

    Parameters
    ----------
    scenario
        Networks: names (`eloquent netem list`) or paths of scenario files.
    schemes
        What to compare. With `sim`: eloquent, eloquent-queued, duplicate, retransmit, quic-stream
        (the answer on one QUIC stream), tcp and tcp-reno (a model of Linux's TCP), and oracle, the
        link's own bound, which no sender can beat. By default all but tcp-reno.
    driver
        `sim`: virtual time, any machine. `tun`: real sockets and kernel TCP through a router
        between network namespaces; needs Linux, and root or user namespaces. Its schemes are
        those of ours, tcp-sse and tcp-websocket.
    seeds
        How many seeds, from 0 on; each is a network of its own, the same for all schemes.
    down_trace
        A recording of a cellular downlink in mahimahi's format, as the network.
    up_trace
        The same for its uplink; without it that has 10 Mbit/s.
    loss
        Mean share of packets lost each way, 0 to below 1; with a scenario instead of its own.
        Alone it is a network with a round trip of 100 ms.
    burst_ms
        Lose them in bursts of this mean length, which are at the same instants for all schemes.
    rtt_ms
        Round trip without queues; with a scenario instead of its own. Alone it is a network with
        5 % loss.
    source
        Where tokens come from. `constant`: one of 10 characters every so often. `recorded`: the
        timings of a real generation, shipped with this; or the path of another recording. `live`:
        a model that answers anew for each run, with `tun` only.
    rate
        Tokens per second of the constant source; 30 if not given.
    tokens
        Tokens of each answer, for `live` at most; 400 if not given, or all that were recorded.
    prompt
        What the live model is asked.
    model
        The live model, as `eloquent serve --model` takes it.
    json
        Write every run to this file: {"meta": ..., "rows": [...]}.
    report
        Write a page with figures, and the figures, into this folder.
    congestion
        What the kernel's TCP uses, with `tun`: cubic if not given, or bbr where it has it.
    workers
        Processes to run on; by default one for each processor (`tun`: as many as it bears).
    cache
        Remember every run in this file, and take from it those that ran on the same code; by
        default stalls.jsonl in the user's cache folder.
    """
    from eloquent_netem.lab.places import NetworkOptions, make_places, standard_places
    from eloquent_netem.lab.report_page import PAGE
    from eloquent_netem.lab.report_style import check_can_draw
    from eloquent_netem.lab.sources import ConstantRate
    from eloquent_netem.lab.stalls import Plan, compare, default_schemes, find_driver

    if congestion is not None and driver != "tun":
        raise ConfigurationError(
            "--congestion is that of the kernel's TCP: add --driver tun. The model has CUBIC "
            "(scheme tcp) and Reno (tcp-reno)."
        )
    if seeds < 1 or (workers is not None and workers < 1):
        raise ConfigurationError("--seeds and --workers must be at least 1.")
    chosen = _source(source, rate=rate, tokens=tokens, prompt=prompt, model=model)
    network = NetworkOptions(
        scenarios=scenario,
        down_trace=down_trace,
        up_trace=up_trace,
        loss=loss,
        burst_ms=burst_ms,
        rtt_ms=rtt_ms,
    )
    pairs: Sequence[tuple[Place, Source]]
    if not network.is_empty:
        pairs = [(place, chosen) for place in make_places(network)]
    elif rate is None and isinstance(chosen, ConstantRate):
        pairs = [(place, replace(own, tokens=chosen.tokens)) for place, own in standard_places()]
    else:
        pairs = [(place, chosen) for place, _ in standard_places()]
    cache = user_cache() if cache is None else cache
    for output in (json, cache):
        if output is not None:
            check_writable(output)
    if report is not None:
        check_can_draw()
        make_folder(report)
        check_writable(report / PAGE)
    runner = find_driver(driver, **({} if congestion is None else {"congestion": congestion}))
    found = compare(
        Plan(
            pairs=pairs,
            driver=runner,
            schemes=schemes or default_schemes(runner, chosen),
            seeds=range(seeds),
            workers=workers,
            cache=cache,
        )
    )
    _show(found)
    _write(found, json=json, report=report)
    if not found.is_complete:
        _say("Ended before its time: the figures are of the runs that were done.")
        sys.exit(EXIT_INTERRUPTED)
    if found.failures:
        sys.exit(EXIT_FAILED)


def record(
    *,
    prompt: str | None = None,
    model: str | None = None,
    max_tokens: int = 400,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("recording.json"),
) -> None:
    """Record when a real model gives out each token of an answer, for `lab stalls --source FILE`.

    It starts the server on this machine, asks, shows the answer, and writes the file.

    Parameters
    ----------
    prompt
        What to ask.
    model
        The model, as `eloquent serve --model` takes it.
    max_tokens
        The longest answer.
    output
        The file to write.
    """
    from eloquent_netem.lab.record import record as listen

    if max_tokens < 1:
        raise ConfigurationError("--max-tokens must be at least 1.")
    check_writable(output)
    source = _live(prompt, model, max_tokens)
    answer = asyncio.run(listen(source, on_text=lambda text: print(text, end="", flush=True)))  # noqa: T201
    output.write_text(answer.dumps(), encoding="utf-8")
    _say(f"\n{len(answer.texts)} tokens, {answer.tokens_per_s:.1f} a second: {output}")


def user_cache() -> Path:
    """Return the file in the user's cache folder (XDG) that remembers runs; the folder is made.

    Raises:
        ConfigurationError: the folder cannot be made.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "eloquent" / "stalls.jsonl"
    make_folder(path.parent)
    if path.exists() and path.stat().st_size > CACHE_MOST_BYTES:
        path.unlink()
    return path


def check_writable(path: Path) -> None:
    """Find out before the work whether its results can be written; nothing is left of the try.

    Raises:
        ConfigurationError: they cannot.
    """
    try:
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.resolve().unlink()  # A link to it stays.
    except OSError as error:
        raise ConfigurationError(f"Cannot write {path}: {error.strerror}.") from error


def make_folder(path: Path) -> None:
    """Make a folder for results, and those above it.

    Raises:
        ConfigurationError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"Cannot write to {path}: {error.strerror}.") from error


def _source(
    name: str, *, rate: float | None, tokens: int | None, prompt: str | None, model: str | None
) -> "Source":
    from eloquent_netem.lab.sources import ConstantRate, Recording

    if tokens is not None and tokens < 1:
        raise ConfigurationError("--tokens must be at least 1.")
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigurationError(f"--rate is a number of tokens a second above 0, not {rate:g}.")
    if rate is not None and name != "constant":
        raise ConfigurationError(f"--rate is the constant source's: --source {name} has its own.")
    if name != "live" and (prompt is not None or model is not None):
        raise ConfigurationError("--prompt and --model are the live model's: add --source live.")
    if name == "constant":
        return ConstantRate(30.0 if rate is None else rate, 400 if tokens is None else tokens)
    if name == "live":
        return _live(prompt, model, 400 if tokens is None else tokens)
    recording = Recording(None if name == "recorded" else Path(name), tokens)
    try:
        _ = recording.content  # A file that is none is found out here.
    except ConfigurationError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise ConfigurationError(
            f"There is no source {name!r}: choose constant, recorded, live, or the path of a "
            "recording, as `eloquent lab record` makes them."
        ) from error
    return recording


def _live(prompt: str | None, model: str | None, max_tokens: int) -> "LiveModel":
    from eloquent_netem.lab.sources import DEFAULT_PROMPT, LiveModel

    return LiveModel(DEFAULT_PROMPT if prompt is None else prompt, model, max_tokens)


def _show(found: "Found") -> None:
    from rich.console import Console

    from eloquent_netem.lab.table import LEGEND, tables, terminal

    # A pipe or a file has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for sheet in tables(found.rows):
        console.print(terminal(sheet, console.width))
    if found.rows:
        console.print(LEGEND, style="dim")
    for failure in found.failures[:FAILURES_SHOWN]:
        _say(f"FAILED: {failure}")
    if len(found.failures) > FAILURES_SHOWN:
        _say(f"and {len(found.failures) - FAILURES_SHOWN} more runs failed")


def _write(found: "Found", *, json: Path | None, report: Path | None) -> None:
    from eloquent_netem.lab.stalls import dumps

    try:
        if json is not None:
            json.write_text(dumps(found), encoding="utf-8")
        if report is not None:
            from eloquent_netem.lab.report import Study, write_report

            study = Study(found.rows, found.arrivals, found.meta)
            _say(f"The report: {write_report(study, report)}")
    except OSError as error:
        raise ConfigurationError(
            f"The results could not be written: {error}. The runs are remembered: the same command "
            "with another --json or --report does not make them again."
        ) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
