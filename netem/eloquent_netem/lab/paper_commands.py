"""The subcommand `eloquent lab paper`."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from eloquent.errors import ConfigurationError

EXIT_STALE = 1


def paper(
    *,
    seeds: int = 20,
    tun_seeds: int = 10,
    part: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    check: bool = False,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("docs/results.md"),
    traces: Path = Path("../shared/traces"),
    cache: Path = Path("build/paper.jsonl"),
    workers: int | None = None,
) -> None:
    """Run the paper's comparison, and that with the kernel's TCP; write the page of results.

    In virtual time (some minutes) over 18 networks and the recordings, then over TUN the same
    networks with real sockets (about an hour; needs Linux, and root or user namespaces). Ctrl-C
    keeps what is done, and a finished run is not made again while the code is the same.

    Parameters
    ----------
    seeds
        How many seeds in virtual time, from 0 on.
    tun_seeds
        How many over TUN.
    part
        sim (in virtual time), traces (the recordings, in virtual time), tun (against the kernel's
        TCP), recorded (the recordings against it); by default all. A part that cannot be made, or
        is not wanted, stays as it was on the page, marked with its date and commit.
    check
        Run nothing: say which parts of the page are older than the code that they depend on. The
        exit code is 1 if there is one.
    output
        The page; its figures go to the folder `figures` beside it.
    traces
        The folder with recordings in mahimahi's format; where there are none, that part stays.
    cache
        The file that remembers runs.
    workers
        Runs at once; by default one for each processor in virtual time, and over TUN as many as
        the driver bears.
    """
    from eloquent_netem.lab.paper import Options, runnable_parts
    from eloquent_netem.lab.paper import check as stale_parts
    from eloquent_netem.lab.paper import paper as run
    from eloquent_netem.lab.report_style import check_can_draw
    from eloquent_netem.lab.stalls_commands import check_writable, make_folder

    if check:
        lines = stale_parts(output)
        for line in lines:
            print(line)  # noqa: T201
        if lines:
            print("Run `make paper` to make the page anew.")  # noqa: T201
            sys.exit(EXIT_STALE)
        print(f"{output} is up to date.")  # noqa: T201
        return
    if seeds < 1 or tun_seeds < 1 or (workers is not None and workers < 1):
        raise ConfigurationError("--seeds, --tun-seeds and --workers must be at least 1.")
    check_can_draw()
    for file in (output, cache):
        make_folder(file.parent)
        check_writable(file)
    options = Options(
        seeds={"sim": seeds, "tun": tun_seeds},
        output=output,
        cache=cache,
        workers=workers,
    )
    sys.exit(run(runnable_parts(traces, part), options))
