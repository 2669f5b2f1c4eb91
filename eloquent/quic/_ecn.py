"""ECN on a QUIC connection: marks out and in, counts, validation, and Prague's feedback.

Touches aioquic's internals (checked with 1.7.2; `tests/eloquent/test_aioquic_internals.py` names
what a release changes): it reads ACK_ECN and drops the counts, and sends none.
"""

import logging
from itertools import islice
from typing import Any

from aioquic.buffer import UINT_VAR_MAX_SIZE, Buffer, BufferReadError  # type: ignore[attr-defined]
from aioquic.quic.connection import (
    ACK_FRAME_CAPACITY,
    QuicNetworkPath,
    QuicReceiveContext,
)
from aioquic.quic.packet import QuicFrameType, push_ack_frame
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder, QuicSentPacket
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.tls import Epoch

from eloquent.core.path import Path
from eloquent.quic._aioquic import LateBoundConnection
from eloquent.quic.ecn import Ecn, EcnCounts, EcnState, EcnValidation, tag
from eloquent.quic.marking import MarkingPolicy, SentPacket
from eloquent.quic.prague import Prague, PraguePacer

COUNTS_BYTES = 3 * UINT_VAR_MAX_SIZE

AWAITED_ARRIVALS = 512
"Of so many packets, the newest, the peer may still say when they came."

logger = logging.getLogger(__name__)


