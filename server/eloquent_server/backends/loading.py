"""A backend that is still being started: the server answers meanwhile, and requests wait for it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, cast

from eloquent.errors import RequestError
from eloquent_server.backends.base import (
    ANYBODY,
    Asker,
    Backend,
    BackendEvent,
    ContinuingBackend,
    StoredAnswer,
)

CANNOT_GO_ON = (
    "The server was restarted in mid-answer with an engine that cannot go on with another's "
    "answers; what there is of it is here. Ask again."
)


class LoadingBackend:
    """Passes everything on to a backend, once it is there; a `ContinuingBackend`."""

    def __init__(self, starting: Awaitable[Backend]) -> None:
        """`starting` gives the backend, and is cancelled by `close` if it has not yet."""
        self._starting = asyncio.ensure_future(starting)

    async def ready(self) -> None:
        """Wait until the backend is there.

        Raises:
            EloquentError: it cannot be started.
        """
        await asyncio.shield(self._starting)

    @property
    def backend(self) -> Backend | None:
        """The backend, once it is there."""
        is_there = self._starting.done() and not self._starting.cancelled()
        return self._starting.result() if is_there and not self._starting.exception() else None

    @property
    def models(self) -> Sequence[str]:
        """The names under which it answers; none are known before it is ready."""
        return () if self.backend is None else self.backend.models

    def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncGenerator[BackendEvent]:
        """See `Backend.generate`."""
        return self._pass_on(body, None, asker)

    def resume(
        self, body: bytes, answer: StoredAnswer, asker: Asker = ANYBODY
    ) -> AsyncGenerator[BackendEvent]:
        """See `ContinuingBackend.resume`."""
        return self._pass_on(body, answer, asker)

    async def close(self) -> None:
        """Close the backend, or start it no further."""
        if not self._starting.done():
            self._starting.cancel()
            await asyncio.wait((self._starting,))
        elif self._starting.exception() is None:
            await self._starting.result().close()

    async def _pass_on(
        self, body: bytes, answer: StoredAnswer | None, asker: Asker
    ) -> AsyncGenerator[BackendEvent]:
        await asyncio.wait((self._starting,))
        if self._starting.cancelled() or self._starting.exception() is not None:
            # Then the server ends, and tells all readers; a stored turn waits for its next start.
            await asyncio.Event().wait()
        backend = self._starting.result()
        events: AsyncIterator[BackendEvent]
        if answer is None:
            events = backend.generate(body, asker)
        elif isinstance(backend, ContinuingBackend):
            events = backend.resume(body, answer, asker)
        else:
            raise RequestError("interrupted", CANNOT_GO_ON)
        async with aclosing(cast(Any, events)) as passing:
            async for event in passing:
                yield event
