"""Requests that are no chats, passed on to an engine behind the server."""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing

import httpx2
import msgspec

from eloquent.errors import RequestError
from eloquent_server.admission import LOCAL, Principal
from eloquent_server.backends.base import Backend, Tenant
from eloquent_server.backends.upstream import Headers, Upstream
from eloquent_server.backends.upstream_errors import EngineError, UpstreamError
from eloquent_server.backends.upstreams import UpstreamBackend
from eloquent_server.http.forwarding import Forwarded

OURS = "/v1"
"Where the paths begin that are passed on; an engine may have its own in its place."

NOT_READY = "The server is still looking at its engines. Try again in a moment."
NOT_JSON = (
    "The body is no JSON object: {}. Send one, or a form (Content-Type: multipart/form-data)."
)
BAD_TARGET = "The path or its query cannot be passed on: {}. Write a '#' in it as %23."
OPERATORS = (401, 402, 403, 407)
"Statuses that are about the server's key, of which their text may repeat a part."
_MODEL_IN_FORM = re.compile(rb'name="model"\r\n(?:[^\r\n]{1,200}\r\n){0,5}\r\n([^\r\n]{0,256})\r\n')
"See RFC 7578. Its bounds keep it fast whatever the body."
LATIN = "latin-1"
"Of headers and targets, in which each byte is a character."


class UpstreamForward:
    """Passes requests on to the engines of an `UpstreamBackend`; a `PassThrough`."""

    def __init__(
        self,
        backend_of: Callable[[], Backend | None],
        tenant_of: Callable[[Principal], Tenant],
    ) -> None:
        """`backend_of` returns the backend, once it is there."""
        self._backend_of = backend_of
        self._tenant_of = tenant_of

    async def forward(
        self, method: str, target: str, headers: Headers, body: bytes, who: Principal = LOCAL
    ) -> Forwarded:
        """See `PassThrough.forward`.

        The engine is the least busy that is up and has the model that the body names; the next is
        asked where one cannot be reached. The tenant's `cache_salt` takes the place of the
        client's, as in chats; so what an engine might read one from and this server cannot read
        is refused (`invalid_request`).
        """
        backend = self._backend_of()
        if not isinstance(backend, UpstreamBackend):
            raise RequestError("unavailable", NOT_READY)
        salt = backend.salt_for(self._tenant_of(who))
        model, body = _read(body, salt, is_form=_is_form(headers))
        order = sorted(
            backend.upstreams,
            key=lambda each: (not each.has(model), not each.is_up, each.in_flight),
        )
        wire_target = target.removeprefix(OURS).encode(LATIN)
        for upstream in order:
            try:
                return await _ask(upstream, method, wire_target, headers, body)
            except UpstreamError as error:
                upstream.log(error)
                # It is up when it was reached, and may have begun to do what was asked.
                if upstream.is_up or upstream is order[-1]:
                    raise
        raise AssertionError("there is an engine")


async def _ask(
    upstream: Upstream, method: str, target: bytes, headers: Headers, body: bytes
) -> Forwarded:
    async with AsyncExitStack() as stack:
        asked = upstream.asked(method, target, headers, body)
        try:
            response = await stack.enter_async_context(asked)
        except httpx2.InvalidURL as error:
            raise RequestError("invalid_request", BAD_TARGET.format(error)) from error
        if response.status_code in OPERATORS:
            raise EngineError(response.status_code).as_upstream_error()
        # As bytes: what httpx2 makes of them as text depends on what is in the others.
        given = [(n.decode(LATIN).lower(), v.decode(LATIN)) for n, v in response.headers.raw]
        pieces = _pieces(upstream, response, stack.pop_all())
        await anext(pieces)  # From now on its end is that of the response.
        return Forwarded(response.status_code, given, pieces)


async def _pieces(
    upstream: Upstream, response: httpx2.Response, stack: AsyncExitStack
) -> AsyncGenerator[bytes]:
    """Yield nothing, then the body, and be done with the response at the end."""
    async with stack, aclosing(upstream.paced(response.aiter_raw())) as pieces:
        yield b""
        async for piece in pieces:
            yield piece


def _is_form(headers: Headers) -> bool:
    kinds = [value.lower() for name, value in headers if name.lower() == "content-type"]
    return len(kinds) == 1 and kinds[0].startswith("multipart/form-data")


def _read(body: bytes, salt: str, *, is_form: bool) -> tuple[str, bytes]:
    """Return the model that a body asks for, empty if none, and the body with another salt or none.

    Engines' own readers take more for JSON than the standard does: NaN, a mark at the beginning,
    UTF-16.

    Raises:
        RequestError: `invalid_request`: it is neither empty nor a form nor a JSON object.
    """
    if not body:
        return "", body
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        if is_form:
            named = _MODEL_IN_FORM.search(body)
            return named[1].decode(errors="replace") if named else "", body
        raise RequestError("invalid_request", NOT_JSON.format(error)) from error
    model, had_salt = _model_in(fields), fields.pop("cache_salt", None) is not None
    if salt:
        fields["cache_salt"] = msgspec.Raw(msgspec.json.encode(salt))
    return model, msgspec.json.encode(fields) if salt or had_salt else body


def _model_in(fields: dict[str, msgspec.Raw]) -> str:
    try:
        return msgspec.json.decode(fields.get("model", b"null"), type=str | None) or ""
    except (msgspec.MsgspecError, UnicodeError):
        return ""  # The engine says what is wrong with it.
