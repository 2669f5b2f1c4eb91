"""Loss detection by time, and what a silence means; it touches aioquic's internals (1.7.2).

aioquic's recovery follows RFC 9002. What differs here, for application data only:

- A packet is lost by time, never because three later ones came: a path may reorder.
- Packets of different codepoints may wait in different queues: one is late only when a later one of
  its own codepoint has come. Where none does, it has a tenth of a second more.
- Packets given up are remembered. A late acknowledgement of one takes back what its loss did, tells
  the source, and makes the detection more patient.
- In a silence nothing in flight blocks the window, and probes do not double for ever.
- An acknowledgement of what was never sent ends the connection (RFC 9000 sections 13.1, 21.4).
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from math import inf
from typing import Any

from aioquic.quic.connection import QuicConnectionError
from aioquic.quic.packet import QuicErrorCode, QuicFrameType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketRecovery, QuicPacketSpace

from eloquent.quic.ecn import Ecn, codepoint_of
from eloquent.quic.thin import PATH_RTT_MAX_S, RttHistory, ThinControl

TIME_THRESHOLD = 9 / 8
"RFC 9002 section 6.1.2."

GRANULARITY_S = 0.001

OTHER_QUEUE_S = 0.1
"""So much longer a packet may take than those of another codepoint: the classic queue of a DualPI2
router aims at 15 ms, and has several times that for a moment when a flow starts."""

SLACK_DECAY = 1 / 64
"By this share the reordering slack shrinks with each acknowledgement."

REMEMBERED_PACKETS = 512
REMEMBERED_S = 3.0
REMEMBERED_RTTS = 4
"""Packets that were given up are remembered for a late acknowledgement: at most so many, for the
longer of the two times."""

REMEMBERED_SKIPS = 16
"So many packet numbers that were left out are remembered."

PROBE_FACTOR = 1.5
"QUIC's own probes wait so many probe timeouts: the sender's repeats, with data, come first."

MAX_PROBE_GAP_S = 2.0
"Doubling ends here, or at one probe timeout if that is longer."

EXPIRE_RTTS = 1.5
"""What is not acknowledged after so many round trips and the ACK delay does not block the window
any more: the window is a rate, which must not fall to nothing because acknowledgements are held."""

SLOW_RTT_S = 0.5
HELD_S = 0.15
HELD_RTTS = 1.0
HOLDS_S = 30.0
"""A packet whose acknowledgement came later than the smallest round trip by both was held on the
way; for so long a silence is then taken for another hold: what is sent in it will come."""

SILENT_TIMEOUTS = 3
"A silence of so many probe timeouts is an outage (RFC 9002 section 7.6.1 calls it persistent)."


class TimedRecovery(QuicPacketRecovery):
    """aioquic's recovery with the differences above.

    `on_late_ack` gets a packet that was given up and is acknowledged after all.
    """

    def __init__(self, *, on_late_ack: Callable[[QuicSentPacket], None], **options: Any) -> None:
        super().__init__(**options)
        self._on_late_ack = on_late_ack
        self._thin = self._cc if isinstance(self._cc, ThinControl) else None
        self.rtts = self._thin.rtts if self._thin is not None else RttHistory()
        self._slack_s = 0.0
        self._given_up: dict[int, QuicSentPacket] = {}
        self._newest_acked: dict[Ecn, int] = {}
        "By codepoint; all other packet numbers here are of either."
        self._largest_sent = -1
        self._skipped: deque[int] = deque(maxlen=REMEMBERED_SKIPS)
        self._waiting_since: float | None = None
        self._held_at = -inf
        self.is_heard = False
        "Whether the peer was heard in this silence, and what was in flight given up for it."
        self.lost_at = -inf
        "When packets were last declared lost: set before their handlers are told."
        self.losses_elsewhere = 0
        "How many losses were seen on the way to us."

    @property
    def waiting_since(self) -> float | None:
        """When the first packet was sent that is newer than all that is acknowledged, or None."""
        return self._waiting_since

    @property
    def is_congested(self) -> bool:
        """Whether the path is congested, as the congestion controller judges it."""
        if self.rtts.min_s is None and self._rtt_initialized:
            return self._rtt_smoothed > PATH_RTT_MAX_S
        return self.rtts.has_queue if self._thin is None else self._thin.is_congested

    @property
    def floor_window(self) -> float:
        """What random losses leave of the window, in bytes."""
        return self._thin.floor_window if self._thin is not None else inf

    @property
    def reordering_slack_s(self) -> float:
        """How much later than a round trip an acknowledgement may come, as measured."""
        return self._slack_s

    def is_silent(self, now: float, timeouts: float = 1.0) -> bool:
        """Return whether an acknowledgement is overdue by so many probe timeouts."""
        since = self._waiting_since
        if since is None or not self._rtt_initialized:
            return False
        return now - since > timeouts * self.get_probe_timeout()

    def holds(self, now: float) -> bool:
        """Return whether the path has lately held packets for long, and delivered them."""
        if self.rtts.min_s is None:  # A handshake as slow as this was held itself.
            return self._rtt_initialized and self._rtt_smoothed > SLOW_RTT_S
        return now - self._held_at < HOLDS_S

    def skip(self, number: int) -> None:
        """Take note that packet `number` will never be sent."""
        self._skipped.append(number)

    def on_blocked(self, now: float) -> None:
        """Take note that something had to wait for the window."""
        if self._thin is not None:
            self._thin.on_blocked(now)

    def on_packet_sent(self, *, packet: QuicSentPacket, space: QuicPacketSpace) -> None:
        """See `QuicPacketRecovery.on_packet_sent`."""
        super().on_packet_sent(packet=packet, space=space)
        self._largest_sent = max(self._largest_sent, packet.packet_number)
        if self._waiting_since is None and space.is_application_data and packet.is_ack_eliciting:
            self._waiting_since = packet.sent_time

    def on_ack_received(
        self, *, ack_rangeset: RangeSet, ack_delay: float, now: float, space: QuicPacketSpace
    ) -> None:
        """See `QuicPacketRecovery.on_ack_received`.

        Raises:
            QuicConnectionError: it acknowledges what was never sent; the connection must end.
        """
        self._check_was_sent(ack_rangeset)
        largest = ack_rangeset.bounds().stop - 1
        if not self._rtt_initialized and largest in self._given_up:
            self._start_rtt(self._given_up[largest], now)
        if space.is_application_data:
            newest = space.sent_packets.get(largest)
            self._sample_rtt(newest, ack_delay, now)
            self._note_hold(newest or self._given_up.get(largest), ack_delay, now)
            was_silent = self.is_silent(now, SILENT_TIMEOUTS)
            if self._thin is not None:
                self._thin.ack_delay_s = self.max_ack_delay
            if self._take_late_acks(ack_rangeset, now):
                self._pto_count = 0
            self._note_newest(ack_rangeset, space)
            if was_silent:
                self._restart(now)
        super().on_ack_received(
            ack_rangeset=ack_rangeset, ack_delay=ack_delay, now=now, space=space
        )
        if space.is_application_data:
            self._await(space)

    def get_loss_detection_time(self, *, amplification_limited: bool) -> float | None:
        """See `QuicPacketRecovery.get_loss_detection_time`."""
        time = super().get_loss_detection_time(amplification_limited=amplification_limited)
        is_probe = self._get_loss_space() is None and self.handshake_confirmed
        if time is not None and is_probe:
            timeout = PROBE_FACTOR * self.get_probe_timeout()
            gap = min(timeout * 2**self._pto_count, max(timeout, MAX_PROBE_GAP_S))
            time = self._time_of_last_sent_ack_eliciting_packet + gap
        return time

    def expire(self, now: float) -> None:
        """Count as in flight no more what a probe timeout has passed, if nothing is heard.

        Without this the window would stay full of what an outage has swallowed.
        """
        since = self._waiting_since
        if since is None or not self._rtt_initialized:
            return
        overdue_s = EXPIRE_RTTS * self._rtt_smoothed + self.max_ack_delay
        before = now - min(overdue_s, self.get_probe_timeout())
        if since > before:
            return
        for space in self.spaces:
            if not space.is_application_data:
                continue
            expired = []
            for packet in space.sent_packets.values():
                if packet.sent_time is None or packet.sent_time > before:
                    break
                if packet.in_flight:
                    packet.in_flight = False
                    expired.append(packet)
            self._cc.on_packets_expired(packets=expired)

    def on_heard_again(self, now: float) -> None:
        """Give up what is older than half a round trip: the first packet after a silence came.

        The link was there when it left; what left before that may be lost. Once in a silence:
        packets may come up while those on the way down are held.
        """
        self.is_heard = True
        before = now - self._rtt_smoothed / 2
        self._restart(now)
        for space in self.spaces:
            if space.is_application_data:
                old = [
                    packet
                    for packet in space.sent_packets.values()
                    if packet.sent_time is not None and packet.sent_time <= before
                ]
                self._on_packets_lost(congestion_event=False, now=now, packets=old, space=space)
                self._await(space)

    def on_path_changed(self, now: float) -> None:
        """Begin anew on another path: nothing of the old one's times holds (RFC 9000 9.4)."""
        if self._rtt_initialized:
            self._rtt_initial = self._rtt_smoothed
        self._rtt_initialized = False
        self._rtt_min = inf
        self._pto_count = 0
        self._slack_s = 0.0
        if self._thin is not None:
            self._thin.forget_path()
        self._restart(now)
        for space in self.spaces:
            if space.is_application_data:
                packets = list(space.sent_packets.values())
                self._on_packets_lost(congestion_event=False, now=now, packets=packets, space=space)
                self._await(space)

    def _await(self, space: QuicPacketSpace) -> None:
        """Note since when an acknowledgement is awaited."""
        self._waiting_since = next(
            (
                packet.sent_time
                for number, packet in space.sent_packets.items()
                if number > space.largest_acked_packet and packet.is_ack_eliciting
            ),
            None,
        )

    def _restart(self, now: float) -> None:
        if self._thin is not None:
            self._thin.restart(now)
            self._pacer.update_rate(
                congestion_window=self._cc.congestion_window, smoothed_rtt=self._rtt_smoothed
            )

    def _check_was_sent(self, ack_rangeset: RangeSet) -> None:
        largest = ack_rangeset.bounds().stop - 1
        if largest > self._largest_sent or any(
            number in acked for number in self._skipped for acked in ack_rangeset
        ):
            raise QuicConnectionError(
                error_code=QuicErrorCode.PROTOCOL_VIOLATION,
                frame_type=QuicFrameType.ACK,
                reason_phrase="a packet is acknowledged that was never sent",
            )

    def _start_rtt(self, packet: QuicSentPacket, now: float) -> None:
        """Take a first sample from a packet that a probe has given up too early.

        On a path longer than the first guess all of the handshake's packets are given up so.
        """
        assert packet.sent_time is not None
        self._rtt_first_sample_time = now
        self._rtt_initialized = True
        self._rtt_latest = self._rtt_min = self._rtt_smoothed = now - packet.sent_time
        self._rtt_variance = self._rtt_latest / 2

    def _sample_rtt(self, newest: QuicSentPacket | None, ack_delay: float, now: float) -> None:
        if newest is None or not newest.is_ack_eliciting or newest.sent_time is None:
            return
        rtt_s = now - newest.sent_time
        if ack_delay > self.max_ack_delay:
            return  # Said again, since it was lost or late the first time.
        without_delay_s = rtt_s - ack_delay
        # A peer that exaggerates its delay must not make the path look shorter than it is.
        lowest_s = min(rtt_s, self.rtts.min_s or without_delay_s)
        self.rtts.add(now, max(without_delay_s, lowest_s))
        self._slack_s -= SLACK_DECAY * self._slack_s

    def _note_hold(self, newest: QuicSentPacket | None, ack_delay: float, now: float) -> None:
        """Take note that something is acknowledged again, and whether it was held on the way."""
        if self.rtts.min_s is not None and self._held_at == -inf:
            self._held_at = now if self.rtts.min_s > SLOW_RTT_S else now - HOLDS_S
        if newest is None:
            return
        self.is_heard = False
        if newest.sent_time is None or ack_delay > self.max_ack_delay:
            return  # It came long ago; it is what told of it that was lost.
        least_s = self.rtts.min_s if self.rtts.min_s is not None else self._rtt_smoothed
        late_s = now - newest.sent_time - ack_delay - least_s
        if late_s > max(HELD_S, HELD_RTTS * least_s):
            self._held_at = now

    def _take_late_acks(self, ack_rangeset: RangeSet, now: float) -> bool:
        """Take back what the loss of packets did that are acknowledged after all."""
        forget_before = now - max(REMEMBERED_S, REMEMBERED_RTTS * self._rtt_smoothed)
        while self._given_up:
            number, packet = next(iter(self._given_up.items()))
            assert packet.sent_time is not None
            if packet.sent_time > forget_before and len(self._given_up) <= REMEMBERED_PACKETS:
                break
            del self._given_up[number]
        late = [
            number for number in self._given_up if any(number in acked for acked in ack_rangeset)
        ]
        for number in late:
            packet = self._given_up.pop(number)
            assert packet.sent_time is not None
            late_s = now - packet.sent_time - self._rtt_smoothed
            # No more than a round trip, or a peer could stretch the detection at will.
            self._slack_s = min(max(self._slack_s, late_s), self._rtt_smoothed)
            self._raise_newest(packet)
            if self._thin is not None:
                self._thin.on_spurious_loss(packet)
            self._on_late_ack(packet)
        return bool(late)

    def _note_newest(self, ack_rangeset: RangeSet, space: QuicPacketSpace) -> None:
        """Note up to where the packets of each codepoint are acknowledged."""
        numbers = list(space.sent_packets)
        for acked in ack_rangeset:
            first, last = bisect_left(numbers, acked.start), bisect_left(numbers, acked.stop)
            for number in numbers[first:last]:
                self._raise_newest(space.sent_packets[number])

    def _raise_newest(self, packet: QuicSentPacket) -> None:
        codepoint = codepoint_of(packet)
        newest = self._newest_acked.get(codepoint, -1)
        self._newest_acked[codepoint] = max(newest, packet.packet_number)

    def _loss_delay(self) -> float:
        if not self._rtt_initialized:
            return TIME_THRESHOLD * self._rtt_initial
        return max(
            TIME_THRESHOLD * max(self._rtt_smoothed, self._rtt_latest),
            self._rtt_smoothed + self._slack_s,
            GRANULARITY_S,
        )

    def _detect_loss(self, *, now: float, space: QuicPacketSpace) -> None:
        """Declare lost what is older than something acknowledged, and than the threshold."""
        if not space.is_application_data:
            super()._detect_loss(now=now, space=space)
            return
        delay = self._loss_delay()
        lost = []
        space.loss_time = None
        for number, packet in space.sent_packets.items():
            if number > space.largest_acked_packet:
                break
            assert packet.sent_time is not None
            is_overtaken = number < self._newest_acked.get(codepoint_of(packet), -1)
            lost_at = packet.sent_time + delay + (0.0 if is_overtaken else OTHER_QUEUE_S)
            if lost_at <= now:
                lost.append(packet)
                continue
            space.loss_time = min(lost_at, space.loss_time or lost_at)
            if is_overtaken:
                break  # All later ones have longer.
        self._on_packets_lost(now=now, packets=lost, space=space)

    def _on_packets_lost(
        self,
        *,
        congestion_event: bool = True,
        now: float,
        packets: Iterable[QuicSentPacket],
        persistent_congestion: bool = False,
        space: QuicPacketSpace,
    ) -> None:
        packets = list(packets)
        for packet in packets:
            self._given_up[packet.packet_number] = packet
        self.lost_at = now
        super()._on_packets_lost(
            congestion_event=congestion_event,
            now=now,
            packets=packets,
            persistent_congestion=persistent_congestion,
            space=space,
        )
