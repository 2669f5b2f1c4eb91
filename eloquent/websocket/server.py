"""The server's WebSocket endpoint: one TCP port, many connections, each with its readers."""

import asyncio
import logging
import ssl
from functools import partial
from typing import Any, cast

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from eloquent.addresses import MAX_PER_ADDRESS, Sites
from eloquent.core.channel import MAX_TO_SERVER_BYTES
from eloquent.core.channel_server import ServerChannel
from eloquent.core.counts import LinkCounts
from eloquent.core.liveness import DEAD_AFTER_S
from eloquent.core.turns import TurnEvent
from eloquent.errors import ConfigurationError
from eloquent.handshakes import HANDSHAKE_S, Handshakes
from eloquent.quic.certificate import ServerCertificate
from eloquent.readers import Readers
from eloquent.seldom import Seldom
from eloquent.serving import TurnService
from eloquent.websocket.driver import (
    CLOSE_TIMEOUT_S,
    OPTIONS,
    SUBPROTOCOL,
    ChannelDriver,
    HeardConnection,
)

SILENT_S = 60.0
"A client that says nothing for so long is gone: it sends a beat every 20 s at least."

MAX_CONNECTIONS = 10_000
MAX_HANDSHAKES = 100
"""Each has buffers of 400 KB, which are Python's and OpenSSL's."""
BUSY = 503

EVERY_HOST = ["::", "0.0.0.0"]  # noqa: S104 (it is what was asked for)
"asyncio would take `::` for IPv6 alone; on UDP it is both."

logger = logging.getLogger(__name__)


