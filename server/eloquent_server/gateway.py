"""The gateway: takes turns from the transport, has a backend answer them, fills their logs."""

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

from eloquent.core.events import Delta, Failure, Logprobs, TextDelta
from eloquent.errors import RequestError
from eloquent_server.backends.base import (
    Asker,
    Backend,
    BackendEvent,
    Continuation,
    ContinuingBackend,
    Finish,
    StoredAnswer,
    Tenant,
)
from eloquent_server.chat import ChatRequest, parse_chat_body
from eloquent_server.reading import ReadingClock
from eloquent_server.turns import PRINCIPAL, Turn, TurnHandler

logger = logging.getLogger(__name__)


class Gateway:
    """Answers every turn with one backend."""

    def __init__(
        self,
        backend: Backend,
        *,
        tenant_of: Callable[[Turn], Tenant] = lambda turn: Tenant(PRINCIPAL),
    ) -> None:
        """`tenant_of` says whose a turn is, and what part of the engine that tenant gets."""
        self._backend = backend
        self._tenant_of = tenant_of

    @property
    def go_on(self) -> TurnHandler | None:
        """What goes on with turns that another process began; None: the backend cannot."""
        return self.handle if isinstance(self._backend, ContinuingBackend) else None

    async def handle(self, turn: Turn) -> None:
        """Answer one turn, or go on with it; a `TurnHandler`.

        Its cancellation cancels the generation.
        """
        started_s = time.monotonic()
        name = turn.name
        try:
            request = parse_chat_body(turn.request.body)
            events = self._events(turn, request)
            reason, tokens = await self._answer(turn, request, events)
        except RequestError as error:
            logger.info("turn %s declined: %s", name, error.code)
            if turn.stored is None:
                turn.reject(error.code, error.message)
            else:
                turn.end_early("error", Failure("interrupted", error.message))
            return
        except BaseException:
            logger.info("turn %s given up", name)
            raise
        seconds = time.monotonic() - started_s
        logger.info("turn %s ended: %s, %d tokens, %.2f s", name, reason, tokens, seconds)

    def _events(self, turn: Turn, request: ChatRequest) -> AsyncIterator[BackendEvent]:
        """Have the answer generated, or what is missing of it."""
        clock = ReadingClock()
        asker = Asker(self._tenant_of(turn), lambda: clock.buffered_s(turn.readers))
        stored = turn.stored
        if stored is None:
            return self._backend.generate(request, asker)
        assert isinstance(self._backend, ContinuingBackend), "see `go_on`"
        text = "".join(event.text for event in stored.events if isinstance(event, TextDelta))
        logprobs = sum(len(each.tokens) for each in stored.events if isinstance(each, Logprobs))
        answer = StoredAnswer(text, stored.continuations, logprobs)
        return self._backend.resume(request, answer, asker)

    async def _answer(
        self, turn: Turn, request: ChatRequest, answer: AsyncIterator[BackendEvent]
    ) -> tuple[str, int]:
        """Fill the turn's log; return its finish reason and how many tokens it has."""
        continuation: bytes | None = None
        async with aclosing(cast(Any, answer)) as events:
            async for event in events:
                if isinstance(event, Continuation):
                    continuation = event.data
                    continue
                if isinstance(event, Finish):
                    turn.close(
                        event.reason,
                        model=request.model or self._backend.models[0],
                        prompt_tokens=event.prompt_tokens,
                        completion_tokens=event.completion_tokens,
                        cached_tokens=event.cached_tokens,
                    )
                    return event.reason, event.completion_tokens
                turn.append(cast(Delta, event), continuation)
                continuation = None
                if isinstance(event, Failure):
                    logger.error("turn %s failed: %s", turn.name, event.message)
                    break
        turn.close(
            "error",
            model=request.model or self._backend.models[0],
            prompt_tokens=0,
            completion_tokens=0,
        )
        return "error", 0
