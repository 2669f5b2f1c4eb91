"""How large packets may be: a path can begin to drop large ones in mid-turn while small ones pass.

A route may change to a tunnel, and the message that says so (ICMP, packet too big) is often
dropped. What is seen then is black-hole detection's sign (RFC 8899 section 4.3): several large
packets in a row are lost although the peer is heard. Packets shrink by a rung of `SIZES_BYTES`,
and now and then one of the next size up asks whether the path takes it again.
"""

SIZES_BYTES = (1200, 1000, 800, 512, 300)
"""Sizes of UDP payloads. 1200 is QUIC's least (RFC 9000 section 14): a path that takes less is no
path for QUIC, but an answer that is under way may well be finished over it."""

MISSED_IN_A_ROW = 3
"So many packets above the next rung, and none acknowledged, are no accident ..."

MISSED_RTTS = 3.0
MISSED_S = 0.5
"""... if nothing was heard of them for this long (`MISSED_RTTS` round trips, or `MISSED_S` if that
is more), although the peer was heard: a burst of loss is over sooner."""

PROBE_FIRST_S = 10.0
PROBE_GROWTH = 2.0
PROBE_MAX_S = 600.0
"A larger size is tried after these waits, each twice the last (RFC 8899 asks for 600 s at most)."


class PacketSize:
    """The largest UDP payload to send, in bytes, as the fate of packets teaches it."""

    def __init__(self) -> None:
        self._rung = 0
        self._missed = 0
        "How many large packets were sent since one was acknowledged."
        self._missed_since = 0.0
        "When the first of them was."
        self._heard_at = float("-inf")
        self._probe_at = float("inf")
        self._probe_wait_s = PROBE_FIRST_S

    @property
    def bytes(self) -> int:
        """What a packet may be now."""
        return SIZES_BYTES[self._rung]

    def next_bytes(self, now: float) -> int:
        """Return the size for the packets that leave at `now` (seconds): the next rung if tried."""
        return SIZES_BYTES[self._rung - 1] if self._rung and now >= self._probe_at else self.bytes

    def on_heard(self, now: float) -> None:
        """Take note that the peer was heard: the link lives."""
        self._heard_at = now

    def on_sent(self, size: int, now: float) -> None:
        """Take note of a packet; one that is larger than usual is a try, and waits for its ack."""
        if size > self.bytes:
            self._probe_wait_s = min(self._probe_wait_s * PROBE_GROWTH, PROBE_MAX_S)
            self._probe_at = now + self._probe_wait_s
        elif self._is_large(size):
            if not self._missed:
                self._missed_since = now
            self._missed += 1

    def on_acked(self, size: int) -> None:
        """Take note that a packet of this size arrived."""
        if size > self.bytes:
            self._go_to(_rung_for(size))
            self._probe_at = 0.0 if self._rung else float("inf")
            self._probe_wait_s = PROBE_FIRST_S
        elif self._is_large(size):
            self._missed = 0

    def shrink_if_missed(self, now: float, srtt_s: float) -> bool:
        """Go down by a rung if the path seems to drop large packets; return whether it does."""
        is_missed = (
            self._missed >= MISSED_IN_A_ROW
            and now >= self._missed_since + max(MISSED_S, MISSED_RTTS * srtt_s)
            and self._heard_at > self._missed_since + srtt_s
        )
        if is_missed:
            self._go_to(self._rung + 1)
            self._probe_at = now + self._probe_wait_s
        return is_missed

    def _is_large(self, size: int) -> bool:
        return self._rung + 1 < len(SIZES_BYTES) and size > SIZES_BYTES[self._rung + 1]

    def _go_to(self, rung: int) -> None:
        self._rung = rung
        self._missed = 0


def _rung_for(size: int) -> int:
    """Return the smallest size that holds a packet."""
    return max(rung for rung, largest in enumerate(SIZES_BYTES) if largest >= size)
