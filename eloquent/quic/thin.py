"""`thin`: the congestion controller of a flow of small packets (`docs/design.md`, "Congestion").

A token stream needs a few kilobytes a second. Two things must hold: when a queue fills, it yields
as any flow would; when packets vanish without a queue, as on radio, it does not collapse. The
window is in bytes, and what it does depends on what the round-trip time says about the queue.
"""

from collections import deque
from collections.abc import Iterable
from math import inf

from aioquic.quic.congestion.base import QuicCongestionControl, register_congestion_control
from aioquic.quic.packet_builder import QuicSentPacket

THIN = "thin"
"The controller's name in a QUIC configuration."

MIN_RTT_WINDOW_S = 30.0
"How long the smallest round-trip time is remembered, so that a change of route is forgotten."

PATH_RTT_MAX_S = 0.7
"No path is longer, not even a satellite's: what goes beyond it is a queue's."

MAX_RTT_WINDOW_S = 10.0
"How long the largest is."

RECENT_RTT_WINDOW_S = 0.2
RECENT_SAMPLES = 3
"The present round-trip time is the smallest of a round trip, at least of this time and so many."

QUEUE_MIN_S = 0.015
QUEUE_RTT_SHARE = 1 / 5
VARIATION_SHARE = 1 / 4
VARIATION_MAX_S = 0.1
QUEUE_RANGE_SHARE = 0.65
RANGE_MIN_S = 0.003
"""A queue stands when the present round trip is longer than the smallest by `QUEUE_MIN_S`, by
`QUEUE_RTT_SHARE` of it and, since radio links vary by themselves, by `VARIATION_SHARE` of what it
has varied lately, up to `VARIATION_MAX_S`. Who comes to a full queue has never seen it empty: so
also when it is longer, in the mean, by `QUEUE_RANGE_SHARE` of what it has varied, if that is more
than `RANGE_MIN_S`; mere jitter has its mean in the middle."""

INITIAL_WINDOW_PACKETS = 10
"Full packets, at the start and after an outage (RFC 9002 section 7.2)."

MIN_WINDOW_PACKETS = 2
MIN_WINDOW_BYTES = 320
"The least window: so many of the flow's own packets, and a packet with a little content."

QUEUE_GROWTH_PACKETS = 1 / 4
"With a queue the window grows by so much of an own packet in a round trip: many may do so at once."

CONGESTION_FACTOR = 0.5
"What is left of the window when loss comes with a queue (RFC 9002 section 7.3.2)."

YIELD_S = 30.0
YIELD_QUEUE_SHARE = 0.4
YIELD_QUEUE_S = 0.02
YIELD_FACTOR = 0.7
YIELD_FRAME_S = 0.1
"""The window also shrinks, once a round trip from the second on, while the queue is longer than
`YIELD_QUEUE_S` and the two shares above, or than `YIELD_QUEUE_SHARE` of what it was at the last
loss, for `YIELD_S`: many thin flows would keep it full otherwise. What stays is a packet in
`YIELD_FRAME_S`, at which text still flows."""

RANDOM_LOSS_FACTOR = 0.7
"What is left when loss comes without one, down to the floor."

FLOOR_BYTES_PER_S = 320_000 // 8
POLICED_BYTES_PER_S = 64_000 // 8
POLICED_LOSS = 0.3
"""Random loss leaves a rate of `FLOOR_BYTES_PER_S`. Above a measured loss of `POLICED_LOSS`, which
is what a policer looks like, it leaves `POLICED_BYTES_PER_S`."""

FLOOR_SLACK = 1.25
"The floor's window holds this many round trips: lost packets count until they are known as such."

CONGESTED_WEIGHT = 1 / 8
CONGESTED_ABOVE = 0.3
"""If more than this share of the recent losses came with a queue, all count as if they had: who
came to a full queue sees its length hardly vary."""

LOSS_WEIGHT = 1 / 64
SIZE_WEIGHT = 1 / 16
"Weights of one packet in the averages of loss and of packet size."


