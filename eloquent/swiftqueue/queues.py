"""Queues and the codepoints that lead into them (RFC 9331 section 5.1)."""

from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import SentPacket
from eloquent.swiftqueue.records import Queue

_CODEPOINTS = (Ecn.ECT_1, Ecn.NOT_ECT)


def other(queue: Queue) -> Queue:
    """Return the other queue."""
    return Queue.L if queue is Queue.C else Queue.C


def queue_of(packet: SentPacket) -> Queue:
    """Return the queue that a packet went into."""
    return Queue.L if packet.codepoint is Ecn.ECT_1 else Queue.C


def codepoint_for(queue: Queue) -> Ecn:
    """Return the codepoint that leads into a queue: for C Not-ECT, as Prague may not use ECT(0)."""
    return _CODEPOINTS[queue]
