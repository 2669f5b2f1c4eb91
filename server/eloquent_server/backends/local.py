"""The backend that runs a model in this process."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from eloquent.core.events import Failure
from eloquent.errors import RequestError
from eloquent_server import models
from eloquent_server.backends.base import BackendEvent, Finish
from eloquent_server.chat import ChatRequest

if TYPE_CHECKING:  # The engine imports torch, which may not be installed: see `load`.
    from eloquent_server.engine.loader import LoadedModel


def _entropy() -> int:
    return secrets.randbits(63)


class LocalBackend:
    """Answers with one model of the local engine; implements `Backend`."""

    def __init__(
        self,
        loaded: "LoadedModel",
        *,
        max_running: int | None = None,
        entropy: Callable[[], int] = _entropy,
    ) -> None:
        """Start the engine; `entropy` seeds turns that bring no seed of their own."""
        from eloquent_server.engine.engine import MAX_RUNNING, Engine
        from eloquent_server.engine.prompt import PromptEncoder

        self._name = loaded.name
        self._entropy = entropy
        self._temperature = loaded.temperature
        self._top_p = loaded.top_p
        self._prompts = PromptEncoder(loaded.tokenizer)
        self._engine = Engine(
            loaded, max_running=MAX_RUNNING if max_running is None else max_running
        )

    @classmethod
    def load(
        cls, model: str, *, device: str = "auto", progress: models.Progress | None = None
    ) -> "LocalBackend":
        """Resolve a model by name or directory, fetch it if needed, and load it. Blocks.

        Raises:
            ConfigurationError: packages are missing, there is no such model or device, the model
                cannot be fetched, or the engine does not support it.
        """
        source = models.resolve(model, progress=progress)
        if progress:
            progress(f"Loading {source.name}", None)
        from eloquent_server.engine.loader import load

        return cls(load(source.path, source.name, device=device))

    @property
    def models(self) -> Sequence[str]:
        """The one model's name."""
        return (self._name,)

    async def generate(self, request: ChatRequest) -> AsyncGenerator[BackendEvent]:
        """Answer one request; see `Backend.generate`.

        Raises:
            RequestError: `unknown_model`, `prompt_too_long`, `invalid_request` or `unavailable`;
                before the first event.
        """
        if request.model not in (None, self._name):
            raise RequestError(
                "unknown_model",
                f"This server has no model {request.model!r}, only {self._name!r}. Ask for that, "
                "or leave `model` out.",
            )
        # A long conversation takes tens of milliseconds to encode; the event loop must not wait.
        prompt = await asyncio.to_thread(self._prompts.encode, request.messages)
        from eloquent_server.engine.options import sampling_fields
        from eloquent_server.engine.turn import EngineEvent, Tokens, TurnRequest

        loop = asyncio.get_running_loop()
        events: asyncio.Queue[EngineEvent] = asyncio.Queue()

        def emit(event: EngineEvent) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        turn = self._engine.submit(
            TurnRequest(
                prompt=prompt,
                max_tokens=request.token_limit,
                **sampling_fields(
                    request,
                    temperature=self._temperature,
                    top_p=self._top_p,
                    seed=self._entropy(),
                ),
            ),
            emit,
        )
        try:
            while True:
                event = await events.get()
                if isinstance(event, Tokens):
                    continue
                yield event
                if isinstance(event, Failure | Finish):
                    return
        finally:
            self._engine.cancel(turn)

    async def close(self) -> None:
        """Fail the turns that are running and stop the engine; takes one step."""
        await asyncio.to_thread(self._engine.close)
