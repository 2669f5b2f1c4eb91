"""The local backend: the engine's process behind the interface of a backend."""

import asyncio
import copy
import dataclasses
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import engine_child
import msgspec
import pytest
import pytest_asyncio
from msgspec.json import encode
from tiny_model import CONTEXT_TOKENS, reference_text, reference_tokens, tiny_loaded

from eloquent.core.events import ChosenLogprob, Failure, Logprobs, TextDelta
from eloquent.errors import ConfigurationError, RequestError
from eloquent_server import models
from eloquent_server.backends.base import BackendEvent, Continuation, Finish, StoredAnswer
from eloquent_server.backends.local import LocalBackend
from eloquent_server.chat import ChatMessage, ChatRequest
from eloquent_server.engine import client
from eloquent_server.engine.client import EngineClient, EngineOptions
from eloquent_server.engine.loader import prepare
from eloquent_server.engine.prompt import PromptEncoder

pytestmark = pytest.mark.asyncio(loop_scope="module")

NO_END = {str(token): -100.0 for token in tiny_loaded("llama").end_tokens}
"For answers of random tokens that should be long."
SAMPLED = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 30, "logit_bias": NO_END}
GREEDY = {"temperature": 0, "max_tokens": 30}
LOGPROBS = {**GREEDY, "logprobs": True, "top_logprobs": 2}


class Local(LocalBackend):
    """A local backend that shows its engine's client."""

    def __init__(self, client: EngineClient) -> None:
        super().__init__(client)
        self.client = client


@asynccontextmanager
async def started(model: str) -> AsyncIterator[Local]:
    async with asyncio.timeout(120):
        backend = Local(
            await EngineClient.start(EngineOptions(model), command=engine_child.COMMAND)
        )
        try:
            yield backend
        finally:
            await backend.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="backend")
async def _backend() -> AsyncIterator[Local]:
    backend = Local(await EngineClient.start(EngineOptions("slow"), command=engine_child.COMMAND))
    yield backend
    await backend.close()


def ask(text: str, **options: Any) -> ChatRequest:
    return ChatRequest(messages=(ChatMessage("user", text),), **options)


def asked(text: str, **options: Any) -> bytes:
    return encode(ask(text, **options))


async def answer(backend: LocalBackend, request: ChatRequest) -> list[BackendEvent]:
    return [event async for event in backend.generate(encode(request))]


