"""Stop strings: the answer ends before the first of them, and no part of it gets out."""

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string, however the text is cut into pieces.

    The first is the one that is complete first; of several that end together, the longest. What
    may be the beginning of one is held back until it is clear.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """Take the stop strings, none of them empty."""
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False
        "A stop string has come; nothing goes out any more."

    def push(self, text: str) -> str:
        """Take the next text and return what may go out."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text, self._held = self._held + text, ""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        free = len(text) - self._beginning(text)
        self._held = text[free:]
        return text[:free]

    def flush(self) -> str:
        """Return what was held back: the text is over, so it was no stop string."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
