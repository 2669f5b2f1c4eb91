"""Requests that are no chats: they go on to the engine behind the server as they are.

Headers that are only for one connection stay on it (RFC 9110 section 7.6.1), and the reader's key
and names of ours do not leave the server.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, cast

from starlette.types import Receive, Scope, Send

from eloquent.errors import RequestError
from eloquent_server.admission import LOCAL, Principal
from eloquent_server.http.responses import error_response, until_gone

Headers = list[tuple[str, str]]

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
PASSED_ON = frozenset(
    {"audio", "completions", "embeddings", "images", "moderations", "rerank", "responses", "score"}
)
"What a path under `/v1` may begin with."
OURS = "x-eloquent-"
KEYS = {"api-key", "authorization", "openai-organization", "openai-project", "x-api-key"}
"They say who asks and who pays: towards an engine that is the server."
_NOT_PASSED_UP = HOP_BY_HOP | KEYS | {"content-length", "cookie", "expect", "host"}
_NOT_PASSED_DOWN = HOP_BY_HOP | {"date", "server", "set-cookie"}


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What an engine behind the server answers."""

    status: int
    headers: Headers
    "All of its headers; those of its connection are left out here."
    body: AsyncIterator[bytes]
    "As it comes, and as `content-encoding` has it; an async generator, closed when it is left."


class PassThrough(Protocol):
    """An engine behind the server."""

    async def forward(
        self, method: str, target: str, headers: Headers, body: bytes, who: Principal = LOCAL
    ) -> Forwarded:
        """Send a request of somebody's and return as soon as there is a status.

        `target` is the path from `/v1` on, with its query; `headers` have no key, which is the
        callee's to add, nor any of the connection.

        Raises:
            RequestError: `upstream_error`, `upstream_timeout`, `unavailable`, `invalid_request`.
        """


class Passing:
    """Passes one request on, and its answer back as it comes; an ASGI application."""

    def __init__(self, forward: Callable[[], Awaitable[Forwarded]]) -> None:
        """`forward` is a request's `PassThrough.forward`."""
        self._forward = forward
        self.answer_bytes = 0
        "How many came."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the answer; it is given up when nobody waits for it any more."""
        passing = asyncio.ensure_future(self._pass(scope, receive, send))
        watching = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait((passing, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            is_cut_off = passing.cancel()
            await asyncio.wait((passing,))
        if not is_cut_off:
            passing.result()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            forwarded = await self._forward()
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in passed_down(forwarded.headers)
        ]
        start = {"type": "http.response.start", "status": forwarded.status, "headers": headers}
        try:
            async with aclosing(cast(Any, forwarded.body)) as pieces:
                await send(start)
                async for piece in pieces:
                    self.answer_bytes += len(piece)
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except RequestError as error:
            # A response without its end ends the connection: so the reader knows.
            logger.warning("what was passed on broke off: %s", error)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def may_be_passed_on(path: str) -> bool:
    """Return whether a path, from behind `/v1/` on, is one that users of OpenAI's API ask.

    Engines have others below `/v1`, such as vLLM's to load adapters, which are for their operator.
    """
    steps = path.replace("\\", "/").split("/")
    return steps[0] in PASSED_ON and not {".", ".."} & set(steps)


def passed_up(headers: Iterable[tuple[str, str]]) -> Headers:
    """Return the headers of a request that go on to the engine."""
    return [
        (name, value)
        for name, value in _end_to_end(headers)
        if name.lower() not in _NOT_PASSED_UP and not name.lower().startswith(OURS)
    ]


def passed_down(headers: Iterable[tuple[str, str]]) -> Headers:
    """Return the headers of an answer that go on to the reader."""
    return [
        (name, value)
        for name, value in _end_to_end(headers)
        if name.lower() not in _NOT_PASSED_DOWN
    ]


def _end_to_end(headers: Iterable[tuple[str, str]]) -> Headers:
    """Leave out what `Connection` names."""
    given = list(headers)
    named = {
        token.strip().lower()
        for name, value in given
        if name.lower() == "connection"
        for token in value.split(",")
    }
    return [(name, value) for name, value in given if name.lower() not in named]
