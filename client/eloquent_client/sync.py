"""The client for programs without an event loop: each method calls the asynchronous one's.

A `SyncClient` has one thread with an event loop, and its `Client` lives there. It may be used from
several threads; callbacks given to it run on its own.
"""

import asyncio
import atexit
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

from eloquent.core.events import Event
from eloquent.session.states import LinkState
from eloquent.url import ServerUrl
from eloquent_client.client import Client
from eloquent_client.errors import ClientClosedError
from eloquent_client.messages import LinkSnapshot, Message, StreamStats, Usage
from eloquent_client.stream import MessageStream

T = TypeVar("T")


class LoopThread:
    """A thread with an event loop, on which others have work done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._is_closed = False
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._main, args=(ready,), name="eloquent-client", daemon=True
        )
        self._thread.start()
        ready.wait()

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Have a coroutine run there and return its result; what interrupts the wait cancels it.

        Raises:
            ClientClosedError: the thread is closed, or was left behind by a fork.
            RuntimeError: this is that thread.
        """
        self._check()
        future: concurrent.futures.Future[T] | None = None
        try:
            with self._lock:
                if self._is_closed or self._loop is None or not self._thread.is_alive():
                    raise ClientClosedError
                future = asyncio.run_coroutine_threadsafe(work(), self._loop)
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise ClientClosedError from error
        except BaseException:
            if future is not None:
                future.cancel()
            raise

    def call(self, function: Callable[[], T]) -> T:
        """Have a function called there, or here if the thread is closed, and return its result.

        Raises:
            RuntimeError: this is that thread.
        """

        async def called() -> T:
            return function()

        with suppress(ClientClosedError):
            return self.run(called)
        self.close()
        return function()

    def close(self) -> None:
        """End the thread; whatever still runs there is cancelled first.

        Raises:
            RuntimeError: this is that thread.
        """
        self._check()
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
            if is_first and self._loop is not None and self._stop is not None:
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _check(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "A callback of a SyncClient cannot use it: hand what it learns to another thread."
            )

    def _main(self, ready: threading.Event) -> None:
        async def until_stopped() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._stop.wait()

        asyncio.run(until_stopped())


class ClientOptions(TypedDict, total=False):
    """The options of `Client`, which says what they are."""

    key: str
    timeout_s: float
    connect_timeout_s: float
    idle_timeout_s: float | None
    max_retries: int
    on_link_state: Callable[[LinkState], None]
    qlog_dir: Path | None
    ticket: bytes | None
    rng: Random | None


class SyncClient:
    """A server to chat with; see `Client`, whose options it takes.

    Use it as a context manager, or close it: its thread ends then::

        with SyncClient("eloquent://localhost:4433#sha256=...") as client:
            with client.stream(messages=[{"role": "user", "content": "Hello"}]) as stream:
                for text in stream.text_stream:
                    print(text, end="")
    """

    def __init__(self, url: str | ServerUrl, **options: Unpack[ClientOptions]) -> None:
        """The options are those of `Client`.

        Raises:
            ConfigurationError: as `Client`.
        """
        self._client = Client(url, **options)
        self._thread = LoopThread()
        atexit.register(self.close)  # later its thread is frozen, and what waits for it hangs

    @property
    def url(self) -> ServerUrl:
        """See `Client.url`."""
        return self._client.url

    @property
    def link(self) -> LinkSnapshot:
        """See `Client.link`."""
        return self._thread.call(lambda: self._client.link)

    def link_changes(self) -> Iterator[LinkSnapshot]:
        """See `Client.link_changes`; for a thread of its own."""
        state = None
        with suppress(ClientClosedError):
            for link in _iterated(self._thread, self._client.link_changes):
                state = link.state
                yield link
        if state is not LinkState.CLOSED:  # another thread was faster to close it
            yield self.link

    def stream(
        self, messages: Iterable[Mapping[str, Any]], model: str | None = None, **parameters: Any
    ) -> "SyncMessageStream":
        """See `Client.stream`."""
        return SyncMessageStream(self._thread, self._client.stream(messages, model, **parameters))

    def resume(
        self, token: str, *, offset: int | None = None, is_owner: bool = True
    ) -> "SyncMessageStream":
        """See `Client.resume`."""
        stream = self._client.resume(token, offset=offset, is_owner=is_owner)
        return SyncMessageStream(self._thread, stream)

    def connect(self) -> None:
        """See `Client.connect`."""
        self._thread.run(self._client.connect)

    def take_ticket(self) -> bytes | None:
        """See `Client.take_ticket`."""
        return self._thread.call(self._client.take_ticket)

    def close(self) -> None:
        """See `Client.close`; the thread ends, and nothing else can be asked."""
        try:
            with suppress(ClientClosedError):
                self._thread.run(self._client.close)
        finally:
            self._thread.close()
            atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class SyncMessageStream:
    """A turn, from `SyncClient.stream`; see `MessageStream`."""

    def __init__(self, thread: LoopThread, stream: MessageStream) -> None:
        self._thread = thread
        self._stream = stream

    @property
    def turn_id(self) -> str:
        """See `MessageStream.turn_id`."""
        return self._stream.turn_id

    @property
    def token(self) -> str:
        """See `MessageStream.token`."""
        return self._thread.call(lambda: self._stream.token)

    @property
    def text(self) -> str:
        """See `MessageStream.text`."""
        return self._thread.call(lambda: self._stream.text)

    @property
    def usage(self) -> Usage | None:
        """See `MessageStream.usage`."""
        return self._thread.call(lambda: self._stream.usage)

    @property
    def is_over(self) -> bool:
        """See `MessageStream.is_over`."""
        return self._thread.call(lambda: self._stream.is_over)

    @property
    def stats(self) -> StreamStats:
        """See `MessageStream.stats`."""
        return self._thread.call(lambda: self._stream.stats)

    @property
    def text_stream(self) -> Iterator[str]:
        """See `MessageStream.text_stream`."""
        return _iterated(self._thread, lambda: self._stream.text_stream)

    def get_final_message(self) -> Message:
        """See `MessageStream.get_final_message`."""
        return self._thread.run(self._stream.get_final_message)

    def detach(self) -> None:
        """See `MessageStream.detach`."""
        self._thread.call(self._stream.detach)

    def close(self) -> None:
        """See `MessageStream.close`."""
        with suppress(ClientClosedError):
            self._thread.run(self._stream.close)

    def __iter__(self) -> Iterator[Event]:
        return _iterated(self._thread, lambda: aiter(self._stream))

    def __enter__(self) -> Self:
        try:
            self._thread.run(self._stream.__aenter__)
        except (KeyboardInterrupt, SystemExit):
            self.close()  # it may have been entered just before
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(ClientClosedError):
            self._thread.run(lambda: self._stream.__aexit__(kind, error, traceback))


_OVER = object()


def _iterated(thread: LoopThread, start: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
    source = thread.call(start)

    async def following() -> Any:
        return await anext(source, _OVER)

    while (item := thread.run(following)) is not _OVER:
        yield item
