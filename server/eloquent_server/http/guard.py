"""What no route gets to see: requests of other sites' pages, and more than there is room for."""

from collections import Counter
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eloquent.addresses import is_loopback
from eloquent.errors import RequestError
from eloquent_server.http.responses import error_response

MAX_REQUESTS = 1000
"As many requests under `/v1` are answered at once."

WRONG_HOST = (
    "This server listens on this machine only and is not called {!r}: use localhost or 127.0.0.1, "
    "or tell the server what something in front of it is called."
)
WRONG_ORIGIN = "Pages of {} may not ask this server; programs send no Origin."
TOO_MANY = f"{MAX_REQUESTS} requests are being answered: come back in a moment."


class Guard:
    """Lets requests through to an application that it may see."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        is_local: bool,
        names: Collection[str] = (),
        most: int = MAX_REQUESTS,
    ) -> None:
        """`is_local`: it listens on a loopback address, and so has no other names than these."""
        self._app = app
        self._is_local = is_local
        self._names = frozenset(name.lower() for name in names)
        self._room = most
        self.statuses: Counter[int] = Counter()
        "How many responses had which status."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Guard`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = self._counting(send)
        try:
            self._check(Headers(scope=scope))
            is_counted = scope["path"].startswith("/v1/")
            if is_counted and not self._room:
                raise RequestError("overloaded", TOO_MANY)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        self._room -= is_counted
        try:
            await self._app(scope, receive, send)
        finally:
            self._room += is_counted

    def _counting(self, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        return counted

    def _check(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _parts(f"//{host}").hostname or ""
        # Against DNS rebinding: a page whose name was made to lead here is a page of that name.
        if self._is_local and not is_loopback(name) and name not in self._names:
            raise RequestError("misdirected", WRONG_HOST.format(host[:80]))
        if origin is not None:
            page = _parts(origin)
            if page.netloc != host and (page.hostname or "") not in self._names:
                raise RequestError("forbidden", WRONG_ORIGIN.format(origin[:80]))


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
