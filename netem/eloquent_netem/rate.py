"""Rate: when a link can take the next packet, and when that packet has left it."""

from typing import Protocol


class Rate(Protocol):
    """The capacity of a link; calls come in order of time."""

    def ready_from(self, now: float) -> float:
        """Return the first time, `now` or later, at which service of a packet can begin."""

    def departure(self, start: float, size: int) -> float:
        """Return when a packet of `size` bytes, whose service begins at `start`, has left.

        `start` is what `ready_from` returned; the packet uses the capacity up to then.
        """


class UnlimitedRate:
    """Takes no time."""

    def ready_from(self, now: float) -> float:
        """See `Rate.ready_from`."""
        return now

    def departure(self, start: float, size: int) -> float:
        """See `Rate.departure`."""
        return start


class FixedRate(UnlimitedRate):
    """A constant number of bits per second."""

    def __init__(self, bits_per_s: float) -> None:
        if bits_per_s <= 0:
            raise ValueError(f"a rate is above 0 bit/s, not {bits_per_s}")
        self._seconds_per_byte = 8 / bits_per_s

    def departure(self, start: float, size: int) -> float:
        """See `Rate.departure`."""
        return start + size * self._seconds_per_byte
