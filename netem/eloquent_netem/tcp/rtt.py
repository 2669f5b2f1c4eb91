"""The round-trip time and the retransmission timeout, as Linux estimates them (RFC 6298).

Source: `tcp_rtt_estimator` and `tcp_set_rto` in net/ipv4/tcp_input.c. Linux differs from the RFC:
the variance never counts for less than 200 ms, so that the timeout is at least the smoothed
round trip plus 200 ms, and a falling round trip raises the variance by an eighth only.
"""

RTO_MIN_S = 0.2
RTO_MAX_S = 120.0
RTO_INITIAL_S = 1.0
"Before the first sample, and for SYNs (RFC 6298 section 2.1)."


class RttEstimator:
    """Smoothed and least round-trip time and the timeout, in seconds."""

    def __init__(self) -> None:
        self.srtt_s: float | None = None
        self.rto_s = RTO_INITIAL_S
        self.min_s = float("inf")
        "Of the connection's life; Linux forgets what is older than 300 s."
        self._deviation_s = 0.0
        "Four times the mean deviation."
        self._deviation_max_s = RTO_MIN_S
        self._variance_s = 0.0
        self._round_end = 0

    def sample(self, rtt_s: float, *, una: int, nxt: int) -> None:
        """Take a measurement; `una` and `nxt` tell rounds apart. It ends any backoff."""
        self.min_s = min(self.min_s, rtt_s)
        if self.srtt_s is None:
            self.srtt_s = rtt_s
            self._deviation_s = 2 * rtt_s
            self._variance_s = self._deviation_max_s = max(self._deviation_s, RTO_MIN_S)
            self._round_end = nxt
        else:
            self._update(rtt_s, self.srtt_s, una, nxt)
        self.rto_s = min(self.srtt_s + self._variance_s, RTO_MAX_S)

    def back_off(self) -> None:
        """Double the timeout after it has struck."""
        self.rto_s = min(2 * self.rto_s, RTO_MAX_S)

    def _update(self, rtt_s: float, srtt_s: float, una: int, nxt: int) -> None:
        error_s = rtt_s - srtt_s
        self.srtt_s = srtt_s + error_s / 8
        change_s = abs(error_s) - self._deviation_s / 4
        if error_s < 0 and change_s > 0:
            change_s /= 8
        self._deviation_s += change_s
        self._deviation_max_s = max(self._deviation_max_s, self._deviation_s)
        self._variance_s = max(self._variance_s, self._deviation_max_s)
        if una > self._round_end:
            if self._deviation_max_s < self._variance_s:
                self._variance_s -= (self._variance_s - self._deviation_max_s) / 4
            self._round_end = nxt
            self._deviation_max_s = RTO_MIN_S
