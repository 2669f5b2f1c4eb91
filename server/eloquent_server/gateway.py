"""The gateway: takes turns from the transport, has a backend answer them, fills their logs."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

from eloquent.core.events import Delta, End, Failure
from eloquent.errors import RequestError
from eloquent_server.admission import Principal
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
from eloquent_server.logs import about_turn
from eloquent_server.reading import ReadingClock
from eloquent_server.turns import Turn, TurnHandler

logger = logging.getLogger(__name__)


class Gateway:
    """Answers every turn with one backend."""

    def __init__(
        self,
        backend: Backend,
        *,
        tenant_of: Callable[[Principal], Tenant] = lambda who: Tenant(who.name, who.weight),
    ) -> None:
        """`tenant_of` says what share of the engine a principal gets, and with whom."""
        self._backend = backend
        self._tenant_of = tenant_of

    @property
    def go_on(self) -> TurnHandler | None:
        """What goes on with turns that another process began; None: the backend cannot."""
        return self.handle if isinstance(self._backend, ContinuingBackend) else None

    @property
    def _default_model(self) -> str:
        return next(iter(self._backend.models), "")

    async def handle(self, turn: Turn) -> None:
        """Answer one turn, or go on with it; a `TurnHandler`.

        Its cancellation cancels the generation.
        """
        with about_turn(turn.name):
            try:
                await self._answer(turn, self._events(turn))
            except RequestError as error:
                logger.info("turn %s declined: %s", turn.name, error.code)
                if turn.stored is None:
                    turn.reject(error)
                else:
                    turn.end_early("error", Failure("interrupted", error.message))

    def _events(self, turn: Turn) -> AsyncIterator[BackendEvent]:
        """Have the answer generated, or what is missing of it."""
        clock = ReadingClock()
        asker = Asker(self._tenant_of(turn.principal), lambda: clock.buffered_s(turn.readers))
        stored = turn.stored
        if stored is None:
            return self._backend.generate(turn.request.body, asker)
        assert isinstance(self._backend, ContinuingBackend), "see `go_on`"
        deltas = tuple(event for event in stored.events if not isinstance(event, End))
        answer = StoredAnswer(deltas, stored.continuations)
        return self._backend.resume(turn.request.body, answer, asker)

    async def _answer(self, turn: Turn, answer: AsyncIterator[BackendEvent]) -> None:
        """Fill the turn's log, up to its end."""
        continuation: bytes | None = None
        async with aclosing(cast(Any, answer)) as events:
            async for event in events:
                if isinstance(event, Continuation):
                    continuation = event.data
                    continue
                if isinstance(event, Finish):
                    turn.close(
                        event.reason,
                        model=event.model or self._default_model,
                        prompt_tokens=event.prompt_tokens,
                        completion_tokens=event.completion_tokens,
                        cached_tokens=event.cached_tokens,
                        usage=event.usage,
                    )
                    return
                turn.append(cast(Delta, event), continuation)
                continuation = None
                if isinstance(event, Failure):
                    logger.error("turn %s failed: %s", turn.name, event.code)
                    break
        turn.close("error", model=self._default_model, prompt_tokens=0, completion_tokens=0)
