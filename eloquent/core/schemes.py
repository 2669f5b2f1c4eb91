"""The schemes: `eloquent` and those it is compared with, behind one interface (`Sender`)."""

from collections import deque
from collections.abc import Callable

from eloquent.core.log import Log
from eloquent.core.path import Path
from eloquent.core.sender import NOW, Sender
from eloquent.core.wire import Bundle, bundle_header_size
from eloquent.errors import ConfigurationError

REPEAT_S = 0.003
"On a lossy path a bundle with new tokens is repeated once after this time."

TAIL_RTTS = 1.25
TAIL_SLACK_S = 0.010
"With no new token, unacknowledged ones are repeated after `TAIL_RTTS` round trips plus this."

TAIL_GROWTH = 1.5
TAIL_MAX_S = 0.5
"Each further tail repeat comes later by `TAIL_GROWTH`, but never later than `TAIL_MAX_S`."

QUEUED_BUNDLE_BYTES = 1150
"Size limit of a bundle made before its packet is known: fits the smallest QUIC packet."


class EloquentSender(Sender):
    """Each bundle carries every token that the reader is not known to have.

    The rule is the paper's (*Eloquent*, arXiv 2401.12961, section 3). Ours are the time
    redundancy (one repeat on a lossy path, a slow beat at the tail) and what happens when the
    unacknowledged tokens outgrow a packet: consecutive bundles cover them from the oldest byte
    on, and only what is lost goes out again, so that the cost stays linear.
    """

    def __init__(self, turn: int, log: Log, path: Path) -> None:
        super().__init__(turn, log, path)
        self._repeat_at = 0.0
        self._tail_repeats = 0

    def next_time(self) -> float | None:
        """See `Sender.next_time`."""
        if self._log.length > self._sent_end or self._resend:
            return NOW
        return self._repeat_at if self._mark < self._log.length else self._confirm_time()

    def next_bundle(self, now: float, room: int) -> Bundle | None:
        """See `Sender.next_bundle`."""
        self._doubt(now)
        due = self.next_time()
        if due is None or due > now:
            return None
        start = self._mark
        size = self._data_room(start, self._log.length, room)
        if size < self._log.length - start:
            start = self._overflow_start()
            size = self._data_room(start, self._log.length, room)
        if size <= 0:
            return None
        self._schedule_repeat(now, has_new=start + size > self._sent_end)
        return self._make(start, start + size, now)

    def _overflow_start(self) -> int:
        """Return where to go on when not all that is unacknowledged fits the packet."""
        for start, _ in self._resend:
            return start
        return self._sent_end if self._sent_end < self._log.length else self._mark

    def _schedule_repeat(self, now: float, *, has_new: bool) -> None:
        if has_new:
            self._tail_repeats = 0
            # Where the window binds, a repeat would take the place of the next tokens; at the
            # log's end there are none.
            is_affordable = self._log.end is not None or not self._path.is_blocked(now)
            if self._path.is_lossy and is_affordable:
                self._repeat_at = now + REPEAT_S
                return
        tail_s = TAIL_RTTS * self._path.srtt_s + TAIL_SLACK_S
        limit_s = max(tail_s, TAIL_MAX_S)
        self._repeat_at = now + min(tail_s * TAIL_GROWTH**self._tail_repeats, limit_s)
        if tail_s * TAIL_GROWTH**self._tail_repeats < limit_s:
            self._tail_repeats += 1


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


class RetransmitSender(Sender):
    """Each bundle carries new tokens only; what is lost is sent again (as TCP and QUIC streams do).

    With `copies=2` each bundle leaves twice, back to back: the paper's "send every packet twice".
    """

    def __init__(self, turn: int, log: Log, path: Path, *, copies: int = 1) -> None:
        super().__init__(turn, log, path)
        self._copies = copies
        self._pending_copies: deque[tuple[int, int]] = deque()

    def next_time(self) -> float | None:
        """See `Sender.next_time`."""
        has_more = self._log.length > self._sent_end
        is_due = bool(self._pending_copies or self._resend or has_more)
        return NOW if is_due else self._confirm_time()

    def next_bundle(self, now: float, room: int) -> Bundle | None:
        """See `Sender.next_bundle`."""
        self._doubt(now)
        if self._pending_copies:
            start, stop = self._pending_copies[0]
            size = self._data_room(start, stop, room)
            if size <= 0:
                return None
            self._pending_copies.popleft()
            if start + size < stop:
                self._pending_copies.appendleft((start + size, stop))
            return self._make(start, start + size, now)
        start, stop = next(iter(self._resend), (self._sent_end, self._log.length))
        size = self._data_room(start, stop, room)
        if size <= 0:
            return None
        self._pending_copies.extend([(start, start + size)] * (self._copies - 1))
        return self._make(start, start + size, now)


class DuplicateSender(RetransmitSender):
    """`RetransmitSender` with every packet sent twice."""

    def __init__(self, turn: int, log: Log, path: Path) -> None:
        super().__init__(turn, log, path, copies=2)


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
