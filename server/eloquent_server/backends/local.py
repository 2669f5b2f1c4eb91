"""The backend that runs a model on this machine, in a process of its own."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

import msgspec

from eloquent.errors import RequestError
from eloquent_server import models
from eloquent_server.backends.base import (
    ANYBODY,
    Asker,
    BackendEvent,
    Continuation,
    StoredAnswer,
)
from eloquent_server.chat import ChatRequest, parse_chat_body
from eloquent_server.engine.client import EngineClient, EngineOptions
from eloquent_server.engine.client_turn import AnswerSoFar, EngineTurn
from eloquent_server.engine.settings import KvOptions
from eloquent_server.engine.turn import Tokens

STATS_S = 0.5
"How long an engine that is busy is waited for."
HINT_EVERY_S = 0.25
"So often the engine hears for how long a turn's readers have text."
INTERRUPTED = "The server was restarted in mid-answer and cannot go on with it: {}. Ask again."


class _Begun(msgspec.Struct, frozen=True, array_like=True):
    """An answer's first continuation; the later ones are lists of token ids."""

    fingerprint: bytes
    "Of the model."
    seed: int
    prompt: Sequence[int]
    tokens: list[int]
    cached_tokens: int = 0
    "Of the prompt."


def _entropy() -> int:
    return secrets.randbits(63)


class LocalBackend:
    """Answers with one model of the local engine; a `ContinuingBackend`."""

    def __init__(
        self,
        engine: EngineClient,
        *,
        entropy: Callable[[], int] = _entropy,
        hint_every_s: float = HINT_EVERY_S,
    ) -> None:
        """`engine` is closed with the backend; `entropy` seeds turns that bring no seed."""
        self._engine = engine
        self._entropy = entropy
        self._hint_every_s = hint_every_s

    @classmethod
    async def start(
        cls,
        model: str,
        *,
        device: str = "auto",
        precision: str = "default",
        kv: KvOptions | None = None,
        progress: models.Progress | None = None,
    ) -> "LocalBackend":
        """Start an engine with a model by name or directory, which is fetched if need be.

        Raises:
            ConfigurationError: packages are missing, there is no such model or device, the model
                cannot be fetched, or the engine does not support it.
        """
        models.require_engine_packages()
        options = EngineOptions(model, device, precision, kv=kv or KvOptions())
        return cls(await EngineClient.start(options, progress=progress))

    @property
    def models(self) -> Sequence[str]:
        """The one model's name."""
        return (self._engine.info.name,)

    def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncGenerator[BackendEvent]:
        """Answer one request; see `Backend.generate`.

        Raises:
            RequestError: `unknown_model`, `prompt_too_long`, `invalid_request`, `overloaded` or
                `unavailable`; before the first event.
        """
        return self._answer(body, None, asker)

    def resume(
        self, body: bytes, answer: StoredAnswer, asker: Asker = ANYBODY
    ) -> AsyncGenerator[BackendEvent]:
        """Go on with an answer; see `ContinuingBackend.resume`.

        Raises:
            RequestError: `interrupted`: it was another model's, or what was stored of it cannot be
                read; else as `generate`.
        """
        # Of a server that was killed between the request and the first token, nothing is stored.
        has_begun = bool(answer.events or answer.continuations)
        return self._answer(body, answer if has_begun else None, asker)

    async def stats(self) -> Mapping[str, int]:
        """Return the engine's counts, by the names of `EngineStats`; none while it is down."""
        return await self._engine.stats(STATS_S)

    async def close(self) -> None:
        """Fail the turns that are running and stop the engine; takes one step."""
        await self._engine.close()

    async def _answer(
        self, body: bytes, stored: StoredAnswer | None, asker: Asker
    ) -> AsyncGenerator[BackendEvent]:
        request = parse_chat_body(body)
        self._check_model(request)
        seed: int | None = None  # Of an answer whose first continuation is yet to come.
        if stored is None:
            seed = self._entropy()
            turn = self._engine.submit(request, seed=seed, tenant=asker.tenant)
        else:
            begun, generated = self._read(stored)
            so_far = AnswerSoFar(
                prompt=begun.prompt,
                cached_tokens=begun.cached_tokens,
                generated=generated,
                emitted_chars=len(stored.text),
                emitted_logprobs=stored.logprobs,
            )
            turn = self._engine.submit(request, seed=begun.seed, tenant=asker.tenant, so_far=so_far)
        tokens: list[int] = []
        hinting = asyncio.ensure_future(self._hint(turn, asker))
        try:
            async for event in turn:
                if isinstance(event, Tokens):
                    tokens += event.ids
                    continue
                if tokens:
                    yield Continuation(self._continuation(turn, seed, tokens))
                    tokens, seed = [], None
                yield event
        finally:
            hinting.cancel()
            turn.cancel()

    async def _hint(self, turn: EngineTurn, asker: Asker) -> None:
        """Tell the engine for how long the readers have text, while they have any."""
        told_s = 0.0
        while True:
            await asyncio.sleep(self._hint_every_s)
            buffered_s = asker.buffered_s()
            if buffered_s or told_s:
                turn.hint(buffered_s)
            told_s = buffered_s

    def _check_model(self, request: ChatRequest) -> None:
        name = self.models[0]
        if request.model not in (None, name):
            raise RequestError(
                "unknown_model",
                f"This server has no model {request.model!r}, only {name!r}. Ask for that, or "
                "leave `model` out.",
            )

    def _continuation(self, turn: EngineTurn, seed: int | None, tokens: list[int]) -> bytes:
        if seed is None:
            return msgspec.msgpack.encode(tokens)
        prompt, cached_tokens = turn.so_far.prompt, turn.so_far.cached_tokens
        assert prompt is not None, "it comes before the first token"
        assert cached_tokens is not None, "it comes with the first token"
        return msgspec.msgpack.encode(
            _Begun(self._engine.info.fingerprint, seed, prompt, tokens, cached_tokens)
        )

    def _read(self, answer: StoredAnswer) -> tuple[_Begun, list[int]]:
        """Return what an answer began with, and its tokens."""
        if not answer.continuations:
            raise RequestError("interrupted", INTERRUPTED.format("its tokens were not stored"))
        first, *later = answer.continuations
        try:
            begun = msgspec.msgpack.decode(first, type=_Begun)
            more = [msgspec.msgpack.decode(data, type=list[int]) for data in later]
        except msgspec.MsgspecError as error:
            raise RequestError(
                "interrupted", INTERRUPTED.format(f"another release stored it ({error})")
            ) from error
        if begun.fingerprint != self._engine.info.fingerprint:
            raise RequestError("interrupted", INTERRUPTED.format("it was another model's"))
        return begun, begun.tokens + [token for tokens in more for token in tokens]
