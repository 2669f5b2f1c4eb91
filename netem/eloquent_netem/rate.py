"""Rate: when a link can take the next packet, and when that packet has left it."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from eloquent_netem.errors import NetemError
from eloquent_netem.loss import merge_spans, span_at

OPPORTUNITY_BYTES = 1500
"What passes at one opportunity of a trace, IP header included."

MS_PER_S = 1000

RECENT_S = 0.2
"The present rate of a trace is that of so long before."


class TraceError(NetemError):
    """A file is not a trace in mahimahi's format."""


class Rate(Protocol):
    """The capacity of a link; calls come in order of time."""

    def ready_from(self, now: float) -> float:
        """Return the first time, `now` or later, at which service of a packet can begin."""

    def serve(self, start: float, size: float, until: float = math.inf) -> tuple[float, float]:
        """Serve `size` bytes from `start` on, which is what `ready_from` returned, to `until`.

        Return when the packet has left, before `until`, and 0; or else `until` and how many of the
        bytes are left to serve then. What is served uses the capacity up.
        """

    def bits_per_s(self, now: float) -> float:
        """Return the present rate, as one who has watched the link knows it."""


class UnlimitedRate:
    """Takes no time."""

    def ready_from(self, now: float) -> float:
        """See `Rate.ready_from`."""
        return now

    def serve(self, start: float, size: float, until: float = math.inf) -> tuple[float, float]:
        """See `Rate.serve`."""
        return (start, 0.0) if start < until else (until, size)

    def bits_per_s(self, now: float) -> float:
        """See `Rate.bits_per_s`."""
        return math.inf


class FixedRate(UnlimitedRate):
    """A constant number of bits per second."""

    def __init__(self, bits_per_s: float) -> None:
        if not bits_per_s > 0:
            raise ValueError(f"a rate is above 0 bit/s, not {bits_per_s}")
        self._seconds_per_byte = 8 / bits_per_s

    def serve(self, start: float, size: float, until: float = math.inf) -> tuple[float, float]:
        """See `Rate.serve`."""
        left = start + size * self._seconds_per_byte
        if left < until:
            return left, 0.0
        return until, max(size - (until - start) / self._seconds_per_byte, 0.0)

    def bits_per_s(self, now: float) -> float:
        """See `Rate.bits_per_s`."""
        return 8 / self._seconds_per_byte


class SteppedRate(UnlimitedRate):
    """A rate that changes at given times: pairs (from when in seconds, bits per second).

    The first holds before its time too, the last for ever.

    Raises:
        ValueError: there is none, their times do not rise, or a rate is not above 0.
    """

    def __init__(self, steps: Sequence[tuple[float, float]]) -> None:
        if not steps or any(later[0] <= earlier[0] for earlier, later in pairwise(steps)):
            raise ValueError("steps of a rate have times that rise, and there is at least one")
        if not all(bits_per_s > 0 for _, bits_per_s in steps):
            raise ValueError("a rate is above 0 bit/s at all times; an outage holds what waits")
        self._bytes_per_s = [bits_per_s / 8 for _, bits_per_s in steps]
        self._ends_s = [from_s for from_s, _ in steps[1:]] + [math.inf]

    @property
    def greatest_bits_per_s(self) -> float:
        """The rate at its best."""
        return 8 * max(self._bytes_per_s)

    def bits_per_s(self, now: float) -> float:
        """See `Rate.bits_per_s`."""
        return 8 * self._bytes_per_s[bisect_right(self._ends_s, now)]

    def serve(self, start: float, size: float, until: float = math.inf) -> tuple[float, float]:
        """See `Rate.serve`."""
        index = bisect_right(self._ends_s, start)
        while True:
            end_s, bytes_per_s = self._ends_s[index], self._bytes_per_s[index]
            left = start + size / bytes_per_s
            if left < until and left <= end_s:
                return left, 0.0
            if until <= end_s:
                return until, max(size - (until - start) * bytes_per_s, 0.0)
            size -= (end_s - start) * bytes_per_s
            start = end_s
            index += 1


