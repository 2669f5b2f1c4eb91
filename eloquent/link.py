"""What a session needs of a connection to its server, whatever carries it."""

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from eloquent.core.events import Event
from eloquent.core.receiver import Receiver
from eloquent.core.wire import Request
from eloquent.errors import EloquentError

STAGGER_S = 0.25
"Connection attempts to one server follow each other so (RFC 8305 section 5)."


class Rung(Enum):
    """What carries the frames, the best first; frames and offsets are the same on each."""

    DATAGRAMS = "QUIC datagrams"
    STREAM = "QUIC stream"
    WEBSOCKET = "WebSocket"

    @property
    def is_below_quic(self) -> bool:
        """Whether a better rung may be had by another connection."""
        return self is Rung.WEBSOCKET


class LinkUser(Protocol):
    """Who uses a link; its methods are called on the event loop."""

    def on_early(self, link: "Link") -> None:
        """The link is still being made and takes requests already: only resumes (0-RTT)."""

    def on_progress(self, link: "Link", turn: int, events: Sequence[Event]) -> None:
        """More of a turn's log has come: events in order, once; maybe none."""

    def on_turn_failed(self, link: "Link", turn: int, error: EloquentError) -> None:
        """A turn is over without its end; the link does not know it any more."""

    def on_link_ended(self, link: "Link", error: EloquentError) -> None:
        """The connection is over; the link is of no further use."""


class Link(Protocol):
    """A connection that is made; turns run over it."""

    @property
    def rung(self) -> Rung:
        """What carries the frames."""

    @property
    def srtt_s(self) -> float:
        """Smoothed round-trip time in seconds."""

    @property
    def heard_s(self) -> float:
        """When something last came from the server, in the loop's time."""

    @property
    def answered_s(self) -> float:
        """Up to when what was sent has reached the server, as far as its answers tell."""

    def open_turn(self, request: Request, receiver: Receiver) -> int:
        """Ask for a turn, or go on with one; return its number on this link."""

    def cancel_turn(self, turn: int) -> None:
        """Have the server stop the turn, and hear no more of it."""

    def detach_turn(self, turn: int) -> None:
        """Hear no more of a turn that goes on over another link."""

    def pump(self) -> None:
        """Send what has become due: a receiver has something to report."""

    def probe(self) -> None:
        """Send something that the server answers."""

    async def migrate(self) -> bool:
        """Go on from the address that this machine has now; False: this link cannot."""

    async def close(self) -> None:
        """End the connection."""
