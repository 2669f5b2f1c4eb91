"""One turn in the engine: what was asked, how far it is, and its way out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eloquent.core.events import Failure, TextDelta
from eloquent_server.backends.base import Finish
from eloquent_server.engine.sampling import Sampler
from eloquent_server.engine.text import TextStream

EngineEvent = TextDelta | Failure | Finish
"""A turn gets any number of `TextDelta` and then one `Finish` or `Failure`. The engine's `Finish`
has one reason more than a backend's: `"cancelled"`."""

Emit = Callable[[EngineEvent], None]
"Called in the engine's thread; must not block. If it raises, the turn is dropped."

SHUTTING_DOWN = "The server is shutting down, so it does not answer. Try again in a while."
NOT_A_NUMBER = (
    "The model computed values that are not numbers, so the answer cannot go on. Ask again, "
    "perhaps in other words; if it happens often, the model's weights are damaged."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """What to generate."""

    prompt: Sequence[int]
    "Token ids after the chat template; at least one."
    seed: int
    "For sampling; fresh entropy if the user gave none."
    max_tokens: int | None = None
    "The most tokens to generate; None: as many as fit the context."
    temperature: float = 1.0
    "0 is greedy decoding."
    top_p: float = 1.0


@dataclass(slots=True, eq=False)
class Turn:
    """A turn's state; only the engine's thread touches it once it is submitted."""

    id: int
    prompt: list[int]
    token_limit: int
    "Tokens that may be generated, at least 1."
    sampler: Sampler
    text: TextStream
    end_tokens: frozenset[int]
    emit: Emit
    prefilled: int = 0
    "Prompt tokens that are in the cache."
    generated: int = 0
    last_token: int = -1
    "Chosen, but not yet in the cache."
    done: bool = False
    "The terminal event is out."

    @property
    def position(self) -> int:
        """Where `last_token` will stand in the cache."""
        return len(self.prompt) + self.generated - 1

    def accept(self, token: int) -> None:
        """Take the next token of the answer: emit its text, and the end if it is the last."""
        self.last_token = token
        self.generated += 1
        if token in self.end_tokens:
            self._finish("stop")
            return
        self._send_text(self.text.push(token))
        if self.generated >= self.token_limit:
            self._finish("length")

    def cancel(self) -> None:
        """End the turn because nobody wants it any more."""
        self._finish("cancelled")

    def fail(self, code: str, message: str) -> None:
        """End the turn because of an error."""
        if not self.done:
            self.done = True
            self._send(Failure(code, message))

    def _finish(self, reason: str) -> None:
        if self.done:
            return
        self._send_text(self.text.flush())
        if not self.done:
            self.done = True
            self._send(Finish(reason, len(self.prompt), self.generated))

    def _send_text(self, text: str) -> None:
        if text:
            self._send(TextDelta(text))

    def _send(self, event: EngineEvent) -> None:
        try:
            self.emit(event)
        except Exception:  # noqa: BLE001 (the caller's code; its loop is closed, most likely)
            self.done = True


def step_failed(error: Exception) -> str:
    """Return the message of a `Failure` for an exception in the engine."""
    lines = str(error).strip().splitlines()
    return (
        f"The engine failed while computing this answer ({type(error).__name__}: "
        f"{lines[0] if lines else 'no reason given'}), so it ends here. Ask again; if it happens "
        "often, see the server's log."
    )
