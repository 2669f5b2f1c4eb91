"""How far a server sends ahead of its readers.

A reader's buffer is what was sent and its application has not taken yet. Each reader's is bounded,
and so is the sum over a connection: a reader may have as much as is still free of the sum. That is
the dynamic threshold of shared-memory switches (Choudhury and Hahne, IEEE/ACM Transactions on
Networking 6(2), 1998): readers that take nothing share the sum alike, and leave some of it to the
next one.
"""

from eloquent.core.events import End
from eloquent.core.log import Log
from eloquent.core.turns import SLOW_READER_S
from eloquent.core.wire import CONNECTION_WINDOW_BYTES, LEAST_WINDOW_BYTES, READER_WINDOW_BYTES


class ReaderWindow:
    """A log as one reader may have it; what is read from it counts as sent."""

    def __init__(self, windows: "ReaderWindows", log: Log, offset: int) -> None:
        self._windows = windows
        self._log = log
        self._sent = self._taken = offset
        self._full_at: float | None = None
        "Since when the reader may not have all there is, and takes nothing."

    @property
    def sent(self) -> int:
        """The offset up to which the log was read."""
        return self._sent

    @property
    def limit(self) -> int:
        """The offset up to which the reader may be sent bytes; never below what was sent."""
        return max(self._sent, self._taken + self._windows.allowance)

    @property
    def length(self) -> int:
        """See `Log.length`."""
        length = self._log.length
        # Asked many times for each token, of which a reader that keeps up has nearly all.
        if length - self._taken <= self._windows.least_bytes:
            return length
        return min(length, self.limit)

    @property
    def end(self) -> End | None:
        """See `Log.end`."""
        return None if self.is_full else self._log.end

    @property
    def is_full(self) -> bool:
        """Whether there is more that the reader may not have yet."""
        return self._log.length > self.length

    def read(self, start: int, stop: int) -> bytes:
        """See `Log.read`."""
        data = self._log.read(start, min(stop, self.length))
        sent = max(self._sent, start + len(data))
        self._windows.unread += sent - self._sent
        self._sent = sent
        return data

    def on_taken(self, offset: int) -> None:
        """Take note that the reader's application has taken what is below `offset`."""
        if offset > self._taken:
            self._windows.unread -= offset - self._taken
            self._taken = offset
            self._full_at = None

    def look(self, now: float) -> None:
        """Note since when the reader is slow, if it is."""
        if not self.is_full:
            self._full_at = None
        elif self._full_at is None:
            self._full_at = now

    @property
    def slow_at(self) -> float | None:
        """When the reader is to be given up, in seconds; None: it takes what it gets."""
        return None if self._full_at is None else self._full_at + SLOW_READER_S

    def close(self) -> None:
        """Give back what the reader has not taken."""
        self._windows.unread -= self._sent - self._taken
        self._taken = self._sent


class ReaderWindows:
    """What the windows of one connection share."""

    def __init__(
        self,
        *,
        reader_bytes: int = READER_WINDOW_BYTES,
        connection_bytes: int = CONNECTION_WINDOW_BYTES,
        least_bytes: int = LEAST_WINDOW_BYTES,
    ) -> None:
        self._reader_bytes = reader_bytes
        self._connection_bytes = connection_bytes
        self.least_bytes = least_bytes
        "Every reader may have so much."
        self.unread = 0
        "Bytes that were sent and not taken, of all readers."

    @property
    def allowance(self) -> int:
        """How far beyond what it has taken a reader may be sent, in bytes."""
        free = self._connection_bytes - self.unread
        return min(self._reader_bytes, max(self.least_bytes, free))

    def open(self, log: Log, offset: int) -> ReaderWindow:
        """Return a reader's window on `log`, of which it has what is below `offset`."""
        return ReaderWindow(self, log, offset)
