"""The command `eloquent`; its subcommands are found as entry points, not imported here.

What takes time to import is imported within `main`, so that Ctrl-C is quiet from the first moment.
"""

import sys
from typing import TYPE_CHECKING

from eloquent import __version__
from eloquent.errors import EloquentError

if TYPE_CHECKING:
    from cyclopts import App

COMMANDS_GROUP = "eloquent.commands"

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def make_app() -> "App":
    """Return the command line with every installed subcommand."""
    from importlib.metadata import entry_points

    from cyclopts import App

    app = App(
        name="eloquent",
        help="LLM chat that does not stall on bad networks.",
        version=__version__,
        result_action="return_value",
    )
    for command in sorted(entry_points(group=COMMANDS_GROUP), key=lambda entry: entry.name):
        app.command(command.load(), name=command.name)
    return app


def main() -> None:
    """Run the command line; errors that are meant for the user print as one plain message."""
    try:
        make_app()()
    except EloquentError as error:
        print(f"eloquent: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
