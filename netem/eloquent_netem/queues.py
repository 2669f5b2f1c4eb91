"""Queues: what waits at a bottleneck, in which order it leaves, what is dropped or marked."""

from collections import deque
from typing import Protocol

from eloquent_netem.packet import Packet


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


class DropTail:
    """First in, first out; full is full."""

    def __init__(self, *, limit_packets: int | None = None, limit_bytes: int | None = None) -> None:
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

    def dequeue(self, now: float) -> Packet | None:
        """See `Queue.dequeue`."""
        packet = self._waiting.popleft()
        self._bytes -= packet.size
        return packet
