"""Requests that are no chats, passed on to an engine behind the server."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing

import httpx2
import msgspec

from eloquent.errors import RequestError
from eloquent_server.backends.base import Backend
from eloquent_server.backends.upstream import Headers, Upstream
from eloquent_server.backends.upstream_errors import UpstreamError
from eloquent_server.backends.upstreams import UpstreamBackend
from eloquent_server.http.forwarding import Forwarded

OURS = "/v1"
"Where the paths begin that are passed on; an engine may have its own in its place."

NOT_READY = "The server is still looking at its engines. Try again in a moment."


class _Body(msgspec.Struct):
    model: str | None = None


class UpstreamForward:
    """Passes requests on to the engines of an `UpstreamBackend`; a `PassThrough`."""

    def __init__(self, backend_of: Callable[[], Backend | None]) -> None:
        """`backend_of` returns the backend, once it is there."""
        self._backend_of = backend_of

    async def forward(self, method: str, target: str, headers: Headers, body: bytes) -> Forwarded:
        """See `PassThrough.forward`.

        The engine is the least busy that is up and has the model that the body names; the next is
        asked where one cannot be reached. A `cache_salt` is dropped, as from chats.
        """
        backend = self._backend_of()
        if not isinstance(backend, UpstreamBackend):
            raise RequestError("unavailable", NOT_READY)
        model, body = _read(body)
        order = sorted(
            backend.upstreams,
            key=lambda each: (not each.has(model), not each.is_up, each.in_flight),
        )
        wire_target = target.removeprefix(OURS).encode("latin-1")
        for upstream in order:
            try:
                return await _ask(upstream, method, wire_target, headers, body)
            except UpstreamError:
                # It is up when it was reached, and may have begun to do what was asked.
                if upstream.is_up or upstream is order[-1]:
                    raise
        raise AssertionError("there is an engine")


async def _ask(
    upstream: Upstream, method: str, target: bytes, headers: Headers, body: bytes
) -> Forwarded:
    async with AsyncExitStack() as stack:
        asked = upstream.asked(method, target, headers, body)
        response = await stack.enter_async_context(asked)
        pieces = _pieces(upstream, response, stack.pop_all())
        await anext(pieces)  # From now on its end is that of the response.
        return Forwarded(response.status_code, response.headers.multi_items(), pieces)


async def _pieces(
    upstream: Upstream, response: httpx2.Response, stack: AsyncExitStack
) -> AsyncGenerator[bytes]:
    """Yield nothing, then the body, and be done with the response at the end."""
    async with stack, aclosing(upstream.paced(response.aiter_raw())) as pieces:
        yield b""
        async for piece in pieces:
            yield piece


def _read(body: bytes) -> tuple[str, bytes]:
    """Return the model that a body asks for, empty if none, and the body without `cache_salt`."""
    try:
        model = msgspec.json.decode(body, type=_Body).model or ""
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return "", body
    if fields.pop("cache_salt", None) is None:
        return model, body
    return model, msgspec.json.encode(fields)
