"""What is under way: sent segments, what became of each, and RACK's view of them (RFC 8985).

Sources: net/ipv4/tcp_input.c (`tcp_sacktag_one`, `tcp_clean_rtx_queue`, `tcp_mark_skb_lost`),
net/ipv4/tcp_recovery.c (RACK), net/ipv4/tcp_output.c (`tcp_retrans_try_collapse`).
"""

from bisect import bisect_left
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import ClassVar

from eloquent_netem.tcp.rtt import RttEstimator

REORDERING_PACKETS = 3
REORDERING_PACKETS_MAX = 300
REORDERING_PERSISTS = 16
"Recoveries after which a widened reordering window falls back (RFC 8985 section 7.2)."

REORDERING_STEPS_MAX = 255


@dataclass(slots=True, eq=False)
class SentSegment:
    """One segment of the retransmission queue."""

    start: int
    data: bytes
    end: int
    "The sequence number behind it: a FIN counts as one."
    sent_s: float
    "When it was last sent."
    delivered: int
    "How many segments had been delivered then."
    is_sacked: bool = False
    is_lost: bool = False
    is_repeated: bool = False
    "A retransmission is under way."
    was_repeated: bool = False
    "It has been retransmitted at least once."

    @property
    def has_fin(self) -> bool:
        """Whether it says that nothing follows."""
        return self.end > self.start + len(self.data)


class Scoreboard:
    """The retransmission queue and its counts, in segments.

    `in_flight` is RFC 6675's pipe: sent, neither SACKed nor lost, plus retransmissions.
    """

    def __init__(self, start: int) -> None:
        self.una = self.nxt = start
        "The first sequence number not acknowledged, and the next to be sent."
        self.segments: list[SentSegment] = []
        self.sacked = self.lost = self.repeated = 0
        self.delivered = 0
        "Segments SACKed or acknowledged so far."
        self.losses = 0
        "Losses noticed so far, those of retransmissions included."
        self.by_time: dict[SentSegment, None] = {}
        "What RACK still waits for, in order of the last transmission."
        self._sacked_end = start
        self._to_repeat: list[tuple[int, int, SentSegment]] = []
        self._marks = 0

    @property
    def packets_out(self) -> int:
        """How many segments are not acknowledged."""
        return len(self.segments)

    @property
    def in_flight(self) -> int:
        """How many are believed to be in the network."""
        return len(self.segments) - self.sacked - self.lost + self.repeated

    @property
    def fack(self) -> int:
        """The end of the highest SACKed segment, or `una`."""
        return self._sacked_end if self.sacked else self.una

    @property
    def any_repeated(self) -> bool:
        """Whether a retransmission may be under way (`tcp_any_retrans_done`)."""
        return self.repeated > 0 or (bool(self.segments) and self.segments[0].was_repeated)

    def add(self, data: bytes, now: float, *, has_fin: bool = False) -> SentSegment:
        """Append a segment that is sent for the first time."""
        end = self.nxt + len(data) + has_fin
        segment = SentSegment(self.nxt, data, end, now, self.delivered)
        self.nxt = segment.end
        self.segments.append(segment)
        self.by_time[segment] = None
        return segment

    def within(self, first: int, end: int) -> list[SentSegment]:
        """Return the segments that lie wholly in the range."""
        index = bisect_left(self.segments, first, key=lambda segment: segment.start)
        found = []
        while index < len(self.segments) and self.segments[index].end <= end:
            found.append(self.segments[index])
            index += 1
        return found

    def sack(self, segment: SentSegment) -> None:
        """Note that a segment, not yet SACKed, has arrived."""
        if segment.is_lost:
            # A retransmission of what is not lost is believed to be still under way.
            self._unmark(segment)
            if segment.is_repeated:
                segment.is_repeated = False
                self.repeated -= 1
        segment.is_sacked = True
        self.sacked += 1
        self.delivered += 1
        self._sacked_end = max(self._sacked_end, segment.end)
        self.by_time.pop(segment, None)

    def acknowledge(self, ack: int) -> list[SentSegment]:
        """Take off the queue and return what `ack` covers; a part of a segment stays whole."""
        self.una = ack
        count = 0
        for segment in self.segments:
            if segment.end > ack:
                break
            count += 1
            self.repeated -= segment.is_repeated
            if segment.is_lost:
                self._unmark(segment)
            if segment.is_sacked:
                self.sacked -= 1
            else:
                self.delivered += 1
            self.by_time.pop(segment, None)
        gone = self.segments[:count]
        del self.segments[:count]
        return gone

    def mark_lost(self, segment: SentSegment) -> None:
        """Believe a segment, or its retransmission, to be lost."""
        if segment.is_sacked:
            return
        if segment.is_lost and not segment.is_repeated:
            return
        self.losses += 1
        if segment.is_lost:
            segment.is_repeated = False
            self.repeated -= 1
        else:
            segment.is_lost = True
            self.lost += 1
        self._marks += 1
        heappush(self._to_repeat, (segment.start, self._marks, segment))

    def unmark_all(self) -> None:
        """Believe no more that anything is lost: the reduction was spurious."""
        for segment in self.segments:
            if segment.is_lost:
                self._unmark(segment)

    def next_to_repeat(self) -> SentSegment | None:
        """Return the first lost segment of which no retransmission is under way, or None."""
        while self._to_repeat:
            segment = self._to_repeat[0][2]
            if segment.is_lost and not segment.is_repeated:
                return segment
            heappop(self._to_repeat)
        return None

    def resent(self, segment: SentSegment, now: float) -> None:
        """Note that a segment is sent again."""
        segment.was_repeated = True
        segment.sent_s = now
        segment.delivered = self.delivered
        self.by_time.pop(segment, None)
        self.by_time[segment] = None

    def collapse(self, segment: SentSegment, room: int) -> None:
        """Join to a short segment those behind it that fit in `room` bytes and are not SACKed."""
        index = bisect_left(self.segments, segment.start, key=lambda other: other.start) + 1
        joined = [segment.data]
        room -= len(segment.data)
        first = index
        while index < len(self.segments):
            other = self.segments[index]
            room -= len(other.data)
            if other.is_sacked or room < 0:
                break
            joined.append(other.data)
            self.repeated -= other.is_repeated
            other.is_repeated = False
            if other.is_lost:
                self._unmark(other)
            segment.was_repeated |= other.was_repeated
            self.by_time.pop(other, None)
            segment.end = other.end
            index += 1
        if index > first:
            segment.data = b"".join(joined)
            del self.segments[first:index]

    def _unmark(self, segment: SentSegment) -> None:
        # Left in the heap of what to repeat: its flag says that it is of no interest any more.
        segment.is_lost = False
        self.lost -= 1


