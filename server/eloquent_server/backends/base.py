"""The interface of a backend."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from eloquent.core.events import Delta
from eloquent_server.chat import ChatRequest


@dataclass(frozen=True, slots=True)
class Finish:
    """A backend's last word on a turn that went well."""

    reason: str
    '`"stop"` (the model ended its answer) or `"length"` (a limit did).'
    prompt_tokens: int
    "Tokens of the prompt, after the chat template."
    completion_tokens: int
    "Tokens generated."
    cached_tokens: int = 0
    "Prompt tokens that a prefix cache had, so that they were not computed."


BackendEvent = Delta | Finish


class Backend(Protocol):
    """Generates answers; one backend serves any number of turns at once."""

    @property
    def models(self) -> Sequence[str]:
        """The names under which it answers; the first is the default."""

    def generate(self, request: ChatRequest) -> AsyncIterator[BackendEvent]:
        """Answer one request.

        The iterator yields text and ends with exactly one `Finish` or `Failure`. Closing it
        (`aclose`, or the task's cancellation) cancels the generation within one decode step.

        Raises:
            RequestError: the request cannot be served (unknown model, prompt too long); raised
                before the first event.
        """

    async def close(self) -> None:
        """Stop all generation and free what the backend holds."""
