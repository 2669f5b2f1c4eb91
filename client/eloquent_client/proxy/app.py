"""The proxy as an ASGI application: which requests it takes, and when a program has gone."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from eloquent.addresses import is_loopback
from eloquent.core.turns import TOO_LARGE
from eloquent.core.wire import MAX_REQUEST_BODY_BYTES
from eloquent.errors import RequestError
from eloquent_client.proxy.handler import Handler, Reply, refusal_reply

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODY_TIMEOUT_S = 30.0
"How long a request's body may take."

DRAINED_BYTES = 16 * MAX_REQUEST_BODY_BYTES
"So much of a body that is too large is read, and thrown away, for the program to hear so."


FAULT = "The proxy failed; what it says on its own terminal has the reason. Please report it."

logger = logging.getLogger(__name__)


class _GoneError(Exception):
    """The program has hung up."""


class ProxyApp:
    """Hands requests to a `Handler`, if a program and no web page sent them.

    A page in a browser can reach loopback. It cannot read an answer, since nothing here allows it
    to (CORS); but it could ask, on its visitor's account, or get around that by a name of its own
    that leads to 127.0.0.1 (DNS rebinding). So `Host` must mean this machine, and `Origin`, which
    browsers send, must be the same.
    """

    def __init__(self, handler: Handler, *, is_local: bool = True) -> None:
        """`is_local`: it is there for this machine only, and so has no other names."""
        self._handler = handler
        self._is_local = is_local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI 3)."""
        if scope["type"] != "http":
            raise ValueError(f"the proxy answers HTTP, not {scope['type']}")
        try:
            body = await self._read(receive)
        except _GoneError:
            return
        except RequestError as error:
            await _send(refusal_reply(error), send, closes=True)
            return
        gone = asyncio.ensure_future(_until_gone(receive))
        answering = asyncio.ensure_future(self._answer(scope, body, send))
        try:
            await asyncio.wait((gone, answering), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            answering.cancel()
            await asyncio.wait((gone, answering))
        if not answering.cancelled():
            answering.result()

    async def _answer(self, scope: Message, body: bytes, send: Send) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            self._check(headers)
        except RequestError as error:
            await _send(refusal_reply(error), send)
            return
        try:
            reply = await self._handler.handle(scope["method"], scope["path"], headers, body)
        except Exception:
            # The boundary of the application: the fault is logged, and hurts no other request.
            logger.exception("a request failed")
            reply = refusal_reply(RequestError("internal_error", FAULT))
        await _send(reply, send)

    async def _read(self, receive: Receive) -> bytes:
        body, size, is_whole = bytearray(), 0, False
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while not is_whole and size <= DRAINED_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    size += len(message.get("body", b""))
                    is_whole = not message.get("more_body", False)
                    if size <= MAX_REQUEST_BODY_BYTES:
                        body += message.get("body", b"")
        except TimeoutError as error:
            raise RequestError(
                "request_timeout", f"The request was not whole within {BODY_TIMEOUT_S:g} s."
            ) from error
        if size > MAX_REQUEST_BODY_BYTES:
            raise RequestError("request_too_large", TOO_LARGE)
        return bytes(body)

    def _check(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self._is_local and not is_loopback(_parts(f"//{host}").hostname or ""):
            raise RequestError(
                "misdirected",
                f"This proxy is not {host[:200]!r}: use the address that it printed. (This keeps "
                "web pages out that give 127.0.0.1 a name of theirs.)",
            )
        origin = headers.get("origin")
        if origin is not None and _parts(origin).netloc != host:
            raise RequestError(
                "forbidden",
                f"A web page of {origin[:200]!r} sent this request: the proxy is for programs.",
            )


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(reply: Reply, send: Send, *, closes: bool = False) -> None:
    """Write a reply; `closes`: the connection is of no further use."""
    headers = {**reply.headers, "connection": "close"} if closes else reply.headers
    try:
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": encoded})
        async for data in reply.body:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        await reply.close()
