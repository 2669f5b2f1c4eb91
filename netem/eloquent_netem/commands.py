"""The subcommand `eloquent netem`."""

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from cyclopts import App

from eloquent_netem.errors import NetemError
from eloquent_netem.scenario import Scenario, library_names, load_scenario

EXIT_ERROR = 1

P = ParamSpec("P")

netem = App(name="netem", help="Emulate networks: one scenario file, the same network every time.")


def plain_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command print netem's errors as one sentence and end with exit code 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except NetemError as error:
            print(f"eloquent netem: {error}", file=sys.stderr)  # noqa: T201
            sys.exit(EXIT_ERROR)

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


def load(name_or_path: str | Path) -> Scenario:
    """Return a scenario; print what one should know of it on the standard error."""
    from eloquent_netem.loss import PacketClockedLossWarning

    scenario = load_scenario(name_or_path)
    for warning in scenario.warnings():
        print(f"eloquent netem: {warning}", file=sys.stderr)  # noqa: T201
    warnings.simplefilter("ignore", PacketClockedLossWarning)  # said above, in the user's words
    return scenario
