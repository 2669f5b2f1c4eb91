"""The subcommand `eloquent lab`."""

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.demo_commands import demo
from eloquent_netem.lab.doctor_commands import doctor
from eloquent_netem.lab.leak_commands import leak, pace
from eloquent_netem.lab.paper_commands import paper
from eloquent_netem.lab.stalls_commands import check_writable, record, stalls
from eloquent_netem.lab.swiftqueue_commands import lab_swiftqueue

lab = App(name="lab", help="Measure the transport on emulated networks.")
lab.command(stalls)
lab.command(record)
lab.command(paper)
lab.command(doctor)
lab.command(demo)
lab.command(leak)
lab.command(pace)
lab.command(lab_swiftqueue, name="swiftqueue")


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
        check_writable(json)
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
        schemes, for every loss, round trip and rate, over handovers and recorded cellular links.
        `wire`: bytes per token. `outages`: how soon after the link's return the reader is up to
        date. `fairness`: two token flows beside a bulk flow, and fifty on a thin link. `cancel`:
        how soon the server knows. `liveness`: how soon both sides know that the link is dead, and
        how often they are wrong.
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
            check_writable(output)
    options = Options(
        seeds=range(seeds),
        workers=jobs,
        schemes=schemes,
        json=json,
        markdown=markdown,
        cache=cache,
    )
    sys.exit(run([parts[name] for name in part or parts], options))
