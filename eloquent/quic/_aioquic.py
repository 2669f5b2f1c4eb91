"""Late binding in aioquic's internals, which only modules `_*.py` touch (checked with 1.7.2).

aioquic queues DATAGRAM frames as they are made, never says what became of them, and is blocked
for good by one that is too large. `LateBoundConnection` asks a source for each datagram at the
moment a packet is written, tells the source of acknowledgement and loss, and offers it exactly
the room that the packet has. `tests/eloquent/test_aioquic_internals.py` fails, naming the
attribute, when an aioquic release changes what is used here.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from aioquic.buffer import Buffer, size_uint_var  # type: ignore[attr-defined]
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicNetworkPath, QuicReceiveContext
from aioquic.quic.events import DatagramFrameReceived
from aioquic.quic.packet import (
    QuicFrameType,
    pull_quic_transport_parameters,
    push_quic_transport_parameters,
)
from aioquic.quic.packet_builder import (
    QuicDeliveryState,
    QuicPacketBuilder,
    QuicPacketBuilderStop,
    QuicSentPacket,
)
from aioquic.tls import Epoch
from cryptography import x509

from eloquent.core.padding import Padding
from eloquent.core.path import Path
from eloquent.quic._recovery import TimedRecovery
from eloquent.quic.qlog import describe_frame

MAX_DATAGRAM_FRAME_BYTES = 65535
"What we announce as `max_datagram_frame_size` (RFC 9221 section 3): any size."

FRAME_OVERHEAD_BYTES = 3
"A DATAGRAM frame's type and its length (two bytes, for packets below 16 KiB)."


MAX_ACK_DELAY_S = 0.06
"""How long we may delay an acknowledgement (RFC 9000 section 13.2.1); the peer is told. At 30
tokens/s one acknowledgement then answers two packets, and most travel with something else."""

ACK_AFTER_BYTES = 2400
"They do not wait when so much has come: about two full packets (RFC 9000 section 13.2.2)."

ACK_DELAY_RTTS = 0.5
"Acknowledgements wait for this share of a round trip, but never longer than `MAX_ACK_DELAY_S`."

NO_FLIGHT_S = 0.01
"Padding is not to guess how many tokens are in flight: the sender says how large packets are."

HANDSHAKE_PACKETS = 4
"In so many packets after the handshake a gap in the numbers is no sign of loss."

SKIP_WITHIN_PACKETS = 512
"A packet number is left out once in so many packets at the latest (RFC 9000 section 21.4)."


class Datagram(NamedTuple):
    """What a source gives for a packet."""

    payload: bytes
    token: Any
    "Stands for it in `on_delivery`."
    is_copy: bool = False
    "Whether it repeats the one before it, at once."


class DatagramSource(Protocol):
    """Where a connection gets its datagrams from, one at a time, when it can send one."""

    def has_datagram(self, now: float) -> bool:
        """Return whether there is something to send at `now` (seconds)."""

    def next_datagram(self, now: float, room: int) -> Datagram | None:
        """Return one whose payload has at most `room` bytes, or None."""

    def on_delivery(self, token: Any, *, acked: bool) -> None:
        """Take the fate of the datagram that `token` stands for."""


class _LateDatagrams(deque[bytes]):
    """Stands where aioquic keeps its queue: not empty while the source has something."""

    def __init__(self, has_datagram: Callable[[], bool]) -> None:
        super().__init__()
        self._has_datagram = has_datagram

    def __bool__(self) -> bool:
        return self._has_datagram()

    def __getitem__(self, index: Any) -> Any:
        return b""

    def popleft(self) -> bytes:
        return b""


class _BytePacer:
    """A token bucket that charges a packet its size (RFC 9002 section 7.7).

    aioquic's own charges each packet as a full one, which holds a stream of small packets to a
    tenth of what the congestion window allows.
    """

    BURST_PACKETS = 10

    def __init__(self, max_datagram_size: int, packet_size: Callable[[], int]) -> None:
        self._packet_size = packet_size
        self._burst_bytes = self.BURST_PACKETS * max_datagram_size
        self._budget_bytes = float(self._burst_bytes)
        self._bytes_per_s: float | None = None
        self._updated_at = 0.0

    def next_send_time(self, now: float) -> float | None:
        """Return None if a packet may leave at `now`, else the time when one may."""
        self._refill(now)
        if self._bytes_per_s is None or self._budget_bytes > 0:
            return None
        return now + (1 - self._budget_bytes) / self._bytes_per_s

    def update_after_send(self, now: float) -> None:
        """Charge the packet just written."""
        self._refill(now)
        self._budget_bytes -= self._packet_size()

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        """Pace at 1.25 congestion windows per round trip."""
        self._bytes_per_s = 1.25 * congestion_window / max(smoothed_rtt, 1e-6)

    def _refill(self, now: float) -> None:
        if self._bytes_per_s is not None:
            earned = max(0.0, now - self._updated_at) * self._bytes_per_s
            self._budget_bytes = min(self._budget_bytes + earned, float(self._burst_bytes))
        self._updated_at = max(now, self._updated_at)


class LateBoundConnection(QuicConnection):
    """A QUIC connection whose datagrams are chosen when their packet is written.

    `padding` says how large the packets that carry them become; None leaves them as they are.
    With `skips`, a source of randomness that the peer cannot guess, a packet number is left out now
    and then: a peer that acknowledges it acknowledges what it did not get.
    """

    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        source: DatagramSource,
        padding: Padding | None = None,
        skips: random.Random | None = None,
        **options: Any,
    ) -> None:
        super().__init__(configuration=configuration, **options)
        self._source = source
        self._padding = padding
        self._source_now = 0.0
        self._datagrams_pending = _LateDatagrams(lambda: source.has_datagram(self._source_now))
        self._datagram_packet = -1
        self._builder: QuicPacketBuilder | None = None
        self._recovery = self._loss = TimedRecovery(
            congestion_control_algorithm=configuration.congestion_control_algorithm,
            initial_rtt=configuration.initial_rtt,
            max_datagram_size=self._max_datagram_size,
            peer_completed_address_validation=not self._is_client,
            quic_logger=self._quic_logger,
            send_probe=self._send_probe,
            logger=self._logger,
            on_late_ack=self._on_late_ack,
        )
        self._loss._pacer = _BytePacer(  # type: ignore[assignment]
            configuration.max_datagram_size, self._packet_size
        )
        self._path = Path()
        self._heard_at = 0.0
        self.heard_packets = 0
        "Packets that came since the handshake, newer than all before."
        self._unacked_bytes = 0
        self._skips = skips
        self._skip_at = self._next_skip()

    @property
    def can_send_datagrams(self) -> bool:
        """Whether the peer takes DATAGRAM frames (known after the handshake)."""
        return bool(self._remote_max_datagram_frame_size)

    @property
    def srtt_s(self) -> float:
        """Smoothed round-trip time in seconds; before the first sample the initial guess."""
        if self._loss._rtt_initialized:
            return self._loss._rtt_smoothed
        return self._loss._rtt_initial

    @property
    def peer_certificate(self) -> x509.Certificate | None:
        """The certificate that the peer presented, after the handshake."""
        return self.tls._peer_certificate

    def update_path(self, path: Path, now: float) -> None:
        """Tell `path` what is measured here, and learn whether its senders want more."""
        recovery = self._recovery
        if path.is_limited:
            path.is_limited = False
            recovery.on_blocked(now)
        if recovery.losses_elsewhere:
            recovery.losses_elsewhere = 0
            path.on_loss_elsewhere()
        path.srtt_s = self.srtt_s
        path.min_rtt_s = recovery.rtts.min_s or self.srtt_s
        path.recent_rtt_s = recovery.rtts.recent_s or self.srtt_s
        path.ack_delay_s = recovery.max_ack_delay
        path.floor_bytes_per_s = recovery.floor_window / (self.srtt_s + recovery.max_ack_delay)
        self._path = path
        path.has_queue = recovery.is_congested
        path.holds = recovery.holds(now)
        if self._padding is not None:
            if path.has_queue or path.holds:
                self._padding.release()
            path.padded_bytes = self._padding.padded_size(0, now, NO_FLIGHT_S)
        path.window_bytes = recovery.congestion_window
        path.waiting_since = recovery.waiting_since
        path.probe_timeout_s = recovery.get_probe_timeout()

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        """See `QuicConnection.datagrams_to_send`; asks the source for what is due at `now`."""
        self._source_now = now
        self._recovery.expire(now)
        space = self._spaces.get(Epoch.ONE_RTT)
        if space is not None and space.ack_at is not None and self._source.has_datagram(now):
            space.ack_at = min(space.ack_at, now)  # It travels with the datagram.
        if 0 <= self._skip_at <= self._packet_number:
            self._recovery.skip(self._packet_number)
            self._packet_number += 1
            self._skip_at = self._next_skip()
        datagrams = super().datagrams_to_send(now=now)
        if self._pacing_at is None and self._source.has_datagram(now):
            self._recovery.on_blocked(now)
        return datagrams

    def receive_datagram(self, data: bytes, addr: Any, now: float) -> None:
        """See `QuicConnection.receive_datagram`; notes silences, gaps and changes of path."""
        was_silent = self._recovery.is_silent(now) and (
            now - self._heard_at > self._recovery.get_probe_timeout()
        )
        path = self._network_paths[0] if self._network_paths else None
        space = self._spaces.get(Epoch.ONE_RTT)
        received = space.largest_received_packet if space is not None else -1
        is_ack_due = space is not None and space.ack_at is not None
        self._ack_delay = MAX_ACK_DELAY_S
        if not self._path.is_timed:  # Or there are as many reports to acknowledge as bundles.
            self._ack_delay = min(ACK_DELAY_RTTS * self.srtt_s, MAX_ACK_DELAY_S)
        super().receive_datagram(data, addr, now)
        space = self._spaces.get(Epoch.ONE_RTT)
        if space is None or space.largest_received_packet == received:
            return
        self._heard_at = now
        self.heard_packets += self._handshake_confirmed
        self._unacked_bytes = len(data) + (self._unacked_bytes if is_ack_due else 0)
        if self._unacked_bytes >= ACK_AFTER_BYTES and space.ack_at is not None:
            space.ack_at = now
        if 0 <= received < space.largest_received_packet - 1:
            # The handshake's packets are numbered in the same row.
            if self.heard_packets > HANDSHAKE_PACKETS:
                self._recovery.losses_elsewhere += 1
            if space.ack_at is not None:
                space.ack_at = now  # RFC 9000 section 13.2.1: a gap is told at once.
        if path is not None and self._network_paths[0] is not path:
            self._recovery.on_path_changed(now)
        elif was_silent and not self._recovery.is_heard:
            self._recovery.on_heard_again(now)

    def _confirm_handshake(self) -> None:
        """See `QuicConnection._confirm_handshake`; what TLS wrote into is not kept, 48 KiB."""
        super()._confirm_handshake()
        # TLS has nothing to say after it: keys are updated by QUIC itself (RFC 9001 section 6).
        self._crypto_buffers = {epoch: Buffer(capacity=1) for epoch in self._crypto_buffers}

    def _next_skip(self) -> int:
        if self._skips is None:
            return -1
        return self._packet_number + self._skips.randint(1, SKIP_WITHIN_PACKETS)

    def _serialize_transport_parameters(self) -> bytes:
        parameters = pull_quic_transport_parameters(
            Buffer(data=super()._serialize_transport_parameters())
        )
        parameters.max_ack_delay = round(1000 * MAX_ACK_DELAY_S)
        buffer = Buffer(capacity=3 * self._max_datagram_size)
        push_quic_transport_parameters(buffer, parameters)
        return buffer.data

    def _write_application(
        self, builder: QuicPacketBuilder, network_path: QuicNetworkPath, now: float
    ) -> None:
        self._builder = builder
        super()._write_application(builder, network_path, now)

    def _packet_size(self) -> int:
        """Return the size in bytes of the packet being written, its tag included."""
        assert self._builder is not None
        return self._builder._buffer_capacity - self._builder.remaining_buffer_space

    def _write_datagram_frame(
        self, builder: QuicPacketBuilder, data: bytes, frame_type: QuicFrameType
    ) -> bool:
        """Write a datagram chosen now, no larger than this packet and the peer allow.

        A packet carries one datagram at most: two copies in one packet would share its fate.
        """
        if builder.packet_number == self._datagram_packet:
            raise QuicPacketBuilderStop
        room = min(
            builder.remaining_buffer_space,
            builder.remaining_flight_space,
            self._remote_max_datagram_frame_size or 0,
        )
        self._path.used_bytes = self._packet_size() + FRAME_OVERHEAD_BYTES
        chosen = self._source.next_datagram(self._source_now, room - FRAME_OVERHEAD_BYTES)
        if chosen is None:
            raise QuicPacketBuilderStop
        payload, token, is_copy = chosen
        buffer = builder.start_frame(
            frame_type,
            capacity=1 + size_uint_var(len(payload)) + len(payload),
            handler=self._on_datagram_delivery,
            handler_args=(token, is_copy),
        )
        self._datagram_packet = builder.packet_number
        buffer.push_uint_var(len(payload))
        buffer.push_bytes(payload)
        if self._quic_logger is not None and builder.quic_logger_frames is not None:
            builder.quic_logger_frames.append(
                self._quic_logger.encode_datagram_frame(length=len(payload))
                | describe_frame(payload)
            )
        self._pad(builder)
        return True

    def _handle_datagram_frame(
        self, context: QuicReceiveContext, frame_type: int, buf: Buffer
    ) -> None:
        """Take a datagram; with a qlog, say there what it is."""
        super()._handle_datagram_frame(context, frame_type, buf)
        if context.quic_logger_frames is not None:
            received = self._events[-1]
            assert isinstance(received, DatagramFrameReceived)
            context.quic_logger_frames[-1].update(describe_frame(received.data))

    def _pad(self, builder: QuicPacketBuilder) -> None:
        """Add PADDING frames, one byte each (RFC 9000 section 19.1), as far as there is room."""
        if self._padding is None:
            return
        size = self._packet_size()
        wanted = max(size, self._path.target_bytes)
        missing = self._padding.padded_size(wanted, self._source_now, NO_FLIGHT_S) - size
        missing = min(missing, builder.remaining_buffer_space, builder.remaining_flight_space)
        if missing > 0:
            builder.start_frame(QuicFrameType.PADDING).push_bytes(bytes(missing - 1))
            if self._quic_logger is not None and builder.quic_logger_frames is not None:
                builder.quic_logger_frames.append(self._quic_logger.encode_padding_frame())

    def _on_datagram_delivery(self, delivery: QuicDeliveryState, token: Any, is_copy: bool) -> None:
        self._source.on_delivery(token, acked=delivery is QuicDeliveryState.ACKED)

    def _on_late_ack(self, packet: QuicSentPacket) -> None:
        """Tell the source of a datagram that has come after it was declared lost."""
        for handler, arguments in packet.delivery_handlers:
            if handler == self._on_datagram_delivery:
                handler(QuicDeliveryState.ACKED, *arguments)

    def _datagram_in(self, packet: QuicSentPacket) -> tuple[Any, bool]:
        """Return the token of the datagram that a packet carries, or None, and `is_copy`."""
        for handler, arguments in packet.delivery_handlers:
            if handler == self._on_datagram_delivery:
                token, is_copy = arguments
                return token, is_copy
        return None, False
