"""One OpenAI-compatible engine behind the server, over HTTP."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2
import msgspec

from eloquent.core.events import Delta
from eloquent.errors import ConfigurationError
from eloquent_server.backends.base import Finish
from eloquent_server.backends.upstream_chunks import AnswerDecoder
from eloquent_server.backends.upstream_errors import (
    ENGINE_FAILED,
    ENGINE_TIMED_OUT,
    EngineError,
    UpstreamError,
)

CONNECT_S = 5.0
FIRST_BYTE_S = 600.0
"Waiting for a place, and reading a long prompt, take their time."
IDLE_S = 60.0
PROBE_S = 5.0
USAGE_S = 5.0
"So long the usage may take once the answer is whole."
REUSE_S = 0.25
"So long the stream's end may take once its end mark is there; then the connection is used again."
KEEP_ALIVE_S = 4.0
"Less than the 5 s after which uvicorn and llama.cpp close a connection that rests."

FAILED_PROBES = 2
"So many in a row, and an engine gets no more turns: one may fail because it is busy."
MODELS_EVERY = 12
"Probes."
MAX_BODY_BYTES = 1 << 20
"Of an answer that is no stream: an error, a list of models."

NOT_A_STREAM = (
    "The engine behind this server answered with {} where a stream was due, so there is no answer. "
    "Tell whoever runs the server."
)

Headers = list[tuple[str, str]]

_STREAM = [("Content-Type", "application/json"), ("Accept", "text/event-stream")]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an engine may be silent, in seconds."""

    first_byte_s: float = FIRST_BYTE_S
    "Before the first byte, and from byte to byte until the answer's first word."
    idle_s: float = IDLE_S
    "Between bytes from then on. Comments count, by which engines show that they live."

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ConfigurationError: one is not positive.
        """
        if not (self.first_byte_s > 0 and self.idle_s > 0):
            raise ConfigurationError(
                f"--upstream-timeout {self.idle_s:g} leaves an engine no time: it is in seconds, "
                "more than 0."
            )


def open_client(key: str = "") -> httpx2.AsyncClient:
    """Return the client that all engines share; `key` goes to each as a bearer key.

    Raises:
        ConfigurationError: the key cannot stand in a header, or the proxy that the environment
            names cannot be used.
    """
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(
            "The key in the variable that --upstream-key-env names has a character that is none of "
            "a key's, perhaps a line's end in its midst: set it anew."
        )
    headers = {"Accept-Encoding": "identity"}  # A compressor may hold tokens back.
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        return httpx2.AsyncClient(
            headers=headers,
            # One that a load balancer sets would send everybody to the same engine.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            # Silence is timed here, byte by byte; the server's own limits bound the connections.
            timeout=httpx2.Timeout(None, connect=CONNECT_S),
            limits=httpx2.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_S
            ),
        )
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise ConfigurationError(
            f"The proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names cannot be used ({error}). "
            "Name another or none; NO_PROXY='*' has all engines asked directly."
        ) from error


class Upstream:
    """An engine, whether it is well, and how many answers it is giving to this server."""

    def __init__(self, url: str, client: httpx2.AsyncClient, patience: Patience) -> None:
        """`url` is as OpenAI's clients take it; without a path, `/v1` is meant.

        Raises:
            ConfigurationError: it is no such URL.
        """
        self._base = _base_of(url)
        self.name = str(self._base)
        "For logs."
        self._client = client
        self._patience = patience
        self._probes = 0
        self._failed_probes = FAILED_PROBES - 1  # The first is believed.
        self.is_up = True
        "Until it is found to be otherwise."
        self.models: tuple[str, ...] | None = None
        "None: it does not say, and may have any."
        self.in_flight = 0

    def has(self, model: str) -> bool:
        """Say whether it may have a model; an empty name is whichever it has."""
        return not model or self.models is None or model in self.models

    async def probe(self) -> None:
        """See how it is, and now and then what models it has; never raises for the engine."""
        why = "it says that it is not well"
        try:
            async with asyncio.timeout(PROBE_S):
                is_well = await self._is_well()
                if is_well and (not self.is_up or self._probes % MODELS_EVERY == 0):
                    self.models = await self._list_models()
        except (httpx2.RequestError, TimeoutError) as error:
            is_well, why = False, f"it does not answer ({error!r})"
        self._probes += 1
        self._failed_probes = 0 if is_well else self._failed_probes + 1
        if is_well:
            self._is_now(True, "it answers")
        elif self._failed_probes >= FAILED_PROBES:
            self._is_now(False, why)

    async def answer(self, body: bytes, model: str) -> AsyncGenerator[Delta | Finish]:
        """Have it answer a chat body that asks for a stream; `model` is for the `Finish`.

        Closing the generator closes the connection, upon which engines stop generating.

        Raises:
            UpstreamError: it does not answer, or not to the end.
        """
        try:
            async with self.asked("POST", b"/chat/completions", _STREAM, body) as response:
                await self._check(response)
                async with aclosing(self._read(response, model)) as events:
                    async for event in events:
                        yield event
        except UpstreamError as error:
            self.log(error)
            raise

    def log(self, error: UpstreamError) -> None:
        """Tell the operator of an error that is not the client's."""
        if error.code.startswith("upstream"):
            why = error.detail or error.message
            logger.warning("engine %s: %s (%s)", self.name, error.code, why)

    @asynccontextmanager
    async def asked(
        self, method: str, target: bytes, headers: Headers, body: bytes
    ) -> AsyncIterator[httpx2.Response]:
        """Send a request, and have its response, of which the head is there.

        `target` is a path below the engine's URL, perhaps with a query, as it goes on the wire.

        Raises:
            httpx2.InvalidURL: it cannot go there.
            UpstreamError: it cannot be reached, or does not answer.
        """
        url = self._base.copy_with(raw_path=self._base.raw_path + target)
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        request = self._client.build_request(method, url, content=body, headers=raw)
        self.in_flight += 1
        try:
            response = await self._send(request)
            try:
                yield response
            finally:
                await response.aclose()
        finally:
            self.in_flight -= 1

    async def paced(
        self, pieces: AsyncGenerator[bytes], wait_s: Callable[[], float] | None = None
    ) -> AsyncGenerator[bytes]:
        """Yield the pieces of a response, and close them.

        `wait_s` tells for how long the next may take; the first has its own time.

        Raises:
            UpstreamError: one does not come.
        """
        waited_s = self._patience.first_byte_s
        async with aclosing(pieces):
            while True:
                try:
                    async with asyncio.timeout(waited_s):
                        piece = await anext(pieces, None)
                except TimeoutError as error:
                    raise _too_slow(waited_s) from error
                except httpx2.RequestError as error:
                    raise _broken(error) from error
                if piece is None:
                    return
                yield piece
                waited_s = self._patience.idle_s if wait_s is None else wait_s()

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request, anew if a connection from before breaks, and return the head."""
        is_new = False

        async def trace(name: str, info: object) -> None:
            nonlocal is_new
            is_new = is_new or name == "connection.connect_tcp.started"

        request.extensions["trace"] = trace
        while True:
            try:
                async with asyncio.timeout(self._patience.first_byte_s):
                    return await self._client.send(request, stream=True)
            except TimeoutError as error:
                raise _too_slow(self._patience.first_byte_s) from error
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                self._is_now(False, "it cannot be reached")
                message = ENGINE_FAILED.format("it cannot be reached")
                raise UpstreamError("upstream_error", message, detail=repr(error)) from error
            except httpx2.RequestError as error:
                # llama.cpp says that it keeps a connection, and closes it after each stream.
                if is_new:
                    raise _broken(error) from error

    async def _check(self, response: httpx2.Response) -> None:
        """Raise the engine's error unless the response is a stream."""
        status, kind = response.status_code, response.headers.get("content-type", "")
        if status == 200 and kind.lower().startswith("text/event-stream"):
            return
        said = await self._read_some(response)
        if status != 200 or EngineError.is_in(said):
            retry_after = response.headers.get("retry-after", "")
            raise EngineError.read(status, said, retry_after).as_upstream_error()
        detail = f"content type {kind!r}"
        raise UpstreamError("upstream_error", NOT_A_STREAM.format(kind or "?"), detail=detail)

    async def _read_some(self, response: httpx2.Response) -> bytes:
        """Return a response's body, or nothing of one that is too large."""
        said = bytearray()
        async with aclosing(self.paced(response.aiter_bytes())) as pieces:
            async for piece in pieces:
                said += piece
                if len(said) > MAX_BODY_BYTES:
                    return b""
        return bytes(said)

    async def _read(self, response: httpx2.Response, model: str) -> AsyncGenerator[Delta | Finish]:
        answer = AnswerDecoder(model)

        def wait_s() -> float:
            if answer.has_ended:
                return REUSE_S if answer.is_done else USAGE_S
            patience = self._patience
            return patience.idle_s if answer.has_begun else patience.first_byte_s

        try:
            async with aclosing(self.paced(response.aiter_bytes(), wait_s)) as pieces:
                async for piece in pieces:
                    for event in answer.feed(piece):
                        yield event
                    if answer.error is not None or (answer.is_done and not answer.has_ended):
                        break
        except UpstreamError:
            if not answer.has_ended:
                raise
        yield answer.finish()

    async def _is_well(self) -> bool:
        """Ask `/health`, and where there is none, whether it answers at all."""
        response = await self._client.get(self._base.copy_with(raw_path=b"/health"))
        if response.is_success:
            return True
        if response.status_code >= 500:
            return False
        # Without the list, which may be long: this is asked often.
        status = (await self._client.head(self._url("models"))).status_code
        return status < 500 or status == HTTPStatus.NOT_IMPLEMENTED

    async def _list_models(self) -> tuple[str, ...] | None:
        response = await self._client.get(self._url("models"))
        try:
            listed = msgspec.json.decode(response.content, type=_Models)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            logger.info("engine %s does not list its models: %d", self.name, response.status_code)
            return self.models
        return tuple(model.id for model in listed.data)

    def _is_now(self, is_up: bool, why: str) -> None:
        if is_up != self.is_up:
            self.is_up = is_up
            logger.warning("engine %s is %s: %s", self.name, "up" if is_up else "down", why)

    def _url(self, path: str) -> httpx2.URL:
        return self._base.copy_with(path=f"{self._base.path}/{path}")


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _base_of(url: str) -> httpx2.URL:
    try:
        base = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigurationError(f"--upstream {url!r} is no URL ({error}).") from error
    if base.userinfo:
        raise ConfigurationError(
            "--upstream has a password in its URL, where others on this machine see it. Put the "
            "engine's key into an environment variable, and name that with --upstream-key-env."
        )
    if base.scheme not in ("http", "https") or not base.host or base.query or base.fragment:
        raise ConfigurationError(
            f"--upstream {url!r} is no address of an engine: it has the form http://HOST:PORT or "
            "https://HOST/v1, as OpenAI's clients take it for `base_url`."
        )
    return base.copy_with(path=base.path.rstrip("/") or "/v1")


def _too_slow(after_s: float) -> UpstreamError:
    message = ENGINE_TIMED_OUT.format(f"{after_s:g} s without a word")
    # Elsewhere it would be begun again, after a wait that is long already.
    return UpstreamError("upstream_timeout", message, detail=message, may_go_elsewhere=False)


def _broken(error: Exception) -> UpstreamError:
    message = ENGINE_FAILED.format("its connection broke")
    return UpstreamError("upstream_error", message, detail=repr(error))
