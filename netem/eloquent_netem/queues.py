"""Queues: what waits at a bottleneck, in which order it leaves, what is dropped or marked."""

from collections import deque
from math import sqrt
from typing import Protocol

from eloquent_netem.packet import Ecn, Packet


class Queue(Protocol):
    """A queue discipline; times are in seconds and never go back.

    There is no `__len__` on purpose: an empty queue must not be false.
    """

    @property
    def packets(self) -> int:
        """How many packets wait."""

    @property
    def drops(self) -> int:
        """How many packets it has dropped, at either end."""

    def enqueue(self, now: float, packet: Packet) -> bool:
        """Take a packet (its `entered_s` is `now`); False: dropped."""

    def dequeue(self, now: float) -> Packet | None:
        """Give out the next packet, perhaps marked, or None: all that was left has been dropped.

        It is called only while `packets` is above 0.
        """


class _Fifo:
    """What waits in one line, up to a limit."""

    def __init__(self, limit_packets: int | None, limit_bytes: int | None = None) -> None:
        self._limit_packets = limit_packets
        self._limit_bytes = limit_bytes
        self._waiting: deque[Packet] = deque()
        self._bytes = 0
        self._drops = 0

    @property
    def packets(self) -> int:
        """See `Queue.packets`."""
        return len(self._waiting)

    @property
    def drops(self) -> int:
        """See `Queue.drops`."""
        return self._drops

    def enqueue(self, now: float, packet: Packet) -> bool:
        """See `Queue.enqueue`."""
        has_room = (self._limit_packets is None or len(self._waiting) < self._limit_packets) and (
            self._limit_bytes is None or self._bytes + packet.size <= self._limit_bytes
        )
        if not has_room:
            self._drops += 1
            return False
        self._waiting.append(packet)
        self._bytes += packet.size
        return True

    def _take_head(self) -> Packet:
        packet = self._waiting.popleft()
        self._bytes -= packet.size
        return packet


class DropTail(_Fifo):
    """First in, first out; full is full."""

    def __init__(self, *, limit_packets: int | None = None, limit_bytes: int | None = None) -> None:
        super().__init__(limit_packets, limit_bytes)

    def dequeue(self, now: float) -> Packet | None:
        """See `Queue.dequeue`."""
        return self._take_head()


class CoDel(_Fifo):
    """Controlled delay (RFC 8289, pseudo-code of section 5): drops at the head, by sojourn time.

    When every packet of an interval has waited for `target_s` or more, it drops one, then more and
    more often, until one has waited for less. With `ecn`, packets that can be marked are marked
    instead. Times are in seconds; a queue of at most one `mtu_bytes` is left alone.
    """

    def __init__(
        self,
        *,
        limit_packets: int = 1000,
        target_s: float = 0.005,
        interval_s: float = 0.1,
        ecn: bool = False,
        mtu_bytes: int = 1500,
    ) -> None:
        if limit_packets < 1 or target_s < 0 or interval_s <= 0:
            raise ValueError(
                "CoDel needs a limit of 1 packet or more, a target of at least 0 s and an "
                f"interval above 0 s, not {limit_packets}, {target_s} and {interval_s}"
            )
        super().__init__(limit_packets)
        self._target_s = target_s
        self._interval_s = interval_s
        self._ecn = ecn
        self._mtu_bytes = mtu_bytes
        self._marks = 0
        # The names are the RFC's, so that the two can be compared.
        self._first_above_s: float | None = None
        self._dropping = False
        self._drop_next_s = float("-inf")
        self._count = 0
        self._last_count = 0

    @property
    def marks(self) -> int:
        """How many packets it has marked CE."""
        return self._marks

    def dequeue(self, now: float) -> Packet | None:
        """See `Queue.dequeue`."""
        packet, is_too_late = self._take(now)
        if self._dropping:
            self._dropping = is_too_late
            while self._dropping and now >= self._drop_next_s:
                self._count += 1
                is_kept = self._marks_instead(packet)
                if not is_kept:
                    packet, self._dropping = self._take(now)
                if self._dropping:
                    self._drop_next_s = self._control_law(self._drop_next_s)
                if is_kept:
                    break
        elif is_too_late:
            if not self._marks_instead(packet):
                packet, _ = self._take(now)
            self._start_dropping(now)
        return packet

    def _take(self, now: float) -> tuple[Packet | None, bool]:
        """Take the head; also return whether the queue has been too late for a whole interval."""
        if not self._waiting:
            self._first_above_s = None
            return None, False
        packet = self._take_head()
        if now - packet.entered_s < self._target_s or self._bytes <= self._mtu_bytes:
            self._first_above_s = None
            return packet, False
        if self._first_above_s is None:
            self._first_above_s = now + self._interval_s
            return packet, False
        return packet, now >= self._first_above_s

    def _start_dropping(self, now: float) -> None:
        self._dropping = True
        # Soon after the last time: go on at the pace that had been enough.
        delta = self._count - self._last_count
        is_soon = now - self._drop_next_s < 16 * self._interval_s
        self._count = delta if delta > 1 and is_soon else 1
        self._last_count = self._count
        self._drop_next_s = self._control_law(now)

    def _control_law(self, since_s: float) -> float:
        return since_s + self._interval_s / sqrt(self._count)

    def _marks_instead(self, packet: Packet | None) -> bool:
        """Mark the packet and return True, or count it as dropped."""
        if packet is not None and self._ecn and packet.ecn is not Ecn.NOT_ECT:
            if packet.ecn is not Ecn.CE:
                packet.ecn = Ecn.CE
                self._marks += 1
            return True
        self._drops += 1
        return False
