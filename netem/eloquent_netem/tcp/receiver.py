"""The receiving half: puts the stream in order and decides when to acknowledge, as Linux does.

The first segments are acknowledged at once (quick ACKs); later ACKs wait for a second full segment
or for a timer of 40 ms that adapts to the peer's pace; what is out of order or comes twice is
acknowledged at once. A reader that has emptied the buffer after a short segment lets the ACK go,
as `tcp_cleanup_rbuf` does, unless the connection is interactive ("pingpong").
The advertised window is the room in a buffer, which grows with what the application reads in a
round trip (`tcp_rcv_space_adjust`); its right edge never goes back.
Sources: net/ipv4/tcp_input.c (`tcp_event_data_recv`, `__tcp_ack_snd_check`, `tcp_data_queue`),
net/ipv4/tcp_timer.c (`tcp_delack_timer_handler`).
"""

from heapq import heappop, heappush

from eloquent_netem.packet import Ecn
from eloquent_netem.tcp.rtt import RttEstimator
from eloquent_netem.tcp.segment import (
    CWR,
    FIN,
    MSS_BYTES,
    PSH,
    SACK_BLOCKS_MAX,
    WINDOW_MAX_BYTES,
    Segment,
)

ATO_MIN_S = 0.04
"The least time for which an ACK is delayed, and the first."

ATO_PUSHED_MAX_S = 0.2
ATO_MAX_S = 0.5
QUICK_ACKS = 16
MSS_GUESS_BYTES = 536
"What a full segment is taken to be until a larger one comes."

BLOCKS_KEPT = 4
BLOCKS_EXPECTED = 2
IMMEDIATE_DUPLICATES = 3
"Duplicate ACKs that are sent at once; of more, one per `COMPRESSED_S` goes."

COMPRESSED_MAX = 44
COMPRESSED_S = 0.001
COMPRESSED_RTT_SHARE = 0.05

BUFFER_BYTES = 65536
BUFFER_MAX_BYTES = 3 << 20
"Linux's defaults (`tcp_rmem`), of which half holds data."