class RttHistory:
    """What round-trip times say about the queue; times in seconds, ACK delay taken out."""

    def __init__(self) -> None:
        self._lowest: deque[tuple[float, float]] = deque()
        "(time, sample) with rising samples: the first is the smallest of the window."
        self._highest: deque[tuple[float, float]] = deque()
        self._recent: deque[tuple[float, float]] = deque()

    @property
    def min_s(self) -> float | None:
        """The smallest round-trip time of the last `MIN_RTT_WINDOW_S`; None before the first."""
        return self._lowest[0][1] if self._lowest else None

    @property
    def recent_s(self) -> float | None:
        """The smallest round-trip time of about the last round trip; None before the first."""
        return min((rtt for _, rtt in self._recent), default=None)

    @property
    def queue_s(self) -> float:
        """How long packets wait in queues now, as far as the round-trip time tells."""
        if self.min_s is None or self.recent_s is None:
            return 0.0
        return self.recent_s - min(self.min_s, PATH_RTT_MAX_S)

    @property
    def has_queue(self) -> bool:
        """Whether a queue stands, by more than jitter explains."""
        if self.min_s is None:
            return False
        range_s = self._highest[0][1] - self.min_s
        mean_s = sum(rtt for _, rtt in self._recent) / len(self._recent)
        is_high = range_s > RANGE_MIN_S and mean_s - self.min_s > QUEUE_RANGE_SHARE * range_s
        return is_high or self.queue_s > self.limit_s(QUEUE_MIN_S)

    def limit_s(self, least_s: float) -> float:
        """Return from when on waiting is more than the path's own unsteadiness."""
        if self.min_s is None:
            return least_s
        range_s = min(VARIATION_SHARE * (self._highest[0][1] - self.min_s), VARIATION_MAX_S)
        return max(least_s, QUEUE_RTT_SHARE * self.min_s, range_s)

    def add(self, now: float, rtt_s: float) -> None:
        """Take one sample, measured at `now`."""
        while self._lowest and self._lowest[-1][1] >= rtt_s:
            self._lowest.pop()
        while self._highest and self._highest[-1][1] <= rtt_s:
            self._highest.pop()
        for samples, window_s in (
            (self._lowest, MIN_RTT_WINDOW_S),
            (self._highest, MAX_RTT_WINDOW_S),
            (self._recent, max(RECENT_RTT_WINDOW_S, rtt_s)),
        ):
            samples.append((now, rtt_s))
            least = RECENT_SAMPLES if samples is self._recent else 1
            while samples[0][0] < now - window_s and len(samples) > least:
                samples.popleft()

    def forget(self) -> None:
        """Begin anew: the path is another one."""
        for samples in (self._lowest, self._highest, self._recent):
            samples.clear()


