"""Padding: how large a packet must look so that its size does not tell what is in it.

A bundle's size is the sum of a few tokens' lengths, and a sequence of such sums names the topic of
an answer (Whisper Leak, arXiv 2511.03675). `docs/design.md`, "Padding", has what remains visible.
"""

SMALLEST_BYTES = 112
"""The smallest size. With 4-byte tokens, 30 a second and 100 ms of round trip a bundle's packet has
60 bytes, so this leaves room for longer tokens and costs 53 bytes a token."""

HOLD_S = 2.0
"A size stays in use at least this long after it was last needed, and at most twice as long."


class Padding:
    """Chooses the sizes of one connection's packets.

    Sizes are `SMALLEST_BYTES` times a power of two. A step up is seen, so it must be rare: the size
    in use falls only after `hold_s` seconds in which nothing needed it. When it may fall is a
    matter of time alone. A full packet bounds what comes out in the caller's hands.
    """

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._span = 0
        "Which span of `hold_s`, counted from time 0, `_in_span` is of."
        self._before = SMALLEST_BYTES
        "The largest size needed in the span before."
        self._in_span = SMALLEST_BYTES

    def padded_size(self, size: int, now: float) -> int:
        """Return the bytes to which a packet of `size` bytes, sent at `now`, must be padded."""
        span = int(now // self._hold_s)
        if span != self._span:
            self._before = self._in_span if span == self._span + 1 else SMALLEST_BYTES
            self._in_span = SMALLEST_BYTES
            self._span = span
        while self._in_span < size:
            self._in_span *= 2
        return max(self._before, self._in_span)