def text_of(events: list[BackendEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def logprobs_of(events: list[BackendEvent]) -> list[ChosenLogprob]:
    return [each for event in events if isinstance(event, Logprobs) for each in event.tokens]


def same_logprobs(one: list[ChosenLogprob], other: list[ChosenLogprob]) -> None:
    """They are computed in another forward, so they may differ by rounding."""
    assert [each.token for each in one] == [each.token for each in other]
    for mine, its in zip(one, other, strict=True):
        assert mine.logprob == pytest.approx(its.logprob, abs=1e-3)
        assert [each.token for each in mine.top] == [each.token for each in its.top]


def prompt_of(request: ChatRequest) -> list[int]:
    return PromptEncoder(tiny_loaded().tokenizer).encode(request.messages)


async def idle(backend: Local) -> None:
    """Wait until the engine has nothing to do."""
    async with asyncio.timeout(60):
        while True:
            stats = await backend.client.stats()
            if not stats["running"] + stats["waiting"]:
                return
            await asyncio.sleep(0.01)


async def test_many_turns_at_once(backend: Local) -> None:
    assert backend.models == ("tiny",)
    requests = [ask(f"question {i} " * (i % 4), **GREEDY) for i in range(12)]
    answers = await asyncio.gather(*(answer(backend, request) for request in requests))
    for request, events in zip(requests, answers, strict=True):
        prompt = prompt_of(request)
        assert text_of(events) == reference_text(prompt, 30)
        count = len(reference_tokens(prompt, 30))
        end = dataclasses.replace(events[-1], cached_tokens=0)
        assert end == Finish("length" if count == 30 else "stop", len(prompt), count)


async def test_seeds(backend: Local) -> None:
    first = await answer(backend, ask("hi", seed=3, **SAMPLED))
    together = await asyncio.gather(
        *(answer(backend, ask("hi", seed=seed, **SAMPLED)) for seed in (3, -4, None, 1 << 90))
    )
    assert text_of(together[0]) == text_of(first)
    assert len({text_of(events) for events in together}) == 4


async def test_closing_the_iterator_cancels(backend: Local) -> None:
    answering = backend.generate(asked("x", temperature=0))
    while not isinstance(await anext(answering), TextDelta):
        pass
    await answering.aclose()
    await idle(backend)


@pytest.mark.parametrize("running", [False, True])
async def test_cancelling_the_task_cancels_the_turn(backend: Local, running: bool) -> None:
    before = (await backend.client.stats())["steps"]
    tasks = [asyncio.create_task(answer(backend, ask("x"))) for _ in range(20)]
    await asyncio.sleep(0)
    while running and (await backend.client.stats())["steps"] < before + 3:
        pass
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    await idle(backend)
    end = (await answer(backend, ask("y", max_tokens=1)))[-1]
    assert isinstance(end, Finish)
    assert (end.reason, end.prompt_tokens, end.completion_tokens) == ("length", 20, 1)


async def test_more_turns_than_it_takes_are_told_that_it_is_overloaded(
    backend: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_TURNS", 0)
    with pytest.raises(RequestError) as raised:
        await answer(backend, ask("hi"))
    assert raised.value.code == "overloaded"


async def test_refusals_come_before_the_first_event(backend: Local) -> None:
    for request, code in [
        (ask("x", model="gpt-9"), "unknown_model"),
        (ask("x" * CONTEXT_TOKENS), "prompt_too_long"),
    ]:
        with pytest.raises(RequestError) as caught:
            await anext(backend.generate(encode(request)))
        assert caught.value.code == code
    assert text_of(await answer(backend, ask("x", model="tiny", max_tokens=20, temperature=0)))


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, LOGPROBS], ids=["greedy", "sampled", "probs"])
async def test_an_answer_goes_on_wherever_it_was_cut_off(
    backend: Local, options: dict[str, Any]
) -> None:
    request = ask("Tell me a story", **options)
    events = await answer(backend, request)
    whole, stored = text_of(events), [event for event in events if not isinstance(event, Finish)]
    assert sum(isinstance(event, Continuation) for event in stored) > 10

    async def go_on(cut: int) -> None:
        """Go on with the first `cut` events; what is stored ends with an event's text."""
        part = stored[:cut]
        while isinstance(part[-1], Continuation):
            part.pop()
        data = tuple(event.data for event in part if isinstance(event, Continuation))
        deltas = tuple(event for event in part if isinstance(event, TextDelta | Logprobs))
        answer = StoredAnswer(deltas, data)
        rest = [event async for event in backend.resume(encode(request), answer)]
        assert text_of(part) + text_of(rest) == whole
        same_logprobs(logprobs_of(part) + logprobs_of(rest), logprobs_of(events))
        end, finish = rest[-1], events[-1]
        assert isinstance(end, Finish)
        assert isinstance(finish, Finish)
        assert end == finish

    cuts = {2, 3, 4, 7, 8, 9, 10, len(stored) // 2, len(stored)}
    await asyncio.gather(*(go_on(cut) for cut in cuts))


async def test_an_answer_that_was_cut_off_before_it_began_is_the_whole_one(backend: Local) -> None:
    request = ask("Hello", **SAMPLED, seed=3)
    whole = text_of(await answer(backend, request))
    nothing = StoredAnswer((), ())
    again = text_of([event async for event in backend.resume(encode(request), nothing)])
    assert again == whole != ""


async def test_an_answer_that_an_engine_dies_in_has_its_logprobs_whole() -> None:
    request = ask("Tell me a story", **LOGPROBS)
    async with started("slow") as backend:
        whole = await answer(backend, request)
        events: list[BackendEvent] = []
        kills = 0
        async for event in backend.generate(encode(request)):
            events.append(event)
            tokens = sum(isinstance(each, Continuation) for each in events)
            if tokens in (3, 9, 15) and isinstance(event, Continuation) and kills < 3:
                pid = backend.client.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                kills += 1
        assert backend.client.restarts >= 1
        assert text_of(events) == text_of(whole)
        same_logprobs(logprobs_of(events), logprobs_of(whole))
        cached = (len(prompt_of(request)) - 1) // 16 * 16
        assert events[-1] == dataclasses.replace(whole[-1], cached_tokens=cached)
        ids = [msgspec.msgpack.decode(e.data) for e in events if isinstance(e, Continuation)]
        said = [id_ for each in [ids[0][3], *ids[1:]] for id_ in each]
        assert said == reference_tokens(prompt_of(request), 30)[: len(said)], "each once"


async def test_text_that_was_stored_without_its_end_is_not_said_twice(backend: Local) -> None:
    """The ids can be ahead of the text: then the text is made up for."""
    request = ask("And another", **GREEDY)
    events = await answer(backend, request)
    data = tuple(event.data for event in events if isinstance(event, Continuation))
    for said in (0, 5, len(text_of(events))):
        stored = StoredAnswer((TextDelta(text_of(events)[:said]),), data)
        assert (
            text_of([event async for event in backend.resume(encode(request), stored)])
            == (text_of(events)[said:])
        )


async def test_answers_that_cannot_be_gone_on_with(backend: Local) -> None:
    foreign = msgspec.msgpack.encode([b"another model", 1, [1, 2], [3]])
    for data in [(), (b"\xc1",), (foreign,)]:
        with pytest.raises(RequestError) as caught:
            await anext(backend.resume(asked("x"), StoredAnswer((TextDelta("so far"),), data)))
        assert caught.value.code == "interrupted"


async def test_close_fails_what_runs() -> None:
    async with started("slow") as backend:
        answering = backend.generate(asked("x", temperature=0))
        await anext(answering)
        await backend.close()
        events = [event async for event in answering]
        assert isinstance(events[-1], Failure)
        with pytest.raises(RequestError) as caught:
            await anext(backend.generate(asked("x")))
        assert caught.value.code == "unavailable"


async def test_start_with_something_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        await LocalBackend.start(str(tmp_path))


async def test_start_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "ENGINE_PACKAGES", ("torch", "a_package_nobody_has"))
    with pytest.raises(
        ConfigurationError, match=r"a_package_nobody_has.*eloquent-stream\[engine\]"
    ):
        await LocalBackend.start(models.EMBEDDED_MODEL)


async def test_sampling_that_a_request_leaves_open_is_the_models_own() -> None:
    async with started("greedy") as backend:
        request = ask("what do you advise?", max_tokens=20)
        expected = reference_text(prompt_of(request), 20)
        assert text_of(await answer(backend, request)) == expected


async def test_the_models_own_sampling_is_what_its_generation_config_says() -> None:
    model = copy.copy(tiny_loaded().model)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.update(do_sample=True, temperature=0.25, top_p=0.5)
    advised = prepare(model, tiny_loaded().tokenizer, "tiny")
    assert (advised.temperature, advised.top_p) == (0.25, 0.5)
    assert (tiny_loaded().temperature, tiny_loaded().top_p) == (1.0, 1.0)
