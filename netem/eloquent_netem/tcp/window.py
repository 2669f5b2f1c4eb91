"""The congestion window, counted in packets, and what an application-limited flow may claim of it.

Sources: `tcp_cwnd_validate` in net/ipv4/tcp_output.c (RFC 7661 in spirit), net/ipv4/tcp_cong.c.
"""

from dataclasses import dataclass

INITIAL_WINDOW = 10
"Packets (RFC 6928)."

NO_THRESHOLD = 1 << 31


@dataclass(slots=True)
class Window:
    """The congestion window and what Linux remembers of its use."""

    cwnd: int = INITIAL_WINDOW
    ssthresh: int = NO_THRESHOLD
    count: int = 0
    "Acknowledged packets that have not yet raised the window."
    is_limited: bool = False
    "Whether the window held something back in the last round."
    packets_max: int = 0
    "The most packets under way in that round."
    round_end: int = 0
    used: int = 0
    "The most packets under way since the window was last full."
    full_at_s: float = 0.0
    "When it was last full, or last shrunk for want of use."

    @property
    def in_slow_start(self) -> bool:
        """Whether it may double in a round."""
        return self.cwnd < self.ssthresh

    @property
    def may_grow(self) -> bool:
        """Whether it is used enough to grow (`tcp_is_cwnd_limited`)."""
        return self.is_limited or (self.in_slow_start and self.cwnd < 2 * self.packets_max)

    @property
    def kept_ssthresh(self) -> int:
        """The threshold that remembers three quarters of the window (`tcp_current_ssthresh`)."""
        return max(self.ssthresh, (self.cwnd >> 1) + (self.cwnd >> 2))

    def slow_start(self, acked: int) -> int:
        """Grow by what was acknowledged up to the threshold; return what is left of it."""
        before = self.cwnd
        self.cwnd = min(self.cwnd + acked, self.ssthresh)
        return acked - (self.cwnd - before)

    def grow(self, packets_per_step: int, acked: int) -> None:
        """Grow by one for each `packets_per_step` acknowledged (`tcp_cong_avoid_ai`)."""
        if self.count >= packets_per_step:
            self.count = 0
            self.cwnd += 1
        self.count += acked
        steps, self.count = divmod(self.count, packets_per_step)
        self.cwnd += steps

    def validate(
        self,
        now: float,
        *,
        in_flight: int,
        packets_out: int,
        una: int,
        nxt: int,
        rto_s: float,
        is_open: bool,
    ) -> None:
        """Note after sending how full it is; unused for a timeout, it shrinks (RFC 2861)."""
        is_limited = in_flight >= self.cwnd
        if (
            una >= self.round_end
            or is_limited
            or (not self.is_limited and packets_out > self.packets_max)
        ):
            self.is_limited = is_limited
            self.packets_max = packets_out
            self.round_end = nxt
        if self.may_grow:
            self.used = 0
            self.full_at_s = now
            return
        self.used = max(self.used, packets_out)
        if now - self.full_at_s >= rto_s:
            used = max(self.used, INITIAL_WINDOW)
            if is_open and used < self.cwnd:
                self.ssthresh = self.kept_ssthresh
                self.cwnd = (self.cwnd + used) >> 1
            if is_open:
                self.used = 0
            self.full_at_s = now

    def restart(self, now: float, *, idle_s: float, rto_s: float) -> None:
        """Halve it for each timeout of idleness, down to the initial one (`tcp_cwnd_restart`)."""
        if idle_s <= rto_s:
            return
        self.ssthresh = self.kept_ssthresh
        floor = min(INITIAL_WINDOW, self.cwnd)
        while (idle_s := idle_s - rto_s) > 0 and self.cwnd > floor:
            self.cwnd >>= 1
        self.cwnd = max(self.cwnd, floor)
        self.full_at_s = now
        self.used = 0
