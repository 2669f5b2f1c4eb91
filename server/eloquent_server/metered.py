"""A backend whose answers are measured."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, cast

import msgspec

from eloquent.core.events import Failure, ReasoningDelta, TextDelta, ToolCallDelta
from eloquent.errors import RequestError
from eloquent_server.backends.base import (
    ANYBODY,
    Asker,
    BackendEvent,
    Continuation,
    ContinuingBackend,
    Finish,
    StoredAnswer,
)
from eloquent_server.meters import ModelMeters

REASONS = {"cancelled": "abort"}
"Our finish reasons where vLLM has another word."
KNOWN_REASONS = frozenset({"stop", "length", "abort", "error", "tool_calls", "content_filter"})
OTHER = "other"
"What an engine behind the server says beyond these: labels must not grow without bounds."

SPOKEN = (TextDelta, ReasoningDelta, ToolCallDelta)
"Events that have a token at least."


class _Asked(msgspec.Struct):
    """Of a chat body, what it is measured under."""

    model: str | None = None


class _TurnMeter:
    """One answer, from the request to its end."""

    def __init__(self, model: ModelMeters, clock: Callable[[], float], *, is_new: bool) -> None:
        self._model = model
        self._clock = clock
        self._is_new = is_new
        self._began_s = clock()
        self._spoke_s: float | None = None
        "When something was said last."
        self._spoken = 0
        self._finish: Finish | None = None
        self._has_failed = False
        self._is_taken = False
        "Whether it cannot be declined any more."
        model.waiting += 1

    def on_event(self, event: BackendEvent) -> None:
        """Take note of what the backend said."""
        if not isinstance(event, Continuation):
            self._take()
        if isinstance(event, SPOKEN):
            self._speak()
        elif isinstance(event, Finish):
            self._finish = event
        elif isinstance(event, Failure):
            self._has_failed = True

    def on_declined(self) -> None:
        """Take note that it was declined, before it said anything: then it is no answer at all."""
        self._model.waiting -= 1

    def on_end(self, *, has_failed: bool = False) -> None:
        """Take note that it goes no further, whatever the reason."""
        self._take()
        model, finish = self._model, self._finish
        if self._spoke_s is None:
            model.waiting -= 1
        else:
            model.running -= 1
        reason = "error" if self._has_failed or has_failed else "abort"
        if finish is not None:
            reason = REASONS.get(finish.reason, finish.reason)
            model.prompt_tokens += finish.prompt_tokens
            model.cached_tokens += finish.cached_tokens
            # An event can be several tokens, and those of a process before this one count as well.
            model.generation_tokens += max(0, finish.completion_tokens - self._spoken)
            if self._is_new:
                model.latency.observe(self._clock() - self._began_s)
        model.finished[reason if reason in KNOWN_REASONS else OTHER] += 1

    def _take(self) -> None:
        """Count it, once."""
        if not self._is_taken:
            self._is_taken = True
            self._model.generations += self._is_new
            self._model.continued += not self._is_new

    def _speak(self) -> None:
        now, model = self._clock(), self._model
        if self._spoke_s is not None:
            model.gap.observe(now - self._spoke_s)
        else:
            model.waiting -= 1
            model.running += 1
            if self._is_new:
                model.ttft.observe(now - self._began_s)
        self._spoke_s = now
        self._spoken += 1
        model.generation_tokens += 1


class MeteredBackend:
    """A backend, and what its answers are measured by; a `ContinuingBackend`."""

    def __init__(
        self, backend: ContinuingBackend, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` gives seconds, from any origin."""
        self._backend = backend
        self._clock = clock
        self._by_model: dict[str, ModelMeters] = {}

    @property
    def by_model(self) -> dict[str, ModelMeters]:
        """Those of each model that was asked; there are no more than the backend has."""
        first = next(iter(self._backend.models), "")
        if "" in self._by_model and first not in self._by_model:
            # What was asked while the backend was loading, and had none.
            self._by_model[first] = self._by_model.pop("")
        return self._by_model

    @property
    def models(self) -> Sequence[str]:
        """See `Backend.models`."""
        return self._backend.models

    def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncIterator[BackendEvent]:
        """See `Backend.generate`."""
        return self._measure(body, self._backend.generate(body, asker), is_new=True)

    def resume(
        self, body: bytes, answer: StoredAnswer, asker: Asker = ANYBODY
    ) -> AsyncIterator[BackendEvent]:
        """See `ContinuingBackend.resume`."""
        return self._measure(body, self._backend.resume(body, answer, asker), is_new=False)

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._backend.close()

    async def _measure(
        self, body: bytes, answer: AsyncIterator[BackendEvent], *, is_new: bool
    ) -> AsyncIterator[BackendEvent]:
        meter = _TurnMeter(self._meters(body), self._clock, is_new=is_new)
        try:
            async with aclosing(cast(Any, answer)) as events:
                async for event in events:
                    meter.on_event(event)
                    yield event
        except RequestError:
            meter.on_declined()
            raise
        except BaseException as error:
            meter.on_end(has_failed=isinstance(error, Exception))
            raise
        else:
            meter.on_end()

    def _meters(self, body: bytes) -> ModelMeters:
        """Return what a request's turn counts for: its model, or where there is none, the first."""
        names = self._backend.models
        try:
            name = msgspec.json.decode(body, type=_Asked).model
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            name = None
        if name not in names:
            name = next(iter(names), "")
        assert name is not None
        return self.by_model.setdefault(name, ModelMeters())
