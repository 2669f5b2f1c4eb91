"""Prague: the congestion controller that ECT(1) promises (RFC 9331 section 4.3).

A scalable controller answers the *share* of marked packets, often and a little, where a classic
one halves its window at each sign of congestion. Once a round trip

    F = packets marked CE / packets that came marked at all
    a += (F - a) / 16

and on a mark, once a round trip, `window -= window * a / 2`. The window opens by one full packet
in a round trip, for what was acknowledged without CE, scaled by (srtt / max(srtt, 25 ms))^2, so
that flows over short paths do not crowd out others (draft-briscoe-iccrg-prague-congestion-control
section 2.4.4). The first mark ends slow start; up to it a is 1, so that it halves the window.

What is lost is judged by the controller that Prague is put on, and so is random loss; Prague
replaces that one's growth only. When ECN turns out not to work the inner one goes on alone, from
the window that is reached.
"""

from collections.abc import Callable, Iterable
from typing import Any

from aioquic.quic.congestion.base import (
    QuicCongestionControl,
    create_congestion_control,
    register_congestion_control,
)
from aioquic.quic.packet_builder import QuicSentPacket

from eloquent.quic.thin import THIN

SHARE_WEIGHT = 1 / 16
MIN_VIRTUAL_RTT_S = 0.025
MIN_WINDOW_PACKETS = 2
MIN_WINDOW_BYTES = 500
"The window's floor is two of the flow's own packets, but no less than this."

PACKET_SIZE_WEIGHT = 1 / 8

SLOW_START_GAIN = 2.0
SAVED_UP_PACKETS = 0.5
"What silence saves up, in full packets: a few small ones need no timer, and make no burst."
MAX_CATCH_UP_S = 0.002
"So much of a late timer's delay is made good for; event loops round to a millisecond."


class Prague(QuicCongestionControl):
    """Prague over `inner`, which keeps the window, the bytes in flight and the threshold."""

    def __init__(self, inner: QuicCongestionControl, *, max_datagram_size: int) -> None:
        self.inner = inner
        self._full_packet_bytes = max_datagram_size
        self._packet_bytes = float(max_datagram_size)
        self._share = 1.0
        self._has_seen_marks = False
        self._marked = 0
        self._congested = 0
        self._acked_bytes = 0
        self._newest_sent_s = float("-inf")
        self._round_from_s = float("-inf")
        self._reduced_at_s = float("-inf")
        self._recovering_from_s = float("-inf")
        "After a loss the window does not open for what was sent before (RFC 9002 section 7.3.2)."
        self._peak_bytes = 0
        "Most bytes in flight in this round,"
        self._last_peak_bytes = 0
        "and in the one before."
        self._growth = 0.0

    @property
    def congestion_window(self) -> int:
        """How many bytes may be in flight."""
        return self.inner.congestion_window

    @congestion_window.setter
    def congestion_window(self, window: int) -> None:
        self.inner.congestion_window = window

    @property
    def bytes_in_flight(self) -> int:
        """How many bytes are in flight."""
        return self.inner.bytes_in_flight

    @bytes_in_flight.setter
    def bytes_in_flight(self, size: int) -> None:
        self.inner.bytes_in_flight = size

    @property
    def ssthresh(self) -> int | None:
        """The window, in bytes, up to which slow start goes; None: up to the first sign."""
        return self.inner.ssthresh

    @ssthresh.setter
    def ssthresh(self, threshold: int | None) -> None:
        self.inner.ssthresh = threshold

    @property
    def marked_share(self) -> float:
        """The smoothed share of packets marked CE, 0 to 1."""
        return self._share

    @property
    def pacing_gain(self) -> float:
        """How many windows may leave in a round trip."""
        return SLOW_START_GAIN if self._is_in_slow_start() else 1.0

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        """See `QuicCongestionControl`."""
        self.inner.on_packet_sent(packet=packet)
        self._packet_bytes += PACKET_SIZE_WEIGHT * (packet.sent_bytes - self._packet_bytes)
        self._peak_bytes = max(self._peak_bytes, self.inner.bytes_in_flight)

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        """See `QuicCongestionControl`; the window opens in `on_feedback`."""
        window, threshold = self.inner.congestion_window, self.inner.ssthresh
        self.inner.on_packet_acked(now=now, packet=packet)
        self.inner.congestion_window, self.inner.ssthresh = window, threshold
        assert packet.sent_time is not None
        self._newest_sent_s = max(self._newest_sent_s, packet.sent_time)
        if packet.sent_time > self._recovering_from_s:
            self._acked_bytes += packet.sent_bytes

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        """See `QuicCongestionControl`."""
        self.inner.on_packets_expired(packets=packets)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        """See `QuicCongestionControl`."""
        window = self.inner.congestion_window
        self.inner.on_packets_lost(now=now, packets=packets)
        if self.inner.congestion_window < window:
            self._reduced_at_s = self._recovering_from_s = now

    def on_persistent_congestion(self) -> None:
        """See `QuicCongestionControl`."""
        self.inner.on_persistent_congestion()

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """See `QuicCongestionControl`."""
        self.inner.on_rtt_measurement(now=now, rtt=rtt)

    def on_feedback(self, *, now: float, rtt: float, marked: int, congested: int) -> None:
        """Answer an ACK frame, after all that it acknowledges went to `on_packet_acked`.

        `marked` packets have come marked since the last one, `congested` of them with CE; `rtt`
        is the smoothed round-trip time in seconds.
        """
        acked_bytes, self._acked_bytes = self._acked_bytes, 0
        self._marked += marked
        self._congested += congested
        if acked_bytes and self._is_window_used() and not (congested and self._is_in_slow_start()):
            unmarked = 1 - congested / marked if marked else 1.0
            self._open(acked_bytes * unmarked, rtt)
        if self._newest_sent_s >= self._round_from_s:
            self._end_round(now)
        if congested and self._newest_sent_s > self._reduced_at_s:
            self._reduce(now)

    def _end_round(self, now: float) -> None:
        if self._marked and self._has_seen_marks:
            self._share += SHARE_WEIGHT * (self._congested / self._marked - self._share)
        self._marked = self._congested = 0
        self._round_from_s = now
        self._last_peak_bytes, self._peak_bytes = self._peak_bytes, self.inner.bytes_in_flight

    def _reduce(self, now: float) -> None:
        window = self.inner.congestion_window * (1 - self._share / 2)
        floor = max(MIN_WINDOW_PACKETS * self._packet_bytes, MIN_WINDOW_BYTES)
        self.inner.congestion_window = min(int(max(window, floor)), self.inner.congestion_window)
        self.inner.ssthresh = self.inner.congestion_window
        self._reduced_at_s = now
        self._has_seen_marks = True

    def _is_in_slow_start(self) -> bool:
        threshold = self.inner.ssthresh
        return threshold is None or self.inner.congestion_window < threshold

    def _is_window_used(self) -> bool:
        """Return whether it is the window that has held the flow back (RFC 9002 section 7.8)."""
        peak = max(self._peak_bytes, self._last_peak_bytes)
        if self._is_in_slow_start():
            return 2 * peak >= self.inner.congestion_window
        return peak + self._full_packet_bytes >= self.inner.congestion_window

    def _open(self, acked_bytes: float, rtt: float) -> None:
        window = self.inner.congestion_window
        if self._is_in_slow_start():
            self._growth += acked_bytes
        else:
            scale = (rtt / max(rtt, MIN_VIRTUAL_RTT_S)) ** 2
            self._growth += self._full_packet_bytes * acked_bytes / window * scale
        whole = int(self._growth)
        self._growth -= whole
        self.inner.congestion_window = window + whole

    def get_log_data(self) -> dict[str, Any]:
        """See `QuicCongestionControl`."""
        return self.inner.get_log_data()


