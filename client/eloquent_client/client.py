"""The client: one server, one connection at a time, any number of turns on it."""

import asyncio
import json
import secrets
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from eloquent.core.wire import TURN_ID_BYTES, Request
from eloquent.errors import EloquentError
from eloquent.quic.connect import CONNECT_TIMEOUT_S, ClientLink, connect
from eloquent.url import ServerUrl, parse_url
from eloquent_client.errors import APITimeoutError, BadRequestError, api_error
from eloquent_client.stream import MessageStream

ANSWER_TIMEOUT_S = 600.0
"How long a turn may take in all, connecting included."


class Client:
    """A server to chat with.

    It connects when the first turn is asked, and again when the connection has ended since.
    Turns may run at the same time. To be used on one event loop::

        async with Client("eloquent://localhost:4433#sha256=...") as client:
            async with client.stream(messages=[{"role": "user", "content": "Hello"}]) as stream:
                async for text in stream.text_stream:
                    print(text, end="")
    """

    def __init__(
        self,
        url: str | ServerUrl,
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """`timeout_s` bounds a turn in all, `connect_timeout_s` the handshake; both in seconds.

        Raises:
            ConfigurationError: `url` is no server URL.
        """
        self._url = parse_url(url) if isinstance(url, str) else url
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._link: ClientLink | None = None
        self._failure: EloquentError | None = None
        self._connecting = asyncio.Lock()

    @property
    def url(self) -> ServerUrl:
        """The server."""
        return self._url

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._link is not None and self._link.is_open

    @property
    def rtt_ms(self) -> float | None:
        """The connection's smoothed round-trip time in milliseconds; None: not connected."""
        return self._link.path.srtt_s * 1e3 if self._link and self._link.is_open else None

    def stream(
        self,
        messages: Iterable[Mapping[str, Any]],
        model: str | None = None,
        **parameters: Any,
    ) -> MessageStream:
        """Return a turn, which is asked when it is entered with `async with`.

        `messages` are OpenAI's: `{"role": "user", "content": "..."}`. `model` None is the server's
        default. `parameters` are the other fields of OpenAI's chat body that the server takes
        (`temperature`, `max_tokens`, `seed`, ...); a field that is None is left out.

        Raises:
            BadRequestError: the request cannot be written as JSON.
        """
        body = {"messages": list(messages), "model": model, **parameters}
        return MessageStream(self._open_link, _make_request(body), timeout_s=self._timeout_s)

    async def connect(self) -> None:
        """Connect unless connected already; turns do it on their own.

        Raises:
            APIConnectionError: no server answers, or it is not the one that the URL's pin names.
            APITimeoutError: that took longer than `connect_timeout_s`.
            EloquentError: what `fail` was given.
        """
        await self._open_link()

    def fail(self, error: EloquentError) -> None:
        """Let all turns fail with `error`, those that run and those asked later.

        For whoever knows that the server is gone for good.
        """
        self._failure = error
        if self._link is not None:
            self._link.fail(error)

    async def close(self) -> None:
        """Close the connection; turns that still run fail."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _open_link(self) -> ClientLink:
        async with self._connecting:
            if self._failure is not None:
                raise self._failure
            if self._link is None or not self._link.is_open:
                await self.close()
                self._link = await self._connect()
            return self._link

    async def _connect(self) -> ClientLink:
        try:
            # Looking up the name counts too, which the link's own deadline leaves out.
            async with asyncio.timeout(self._connect_timeout_s):
                return await connect(self._url, timeout_s=self._connect_timeout_s)
        except TimeoutError as error:
            raise APITimeoutError(
                f"No answer from {self._url.host}, UDP port {self._url.port}, within "
                f"{self._connect_timeout_s:g} s: no server runs there, or a firewall blocks UDP. "
                "Check the URL and the network."
            ) from error
        except EloquentError as error:
            raise api_error(error) from error


def _make_request(body: Mapping[str, Any]) -> Request:
    fields = {name: value for name, value in body.items() if value is not None}
    try:
        encoded = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadRequestError(
            "invalid_request",
            f"The request cannot be written as JSON ({error}): give strings without lone "
            "surrogates, finite numbers, lists and dictionaries.",
        ) from error
    return Request(secrets.token_bytes(TURN_ID_BYTES), encoded)