class Rack:
    """Loss by time: what was sent well before something that has arrived is lost."""

    SETTLING_DIVISOR: ClassVar[int] = 4
    "The reordering window is this part of the least round trip, in steps."

    def __init__(self, board: Scoreboard, rtt: RttEstimator, mss: int) -> None:
        self._mss = mss
        self._board = board
        self._rtt = rtt
        self._latest = (float("-inf"), 0)
        "When the latest segment that has arrived was sent, and its end."
        self._rtt_s = 0.0
        self._advanced = False
        self._steps = 1
        self._last_delivered = 0
        self.persists = 0
        "Recoveries for which the widened window is kept."
        self.is_duplicate_seen = False
        self.is_reordering_seen = False
        self._reordering = REORDERING_PACKETS

    @property
    def reordering(self) -> int:
        """Packets by which reordering has been seen to go, 3 at least."""
        return self._reordering

    def arrived(self, segment: SentSegment, now: float) -> None:
        """Take note of a segment newly SACKed or acknowledged (`tcp_rack_advance`)."""
        rtt_s = now - segment.sent_s
        if segment.was_repeated and rtt_s < self._rtt.min_s:
            return  # the original has arrived, not the retransmission
        self._advanced = True
        self._rtt_s = rtt_s
        self._latest = max(self._latest, (segment.sent_s, segment.end))

    def reexamine(self) -> None:
        """Look at everything again with the next ACK: marks were taken back."""
        self._advanced = True

    def note_reordering(self, low: int, fack: int) -> None:
        """A hole at `low` was filled by a late original (`tcp_check_sack_reordering`)."""
        if low < fack:
            self._reordering = min(
                max(self._reordering, -((low - fack) // self._mss)), REORDERING_PACKETS_MAX
            )
            self.is_reordering_seen = True

    def adapt(self, prior_delivered: int | None) -> None:
        """Widen the window by a step for a round with a DSACK (`tcp_rack_update_reo_wnd`)."""
        if prior_delivered is None:
            return
        if prior_delivered < self._last_delivered:
            self.is_duplicate_seen = False
        if self.is_duplicate_seen:
            self._steps = min(self._steps + 1, REORDERING_STEPS_MAX)
            self.is_duplicate_seen = False
            self._last_delivered = self._board.delivered
            self.persists = REORDERING_PERSISTS
        elif not self.persists:
            self._steps = 1

    def window_s(self, *, in_recovery: bool) -> float:
        """Return how late a segment may be: nothing while no reordering has been seen."""
        if not self.is_reordering_seen and (in_recovery or self._board.sacked >= self._reordering):
            return 0.0
        srtt_s = self._rtt.srtt_s or 0.0
        return min(self._rtt.min_s / self.SETTLING_DIVISOR * self._steps, srtt_s / 8)

    def remaining_s(self, segment: SentSegment, window_s: float, now: float) -> float:
        """Return how long a segment may still take."""
        return self._rtt_s + window_s - (now - segment.sent_s)

    def mark_on_ack(self, now: float, *, in_recovery: bool) -> float:
        """Mark what is lost if something new has arrived; see `mark`."""
        if not self._advanced:
            return 0.0
        self._advanced = False
        return self.mark(now, in_recovery=in_recovery)

    def mark(self, now: float, *, in_recovery: bool) -> float:
        """Mark what is lost; return the longest time that others still have, or 0."""
        window_s = self.window_s(in_recovery=in_recovery)
        wait_s = 0.0
        lost = []
        for segment in self._board.by_time:
            if segment.is_lost and not segment.is_repeated:
                continue
            if self._latest <= (segment.sent_s, segment.end):
                break
            remaining_s = self.remaining_s(segment, window_s, now)
            if remaining_s <= 0:
                lost.append(segment)
            else:
                wait_s = max(wait_s, remaining_s)
        for segment in lost:
            self._board.mark_lost(segment)
            self._board.by_time.pop(segment)
        return wait_s
