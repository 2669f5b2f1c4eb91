"""A turn as the server sees it: its events, and what it takes to ask the engine for it again."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from eloquent.core.events import Logprobs, TextDelta
from eloquent.errors import RequestError
from eloquent_server.backends.base import Tenant
from eloquent_server.engine import ipc
from eloquent_server.engine.recovery import Standing
from eloquent_server.engine.turn import EngineEvent, Tokens


@dataclass(slots=True, kw_only=True)
class AnswerSoFar:
    """How far an answer is; all that going on with it needs beside the request and the seed."""

    prompt: Sequence[int] | None = None
    "The prompt's token ids; None until they are known."
    cached_tokens: int | None = None
    "How many of them came from the prefix cache; None until that is known."
    generated: list[int] = field(default_factory=list)
    emitted_chars: int = 0
    emitted_logprobs: int = 0
    "For how many tokens logprobs are out."

    def take(self, event: EngineEvent) -> None:
        """Take note of an event that is out."""
        if isinstance(event, Tokens):
            self.generated += event.ids
            self.cached_tokens = event.cached_tokens
        elif isinstance(event, TextDelta):
            self.emitted_chars += len(event.text)
        elif isinstance(event, Logprobs):
            self.emitted_logprobs += len(event.tokens)


class EngineTurn:
    """One turn's events, to be iterated once; the last one is a `Finish` or `Failure`.

    Leaving the iteration early needs a `cancel`.
    """

    def __init__(
        self,
        number: int,
        request: bytes,
        seed: int,
        tenant: Tenant,
        so_far: AnswerSoFar,
        *,
        on_cancel: Callable[["EngineTurn"], None],
        on_hint: Callable[["EngineTurn", float], None],
    ) -> None:
        self.number = number
        self.so_far = so_far
        self.standing = Standing(tokens=len(so_far.generated))
        self._request = request
        self._seed = seed
        self._tenant = tenant
        self._on_cancel = on_cancel
        self._on_hint = on_hint
        self._events: asyncio.Queue[EngineEvent | RequestError] = asyncio.Queue()
        self._is_over = False

    @property
    def generated(self) -> Sequence[int]:
        """The answer's token ids, those of events that nobody took yet included."""
        return self.so_far.generated

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EngineEvent:
        """Wait for the next event.

        Raises:
            RequestError: the engine declines the turn; in place of the first event.
        """
        if self._is_over:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, RequestError):
            self._is_over = True
            raise event
        self._is_over = ipc.is_terminal(event)
        return event

    def cancel(self) -> None:
        """End the turn within one step; nothing happens if it has ended."""
        self._on_cancel(self)

    def hint(self, buffered_s: float) -> None:
        """Say that the reader has text for `buffered_s` more: who runs dry soon goes first."""
        self._on_hint(self, buffered_s)

    def message(self) -> ipc.Submit:
        """Return what asks the engine to generate this turn from where it is."""
        so_far = self.so_far
        return ipc.Submit(
            turn=self.number,
            request=self._request,
            seed=self._seed,
            tenant=self._tenant.name,
            weight=self._tenant.weight,
            prompt=so_far.prompt,
            cached_tokens=so_far.cached_tokens,
            generated=so_far.generated,
            emitted_chars=so_far.emitted_chars,
            emitted_logprobs=so_far.emitted_logprobs,
        )

    def put(self, event: EngineEvent | RequestError) -> None:
        """Take the engine's next word."""
        if not isinstance(event, RequestError):
            self.so_far.take(event)
        self._events.put_nowait(event)
