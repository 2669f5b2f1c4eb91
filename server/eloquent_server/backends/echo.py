"""A backend without a model: it says the user's words back, at a steady rate."""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from eloquent.core.events import Failure, TextDelta
from eloquent.errors import RequestError
from eloquent_server.backends.base import ANYBODY, Asker, BackendEvent, Finish, StoredAnswer
from eloquent_server.chat import parse_chat_body

NAME = "echo"
DEFAULT_TOKENS_PER_SECOND = 50.0

_WORDS = re.compile(r"\s*\S+|\s+$")
"The matches joined are the text."


class EchoBackend:
    """Streams the last user message back, word by word; a token is a word.

    Implements `ContinuingBackend`.
    """

    def __init__(
        self,
        tokens_per_second: float = DEFAULT_TOKENS_PER_SECOND,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`sleep` takes seconds; a word comes after each.

        Raises:
            ValueError: `tokens_per_second` is not positive.
        """
        if tokens_per_second <= 0:
            raise ValueError(
                f"the rate must be positive, not {tokens_per_second} tokens per second"
            )
        self._gap_seconds = 1 / tokens_per_second
        self._sleep = sleep
        self._closed = False

    @property
    def models(self) -> Sequence[str]:
        """The one name, `echo`."""
        return (NAME,)

    def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncGenerator[BackendEvent]:
        """Answer one request; see `Backend.generate`.

        Raises:
            RequestError: `unknown_model`, or `invalid_request` if it is no chat body, or has no
                user message.
        """
        return self.resume(body, StoredAnswer((), ()))

    async def resume(
        self, body: bytes, answer: StoredAnswer, asker: Asker = ANYBODY
    ) -> AsyncGenerator[BackendEvent]:
        """Say the rest of the words; see `ContinuingBackend.resume`.

        Raises:
            RequestError: as `generate`.
        """
        request = parse_chat_body(body)
        if request.model not in (None, NAME):
            raise RequestError(
                "unknown_model",
                f"This server has no model {request.model!r}, only {NAME!r}. Ask for that, or "
                "leave `model` out.",
            )
        said = [message.text for message in request.messages if message.role == "user"]
        if not said:
            raise RequestError("invalid_request", "There is no user message to say back; send one.")
        words = _WORDS.findall(said[-1])
        spoken = words[: request.token_limit]
        left = len(answer.text)
        for word in spoken:
            if left > 0:
                left -= len(word)
                continue
            await self._sleep(self._gap_seconds)
            if self._closed:
                yield Failure("unavailable", "The server is shutting down. Try again in a while.")
                return
            yield TextDelta(word)
        prompt_tokens = sum(len(_WORDS.findall(message.text)) for message in request.messages)
        reason = "stop" if len(spoken) == len(words) else "length"
        yield Finish(reason, prompt_tokens, len(spoken))

    async def close(self) -> None:
        """End running answers at their next word."""
        self._closed = True
