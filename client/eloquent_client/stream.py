"""One turn: events and text as they come, the message at the end, and what the way was like."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Self

from eloquent.core.events import End, Event, Failure, TextDelta, encode_event
from eloquent.core.receiver import ReceiverStats
from eloquent.core.wire import Request
from eloquent.errors import EloquentError
from eloquent.session.session import Session
from eloquent.session.turn import ClientTurn
from eloquent_client.errors import APIError, APITimeoutError, api_error, status_error
from eloquent_client.messages import Message, PromptTokensDetails, StreamStats, Usage


class MessageStream:
    """A turn, from `Client.stream`; entering it asks, leaving it cancels what is unfinished.

    The answer may be read as events (`async for event in stream`), as text (`text_stream`) and
    as a whole (`get_final_message`), in any combination: each sees it from its start.
    """

    def __init__(
        self,
        open_turn: Callable[[Request], Awaitable[tuple[Session, ClientTurn]]],
        request: Request,
        *,
        timeout_s: float,
    ) -> None:
        self._open_turn = open_turn
        self._request = request
        self._timeout_s = timeout_s
        self._session: Session | None = None
        self._turn: ClientTurn | None = None
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._received = ReceiverStats()
        self._rtt_ms = 0.0
        self._log_bytes = 0
        "Bytes of the log that the events handed out stand for, `End` aside."
        self._started_s: float | None = None
        self._first_text_s: float | None = None
        self._ended_s: float | None = None

    @property
    def turn_id(self) -> str:
        """The turn's name, in hexadecimal; the server's log has it too."""
        return self._request.turn_id.hex()

    @property
    def secret(self) -> str:
        """What `Client.resume` needs besides the id, in hexadecimal; keep it to yourself."""
        return self._request.secret.hex()

    @property
    def offset(self) -> int:
        """Up to where in the answer's log the events go that have come; for `Client.resume`."""
        return self._turn.receiver.decoded if self._turn is not None else self._request.offset

    @property
    def text(self) -> str:
        """The answer up to now; what has come stays, however the turn ends."""
        return "".join(event.text for event in self._events if isinstance(event, TextDelta))

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: the answer is whole, failed or was cancelled."""
        return self._ended_s is not None

    @property
    def stats(self) -> StreamStats:
        """What happened on the way up to now."""
        self._refresh()
        end = self._end
        surplus = 0
        if end is not None and self._turn is not None:
            known = self._log_bytes + self._turn.receiver.passed_over
            surplus = self._request.offset + known - end.length
        now_s = self._now() if self._ended_s is None else self._ended_s
        return StreamStats(
            datagrams=self._received.datagrams,
            loss_recovered=self._received.loss_recovered,
            duplicates=max(0, surplus),
            missing=max(0, -surplus),
            ttft_ms=None if self._first_text_s is None else self._since_start(self._first_text_s),
            duration_ms=self._since_start(now_s),
            rtt_ms=self._rtt_ms,
        )

    @property
    async def text_stream(self) -> AsyncIterator[str]:
        """The answer's text, in pieces as they come.

        Raises:
            APIStatusError: the server declined the request, or failed in mid-answer.
            APIConnectionError: the connection ended first, or the answer took too long.
            APIResponseError: what came is no valid answer.
        """
        async for event in self:
            if isinstance(event, TextDelta):
                yield event.text
            elif isinstance(event, Failure):
                raise status_error(event.code, event.message)

    async def get_final_message(self) -> Message:
        """Wait for the end of the answer and return it whole.

        Raises:
            APIStatusError: the server declined the request, or failed in mid-answer.
            APIConnectionError: the connection ended first, or the answer took too long.
            APIResponseError: what came is no valid answer.
            APIError: the turn was cancelled on this side.
        """
        async for _ in self.text_stream:
            pass
        end = self._end
        if end is None:
            raise APIError(
                "The answer was cancelled on this side; `text` is what had come by then."
            )
        return Message(
            self.text,
            end.finish_reason,
            end.model,
            Usage(end.prompt_tokens, end.completion_tokens, PromptTokensDetails(end.cached_tokens)),
        )

    async def close(self) -> None:
        """Cancel the turn if it is unfinished; whoever reads it comes to its end."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait((self._reader,))

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Give out the events, from the first on; the last is `End` if the answer is whole.

        Raises:
            APIStatusError: the server declined the request.
            APIConnectionError: the connection ended first, or the answer took too long.
            APIResponseError: what came is no valid answer.
        """
        if self._reader is None:
            raise RuntimeError("ask the turn first: async with client.stream(...) as stream")
        position = 0
        while True:
            while position < len(self._events):
                yield self._events[position]
                position += 1
            if self.is_over:
                break
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error

    async def __aenter__(self) -> Self:
        if self._reader is not None:
            raise RuntimeError("a turn is asked once: call client.stream(...) for another")
        self._started_s = self._now()
        deadline_s = self._started_s + self._timeout_s
        try:
            self._session, self._turn = await self._open_turn(self._request)
        except EloquentError as error:
            self._ended_s = self._now()
            raise api_error(error) from error
        self._reader = asyncio.create_task(self._read(self._turn, deadline_s))
        # A callback, because a task that is cancelled before its first step runs none of its code.
        self._reader.add_done_callback(partial(self._on_over, turn=self._turn))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def _end(self) -> End | None:
        last = self._events[-1] if self._events else None
        return last if isinstance(last, End) else None

    async def _read(self, turn: ClientTurn, deadline_s: float) -> None:
        """Collect what comes; as a task of its own it times arrivals, not the reader's pace."""
        try:
            async with asyncio.timeout_at(deadline_s):
                async for event in turn:
                    self._take(event)
        except TimeoutError as error:
            raise APITimeoutError(
                f"The answer was not complete within {self._timeout_s:g} s and was cancelled: ask "
                "for less, or allow more with Client(timeout_s=...)."
            ) from error
        except EloquentError as error:
            raise api_error(error) from error

    def _on_over(self, reader: asyncio.Task[None], turn: ClientTurn) -> None:
        if not reader.cancelled():
            self._error = reader.exception()
        self._refresh()
        turn.cancel()  # does nothing to a turn that has ended
        self._ended_s = self._now()
        self._news.set()

    def _take(self, event: Event) -> None:
        if isinstance(event, TextDelta) and self._first_text_s is None:
            self._first_text_s = self._now()
        if not isinstance(event, End):
            self._log_bytes += len(encode_event(event))
        self._events.append(event)
        self._refresh()
        self._news.set()

    def _refresh(self) -> None:
        """Take the counters over; a turn that failed has none any more, so keep what there was."""
        if self._session is not None and self._session.link is not None:
            self._rtt_ms = self._session.link.srtt_s * 1e3
        if self._turn is not None and self._turn.stats.datagrams >= self._received.datagrams:
            self._received = self._turn.stats

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _since_start(self, time_s: float) -> float:
        return 0.0 if self._started_s is None else (time_s - self._started_s) * 1e3
