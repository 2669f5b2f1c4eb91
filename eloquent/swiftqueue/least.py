"""The least of the values seen lately."""

import math

LEAST_WINDOW_S = 30.0
"How long a least value is remembered: between half of this and all of it."


class Least:
    """The least value of the last half to whole of a window, in two halves."""

    __slots__ = ("_before", "_current", "_since_s", "least")

    def __init__(self) -> None:
        self.least = math.nan
        "NaN until there is a value."
        self._before = self._current = math.inf
        self._since_s = -math.inf

    def learn(self, now: float, value: float) -> None:
        """Take a value in at `now`, in seconds."""
        age_s = now - self._since_s
        if age_s >= LEAST_WINDOW_S / 2:
            self._before = self._current if age_s < LEAST_WINDOW_S else math.inf
            self._current = math.inf
            self._since_s = now
        self._current = min(self._current, value)
        self.least = min(self._current, self._before)
