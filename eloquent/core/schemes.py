"""The schemes: `eloquent` and those it is compared with, behind one interface (`Sender`)."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from eloquent.core.beat import SERVER_RTTS, beat_s
from eloquent.core.log import Log
from eloquent.core.padding import SIZES
from eloquent.core.path import Path
from eloquent.core.retransmit import DuplicateSender, RetransmitSender
from eloquent.core.sender import NOW, Sender
from eloquent.core.wire import Bundle, bundle_header_size
from eloquent.errors import ConfigurationError

SPREAD_GAPS = 0.5
SPREAD_MAX_S = 0.075
"""On a lossy path a bundle with new tokens is repeated once, at once. Where losses come in bursts,
that is after this share of the time between tokens, no later than `SPREAD_MAX_S`,"""

PROBE_EVERY = 8
"and one copy in so many still goes out at once, to learn when bursts are over."

TAIL_RTTS = 1.25
TAIL_SLACK_S = 0.010
TAIL_GAPS = 1.25
TAIL_GAPS_MAX_S = 0.15
"""With no new token, unacknowledged ones are repeated after `TAIL_RTTS` round trips, the peer's ACK
delay and the slack; not just before a token that is to be expected. Then the beat begins. On a
lossy path the log's end is also repeated after one token gap, two more, four more: nothing follows
it."""

PACKET_SIZES = SIZES[:-1]
"""Packets are filled with redundancy up to one of these sizes, those to which they are padded
anyway: what padding would cost goes into what may save a token. Which one depends on the path and
the token rate, not on the tokens."""

TOKEN_BYTES = 10
"A token in the log, as far as the size of packets is concerned."

CLEAN_PACKET_BYTES = 224
LOSSY_PACKET_BYTES = 896
"The largest packet made so on a path without losses, and on one with losses (Mosh's bound: 1000)."

MAX_HEADER_BYTES = 12
"A bundle's header is hardly ever longer."
OVERHEAD_BYTES = 42
"What a packet costs beside a bundle's data, without an acknowledgement."

MIN_FRAME_S = 0.02
MAX_FRAME_S = 0.25
FRAME_RTTS = 0.5
"""Where the window is too small for a packet per token, bundles go out as far apart as it asks, but
no further than this (Mosh's rule)."""

BULK_BYTES = 1000
BACKLOG_PACKETS = 10
"""So many new bytes go out in full packets, without waiting. So do lost ones that would fill more
packets of the usual size than this."""

TAIL_DOUBLINGS = 30
"The wait at the log's end doubles no more often: it is beyond any other by then."

COPY_WITHIN_S = 0.002
"A repeat is a bundle's copy, which may take another queue, if it leaves within this time."

REST_S = 1.0
"""With two queues the first bundle after so long, or after an outage, leaves twice: what is known
of the queues is old. So does the one that reaches a closed log's end: nothing follows it."""

SWEEP_AFTER_S = 0.2
"After an acknowledgement has been overdue for so long, copies carry what else is not acknowledged."

SPARSE_AFTER_S = 1.0
SPARSE_AFTER_HOLD_S = 0.3
SPARSE_GAP_S = 0.02
"""After an acknowledgement has been overdue for so long (sooner where packets were held before: all
will come, and the link must carry them), bundles are small, without copies, and no closer."""

BEATS_ONLY_S = 8.0
"After an acknowledgement has been overdue for so long, new tokens wait for the beat."

GAP_WEIGHT = 1 / 8
FIRST_GAP_S = 0.03
MIN_GAP_S = 0.001
MAX_GAP_S = 1.0
"The time between tokens: how it is averaged, its first guess, and its bounds."

QUEUED_BUNDLE_BYTES = 1150
"Size limit of a bundle made before its packet is known: fits the smallest QUIC packet."


@dataclass(frozen=True, slots=True)
class _Budget:
    """What one token may cost now."""

    packet_bytes: int
    "The size up to which its packet is filled."
    has_copy: bool
    frame_s: float = 0.0
    "The least time from one bundle to the next: above 0 if a packet for each token is too much."


def _packet_size(size: int) -> int:
    """Return the smallest of the usual sizes that is not below `size`, or `size`."""
    return next((usual for usual in PACKET_SIZES if usual >= size), size)


class EloquentSender(Sender):
    """Each bundle carries every token that the reader is not known to have.

    The rule is the paper's (*Eloquent*, arXiv 2401.12961, section 3). Ours are the time
    redundancy (one copy on a lossy path, a repeat at the tail, a beat through an outage), what
    gives way first when the window binds (`_budget`), and what happens when the unacknowledged
    tokens outgrow a packet: consecutive bundles cover them from the oldest byte on, and only what
    is lost goes out again, so that the cost stays linear.
    """

    def __init__(self, turn: int, log: Log, path: Path) -> None:
        super().__init__(turn, log, path)
        self._gap_s = FIRST_GAP_S
        self._grew_at: float | None = None
        self._known_length = 0
        self._repeat_at = 0.0
        self._has_copy_due = False
        "What is due at `_repeat_at` is a copy of the last bundle."
        self._repeat: Bundle | None = None
        "What is to leave once more at once, into the other queue."
        self._swept_to = 0
        self._tail_copies = 0
        self._packet_bytes = PACKET_SIZES[0]
        self._copies = 0
        self._not_before = NOW
        self._is_beating = False
        self._is_sparse = False
        self._is_draining = False
        self._silent_since: float | None = None
        "Since when an acknowledgement was awaited when `_is_beating` or `_is_sparse` was set."

    def log_grew(self, now: float) -> None:
        """See `Sender.log_grew`."""
        if self._log.length == self._known_length:
            return
        self._known_length = self._log.length
        if self._grew_at is not None:
            gap_s = min(max(now - self._grew_at, MIN_GAP_S), MAX_GAP_S)
            self._gap_s += GAP_WEIGHT * (gap_s - self._gap_s)
        self._grew_at = now

    def on_acked(self, number: int) -> None:
        """See `Sender.on_acked`."""
        super().on_acked(number)
        self._end_silence()

    def on_lost(self, number: int) -> None:
        """See `Sender.on_lost`."""
        super().on_lost(number)
        self._end_silence()

    def next_time(self) -> float | None:
        """See `Sender.next_time`."""
        if self._path.waiting_since != self._silent_since:
            self._end_silence()
        if self._repeat is not None:
            return NOW
        new = self._log.length - self._sent_end
        if new >= BULK_BYTES and not self._is_beating:
            return NOW
        if new > 0 or self._resend:
            return self._not_before
        return self._repeat_at if self._mark < self._log.length else self._confirm_time()

    def next_bundle(self, now: float, room: int) -> Bundle | None:
        """See `Sender.next_bundle`."""
        self._doubt(now)
        if self._repeat is not None:
            repeat, self._repeat = self._repeat, None
            stop = repeat.offset + len(repeat.data)
            fits = self._data_room(repeat.offset, stop, room) == len(repeat.data)
            if fits and now - self._made_at <= COPY_WITHIN_S:
                return self._make(repeat.offset, stop, now)
        due = self.next_time()
        if due is None or due > now:
            return None
        if self._is_beating and not self._path.beats.take(now):
            self._beat(now)
            return None
        new = self._log.length - self._sent_end
        budget = self._budget(new)
        self._path.target_bytes = budget.packet_bytes
        is_tail = new <= 0 and not self._resend and not self._has_copy_due
        wanted = room if is_tail else self._wanted_room(room, budget.packet_bytes)
        start, stop = self._choose(new, wanted)
        size = self._data_room(start, stop, room, wanted)
        if size < stop - start:
            start, stop = self._overflow()
            size = self._data_room(start, stop, room, wanted)
        if size <= 0:
            return None
        has_rested = self._path.is_silent or now - self._made_at > REST_S
        is_first = has_rested or self._next_number == 0
        is_copy = new <= 0 and self._has_copy_due
        self._schedule(now, new, budget)
        bundle = self._make(start, start + size, now)
        if self._path.wants_copy is not None and not is_copy:
            is_last = new > 0 and self._log.end is not None and start + size == self._log.length
            if self._wants_copy(now, is_urgent=is_first or is_last):
                self._repeat = bundle
        return bundle

    @property
    def is_copy_due(self) -> bool:
        """See `Sender.is_copy_due`."""
        if self._repeat is not None:
            return True
        return self._has_copy_due and self._repeat_at <= self._made_at and self._path.has_two_queues

    def _wanted_room(self, room: int, packet_bytes: int) -> int:
        """Return how much of a packet's room to use, for a packet of `packet_bytes`."""
        wanted = packet_bytes - self._path.used_bytes
        lost = sum(high - low for low, high in self._resend)
        new = self._log.length - self._sent_end
        # Once in full packets, to the end: padding makes the last ones as large anyway.
        self._is_draining = lost > (0 if self._is_draining else BACKLOG_PACKETS * wanted)
        is_bulk = self._is_beating or new >= BULK_BYTES or self._is_draining
        return room if is_bulk else wanted

    def _choose(self, new: int, room: int) -> tuple[int, int]:
        """Return the range to send, if it fits the packet."""
        end = self._log.length
        header = bundle_header_size(self._turn, self._next_number, end)
        if self._is_beating or (new <= 0 and not self._resend and not self._has_copy_due):
            return self._mark, end
        start = max(self._mark, end - max(new, room - header))
        if new <= 0 and not self._resend and start > self._mark and self._is_sweeping():
            return self._sweep(start, room - header)
        for low, high in self._resend:
            if low < start:
                return low, high
            break
        return start, end

    def _is_sweeping(self) -> bool:
        path = self._path
        return self._log.end is None and (path.is_bursty or path.is_silent)

    def _sweep(self, stop: int, size: int) -> tuple[int, int]:
        """Return what a copy carries where losses come in bursts and a bundle cannot hold all.

        The next part of what lies before the last bundle, from the oldest byte on and round again:
        a few packets after a burst the reader has what was lost in it.
        """
        start = self._swept_to if self._mark <= self._swept_to <= stop - size else self._mark
        self._swept_to = min(start + size, stop)
        return start, self._swept_to

    def _overflow(self) -> tuple[int, int]:
        """Return the range to go on with when not all that is to be sent fits the packet."""
        end = self._log.length
        if not self._is_beating:
            for low, _ in self._resend:
                return low, end
            if self._sent_end < end:
                return self._sent_end, end
        return self._mark, end

    def _budget(self, new: int) -> _Budget:
        """Return what one token may cost.

        When the window binds, what goes first is redundancy, then the copies, and at last a packet
        for each token. Where losses come in bursts a copy goes before the redundancy: what leaves
        during a burst is lost anyway, and the first bundle after it should reach back.
        """
        path = self._path
        least = _packet_size(path.used_bytes + MAX_HEADER_BYTES + max(new, 0))
        wanted = max(least, self._wanted_size(new))
        is_held = path.is_silent and (path.holds or self._is_sparse)
        wants_copy = not (path.has_queue or is_held) and (
            path.is_lossy or path.is_silent or (new > 0 and path.is_unknown)
        )
        if path.bytes_per_s is None:
            return _Budget(wanted, has_copy=wants_copy)
        allowed = path.bytes_per_s * self._gap_s
        is_doubled = wants_copy and allowed >= 2 * least
        holds_all = path.is_bursty and self._full_size(new) <= wanted <= allowed
        copies = 2 if is_doubled and not holds_all else 1
        # Padding holds a size for a while: choose one that is affordable after a loss as well.
        lasting = min(path.bytes_per_s, path.floor_bytes_per_s) * self._gap_s
        if not wants_copy and lasting >= 2 * least:
            lasting /= 2
        packet = max(
            (size for size in PACKET_SIZES if size <= wanted and copies * size <= lasting),
            default=least,
        )
        packet = max(packet, least)
        if packet < wanted or allowed < (1 + wants_copy) * packet:
            path.is_limited = True
        self._packet_bytes = packet
        # What padding holds is not filled, or it would be held for ever; but it costs as much.
        cost = max(packet, path.padded_bytes)
        frame_s = 0.0
        if allowed < cost:
            longest_s = min(max(FRAME_RTTS * path.srtt_s, MIN_FRAME_S), MAX_FRAME_S)
            frame_s = min(cost / max(path.bytes_per_s, 1.0), longest_s)
        return _Budget(packet, wants_copy and allowed >= 2 * cost, frame_s)

    def _wanted_size(self, new: int) -> int:
        """Return how large a packet would be if the window were no matter."""
        path = self._path
        if path.has_queue or path.holds:
            return 0
        is_rough = (path.is_lossy or path.is_silent) and not self._is_sparse
        most = LOSSY_PACKET_BYTES if is_rough else CLEAN_PACKET_BYTES
        return _packet_size(min(self._full_size(new), most))

    def _full_size(self, new: int) -> int:
        """Return how large a packet is that holds all that is not acknowledged."""
        path = self._path
        in_flight = round(TOKEN_BYTES * (path.min_rtt_s + path.ack_delay_s) / self._gap_s)
        if path.is_silent:
            in_flight = max(self._sent_end - self._mark, 0)
        return OVERHEAD_BYTES + max(new, 0) + in_flight

    def _schedule(self, now: float, new: int, budget: _Budget) -> None:
        """Decide when to send next if no new token comes, and from when on if one does."""
        was_repeat = new <= 0 and not self._has_copy_due
        self._has_copy_due = False
        self._tail_copies = self._tail_copies + 1 if was_repeat else 0
        silence_s = self._path.silence_s(now)
        self._silent_since = self._path.waiting_since
        self._path.is_silent = silence_s > SWEEP_AFTER_S
        self._is_sparse = silence_s > (SPARSE_AFTER_HOLD_S if self._path.holds else SPARSE_AFTER_S)
        if silence_s > BEATS_ONLY_S:
            self._beat(now)
            return
        frame_s = max(budget.frame_s, SPARSE_GAP_S if self._is_sparse else 0.0)
        self._not_before = now + frame_s if frame_s else NOW
        if new > 0 and budget.has_copy and not budget.frame_s:
            self._has_copy_due = True
            self._path.note_copy()
            self._copies += 1
            is_spread = self._path.is_bursty and self._copies % PROBE_EVERY > 0
            spread_s = min(SPREAD_GAPS * self._gap_s, SPREAD_MAX_S)
            self._repeat_at = now + spread_s if is_spread else now
            return
        tail_s = TAIL_RTTS * self._path.srtt_s + self._path.ack_delay_s + TAIL_SLACK_S
        early_s = max(self._gap_s, MIN_FRAME_S) * 2 ** min(self._tail_copies, TAIL_DOUBLINGS)
        if self._log.end is not None and self._path.is_lossy and early_s < tail_s:
            tail_s = early_s
        elif was_repeat or silence_s > 0:
            tail_s = beat_s(silence_s, self._path.srtt_s, SERVER_RTTS)
        if self._log.end is None:
            tail_s = max(tail_s, min(TAIL_GAPS * self._gap_s, TAIL_GAPS_MAX_S))
        self._repeat_at = now + tail_s

    def _wants_copy(self, now: float, *, is_urgent: bool) -> bool:
        """Return whether the bundle just made should leave twice, at once.

        Though a queue stands, too: the copy is for another queue, and such copies are few. Not
        where the window is too small for a packet for each token, nor in an outage.
        """
        path = self._path
        if self._not_before > now or path.is_silent or path.wants_copy is None:
            return False
        if self._has_copy_due and self._repeat_at <= now and self._sent_end == self._log.length:
            return False  # That of a lossy path serves for this.
        return (is_urgent and path.has_two_queues) or path.wants_copy(now)

    def _beat(self, now: float) -> None:
        silence_s = self._path.silence_s(now)
        self._silent_since = self._path.waiting_since
        self._repeat_at = now + beat_s(silence_s, self._path.srtt_s, SERVER_RTTS)
        if silence_s > BEATS_ONLY_S:
            self._is_beating = True
            self._not_before = self._repeat_at

    def _end_silence(self) -> None:
        if self._is_beating or self._is_sparse:
            self._is_beating = self._is_sparse = False
            self._not_before = NOW


class QueuedSender(EloquentSender):
    """Eloquent without late binding: bundles are made when tokens appear, and wait in a queue.

    It exists to show why not: while the congestion window binds, the queue fills with bundles
    whose contents are stale before they leave.
    """

    def __init__(self, turn: int, log: Log, path: Path) -> None:
        super().__init__(turn, log, path)
        self._queue: deque[Bundle] = deque()

    def log_grew(self, now: float) -> None:
        """See `Sender.log_grew`."""
        super().log_grew(now)
        self._enqueue(now)

    def next_time(self) -> float | None:
        """See `Sender.next_time`."""
        return NOW if self._queue else super().next_time()

    def next_bundle(self, now: float, room: int) -> Bundle | None:
        """See `Sender.next_bundle`."""
        if not self._queue:
            self._enqueue(now)
        if not self._queue:
            return None
        bundle = self._queue[0]
        header = bundle_header_size(bundle.turn, bundle.number, bundle.offset)
        if header + len(bundle.data) > room:
            return None
        return self._queue.popleft()

    def _enqueue(self, now: float) -> None:
        while (due := super().next_time()) is not None and due <= now:
            bundle = super().next_bundle(now, QUEUED_BUNDLE_BYTES)
            if bundle is None:
                break
            self._queue.append(bundle)


SenderFactory = Callable[[int, Log, Path], Sender]

SCHEMES: dict[str, SenderFactory] = {
    "eloquent": EloquentSender,
    "eloquent-queued": QueuedSender,
    "duplicate": DuplicateSender,
    "retransmit": RetransmitSender,
}


def scheme(name: str) -> SenderFactory:
    """Return what makes senders of the scheme `name`.

    Raises:
        ConfigurationError: there is no such scheme.
    """
    try:
        return SCHEMES[name]
    except KeyError:
        known = ", ".join(SCHEMES)
        raise ConfigurationError(f"There is no scheme {name!r}: choose one of {known}.") from None
