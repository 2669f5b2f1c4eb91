"""The lower rungs: turns over a channel, a reliable ordered sequence of messages, without I/O.

A WebSocket or one QUIC stream carries the messages; `docs/protocol.md`, "Lower rungs", has them
byte by byte. Bundles carry new bytes only, and are made when the transport takes a message
(`next_message`), so that none grows old in a queue. The endpoint calls `next_message` until it
gives None, after each call that may have something to say and when `next_time` has come.
"""

from abc import ABC, abstractmethod
from collections import deque

from eloquent.core.turns import TurnEvent
from eloquent.core.varint import decode_varint, encode_varint
from eloquent.core.wire import MAX_REPLY_BYTES, MAX_REQUEST_BODY_BYTES, MAX_REQUEST_HEAD_BYTES
from eloquent.errors import WireError

MESSAGE_OPEN = 5
MESSAGE_REPLY = 6
MESSAGE_CANCEL = 7
MESSAGE_BEAT = 8
MESSAGE_PADDED = 9

BEAT_S = 0.5
"A client with open turns that has sent nothing for so long sends a beat."

MAX_OPEN_TURNS = 128
"Turns of one channel that are not over; a client holds further ones back."

MAX_BUNDLE_DATA_BYTES = 1 << 12
"""After so many bytes the transport is asked again, and other turns have their chance. TLS hands
out whole records only: each has to come well within `DEAD_AFTER_S`, on a slow link too."""

MAX_TO_SERVER_BYTES = MAX_REQUEST_BODY_BYTES + MAX_REQUEST_HEAD_BYTES
MAX_TO_CLIENT_BYTES = MAX_REPLY_BYTES + 16
"The longest messages, with room for longer varints than needed."

NOW = float("-inf")
"As a time: at once."


class Channel(ABC):
    """One end of a channel; `channel_server` and `channel_client` add what turns do there.

    `now` is in seconds, of any origin, and never goes back.
    """

    def __init__(self, now: float) -> None:
        self._events: deque[TurnEvent] = deque()
        self._sent_at = now
        self._beat_is_due = False

    @abstractmethod
    def receive(self, message: bytes, now: float) -> None:
        """Take a message.

        Raises:
            WireError: it breaks the protocol; the endpoint must end the channel.
        """

    def next_event(self) -> TurnEvent | None:
        """Return the next event, or None."""
        return self._events.popleft() if self._events else None

    def next_message(self, now: float) -> bytes | None:
        """Return the next message to send, made now, or None."""
        self._do_what_is_due(now)
        message = self._make_message(now)
        if message is not None:
            self._sent_at = now
        return message

    def next_time(self) -> float | None:
        """Return when `next_message` should be called next, in seconds, or None."""
        return NOW if self._beat_is_due else min(self._due_times(), default=None)

    @abstractmethod
    def _do_what_is_due(self, now: float) -> None:
        """See to what time has brought."""

    @abstractmethod
    def _make_message(self, now: float) -> bytes | None:
        """Return a message that is made only when it can be sent, or None."""

    def _make_beat(self) -> bytes:
        """Return a beat."""
        self._beat_is_due = False
        return bytes((MESSAGE_BEAT,))

    @abstractmethod
    def _due_times(self) -> list[float]:
        """Return when this end has something to do, in any order."""


class MessageSplitter:
    """Finds the messages in a stream's bytes, where each has its length before it (a varint)."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` is the longest message that is taken."""
        self._max_bytes = max_bytes
        self._bytes = bytearray()

    @property
    def unfinished_bytes(self) -> int:
        """How much has come of a message that is not whole."""
        return len(self._bytes)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the messages that they complete.

        Raises:
            WireError: a message is longer than the protocol allows.
        """
        self._bytes += data
        messages: list[bytes] = []
        position = 0
        while (decoded := decode_varint(self._bytes, position)) is not None:
            length, start = decoded
            if length > self._max_bytes:
                raise WireError("A message is longer than the protocol allows.")
            if start + length > len(self._bytes):
                break
            position = start + length
            messages.append(bytes(self._bytes[start:position]))
        del self._bytes[:position]
        return messages


def with_length(message: bytes) -> bytes:
    """Return the message as a stream carries it."""
    return encode_varint(len(message)) + message


def kind_of(message: bytes, max_bytes: int) -> int:
    """Return a message's type.

    Raises:
        WireError: it is empty or longer than `max_bytes`.
    """
    if not message or len(message) > max_bytes:
        raise WireError("A message is empty or longer than the protocol allows.")
    return message[0]


def number_and_rest(message: bytes) -> tuple[int, bytes]:
    """Return the number that follows a message's type, and what is behind it.

    Raises:
        WireError: there is none.
    """
    decoded = decode_varint(message, 1)
    if decoded is None:
        raise WireError("A message ends within its first number: the peer breaks the protocol.")
    number, position = decoded
    return number, message[position:]


def check_beat(message: bytes) -> None:
    """Take a beat.

    Raises:
        WireError: it says something.
    """
    if len(message) != 1:
        raise WireError("A beat has bytes after its end: the peer breaks the protocol.")
