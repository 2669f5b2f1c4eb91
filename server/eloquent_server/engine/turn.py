"""One turn in the engine: what was asked, how far it is, and its way out."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eloquent.core.events import ChosenLogprob, Failure, Logprobs, TextDelta
from eloquent_server.backends.base import ANYBODY, Finish
from eloquent_server.engine.options import SamplingOptions
from eloquent_server.engine.speculation import PromptLookup

if TYPE_CHECKING:  # The server's process takes types from here, and has no torch.
    from eloquent_server.engine.sampling import Sampler
    from eloquent_server.engine.text import AnswerText

LOCAL_TENANT = ANYBODY.tenant.name


@dataclass(frozen=True, slots=True)
class Tokens:
    """The ids that a step added to a turn; comes before the text that they complete."""

    ids: tuple[int, ...]
    cached_tokens: int = 0
    "How many tokens of the turn's prompt came from the prefix cache."


EngineEvent = Tokens | TextDelta | Logprobs | Failure | Finish
"""A turn gets, per step that moves it on, one `Tokens` and at most one `TextDelta`; then one
`Finish` or `Failure`. The engine's `Finish` has one reason more than a backend's: `"cancelled"`."""

Emit = Callable[[EngineEvent], None]
"Called in the engine's thread; must not block. If it raises, the turn is dropped."

SHUTTING_DOWN = "The server is shutting down, so it does not answer. Try again in a while."
NOT_A_NUMBER = (
    "The model computed values that are not numbers, so the answer cannot go on. Ask again, "
    "perhaps in other words; if it happens often, the model's weights are damaged."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest(SamplingOptions):
    """What to generate, and how."""

    prompt: Sequence[int]
    "Token ids after the chat template; at least one."
    max_tokens: int | None = None
    "The most tokens to generate; None: as many as fit the context."
    generated: Sequence[int] = ()
    """Tokens of the answer that are out already: a continuation. They are not emitted again and
    count towards `max_tokens`."""
    emitted_chars: int | None = None
    """How much of the answer's text is out; the rest of what they complete comes with the next
    event. None: all that they complete."""
    emitted_logprobs: int | None = None
    "For how many of these tokens logprobs are out, if they were asked for. None: for all."
    cached_tokens: int | None = None
    "What a continued answer says of its prompt's cached tokens: as many as when it began."
    tenant: str = LOCAL_TENANT
    "Whose prefix cache and share of the engine this turn uses; authenticated by the server."
    weight: float = 1.0
    "The tenant's share of the engine against others'."


@dataclass(slots=True, eq=False)
class Turn:
    """A turn's state; only the engine's thread touches it once it is submitted."""

    id: int
    tokens: list[int]
    "The prompt and what was generated so far."
    prompt_tokens: int
    token_limit: int
    "Tokens that may be generated, continued ones included; at least 1."
    sampler: "Sampler"
    text: "AnswerText"
    end_tokens: frozenset[int]
    emit: Emit
    arrived: float = 0.0
    "Seconds, on the engine's clock."
    tenant: str = LOCAL_TENANT
    weight: float = 1.0
    row: int | None = None
    "Its row of the key-value cache, while it runs."
    cached: int = 0
    "How many of `tokens` have their keys and values in the row."
    reached: int = 0
    "The greatest `cached` so far: what lies below was computed, or counted as cached, before."
    cached_prompt: int = 0
    "Prompt tokens that came from the prefix cache instead of being computed."
    keys: list[bytes] = field(default_factory=list)
    "The prefix cache's keys of the full blocks of `tokens`, as far as they were needed."
    published: int = 0
    "How many of its first full blocks were shared."
    restoring: bool = False
    "Blocks are on their way from the second tier."
    tier_failed: bool = False
    "The second tier could not deliver what it seemed to have."
    started: bool = False
    "It has had a row."
    poisoned: bool = False
    "Its row may hold NaN."
    ran: int = 0
    "Tokens chosen since it got its row."
    lookup: PromptLookup = field(default_factory=PromptLookup)
    dry_at: float = 0.0
    "When the reader will have read all that is out, as far as known; seconds."
    done: bool = False
    "The terminal event is out."
    _new_ids: list[int] = field(default_factory=list)
    _new_text: list[str] = field(default_factory=list)
    _out_already: int = 0
    "Characters that are not to be sent again."
    _known: deque[int] = field(default_factory=deque)
    "The next tokens of the answer, which are out; they are computed again for their logprobs."
    _deaf: bool = False

    @property
    def _is_complete(self) -> bool:
        """Whether a stop string or the grammar ends the answer."""
        grammar = self.sampler.grammar
        return self.text.stopped or (grammar is not None and grammar.is_complete)

    @property
    def generated(self) -> int:
        """How many tokens of the answer there are."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens that the model has yet to take before it can give the next one; at least 1."""
        return len(self.tokens) - self.cached

    @property
    def known(self) -> int | None:
        """The next token, if it is out already: then nothing else may be accepted."""
        return self._known[0] if self._known else None

    def replay(self, request: TurnRequest) -> None:
        """Take what is out already of the answer: tokens, text, logprobs."""
        tokens: Iterable[int] = request.generated
        if request.logprobs is not None and request.emitted_logprobs is not None:
            self._known.extend(request.generated[request.emitted_logprobs :])
            tokens = request.generated[: request.emitted_logprobs]
        for token in tokens:
            self.tokens.append(token)
            if token not in self.end_tokens:
                self._new_text.append(self.text.push(token))
                if self.sampler.grammar is not None:
                    self.sampler.grammar.accept(token)
        complete = sum(map(len, self._new_text))
        emitted = request.emitted_chars
        self._out_already = complete if emitted is None else emitted
        if request.cached_tokens is not None:
            self.cached_prompt = request.cached_tokens
            self.reached = self.prompt_tokens

    def settle(self) -> None:
        """End a continued turn whose answer was complete."""
        if self.generated and (self.tokens[-1] in self.end_tokens or self._is_complete):
            self._finish("stop")
        elif self.generated >= self.token_limit:
            self._finish("length")

    def accept(self, token: int, logprob: ChosenLogprob | None = None) -> None:
        """Take the next token of the answer; `flush` sends it, the end is sent at once.

        Raises:
            GrammarError: the grammar does not allow the token.
        """
        self.tokens.append(token)
        self.ran += 1
        if self._known:
            self._known.popleft()
        else:
            self._new_ids.append(token)
        if token in self.end_tokens:
            self._finish("stop")
            return
        self._new_text.append(self.text.push(token, logprob))
        if self.sampler.grammar is not None:
            self.sampler.grammar.accept(token)
        if self._is_complete:
            self._finish("stop")
        elif self.generated >= self.token_limit:
            self._finish("length")

    def flush(self) -> None:
        """Send what the step added."""
        ids, text = tuple(self._new_ids), "".join(self._new_text)
        self._new_ids.clear()
        self._new_text.clear()
        text, self._out_already = (
            text[self._out_already :],
            max(0, self._out_already - len(text)),
        )
        if ids:
            self._send(Tokens(ids, self.cached_prompt))
        if text:
            self._send(TextDelta(text))
        if logprobs := self.text.take_logprobs():
            self._send(Logprobs(logprobs))

    def cancel(self) -> None:
        """End the turn because nobody wants it any more."""
        self._finish("cancelled")

    def fail(self, code: str, message: str) -> None:
        """End the turn because of an error."""
        if self.done:
            return
        self._new_text.append(self.text.flush())
        self.flush()
        if not self.done:
            self.done = True
            self._send(Failure(code, message))

    def _finish(self, reason: str) -> None:
        if self.done:
            return
        self._new_text.append(self.text.flush())
        self.flush()
        if not self.done:
            self.done = True
            self._send(
                Finish(reason, self.prompt_tokens, self.generated, cached_tokens=self.cached_prompt)
            )

    def _send(self, event: EngineEvent) -> None:
        if self._deaf:
            return
        try:
            self.emit(event)
        except Exception:  # noqa: BLE001 (the caller's code; its loop is closed, most likely)
            self.done = self._deaf = True


def step_failed(error: Exception) -> str:
    """Return the message of a `Failure` for an exception in the engine."""
    lines = str(error).strip().splitlines()
    return (
        f"The engine failed while computing this answer ({type(error).__name__}: "
        f"{lines[0] if lines else 'no reason given'}), so it ends here. Ask again; if it happens "
        "often, see the server's log."
    )
