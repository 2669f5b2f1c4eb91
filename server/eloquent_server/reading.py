"""How long a turn's readers can go on reading what they have, by their own reports."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from eloquent.core.wire import Report
from eloquent.serving import Reader

MAX_BUFFERED_S = 30.0
"Of a reader who does not read at all, too."

_SMOOTHING = 0.5
"Weight of the newest measurement."


@dataclass(slots=True)
class _Progress:
    report: Report
    at: float
    bytes_per_s: float | None = None
    "How fast the application takes what is there; None while it has never had any left."


class ReadingClock:
    """The readers of one turn."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress: dict[Reader, _Progress] = {}

    def buffered_s(self, readers: Iterable[Reader]) -> float:
        """Return for how long the reader who has least has text; 0 where that is not known.

        A reader whose link is dead is not reached by what comes now, so it can wait, and a turn
        without readers, too. To be asked now and then: what comes between two questions is one
        measurement.
        """
        now = self._clock()
        known, self._progress = self._progress, {}
        left_s = []
        for reader in readers:
            lasts_s, report = 0.0, reader.report
            if report is not None:
                progress = self._progress[reader] = _after(known.get(reader), report, now)
                lasts_s = _left_s(progress, now)
            left_s.append(MAX_BUFFERED_S if reader.is_silent else lasts_s)
        return min(left_s, default=MAX_BUFFERED_S)


def _after(before: _Progress | None, report: Report, now: float) -> _Progress:
    if before is None:
        return _Progress(report, now)
    if report == before.report:
        return before
    rate = before.bytes_per_s
    # Who had nothing left reads as fast as text comes, which says nothing of what they could do.
    if before.report.unread and now > before.at:
        taken = _taken(report) - _taken(before.report)
        measured = taken / (now - before.at)
        rate = measured if rate is None else rate + _SMOOTHING * (measured - rate)
    return _Progress(report, now, rate)


def _taken(report: Report) -> int:
    return report.contiguous - report.unread


def _left_s(progress: _Progress, now: float) -> float:
    unread, rate = progress.report.unread, progress.bytes_per_s
    if not unread or rate is None:
        return 0.0
    lasts_s = MAX_BUFFERED_S if unread > rate * MAX_BUFFERED_S else unread / rate
    return max(0.0, lasts_s - (now - progress.at))
