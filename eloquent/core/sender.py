"""What every sender does: numbering bundles and keeping track of what the reader has.

A scheme (`eloquent.core.schemes`) adds the one decision in which schemes differ: which bytes go
into the next bundle, and when. The connection asks for a bundle only when it can write a packet
(late binding), so nothing is queued between this decision and the wire.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from eloquent.core.log import Log
from eloquent.core.path import Path
from eloquent.core.ranges import RangeSet
from eloquent.core.wire import Bundle, Report, bundle_header_size
from eloquent.errors import WireError

NOW = float("-inf")
"What `next_time` returns when a bundle is due at once."

MIN_ROOM_BYTES = 160
"A packet with less room than this takes a bundle only if all that is to be sent fits."

CONFIRM_RTTS = 1.25
CONFIRM_SLACK_S = 0.06
CONFIRM_TRIES = 8
"""A log that is acknowledged to its end and not reported as read after `CONFIRM_RTTS` round trips
and the slack (the reader's report may wait 20 ms) goes out again from the last report on; each of
`CONFIRM_TRIES` further times after twice the wait. Then the application is not there any more."""


REMEMBERED_BUNDLES = 256
"""So many bundles that were declared lost are remembered: they may be acknowledged after all. And
the fate of so many, to see whether losses come together."""

TOGETHER_S = 0.015
"Bundles that leave within this time of each other share a burst of losses."


@dataclass(frozen=True, slots=True)
class _Sent:
    start: int
    stop: int
    has_new: bool
    "Whether it was the first to carry some of this."


class Sender(ABC):
    """Sends one turn's log to one reader.

    Invariants: `_mark` is the lowest byte not yet seen by the reader, by the transport's word or
    the reader's; `_reported` what the reader said, and never above `_mark`; `_sent_end` the end of
    all that was ever sent; `_resend` holds sent bytes, not seen, that no bundle in flight carries.
    """

    def __init__(self, turn: int, log: Log, path: Path) -> None:
        self._turn = turn
        self._log = log
        self._path = path
        self._seen = RangeSet()
        self._mark = 0
        self._newest_acked = -1
        self._reported = 0
        self._in_flight: dict[int, _Sent] = {}
        self._given_up: dict[int, _Sent] = {}
        self._together: set[int] = set()
        "Bundles that left at about the time of the one before, whose fates are not both known."
        self._fates: dict[int, bool] = {}
        "Which of the last bundles were lost."
        self._next_number = 0
        self._sent_end = 0
        self._resend = RangeSet()
        self._made_at = 0.0
        self._confirm_tries = 0

    @property
    def log(self) -> Log:
        """The log that is being sent."""
        return self._log

    @property
    def bundles_sent(self) -> int:
        """How many bundles were made."""
        return self._next_number

    @property
    def is_complete(self) -> bool:
        """Whether the reader has said that it has the whole log, or will never say it."""
        if self._log.end is None:
            return False
        is_given_up = self._mark == self._log.length and self._confirm_tries > CONFIRM_TRIES
        return self._reported == self._log.length or is_given_up

    def start_at(self, offset: int) -> None:
        """Leave out the bytes below `offset`, which the reader has; before the first bundle."""
        self._seen.add(0, offset)
        self._mark = self._reported = self._sent_end = offset

    def log_grew(self, now: float) -> None:  # noqa: B027  (only a scheme that queues needs it)
        """Tell the sender, at time `now` in seconds, that events were appended to the log."""

    @abstractmethod
    def next_time(self) -> float | None:
        """Return when the next bundle is due: `NOW`, a time in seconds, or None for never."""

    @abstractmethod
    def next_bundle(self, now: float, room: int) -> Bundle | None:
        """Make the bundle for a packet that is being written.

        `now` is in seconds, `room` in bytes, the bundle's header included. None: nothing is due,
        or the room is too small to be worth a packet; the caller asks again with the next packet.
        """

    @property
    def is_copy_due(self) -> bool:
        """Whether the next bundle should repeat the last one, in the very next packet."""
        return False

    def on_acked(self, number: int) -> None:
        """Take the transport's word that bundle `number` reached the peer, if late."""
        sent = self._in_flight.pop(number, None)
        if sent is not None:
            self._path.on_outcome(lost=False)
            self._note_fate(number, lost=False)
        else:
            sent = self._given_up.pop(number, None)
            if sent is None:
                return
            self._path.counts.late_bundles += 1
            self._path.on_late()
        self._newest_acked = max(self._newest_acked, number)
        self._add_seen(sent.start, sent.stop)

    def on_lost(self, number: int) -> None:
        """Take the transport's word that bundle `number` was lost (which can prove wrong)."""
        sent = self._in_flight.pop(number, None)
        if sent is None:
            return
        self._path.on_outcome(lost=True)
        self._note_fate(number, lost=True)
        self._given_up[number] = sent
        if len(self._given_up) > REMEMBERED_BUNDLES:
            del self._given_up[next(iter(self._given_up))]
        is_missing = self._add_resend(sent.start, sent.stop)
        counts = self._path.counts
        counts.lost_bundles += 1
        counts.resent_bundles += is_missing
        counts.recovered_bundles += sent.has_new and not is_missing

    def on_report(self, report: Report) -> None:
        """Take the reader's own word, which outranks the transport's.

        A report that lacks bytes which an acknowledged bundle carried moves the mark back, but
        only if it is newer than that acknowledgement's bundle: one in flight says nothing.

        Raises:
            WireError: it acknowledges what was never sent; the connection must end.
        """
        if report.contiguous > self._sent_end or report.newest >= self._next_number:
            raise WireError(
                f"A report for turn {self._turn} acknowledges byte {report.contiguous} and bundle "
                f"{report.newest}, which were never sent: the peer is broken or lies."
            )
        if report.contiguous < self._reported:
            return  # Overtaken by a later one: what a reader has, it keeps.
        self._reported = report.contiguous
        if report.contiguous > self._mark:
            self._add_seen(0, report.contiguous)
        elif report.contiguous < self._mark and report.newest >= self._newest_acked:
            self._move_mark_back(report.contiguous)

    def _confirm_time(self) -> float | None:
        """Return when to doubt that an acknowledged log was read to its end; None: not at all."""
        is_acknowledged = self._log.end is not None and self._mark == self._log.length
        if not is_acknowledged or self.is_complete:
            return None
        wait_s = CONFIRM_RTTS * self._path.srtt_s + CONFIRM_SLACK_S
        return self._made_at + wait_s * (1 << self._confirm_tries)

    def _doubt(self, now: float) -> None:
        """Bring back what was acknowledged and never reported, if it is time to doubt it."""
        time = self._confirm_time()
        if time is not None and time <= now:
            self._confirm_tries += 1
            self._move_mark_back(self._reported)

    def _move_mark_back(self, offset: int) -> None:
        missing_end = self._mark
        self._seen.subtract(offset, missing_end)
        self._mark = offset
        self._add_resend(offset, missing_end)

    def _note_fate(self, number: int, *, lost: bool) -> None:
        """Tell the path what became of two bundles that left together."""
        self._fates[number] = lost
        if len(self._fates) > REMEMBERED_BUNDLES:
            del self._fates[next(iter(self._fates))]
        for first, second in ((number - 1, number), (number, number + 1)):
            if second in self._together and first in self._fates and second in self._fates:
                self._together.remove(second)
                self._path.on_pair(self._fates[first], self._fates[second])

    def _make(self, start: int, stop: int, now: float) -> Bundle:
        number = self._next_number
        self._next_number += 1
        self._in_flight[number] = _Sent(start, stop, has_new=stop > self._sent_end)
        self._path.counts.bundles += 1
        if number and now - self._made_at <= TOGETHER_S:
            self._together.add(number)
        self._made_at = now
        self._sent_end = max(self._sent_end, stop)
        self._resend.subtract(start, stop)
        data = self._log.read(start, stop)
        return Bundle(self._turn, number, start, data, self._path.is_timed)

    def _data_room(self, start: int, stop: int, room: int, wanted: int | None = None) -> int:
        """Return how much of `start..stop` to put in a packet with `room` bytes; 0 for none.

        `wanted` is how many of them to use, if the packet is not to be a full one.
        """
        header = bundle_header_size(self._turn, self._next_number, start)
        available = min(room, room if wanted is None else wanted) - header
        if stop - start <= available:
            return stop - start
        return max(available, 0) if room >= MIN_ROOM_BYTES else 0

    def _add_seen(self, start: int, stop: int) -> None:
        self._seen.add(start, stop)
        self._resend.subtract(start, stop)
        self._mark = self._seen.first_gap()

    def _add_resend(self, start: int, stop: int) -> bool:
        """Put into `_resend` what of `start..stop` is neither seen nor in flight, if anything."""
        missing = RangeSet()
        for low, high in self._seen.gaps(start, stop):
            missing.add(low, high)
        for other in self._in_flight.values():
            missing.subtract(other.start, other.stop)
        for low, high in missing:
            self._resend.add(low, high)
        return bool(missing)
