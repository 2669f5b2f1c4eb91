"""What the proxy answers to each request, whoever brings it."""

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from eloquent.core.events import End, Event, Failure
from eloquent.core.turns import TOO_LARGE
from eloquent.core.wire import MAX_KEY_BYTES, MAX_REQUEST_BODY_BYTES
from eloquent.errors import RequestError
from eloquent.openai import (
    DONE,
    Chunks,
    comment,
    completion,
    error_body,
    http_status,
    server_sent,
)
from eloquent_client.client import Client
from eloquent_client.proxy.link import LinkWatch
from eloquent_client.proxy.turns import LINK_LOST, Reading, Turns

GRACE_S = 120.0
"How long an outage may last before programs are told; as long a server keeps a turn running."

ANSWER_TIMEOUT_S = 3600.0
"How long an answer may take in all; programs have limits of their own."

COMMENT_EVERY_S = 2.5
"A stream on which nothing else is written gets a comment, so that no program takes it for dead."

DEFAULT_MODEL = "default"
"Stands for the server's default model as long as no answer has told a name."

MAX_MODELS = 64

NAMED = "idempotency-key"
"The header by which a program names its request, so that asking again is not a second answer."

MAX_NAME_CHARS = 256

PATHS = "This proxy has POST /v1/chat/completions, GET /v1/models and GET /health."

SSE = {"content-type": "text/event-stream", "cache-control": "no-cache"}
JSON = {"content-type": "application/json"}

LINK_LOST_STATUS = 504


def client_options(link: LinkWatch) -> dict[str, Any]:
    """Return what a handler's `Client` is to be made with.

    It does not ask again by itself: programs are to hear of a server's `Retry-After` at once, and
    for connections the grace time counts.
    """
    return {"timeout_s": ANSWER_TIMEOUT_S, "max_retries": 0, "on_link_state": link.on_state}


