"""The client's endpoint: one UDP socket, one connection, any number of turns."""

import asyncio
from collections.abc import AsyncIterator
from typing import cast

from eloquent.core.events import End, Event
from eloquent.core.path import Path
from eloquent.core.receiver import ReceiverStats
from eloquent.core.wire import Request
from eloquent.errors import ConnectionFailedError, EloquentError
from eloquent.quic.client import ClientConnection, client_configuration
from eloquent.quic.connection import (
    Address,
    Connected,
    ConnectionEnded,
    ConnectionEvent,
    TurnFailed,
    TurnProgress,
)
from eloquent.quic.driver import Driver
from eloquent.quic.ecn import Ecn
from eloquent.url import ServerUrl

CONNECT_TIMEOUT_S = 5.0


class ClientTurn:
    """One turn as the client's application sees it: an asynchronous iterator of events."""

    def __init__(self, link: "ClientLink", number: int) -> None:
        self._link = link
        self._number = number
        self._queue: asyncio.Queue[Event | EloquentError | None] = asyncio.Queue()
        self._last_stats = ReceiverStats()
        self._is_over = False

    @property
    def stats(self) -> ReceiverStats:
        """Counters up to now, or as they were when the turn's last event came."""
        return self._link.stats(self._number) or self._last_stats

    @property
    def is_over(self) -> bool:
        """Whether the last event was given out, or the turn failed or was cancelled."""
        return self._is_over

    def cancel(self) -> None:
        """Give the turn up: the server stops generating, and whoever iterates comes to the end."""
        if self._is_over:
            return
        self._last_stats = self.stats
        self._is_over = True
        self._link.cancel(self._number)
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Give out the events, in order and once, up to and with `End`.

        Raises:
            RequestError: the server declined the request.
            ConnectionFailedError: the connection ended first.
            WireError: what arrived is no answer.
            IntegrityError: the answer is not what the server generated.
        """
        while not self._is_over:
            item = await self._queue.get()
            if item is None:
                return
            if isinstance(item, EloquentError):
                self._is_over = True
                raise item
            self._is_over = isinstance(item, End)
            yield item

    def put(self, item: Event | EloquentError) -> None:
        """Hand over what arrived."""
        self._last_stats = self.stats
        self._queue.put_nowait(item)


class ClientLink(asyncio.DatagramProtocol):
    """A connection to a server."""

    def __init__(self, url: ServerUrl) -> None:
        self._url = url
        self._transport: asyncio.DatagramTransport | None = None
        self._connection = ClientConnection(
            client_configuration(url.host, pin=url.pin), pin=url.pin
        )
        self._driver = Driver(self._connection, self._send, self._on_event)
        self._address: Address = None
        self._turns: dict[int, ClientTurn] = {}
        self._connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failure: EloquentError | None = None

    @property
    def path(self) -> Path:
        """Round-trip time and loss as measured here."""
        return self._connection.path

    @property
    def is_open(self) -> bool:
        """Whether turns can be asked."""
        return self._failure is None and self._connected.done()

    def ask(self, request: Request) -> ClientTurn:
        """Open a turn.

        Raises:
            ConnectionFailedError: the connection is over; or what `fail` was given.
        """
        if self._failure is not None:
            raise self._failure
        number = self._connection.request(request)
        turn = ClientTurn(self, number)
        self._turns[number] = turn
        self._driver.pump()
        return turn

    def cancel(self, number: int) -> None:
        """Give up the turn with this number."""
        if self._turns.pop(number, None) is not None:
            self._connection.cancel(number)
            self._driver.pump()

    def stats(self, number: int) -> ReceiverStats | None:
        """Return a turn's counters while the connection knows it."""
        return self._connection.stats(number)

    async def close(self) -> None:
        """Close the connection; turns that are open fail."""
        self._connection.close("the client is done")
        self._driver.pump()
        self.fail(ConnectionFailedError("The connection was closed on this side."))

    def fail(self, failure: EloquentError) -> None:
        """Give the connection up: turns that are open, and those asked later, fail with this."""
        if self._failure is not None:
            return
        self._failure = failure
        self._driver.stop()
        if self._transport is not None:
            self._transport.close()
        if not self._connected.done():
            self._connected.set_exception(failure)
            self._connected.exception()  # whoever awaits gets it; nobody may be waiting
        for turn in self._turns.values():
            turn.put(failure)
        self._turns.clear()

    async def open(self, address: Address, timeout_s: float) -> None:
        """Shake hands with the server at `address`.

        Raises:
            ConnectionFailedError: no server answers in time, or it is not the right one.
        """
        self._address = address
        self._connection.connect(address, self._driver.now())
        self._driver.pump()
        try:
            await asyncio.wait_for(asyncio.shield(self._connected), timeout_s)
        except TimeoutError:
            failure = ConnectionFailedError(
                f"No answer from {self._url.host}, UDP port {self._url.port}, within "
                f"{timeout_s:g} s: no server runs there, or a firewall blocks UDP. Check the URL."
            )
            self.fail(failure)
            raise failure from None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.DatagramProtocol`."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Address) -> None:
        """See `asyncio.DatagramProtocol`."""
        self._driver.receive(data, self._address)

    def error_received(self, exc: Exception) -> None:
        """See `asyncio.DatagramProtocol`; only a refusal while connecting is final."""
        if isinstance(exc, ConnectionRefusedError) and not self._connected.done():
            self.fail(
                ConnectionFailedError(
                    f"Nothing listens on {self._url.host}, UDP port {self._url.port}: start the "
                    "server (`eloquent serve`) or check the URL."
                )
            )

    def _send(self, data: bytes, address: Address, ecn: Ecn) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(data)

    def _on_event(self, event: ConnectionEvent) -> None:
        if isinstance(event, Connected):
            if not self._connected.done():
                self._connected.set_result(None)
        elif isinstance(event, TurnProgress):
            self._deliver(event)
        elif isinstance(event, TurnFailed):
            failed = self._turns.pop(event.turn, None)
            if failed is not None:
                failed.put(event.error)
        elif isinstance(event, ConnectionEnded):
            self.fail(ConnectionFailedError(self._why_ended(event)))

    def _why_ended(self, event: ConnectionEnded) -> str:
        if self._connected.done():
            return (
                f"The connection to {self._url.host} ended: {event.reason}. What has arrived is "
                "kept; ask again to go on."
            )
        return (
            f"The connection to {self._url.host}, UDP port {self._url.port}, could not be made: "
            f"{event.reason}. Use the URL as `eloquent serve` printed it last, with its pin "
            "(#sha256=...): the certificate is made anew at each start."
        )

    def _deliver(self, progress: TurnProgress) -> None:
        turn = self._turns.get(progress.turn)
        if turn is None:
            return
        for item in progress.events:
            turn.put(item)
            if isinstance(item, End):
                del self._turns[progress.turn]


async def connect(url: ServerUrl, *, timeout_s: float = CONNECT_TIMEOUT_S) -> ClientLink:
    """Connect to a server.

    Raises:
        ConnectionFailedError: the name is unknown, no server answers within `timeout_s` seconds,
            or it is not the one that the URL's pin names.
    """
    loop = asyncio.get_running_loop()
    try:
        transport, link = await loop.create_datagram_endpoint(
            lambda: ClientLink(url), remote_addr=(url.host, url.port)
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConnectionFailedError(
            f"Cannot reach {url.host}: {reason}. Check the name and the network."
        ) from error
    try:
        await link.open(transport.get_extra_info("peername"), timeout_s)
    except asyncio.CancelledError:
        await link.close()
        raise
    return link
