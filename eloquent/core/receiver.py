"""The reader's side of one turn: bundles in, events out, in order and once."""

from collections.abc import Iterable
from dataclasses import dataclass

from eloquent.core.events import Event, EventDecoder
from eloquent.core.ranges import RangeSet
from eloquent.core.wire import (
    ARRIVAL_UNIT_S,
    LEAST_WINDOW_BYTES,
    MAX_ARRIVALS,
    Arrival,
    Bundle,
    Ended,
    Report,
)
from eloquent.errors import IntegrityError

REPORT_BEAT_S = 0.25
"While bundles arrive, the reader reports at least this often."

GAP_REPORT_S = 0.02
"A report about a gap waits at least this long after the one before it."

TIMED_REPORT_S = 0.01
"A report of arrival times waits at least this long after the one before it."

MAX_AHEAD_BYTES = 1 << 20
"Bytes above the first gap that are kept; a bundle beyond is dropped, and reported as missing."


@dataclass(slots=True)
class ReceiverStats:
    """What happened on the way, counted at the reader."""

    datagrams: int = 0
    "Bundles received."
    loss_recovered: int = 0
    "Bundles that never came although the reader has every byte below the newest that did."
    repeated_bytes: int = 0
    "Bytes received that the reader already had: the cost of redundancy."