class EcnConnection(LateBoundConnection):
    """A connection that reports the marks it gets, and marks what it sends as `marking` says.

    Without `marking` nothing is marked. Packets are marked once the handshake is confirmed: from
    then on each datagram is one packet, and a path that drops marked packets does not keep anyone
    from connecting. While the path carries marks (or is being tested) the congestion controller is
    Prague; when validation fails it is again the one that the configuration names.
    """

    def __init__(self, *, marking: MarkingPolicy | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._marking = marking
        self._validation = EcnValidation()
        self._validated_path: QuicNetworkPath | None = None
        self._arriving = Ecn.NOT_ECT
        self._arrived: dict[QuicPacketSpace, EcnCounts] = {}
        self._codepoints: list[Ecn] = []
        self._acked_at = 0.0
        self._timed: dict[Any, SentPacket] = {}
        "By its datagram's token, the packets whose arrival the peer may report."
        self._usual_pacer = self._loss._pacer
        if marking is not None:
            self._use_prague()

    @property
    def ecn_state(self) -> EcnState | None:
        """Whether the path carries marks, or None while nothing is to be marked."""
        return None if self._marking is None else self._validation.state

    @property
    def ecn_reported(self) -> EcnCounts:
        """What the peer counted of the marks that it got."""
        return self._validation.reported

    def update_path(self, path: Path, now: float) -> None:
        """See `LateBoundConnection.update_path`; tells the senders what the policy wants, too.

        Where the path carries no marks there is one queue for all, so nothing is wanted.
        """
        super().update_path(path, now)
        if self._marking is not None:
            wants_times, validation = self._marking.wants_times, self._validation
            path.is_timed = wants_times and validation.state is not EcnState.FAILED
            path.has_two_queues = wants_times and validation.may_mark
            path.wants_copy = self._marking.wants_copy if validation.may_mark else None

    def on_arrival(self, token: Any, arrived_s: float, now: float) -> None:
        """Take the peer's word on when a datagram came, by its clock; it counts once."""
        packet = self._timed.pop(token, None)
        if packet is not None and self._marking is not None:
            self._marking.on_arrival(now, packet, arrived_s)

    def receive_datagram(self, data: bytes, addr: Any, now: float, ecn: Ecn = Ecn.NOT_ECT) -> None:
        """See `QuicConnection.receive_datagram`; `ecn` is what the datagram came with."""
        self._arriving = ecn
        super().receive_datagram(data, addr, now)

    def marked_datagrams_to_send(self, now: float) -> list[tuple[bytes, Any, Ecn]]:
        """Return what `datagrams_to_send` does, each with the codepoint to send it with."""
        self._codepoints.clear()
        datagrams = self.datagrams_to_send(now)
        return [
            (data, address, codepoint)
            for (data, address), codepoint in zip(datagrams, self._codepoints, strict=True)
        ]

    # Receiving: count, and report.

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        if self._arriving is Ecn.NOT_ECT:
            return super()._payload_received(context, plain, crypto_frame_required)
        epoch = Epoch.ONE_RTT if context.epoch is Epoch.ZERO_RTT else context.epoch
        space = self._spaces[epoch]
        self._arrived.setdefault(space, EcnCounts()).add(self._arriving)
        is_ack_eliciting, is_probing = super()._payload_received(
            context, plain, crypto_frame_required
        )
        if self._arriving is Ecn.CE and is_ack_eliciting:
            space.ack_at = context.time  # RFC 9000 section 13.2.1: congestion is told at once
        return is_ack_eliciting, is_probing

    def _write_ack_frame(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, now: float
    ) -> None:
        counts = self._arrived.get(space)
        if counts is None:
            super()._write_ack_frame(builder, space, now)
            return
        assert space.largest_received_time is not None
        delay = now - space.largest_received_time
        buffer = builder.start_frame(
            QuicFrameType.ACK_ECN,
            capacity=ACK_FRAME_CAPACITY + COUNTS_BYTES,
            handler=self._on_ack_delivery,
            handler_args=(space, space.largest_received_packet),
        )
        ranges = push_ack_frame(
            buffer,
            space.ack_queue,
            int(delay * 1_000_000) >> self._local_ack_delay_exponent,
            builder.remaining_buffer_space - COUNTS_BYTES,
        )
        for count in (counts.ect0, counts.ect1, counts.ce):
            buffer.push_uint_var(count)
        space.ack_at = None
        if self._quic_logger is not None and builder.quic_logger_frames is not None:
            builder.quic_logger_frames.append(
                self._quic_logger.encode_ack_frame(
                    ranges=list(space.ack_queue)[-ranges:], delay=delay
                )
            )
        if ranges > 1 and builder.packet_number % 8 == 0:
            self._write_ping_frame(builder, comment="ACK-of-ACK trigger")

    # Sending: mark, and learn.

    def _flush_builder(
        self, builder: QuicPacketBuilder, network_path: QuicNetworkPath, peer_cid: bytes, now: float
    ) -> list[tuple[bytes, Any]]:
        datagrams = super()._flush_builder(builder, network_path, peer_cid, now)
        if (
            self._marking is None
            or not self._handshake_confirmed
            or network_path is not self._network_paths[0]
        ):
            self._codepoints += [Ecn.NOT_ECT] * len(datagrams)
        elif datagrams:
            self._mark(network_path, now, len(datagrams))
        return datagrams

    def _mark(self, path: QuicNetworkPath, now: float, count: int) -> None:
        """Choose the codepoints of the last `count` packets, which went to `path`."""
        assert self._marking is not None
        if path is not self._validated_path:
            self._validate_anew(path)
        marking, validation = self._marking, self._validation
        packets = list(islice(reversed(self._spaces[Epoch.ONE_RTT].sent_packets.values()), count))
        for packet in reversed(packets):
            token, is_copy = self._datagram_in(packet)
            codepoint = marking.next_codepoint(now, packet.sent_bytes, is_copy=is_copy)
            if codepoint is not Ecn.NOT_ECT:
                if validation.may_mark:
                    validation.on_sent(codepoint)
                else:
                    codepoint = Ecn.NOT_ECT
            is_timed = token is not None and self._path.is_timed
            sent = SentPacket(packet.packet_number, now, packet.sent_bytes, codepoint, is_timed)
            packet.delivery_handlers.append((self._on_packet_delivery, (validation, sent)))
            tag(packet, codepoint)
            self._codepoints.append(codepoint)
            if is_timed:
                self._await_arrival(token, sent)
            marking.on_sent(sent)

    def _await_arrival(self, token: Any, packet: SentPacket) -> None:
        self._timed[token] = packet
        if len(self._timed) > AWAITED_ARRIVALS:
            del self._timed[next(iter(self._timed))]

    def _validate_anew(self, path: QuicNetworkPath) -> None:
        if self._validated_path is not None:
            self._validation = EcnValidation(carried=self._validation.in_flight)
            self._use_prague()
        self._validated_path = path

    def _on_packet_delivery(
        self, delivery: QuicDeliveryState, validation: EcnValidation, packet: SentPacket
    ) -> None:
        assert self._marking is not None
        is_marked = packet.codepoint is not Ecn.NOT_ECT
        if delivery is QuicDeliveryState.ACKED:
            if is_marked:
                validation.on_acked(packet.codepoint)
            self._marking.on_acked(self._acked_at, packet)
        else:
            if is_marked:
                validation.on_lost()
            self._marking.on_lost(self._recovery.lost_at, packet)

    def _on_datagram_delivery(self, delivery: QuicDeliveryState, token: Any, is_copy: bool) -> None:
        if self._path.has_two_queues:
            sent = self._timed.get(token)
            self._path.is_classic = sent is not None and sent.codepoint is Ecn.NOT_ECT
        super()._on_datagram_delivery(delivery, token, is_copy)
        self._path.is_classic = False

    def _on_late_ack(self, packet: QuicSentPacket) -> None:
        super()._on_late_ack(packet)
        for handler, arguments in packet.delivery_handlers:
            if handler == self._on_packet_delivery and self._marking is not None:
                self._marking.on_acked(self._acked_at, arguments[1])

    def _handle_ack_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        if self._marking is None or context.epoch is not Epoch.ONE_RTT:
            super()._handle_ack_frame(context, frame_type, buf)
            return
        counts: EcnCounts | None = None
        if frame_type == QuicFrameType.ACK_ECN:
            counts = _counts_ahead(buf)
        space = self._spaces[Epoch.ONE_RTT]
        largest = space.largest_acked_packet
        self._acked_at = context.time
        super()._handle_ack_frame(context, frame_type, buf)
        was_failed = self._validation.state is EcnState.FAILED
        growth = self._validation.on_ack_frame(
            counts, raises_largest=space.largest_acked_packet > largest
        )
        control = self._loss._cc
        if isinstance(control, Prague):
            control.on_feedback(
                now=context.time,
                rtt=self._loss._rtt_smoothed,
                marked=growth.ect1 + growth.ce if growth is not None else 0,
                congested=growth.ce if growth is not None else 0,
            )
            self._loss._pacer.update_rate(control.congestion_window, self._loss._rtt_smoothed)
        if self._validation.state is EcnState.FAILED and not was_failed:
            logger.info(
                "ECN is off for this path: %s. Packets go unmarked from here on.",
                self._validation.failure,
            )
            if isinstance(control, Prague):
                self._loss._cc, self._loss._pacer = control.inner, self._usual_pacer

    def _use_prague(self) -> None:
        """Put Prague, new to the path, on the controller that the configuration names."""
        full = self._max_datagram_size
        usual = self._loss._cc
        control = Prague(
            usual.inner if isinstance(usual, Prague) else usual, max_datagram_size=full
        )
        self._loss._cc = control
        self._loss._pacer = PraguePacer(  # type: ignore[assignment]
            control, max_datagram_size=full, packet_size=self._packet_size
        )


def _counts_ahead(buf: Buffer) -> EcnCounts | None:
    """Return the counts of the ACK_ECN frame that begins here; the buffer stays where it is."""
    start, pull = buf.tell(), buf.pull_uint_var
    try:
        pull(), pull()  # the largest acknowledged, the delay
        ranges = pull()
        for _ in range(2 * ranges + 1):
            pull()
        return EcnCounts(ect0=pull(), ect1=pull(), ce=pull())
    except BufferReadError:
        return None  # aioquic, which reads it again, ends the connection for it
    finally:
        buf.seek(start)
