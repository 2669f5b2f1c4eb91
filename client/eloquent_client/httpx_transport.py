"""A transport for httpx2: OpenAI's own library in a program, its requests carried over Eloquent.

It needs httpx2 (`pip install 'eloquent-stream[proxy]'`), which the openai library brings along.
"""

import asyncio
import atexit
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import httpx2

from eloquent.url import ServerUrl, parse_url
from eloquent_client.client import Client, checked_key
from eloquent_client.errors import ClientClosedError
from eloquent_client.proxy.handler import GRACE_S, Handler, Reply, client_options
from eloquent_client.proxy.link import LinkWatch
from eloquent_client.sync import LoopThread


class EloquentTransport(httpx2.AsyncBaseTransport):
    """Answers requests as `eloquent proxy` does, without a port and another process.

    For example::

        transport = EloquentTransport("eloquent://localhost:4433#sha256=...")
        client = openai.AsyncOpenAI(
            api_key="the server's, or any", http_client=httpx2.AsyncClient(transport=transport)
        )

    Every request goes to the server of its URL, whatever host httpx2 was told, and with it the key
    that the request has, unless there is one here. To be used on one event loop; closing the HTTP
    client closes it.
    """

    def __init__(
        self, url: str | ServerUrl, *, key: str | None = None, grace_s: float = GRACE_S
    ) -> None:
        """`grace_s`: as long may an outage last; then an answer ends with an error event.

        Raises:
            ConfigurationError: `url` is no server URL, or `key` is no key.
        """
        self._url = parse_url(url) if isinstance(url, str) else url
        self._key = None if key is None else checked_key(key)
        self._grace_s = grace_s
        self._client: Client | None = None
        self._handler: Handler | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer a request; see `httpx2.AsyncBaseTransport`.

        Raises:
            ReadTimeout: there was no first event within the request's read timeout.
        """
        body = await request.aread()
        headers = {name.lower(): value for name, value in request.headers.items()}
        timeout_s = request.extensions.get("timeout", {}).get("read")
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._get_handler().handle(
                    request.method, request.url.path, headers, body
                )
        except TimeoutError as error:
            raise httpx2.ReadTimeout(
                f"The answer did not begin within {timeout_s:g} s.", request=request
            ) from error
        return httpx2.Response(reply.status, headers=dict(reply.headers), stream=_Body(reply))

    async def aclose(self) -> None:
        """Cancel what runs, and close the connection."""
        handler, self._handler = self._handler, None
        client, self._client = self._client, None
        try:
            if handler is not None:
                await handler.close()
        finally:
            if client is not None:
                await client.close()

    def _get_handler(self) -> Handler:
        if self._handler is None:
            link = LinkWatch(asyncio.get_running_loop().time)
            self._client = Client(self._url, **client_options(link))
            self._handler = Handler(self._client, link, key=self._key, grace_s=self._grace_s)
        return self._handler


class _Body(httpx2.AsyncByteStream):
    """A reply's body, as it comes."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for data in self._reply.body:
            yield data

    async def aclose(self) -> None:
        await self._reply.close()


class SyncEloquentTransport(httpx2.BaseTransport):
    """The same for `openai.OpenAI` and `httpx2.Client`, from any thread."""

    def __init__(self, url: str | ServerUrl, **options: Any) -> None:
        """`options` are those of `EloquentTransport`.

        Raises:
            ConfigurationError: `url` is no server URL.
        """
        self._transport = EloquentTransport(url, **options)
        self._thread = LoopThread()
        atexit.register(self.close)  # as `SyncClient`

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer a request; see `EloquentTransport.handle_async_request`."""
        request.read()
        response = self._thread.run(lambda: self._transport.handle_async_request(request))
        assert isinstance(response.stream, _Body)
        stream = _SyncBody(response.stream, self._thread)
        return httpx2.Response(response.status_code, headers=response.headers, stream=stream)

    def close(self) -> None:
        """Cancel what runs, close the connection and end the thread."""
        try:
            with suppress(ClientClosedError):
                self._thread.run(self._transport.aclose)
        finally:
            self._thread.close()
            atexit.unregister(self.close)


class _SyncBody(httpx2.SyncByteStream):
    """A reply's body, its pieces fetched from the thread that has them."""

    def __init__(self, body: _Body, thread: LoopThread) -> None:
        self._body = body
        self._thread = thread

    def __iter__(self) -> Iterator[bytes]:
        pieces = aiter(self._body)

        async def following() -> bytes | None:
            return await anext(pieces, None)

        while (piece := self._thread.run(following)) is not None:
            yield piece

    def close(self) -> None:
        with suppress(ClientClosedError):
            self._thread.run(self._body.aclose)
