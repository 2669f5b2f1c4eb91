"""The HTTP front's routes: OpenAI's chat API, turns to resume, and what operators look at."""

import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from eloquent.core.wire import Request
from eloquent.errors import EloquentError, RequestError
from eloquent_server.admission import Admission
from eloquent_server.http.answers import Answer, Form, Readers
from eloquent_server.http.forwarding import Passing, PassThrough, may_be_passed_on, passed_up
from eloquent_server.http.reader import HttpReader
from eloquent_server.http.requests import (
    key_of,
    names_in,
    offset_in,
    old_turn_in,
    parse_chat,
    read_body,
)
from eloquent_server.http.responses import JsonResponse, error_response
from eloquent_server.turns import FAULT, TurnHub

NO_SUCH_PATH = "There is no {} here; docs/protocol.md, 'HTTP', has the paths that there are."
NO_SUCH_METHOD = "{} does nothing with {}; docs/protocol.md, 'HTTP', has what does."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Behind:
    """What is behind the front."""

    hub: TurnHub
    admission: Admission
    "The hub's."
    models: Callable[[], Sequence[str]]
    "The names under which the backend answers; the first is the default."
    why_not_ready: Callable[[], Awaitable[str]]
    "Returns why the server takes no turns now; empty: it does."
    metrics: Callable[[], Awaitable[tuple[bytes, str]]] | None = None
    "Returns the metrics and their content type."
    pass_through: PassThrough | None = None
    "Takes what is no chat."
    entropy: Callable[[int], bytes] = secrets.token_bytes
    "Makes names of turns."


class Front:
    """The application; `readers` are those whose requests are under way."""

    def __init__(self, behind: Behind) -> None:
        self._behind = behind
        self._began = int(time.time())
        self.readers = Readers(behind.hub)

    def app(self) -> ASGIApp:
        """Return it as an ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/turns/{turn}/events", self._events, methods=["GET"]),
                Route("/v1/turns/{turn}", self._delete, methods=["DELETE"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._model, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/ready", self._ready, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
                Route("/v1/{path:path}", self._other, methods=["GET", "POST", "DELETE"]),
            ],
            exception_handlers={
                EloquentError: _on_error,
                HTTPException: _on_http_exception,
                ClientDisconnect: _on_disconnect,
                Exception: _on_fault,
            },
        )

    async def _chat(self, http: HttpRequest) -> Response:
        """Make a turn, or find the one whose names the request brings, and answer with it."""
        key = key_of(http.headers)
        self._behind.admission.principal(key)  # Before the body is read.
        names = names_in(http.headers, self._behind.entropy)
        body = await read_body(http)
        asked = parse_chat(body)
        form = Form(is_streamed=bool(asked.stream), is_kept=names.is_kept, asked=asked)
        return self._answer(Request(names.turn_id, body, names.secret, key=key), form)

    async def _events(self, http: HttpRequest) -> Response:
        """Go on with a turn."""
        form = Form(is_streamed=True, is_kept=True, begins_at_once=True)
        turn_id, secret = old_turn_in(http)
        key, offset = key_of(http.headers), offset_in(http)
        return self._answer(Request(turn_id, b"", secret, offset, is_owner=False, key=key), form)

    async def _delete(self, http: HttpRequest) -> Response:
        """Forget a turn."""
        turn_id, secret = old_turn_in(http)
        await self._behind.hub.delete(Request(turn_id, b"", secret, key=key_of(http.headers)))
        return JsonResponse({"id": turn_id.hex(), "object": "turn.deleted", "deleted": True})

    async def _models(self, http: HttpRequest) -> Response:
        self._behind.admission.principal(key_of(http.headers))
        data = [self._described(name) for name in self._behind.models()]
        return JsonResponse({"object": "list", "data": data})

    async def _model(self, http: HttpRequest) -> Response:
        self._behind.admission.principal(key_of(http.headers))
        name = http.path_params["name"]
        if name not in self._behind.models():
            raise RequestError("unknown_model", f"There is no model {name!r} here.")
        return JsonResponse(self._described(name))

    def _described(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "eloquent"}

    async def _health(self, http: HttpRequest) -> Response:
        """Say that the process is alive."""
        return JsonResponse({"status": "ok"})

    async def _ready(self, http: HttpRequest) -> Response:
        """Say whether it takes turns."""
        why_not = await self._behind.why_not_ready()
        if why_not:
            raise RequestError("unavailable", why_not)
        return JsonResponse({"status": "ready"})

    async def _metrics(self, http: HttpRequest) -> Response:
        if self._behind.metrics is None:
            raise HTTPException(404)
        content, media_type = await self._behind.metrics()
        return Response(content, headers={"Content-Type": media_type})

    async def _other(self, http: HttpRequest) -> Response:
        """Pass on what is no chat, as one more turn of whoever asks."""
        behind, admission = self._behind.pass_through, self._behind.admission
        principal = admission.principal(key_of(http.headers))
        if behind is None or not may_be_passed_on(http.path_params["path"]):
            raise HTTPException(404)
        body = await read_body(http)
        query = http.scope["query_string"].decode("ascii")
        target = http.scope["raw_path"].decode("ascii") + (f"?{query}" if query else "")
        headers = passed_up(http.headers.items())
        passing = Passing(partial(behind.forward, http.method, target, headers, body, principal))
        admission.admit(principal, len(body))

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await passing(scope, receive, send)
            finally:
                admission.ended(principal, passing.answer_bytes)

        return cast(Response, counted)

    def _answer(self, request: Request, form: Form) -> Response:
        reader = HttpReader(request)
        # Starlette calls what it gets as an ASGI application, of which a response is one form.
        return cast(Response, Answer(self.readers, reader, form, self._behind.models()))


async def _on_error(http: HttpRequest, error: Exception) -> Response:
    if isinstance(error, RequestError):
        return error_response(error)
    logger.error("%s %s: %s", http.method, http.url.path, error)
    return error_response(RequestError("unavailable", str(error)))


async def _on_http_exception(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = http.url.path
    if error.status_code == 405:
        response = error_response(
            RequestError("method_not_allowed", NO_SUCH_METHOD.format(http.method, path))
        )
        response.headers.update(error.headers or {})
        return response
    return error_response(RequestError("not_found", NO_SUCH_PATH.format(path)))


async def _on_disconnect(http: HttpRequest, error: Exception) -> Response:
    """Answer nobody: the connection ended within the request's body."""
    return Response(status_code=400)


async def _on_fault(http: HttpRequest, error: Exception) -> Response:
    """Say that it is the server's doing; Starlette then raises the fault, which is logged."""
    return error_response(RequestError("internal_error", FAULT))
