"""What one connection knows of its path; all its senders share it."""

from collections.abc import Callable
from math import inf

from eloquent.core.beat import BeatLimit
from eloquent.core.counts import LinkCounts

LOSS_WEIGHT = 1 / 64
"Weight of one bundle's fate in the loss estimate: a memory of about 64 bundles."

LOSS_MEMORY_BUNDLES = 800
"A path counts as lossy until so many bundles have passed since the last loss."

UNKNOWN_COPIES = 28
"So many bundles of a new path are repeated, before the lack of losses says something."

PAIR_WEIGHT = 1 / 8
BURSTY_ABOVE = 0.6
"""If more than this share of the pairs that lose one bundle lose both, losses come in bursts. With
independent losses of a share p it is p / (2 - p): a ninth at 20 %."""


class Path:
    """Round-trip time, window, queue and losses, as the connection measures them."""

    def __init__(self, srtt_s: float = 0.1) -> None:
        self.srtt_s = srtt_s
        "Smoothed round-trip time in seconds; before the first sample QUIC's initial guess."
        self.min_rtt_s = srtt_s
        "The round-trip time without queues."
        self.recent_rtt_s = inf
        "That of the last round trip, which falls sooner than the smoothed one."
        self.ack_delay_s = 0.025
        "How long the peer may delay an acknowledgement."
        self.is_silent = False
        "Whether an acknowledgement was overdue when the last bundle left."
        self.probe_timeout_s = 3 * srtt_s
        "An acknowledgement that takes longer is overdue (RFC 9002 section 6.2.1)."
        self.window_bytes: int | None = None
        "The congestion window; None: nothing binds."
        self.floor_bytes_per_s = inf
        "What random losses leave of it."
        self.used_bytes = 40
        "What of the packet being written is not a bundle's."
        self.padded_bytes = 0
        "Smaller packets are padded to this size now."
        self.target_bytes = 0
        "The size that the packet being written should have."
        self.has_queue = False
        "Whether packets wait in a queue on the way, ours or others'."
        self.holds = False
        "Whether the path has lately held packets for long, and then delivered them."
        self.waiting_since: float | None = None
        "When the first packet left that is newer than all that is acknowledged."
        self.beats = BeatLimit()
        "What beats through an outage may cost; a server's connections share one."
        self.counts = LinkCounts()
        "What whoever runs the server is told; its connections share one."
        self.is_limited = False
        "Whether a sender would have sent more, had the window been larger."
        self.loss = 0.0
        "Share of recent bundles that were lost, exponentially weighted."
        self.both_lost = 0.0
        "Share of the pairs that lost a bundle which lost both, exponentially weighted."
        self.is_timed = False
        "Whether the reader is to say when bundles arrive."
        self.has_two_queues = False
        "Whether the packets' marks choose between two queues, so that a copy may overtake."
        self.is_classic = False
        "Whether the bundle whose fate is being told was meant for the slower of them."
        self.wants_copy: Callable[[float], bool] | None = None
        "Whether a bundle that leaves at a time should be repeated at once; None: never."
        self.blocked_at = float("-inf")
        "When a bundle that was due last had to wait for the congestion window or the pacer."
        self._bundles = self._lossy_until = self._copies = self._losses = 0
        "`_losses`: of those that make the path lossy, how many have not proved wrong."

    @property
    def is_lossy(self) -> bool:
        """Whether packets are being lost, so that repeating one is worth its cost."""
        return self._bundles < self._lossy_until

    @property
    def is_unknown(self) -> bool:
        """Whether it is too early to say that nothing is lost."""
        return self._copies < UNKNOWN_COPIES

    @property
    def is_bursty(self) -> bool:
        """Whether two bundles that leave together share their fate."""
        return self.both_lost > BURSTY_ABOVE

    @property
    def bytes_per_s(self) -> float | None:
        """What the congestion window lets through; None: whatever comes."""
        if self.window_bytes is None:
            return None
        return self.window_bytes / (min(self.srtt_s, self.recent_rtt_s) + self.ack_delay_s)

    def is_blocked(self, now: float) -> bool:
        """Return whether the congestion window has bound within the last round trip."""
        return now - self.blocked_at <= self.srtt_s

    def silence_s(self, now: float) -> float:
        """Return how long an acknowledgement has been overdue; 0 if none is."""
        if self.waiting_since is None:
            return 0.0
        return max(0.0, now - self.waiting_since - self.probe_timeout_s)

    def on_outcome(self, *, lost: bool) -> None:
        """Take the fate of one bundle into the loss estimate.

        A loss while a queue stands is congestion: it must not make us send more, and says that the
        losses before it may have been congestion too. One in the classic queue says nothing either
        way: there a router drops for congestion, and round trips by the other queue show none.
        """
        self._bundles += 1
        if not lost:
            self.loss -= LOSS_WEIGHT * self.loss
        elif self.has_queue:
            self._lossy_until = self._bundles
        elif not self.is_classic:
            self.loss += LOSS_WEIGHT * (1 - self.loss)
            self._note_loss()

    def on_loss_elsewhere(self) -> None:
        """Take note of a loss in the handshake or on the way up: bundles may be lost too."""
        if not self.has_queue:
            self._note_loss()

    def _note_loss(self) -> None:
        if not self.is_lossy:
            self._losses = 0
        self._losses += 1
        self._lossy_until = self._bundles + LOSS_MEMORY_BUNDLES

    def note_copy(self) -> None:
        """Take note that a bundle is repeated."""
        self._copies += 1

    def on_late(self) -> None:
        """Take back a loss: the bundle has come after all."""
        if self.is_classic:
            return
        self.loss = max(0.0, self.loss - LOSS_WEIGHT)
        self._losses -= 1
        if self._losses <= 0:
            self._lossy_until = self._bundles

    def on_pair(self, first_lost: bool, second_lost: bool) -> None:
        """Take the fate of two bundles that left together."""
        if first_lost or second_lost:
            self.both_lost += PAIR_WEIGHT * ((first_lost and second_lost) - self.both_lost)
