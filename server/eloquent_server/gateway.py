"""The gateway: takes turns from the transport, has a backend answer them, fills their logs."""

import logging
import time
from contextlib import aclosing
from typing import Any, cast

from eloquent.core.events import Delta, Failure
from eloquent.errors import RequestError
from eloquent_server.backends.base import Backend, Finish
from eloquent_server.chat import ChatRequest, parse_chat_body
from eloquent_server.turns import Turn

logger = logging.getLogger(__name__)


class Gateway:
    """Answers every turn with one backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def handle(self, turn: Turn) -> None:
        """Answer one turn; a `TurnHandler`. Its cancellation cancels the generation."""
        started_s = time.monotonic()
        name = turn.name
        try:
            request = parse_chat_body(turn.request.body)
            reason, tokens = await self._answer(turn, request)
        except RequestError as error:
            logger.info("turn %s declined: %s", name, error.code)
            turn.reject(error.code, error.message)
            return
        except BaseException:
            logger.info("turn %s given up", name)
            raise
        seconds = time.monotonic() - started_s
        logger.info("turn %s ended: %s, %d tokens, %.2f s", name, reason, tokens, seconds)

    async def _answer(self, turn: Turn, request: ChatRequest) -> tuple[str, int]:
        """Fill the turn's log; return its finish reason and how many tokens it has."""
        model = request.model or self._backend.models[0]
        events = cast(Any, self._backend.generate(request))
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Finish):
                    turn.close(
                        event.reason,
                        model=model,
                        prompt_tokens=event.prompt_tokens,
                        completion_tokens=event.completion_tokens,
                    )
                    return event.reason, event.completion_tokens
                turn.append(cast(Delta, event))
                if isinstance(event, Failure):
                    logger.error("turn %s failed: %s", turn.name, event.message)
                    break
        turn.close("error", model=model, prompt_tokens=0, completion_tokens=0)
        return "error", 0
