"""What one connection knows of its path; all its senders share it."""

LOSS_WEIGHT = 1 / 64
"Weight of one bundle's fate in the loss estimate: a memory of about 64 bundles."

LOSSY_ABOVE = 0.005
"Above this estimated share of lost bundles the path counts as lossy: one loss in some 70."


class Path:
    """Round-trip time and loss, as the connection measures them."""

    def __init__(self, srtt_s: float = 0.1) -> None:
        self.srtt_s = srtt_s
        "Smoothed round-trip time in seconds; before the first sample QUIC's initial guess."
        self.loss = 0.0
        "Share of recent bundles that were lost, exponentially weighted."
        self.blocked_at = float("-inf")
        "When a bundle that was due last had to wait for the congestion window or the pacer."

    @property
    def is_lossy(self) -> bool:
        """Whether bundles are being lost, so that repeating one is worth its cost."""
        return self.loss > LOSSY_ABOVE

    def is_blocked(self, now: float) -> bool:
        """Return whether the congestion window has bound within the last round trip."""
        return now - self.blocked_at <= self.srtt_s

    def on_outcome(self, *, lost: bool) -> None:
        """Take the fate of one bundle into the loss estimate."""
        self.loss += LOSS_WEIGHT * (lost - self.loss)
