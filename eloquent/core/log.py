"""The token log: one turn's answer as an append-only sequence of encoded events."""

from eloquent.core.events import End, Failure, TextDelta, encode_event, log_digest


class TokenLog:
    """What has been generated so far; positions are byte offsets.

    Nothing that is in the log ever changes, so any number of senders may read it at any offset.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._digest = log_digest()
        self._end: End | None = None

    @property
    def length(self) -> int:
        """Bytes in the log."""
        return len(self._bytes)

    @property
    def end(self) -> End | None:
        """The log's last event, once it is closed."""
        return self._end

    def append(self, event: TextDelta | Failure) -> None:
        """Add an event.

        Raises:
            ValueError: the log is closed, or the event cannot be encoded (`encode_event`).
        """
        if self._end is not None:
            raise ValueError("the log is closed: nothing follows its End event")
        encoded = encode_event(event)
        self._digest.update(encoded)
        self._bytes += encoded

    def close(
        self, finish_reason: str, *, model: str, prompt_tokens: int, completion_tokens: int
    ) -> End:
        """Add the `End` event, with the log's length and digest, and return it.

        Raises:
            ValueError: the log is closed already.
        """
        if self._end is not None:
            raise ValueError("the log is closed already")
        self._end = End(
            finish_reason=finish_reason,
            model=model,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            length=len(self._bytes),
            digest=self._digest.digest(),
        )
        self._bytes += encode_event(self._end)
        return self._end

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `start <= offset < stop`, fewer where the log ends before `stop`."""
        return bytes(self._bytes[start:stop])
