"""Explicit congestion notification: codepoints, counts, and whether a path carries them.

A path may clear, change or drop what is marked, and a peer may not report marks, so a sender
tests each path (RFC 9000 section 13.4.2 and appendix A.4). The whole of it:

    state    marks  what happens                                                  next
    TESTING  yes    an ACK proves the marks                                       CAPABLE
                    `TEST_PACKETS` marked packets are out                         UNKNOWN
                    an ACK disproves them                                         FAILED
    UNKNOWN  no     an ACK proves the marks                                       CAPABLE
                    an ACK disproves them                                         FAILED
                    all marked packets are lost, and unmarked ones get through    FAILED
    CAPABLE  yes    an ACK disproves the marks                                    FAILED
    FAILED   no     nothing; a new path has a validation of its own

An ACK proves the marks if it acknowledges marked packets for the first time and its counts
account for them. It disproves them (section 13.4.2.1) if it has no counts, if ECT(n) + CE grew by
less than the ECT(n) packets that it newly acknowledges, or if it counts more than was sent. Only
ACKs that raise the largest acknowledged packet number are judged: others may be late, with counts
that are older than the last ones.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import Any

TEST_PACKETS = 10
"So many packets are marked before an acknowledgement must have said that marks get through."


class Ecn(IntEnum):
    """The ECN field of the IP header (RFC 3168 section 5, RFC 9331 section 2)."""

    NOT_ECT = 0
    ECT_1 = 1
    "L4S: the sender's congestion control is scalable."
    ECT_0 = 2
    CE = 3
    "Congestion experienced: set on the way."


@dataclass(slots=True)
class EcnCounts:
    """How many packets came with each codepoint: the end of an ACK_ECN frame (section 19.3.2)."""

    ect0: int = 0
    ect1: int = 0
    ce: int = 0

    @property
    def total(self) -> int:
        """All packets that came marked."""
        return self.ect0 + self.ect1 + self.ce

    def add(self, codepoint: Ecn) -> None:
        """Count one packet; Not-ECT is not counted."""
        if codepoint is Ecn.ECT_1:
            self.ect1 += 1
        elif codepoint is Ecn.CE:
            self.ce += 1
        elif codepoint is Ecn.ECT_0:
            self.ect0 += 1

    def since(self, earlier: "EcnCounts") -> "EcnCounts":
        """Return the growth since `earlier`."""
        return EcnCounts(self.ect0 - earlier.ect0, self.ect1 - earlier.ect1, self.ce - earlier.ce)


def tag(packet: Any, codepoint: Ecn) -> None:
    """Note a sent packet's codepoint on it, for `codepoint_of`."""
    packet.codepoint = codepoint


def codepoint_of(packet: Any) -> Ecn:
    """Return the codepoint that a packet left with.

    Loss detection needs it: two queues reorder, so only a later packet of the *same* codepoint
    tells, by being acknowledged, that an earlier one may be lost.
    """
    return getattr(packet, "codepoint", Ecn.NOT_ECT)


class EcnState(Enum):
    """See the module's table."""

    TESTING = auto()
    UNKNOWN = auto()
    CAPABLE = auto()
    FAILED = auto()


class EcnValidation:
    """Whether one path carries marks.

    `carried` is None for a connection's first path. Later, so many marked packets of the path
    before may be under way, and the peer's counts go on from where they are: its first report is
    where ours begin.

    For each ACK frame: `on_acked` for each marked packet that it newly acknowledges, then
    `on_ack_frame`.
    """

    def __init__(self, *, carried: int | None = None) -> None:
        self.state = EcnState.TESTING
        self.failure = ""
        "Why it failed, for a person."
        self._carried = carried or 0
        self._last = EcnCounts() if carried is None else None
        self._base = EcnCounts()
        self._sent = EcnCounts()
        self._new = EcnCounts()
        self._acked = 0
        self._lost = 0

    @property
    def may_mark(self) -> bool:
        """Whether the next packet may carry a mark."""
        return self.state is EcnState.TESTING or self.state is EcnState.CAPABLE

    @property
    def reported(self) -> EcnCounts:
        """What the peer counted, by the last ACK that was judged."""
        return self._last or EcnCounts()

    @property
    def in_flight(self) -> int:
        """How many marked packets are out with their fate unknown."""
        return max(self._sent.total - self._acked - self._lost, 0)

    def on_sent(self, codepoint: Ecn) -> None:
        """Take note of a marked packet."""
        self._sent.add(codepoint)
        if self.state is EcnState.TESTING and self._sent.total >= TEST_PACKETS:
            self.state = EcnState.UNKNOWN

    def on_acked(self, codepoint: Ecn) -> None:
        """Take note that a marked packet is acknowledged for the first time."""
        self._new.add(codepoint)
        self._acked += 1

    def on_lost(self) -> None:
        """Take note that a marked packet is taken for lost."""
        self._lost += 1

    def on_ack_frame(self, counts: EcnCounts | None, *, raises_largest: bool) -> EcnCounts | None:
        """Judge an ACK frame; `counts` is None for one without.

        Returns:
            By how much the counts grew since the last judged ACK, or None if there is nothing to
            go by.
        """
        new, self._new = self._new, EcnCounts()
        if self.state is EcnState.FAILED or not raises_largest:
            return None
        if counts is None:
            if new.total:
                self._fail("the peer acknowledges marked packets without reporting marks")
            elif self.state is EcnState.UNKNOWN and self._lost >= self._sent.total:
                self._fail("marked packets vanish and unmarked ones get through")
            return None
        if self._last is None:
            self._base = self._last = counts
            return None
        growth = counts.since(self._last)
        self._last = counts
        fault = self._fault(growth, new, counts.since(self._base))
        if fault:
            self._fail(fault)
            return None
        if new.total or growth.total:
            self.state = EcnState.CAPABLE
        elif self.state is EcnState.UNKNOWN and self._lost >= self._sent.total:
            self._fail("marked packets vanish and unmarked ones get through")
            return None
        return growth

    def _fault(self, growth: EcnCounts, new: EcnCounts, reported: EcnCounts) -> str:
        """Return what is wrong with the counts, or nothing."""
        if growth.ce < 0 or growth.ect1 < 0 or growth.ect0 < 0:
            return "the peer's counts went back"
        if growth.ect1 + growth.ce < new.ect1 or growth.ect0 + growth.ce < new.ect0:
            return "marks are cleared or changed on the way"
        if (
            reported.ect1 > self._sent.ect1 + self._carried
            or reported.ect0 > self._sent.ect0 + self._carried
            or reported.total > self._sent.total + self._carried
        ):
            return "the peer counts more marks than were sent"
        return ""

    def _fail(self, why: str) -> None:
        self.state = EcnState.FAILED
        self.failure = why
