"""What a connection needs to outlive its path: migration, probes, stateless reset, packet sizes.

Touches aioquic's internals (checked with 1.7.2; `tests/eloquent/test_aioquic_internals.py` names
what a release changes).
"""

import hmac
from itertools import islice
from typing import Any

from aioquic.quic.connection import END_STATES, QuicNetworkPath
from aioquic.quic.events import ConnectionTerminated
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder
from aioquic.tls import Epoch

from eloquent.core.mtu import SIZES_BYTES, PacketSize
from eloquent.quic._ecn import EcnConnection
from eloquent.quic.ecn import Ecn
from eloquent.quic.reset import MIN_RESET_BYTES, TOKEN_BYTES, ResetKey

MIGRATION_PACKET_BYTES = 1200
"""The first packet from a new address: until the server has validated the address it may send
three times what came from there (RFC 9000 section 8.1), which this makes enough for a backlog."""

RESET_REASON = "the server does not know the connection any more (stateless reset)"


class RoamingConnection(EcnConnection):
    """A connection that goes on when addresses change, and ends at once when the peer forgot it.

    `reset_key` makes the tokens by which a server that forgot its connections can say so
    (RFC 9000 section 10.3); without one they are random.
    """

    def __init__(self, *, reset_key: ResetKey | None = None, **options: Any) -> None:
        self._reset_key = reset_key
        super().__init__(**options)
        self._is_ping_padded = False
        self._packet_size_limit = PacketSize()
        if reset_key is not None:
            first = self._host_cids[0]
            first.stateless_reset_token = reset_key.token(first.cid)

    @property
    def can_send_early(self) -> bool:
        """Whether requests may leave before the handshake is done (0-RTT, client)."""
        return self._cryptos[Epoch.ZERO_RTT].send.is_valid()

    @property
    def is_resumed(self) -> bool:
        """Whether a ticket showed who the peer is, so that it showed no certificate again."""
        return self.tls.session_resumed

    @property
    def newest_acked(self) -> int:
        """The highest number of a packet that the peer has acknowledged, or -1."""
        space = self._spaces.get(Epoch.ONE_RTT)
        return space.largest_acked_packet if space is not None else -1

    def resend_refused(self, now: float) -> None:
        """Send again at once what left early, if the server did not take it (client)."""
        if self.tls.early_data_accepted:
            return
        space = self._spaces[Epoch.ONE_RTT]
        packets = [
            packet
            for packet in space.sent_packets.values()
            if packet.packet_type is QuicPacketType.ZERO_RTT
        ]
        self._loss._on_packets_lost(congestion_event=False, now=now, packets=packets, space=space)

    # Probes and migration.

    def send_probe(self) -> None:
        """Send a PING with the next packet, even if the congestion window is full."""
        self._send_probe()

    def migrate(self, now: float) -> None:
        """Let the next packet leave under a new connection id, as from a new address (client)."""
        self.change_connection_id()
        self._packet_size_limit = PacketSize()
        self._recovery.on_path_changed(now)
        self._is_ping_padded = True
        self._send_probe()

    def receive_datagram(self, data: bytes, addr: Any, now: float, ecn: Ecn = Ecn.NOT_ECT) -> None:
        """See `EcnConnection.receive_datagram`."""
        if self._is_client and self._is_reset(data):
            self._end_by_reset()
            return
        before = self._network_paths[0] if self._network_paths else None
        self._packet_size_limit.on_heard(now)
        super().receive_datagram(data, addr, now, ecn)
        after = self._network_paths[0] if self._network_paths else None
        if before is not None and after is not before:
            self._packet_size_limit = PacketSize()

    def _write_ping_frame(
        self, builder: QuicPacketBuilder, uids: list[int] | None = None, comment: str = ""
    ) -> None:
        super()._write_ping_frame(builder, uids or [], comment)
        if self._is_ping_padded:
            self._is_ping_padded = False
            room = min(builder.remaining_buffer_space, builder.remaining_flight_space)
            missing = min(MIGRATION_PACKET_BYTES - self._packet_size(), room) - 1
            if missing > 0:
                builder.start_frame(QuicFrameType.PADDING).push_bytes(bytes(missing))

    # Packet sizes, for paths that begin to drop large packets in mid-turn.

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        """See `LateBoundConnection.datagrams_to_send`."""
        if self._handshake_confirmed:
            limit = self._packet_size_limit
            if limit.shrink_if_missed(now, self.srtt_s):
                self._give_up_larger_than(limit.bytes, now)
            self._max_datagram_size = limit.next_bytes(now)
        return super().datagrams_to_send(now)

    def _flush_builder(
        self, builder: QuicPacketBuilder, network_path: QuicNetworkPath, peer_cid: bytes, now: float
    ) -> list[tuple[bytes, Any]]:
        datagrams = super()._flush_builder(builder, network_path, peer_cid, now)
        if datagrams and self._handshake_confirmed and network_path is self._network_paths[0]:
            packets = self._spaces[Epoch.ONE_RTT].sent_packets.values()
            limit = self._packet_size_limit
            for packet in islice(reversed(packets), len(datagrams)):
                if packet.sent_bytes > SIZES_BYTES[-1] and packet.is_ack_eliciting:
                    limit.on_sent(packet.sent_bytes, now)
                    packet.delivery_handlers.append(
                        (self._on_large_delivery, (limit, packet.sent_bytes))
                    )
        return datagrams

    def _on_large_delivery(self, delivery: QuicDeliveryState, limit: PacketSize, size: int) -> None:
        if delivery is QuicDeliveryState.ACKED:
            limit.on_acked(size)

    def _give_up_larger_than(self, size: int, now: float) -> None:
        """Take the packets for lost that were too large for the path; no sign of congestion."""
        space = self._spaces[Epoch.ONE_RTT]
        packets = [packet for packet in space.sent_packets.values() if packet.sent_bytes > size]
        self._loss._on_packets_lost(congestion_event=False, now=now, packets=packets, space=space)

    # Stateless reset.

    def _replenish_connection_ids(self) -> None:
        super()._replenish_connection_ids()
        if self._reset_key is not None:
            for connection_id in self._host_cids:
                if not connection_id.was_sent:
                    connection_id.stateless_reset_token = self._reset_key.token(connection_id.cid)

    def _is_reset(self, data: bytes) -> bool:
        """Return whether the peer says that it does not know this connection (section 10.3.1)."""
        token = self._peer_cid.stateless_reset_token
        return (
            len(token) == TOKEN_BYTES
            and len(data) >= MIN_RESET_BYTES
            and not data[0] & 0x80
            and hmac.compare_digest(data[-TOKEN_BYTES:], token)
        )

    def _end_by_reset(self) -> None:
        if self._state in END_STATES:
            return
        self._close_event = ConnectionTerminated(
            error_code=QuicErrorCode.NO_ERROR,
            frame_type=QuicFrameType.PADDING,
            reason_phrase=RESET_REASON,
        )
        self._close_end()