async def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer; `close` is to be awaited in any case, when its body is read or given up."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]] = field(default=_nothing)


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class _Asked(msgspec.Struct, frozen=True):
    """The fields of a chat body that concern the proxy; the server reads all of them."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class Handler:
    """Answers OpenAI's requests by asking a server over Eloquent. Use it on one event loop."""

    def __init__(
        self, client: Client, link: LinkWatch, *, key: str | None = None, grace_s: float = GRACE_S
    ) -> None:
        """`client` is made with `client_options(link)`.

        `key` None: programs' own bearer keys are passed on. `grace_s` is how long an outage may
        last before they are told.
        """
        self._client = client
        self._link = link
        self._key = key
        self._turns = Turns(client, link, grace_s)
        self._models: dict[str, None] = {}
        self._default = DEFAULT_MODEL
        "What the server's default model is called, as far as an answer has told."

    async def handle(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> Reply:
        """Answer a request; for a chat as soon as its first event, or its refusal, has come.

        `headers` have names in lower case. What goes wrong is a reply, too, in OpenAI's form.
        """
        try:
            if path == "/v1/chat/completions":
                _allow("POST", method)
                return await self._chat(headers, body)
            if path == "/v1/models":
                _allow("GET", method)
                return json_reply(200, self._list_models())
            if path == "/health":
                _allow("GET", method)
                return json_reply(200, self._health())
            raise RequestError("not_found", f"There is nothing at {path[:200]!r}. {PATHS}")
        except RequestError as error:
            return refusal_reply(error)

    async def close(self) -> None:
        """Cancel what runs; programs that read an answer get an error."""
        await self._turns.close()

    async def _chat(self, headers: Mapping[str, str], body: bytes) -> Reply:
        asked, body = _read_body(body)
        name = headers.get(NAMED)
        if name is not None and len(name) > MAX_NAME_CHARS:
            raise RequestError(
                "invalid_request", f"{NAMED} has more than {MAX_NAME_CHARS} characters: shorten it."
            )
        reading = self._turns.read(body, self._key_of(headers), name)
        try:
            if not asked.stream:
                return await self._whole(reading, asked)
            first = await _event(reading)
            chunks = Chunks(
                turn_id=reading.turn_id,
                model=self._name_of(asked),
                created=int(time.time()),
                include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
            )
            said = chunks.of(first)
            if isinstance(first, Failure | End) and not chunks.is_whole:
                raise RequestError(said[0]["error"]["code"], said[0]["error"]["message"])
        except BaseException:
            await reading.close()
            raise
        head = b"".join(server_sent(each) for each in [chunks.start(), *said])
        stream = self._stream(reading, asked, chunks, first, head)
        return Reply(200, SSE | _named(reading), stream, reading.close)

    async def _whole(self, reading: Reading, asked: _Asked) -> Reply:
        """Wait for all of an answer."""
        events = [await _event(reading)]
        while not isinstance(events[-1], End | Failure):
            events.append(await _event(reading))
        self._note(asked, events[-1])
        whole = completion(
            events,
            turn_id=reading.turn_id,
            model=self._name_of(asked),
            created=int(time.time()),
        )
        await reading.close()
        return json_reply(200, whole, _named(reading))

    async def _stream(
        self, reading: Reading, asked: _Asked, chunks: Chunks, event: Event, head: bytes
    ) -> AsyncIterator[bytes]:
        """Give out an answer as server-sent events, from its first event on, which is in `head`."""
        yield head
        tokens = 1
        try:
            while not isinstance(event, End | Failure):
                came = await reading.next(COMMENT_EVERY_S)
                if came is None:
                    yield comment(f"link {self._link.state.value} at token {tokens}")
                    continue
                event, tokens = came, tokens + 1
                yield b"".join(server_sent(each) for each in chunks.of(event))
        except RequestError as error:
            yield server_sent(error_body(error.code, error.message))
        self._note(asked, event)
        if chunks.is_whole:
            yield DONE

    def _key_of(self, headers: Mapping[str, str]) -> str:
        if self._key is not None:
            return self._key
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        if len(key.encode()) > MAX_KEY_BYTES:
            raise RequestError(
                "unauthorized", f"The key has more than {MAX_KEY_BYTES} bytes: it is no server's."
            )
        return key

    def _name_of(self, asked: _Asked) -> str:
        """Return the model's name as far as it is known before the end of an answer."""
        return asked.model if asked.model not in (None, DEFAULT_MODEL) else self._default

    def _note(self, asked: _Asked, event: Event) -> None:
        if isinstance(event, End) and event.model:
            if asked.model in (None, DEFAULT_MODEL):
                self._default = event.model
            if len(self._models) < MAX_MODELS:
                self._models[event.model] = None

    def _list_models(self) -> dict[str, Any]:
        """Return the models that have answered; Eloquent has no way to ask for the others."""
        return {
            "object": "list",
            "data": [
                {"id": name, "object": "model", "created": 0, "owned_by": "eloquent"}
                for name in self._models or [DEFAULT_MODEL]
            ],
        }

    def _health(self) -> dict[str, Any]:
        url, link = self._client.url, self._client.link
        return {
            "status": "ok",
            "server": f"{url.host}:{url.port}",
            "turns": self._turns.running,
            "link": {
                "state": link.state.value,
                "rung": None if link.rung is None else link.rung.value,
                "rtt_ms": None if link.rtt_ms is None else round(link.rtt_ms, 1),
                "loss_recovered": link.loss_recovered,
                "resumes": link.resumes,
            },
        }


def json_reply(status: int, body: Any, headers: Mapping[str, str] = {}) -> Reply:
    """Return a reply that is one JSON object."""
    data = msgspec.json.encode(body)

    async def give() -> AsyncIterator[bytes]:
        yield data

    return Reply(status, {**JSON, "content-length": str(len(data)), **headers}, give())


def refusal_reply(error: RequestError) -> Reply:
    """Return a refusal in OpenAI's form, with its HTTP status."""
    headers, status = {}, http_status(error.code)
    if error.retry_after_s > 0:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.code == LINK_LOST:
        # Enough was tried; and what was asked without a name would be generated a second time.
        headers["x-should-retry"], status = "false", LINK_LOST_STATUS
    return json_reply(status, error_body(error.code, error.message), headers)


async def _event(reading: Reading) -> Event:
    while (event := await reading.next(COMMENT_EVERY_S)) is None:
        pass
    return event


def _named(reading: Reading) -> dict[str, str]:
    return {"x-request-id": reading.turn_id}


def _allow(allowed: str, method: str) -> None:
    if method != allowed:
        raise RequestError("method_not_allowed", f"{method[:20]} is not possible here. {PATHS}")


def _read_body(body: bytes) -> tuple[_Asked, bytes]:
    """Return what concerns the proxy, and the body to send."""
    if len(body) > MAX_REQUEST_BODY_BYTES:
        raise RequestError("request_too_large", TOO_LARGE)
    try:
        asked = msgspec.json.decode(body, type=_Asked)
        if asked.model == DEFAULT_MODEL:
            fields = msgspec.json.decode(body, type=dict[str, Any])
            del fields["model"]
            body = msgspec.json.encode(fields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("invalid_request", f"The request is no chat body: {error}.") from error
    return asked, body
