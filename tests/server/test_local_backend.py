"""The local backend: the engine behind asyncio."""

import asyncio
import copy
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tiny_model import CONTEXT_TOKENS, reference_text, reference_tokens, scripted, tiny_loaded

from eloquent.core.events import Failure, TextDelta
from eloquent.errors import ConfigurationError, RequestError
from eloquent_server import models
from eloquent_server.backends.base import BackendEvent, Finish
from eloquent_server.backends.local import LocalBackend
from eloquent_server.chat import ChatMessage, ChatRequest
from eloquent_server.engine.loader import prepare
from eloquent_server.engine.prompt import PromptEncoder


@pytest.fixture
async def backend() -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(tiny_loaded())
    yield backend
    await backend.close()


def ask(text: str, **options: Any) -> ChatRequest:
    return ChatRequest(messages=(ChatMessage("user", text),), **options)


async def answer(backend: LocalBackend, request: ChatRequest) -> list[BackendEvent]:
    return [event async for event in backend.generate(request)]


def text_of(events: list[BackendEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def test_many_turns_at_once(backend: LocalBackend) -> None:
    assert backend.models == ("tiny",)
    requests = [ask(f"question {i} " * (i % 4), temperature=0, max_tokens=30) for i in range(12)]
    answers = await asyncio.gather(*(answer(backend, request) for request in requests))
    for request, events in zip(requests, answers, strict=True):
        prompt = PromptEncoder(tiny_loaded().tokenizer).encode(request.messages)
        assert text_of(events) == reference_text(prompt, 30)
        count = len(reference_tokens(prompt, 30))
        end = dataclasses.replace(events[-1], cached_tokens=0)
        assert end == Finish("length" if count == 30 else "stop", len(prompt), count)


async def test_seeds(backend: LocalBackend) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 30}
    first = await answer(backend, ask("hi", seed=3, **options))
    together = await asyncio.gather(
        *(answer(backend, ask("hi", seed=seed, **options)) for seed in (3, 4, None, None))
    )
    assert text_of(together[0]) == text_of(first)
    assert len({text_of(events) for events in together}) == 4


async def test_closing_the_iterator_cancels() -> None:
    loaded = scripted([65] * CONTEXT_TOKENS)
    backend = LocalBackend(loaded)
    answering = backend.generate(ask("x"))
    assert isinstance(await anext(answering), TextDelta)
    await answering.aclose()
    await answer(backend, ask("y", max_tokens=1))  # By now the cancel has been taken.
    calls = len(loaded.model.calls)
    await asyncio.sleep(0.05)
    assert len(loaded.model.calls) == calls
    await backend.close()


@pytest.mark.parametrize("running", [False, True])
async def test_cancelling_the_task_cancels_the_turn(running: bool) -> None:
    loaded = scripted([65] * CONTEXT_TOKENS)
    backend = LocalBackend(loaded, max_running=1)
    tasks = [asyncio.create_task(answer(backend, ask("x"))) for _ in range(3)]
    await asyncio.sleep(0)
    while running and not loaded.model.calls:  # noqa: ASYNC110 (the model is in a thread)
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert (await answer(backend, ask("y", max_tokens=1)))[-1] == Finish("length", 20, 1)
    await backend.close()


async def test_refusals_come_before_the_first_event(backend: LocalBackend) -> None:
    for request, code in [
        (ask("x", model="gpt-9"), "unknown_model"),
        (ask("x" * CONTEXT_TOKENS), "prompt_too_long"),
    ]:
        with pytest.raises(RequestError) as caught:
            await anext(backend.generate(request))
        assert caught.value.code == code
    assert text_of(await answer(backend, ask("x", model="tiny", max_tokens=20, temperature=0)))


async def test_close_fails_what_runs() -> None:
    backend = LocalBackend(dataclasses.replace(scripted([65] * CONTEXT_TOKENS)))
    answering = backend.generate(ask("x"))
    await anext(answering)
    await backend.close()
    events = [event async for event in answering]
    assert isinstance(events[-1], Failure | Finish)
    with pytest.raises(RequestError) as caught:
        await anext(backend.generate(ask("x")))
    assert caught.value.code == "unavailable"


async def test_load_of_something_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        LocalBackend.load(str(tmp_path))


async def test_load_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "ENGINE_PACKAGES", ("torch", "a_package_nobody_has"))
    with pytest.raises(
        ConfigurationError, match=r"a_package_nobody_has.*eloquent-stream\[engine\]"
    ):
        LocalBackend.load(models.EMBEDDED_MODEL)


async def test_sampling_that_a_request_leaves_open_is_the_models_own() -> None:
    backend = LocalBackend(dataclasses.replace(tiny_loaded(), temperature=0.0))
    try:
        request = ask("what do you advise?", max_tokens=20)
        prompt = PromptEncoder(tiny_loaded().tokenizer).encode(request.messages)
        assert text_of(await answer(backend, request)) == reference_text(prompt, 20)
    finally:
        await backend.close()


def test_the_models_own_sampling_is_what_its_generation_config_says() -> None:
    model = copy.copy(tiny_loaded().model)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.update(do_sample=True, temperature=0.25, top_p=0.5)
    advised = prepare(model, tiny_loaded().tokenizer, "tiny")
    assert (advised.temperature, advised.top_p) == (0.25, 0.5)
    assert (tiny_loaded().temperature, tiny_loaded().top_p) == (1.0, 1.0)