class Receiver:
    """Reassembles one direction; `is_ack_due` says that an ACK must go now.

    Without `has_window` the application reads in time, and the buffer limits nobody.
    """

    def __init__(
        self, start: int, rtt: RttEstimator, *, has_ecn: bool, has_window: bool = False
    ) -> None:
        self.next = start
        "The first sequence number that is missing."
        self.is_ack_due = False
        self.echoes = False
        "ECN: congestion was seen and the peer has not yet said that it slowed down."
        self.duplicates = 0
        "Segments that had been received before."
        self.is_ended = False
        "The peer's FIN has come, and everything before it."
        self._fin_at: int | None = None
        self._space = BUFFER_BYTES if has_window else None
        self._edge = start
        self._copied = self._copied_before = 0
        self._copied_from_s = float("-inf")
        self._has_ecn = has_ecn
        self._rtt = rtt
        self._ready = bytearray()
        self._waiting: list[tuple[int, bytes]] = []
        self._blocks: list[tuple[int, int]] = []
        self._duplicate: tuple[int, int] | None = None
        self._acked = start
        self._mss = MSS_GUESS_BYTES
        self._odd_size = 0
        self._quick = 0
        self._ato_s = 0.0
        self._received_s = float("-inf")
        self._is_interactive = False
        self._is_pending = False
        self._pushed = 0
        self._ack_at_s: float | None = None
        self._compressed = 0
        self._compressed_at_s: float | None = None
        self._dup_acks = 0
        self._dup_acks_at = start

    @property
    def last_ack_sent(self) -> int:
        """What was acknowledged last: RFC 7323's Last.ACK.sent."""
        return self._acked

    @property
    def readable(self) -> int:
        """How many bytes wait to be read."""
        return len(self._ready)

    def window(self) -> int:
        """Return how many bytes behind `next` are to be advertised."""
        if self._space is None:
            return WINDOW_MAX_BYTES
        self._edge = max(self._edge, self.next + self._room)
        return self._edge - self.next

    def sack_blocks(self) -> tuple[tuple[int, int], ...]:
        """Return what an ACK reports: a duplicate first, then blocks, the latest first."""
        blocks = self._blocks if self._duplicate is None else [self._duplicate, *self._blocks]
        return tuple(blocks[:SACK_BLOCKS_MAX])

    def next_time(self) -> float | None:
        """Return when `handle_timer` is due, in seconds, or None."""
        times = [time for time in (self._ack_at_s, self._compressed_at_s) if time is not None]
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        """Do what is due: an ACK has waited long enough."""
        if self._compressed_at_s is not None and self._compressed_at_s <= now:
            self._compressed_at_s = None
            self.is_ack_due |= self._compressed > 0
        if self._ack_at_s is not None and self._ack_at_s <= now:
            self._ack_at_s = None
            if self._is_interactive:
                self._is_interactive = False
                self._ato_s = ATO_MIN_S
            else:
                self._ato_s = min(2 * self._ato_s, self._rtt.rto_s)
            self.is_ack_due |= self._is_pending

    def receive(self, segment: Segment, ecn: Ecn, now: float) -> None:
        """Take a segment with data and decide about its ACK."""
        start, end = segment.seq, segment.end
        if segment.flags & CWR:
            self.echoes = False
            self.is_ack_due = True  # the peer's window may be down to one packet
        if end <= self.next:
            self.duplicates += 1
            self._duplicate = (start, end)
            self._quicken(QUICK_ACKS)
            self._is_interactive = False
            self._ato_s = ATO_MIN_S
            self._is_pending = True
        else:
            if segment.payload:
                self._note_data(segment, ecn, now)
            if segment.flags & FIN:
                self._fin_at = end - 1
                self.is_ack_due = True
            if start > self.next:
                self._keep(segment)
            else:
                if start < self.next:
                    self._duplicate = (start, self.next)
                self._accept(segment)
        self._decide(now)

    def read(self, limit: int | None = None) -> bytes:
        """Return what is in order, `limit` bytes of it at most; it may make an ACK due."""
        data = bytes(self._ready[:limit])
        del self._ready[: len(data)]
        if self._space is not None:
            self._make_room(self._space, len(data))
        if self._is_pending and (
            self.next - self._acked > self._mss
            or (data and (self._pushed > 1 or (self._pushed and not self._is_interactive)))
        ):
            self.is_ack_due = True
        return data

    def stop(self) -> None:
        """Acknowledge no more."""
        self._ack_at_s = self._compressed_at_s = None
        self.is_ack_due = False

    def ack_sent(self) -> None:
        """Note that a segment with the current ACK went out."""
        self._acked = self.next
        self.is_ack_due = self._is_pending = False
        self._pushed = 0
        self._duplicate = None
        self._ack_at_s = self._compressed_at_s = None
        if self._compressed:
            self._compressed = 0
        if self._quick:
            self._quick -= 1
            if not self._quick:
                self._ato_s = ATO_MIN_S

    def data_sent(self, now: float) -> None:
        """Note that data went out: soon after data came in, it is an answer."""
        if now - self._received_s < self._ato_s:
            self._is_interactive = True

    @property
    def _room(self) -> int:
        """The buffer's room, or 0: too little to invite small segments (RFC 9293, 3.8.6.2.2)."""
        assert self._space is not None
        room = self._space - len(self._ready)
        return room if room >= MSS_BYTES else 0

    def _make_room(self, space: int, copied: int) -> None:
        self._copied += copied
        if self._received_s - self._copied_from_s >= (self._rtt.srtt_s or 0.0):
            if self._copied > self._copied_before:
                self._copied_before = self._copied
                self._space = max(
                    space, min(2 * self._copied + QUICK_ACKS * MSS_BYTES, BUFFER_MAX_BYTES)
                )
            self._copied = 0
            self._copied_from_s = self._received_s
        left = self._edge - self.next
        if copied and not self.is_ended and 2 * left <= space and self._room > 2 * left:
            self.is_ack_due = True

    def _note_data(self, segment: Segment, ecn: Ecn, now: float) -> None:
        self._is_pending = True
        self._measure_mss(segment)
        gap_s = now - self._received_s
        if not self._ato_s:
            self._quicken(QUICK_ACKS)
            self._ato_s = ATO_MIN_S
        elif gap_s <= ATO_MIN_S / 2:
            self._ato_s = self._ato_s / 2 + ATO_MIN_S / 2
        elif gap_s < self._ato_s:
            self._ato_s = min(self._ato_s / 2 + gap_s, self._rtt.rto_s)
        elif gap_s > self._rtt.rto_s:
            self._quicken(QUICK_ACKS)
        self._received_s = now
        if self._has_ecn and ecn is Ecn.CE and not self.echoes:
            self._quicken(2)
            self._is_interactive = False
            self._ato_s = ATO_MIN_S
            self.echoes = True

    def _measure_mss(self, segment: Segment) -> None:
        size = len(segment.payload)
        odd_size, self._odd_size = self._odd_size, 0
        if size >= self._mss:
            self._mss = min(size, MSS_BYTES)
            if segment.flags & PSH:
                self._pushed = max(self._pushed, 1)
            return
        if size >= MSS_GUESS_BYTES or not segment.flags & PSH:
            self._odd_size = size
            if size == odd_size:
                self._mss = size
                return
        self._pushed = 2 if self._pushed else 1

    def _quicken(self, count: int) -> None:
        self._quick = max(self._quick, count)

    def _keep(self, segment: Segment) -> None:
        """Keep what is out of order, and report it first."""
        first, end = segment.seq, segment.end
        if any(start <= first and end <= stop for start, stop in self._blocks):
            self.duplicates += 1
            self._duplicate = (first, end)
            return
        heappush(self._waiting, (first, segment.payload))
        if self._compressed and len(self._blocks) >= BLOCKS_EXPECTED:
            self.is_ack_due = True  # else a block might fall out before it was reported
        for block in [block for block in self._blocks if block[0] <= end and first <= block[1]]:
            self._blocks.remove(block)
            first, end = min(first, block[0]), max(end, block[1])
        self._blocks.insert(0, (first, end))
        del self._blocks[BLOCKS_KEPT:]

    def _accept(self, segment: Segment) -> None:
        self._append(segment.seq, segment.payload)
        if not self._waiting:
            return
        while self._waiting and self._waiting[0][0] <= self.next:
            self._append(*heappop(self._waiting))
        self._blocks = [block for block in self._blocks if block[0] > self.next]
        if not self._waiting:
            self.is_ack_due = True  # RFC 5681 section 4.2: a gap has been filled

    def _append(self, start: int, payload: bytes) -> None:
        fresh = payload[self.next - start :]
        self._ready += fresh
        self.next += len(fresh)
        if self.next == self._fin_at:
            self.next += 1
            self.is_ended = True

    def _decide(self, now: float) -> None:
        """Send the ACK at once, later, or compressed (`__tcp_ack_snd_check`)."""
        is_quick = self._quick > 0 and not self._is_interactive
        if self.next - self._acked > self._mss or is_quick or self.is_ack_due:
            self.is_ack_due = True
        elif not self._waiting:
            self._delay(now)
        else:
            self._compress(now)

    def _compress(self, now: float) -> None:
        if self._dup_acks_at != self.next:
            self._dup_acks_at = self.next
            self._dup_acks = 0
        if self._dup_acks < IMMEDIATE_DUPLICATES or self._compressed >= COMPRESSED_MAX:
            self._dup_acks += 1
            self.is_ack_due = True
            return
        self._compressed += 1
        if self._compressed_at_s is None:
            srtt_s = self._rtt.srtt_s or COMPRESSED_S
            self._compressed_at_s = now + min(COMPRESSED_S, COMPRESSED_RTT_SHARE * srtt_s)

    def _delay(self, now: float) -> None:
        ato_s = self._ato_s
        if ato_s > ATO_MIN_S:
            max_s = ATO_PUSHED_MAX_S if self._is_interactive or self._pushed else ATO_MAX_S
            if self._rtt.srtt_s is not None:
                max_s = min(max_s, max(self._rtt.srtt_s, ATO_MIN_S))
            ato_s = min(ato_s, max_s)
        if self._ack_at_s is None:
            self._ack_at_s = now + ato_s
        elif self._ack_at_s <= now + ato_s / 4:
            self.is_ack_due = True
        else:
            self._ack_at_s = min(self._ack_at_s, now + ato_s)
