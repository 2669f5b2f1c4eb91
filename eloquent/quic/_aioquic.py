"""The one module that touches aioquic's internals (checked with 1.7.2).

aioquic queues DATAGRAM frames as they are made, never says what became of them, and is blocked
for good by one that is too large. `LateBoundConnection` asks a source for each datagram at the
moment a packet is written, tells the source of acknowledgement and loss, and offers it exactly
the room that the packet has. `tests/eloquent/test_aioquic_internals.py` fails, naming the
attribute, when an aioquic release changes what is used here.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from aioquic.buffer import Buffer, size_uint_var  # type: ignore[attr-defined]
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicNetworkPath, QuicReceiveContext
from aioquic.quic.events import DatagramFrameReceived
from aioquic.quic.packet import QuicFrameType
from aioquic.quic.packet_builder import (
    QuicDeliveryState,
    QuicPacketBuilder,
    QuicPacketBuilderStop,
)
from cryptography import x509

from eloquent.core.padding import Padding
from eloquent.quic.qlog import describe_frame

MAX_DATAGRAM_FRAME_BYTES = 65535
"What we announce as `max_datagram_frame_size` (RFC 9221 section 3): any size."

FRAME_OVERHEAD_BYTES = 3
"A DATAGRAM frame's type and its length (two bytes, for packets below 16 KiB)."


class DatagramSource(Protocol):
    """Where a connection gets its datagrams from, one at a time, when it can send one."""

    def has_datagram(self, now: float) -> bool:
        """Return whether there is something to send at `now` (seconds)."""

    def next_datagram(self, now: float, room: int) -> tuple[bytes, Any] | None:
        """Return a payload of at most `room` bytes and a token for `on_delivery`, or None."""

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
    """

    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        source: DatagramSource,
        padding: Padding | None = None,
        **options: Any,
    ) -> None:
        super().__init__(configuration=configuration, **options)
        self._source = source
        self._padding = padding
        self._source_now = 0.0
        self._datagrams_pending = _LateDatagrams(lambda: source.has_datagram(self._source_now))
        self._datagram_packet = -1
        self._builder: QuicPacketBuilder | None = None
        self._loss._pacer = _BytePacer(  # type: ignore[assignment]
            configuration.max_datagram_size, self._packet_size
        )

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

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        """See `QuicConnection.datagrams_to_send`; asks the source for what is due at `now`."""
        self._source_now = now
        return super().datagrams_to_send(now=now)

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
        chosen = self._source.next_datagram(self._source_now, room - FRAME_OVERHEAD_BYTES)
        if chosen is None:
            raise QuicPacketBuilderStop
        payload, token = chosen
        buffer = builder.start_frame(
            frame_type,
            capacity=1 + size_uint_var(len(payload)) + len(payload),
            handler=self._on_datagram_delivery,
            handler_args=(token,),
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
        missing = self._padding.padded_size(size, self._source_now, self.srtt_s) - size
        missing = min(missing, builder.remaining_buffer_space, builder.remaining_flight_space)
        if missing > 0:
            builder.start_frame(QuicFrameType.PADDING).push_bytes(bytes(missing - 1))
            if self._quic_logger is not None and builder.quic_logger_frames is not None:
                builder.quic_logger_frames.append(self._quic_logger.encode_padding_frame())

    def _on_datagram_delivery(self, delivery: QuicDeliveryState, token: Any) -> None:
        self._source.on_delivery(token, acked=delivery is QuicDeliveryState.ACKED)
