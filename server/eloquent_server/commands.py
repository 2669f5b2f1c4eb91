"""The subcommands `eloquent serve` and `eloquent models`."""

import asyncio
import logging
import sys

from cyclopts import App

from eloquent_server import models as model_store
from eloquent_server.options import ServerOptions

models = App(name="models", help="List the models on this machine; fetch the embedded one.")

DEFAULTS = ServerOptions()


def serve(*, options: ServerOptions = DEFAULTS) -> None:
    """Answer chats over Eloquent with a local model.

    When it is ready it prints one line, `LISTENING URL`; give that URL to `eloquent chat --url`
    or `eloquent ask --url`. The URL pins the certificate, which is made anew at each start unless
    there is a --state directory.
    """
    from eloquent_server.serve import run_server

    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # aioquic logs every handshake, and as a warning whatever a peer does wrong; we say the latter.
    logging.getLogger("quic").setLevel(logging.ERROR)
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
