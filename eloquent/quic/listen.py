"""The server's endpoint: one UDP socket, many connections, each with its readers."""

import asyncio
import errno
import logging
import os
import random

from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.packet import (
    QuicHeader,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from eloquent.addresses import MAX_PER_ADDRESS, Sites
from eloquent.core.beat import BeatLimit
from eloquent.core.counts import LinkCounts
from eloquent.core.path import Path
from eloquent.core.schemes import EloquentSender, SenderFactory
from eloquent.core.turns import TurnEvent
from eloquent.errors import ConfigurationError
from eloquent.handshakes import Handshakes
from eloquent.quic.certificate import ServerCertificate
from eloquent.quic.connection import Address, ConnectionEnded, ConnectionEvent, ConnectionIdChanged
from eloquent.quic.driver import Driver
from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import Marking, MarkingPolicy
from eloquent.quic.qlog import QlogDirectory
from eloquent.quic.reset import ResetKey, ResetLimit
from eloquent.quic.server import ServerConnection, server_configuration, show_certificate
from eloquent.quic.tickets import TicketBook
from eloquent.quic.udp import UdpTransport, open_udp
from eloquent.readers import Readers
from eloquent.seldom import Seldom
from eloquent.serving import TurnService

INITIAL_MIN_BYTES = 1200
"A client's first datagram is at least this large (RFC 9000 section 14.1)."

MAX_PORT = 65535
MAX_CONNECTIONS = 10_000
MAX_HANDSHAKES = 512
RETRY_FROM = 64
"""While so many connections are being made, a client first has to show that it is where it says it
is (RFC 9000 section 8.1.2), which costs it a round trip and the server nothing."""

logger = logging.getLogger(__name__)


class _Peer:
    """One connection, its driver, and the readers on it."""

    def __init__(
        self, listener: "Listener", connection: ServerConnection, policy: MarkingPolicy | None
    ) -> None:
        self.connection = connection
        self._policy = policy
        self.driver = Driver(connection, listener.send, self._on_event)
        self.connection_ids: set[bytes] = set()
        "Those that lead here."
        self._readers = Readers(
            listener.service,
            connection,
            self.driver,
            is_silent=lambda: connection.is_silent(self.driver.now()),
        )
        self._listener = listener

    def _on_event(self, event: ConnectionEvent) -> None:
        if isinstance(event, TurnEvent):
            self._readers.on_event(event)
        elif isinstance(event, ConnectionIdChanged):
            self._listener.route(event.connection_id, self, is_issued=event.is_issued)
        elif isinstance(event, ConnectionEnded):
            self.end()
            self._listener.forget(self, event)

    @property
    def is_idle(self) -> bool:
        """Whether the connection is made, and nobody reads a turn on it."""
        return not self._readers and not self.connection.is_handshaking

    def end(self) -> None:
        """Stop driving the connection; its readers are gone."""
        self.driver.stop()
        self._readers.end()
        if self._policy is not None:
            self._policy.close()


class Listener:
    """Accepts connections on one UDP socket and brings their readers to a service."""

    def __init__(
        self,
        certificate: ServerCertificate,
        service: TurnService,
        make_sender: SenderFactory,
        *,
        padding: bool,
        marking: Marking | None,
        qlog: QlogDirectory | None,
        skips: random.Random | None,
        tickets: TicketBook | None,
        datagrams: bool,
    ) -> None:
        self._configuration = server_configuration(certificate)
        if not datagrams:
            self._configuration.max_datagram_frame_size = None
        self._configuration.quic_logger = qlog
        self._skips = skips or random.SystemRandom()
        self._make_sender = make_sender
        self._padding = padding
        self._marking = marking
        self._is_settling = False
        self._reset_key = ResetKey.of(certificate.private_key)
        self._reset_limit = ResetLimit()
        self._tickets = tickets if tickets is not None else TicketBook()
        self._beats = BeatLimit()
        self._routes: dict[bytes, _Peer] = {}
        self._peers: dict[_Peer, None] = {}
        self._handshakes = Handshakes(MAX_HANDSHAKES, self._give_up)
        self._sites: Sites[_Peer] = Sites(MAX_PER_ADDRESS)
        self._seldom = Seldom(logger)
        self._retry = QuicRetryTokenHandler()
        self._transport: UdpTransport | None = None
        self.service = service
        self.counts = LinkCounts()

    @property
    def port(self) -> int:
        """The UDP port that it listens on."""
        assert self._transport is not None
        return int(self._transport.local_address[1])

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._peers)

    def paths(self) -> list[Path]:
        """Return what the connections that are made know of their paths."""
        return [peer.connection.path for peer in self._peers if not peer.connection.is_handshaking]

    def show(self, certificate: ServerCertificate) -> None:
        """Show another certificate to those who connect from now on."""
        show_certificate(self._configuration, certificate)

    @property
    def channels(self) -> int:
        """How many connections carry their turns over a QUIC stream."""
        return sum(peer.connection.has_channel for peer in self._peers)

    async def close(self) -> None:
        """Close all connections and release the socket."""
        for peer in list(self._peers):
            self._close(peer, "the server is shutting down")
        if self._transport is not None:
            self._transport.close()

    def send(self, data: bytes, address: Address, ecn: Ecn = Ecn.NOT_ECT) -> None:
        """Send a UDP datagram."""
        if self._transport is not None:
            self.counts.datagrams_out += 1
            self.counts.bytes_out += len(data)
            self._transport.send(data, address, ecn)

    def route(self, connection_id: bytes, peer: _Peer, *, is_issued: bool) -> None:
        """Bring datagrams with this connection id to `peer`, or not any more."""
        if is_issued:
            self._routes[connection_id] = peer
            peer.connection_ids.add(connection_id)
        elif connection_id in peer.connection_ids:
            del self._routes[connection_id]
            peer.connection_ids.remove(connection_id)

    def forget(self, peer: _Peer, event: ConnectionEnded) -> None:
        """Drop a connection that ended."""
        if event.by_peer_error:
            # Anybody may send what breaks a connection, so it must not fill the operator's log.
            logger.info("connection ended: %s", event.reason)
        self._drop(peer)

    def _close(self, peer: _Peer, reason: str) -> None:
        peer.connection.close(reason)
        peer.driver.pump()
        peer.end()
        self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self._handshakes.done(peer)
        self._sites.done(peer)
        self._peers.pop(peer, None)
        for connection_id in peer.connection_ids:
            del self._routes[connection_id]
        peer.connection_ids.clear()

    def _give_up(self, peer: _Peer) -> None:
        """Forget a connection that is not made in time; nobody is told."""
        self.counts.given_up += 1
        peer.end()
        self._drop(peer)

    def connection_made(self, transport: UdpTransport) -> None:
        """See `UdpProtocol`."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Address, ecn: Ecn) -> None:
        """See `UdpProtocol`."""
        self.counts.datagrams_in += 1
        self.counts.bytes_in += len(data)
        try:
            header = pull_quic_header(
                Buffer(data=data), host_cid_length=self._configuration.connection_id_length
            )
        except ValueError:
            return  # not QUIC: no answer, as for any stray packet
        peer = self._routes.get(header.destination_cid)
        if peer is None and len(data) >= INITIAL_MIN_BYTES:
            is_negotiation = header.packet_type is QuicPacketType.VERSION_NEGOTIATION
            supported = self._configuration.supported_versions
            if header.version is not None and header.version not in supported:
                if not is_negotiation:
                    self.send(
                        encode_quic_version_negotiation(
                            source_cid=header.destination_cid,
                            destination_cid=header.source_cid,
                            supported_versions=supported,
                        ),
                        addr,
                    )
            elif header.packet_type is QuicPacketType.INITIAL:
                peer = self._admit(header, addr)
        if peer is not None:
            peer.driver.receive(data, addr, ecn)
            if not peer.connection.is_handshaking:
                self._handshakes.done(peer)
            if self._marking is not None and not self._is_settling:
                self._is_settling = True
                asyncio.get_running_loop().call_soon(self._settle, self._marking)
        elif header.packet_type is QuicPacketType.ONE_RTT:
            self._reset(header.destination_cid, len(data), addr)

    def error_received(self, exc: OSError) -> None:
        """See `UdpProtocol`; a reader that is gone shows in its idle timeout."""
        logger.debug("socket error: %s", exc)

    def _settle(self, marking: Marking) -> None:
        """Let the policies think, when a burst of datagrams is dealt with."""
        self._is_settling = False
        marking.settle(asyncio.get_running_loop().time())

    def _reset(self, connection_id: bytes, received_bytes: int, addr: Address) -> None:
        """Tell whoever sent a packet of a connection that is not known, or not any more."""
        reset = self._reset_key.reset(connection_id, received_bytes)
        if reset is not None and self._reset_limit.allows(asyncio.get_running_loop().time()):
            self.send(reset, addr)

    def _admit(self, header: QuicHeader, addr: Address) -> _Peer | None:
        """Begin a connection, if there is room for one, or have the client show its address."""
        now = asyncio.get_running_loop().time()
        is_full = len(self._peers) >= MAX_CONNECTIONS
        if not self._sites.has_room(addr[0]):
            self._refuse(addr, now)
            return None
        if not header.token:
            if len(self._handshakes) < RETRY_FROM and not is_full:
                return self._new_peer(header.destination_cid, addr, retried=None)
            self._send_retry(header, addr, now)
            return None
        try:
            original = self._retry.validate_token(
                address=addr, destination_cid=header.destination_cid, token=header.token, now=now
            )
        except ValueError:
            return None  # no token of ours, or an old one: the client begins anew
        if is_full and not self._make_room():
            self._refuse(addr, now)
            return None
        return self._new_peer(original, addr, retried=header.destination_cid)

    def _refuse(self, addr: Address, now: float) -> None:
        self.counts.refused += 1
        text = f"refused a connection of {addr[0]}: {len(self._peers)} are open"
        self._seldom.warn(now, text)

    def _make_room(self) -> bool:
        """End the oldest idle connection of the address that has most of them; say if there was."""
        idle = self._sites.first_of_largest(peer for peer in self._peers if peer.is_idle)
        if idle is None:
            return False
        self.counts.given_up += 1
        self._close(idle, "an idle connection makes room for another")
        return True

    def _send_retry(self, header: QuicHeader, addr: Address, now: float) -> None:
        assert header.version is not None
        source_cid = os.urandom(self._configuration.connection_id_length)
        token = self._retry.create_token(
            address=addr,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source_cid,
            now=now,
        )
        retry = encode_quic_retry(
            version=header.version,
            source_cid=source_cid,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=token,
        )
        self.counts.retries += 1
        self.send(retry, addr)

    def _new_peer(self, original_cid: bytes, addr: Address, *, retried: bytes | None) -> _Peer:
        """`retried` is the connection id of the Retry that the client answers."""
        policy = self._marking.policy() if self._marking is not None else None
        connection = ServerConnection(
            self._configuration,
            make_sender=self._make_sender,
            padding=self._padding,
            marking=policy,
            original_destination_connection_id=original_cid,
            retry_source_connection_id=retried,
            reset_key=self._reset_key,
            skips=self._skips,
            session_ticket_fetcher=self._tickets.take,
            session_ticket_handler=self._tickets.put,
        )
        connection.path.beats = self._beats
        connection.path.counts = self.counts
        self.counts.handshakes += 1
        peer = _Peer(self, connection, policy)
        self._peers[peer] = None
        self._handshakes.begin(peer, addr[0])
        self._sites.begin(peer, addr[0])
        for connection_id in (retried or original_cid, connection.quic.host_cid):
            self.route(connection_id, peer, is_issued=True)
        return peer


async def listen(
    host: str,
    port: int,
    *,
    certificate: ServerCertificate,
    service: TurnService,
    make_sender: SenderFactory = EloquentSender,
    padding: bool = True,
    marking: Marking | None = None,
    qlog: QlogDirectory | None = None,
    skips: random.Random | None = None,
    tickets: TicketBook | None = None,
    datagrams: bool = True,
) -> Listener:
    """Listen on a UDP address; `port` 0 takes a free one (`Listener.port` tells).

    `padding` hides the lengths of tokens from those who see the packets. `marking` marks them for
    L4S (`eloquent.quic.marking`); None: no marks.
    `qlog` is where each connection's log goes. `skips` chooses the packet numbers to leave out;
    None: the system's randomness, which no peer can guess. `tickets` are those given out before;
    None: there are none, and they end with the listener. Without `datagrams` the turns run over
    a QUIC stream, as with a peer that takes none.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    if not 0 <= port <= MAX_PORT:
        raise ConfigurationError(
            f"There is no UDP port {port}: choose one up to {MAX_PORT} with --port, or 0 for any "
            "free one."
        )
    listener = Listener(
        certificate,
        service,
        make_sender,
        padding=padding,
        marking=marking,
        qlog=qlog,
        skips=skips,
        tickets=tickets,
        datagrams=datagrams,
    )
    try:
        await open_udp(listener, local=(host, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            advice = (
                "Is another server running there? Choose another port with --port, or 0 for any "
                "free one."
            )
        else:
            advice = "Choose an address of this machine with --host; 0.0.0.0 stands for all."
        raise ConfigurationError(
            f"Cannot listen on {host}, UDP port {port}: {reason}. {advice}"
        ) from error
    return listener
