"""A reader over HTTP: it reads a turn's log in this process, as fast as its connection takes it."""

import asyncio
from dataclasses import dataclass

from eloquent.core.events import MAX_EVENT_BYTES, End, Event, EventDecoder
from eloquent.core.log import Log
from eloquent.core.varint import decode_varint
from eloquent.core.wire import Report, Request
from eloquent.errors import IntegrityError, RequestError, WireError

READ_BYTES = 1 << 11
"So much of the log is taken at once, a few ms of work; as chunks it is some forty times as long."

MAX_HEAD_BYTES = 9
"Of an event: its kind, and the longest varint."

BAD_OFFSET = (
    "No event of the answer starts at byte {}: resume at an id that came with an event, or at 0."
)


@dataclass(frozen=True, slots=True)
class Piece:
    """An event of the log."""

    event: Event
    offset: int
    "Where the next one starts."


class HttpReader:
    """One turn for one HTTP request; a `Reader`."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._log: Log | None = None
        self._decoder = EventDecoder(request.offset)
        self._offset = self._written = request.offset
        self._refusal: RequestError | None = None
        self._news = asyncio.Event()
        self._is_gone = False

    @property
    def request(self) -> Request:
        """See `Reader.request`."""
        return self._request

    @property
    def is_silent(self) -> bool:
        """See `Reader.is_silent`: TCP does not tell."""
        return False

    @property
    def report(self) -> Report | None:
        """See `Reader.report`: what its connection has not taken yet is what it has not read."""
        if self._log is None or self._is_gone:
            return None
        length = self._log.length
        return Report(0, length, -1, unread=max(0, length - self._written))

    @property
    def is_accepted(self) -> bool:
        """Whether there is a log to read."""
        return self._log is not None

    @property
    def end(self) -> End | None:
        """The log's last event, as soon as it is there."""
        return None if self._log is None else self._log.end

    @property
    def is_done(self) -> bool:
        """Whether all of the log was taken."""
        return self._log is not None and self.end is not None and self._offset >= self._log.length

    @property
    def is_gone(self) -> bool:
        """Whether its connection is over."""
        return self._is_gone

    def accept(self, log: Log) -> None:
        """See `Reader.accept`."""
        self._log = log
        self._news.set()

    def log_grew(self) -> None:
        """See `Reader.log_grew`."""
        self._news.set()

    def reject(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        """See `Reader.reject`."""
        self._refusal = RequestError(code, message, retry_after_s)
        self._news.set()

    def leave(self) -> None:
        """Take note that its connection is over."""
        self._is_gone = True
        self._news.set()

    def wrote(self, offset: int) -> None:
        """Take note that its connection took the log below `offset`."""
        self._written = offset

    def take(self) -> list[Piece]:
        """Return some of what has come since, in order; nothing if nothing has.

        Raises:
            RequestError: there is nothing more, and will not be: why the turn's service said so,
                or `bad_offset`.
        """
        pieces: list[Piece] = []
        before = -1
        while self._log is not None and not pieces and self._offset != before:
            before = self._offset  # There may be events of kinds that are not known here.
            pieces = self._read(self._log)
        if not pieces and self._refusal is not None:
            raise self._refusal
        return pieces

    async def wait(self, timeout_s: float) -> bool:
        """Wait for something new, or that it is gone; return False if there is nothing in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True

    def _read(self, log: Log) -> list[Piece]:
        size = READ_BYTES
        data = log.read(self._offset, self._offset + size)
        while not (ends := _event_ends(data)) and len(data) == size <= MAX_EVENT_BYTES:
            size *= 2
            data = log.read(self._offset, self._offset + size)
        start = 0
        pieces: list[Piece] = []
        try:
            for end in ends:
                events = self._decoder.feed(data[start:end])
                pieces += [Piece(event, self._offset + end) for event in events]
                start = end
        except (WireError, IntegrityError) as error:
            raise self._bad_offset() from error
        is_no_event = log.end is not None or len(data) > MAX_EVENT_BYTES + MAX_HEAD_BYTES
        if data and not ends and is_no_event:
            raise self._bad_offset()
        self._offset += start
        return pieces

    def _bad_offset(self) -> RequestError:
        return RequestError("bad_offset", BAD_OFFSET.format(self._request.offset))


def _event_ends(data: bytes) -> list[int]:
    """Return where the whole events in `data` end; see `eloquent.core.events` for their form."""
    ends, position = [], 0
    while (decoded := decode_varint(data, position + 1)) is not None:
        length, body_start = decoded
        position = body_start + length
        if position > len(data):
            break
        ends.append(position)
    return ends
