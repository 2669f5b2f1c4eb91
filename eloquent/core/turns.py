"""What happens to a turn on a connection, whatever carries it."""

from dataclasses import dataclass

from eloquent.core.events import Event
from eloquent.core.wire import MAX_REQUEST_BODY_BYTES, Request
from eloquent.errors import EloquentError

SLOW_READER_S = 60.0
"A reader that takes nothing for so long, with its window full, is told to come back later."

SLOW_READER = (
    f"Nothing of the answer was read for {SLOW_READER_S:.0f} s: resume it when there is "
    "somebody to read it."
)

TOO_LARGE = f"The request is larger than {MAX_REQUEST_BODY_BYTES} bytes: shorten it."


@dataclass(frozen=True, slots=True)
class TurnRequested:
    """A client asks for a turn (server)."""

    turn: int
    request: Request


@dataclass(frozen=True, slots=True)
class TurnCancelled:
    """The reader wants no more of a turn (server)."""

    turn: int


@dataclass(frozen=True, slots=True)
class ReaderDone:
    """The reader of a turn has the whole log, or was too slow (server)."""

    turn: int


@dataclass(frozen=True, slots=True)
class TurnProgress:
    """More of an answer, in order and once (client)."""

    turn: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class TurnFailed:
    """A turn has ended without its End event (client)."""

    turn: int
    error: EloquentError


TurnEvent = TurnRequested | TurnCancelled | ReaderDone | TurnProgress | TurnFailed
