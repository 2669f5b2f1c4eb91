"""What a transport's server end and the application on it say to each other.

The transport (`eloquent.quic.listen`, `eloquent.websocket`) brings *readers*: one reader is one
turn over one connection. The application owns the turns, which outlive their readers.
"""

from typing import Protocol

from eloquent.core.log import Log
from eloquent.core.wire import Report, Request


class Reader(Protocol):
    """Somebody who reads a turn, over one connection."""

    @property
    def request(self) -> Request:
        """What was asked."""

    @property
    def is_silent(self) -> bool:
        """Whether the link to the reader's machine is dead, one way or both.

        Apart from whether the application there reads: see `eloquent.core.liveness`.
        """

    @property
    def report(self) -> Report | None:
        """The newest that it said of what it has and what its application has taken.

        None before it said anything, and when it is gone.
        """

    def accept(self, log: Log) -> None:
        """Send `log` from the request's offset on, as it is and as it grows."""

    def log_grew(self) -> None:
        """Take note that the accepted log has more, or has its end."""

    def reject(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        """Say why there is no answer, or no more of it; nothing follows.

        `docs/protocol.md` lists the codes. Asking again before `retry_after_s` is of no use.
        """


class TurnService(Protocol):
    """The application. Its methods are called on the event loop and do not block."""

    def on_request(self, reader: Reader) -> None:
        """Accept or reject the reader, now or later."""

    def on_cancel(self, reader: Reader) -> None:
        """The reader wants no more; an owner's turn is not to be generated any further."""

    def on_gone(self, reader: Reader) -> None:
        """The reader has the whole log, was too slow, or its connection is over."""