class Receiver:
    """Puts one turn's log together from bundles in any order, repeated or overlapping."""

    def __init__(self, turn: int = 0, *, offset: int = 0) -> None:
        """Begin at `offset`, where an event starts: what is before it was read elsewhere."""
        self._turn = turn
        self._decoder = EventDecoder(offset)
        self._confirmation: Ended | None = None
        self._contiguous = offset
        self._ahead = bytearray()
        self._ahead_held = RangeSet()
        self._newest = -1
        self._numbers = RangeSet()
        self._numbers_count = 0
        self._report_at: float | None = None
        self._reported_at: float | None = None
        self._recovered_before = 0
        self._taken: int | None = None
        self._reported_unread = 0
        self._clock_s = 0.0
        self._arrivals: dict[int, int] = {}
        "Of timed bundles, by number, when they came; not reported yet."
        self._stats = ReceiverStats()

    @property
    def contiguous(self) -> int:
        """Bytes of the log that were put together and handed out."""
        return self._contiguous

    @property
    def decoded(self) -> int:
        """Where the last event that was handed out ends."""
        return self._contiguous - self._decoder.pending

    @property
    def passed_over(self) -> int:
        """Bytes of the log that are of kinds unknown here, and were not handed out."""
        return self._decoder.passed_over

    @property
    def is_complete(self) -> bool:
        """Whether the log's end has come and agrees with all before it."""
        return self._decoder.end is not None

    @property
    def stats(self) -> ReceiverStats:
        """Counters up to now."""
        return self._stats

    def on_bundle(self, bundle: Bundle, now: float) -> list[Event]:
        """Take a bundle that arrived at `now` (seconds); return the events that it completes.

        Raises:
            WireError: the log cannot be read; the turn must end.
            IntegrityError: the log ended and is not what the server generated or confirmed.
        """
        self._stats.datagrams += 1
        if self._numbers.gaps(bundle.number, bundle.number + 1):
            self._numbers.add(bundle.number, bundle.number + 1)
            self._numbers_count += 1
        self._newest = max(self._newest, bundle.number)
        if bundle.is_timed:
            self._note_arrival(bundle.number, round((now - self._clock_s) / ARRIVAL_UNIT_S))
        fresh = self._take(bundle)
        if not self._ahead_held:
            recovered = self._newest + 1 - self._numbers_count
            self._stats.loss_recovered = self._recovered_before + recovered
        events = self._decoder.feed(fresh) if fresh else []
        self._check_confirmation()
        self._schedule_report(now)
        return events

    def attach(self, turn: int, *, clock_s: float = 0.0) -> None:
        """Go on over a new connection, where the turn has this number and bundles count anew.

        `clock_s` is when the clock begins by which arrivals are reported there.
        """
        self._turn = turn
        self._clock_s = clock_s
        self._newest = -1
        self._numbers = RangeSet()
        self._numbers_count = 0
        self._recovered_before = self._stats.loss_recovered
        self._report_at = self._reported_at = None
        self._arrivals.clear()

    def on_taken(self, offset: int) -> None:
        """Take note that the application has taken the events below `offset`.

        Without any such note it counts as taking them as they come.
        """
        self._taken = offset
        if self._reported_unread - self._unread >= max(
            self._reported_unread // 2, LEAST_WINDOW_BYTES // 2
        ):
            self.report_again()

    @property
    def _unread(self) -> int:
        taken = self._contiguous if self._taken is None else self._taken
        return max(0, self._contiguous - taken)

    def on_ended(self, ended: Ended) -> None:
        """Take the server's confirmation on the stream, which may come before the log's end.

        Raises:
            IntegrityError: it is not what the log's own end said.
        """
        self._confirmation = ended
        self._check_confirmation()

    def next_time(self) -> float | None:
        """Return when the next report is due, in seconds, or None."""
        return self._report_at

    def next_report(self, now: float, most_arrivals: int = MAX_ARRIVALS) -> Report | None:
        """Return the report if one is due; what is too much for it is in the next one."""
        if self._report_at is None or self._report_at > now:
            return None
        self._report_at = None
        self._reported_at = now
        arrivals: tuple[Arrival, ...] = ()
        if self._arrivals:
            numbers = sorted(self._arrivals)[:most_arrivals]
            arrivals = tuple(Arrival(number, self._arrivals.pop(number)) for number in numbers)
            self._report_at = now + TIMED_REPORT_S if self._arrivals else None
        self._reported_unread = self._unread
        return Report(self._turn, self._contiguous, self._newest, self._unread, arrivals)

    def report_again(self) -> None:
        """Make a report due at once."""
        self._report_at = float("-inf")

    def tell_again(self, arrivals: Iterable[Arrival]) -> None:
        """Take note that the report of these arrivals was lost."""
        for arrival in arrivals:
            self._note_arrival(arrival.number, arrival.time)
            self.report_again()

    def _note_arrival(self, number: int, time: int) -> None:
        self._arrivals[number] = time
        if len(self._arrivals) > MAX_ARRIVALS:
            del self._arrivals[next(iter(self._arrivals))]

    def _check_confirmation(self) -> None:
        end, said = self._decoder.end, self._confirmation
        if said and not end and self._contiguous >= said.length != self.decoded:
            # What was taken for events has run over the place where `End` starts.
            raise IntegrityError(
                "The answer cannot be read from the offset that was asked: no event starts there. "
                "Resume at an offset as it was given, or at 0."
            )
        if end and said and (end.length, end.digest) != (said.length, said.digest):
            raise IntegrityError(
                "The server's confirmation of the answer is not that of the answer received: the "
                "server is faulty. Ask again; if it happens again, report it."
            )

    def _take(self, bundle: Bundle) -> bytes:
        """Keep what is new of a bundle; return the bytes that the log now goes on with."""
        start, stop = bundle.offset, bundle.offset + len(bundle.data)
        if stop > self._contiguous + MAX_AHEAD_BYTES:
            return b""
        new = self._ahead_held.gaps(max(start, self._contiguous), stop)
        self._stats.repeated_bytes += len(bundle.data) - sum(high - low for low, high in new)
        for low, high in new:
            self._store(low, bundle.data[low - start : high - start])
        end = self._ahead_held.first_gap(self._contiguous)
        fresh = bytes(self._ahead[: end - self._contiguous])
        del self._ahead[: end - self._contiguous]
        self._ahead_held.subtract(0, end)
        self._contiguous = end
        return fresh

    def _store(self, offset: int, data: bytes) -> None:
        position = offset - self._contiguous
        if len(self._ahead) < position + len(data):
            self._ahead.extend(bytes(position + len(data) - len(self._ahead)))
        self._ahead[position : position + len(data)] = data
        self._ahead_held.add(offset, offset + len(data))

    def _schedule_report(self, now: float) -> None:
        if self._reported_at is None:
            self._reported_at = now
        if self._arrivals:
            wait_s = TIMED_REPORT_S
        else:
            wait_s = GAP_REPORT_S if self._ahead_held or self.is_complete else REPORT_BEAT_S
        due = max(now, self._reported_at + wait_s)
        self._report_at = due if self._report_at is None else min(self._report_at, due)
