"""The client's WebSocket endpoint: one TCP connection."""

import asyncio
import hashlib
import ipaddress
import ssl

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import InvalidHandshake

from eloquent.core.channel import MAX_TO_CLIENT_BYTES
from eloquent.core.channel_client import ClientChannel
from eloquent.core.receiver import Receiver
from eloquent.core.turns import TurnEvent, TurnFailed, TurnProgress
from eloquent.core.wire import Request
from eloquent.errors import (
    ConnectionFailedError,
    EloquentError,
    ServerRefusedError,
    ServerStoppingError,
)
from eloquent.link import STAGGER_S, LinkUser, Rung
from eloquent.url import ServerUrl
from eloquent.websocket.driver import OPTIONS, SUBPROTOCOL, ChannelDriver, HeardConnection

SILENT_S = 1.0
"A server that was silent for so long is not waited for when the connection is closed."

GUESSED_RTT_S = 0.1
"Until one was measured."


class _HeardClient(HeardConnection, ClientConnection):
    """A client's WebSocket."""


class WebSocketLink:
    """A `Link` over a WebSocket."""

    def __init__(self, url: ServerUrl, user: LinkUser, websocket: _HeardClient) -> None:
        self._url = url
        self._user = user
        self._websocket = websocket
        self._channel = ClientChannel(websocket.loop.time())
        self._driver = ChannelDriver(self._channel, websocket, self._on_event)
        self._is_closing = False
        self.probe()
        self._running = asyncio.ensure_future(self._run())

    @property
    def rung(self) -> Rung:
        """See `Link.rung`."""
        return Rung.WEBSOCKET

    @property
    def srtt_s(self) -> float:
        """See `Link.srtt_s`; it is the last beat's, with whatever the beat had to wait for."""
        rtt_s = self._channel.rtt_s
        return GUESSED_RTT_S if rtt_s is None else rtt_s

    @property
    def heard_s(self) -> float:
        """See `Link.heard_s`."""
        return self._websocket.heard_s

    @property
    def answered_s(self) -> float:
        """See `Link.answered_s`; a server that TCP acknowledges nothing to soon sends no more."""
        return self._websocket.heard_s

    def open_turn(self, request: Request, receiver: Receiver) -> int:
        """See `Link.open_turn`."""
        number = self._channel.request(request, receiver)
        self._driver.pump()
        return number

    def cancel_turn(self, turn: int) -> None:
        """See `Link.cancel_turn`."""
        self._channel.cancel(turn)
        self._driver.pump()

    def detach_turn(self, turn: int) -> None:
        """See `Link.detach_turn`."""
        self._channel.detach(turn)

    def pump(self) -> None:
        """See `Link.pump`."""
        self._driver.pump()

    def probe(self) -> None:
        """See `Link.probe`."""
        self._channel.probe()
        self._driver.pump()

    async def migrate(self) -> bool:
        """See `Link.migrate`; TCP cannot."""
        return False

    async def close(self) -> None:
        """See `Link.close`."""
        self._is_closing = True
        if self._driver.now() - self.heard_s < SILENT_S:
            await self._driver.close()
        else:
            self._driver.abort()
        await asyncio.wait((self._running,))

    def _on_event(self, event: TurnEvent) -> None:
        if self._is_closing:
            return
        if isinstance(event, TurnProgress):
            self._user.on_progress(self, event.turn, event.events)
        elif isinstance(event, TurnFailed):
            self._user.on_turn_failed(self, event.turn, event.error)

    async def _run(self) -> None:
        reason = await self._driver.run()
        if not self._is_closing:
            self._is_closing = True
            kind = ServerStoppingError if self._driver.is_peers_end else ConnectionFailedError
            self._user.on_link_ended(
                self,
                kind(
                    f"The connection to {self._url.host} ended: {reason}. What has arrived is "
                    "kept; ask again to go on."
                ),
            )


async def connect(url: ServerUrl, user: LinkUser, timeout_s: float) -> WebSocketLink:
    """Connect to a server.

    Raises:
        ConnectionFailedError: the name is unknown, no server answers within `timeout_s` seconds,
            or it is not the one that the URL's pin names (`ServerRefusedError`).
    """
    host = f"[{url.host}]" if ":" in url.host else url.host
    where = f"{url.host}, TCP port {url.port}"
    try:
        websocket = await connect_websocket(
            f"wss://{host}:{url.port}/",
            host=url.host,  # named, so that no redirection leads elsewhere
            port=url.port,
            ssl=_tls_context(url.pin),
            server_hostname=url.host,
            happy_eyeballs_delay=_stagger_s(url.host),
            subprotocols=[SUBPROTOCOL],
            proxy=None,
            open_timeout=timeout_s,
            max_size=MAX_TO_CLIENT_BYTES,
            create_connection=_HeardClient,
            user_agent_header=None,
            **OPTIONS,
        )
    except (OSError, UnicodeError, ValueError, InvalidHandshake, EOFError) as error:
        raise _why_not(error, where, url.host, timeout_s) from error
    assert isinstance(websocket, _HeardClient)
    refusal = _refusal(websocket, url.pin, where)
    if refusal is not None:
        websocket.transport.abort()
        raise refusal
    return WebSocketLink(url, user, websocket)


def _stagger_s(host: str) -> float | None:
    """Return how long to wait between a name's addresses; None: it is an address.

    Then there is no race of addresses; one that is cancelled can lose a socket (Python 3.11).
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return STAGGER_S
    return None


def _tls_context(pin: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if pin is not None:  # `_refusal` looks at the certificate
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _refusal(websocket: _HeardClient, pin: str | None, where: str) -> EloquentError | None:
    """Return why this server is not to be used, or None."""
    tls = websocket.transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert(binary_form=True)
    if pin is not None and hashlib.sha256(certificate).hexdigest() != pin.lower():
        return ServerRefusedError(
            f"The server's certificate at {where}, is not the pinned one. Use the URL as `eloquent "
            "serve` printed it last: without --state the certificate is made anew at each start."
        )
    if websocket.subprotocol != SUBPROTOCOL:
        return ServerRefusedError(f"What answers at {where}, does not speak {SUBPROTOCOL}.")
    return None


def _why_not(error: Exception, where: str, host: str, timeout_s: float) -> EloquentError:
    if isinstance(error, TimeoutError):
        return ConnectionFailedError(
            f"No answer from {where}, within {timeout_s:g} s: no server runs there, or a firewall "
            "is in the way. Check the URL."
        )
    if isinstance(error, ConnectionRefusedError):
        return ServerRefusedError(
            f"Nothing listens on {where}: start the server (`eloquent serve`) or check the URL."
        )
    if isinstance(error, ssl.SSLError):
        return ServerRefusedError(
            f"No TLS with {where}: {error.reason or error}. Use the URL as `eloquent serve` "
            "printed it last, with its pin (#sha256=...)."
        )
    if isinstance(error, OSError):
        reason = error.strerror or error
        return ConnectionFailedError(
            f"Cannot reach {host}: {reason}. Check the name and the network."
        )
    return ServerRefusedError(f"What answers at {where}, is no Eloquent server: {error}.")