class PraguePacer:
    """Lets full packets leave one at a time, evenly.

    The step of an L4S queue marks what waits for longer than a millisecond: at 20 Mbit/s the third
    full packet of a burst. A flow that sends in bursts of ten is marked so often that CUBIC takes
    five sixths of the link; sent evenly, each gets half. A timer's delay is made good for, so that
    coarse timers cost no rate.
    """

    def __init__(
        self, control: Prague, *, max_datagram_size: int, packet_size: Callable[[], int]
    ) -> None:
        self._control = control
        self._full_packet_bytes = max_datagram_size
        self._packet_size = packet_size
        self._budget_bytes = 1.0
        self._bytes_per_s: float | None = None
        self._updated_at = 0.0
        self._is_waiting = False

    def next_send_time(self, now: float) -> float | None:
        """Return None if a packet may leave at `now`, else the time when one may."""
        self._refill(now)
        self._is_waiting = self._bytes_per_s is not None and self._budget_bytes <= 0
        if not self._is_waiting:
            return None
        assert self._bytes_per_s is not None
        return now + (1 - self._budget_bytes) / self._bytes_per_s

    def update_after_send(self, now: float) -> None:
        """Charge the packet just written."""
        self._refill(now)
        self._budget_bytes -= self._packet_size()

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        """Pace at one congestion window per round trip, in slow start at two."""
        gain = self._control.pacing_gain
        self._bytes_per_s = gain * congestion_window / max(smoothed_rtt, 1e-6)

    def _refill(self, now: float) -> None:
        if self._bytes_per_s is not None and now > self._updated_at:
            earned = (now - self._updated_at) * self._bytes_per_s
            most = SAVED_UP_PACKETS * self._full_packet_bytes
            if self._is_waiting:
                most = max(most, MAX_CATCH_UP_S * self._bytes_per_s)
            self._budget_bytes = min(self._budget_bytes + earned, most)
        self._updated_at = max(now, self._updated_at)


def _prague(*, max_datagram_size: int) -> Prague:
    inner = create_congestion_control(THIN, max_datagram_size=max_datagram_size)
    return Prague(inner, max_datagram_size=max_datagram_size)


register_congestion_control("prague", _prague)
