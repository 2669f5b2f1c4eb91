"""The subcommand `eloquent netem`."""

import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

from cyclopts import App, Parameter

from eloquent_netem.errors import NetemError
from eloquent_netem.realtime import LATENESS_BOUND_S
from eloquent_netem.scenario import Scenario, library_names, load_scenario

EXIT_ERROR = 1
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

P = ParamSpec("P")

netem = App(name="netem", help="Emulate networks: one scenario file, the same network every time.")


def plain_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command print netem's errors as one sentence and end with exit code 1.

    Where nobody reads its output any more, it ends without a word, as a shell reports that.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except NetemError as error:
            print(f"eloquent netem: {error}", file=sys.stderr)  # noqa: T201
            sys.exit(EXIT_ERROR)
        except BrokenPipeError:
            # Whoever read our output has seen enough, such as `head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_BROKEN_PIPE)

    return run


@netem.command(name="list")
@plain_errors
def list_() -> None:
    """List the scenarios that come with netem."""
    names = library_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {load_scenario(name).description}")  # noqa: T201


@netem.command
@plain_errors
def show(scenario: str) -> None:
    """Say what a scenario does, in words and figures.

    Parameters
    ----------
    scenario
        A name from `eloquent netem list`, or the path of a scenario file.
    """
    from eloquent_netem.scenario_words import describe

    print(describe(load(scenario)))  # noqa: T201


@netem.command
@plain_errors
def check(file: Path) -> None:
    """Check a scenario file; an error names the key and the reason.

    Parameters
    ----------
    file
        The path of the file.
    """
    found = load(file)
    print(f"{file}: a scenario of {found.length_s:g} s, without an error.")  # noqa: T201


@netem.command
@plain_errors
def digest(scenario: str, *, seed: int | None = None) -> None:
    """Print a hash of what becomes of a fixed load: the same seed, the same hash everywhere.

    The load is a packet of 100 bytes every 5 ms both ways, for the scenario's length.

    Parameters
    ----------
    scenario
        A name from `eloquent netem list`, or the path of a scenario file.
    seed
        The seed; the scenario's own by default.
    """
    from eloquent_netem.digest import digest as digest_of

    print(digest_of(load(scenario), seed))  # noqa: T201


@netem.command
@plain_errors
def run(
    scenario: str,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    server: str | None = None,
    seed: int | None = None,
    live: Annotated[bool, Parameter(negative="")] = False,
    pcap: Path | None = None,
    lateness_bound_ms: float = 1e3 * LATENESS_BOUND_S,
) -> None:
    """Run a command, or two, inside an emulated network (Linux; needs root or user namespaces).

    Everything crosses the network through the kernel: TCP, TLS, QUIC, ping. The addresses of the
    two ends are in the environment: NETEM_CLIENT and NETEM_SERVER. For example:
    `eloquent netem run train -- ping -c 5 192.0.2.2`.

    Parameters
    ----------
    scenario
        A name from `eloquent netem list`, or the path of a scenario file.
    command
        What to run on the client's side, after `--`; its exit code is that of this command.
    server
        What to run on the server's side meanwhile, as one string.
    seed
        The seed; the scenario's own by default.
    live
        Show rates, delays, losses and queues on the screen; what the commands print goes to a file.
    pcap
        Write the packets as they come out of the network to this file, for Wireshark or tcpdump.
    lateness_bound_ms
        Refuse the run if one packet in 100 comes out later than this.
    """
    from eloquent_netem.run import run_commands

    if not command:
        raise NetemError("There is no command to run: write it after --, such as -- ping 192.0.2.2")
    found = load(scenario)
    chosen = found.seed if seed is None else seed
    code = run_commands(
        found,
        chosen,
        command,
        server=server,
        report=sys.stderr,
        live=live,
        pcap=pcap,
        lateness_bound_s=lateness_bound_ms / 1e3,
    )
    sys.exit(code)


@netem.command
@plain_errors
def proxy(
    scenario: str,
    *,
    to: str,
    listen: str = "127.0.0.1:0",
    seed: int | None = None,
    live: Annotated[bool, Parameter(negative="")] = False,
    pcap: Path | None = None,
    lateness_bound_ms: float = 1e3 * LATENESS_BOUND_S,
) -> None:
    """Forward UDP to a server through an emulated network; needs no privileges.

    It prints `LISTENING HOST:PORT` and runs until Ctrl-C.

    Parameters
    ----------
    scenario
        A name from `eloquent netem list`, or the path of a scenario file.
    to
        The server, HOST:PORT.
    listen
        Where to listen, HOST:PORT; port 0 takes a free one.
    seed
        The seed; the scenario's own by default.
    live
        Show rates, delays, losses and queues on the screen.
    pcap
        Write what comes out of the network to this file, for Wireshark or tcpdump; the IP and UDP
        headers are made up.
    lateness_bound_ms
        Refuse the run if one packet in 100 comes out later than this.
    """
    from eloquent_netem.run import run_proxy

    found = load(scenario)
    chosen = found.seed if seed is None else seed
    run_proxy(
        found,
        chosen,
        listen=listen,
        target=to,
        report=sys.stderr,
        live=live,
        pcap=pcap,
        lateness_bound_s=lateness_bound_ms / 1e3,
    )


def load(name_or_path: str | Path) -> Scenario:
    """Return a scenario; print what one should know of it on the standard error."""
    from eloquent_netem.loss import PacketClockedLossWarning

    scenario = load_scenario(name_or_path)
    for warning in scenario.warnings():
        print(f"eloquent netem: {warning}", file=sys.stderr)  # noqa: T201
    warnings.simplefilter("ignore", PacketClockedLossWarning)  # said above, in the user's words
    return scenario


@netem.command(name="fidelity")
@plain_errors
def fidelity_(*, json: Path | None = None, seeds: int = 5) -> None:
    """Hold the simulator and the TCP model to the kernel, and print how well they agree.

    It takes about five minutes, needs what `run` needs, and ends with exit code 0 also where a
    row differs: it is a report. Ctrl-C ends it, and what is done by then is printed and written.

    Parameters
    ----------
    json
        Write the figures to this file, too.
    seeds
        How many networks each comparison is made over; eight times as many where 5% are lost from
        TCP, whose rare timeouts in a row need them.
    """
    from eloquent_netem.fidelity import fidelity

    sys.exit(fidelity(seeds=seeds, json_path=json))
