"""The interface of a backend."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from eloquent.core.events import Delta, Logprobs, TextDelta

LOCAL_TENANT = "local"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose turns share computed prefixes, and a part of the engine."""

    name: str = LOCAL_TENANT
    "Authenticated by the server."
    weight: float = 1.0
    "Its part of the engine against others'; above 0."
    salt: str = ""
    "What keeps its prefixes apart in an engine behind the server; empty: nothing need be."


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asked for an answer, and how they get on with it."""

    tenant: Tenant = Tenant()
    buffered_s: Callable[[], float] = float
    "Returns for how long the readers have text; 0: they wait, or it is not known."


ANYBODY = Asker()


@dataclass(frozen=True, slots=True)
class Finish:
    """A backend's last word on a turn that went well."""

    reason: str
    """`"stop"` (the model ended its answer), `"length"` (a limit did), or what an engine behind the
    server says."""
    prompt_tokens: int
    "Tokens of the prompt, after the chat template."
    completion_tokens: int
    "Tokens generated."
    cached_tokens: int = 0
    "Prompt tokens that a prefix cache had, so that they were not computed."
    model: str = ""
    "Who answered; empty: the backend's default."
    usage: bytes = b""
    "See `End.usage`."


@dataclass(frozen=True, slots=True)
class Continuation:
    """What `ContinuingBackend.resume` needs beyond what came before; belongs to the next event."""

    data: bytes


BackendEvent = Delta | Continuation | Finish


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer that was cut off with its server, as far as it was stored."""

    events: tuple[Delta, ...]
    continuations: tuple[bytes, ...]
    "The data of every `Continuation` so far, in order."

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def logprobs(self) -> int:
        """For how many tokens there are logprobs."""
        return sum(len(event.tokens) for event in self.events if isinstance(event, Logprobs))


class Backend(Protocol):
    """Generates answers; one backend serves any number of turns at once."""

    @property
    def models(self) -> Sequence[str]:
        """The names under which it answers; the first is the default."""

    def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncIterator[BackendEvent]:
        """Answer one request: an OpenAI chat body, in JSON.

        The iterator yields text and ends with exactly one `Finish` or `Failure`. Closing it
        (`aclose`, or the task's cancellation) cancels the generation within one decode step.

        Raises:
            RequestError: the request cannot be served (no chat body, unknown model, prompt too
                long); raised before the first event.
        """

    async def close(self) -> None:
        """Stop all generation and free what the backend holds."""


@runtime_checkable
class ContinuingBackend(Backend, Protocol):
    """A backend that goes on with answers which another process began."""

    def resume(
        self, body: bytes, answer: StoredAnswer, asker: Asker = ANYBODY
    ) -> AsyncIterator[BackendEvent]:
        """Yield what is missing of an answer, as `generate` would have.

        Raises:
            RequestError: the answer cannot be gone on with; raised before the first event.
        """
