"""What SwiftQueue may spend: bytes in the classic queue, and copies."""

from eloquent.swiftqueue.records import Queue

SHARE_WINDOW_S = 5.0
"The share of C is taken over so long,"
SLICE_S = 0.5
"in slices of this length: so over up to one slice more."
C_BYTES_PER_S = 40_000
C_SHARE = 0.5
"""So much may go into C: the larger of a rate and of a share of the flow's own bytes.

A router gives C a tenth of the link while L is full (RFC 9332 section 4.2.2), and there the
classic flows stand that have no choice. A token stream in C (5 to 20 kB/s) is to them what name
lookups and other requests are; twice the most that `thin` takes as its floor is still that. A flow
that fills its window is no guest any more. The part of it that goes into C is ruled by C's own
drops, which Prague answers as a classic flow does; with half of its bytes left in L it also
answers the marks there, so it takes no more in all than it would in L, and no flow can make C its
queue."""

_SLICES = round(SHARE_WINDOW_S / SLICE_S) + 1


class ClassicShare:
    """The bytes of a flow and those in C, over the last `SHARE_WINDOW_S`."""

    __slots__ = ("_all", "_all_sum", "_c", "_c_sum", "_slice")

    def __init__(self) -> None:
        self._all = [0] * _SLICES
        self._c = [0] * _SLICES
        self._all_sum = self._c_sum = 0
        self._slice = 0

    @property
    def share(self) -> float:
        """C's share of the bytes, 0 to 1, by the last packet sent."""
        return self._c_sum / self._all_sum if self._all_sum else 0.0

    def allows(self, now: float, size: int) -> bool:
        """Return whether a packet of `size` bytes may go into C at `now`."""
        self._turn(now)
        most = max(C_BYTES_PER_S * SHARE_WINDOW_S, C_SHARE * (self._all_sum + size))
        return self._c_sum + size <= most

    def on_sent(self, now: float, size: int, queue: Queue) -> None:
        """Take note of a packet that left."""
        self._turn(now)
        place = self._slice % _SLICES
        self._all[place] += size
        self._all_sum += size
        if queue is Queue.C:
            self._c[place] += size
            self._c_sum += size

    def _turn(self, now: float) -> None:
        """Forget what has left the window."""
        current = int(now / SLICE_S)
        for step in range(min(current - self._slice, _SLICES)):
            place = (current - step) % _SLICES
            self._all_sum -= self._all[place]
            self._c_sum -= self._c[place]
            self._all[place] = self._c[place] = 0
        self._slice = max(current, self._slice)


class CopyBudget:
    """A token bucket that packets fill: at most `share` copies a packet, `most` at once."""

    __slots__ = ("_most", "_share", "_tokens")

    def __init__(self, share: float, most: float) -> None:
        self._share = share
        self._most = self._tokens = most

    @property
    def has_copy(self) -> bool:
        """Whether there is one to spend."""
        return self._tokens >= 1.0

    def on_packet(self) -> None:
        """Take note of a packet that is no copy."""
        self._tokens = min(self._tokens + self._share, self._most)

    def spend(self) -> None:
        """Take note of a copy; the bucket is never overdrawn."""
        self._tokens = max(self._tokens - 1.0, 0.0)