class TraceRate:
    """Opportunities at given milliseconds, as mahimahi's mm-link replays them (`link_queue.cc`).

    At each opportunity `packet_bytes` can pass: a large packet, several small ones, or the rest of
    one that began at the opportunity before. Bytes that nobody takes at the time are lost. The
    trace starts over when its last millisecond has come: what is at 0 comes at the same instant.

    Raises:
        ValueError: the milliseconds are no trace.
    """

    def __init__(self, times_ms: Sequence[int], *, packet_bytes: int = OPPORTUNITY_BYTES) -> None:
        if packet_bytes < 1:
            raise ValueError(f"at an opportunity passes 1 byte or more, not {packet_bytes}")
        if not times_ms or times_ms[0] < 0 or times_ms[-1] == 0:
            raise ValueError("a trace has an opportunity after millisecond 0, and none before it")
        if any(later < earlier for earlier, later in pairwise(times_ms)):
            raise ValueError("a trace's milliseconds never go back")
        self._times_ms = tuple(times_ms)
        self._period_ms = times_ms[-1]
        self._packet_bytes = packet_bytes
        self._round = 0
        self._index = 0
        self._time = self._opportunity()
        self._bytes_left: float = packet_bytes
        "Of the opportunity `_index` in `_round`, at `_time`: all before it are used or lost."

    @property
    def mean_bits_per_s(self) -> float:
        """The rate over the whole trace."""
        return len(self._times_ms) * self._packet_bytes * 8 * MS_PER_S / self._period_ms

    def bits_per_s(self, now: float) -> float:
        """See `Rate.bits_per_s`: what passed in the last 200 ms; at least one opportunity."""
        until_s = max(now, RECENT_S)
        passed = self._passed(until_s) - self._passed(until_s - RECENT_S)
        return max(passed, 1) * self._packet_bytes * 8 / RECENT_S

    def _passed(self, now: float) -> int:
        """Return how many opportunities there have been by a time."""
        rounds, within_ms = divmod(now * MS_PER_S, self._period_ms)
        return int(rounds) * len(self._times_ms) + bisect_right(self._times_ms, within_ms)

    def ready_from(self, now: float) -> float:
        """See `Rate.ready_from`."""
        if self._time < now:
            self._skip_to(now)
        return self._time

    def serve(self, start: float, size: float, until: float = math.inf) -> tuple[float, float]:
        """See `Rate.serve`."""
        while self._time < until:
            left, served = self._time, min(size, self._bytes_left)
            size -= served
            self._bytes_left -= served
            if self._bytes_left == 0:
                self._advance()
            if size == 0:
                return left, 0.0
        return until, size

    def _advance(self) -> None:
        self._index += 1
        if self._index == len(self._times_ms):
            self._index = 0
            self._round += 1
        self._bytes_left = self._packet_bytes
        self._time = self._opportunity()

    def _skip_to(self, now: float) -> None:
        """Go to the first opportunity at `now` or later; `now` is after the present one."""
        # Seek a millisecond early, since rounding may put `now` beside a whole one; then walk.
        self._round, within_ms = divmod(int(now * MS_PER_S) - 1, self._period_ms)
        self._index = bisect_left(self._times_ms, within_ms)
        self._bytes_left = self._packet_bytes
        self._time = self._opportunity()
        while self._time < now:
            self._advance()

    def _opportunity(self) -> float:
        return (self._round * self._period_ms + self._times_ms[self._index]) / MS_PER_S


class PausedRate:
    """Serves nothing during given spans of time; what waits is kept: a handover that holds.

    Otherwise the rate is what it would be without them: a trace goes on meanwhile. Of a packet
    whose service a span interrupts, the rest is served after it.

    Raises:
        ValueError: a span ends before it begins.
    """

    def __init__(self, rate: Rate, spans_s: Iterable[tuple[float, float]]) -> None:
        self._rate = rate
        self._spans_s = merge_spans(spans_s)

    def ready_from(self, now: float) -> float:
        """See `Rate.ready_from`."""
        ready = self._rate.ready_from(now)
        while (span := span_at(self._spans_s, ready)) is not None:
            ready = self._rate.ready_from(span[1])
        return ready

    def serve(self, start: float, size: float, until: float = math.inf) -> tuple[float, float]:
        """See `Rate.serve`."""
        for index in range(bisect_right(self._spans_s, (start, math.inf)), len(self._spans_s)):
            pause_s, resume_s = self._spans_s[index]
            if pause_s < start:
                continue  # The rate within has pauses of its own, which were over after this one.
            if until <= pause_s:
                break
            left, size = self._rate.serve(start, size, pause_s)
            if left < pause_s:
                return left, size
            start = self.ready_from(resume_s)
            if until <= start:
                return until, size
        return self._rate.serve(start, size, until)

    def bits_per_s(self, now: float) -> float:
        """See `Rate.bits_per_s`; what it is without the pauses."""
        return self._rate.bits_per_s(now)


def load_trace(path: Path) -> list[int]:
    """Read a mahimahi trace, the milliseconds for `TraceRate`, from a file with one a line.

    Raises:
        TraceError: the file cannot be read or is no such trace; it names the file and the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TraceError(
            f"The trace {path} cannot be read: {error.strerror}. Give the path of a file in "
            "mahimahi's format."
        ) from error
    times_ms: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text.isdigit():
            shown = text[:40].decode("ascii", "backslashreplace")
            raise TraceError(
                f"{path}, line {number}: '{shown}' is no millisecond. In a trace each line is a "
                "whole number, 0 or more: a millisecond at which a packet can pass."
            )
        time_ms = int(text)
        if times_ms and time_ms < times_ms[-1]:
            raise TraceError(
                f"{path}, line {number}: {time_ms} comes after {times_ms[-1]}. A trace's "
                "milliseconds never go back: sort the lines."
            )
        times_ms.append(time_ms)
    if not times_ms or times_ms[-1] == 0:
        raise TraceError(
            f"{path}, line {len(times_ms)}: the trace ends without a packet after millisecond 0. "
            "Its last line is its length and must be above 0."
        )
    return times_ms
