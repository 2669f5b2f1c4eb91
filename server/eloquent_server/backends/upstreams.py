"""The backend that passes turns on to OpenAI-compatible engines: vLLM, SGLang, llama.cpp, others.

Of several engines each conversation has two, by hashes of its head, so that its next turn finds the
prompt in a prefix cache. Of the two, the first gets the turn unless it is clearly the busier one
(power of two choices: Mitzenmacher, IEEE TPDS 12(10), 2001; for prefix caches: DualMap).
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from hashlib import blake2b

from eloquent.core.events import Delta, Failure
from eloquent.errors import RequestError
from eloquent_server.backends.base import (
    ANYBODY,
    Asker,
    BackendEvent,
    Continuation,
    Finish,
    StoredAnswer,
    Tenant,
)
from eloquent_server.backends.upstream import Patience, Upstream, open_client
from eloquent_server.backends.upstream_errors import UpstreamError
from eloquent_server.backends.upstream_request import ChatBody, Continues

SLACK_TURNS = 4
"""So many more turns the first may have under way than the second: a few more in a batch cost less
than a prompt computed anew (`tests/server/test_upstreams_affinity.py`)."""

PROBE_EVERY_S = 5.0
PROBE_JITTER = 0.2
"Part of that time, either way, so that gateways do not ask in step."
MAX_TRIES = 3
"Of engines that are there and fail: it may be the request that makes them."
RESUME_WAIT_S = 60.0
"An engine that was started together with this server may take so long."

logger = logging.getLogger(__name__)


def choose(upstreams: Sequence[Upstream], head: bytes) -> list[Upstream]:
    """Return the engines in the order in which a turn is to try them; those that are down last.

    The order of the others stays when one goes (rendezvous hashing).
    """
    order = sorted(upstreams, key=lambda each: blake2b(head + each.name.encode()).digest())
    order.sort(key=lambda each: not each.is_up)
    first, *others = order
    if others and others[0].is_up and first.in_flight > others[0].in_flight + SLACK_TURNS:
        order[:2] = others[0], first
    return order


class UpstreamBackend:
    """Answers with the engines behind the server; a `ContinuingBackend`."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str = "",
        key: str = "",
        salt: bool = False,
        continues: Continues = "no",
        patience: Patience | None = None,
        rng: random.Random,
    ) -> None:
        """Nothing is sent before `start`.

        `model` is the default; empty: the first that the first engine names. `salt` sends each
        tenant's as `cache_salt`. `rng` spreads the probes.

        Raises:
            ConfigurationError: a URL is none of an engine, or the key cannot be sent.
        """
        self._client = open_client(key)
        self._upstreams = [Upstream(url, self._client, patience or Patience()) for url in urls]
        self._default = model
        self._salt = salt
        self._continues: Continues = continues
        self._rng = rng
        self._probing: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()

    async def start(self) -> None:
        """Look at all engines, and go on looking; those that are not up yet may come later."""
        await asyncio.gather(*(each.probe() for each in self._upstreams))
        for each in self._upstreams:
            self._probing.append(asyncio.ensure_future(self._watch(each)))

    def salt_for(self, tenant: Tenant) -> str:
        """Return the `cache_salt` that goes to engines with what a tenant asks; empty: none."""
        return tenant.salt if self._salt else ""

    @property
    def upstreams(self) -> Sequence[Upstream]:
        """The engines, up or not."""
        return self._upstreams

    @property
    def models(self) -> Sequence[str]:
        """The default, then what the engines name; empty if neither is known."""
        named = [name for each in self._upstreams for name in each.models or ()]
        return tuple(dict.fromkeys([self._default, *named] if self._default else named))

    async def generate(self, body: bytes, asker: Asker = ANYBODY) -> AsyncGenerator[BackendEvent]:
        """Answer one request; see `Backend.generate`.

        Raises:
            RequestError: `invalid_request`, `unknown_model`, `prompt_too_long`, `rate_limited`,
                `request_too_large`, `upstream_error` or `upstream_timeout`; before the first event.
        """
        chat = ChatBody(body)
        model = chat.model or self._default_model
        yield Continuation(model.encode())
        async with aclosing(self._answer(chat, model, asker, [])) as events:
            async for event in events:
                yield event

    async def resume(
        self, body: bytes, answer: StoredAnswer, asker: Asker = ANYBODY
    ) -> AsyncGenerator[BackendEvent]:
        """Go on with an answer; see `ContinuingBackend.resume`.

        An engine tokenises the text anew and counts from there, so what follows need not be what an
        undisturbed answer had, nor the counts.

        Raises:
            RequestError: `interrupted`: it cannot be continued; else as `generate`.
        """
        chat = ChatBody(body)
        model = answer.continuations[0].decode() if answer.continuations else chat.model
        told = list(answer.events)
        tokens = chat.go_on(told, self._continues) if told else 0
        await self._wait_for(model)
        async with aclosing(self._answer(chat, model, asker, told, tokens)) as events:
            async for event in events:
                yield event

    async def close(self) -> None:
        """Stop looking after the engines, and close all connections to them."""
        for task in self._probing:
            task.cancel()
        await asyncio.gather(*self._probing, return_exceptions=True)
        await self._client.aclose()

    @property
    def _default_model(self) -> str:
        return next(iter(self.models), "")

    async def _answer(
        self, chat: ChatBody, model: str, asker: Asker, told: list[Delta], tokens: int = 0
    ) -> AsyncGenerator[Delta | Finish]:
        """Have an engine answer; if it does not take the turn, or fails in the midst, another.

        `told` is what there is of the answer, to which is added, and `tokens` how many these are.
        """
        salt = asker.tenant.salt
        order = choose(self._with(model), chat.head(model, salt))
        has_said, tries = False, 0
        for upstream in order:
            if chat.has_no_room:
                yield Finish("length", 0, tokens, model=model)
                return
            said_before = len(told)
            body = chat.encode(model, self.salt_for(asker.tenant))
            try:
                async with aclosing(upstream.answer(body, model)) as events:
                    async for event in events:
                        if isinstance(event, Finish):
                            yield _with_tokens(event, tokens)
                            return
                        told.append(event)
                        yield event
            except UpstreamError as error:
                tries += upstream.is_up
                rest: int | None = tokens if error.may_go_elsewhere else None
                if len(told) > said_before:
                    has_said, rest = True, self._ask_for_the_rest(chat, told)
                if rest is not None and upstream is not order[-1] and tries < MAX_TRIES:
                    tokens = rest
                elif has_said:
                    yield Failure(_in_mid_answer(error.code), error.message)
                    return
                else:
                    raise

    def _with(self, model: str) -> Sequence[Upstream]:
        """Return the engines that list a model; all if none does, since lists have no aliases."""
        return [each for each in self._upstreams if each.has(model)] or self._upstreams

    def _ask_for_the_rest(self, chat: ChatBody, told: Sequence[Delta]) -> int | None:
        """Return how many tokens are there of what failed in the midst; None: it cannot go on."""
        try:
            return chat.go_on(told, self._continues)
        except RequestError:
            return None

    async def _wait_for(self, model: str) -> None:
        """Wait until an engine is up that has a model, if that does not take too long."""
        try:
            async with asyncio.timeout(RESUME_WAIT_S):
                while not any(each.is_up for each in self._with(model)):
                    await self._news.wait()
        except TimeoutError:
            logger.warning("no engine with the model %r is up to go on with an answer", model)

    async def _watch(self, upstream: Upstream) -> None:
        while True:
            jitter = self._rng.uniform(-PROBE_JITTER, PROBE_JITTER)
            await asyncio.sleep(PROBE_EVERY_S * (1 + jitter))
            await upstream.probe()
            self._news.set()
            self._news.clear()


def _in_mid_answer(code: str) -> str:
    return code if code in ("upstream_error", "upstream_timeout") else "upstream_error"


def _with_tokens(finish: Finish, tokens: int) -> Finish:
    """Return the end of an answer of which some tokens were in the engine's prompt."""
    if not tokens:
        return finish
    prompt_tokens = max(finish.prompt_tokens - tokens, 0)
    return Finish(
        finish.reason, prompt_tokens, finish.completion_tokens + tokens, model=finish.model
    )