class ThinControl(QuicCongestionControl):
    """A window in bytes for a flow of small packets.

    | | no queue | a queue stands |
    |---|---|---|
    | window binds | up to the first loss by what is acknowledged, then by a full packet a round \
    trip, as Reno's | by a quarter of an own packet a round trip |
    | loss | x 0.7, never below the floor | x 0.5, down to two own packets |

    Both once a round trip. A window that does not bind does not grow (RFC 9002 section 7.8).
    """

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self._full_packet_bytes = max_datagram_size
        self._initial_window = INITIAL_WINDOW_PACKETS * max_datagram_size
        self.congestion_window = self._initial_window
        self.rtts = RttHistory()
        self.ack_delay_s = 0.025
        "The peer's longest delay of acknowledgements: they keep packets in flight for longer."
        self._bound_at = -inf
        self._recovery_since = -inf
        self._packet_bytes = 100.0
        self._loss = 0.0
        self._growth_bytes = 0.0
        self._window_before = 0
        self._lost_in_episode: set[int] = set()
        self._peak_bytes = 0
        "The most in flight in this round trip,"
        self._last_peak_bytes = 0
        "and in the one before."
        self._round_from = -inf
        self._congested_share = 0.0
        self._queue_at_loss_s = inf
        self._yields_until = -inf
        self._stands = False
        "Whether the queue was too long at the end of the last round trip: jitter is not, twice."

    @property
    def loss(self) -> float:
        """Share of recent packets that were lost, exponentially weighted."""
        return self._loss

    @property
    def is_congested(self) -> bool:
        """Whether a queue stands on the way, or stood at enough of the recent losses."""
        return self.rtts.has_queue or self._congested_share > CONGESTED_ABOVE

    @property
    def min_window(self) -> int:
        """What congestion leaves at least, in bytes."""
        return max(MIN_WINDOW_BYTES, round(MIN_WINDOW_PACKETS * self._packet_bytes))

    @property
    def floor_window(self) -> int:
        """What random loss leaves at least, in bytes."""
        rate = POLICED_BYTES_PER_S if self._loss > POLICED_LOSS else FLOOR_BYTES_PER_S
        rtt_s = min(self.rtts.recent_s or 0.1, PATH_RTT_MAX_S) + self.ack_delay_s
        return max(self.min_window, round(FLOOR_SLACK * rate * rtt_s))

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        """Count a packet as in flight."""
        self.bytes_in_flight += packet.sent_bytes
        self._peak_bytes = max(self._peak_bytes, self.bytes_in_flight)
        if self.bytes_in_flight + packet.sent_bytes > self.congestion_window:
            self._bound_at = max(self._bound_at, packet.sent_time or 0.0)
        self._packet_bytes += SIZE_WEIGHT * (packet.sent_bytes - self._packet_bytes)

    def on_blocked(self, now: float) -> None:
        """Take note that something had to wait for the window."""
        self._bound_at = now

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        """Grow, if the window bound while this packet was under way."""
        self.bytes_in_flight -= packet.sent_bytes
        self._loss -= LOSS_WEIGHT * self._loss
        if packet.sent_time is not None and packet.sent_time >= self._round_from:
            self._end_round(now)
        if packet.sent_time is None or packet.sent_time <= self._recovery_since:
            return
        if self._bound_at < packet.sent_time or self._must_yield(now):
            return
        share = packet.sent_bytes / self.congestion_window
        if self.is_congested:
            self._growth_bytes += QUEUE_GROWTH_PACKETS * self._packet_bytes * share
        elif self.ssthresh is None or self.congestion_window < self.ssthresh:
            self._growth_bytes += packet.sent_bytes
        else:
            self._growth_bytes += self._full_packet_bytes * share
        self.congestion_window += int(self._growth_bytes)
        self._growth_bytes %= 1

    def _end_round(self, now: float) -> None:
        """Once a round trip: keep the queue below what it was when it last overflowed."""
        self._round_from = now
        used = min(self.congestion_window, max(self._peak_bytes, self._last_peak_bytes))
        self._last_peak_bytes, self._peak_bytes = self._peak_bytes, self.bytes_in_flight
        did_stand, self._stands = self._stands, self._must_yield(now)
        if did_stand and self._stands:
            frames = self._packet_bytes * (self.rtts.recent_s or 0.0) / YIELD_FRAME_S
            least = max(self.min_window, round(frames))
            target = max(round(YIELD_FACTOR * used), least)
            self.congestion_window = min(self.congestion_window, target)

    def _must_yield(self, now: float) -> bool:
        limit_s = self.rtts.limit_s(YIELD_QUEUE_S)
        if now < self._yields_until:
            share_s = YIELD_QUEUE_SHARE * self._queue_at_loss_s
            limit_s = min(limit_s, max(share_s, QUEUE_MIN_S))
        return self.rtts.queue_s > limit_s

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        """Count packets as in flight no more, without calling them lost."""
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        """Shrink, once a round trip."""
        lost = list(packets)
        for packet in lost:
            self.bytes_in_flight -= packet.sent_bytes
            self._loss += LOSS_WEIGHT * (1 - self._loss)
        newest = max(packet.sent_time or 0.0 for packet in lost)
        if newest <= self._recovery_since:
            self._lost_in_episode.update(packet.packet_number for packet in lost)
            return
        self._congested_share += CONGESTED_WEIGHT * (self.rtts.has_queue - self._congested_share)
        self._recovery_since = now
        self._window_before = self.congestion_window
        self._lost_in_episode = {packet.packet_number for packet in lost}
        if self.is_congested:
            # What was not used is no measure of what the path bears (RFC 7661 section 4.4.1).
            used = min(self.congestion_window, max(self._peak_bytes, self._last_peak_bytes))
            target = min(
                max(round(CONGESTION_FACTOR * used), self.min_window), self.congestion_window
            )
            self._queue_at_loss_s = self.rtts.queue_s
            self._yields_until = now + YIELD_S
        else:
            # On a long path the floor may be above the initial window.
            target = max(round(RANDOM_LOSS_FACTOR * self.congestion_window), self.floor_window)
        self.congestion_window = target
        self.ssthresh = self.congestion_window

    def on_spurious_loss(self, packet: QuicSentPacket) -> None:
        """Take back what the loss of a packet did that has arrived after all (RFC 4015)."""
        self._loss = max(0.0, self._loss - LOSS_WEIGHT)
        if packet.packet_number not in self._lost_in_episode:
            return
        self._lost_in_episode.remove(packet.packet_number)
        if not self._lost_in_episode:
            self.congestion_window = max(self.congestion_window, self._window_before)
            self._recovery_since = -inf

    def on_persistent_congestion(self) -> None:
        """Do nothing more: `restart` decides what follows a silence."""

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """Do nothing: `rtts` has the samples, with the ACK delay taken out."""

    def restart(self, now: float) -> None:
        """Begin again after a silence: with the initial window, as a new connection would.

        Unless there was congestion lately: then the silence may be its doing.
        """
        if now >= self._yields_until:
            self.congestion_window = max(self.congestion_window, self._initial_window)
            self._recovery_since = -inf
        self._lost_in_episode.clear()

    def forget_path(self) -> None:
        """Begin anew on another path."""
        self.congestion_window = self._initial_window
        self.ssthresh = None
        self._recovery_since = self._yields_until = self._bound_at = -inf
        self._congested_share = self._loss = 0.0
        self._lost_in_episode.clear()
        self.rtts.forget()


register_congestion_control(THIN, ThinControl)
