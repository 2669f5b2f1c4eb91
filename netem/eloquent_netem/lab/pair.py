"""Both real QUIC ends over two emulated links, in virtual time."""

import datetime
from collections.abc import Callable
from typing import Any

from eloquent.core.log import TokenLog
from eloquent.core.schemes import SenderFactory
from eloquent.core.sender import Sender
from eloquent.core.wire import TURN_ID_BYTES, Request
from eloquent.quic import ecn as quic_ecn
from eloquent.quic.certificate import make_certificate
from eloquent.quic.client import ClientConnection, client_configuration
from eloquent.quic.connection import Connection, ConnectionEvent
from eloquent.quic.marking import Marking
from eloquent.quic.server import ServerConnection, server_configuration
from eloquent_netem.link import Link
from eloquent_netem.packet import Ecn, udp_packet

CLIENT_ADDRESS = ("192.0.2.1", 1)
SERVER_ADDRESS = ("192.0.2.2", 2)
"Documentation addresses (RFC 5737): names for the two ends; nothing is sent to them."

_CERTIFICATE = make_certificate("lab", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))


class _End:
    """Drives one connection: what comes out of its link goes in, what it sends goes out."""

    def __init__(
        self,
        connection: Connection,
        peer_address: tuple[str, int],
        inbound: Link,
        outbound: Link,
        on_event: Callable[[ConnectionEvent, float], None],
        *,
        marking: Marking | None = None,
    ) -> None:
        self._connection = connection
        self._peer_address = peer_address
        self._inbound = inbound
        self._outbound = outbound
        self._on_event = on_event
        self._marking = marking
        self._timer: float | None = None
        "The connection's: it changes only when something happens to the connection."

    def next_time(self) -> float | None:
        arrival = self._inbound.next_time()
        if arrival is None or self._timer is None:
            return self._timer if arrival is None else arrival
        return min(arrival, self._timer)

    def act(self, now: float) -> None:
        packets = self._inbound.poll(now)
        for packet in packets:
            self._connection.receive(packet.data, self._peer_address, now, quic_ecn.Ecn(packet.ecn))
        timer = self._connection.next_time() if packets else self._timer
        if timer is not None and timer <= now:
            self._connection.handle_timer(now)
        elif not packets:
            return  # A packet went on within the link.
        while (event := self._connection.next_event()) is not None:
            self._on_event(event, now)
        self.flush(now)
        if packets and self._marking is not None:
            self._marking.settle(now)

    def flush(self, now: float) -> None:
        for payload, _, ecn in self._connection.send(now):
            self._outbound.send(now, udp_packet(payload, Ecn(ecn)))
        self.look()

    def look(self) -> None:
        """Take note of the connection's timer, after a call to it from outside."""
        self._timer = self._connection.next_time()


class QuicPair:
    """A client and a server that talk through `up` and `down`.

    Events go to the two callbacks with the time; after a call to one of the connections from
    outside, `flush` sends what it has to say. The parts in `actors` go to `simulate`.
    """

    def __init__(
        self,
        *,
        up: Link,
        down: Link,
        make_sender: SenderFactory,
        on_client_event: Callable[[ConnectionEvent, float], None],
        on_server_event: Callable[[ConnectionEvent, float], None],
        padding: bool = True,
        marking: Marking | None = None,
        has_datagrams: bool = True,
    ) -> None:
        """Without datagrams the turns run over one QUIC stream.

        `marking` marks the server's packets.
        """
        client = client_configuration("lab", pin=_CERTIFICATE.pin)
        server = server_configuration(_CERTIFICATE)
        if not has_datagrams:
            client.max_datagram_frame_size = server.max_datagram_frame_size = None
        self.client = ClientConnection(client, pin=_CERTIFICATE.pin)
        self._senders: list[Sender] = []

        def make(*arguments: Any) -> Sender:
            self._senders.append(make_sender(*arguments))
            return self._senders[-1]

        self.server = ServerConnection(
            server,
            make_sender=make,
            padding=padding,
            marking=None if marking is None else marking.policy(),
            original_destination_connection_id=(
                self.client.quic.original_destination_connection_id
            ),
        )
        self._client_end = _End(self.client, SERVER_ADDRESS, down, up, on_client_event)
        self._server_end = _End(
            self.server, CLIENT_ADDRESS, up, down, on_server_event, marking=marking
        )
        self.actors = (self._client_end, self._server_end)

    @property
    def bundles_sent(self) -> int:
        """How many bundles the server has sent, on all turns: a packet each."""
        return sum(sender.bundles_sent for sender in self._senders)

    def connect(self, now: float) -> None:
        """Begin the handshake."""
        self.client.connect(SERVER_ADDRESS, now)
        self._client_end.flush(now)

    def log_grew(self, turn: int, now: float) -> None:
        """Tell the server that the turn's log has more, and send it."""
        self.server.log_grew(turn, now)
        self._server_end.flush(now)

    def flush(self, now: float) -> None:
        """Send what either end has to say."""
        self._client_end.flush(now)
        self._server_end.flush(now)

    def request(self, body: bytes, now: float) -> int:
        """Open a turn with a fixed id; return its number."""
        turn = self.client.request(Request(bytes(TURN_ID_BYTES), body))
        self._client_end.flush(now)
        return turn

    def accept(self, turn: int, log: TokenLog) -> None:
        """Answer a turn with `log`."""
        self.server.accept(turn, log)
        self._server_end.look()
