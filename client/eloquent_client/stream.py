"""One turn: events and text as they come, the message at the end, and what the way was like."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

from eloquent.core.events import End, Event, Failure, TextDelta, encode_event
from eloquent.core.receiver import ReceiverStats
from eloquent.core.wire import KEYLESS_VERSION, PROTOCOL_VERSION, Request
from eloquent.errors import EloquentError
from eloquent.session.session import Session
from eloquent.session.states import LinkState
from eloquent.session.turn import ClientTurn
from eloquent_client.errors import (
    APIError,
    APIStatusError,
    APITimeoutError,
    BadRequestError,
    status_error,
    translated,
)
from eloquent_client.messages import Message, StreamStats, Usage, message_of, text_of, usage_of
from eloquent_client.retries import Retries
from eloquent_client.running import Running

OpenTurn = Callable[[Request], Awaitable[tuple[Session, ClientTurn]]]
"Connects if need be and asks for a turn."


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a turn is waited for, and how often it is asked again."""

    timeout_s: float
    "Seconds for all of it, connecting and waiting to ask again included."
    idle_timeout_s: float | None
    "Seconds without an event; None: any number."
    max_retries: int
    "How often a turn that has not begun is asked again."
    rng: Random
    "For the jitter of the waits before."


class MessageStream:
    """A turn, from `Client.stream`; entering it asks, leaving it cancels what is unfinished.

    The answer may be read as events (`async for event in stream`), as text (`text_stream`) and
    as a whole (`get_final_message`), in any combination: each sees it from its start.
    """

    def __init__(
        self,
        request: Request,
        *,
        open_turn: OpenTurn,
        link_state: Callable[[], LinkState],
        patience: Patience,
        running: Running,
    ) -> None:
        self._open_turn = open_turn
        self._request = request
        self._patience = patience
        self._link_state = link_state
        self._running = running
        self._retries = Retries(patience.max_retries, patience.rng)
        self._session: Session | None = None
        self._turn: ClientTurn | None = None
        self._reader: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._received = ReceiverStats()
        self._is_detached = False
        self._is_closed = False
        self._rtt_ms = 0.0
        self._offset = request.offset
        self._log_bytes = 0
        "Bytes of the log that the events handed out stand for, `End` aside."
        self._started_s: float | None = None
        self._deadline_s = 0.0
        self._first_text_s: float | None = None
        self._ended_s: float | None = None

    @property
    def turn_id(self) -> str:
        """The turn's name, in hexadecimal; the server's log has it too."""
        return self._request.turn_id.hex()

    @property
    def secret(self) -> str:
        """What reading the turn takes besides the id, in hexadecimal; keep it to yourself."""
        return self._request.secret.hex()

    @property
    def offset(self) -> int:
        """Up to where in the answer's log the events go that `text` is of, `End` aside."""
        return self._offset

    @property
    def token(self) -> str:
        """What `Client.resume` goes on with: the id, the secret and the offset; not the key.

        It changes with each event, together with `text`: what is resumed goes on behind that, also
        where less of it was read here. Keep it to yourself: who has it may read the answer.
        """
        return f"{self.turn_id}:{self.secret}:{self.offset}"

    @property
    def text(self) -> str:
        """The answer up to now; what has come stays, however the turn ends."""
        return text_of(self._events)

    @property
    def usage(self) -> Usage | None:
        """What the turn cost; None: its end has not come."""
        return None if self._end is None else usage_of(self._end)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: the answer is whole, failed or was given up."""
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
    def bytes_received(self) -> int:
        """Bytes of the answer's log that arrived, those that came twice included."""
        if self._turn is None:
            return 0
        receiver = self._turn.receiver
        return receiver.contiguous - self._request.offset + receiver.stats.repeated_bytes

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
        if self._end is None:
            raise APIError(
                "The answer was cancelled on this side; `text` is what had come by then."
            )
        return message_of(self._events, self._end)

    def detach(self) -> None:
        """Let the answer go on when the block is left, and when the client is closed.

        `token` then reads it, in another process too. A server goes on for two minutes with an
        answer that nobody reads, unless it was told otherwise.
        """
        self._is_detached = True

    async def close(self) -> None:
        """Cancel the turn if it is unfinished, detached or not; its readers come to their end."""
        self._is_detached = False
        self._is_closed = True
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
        self._deadline_s = self._started_s + self._patience.timeout_s
        try:
            await self._in_time(self._ask)
        except BaseException:
            self._ended_s = self._now()
            raise
        self._running.begin(self)
        self._reader = asyncio.create_task(self._in_time(self._read))
        # A callback, because a task that is cancelled before its first step runs none of its code.
        self._reader.add_done_callback(self._on_over)
        if self._is_closed:  # by another task, before it was asked
            self._reader.cancel()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._is_detached:
            await self.close()

    def leave(self) -> None:
        """Hear no more of the turn; a detached one goes on."""
        if self._turn is not None and self._session is not None:
            if self._is_detached:
                self._session.detach(self._turn)
            self._turn.cancel()  # does nothing to a turn that has ended

    @property
    def is_detached(self) -> bool:
        """Whether the answer goes on when nobody reads it here any more."""
        return self._is_detached

    @property
    def _end(self) -> End | None:
        last = self._events[-1] if self._events else None
        return last if isinstance(last, End) else None

    async def _in_time(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout_at(self._deadline_s):
                await work()
        except TimeoutError as error:
            raise APITimeoutError(
                f"The answer was not complete within {self._patience.timeout_s:g} s and was given "
                "up: ask for less, or allow more with Client(timeout_s=...).",
                self._link_state(),
            ) from error

    async def _ask(self) -> None:
        """Ask the turn, and again if no connection can be made."""
        while True:
            try:
                with translated():
                    self._session, self._turn = await self._open_turn(self._request)
            except EloquentError as failure:
                await self._wait_to_ask_again(failure)
            else:
                return

    async def _read(self) -> None:
        """Collect what comes; as a task of its own it times arrivals, not the reader's pace."""
        while True:
            assert self._turn is not None
            try:
                with translated():
                    await self._collect(self._turn)
            except APIStatusError as failure:
                if self._events:
                    raise
                await self._wait_to_ask_again(self._explained(failure))
            else:
                return
            await self._ask()

    async def _collect(self, turn: ClientTurn) -> None:
        idle_s = self._patience.idle_timeout_s
        try:
            async with asyncio.timeout(idle_s) as idle:
                async for event in turn:
                    self._take(turn, event)
                    if idle_s is not None:
                        idle.reschedule(self._now() + idle_s)
        except TimeoutError as error:
            raise self._idle_error() from error

    async def _wait_to_ask_again(self, failure: EloquentError) -> None:
        """Wait; or raise `failure`, if asking again is of no use or would come too late."""
        wait_s = self._retries.wait_s(failure)
        if wait_s is None or self._now() + wait_s >= self._deadline_s:
            raise failure
        await asyncio.sleep(wait_s)

    def _explained(self, failure: APIStatusError) -> APIStatusError:
        if failure.code == "unsupported_version" and self._request.key:
            return BadRequestError(
                failure.code,
                f"The server is too old for keys: they came with version {PROTOCOL_VERSION} of the "
                f"protocol, and it speaks version {KEYLESS_VERSION}. Update it, or ask without a "
                "key.",
            )
        return failure

    def _idle_error(self) -> APITimeoutError:
        state = self._link_state()
        why = (
            "The link is in order, so it is the model that is slow"
            if state is LinkState.UP
            else f"The link is {state.value}, so nothing is known of the model"
        )
        return APITimeoutError(
            f"Nothing came for {self._patience.idle_timeout_s:g} s, and the answer was given up. "
            f"{why}. Allow more with Client(idle_timeout_s=...), or ask again.",
            state,
        )

    def _on_over(self, reader: asyncio.Task[None]) -> None:
        if not reader.cancelled():
            self._error = reader.exception()
        self._refresh()
        self.leave()
        self._ended_s = self._now()
        self._running.end(self)
        self._news.set()

    def _take(self, turn: ClientTurn, event: Event) -> None:
        if isinstance(event, TextDelta) and self._first_text_s is None:
            self._first_text_s = self._now()
        if isinstance(event, End):
            self._offset = event.length  # who resumes an answer that is whole is told its end, too
        else:
            self._log_bytes += len(encode_event(event))
            # All that is decoded is taken in one go, so it is what `_events` are of.
            self._offset = turn.receiver.decoded
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
