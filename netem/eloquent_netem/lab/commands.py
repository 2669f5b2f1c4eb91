"""The subcommand `eloquent lab`."""

import json as json_format
import random
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from eloquent.core.schemes import SCHEMES, scheme
from eloquent.errors import ConfigurationError
from eloquent_netem.lab.leak_commands import leak, pace

lab = App(name="lab", help="Measure the transport on emulated networks.")
lab.command(leak)
lab.command(pace)


@lab.command
def stalls(
    *,
    rtt_ms: float | None = None,
    rate: float = 30.0,
    loss: float = 0.05,
    burst_ms: float | None = None,
    schemes: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    seeds: int = 10,
    tokens: int = 400,
    json: Path | None = None,
    markdown: Path | None = None,
) -> None:
    """Compare how long a reader waits under loss: every scheme, the same seeds, virtual time.

    Without `--rtt-ms` it prints the standard table: 100 ms with 5 % and 10 % loss and with 10 % in
    bursts, 300 ms with 10 %. Both real QUIC ends run; loss is in both directions.

    Parameters
    ----------
    rtt_ms
        Round-trip time in milliseconds.
    rate
        Tokens per second (with --rtt-ms).
    loss
        Mean share of packets lost each way, 0 to below 1 (with --rtt-ms).
    burst_ms
        Lose them in bursts of this mean length in milliseconds, which begin and end at the same
        instants for all schemes (with --rtt-ms).
    schemes
        Which schemes to run; by default all, the model of Linux's TCP (`tcp`), and the link's own
        bound (`oracle`).
    seeds
        How many seeds, from 0 on.
    tokens
        Tokens of each answer.
    json
        Also write every run to this file.
    markdown
        Also write the tables to this file, with how they were made.
    """
    from eloquent_netem.lab.answer import TCP_SCHEMES
    from eloquent_netem.lab.stalls import ORACLE, Cell
    from eloquent_netem.lab.table import STANDARD_CELLS, render, run_cells, to_json

    if not 0 <= loss < 1:
        raise ConfigurationError(f"--loss is a probability, 0 to below 1, not {loss}.")
    is_rtt_fine = rtt_ms is None or 0 <= rtt_ms < float("inf")
    if seeds < 1 or tokens < 1 or not 0 < rate < float("inf") or not is_rtt_fine:
        raise ConfigurationError(
            "--seeds and --tokens must be at least 1, --rate above 0 and --rtt-ms not negative."
        )
    for output in (json, markdown):
        if output is not None:
            _check_writable(output)
    if burst_ms is not None:
        _check_bursts(loss, burst_ms, is_one_cell=rtt_ms is not None)
    for name in schemes:
        if name not in (ORACLE, *TCP_SCHEMES):
            scheme(name)
    cells: tuple[Cell, ...] = STANDARD_CELLS
    if rtt_ms is not None:
        burst_s = None if burst_ms is None else burst_ms / 1000
        cells = (Cell(rtt_s=rtt_ms / 1000, tokens_per_s=rate, loss=loss, burst_s=burst_s),)
    runs = run_cells(
        cells,
        schemes=schemes or (*SCHEMES, "tcp", ORACLE),
        seeds=range(seeds),
        tokens=tokens,
        progress=sys.stderr,
    )
    text = render(runs)
    print(text)  # noqa: T201
    if json is not None:
        json.write_text(json_format.dumps(to_json(runs, sys.argv[1:]), indent=1) + "\n")
    if markdown is not None:
        markdown.write_text(_page(text))


@lab.command
def speed(*, json: Path | None = None) -> None:
    """Measure how fast the emulation runs, beside what it must reach (a few seconds).

    Virtual time with one QUIC connection in it, against CPU time and real time, and packets through
    DualPI2: the median of three runs each, and their range. The exit code is 1 where one misses its
    bound.

    Parameters
    ----------
    json
        Also write the figures to this file.
    """
    from eloquent_netem.lab.speed import measure, to_json

    if json is not None:
        _check_writable(json)
    speeds = measure()
    for figure in speeds:
        print(figure)  # noqa: T201
    if json is not None:
        json.write_text(json_format.dumps(to_json(speeds), indent=1) + "\n")
    if not all(figure.is_met for figure in speeds):
        sys.exit(1)


@lab.command
def transport(
    *,
    part: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    seeds: int = 20,
    schemes: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    jobs: int = 2,
    json: Path | None = None,
    markdown: Path | None = None,
    cache: Path | None = None,
    traces: Path = Path("../shared/traces"),
) -> None:
    """Hold the transport to its bounds in virtual time; exit with 1 if it misses one.

    Both real QUIC ends run over emulated links. Ctrl-C ends it and keeps what is done.

    Parameters
    ----------
    part
        The parts to run; by default all. `grid`: stalls, token delay and packets beside the other
        schemes, for every loss, round trip and rate. `traces`: the same over handovers and recorded
        cellular links. `wire`: bytes per token. `outages`: how soon after the link's return the
        reader is up to date. `fairness`: two token flows beside a bulk flow, and fifty on a thin
        link. `cancel`: how soon the server knows. `liveness`: how soon both sides know that the
        link is dead, and how often they are wrong.
    seeds
        How many seeds, from 0 on.
    schemes
        Run only these schemes; bounds that compare with another are left out.
    jobs
        Processes to run on.
    json
        Write all findings, and the figures of every run, to this file.
    markdown
        Write the findings and tables to this file.
    cache
        Remember the figures of every run in this file, and take from it those of runs on the same
        code (a hash of it).
    traces
        The folder with the recordings, in mahimahi's format; what is not there is skipped.
    """
    from eloquent_netem.lab.transport import Options, make_parts
    from eloquent_netem.lab.transport import transport as run

    parts = make_parts(traces)
    unknown = set(part) - set(parts)
    if unknown:
        raise ConfigurationError(
            f"There is no part {sorted(unknown)[0]!r}: choose from {', '.join(parts)}."
        )
    if seeds < 1 or jobs < 1:
        raise ConfigurationError("--seeds and --jobs must be at least 1.")
    for output in (json, markdown, cache):
        if output is not None:
            _check_writable(output)
    options = Options(
        seeds=range(seeds),
        workers=jobs,
        schemes=schemes,
        json=json,
        markdown=markdown,
        cache=cache,
    )
    sys.exit(run([parts[name] for name in part or parts], options))


def _check_writable(path: Path) -> None:
    """Find out before the work whether its results can be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigurationError(f"Cannot write {path}: {error.strerror}.") from error


def _check_bursts(loss: float, burst_ms: float, *, is_one_cell: bool) -> None:
    from eloquent_netem.loss import GilbertElliott

    if not is_one_cell:
        raise ConfigurationError(
            "--burst-ms changes no standard cell: give the network with --rtt-ms too."
        )
    try:
        GilbertElliott(loss=loss, burst_s=burst_ms / 1000, rng=random.Random(0))  # noqa: S311
    except ValueError as error:
        raise ConfigurationError(f"--loss {loss} with --burst-ms {burst_ms}: {error}.") from error


def _page(tables: str) -> str:
    command = " ".join(["eloquent", *sys.argv[1:]])
    return f"# Results\n\nMade by `{command}`; do not edit.\n\n{tables}\n"
