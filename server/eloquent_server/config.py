"""Where options come from: the command line, else the environment, else a file, else the default.

Names are those of the command line: `--kv-memory` is `ELOQUENT_SERVE_KV_MEMORY` in the environment,
and `kv-memory` in the file. A name that is none is an error everywhere, since whoever misspells
`keys` would else run a server that is open to all.
"""

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict, Env

from eloquent.errors import ConfigurationError

PREFIX = "ELOQUENT_"
FILE_OPTION = "--config"
PRINT_OPTION = "--print-config"
SOURCES = {"cli": "command line", "env": "environment"}
"What cyclopts calls them, in words; files go by their path."

NEGATED = "What `--no-NAME` does on the command line is NAME with the value `false` elsewhere."

SECRET_IN_URL = re.compile(r"(?<=://)\S*@|(?<=[?&]password=)[^&\s]*")
"User and password, also ones that are not escaped as they should be."


def sources() -> tuple[Any, ...]:
    """Return what an `App` takes as `config`: whoever comes first in it decides."""
    return (Env(PREFIX, show=False), _refuse_unknown_variables, _read_file, _print_if_asked)


def _refuse_unknown_variables(
    app: App, commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    """Raise `ConfigurationError` for a variable that looks like ours and names no option."""
    prefix = PREFIX + "".join(f"{command.upper()}_" for command in commands)
    known = {
        prefix + name.removeprefix("--").replace("-", "_").upper()
        for argument in arguments
        for name in argument.names
        if name not in argument.negatives
    }
    for variable in os.environ:
        if variable.startswith(prefix) and variable not in known:
            raise ConfigurationError(
                f"The environment has {variable}, and `eloquent {' '.join(commands)}` has no such "
                f"option: correct the name, or unset it. `--help` lists the options. {NEGATED}"
            )


def _read_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take from the file that --config names what is not set yet."""
    chosen = [
        token.value for each in arguments for token in each.tokens if FILE_OPTION in each.names
    ]
    if not chosen:
        return
    path = Path(chosen[-1])
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"The options in {path} cannot be read: {error}. Give a TOML file with {FILE_OPTION}; "
            'its lines are like `host = "0.0.0.0"`.'
        ) from error
    if FILE_OPTION.removeprefix("--") in found:
        raise ConfigurationError(f"{path} names another file of options: put them into one.")
    negatives = {name for argument in arguments for name in argument.negatives}
    for name in found:
        if "--" + name.replace("_", "-") in negatives:
            raise ConfigurationError(f"{path} has {name}, which is no option there. {NEGATED}")
    # At the top of a file cyclopts passes over what is the name of a command: `keys` is one.
    for command in reversed(commands):
        found = {command: found}
    Dict(found, source=str(path))(app, commands, arguments)


def _print_if_asked(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """With --print-config, say what is set and where, without secrets, and end."""
    is_set = [each for each in arguments if each.tokens]
    if not any(PRINT_OPTION in each.names for each in is_set):
        return
    for argument in is_set:
        if PRINT_OPTION not in argument.names:
            values = (token.value or str(token.implicit_value) for token in argument.tokens)
            shown = SECRET_IN_URL.sub("", " ".join(values))
            source = SOURCES.get(argument.tokens[0].source, argument.tokens[0].source)
            print(f"{argument.name}\t{shown}\t{source}")  # noqa: T201
    sys.exit()
