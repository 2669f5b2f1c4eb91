"""Padding: how large a packet must look so that its size does not tell what is in it.

A bundle's size is the sum of a few tokens' lengths, and a sequence of such sums names the topic of
an answer (Whisper Leak, arXiv 2511.03675). `docs/design.md`, "Padding", has what remains visible.
"""

import math
from bisect import bisect_left
from collections import deque

SIZES = (112, 160, 224, 320, 448, 640, 896, 1280)
"""The sizes that packets take, in bytes; the last is a full packet's or more. With 4-byte tokens,
30 a second and 100 ms of round trip, a bundle's packet has 60 bytes: the first size leaves room for
longer tokens and costs 53 bytes a token."""

HOLD_S = 2.0
"A size stays in use at least this long after it was last needed, and at most twice as long."

FLIGHT_RTTS = 1.1
"A bundle carries the tokens of this many round trips: it takes as long to hear that one arrived."

SLOT_S = 0.01
"Packets closer together than this carry the same tokens: one repeats the other."

HEADER_BYTES = 35
TOKEN_BYTES = 8
SPREAD_BYTES = 10
"""`n` tokens and their headers take less than `HEADER_BYTES + TOKEN_BYTES * n + SPREAD_BYTES *
sqrt(n)` in nearly all packets: in English text a token's event has 7 bytes, give or take 3."""


class Padding:
    """Chooses the sizes of one connection's packets.

    The least is what long tokens would need, as many as there are packets in flight: that number
    shows anyway. So it is rare that the content asks for more; a size once needed is then held for
    `hold_s`, so that steps are few. When it may fall is a matter of time alone.
    """

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._span = 0
        "Which span of `hold_s`, counted from time 0, `_in_span` is of."
        self._before = 0
        "Index of the largest size needed in the span before."
        self._in_span = 0
        self._sent_at: deque[float] = deque()
        "When packets left, those within `SLOT_S` of another left out."

    def padded_size(self, size: int, now: float, rtt_s: float) -> int:
        """Return the bytes to which a packet of `size` bytes, sent at `now`, must be padded.

        It may be more than a packet holds; then a full one is meant. A packet that is larger than
        the last of `SIZES` stays as it is.
        """
        span = int(now // self._hold_s)
        if span != self._span:
            self._before = self._in_span if span == self._span + 1 else 0
            self._in_span = 0
            self._span = span
        tokens = self._packets_in_flight(now, rtt_s)
        wanted = HEADER_BYTES + TOKEN_BYTES * tokens + SPREAD_BYTES * math.sqrt(tokens)
        needed = bisect_left(SIZES, max(size, wanted), hi=len(SIZES) - 1)
        self._in_span = max(self._in_span, needed)
        return SIZES[max(self._before, self._in_span)]

    def release(self) -> None:
        """Let go of the sizes held: the path has become too narrow for them."""
        self._before = self._in_span = 0

    def _packets_in_flight(self, now: float, rtt_s: float) -> int:
        if not self._sent_at or now - self._sent_at[-1] >= SLOT_S:
            self._sent_at.append(now)
        while len(self._sent_at) > 1 and self._sent_at[0] < now - FLIGHT_RTTS * rtt_s:
            self._sent_at.popleft()
        return len(self._sent_at)
