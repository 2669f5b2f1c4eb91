"""The HTTP front's listener: uvicorn on the server's event loop, beside QUIC."""

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, cast

import uvicorn

from eloquent.addresses import is_loopback
from eloquent.errors import ConfigurationError
from eloquent.listening import listen_tcp
from eloquent.quic.certificate import ServerCertificate
from eloquent_server.http.app import Behind, Front
from eloquent_server.http.connections import KEEP_ALIVE_S, Connection, Connections
from eloquent_server.http.guard import Guard

MAX_HEADER_BYTES = 1 << 15
STOP_S = 2
"How long `close` waits for responses to be sent."


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: the process has one owner of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpListener:
    """Answers HTTP at one address."""

    def __init__(
        self, front: Front, socket_: socket.socket, guard: Guard, all_: Connections
    ) -> None:
        """Use `listen`."""
        self._front = front
        self._socket = socket_
        self._guard = guard
        self._all = all_
        config = uvicorn.Config(
            self._guard,
            http=cast(Any, partial(Connection, self._all)),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_S,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        return int(self._socket.getsockname()[1])

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._all.open)

    @property
    def readers(self) -> int:
        """How many turns are being read."""
        return len(self._front.readers)

    @property
    def refused(self) -> Counter[str]:
        """How many connections were refused or given up, by reason."""
        return self._all.refused

    @property
    def statuses(self) -> Counter[int]:
        """How many responses had which status."""
        return self._guard.statuses

    def show(self, certificate: ServerCertificate) -> None:
        """Answer over TLS, with this certificate, those who connect from now on.

        Raises:
            ssl.SSLError: it is not accepted.
        """
        context = certificate.tls()
        # Most HTTP programs know TLS 1.3; some still do not.
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._all.tls = lambda: context

    def open(self) -> None:
        """Begin to answer."""
        self._serving = asyncio.ensure_future(self._server.serve([self._socket]))

    async def close(self) -> None:
        """Tell all readers that nothing more comes, end their connections, release the port."""
        self._front.readers.close()
        self._all.waiting.close()
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        for connection in list(self._all.open):
            connection.give_up()


async def listen(
    host: str,
    port: int,
    behind: Behind,
    *,
    certificate: ServerCertificate | None = None,
    names: Collection[str] = (),
    connections: Connections | None = None,
) -> HttpListener:
    """Listen on a TCP address; `port` 0 takes a free one (`HttpListener.port` tells).

    Without a certificate it is plain HTTP. `names` are hosts as which it is known where something
    in front of it, such as a reverse proxy, passes its own name on.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    try:
        socket_ = listen_tcp(host, port)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"Cannot listen on {host}, TCP port {port}: {reason}. Choose another address with "
            "--http HOST:PORT."
        ) from error
    front = Front(behind)
    guard = Guard(front.app(), is_local=is_loopback(socket_.getsockname()[0]), names=names)
    listener = HttpListener(front, socket_, guard, connections or Connections())
    if certificate is not None:
        listener.show(certificate)
    listener.open()
    return listener
