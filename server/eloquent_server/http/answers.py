"""Answers over HTTP: a turn's log as server-sent events, or whole as one JSON object."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from eloquent.core.events import Event
from eloquent.errors import RequestError
from eloquent.openai import (
    DONE,
    Chunks,
    JsonObject,
    check_event,
    comment,
    completion,
    error_body,
    server_sent,
)
from eloquent_server.http.reader import HttpReader, Piece
from eloquent_server.http.requests import SECRET_HEADER, TURN_HEADER, ChatRequested, parse_chat
from eloquent_server.http.responses import JsonResponse, error_response, until_gone
from eloquent_server.turns import SHUTTING_DOWN, TurnHub

BEGIN_S = 10.0
"""The status waits so long for the first event, so that a turn that is declined has its true one;
then the answer begins without, lest something on the way gives up."""
KEEP_ALIVE_S = 10.0
"A comment is sent whenever nothing else was for so long."
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}


class Readers:
    """All readers over HTTP: what they and the hub say to each other."""

    def __init__(self, hub: TurnHub) -> None:
        self.hub = hub
        self._open: set[HttpReader] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, reader: HttpReader) -> None:
        """Ask for a reader's turn."""
        self._open.add(reader)
        if self._is_closed:
            reader.reject("unavailable", SHUTTING_DOWN)
        else:
            self.hub.on_request(reader)

    def done(self, reader: HttpReader, *, is_cancelled: bool) -> None:
        """Let a reader go, and its turn if nobody is to have the rest of it."""
        self._open.discard(reader)
        if is_cancelled:
            self.hub.on_cancel(reader)
        self.hub.on_gone(reader)

    def close(self) -> None:
        """Tell all that nothing more comes."""
        self._is_closed = True
        for reader in self._open:
            reader.reject("unavailable", SHUTTING_DOWN)


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How an answer is given."""

    is_streamed: bool
    is_kept: bool
    "Whether the turn goes on when this reader's connection is gone."
    begins_at_once: bool = False
    "Whether the status is good as soon as there is the turn."
    asked: ChatRequested | None = None
    "None: what the turn's own request says."


class Answer:
    """Reads one turn to its end; an ASGI application, as a `Response` is one."""

    def __init__(
        self, readers: Readers, reader: HttpReader, form: Form, models: Sequence[str]
    ) -> None:
        """The first of `models` answers who asks for none."""
        self._readers = readers
        self._reader = reader
        self._form = form
        self._models = models
        self._turn_id = reader.request.turn_id.hex()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the answer."""
        watching = asyncio.ensure_future(self._watch(receive))
        self._readers.begin(self._reader)
        try:
            response = await self._respond(send)
            if response is not None and not self._reader.is_gone:
                await response(scope, receive, send)
        finally:
            watching.cancel()
            self._readers.done(self._reader, is_cancelled=not self._form.is_kept)

    async def _respond(self, send: Send) -> Response | None:
        """Send the answer as a stream, or return it whole, or the reason why there is none."""
        try:
            first = await self._first()
            if not self._form.is_streamed:
                return JsonResponse(await self._whole(first), headers=self._headers())
        except RequestError as error:
            return error_response(error, self._headers())
        await self._stream(first, send)
        return None

    def _headers(self) -> dict[str, str]:
        """Return what lets a client come back."""
        secret = self._reader.request.secret.hex()
        return {TURN_HEADER: self._turn_id, SECRET_HEADER: secret, "X-Request-Id": self._turn_id}

    async def _watch(self, receive: Receive) -> None:
        await until_gone(receive)
        self._reader.leave()

    async def _first(self) -> list[Piece]:
        """Return what decides the status: the first events, or none where it took too long.

        Raises:
            RequestError: there is no answer.
        """
        reader, loop = self._reader, asyncio.get_running_loop()
        until = loop.time() + BEGIN_S
        while not (pieces := reader.take()):
            is_enough = reader.is_done or (self._form.begins_at_once and reader.is_accepted)
            if is_enough or reader.is_gone or not await reader.wait(until - loop.time()):
                return []
        if not self._form.begins_at_once:
            check_event(pieces[0].event)
        return pieces

    async def _whole(self, pieces: list[Piece]) -> JsonObject:
        """Return the whole answer; an empty one if nobody is there any more.

        Raises:
            RequestError: it failed, or was cancelled.
        """
        reader = self._reader
        events: list[Event] = []
        while not reader.is_gone:
            events += [piece.event for piece in pieces]
            if reader.is_done:
                return completion(
                    events,
                    turn_id=self._turn_id,
                    model=self._model(self._asked()),
                    created=int(time.time()),
                )
            if pieces:
                # Who waits for all of it has no text to go on with meanwhile.
                reader.wrote(pieces[-1].offset)
                await asyncio.sleep(0)  # There may be much, and others want their turn.
            else:
                await reader.wait(KEEP_ALIVE_S)
            pieces = reader.take()
        return {}

    async def _stream(self, pieces: list[Piece], send: Send) -> None:
        """Send the answer's events as they come."""
        reader, asked = self._reader, self._asked()
        chunks = Chunks(
            turn_id=self._turn_id,
            model=self._model(asked),
            created=int(time.time()),
            include_usage=asked.includes_usage,
        )
        headers = {**self._headers(), **STREAM_HEADERS}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        offset = reader.request.offset
        if reader.end is not None and reader.is_done and not pieces:
            pieces = [Piece(reader.end, offset)]  # Who has it already gets it again.
        data = server_sent(chunks.start(), self._id(offset))
        try:
            while not reader.is_gone:
                if pieces:
                    data += b"".join(self._sent(chunks, piece) for piece in pieces)
                    offset = pieces[-1].offset
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    reader.wrote(offset)
                    await asyncio.sleep(0)  # Sending need not wait, and others want their turn.
                if reader.is_done:
                    break
                data, pieces = b"", reader.take()
                if not pieces and not await reader.wait(KEEP_ALIVE_S):
                    data = self._while_quiet(has_begun=offset > 0)
            last = DONE if chunks.is_whole else b""
        except RequestError as error:
            last = server_sent(error_body(error.code, error.message))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _sent(self, chunks: Chunks, piece: Piece) -> bytes:
        """Return an event's chunks; the last has the id: before it the event is not all there."""
        made = chunks.of(piece.event)
        ids = [*[""] * (len(made) - 1), self._id(piece.offset)]
        return b"".join(map(server_sent, made, ids))

    def _while_quiet(self, *, has_begun: bool) -> bytes:
        if has_begun:
            return comment("the model is quiet")
        return comment(f"waiting; {self._readers.hub.waiting_before(self._reader)} turns before it")

    def _id(self, offset: int) -> str:
        return f"{self._turn_id}:{offset}"

    def _asked(self) -> ChatRequested:
        """Return what the turn's request says; of an old turn it is not kept."""
        if self._form.asked is not None:
            return self._form.asked
        body = self._readers.hub.body_of(self._reader)
        model = parse_chat(body).model if body else None
        return ChatRequested(model, stream_options={"include_usage": True})

    def _model(self, asked: ChatRequested) -> str:
        end = self._reader.end
        return asked.model or (end.model if end else "") or next(iter(self._models), "")
