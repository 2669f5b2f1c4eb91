"""The subcommand `eloquent proxy`."""

import asyncio
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from eloquent.errors import ConfigurationError
from eloquent.url import parse_url
from eloquent_client.proxy.handler import GRACE_S


def proxy(
    *,
    url: str | None = None,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    key_env: str | None = None,
    grace: float = GRACE_S,
    allow_remote: bool = False,
    qlog: Annotated[Path | None, Parameter(env_var="ELOQUENT_QLOG")] = None,
) -> None:
    """Let any program that speaks OpenAI's API ask over Eloquent.

    When it is ready it prints one line, `LISTENING http://HOST:PORT/v1`: give that to programs as
    OPENAI_BASE_URL. Their answers go on when the network changes or fails. Ctrl-C ends it.

    Args:
        url: The server, as `eloquent serve` prints it. Without it a server is started on this
            machine for as long as the proxy runs.
        model: Without a URL: the model to start (see `eloquent serve --help`). With one, programs
            say which model they want.
        host: Address to listen on, of this machine alone unless there is --allow-remote.
        port: TCP port; 0 takes a free one.
        key_env: Environment variable with the key for the server. Without it the keys that programs
            send (OPENAI_API_KEY) are passed on to it.
        grace: How long the network may be gone, in seconds, before programs are told that their
            answer is cut off.
        allow_remote: Take requests from other machines, without a key and not encrypted, in the
            name of whoever started the proxy.
        qlog: Directory for a log of each connection in qlog's format (`.sqlog`): packets, sizes,
            times, and no text.
    """
    if find_spec("uvicorn") is None:
        raise ConfigurationError(
            "The proxy needs uvicorn, which is not installed: run "
            "pip install 'eloquent-stream[proxy]'."
        )
    if url is not None and model is not None:
        raise ConfigurationError(
            "--model is for a server on this machine: with --url programs name their model."
        )
    if not 0 <= port < 1 << 16:
        raise ConfigurationError(f"--port {port} is no port: give 1 to 65535, or 0 for any.")
    if grace <= 0:
        raise ConfigurationError(f"--grace {grace:g} is no time: give seconds above 0.")
    from eloquent_client.proxy.serve import ProxyOptions, run_proxy

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    # What goes wrong on a connection is told to programs, in words of our own.
    logging.getLogger("quic").setLevel(logging.CRITICAL)
    asyncio.run(
        run_proxy(
            ProxyOptions(
                url=None if url is None else parse_url(url),
                model=model,
                host=host,
                port=port,
                key_env=key_env,
                grace_s=grace,
                allow_remote=allow_remote,
                qlog=qlog,
            )
        )
    )
