"""The token log: one turn's answer as an append-only sequence of encoded events."""

from collections.abc import Iterator
from typing import Protocol, Self

from eloquent.core.events import Delta, End, Event, EventDecoder, encode_event, log_digest

PIECE_BYTES = 64 << 10
"So much is decoded at once, so that events that nobody keeps do not gather."


class Log(Protocol):
    """What a sender reads: bytes that never change, with more to come until there is an end."""

    @property
    def length(self) -> int:
        """How many bytes may be sent."""

    @property
    def end(self) -> End | None:
        """The log's last event, once it may be sent."""

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `start <= offset < stop`, fewer where there are no more yet."""


class TokenLog:
    """What has been generated so far; positions are byte offsets.

    Nothing that is in the log ever changes, so any number of senders may read it at any offset.
    A log that `is_held` shows its readers only what was released: what the store has.
    """

    def __init__(self, *, is_held: bool = False) -> None:
        self._is_held = is_held
        self._bytes = bytearray()
        self._released = 0
        self._digest = log_digest()
        self._end: End | None = None
        self._decoder: EventDecoder | None = None
        "Has seen all that is in the log, if there is one."

    @classmethod
    def restored(cls, data: bytes, *, keeps_events: bool = True) -> tuple[Self, list[Event]]:
        """Return a log that holds `data`, as it was stored, and the events in it.

        Bytes of an event that is not whole are left out. Events take some twenty times their bytes:
        without `keeps_events` they are checked, and none is returned.

        Raises:
            WireError: the bytes are no log.
            IntegrityError: the log's end does not agree with what is before it.
        """
        log = cls(is_held=True)
        events = log.extend(data, keeps_events=keeps_events)
        log._released = len(log._bytes)
        return log, events

    @property
    def length(self) -> int:
        """How many bytes may be sent."""
        return self._released if self._is_held else len(self._bytes)

    @property
    def written(self) -> int:
        """How many bytes the log has, released or not."""
        return len(self._bytes)

    @property
    def is_closed(self) -> bool:
        """Whether the `End` event was written."""
        return self._end is not None

    @property
    def end(self) -> End | None:
        """The log's last event, once it may be sent."""
        return self._end if self.length == len(self._bytes) else None

    def append(self, event: Delta) -> None:
        """Add an event.

        Raises:
            ValueError: the log is closed, or the event cannot be encoded (`encode_event`).
        """
        if self._end is not None:
            raise ValueError("the log is closed: nothing follows its End event")
        encoded = encode_event(event)
        self._decoder = None
        self._digest.update(encoded)
        self._bytes += encoded

    def close(
        self,
        finish_reason: str,
        *,
        model: str,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        usage: bytes = b"",
    ) -> End:
        """Add the `End` event, with the log's length and digest, and return it.

        Raises:
            ValueError: the log is closed already.
        """
        if self._end is not None:
            raise ValueError("the log is closed already")
        self._decoder = None
        self._end = End(
            finish_reason=finish_reason,
            model=model,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            length=len(self._bytes),
            digest=self._digest.digest(),
            cached_tokens=cached_tokens,
            usage=usage,
        )
        self._bytes += encode_event(self._end)
        return self._end

    def extend(self, data: bytes, *, keeps_events: bool = True) -> list[Event]:
        """Add events as another log of the same turn has them, the end too, and return them.

        Bytes of an event that is not whole are left out; `keeps_events` as in `restored`.

        Raises:
            WireError: the bytes are no log's.
            IntegrityError: the log's end does not agree with what is before it.
        """
        if self._decoder is None:
            self._decoder = EventDecoder()
            for piece in _pieces(bytes(self._bytes)):
                self._decoder.feed(piece)
        events: list[Event] = []
        for piece in _pieces(data):
            some = self._decoder.feed(piece)
            if keeps_events:
                events += some
        whole = data[: len(data) - self._decoder.pending]
        self._end = self._decoder.end
        if len(whole) < len(data):
            self._decoder = None
        self._bytes += whole
        self._digest.update(whole)
        return events

    def rewind(self, offset: int) -> None:
        """Take back what was written from `offset` on, but nothing that was released."""
        del self._bytes[max(offset, self.length) :]
        self._digest = log_digest()
        self._digest.update(bytes(self._bytes))
        self._decoder = None
        if self._end is not None and len(self._bytes) <= self._end.length:
            self._end = None

    def written_from(self, offset: int) -> bytes:
        """Return the bytes from `offset` on, released or not: what the store is to keep."""
        return bytes(self._bytes[offset:])

    def release(self, offset: int) -> None:
        """Let readers have the bytes below `offset`: they are stored."""
        self._released = max(self._released, min(offset, len(self._bytes)))

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `start <= offset < stop`, fewer where there are no more yet."""
        return bytes(self._bytes[start : min(stop, self.length)])


def _pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]