class _HeardServer(HeardConnection, ServerConnection):
    """A server's WebSocket, over TLS that it begins itself: so few are begun at a time."""

    def __init__(
        self,
        listener: "WebSocketListener",
        *given: Any,
        **options: Any,
    ) -> None:
        super().__init__(*given, **options)
        self._listener = listener
        self._below: asyncio.Transport | None = None
        "TCP, while TLS is being made."
        self._early = bytearray()
        "What came with the end of TLS's handshake."
        self._securing: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`: there is TCP."""
        self._below = cast(asyncio.Transport, transport)
        host = (transport.get_extra_info("peername") or ("",))[0]
        if self._listener.begin(self, host):
            self._securing = asyncio.ensure_future(self._secure(self._below))
        else:
            self._below.abort()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._below is None:
            super().data_received(data)
        else:
            self._early += data

    def eof_received(self) -> None:
        """See `asyncio.Protocol`."""
        if self._below is None:
            super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._listener.end(self)
        if self._below is None:
            super().connection_lost(exc)

    def give_up(self) -> None:
        """End the connection before it is made."""
        transport = self.transport if self._below is None else self._below
        transport.abort()

    async def _secure(self, below: asyncio.Transport) -> None:
        try:
            secured = await self.loop.start_tls(
                below,
                self,
                self._listener.tls,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=CLOSE_TIMEOUT_S,
            )
        except OSError as error:  # TLS's errors and timeouts are such, too
            logger.debug("no TLS: %s", error)
            secured = None
        if secured is None or secured.is_closing():
            self._listener.end(self)
            return
        self._below = None
        super().connection_made(secured)
        if self._early:
            super().data_received(bytes(self._early))
            self._early.clear()


class _Peer:
    """One connection, its channel, and the readers on it."""

    def __init__(
        self,
        service: TurnService,
        websocket: _HeardServer,
        counts: LinkCounts,
        *,
        padding: bool,
    ) -> None:
        channel = ServerChannel(websocket.loop.time(), padding=padding)
        channel.counts = counts
        self.driver = ChannelDriver(channel, websocket, self._on_event, silent_s=SILENT_S)
        self._websocket = websocket
        self._readers = Readers(service, channel, self.driver, self._is_silent)

    @property
    def idle(self) -> _HeardServer | None:
        """The connection, if nobody reads a turn on it."""
        return None if self._readers else self._websocket

    def end(self) -> None:
        """Take note that the connection is over: its readers are gone."""
        self._readers.end()

    def _on_event(self, event: TurnEvent) -> None:
        self._readers.on_event(event)

    def _is_silent(self) -> bool:
        """Return whether nothing has come for so long that the link is dead."""
        return self.driver.now() - self._websocket.heard_s >= DEAD_AFTER_S


class WebSocketListener:
    """Accepts connections on one TCP port and brings their readers to a service."""

    def __init__(self, service: TurnService, *, padding: bool) -> None:
        self._service = service
        self._padding = padding
        self._peers: dict[_Peer, None] = {}
        self._server: Server | None = None
        self._tls: ssl.SSLContext | None = None
        self._handshakes: Handshakes[_HeardServer] = Handshakes(MAX_HANDSHAKES, self._give_up)
        self._sites: Sites[_HeardServer] = Sites(MAX_PER_ADDRESS)
        self._seldom = Seldom(logger)
        self.counts = LinkCounts()

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        assert self._server is not None
        return int(next(iter(self._server.sockets)).getsockname()[1])

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._peers)

    async def open(self, host: str, port: int, certificate: ServerCertificate) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be had.
        """
        self.show(certificate)
        connection = partial(_HeardServer, self)
        self._server = await serve(
            self._handle,
            cast(str, EVERY_HOST) if host == "::" else host,  # asyncio takes several
            port,
            subprotocols=[SUBPROTOCOL],
            # Programs send no Origin; a web page, which does, has no business here.
            origins=[None],
            process_request=self._refuse_too_many,
            open_timeout=HANDSHAKE_S,
            max_size=MAX_TO_SERVER_BYTES,
            create_connection=cast(type[_HeardServer], connection),
            server_header=None,
            logger=logger,
            **OPTIONS,
        )

    def show(self, certificate: ServerCertificate) -> None:
        """Show another certificate to those who connect from now on.

        Raises:
            ssl.SSLError: it is not accepted; the one before is still shown.
        """
        self._tls = certificate.tls()

    @property
    def tls(self) -> ssl.SSLContext:
        """What those who connect now are shown."""
        assert self._tls is not None
        return self._tls

    def begin(self, connection: _HeardServer, host: str) -> bool:
        """Return whether there is room for a connection from an address, and count it."""
        if not self._sites.has_room(host):
            self._refuse(host)
            return False
        self._sites.begin(connection, host)
        self._handshakes.begin(connection, host)
        return True

    def end(self, connection: _HeardServer) -> None:
        """Take note that a connection is over; a second call does nothing."""
        self._handshakes.done(connection)
        self._sites.done(connection)

    async def close(self) -> None:
        """Tell all readers what there is to tell, close their connections, release the port."""
        if self._server is not None:
            self._server.close(close_connections=False)
            self._handshakes.close()
            await asyncio.gather(
                *(peer.driver.close("the server is shutting down") for peer in self._peers)
            )
            await self._server.wait_closed()

    async def _handle(self, websocket: ServerConnection) -> None:
        assert isinstance(websocket, _HeardServer)
        self._handshakes.done(websocket)
        peer = _Peer(self._service, websocket, self.counts, padding=self._padding)
        self._peers[peer] = None
        try:
            reason = await peer.driver.run()
            logger.debug("connection ended: %s", reason)
        finally:
            del self._peers[peer]
            peer.end()

    def _give_up(self, connection: _HeardServer) -> None:
        self.counts.given_up += 1
        connection.give_up()

    def _make_room(self) -> bool:
        """End the oldest idle connection of the address that has most of them; say if there was."""
        idle = self._sites.first_of_largest(
            each for peer in self._peers if (each := peer.idle) is not None
        )
        if idle is not None:
            self._give_up(idle)
        return idle is not None

    def _refuse(self, host: str) -> None:
        self.counts.refused += 1
        text = f"refused a connection of {host}: {len(self._sites)} are open"
        self._seldom.warn(asyncio.get_running_loop().time(), text)

    def _refuse_too_many(
        self, websocket: ServerConnection, request: HttpRequest
    ) -> Response | None:
        if len(self._peers) < MAX_CONNECTIONS or self._make_room():
            return None
        self._refuse((websocket.remote_address or ("",))[0])
        return websocket.respond(BUSY, "Too many connections are open: come back later.\n")


async def listen(
    host: str,
    port: int,
    *,
    certificate: ServerCertificate,
    service: TurnService,
    padding: bool = True,
) -> WebSocketListener:
    """Listen on a TCP address; `port` 0 takes a free one (`WebSocketListener.port` tells).

    `padding` hides the lengths of tokens from those who see the packets.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    listener = WebSocketListener(service, padding=padding)
    try:
        await listener.open(host, port, certificate)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"Cannot listen on {host}, TCP port {port}: {reason}. Choose another port with --port, "
            "or do without WebSocket (--no-websocket)."
        ) from error
    return listener
