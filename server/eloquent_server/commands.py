"""The subcommands `eloquent serve` and `eloquent models`."""

import asyncio
import sys

from cyclopts import App, Parameter

from eloquent_server import config, logs
from eloquent_server import models as model_store
from eloquent_server.options import ServerOptions

models = App(name="models", help="List the models on this machine; fetch the embedded one.")

serve = App(
    name="serve",
    help="""Answer chats over Eloquent.

When it is ready it prints one line, `LISTENING URL`; give that URL to `eloquent chat --url` or
`eloquent ask --url`. Each option can also be set in the environment, and in a file: see --config.
""",
    config=config.sources(),
    default_parameter=Parameter(negative_iterable=()),
)

DEFAULTS = ServerOptions()


@serve.default
def run(*, options: ServerOptions = DEFAULTS) -> None:
    """Run a server until it is told to stop."""
    from eloquent_server.serve import run_server

    logs.configure(options.log_level, options.log_format)
    asyncio.run(run_server(options))


@models.default
def list_models() -> None:
    """List the models on this machine."""
    for info in model_store.list_models():
        state = f"{info.bytes / 1e6:.0f} MB" if info.present else "not fetched"
        print(f"{info.name}\t{state}\t{info.path}")  # noqa: T201


@models.command
def fetch() -> None:
    """Fetch the embedded model and convert it, once."""
    source = model_store.fetch(progress=model_store.progress_printer(sys.stderr))
    print(source.path)  # noqa: T201
