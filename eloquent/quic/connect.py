"""The client's endpoint: one UDP socket, one QUIC connection."""

import asyncio

from eloquent.core.liveness import DEAD_AFTER_S
from eloquent.core.path import Path
from eloquent.core.receiver import Receiver
from eloquent.core.turns import TurnFailed, TurnProgress
from eloquent.core.wire import Request
from eloquent.errors import (
    ConnectionFailedError,
    EloquentError,
    ServerRefusedError,
    ServerStoppingError,
)
from eloquent.link import LinkUser, Rung
from eloquent.quic.client import ClientConnection, client_configuration
from eloquent.quic.connection import Address, Connected, ConnectionEnded, ConnectionEvent
from eloquent.quic.driver import Driver
from eloquent.quic.ecn import Ecn
from eloquent.quic.qlog import QlogDirectory
from eloquent.quic.tickets import Tickets
from eloquent.quic.udp import UdpTransport, open_udp
from eloquent.url import ServerUrl

CONNECT_TIMEOUT_S = 5.0


class QuicLink:
    """A `Link` over QUIC."""

    def __init__(
        self,
        url: ServerUrl,
        user: LinkUser,
        qlog: QlogDirectory | None = None,
        tickets: Tickets | None = None,
    ) -> None:
        self._url = url
        self._user = user
        self._transport: UdpTransport | None = None
        configuration = client_configuration(url.host, pin=url.pin)
        configuration.quic_logger = qlog
        self._connection = ClientConnection(configuration, pin=url.pin, tickets=tickets)
        self._driver = Driver(self._connection, self._send, self._on_event)
        self._address: Address = None
        self._connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard_s = self._driver.now()
        self._is_over = False

    @property
    def rung(self) -> Rung:
        """See `Link.rung`."""
        return Rung.STREAM if self._connection.uses_stream else Rung.DATAGRAMS

    @property
    def path(self) -> Path:
        """Round-trip time and loss as measured here."""
        return self._connection.path

    @property
    def srtt_s(self) -> float:
        """See `Link.srtt_s`."""
        return self._connection.path.srtt_s

    @property
    def heard_s(self) -> float:
        """See `Link.heard_s`."""
        return self._heard_s

    @property
    def answered_s(self) -> float:
        """See `Link.answered_s`."""
        return self._connection.answered_at

    def open_turn(self, request: Request, receiver: Receiver) -> int:
        """See `Link.open_turn`."""
        number = self._connection.request(request, receiver)
        self._driver.pump()
        return number

    def cancel_turn(self, turn: int) -> None:
        """See `Link.cancel_turn`."""
        self._connection.cancel(turn)
        self._driver.pump()

    def detach_turn(self, turn: int) -> None:
        """See `Link.detach_turn`."""
        self._connection.detach(turn)

    def pump(self) -> None:
        """See `Link.pump`."""
        if not self._is_over:
            self._driver.pump()

    def probe(self) -> None:
        """See `Link.probe`."""
        self._connection.probe()
        self._driver.pump()

    async def migrate(self) -> bool:
        """See `Link.migrate`; a new socket gets the machine's new address (RFC 9000 section 9)."""
        before = self._transport
        try:
            await open_udp(self, remote=(self._address[0], self._address[1]))
        except OSError:
            return False
        if before is not None:
            before.close()
        if self._is_over:
            self._end()
            return False
        self._connection.migrate(self._driver.now())
        self._driver.pump()
        return True

    async def close(self) -> None:
        """See `Link.close`."""
        self._connection.close("the client is done")
        self._driver.pump()
        self._end()

    def abandon(self) -> None:
        """End the connection without a word, as a machine does that loses power."""
        self._end()

    async def open(self, address: Address, timeout_s: float) -> None:
        """Shake hands with the server at `address`.

        Raises:
            ConnectionFailedError: no server answers in time, or it is not the right one.
        """
        self._address = address
        self._connection.connect(address, self._driver.now())
        if self._connection.can_request_early:
            self._user.on_early(self)
        self._driver.pump()
        try:
            await asyncio.wait_for(asyncio.shield(self._connected), timeout_s)
        except TimeoutError:
            self._end()
            raise ConnectionFailedError(
                f"No answer from {self._url.host}, UDP port {self._url.port}, within "
                f"{timeout_s:g} s: no server runs there, or a firewall blocks UDP. Check the URL."
            ) from None

    def connection_made(self, transport: UdpTransport) -> None:
        """See `UdpProtocol`."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Address, ecn: Ecn) -> None:
        """See `UdpProtocol`."""
        self._heard_s = self._driver.now()
        self._driver.receive(data, self._address, ecn)

    def error_received(self, exc: OSError) -> None:
        """See `UdpProtocol`; a refusal counts while connecting, and on a link that is silent.

        Anybody may send one. But machines limit how often they refuse, so that a link that goes on
        asking a server that is gone leaves none for the attempts to make another.
        """
        if not isinstance(exc, ConnectionRefusedError):
            return
        where = f"Nothing listens on {self._url.host}, UDP port {self._url.port}"
        if not self._connected.done():
            self._fail(
                ServerRefusedError(
                    f"{where}: start the server (`eloquent serve`) or check the URL."
                )
            )
        elif self._driver.now() - self._heard_s >= DEAD_AFTER_S:
            self._fail(ConnectionFailedError(f"{where}, any more: the server has stopped."))

    def _send(self, data: bytes, address: Address, ecn: Ecn) -> None:
        if self._transport is not None:
            self._transport.send(data, None, ecn)

    def _on_event(self, event: ConnectionEvent) -> None:
        if isinstance(event, Connected):
            if not self._connected.done():
                self._connected.set_result(None)
        elif isinstance(event, TurnProgress):
            self._user.on_progress(self, event.turn, event.events)
        elif isinstance(event, TurnFailed):
            self._user.on_turn_failed(self, event.turn, event.error)
        elif isinstance(event, ConnectionEnded):
            self._fail(self._why_ended(event))

    def _why_ended(self, event: ConnectionEnded) -> EloquentError:
        if self._connected.done():
            kind = ServerStoppingError if event.is_peers_end else ConnectionFailedError
            return kind(
                f"The connection to {self._url.host} ended: {event.reason}. What has arrived is "
                "kept; ask again to go on."
            )
        return ServerRefusedError(
            f"The connection to {self._url.host}, UDP port {self._url.port}, could not be made: "
            f"{event.reason}. Use the URL as `eloquent serve` printed it last, with its pin "
            "(#sha256=...): without --state the certificate is made anew at each start."
        )

    def _fail(self, error: EloquentError) -> None:
        if self._is_over:
            return
        self._end()
        if not self._connected.done():
            self._connected.set_exception(error)
            self._connected.exception()  # whoever awaits gets it; nobody may be waiting
        else:
            self._user.on_link_ended(self, error)

    def _end(self) -> None:
        self._is_over = True
        self._connection.give_up()
        self._driver.stop()
        if self._transport is not None:
            self._transport.close()


async def connect(
    url: ServerUrl,
    user: LinkUser,
    timeout_s: float = CONNECT_TIMEOUT_S,
    *,
    address: str | None = None,
    qlog: QlogDirectory | None = None,
    tickets: Tickets | None = None,
) -> QuicLink:
    """Connect to a server; the connection's log goes to `qlog`.

    `address` is the one of the host's addresses to take; None: any. With one of the `tickets`,
    resumes leave at once (0-RTT).

    Raises:
        ConnectionFailedError: the name is unknown, no server answers within `timeout_s` seconds,
            or it is not the one that the URL's pin names (`ServerRefusedError`).
    """
    link = QuicLink(url, user, qlog, tickets)
    try:
        transport = await open_udp(link, remote=(address or url.host, url.port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConnectionFailedError(
            f"Cannot reach {url.host}: {reason}. Check the name and the network."
        ) from error
    try:
        await link.open(transport.peer_address, timeout_s)
    except asyncio.CancelledError:
        await link.close()
        raise
    return link
