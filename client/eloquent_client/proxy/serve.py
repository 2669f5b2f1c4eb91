"""Running the proxy: a server's client, HTTP on a port of this machine, and one end for both."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from eloquent.addresses import is_loopback
from eloquent.errors import ConfigurationError
from eloquent.listening import listen_tcp
from eloquent.url import ServerUrl
from eloquent_client.client import Client, checked_key
from eloquent_client.errors import LocalServerError
from eloquent_client.local import local_client
from eloquent_client.proxy.app import ProxyApp
from eloquent_client.proxy.handler import Handler, client_options
from eloquent_client.proxy.link import LinkWatch

READY_PREFIX = "LISTENING"
"Starts the line on standard output that tells a parent process where to ask."

MAX_CONNECTIONS = 1000
"Of programs; more are turned away, each with a 503."

KEEP_ALIVE_S = 8
"""So long a connection may rest between requests. More than the 5 s after which httpx2 uses it no
more, so that a request does not cross its end."""

STOP_S = 1
"At the end programs have so long to take their last words."

Died = asyncio.Future[LocalServerError]
"Tells of the end of the server that the proxy started."


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyOptions:
    """What `eloquent proxy` was asked to do; see its help."""

    url: ServerUrl | None
    model: str | None
    host: str
    port: int
    key_env: str | None
    grace_s: float
    allow_remote: bool
    qlog: Path | None


async def run_proxy(options: ProxyOptions) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: the address cannot be had, or options do not go together.
        LocalServerError: there is no URL, and the server on this machine does not start, or ends.
    """
    if not options.allow_remote and not is_loopback(options.host):
        raise ConfigurationError(
            f"At {options.host} everybody on the network could ask in your name, since the proxy "
            "asks for no key and does not encrypt. Leave --host out, or say --allow-remote."
        )
    key = _key(options.key_env)
    listening = _listen(options.host, options.port)
    loop = asyncio.get_running_loop()
    link, died = LinkWatch(loop.time), loop.create_future()
    with contextlib.closing(listening):
        async with _client(options, link, died) as client:
            handler = Handler(client, link, key=key, grace_s=options.grace_s)
            app = ProxyApp(handler, is_local=not options.allow_remote)
            await _serve(app, listening, handler, died)


async def _serve(app: ProxyApp, listening: socket.socket, handler: Handler, died: Died) -> None:
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=STOP_S,
    )
    host, port = listening.getsockname()[:2]
    base = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def say() -> None:
        print(READY_PREFIX, base, flush=True)  # noqa: T201
        print(  # noqa: T201
            f"Programs for OpenAI's API use it with OPENAI_BASE_URL={base}; {base[:-3]}/health "
            "tells how the link is.",
            file=sys.stderr,
            flush=True,
        )

    server = _Server(config, on_ready=say)
    serving = asyncio.ensure_future(server.serve([listening]))
    stopping = asyncio.ensure_future(server.stopped.wait())
    try:
        await asyncio.wait((serving, stopping, died), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await handler.close()
        await serving
        if died.done():
            raise died.result()
    finally:
        stopping.cancel()


class _Server(uvicorn.Server):
    """Uvicorn, that tells when it is ready, and the loop at once when a signal has come.

    What it would do after the last answer, to raise the signal anew, is left out: the client is
    still to be closed.
    """

    def __init__(self, config: uvicorn.Config, *, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.stopped = asyncio.Event()
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        self._loop.call_soon_threadsafe(self.stopped.set)


@asynccontextmanager
async def _client(options: ProxyOptions, link: LinkWatch, died: Died) -> AsyncIterator[Client]:
    """Give a client of the server, or of one that runs on this machine as long."""
    made = {"qlog_dir": options.qlog, **client_options(link)}
    if options.url is None:
        try:
            async with local_client(
                options.model, on_progress=_print_progress, on_end=died.set_result, **made
            ) as client:
                yield client
        except LocalServerError as error:
            # What the server said has been printed as it said it.
            raise LocalServerError(error.message) from error
    else:
        async with Client(options.url, **made) as client:
            yield client


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigurationError(f"There is no key in the environment: {name} is not set.")
    return checked_key(key)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen_tcp(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"Cannot listen at {host} port {port} ({reason}): choose another port with "
            "--port, or 0 for any that is free."
        ) from error
