"""The pacer: gives text to the eye at an even pace, never later than a bound allows.

Sans-I/O, on the client: events go in as they arrive and come out in order, text in pieces of whole
characters. `docs/design.md`, "Pacer".
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from eloquent.core.events import End, Event, Failure, TextDelta
from eloquent.core.graphemes import clusters, continues

PaceMode = Literal["off", "smooth", "reading"]

MAX_ADDED_DELAY_S = 0.5
"No part of an answer is held longer than this, whatever the pace."

READING_CHARS_PER_S = 50.0
"The pace of `reading`: that of somebody who reads fast, twice what is usual."

FRAME_S = 1 / 60
"Text comes out at most this often: no screen shows more."

MAX_SPLIT_CHARS = 4096
"A longer piece of text (an answer that is resumed) is not new to the eye: it passes whole."

FIRST_GAP_S = 0.05
"What is taken for the longest gap before there was any."

ROUNDING = 1e-9
"Credit that floating-point arithmetic may have lost by the time it is due."

GAP_MEMORY_S = 4.0
"A gap between arrivals counts with 1/e of its length after this time."


@dataclass(slots=True)
class PacerStats:
    """What the pacer has cost, in characters (as readers count them) and seconds."""

    characters: int = 0
    "Characters given out."
    added_delay_max_s: float = 0.0
    "The longest that one was held."
    added_delay_sum_s: float = 0.0

    @property
    def added_delay_mean_s(self) -> float:
        """The mean time that a character was held."""
        return self.added_delay_sum_s / self.characters if self.characters else 0.0


@dataclass(slots=True)
class _Held:
    arrived_s: float
    what: Event | str
    "One character of the text, or an event that passes whole."


class Pacer:
    """Holds events back so that text appears evenly.

    `smooth` is a low-pass filter: what waits flows out at the rate that would empty it within the
    longest recent gap between arrivals, so steady arrivals are held hardly at all and bursts are
    spread. `reading` lets `chars_per_s` characters a second through. `off` passes all on at once.
    In every mode nothing is held longer than `max_delay_s`, and an `End` or a `Failure` lets
    everything go at once.
    """

    def __init__(
        self,
        mode: PaceMode = "smooth",
        *,
        max_delay_s: float = MAX_ADDED_DELAY_S,
        chars_per_s: float = READING_CHARS_PER_S,
    ) -> None:
        self._mode = mode
        self._max_delay_s = max_delay_s
        self._chars_per_s = chars_per_s
        self._queue: deque[_Held] = deque()
        self._credit = 0.0
        "Characters that may leave, earned with time."
        self._earned_at = 0.0
        self._popped_at = float("-inf")
        self._pushed_at: float | None = None
        self._gap_s = FIRST_GAP_S
        self._flushes = mode == "off"
        self._stats = PacerStats()

    @property
    def stats(self) -> PacerStats:
        """Counters up to now."""
        return self._stats

    def push(self, now: float, events: Iterable[Event]) -> None:
        """Take events that arrived at `now` (seconds, never going back)."""
        if not self._queue:
            self._credit = 1.0  # whatever the pace, the first character need not wait
            self._earned_at = now
        self._earn(now)
        if self._pushed_at is not None:
            gap_s = now - self._pushed_at
            self._gap_s = max(gap_s, self._gap_s * math.exp(-gap_s / GAP_MEMORY_S))
        self._pushed_at = now
        for event in events:
            if isinstance(event, TextDelta) and len(event.text) <= MAX_SPLIT_CHARS:
                self._hold(now, event.text)
            else:
                self._queue.append(_Held(now, event))
                self._flushes = self._flushes or isinstance(event, End | Failure)

    def flush(self) -> None:
        """Let everything go at once, from now on: nothing more will come."""
        self._flushes = True

    def next_time(self) -> float | None:
        """Return when `pop` has something to give, in seconds, or None while nothing waits."""
        if not self._queue:
            return None
        head = self._queue[0]
        if self._flushes or not isinstance(head.what, str):
            return self._earned_at
        earned_at = self._earned_at + max(0.0, 1 - self._credit) / self._rate()
        frame_at = self._popped_at + FRAME_S
        return min(max(earned_at, frame_at), head.arrived_s + self._max_delay_s)

    def pop(self, now: float) -> list[Event]:
        """Return what may be shown at `now`; consecutive text is one event."""
        self._earn(now)
        self._popped_at = now
        events: list[Event] = []
        text: list[str] = []
        while self._queue and self._may_leave(self._queue[0], now):
            held = self._queue.popleft()
            if isinstance(held.what, str):
                text.append(held.what)
                self._count(now - held.arrived_s)
            else:
                if text:
                    events.append(TextDelta("".join(text)))
                    text = []
                events.append(held.what)
        if text:
            events.append(TextDelta("".join(text)))
        return events

    def _hold(self, now: float, text: str) -> None:
        for cluster in clusters(text):
            last = self._queue[-1] if self._queue else None
            if last and isinstance(last.what, str) and continues(last.what, cluster[0]):
                last.what += cluster
            else:
                self._queue.append(_Held(now, cluster))

    def _may_leave(self, held: _Held, now: float) -> bool:
        if self._flushes or not isinstance(held.what, str):
            return True
        if self._credit >= 1 - ROUNDING or held.arrived_s + self._max_delay_s <= now:
            self._credit = max(0.0, self._credit - 1)
            return True
        return False

    def _rate(self) -> float:
        """Return the characters a second that flow out now."""
        if self._mode == "reading":
            return self._chars_per_s
        return len(self._queue) / max(FRAME_S, min(self._gap_s, self._max_delay_s / 2))

    def _earn(self, now: float) -> None:
        if self._queue:
            self._credit += self._rate() * (now - self._earned_at)
        self._earned_at = now

    def _count(self, delay_s: float) -> None:
        self._stats.characters += 1
        self._stats.added_delay_sum_s += delay_s
        self._stats.added_delay_max_s = max(self._stats.added_delay_max_s, delay_s)
