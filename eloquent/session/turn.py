"""One turn as the client's application sees it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from eloquent.core.events import End, Event
from eloquent.core.receiver import Receiver, ReceiverStats
from eloquent.core.wire import Request
from eloquent.errors import EloquentError, IntegrityError, RequestError, WireError


class ClientTurn:
    """An asynchronous iterator of events, whatever links they come over."""

    def __init__(
        self,
        request: Request,
        *,
        on_cancel: Callable[["ClientTurn"], None],
        on_taken: Callable[["ClientTurn"], None],
    ) -> None:
        self._first_request = request
        self._on_cancel = on_cancel
        self._on_taken = on_taken
        self.receiver = Receiver(offset=request.offset)
        self.receiver.on_taken(request.offset)  # Who does not iterate yet has taken nothing.
        self._items: deque[tuple[Event | EloquentError | None, int]] = deque()
        self._news = asyncio.Event()
        self._is_over = False
        self._is_closed = False

    @property
    def request(self) -> Request:
        """What to ask a server now: the turn, or what is missing of it."""
        offset = self.receiver.contiguous
        # What has begun is not to be generated anew, should the server have lost it.
        body = b"" if offset else self._first_request.body
        return replace(self._first_request, offset=offset, body=body)

    @property
    def stats(self) -> ReceiverStats:
        """Counters up to now."""
        return self.receiver.stats

    @property
    def is_over(self) -> bool:
        """Whether the last event was given out, or the turn failed or was cancelled."""
        return self._is_over

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will come from the server."""
        return self._is_closed

    def cancel(self) -> None:
        """Give the turn up: the server stops generating, and whoever iterates comes to the end."""
        if self._is_over:
            return
        self._is_over = True
        if not self._is_closed:
            self._is_closed = True
            self._on_cancel(self)
        self._put(None)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Give out the events, in order and once, up to and with `End`.

        Raises:
            RequestError: the server declined the request, or gave the turn up; or no event starts
                at the request's offset (`bad_offset`).
            ConnectionFailedError: the server could not be reached any more.
            WireError: what arrived is no answer.
            IntegrityError: the answer is not what the server generated.
        """
        while not self._is_over:
            while not self._items:
                self._news.clear()
                await self._news.wait()
            item, offset = self._items.popleft()
            if item is None:
                return
            if isinstance(item, EloquentError):
                self._is_over = True
                raise item
            self._is_over = isinstance(item, End)
            self.receiver.on_taken(offset)
            self._on_taken(self)
            yield item

    def deliver(self, events: Sequence[Event]) -> None:
        """Hand over what has come."""
        for event in events:
            self._is_closed = isinstance(event, End)
            self._put(event)

    def fail(self, error: EloquentError) -> None:
        """End the turn with an error, after what has come."""
        if not self._is_closed:
            self._is_closed = True
            self._put(self._explained(error))

    def _explained(self, error: EloquentError) -> EloquentError:
        """Return what an error means; what cannot be read began at a wrong place, most likely."""
        offset = self._first_request.offset
        if not offset or not isinstance(error, WireError | IntegrityError):
            return error
        explained = RequestError(
            "bad_offset",
            f"The answer cannot be read from byte {offset} on: no event starts there. Resume at an "
            "offset as it was given, or at 0.",
        )
        explained.__cause__ = error
        return explained

    def _put(self, item: Event | EloquentError | None) -> None:
        self._items.append((item, self.receiver.contiguous))
        self._news.set()
