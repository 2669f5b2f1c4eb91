"""The echo backend."""

import pytest
from msgspec.json import encode

from eloquent.core.events import Failure, TextDelta
from eloquent.errors import RequestError
from eloquent_server.backends.base import Backend, BackendEvent, Finish
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.chat import ChatMessage, ChatRequest

TEXT = "  two  words\nand 👋 more \n"


async def answer(backend: Backend, request: ChatRequest) -> list[BackendEvent]:
    return [event async for event in backend.generate(encode(request))]


async def test_the_words_come_back_at_the_rate() -> None:
    naps: list[float] = []

    async def sleep(seconds: float) -> None:
        naps.append(seconds)

    backend = EchoBackend(20, sleep=sleep)
    assert backend.models == ("echo",)
    messages = ChatMessage("user", "no"), ChatMessage("assistant", "no"), ChatMessage("user", TEXT)
    *deltas, finish = await answer(backend, ChatRequest(messages=messages))
    assert "".join(event.text for event in deltas if isinstance(event, TextDelta)) == TEXT
    assert naps == [0.05] * len(deltas)
    assert finish == Finish("stop", 8, 6)


async def test_the_limit() -> None:
    backend = EchoBackend(1e6)
    request = ChatRequest(messages=(ChatMessage("user", "a b c"),), max_tokens=2, model="echo")
    assert await answer(backend, request) == [
        TextDelta("a"),
        TextDelta(" b"),
        Finish("length", 3, 2),
    ]


async def test_refusals() -> None:
    backend = EchoBackend()
    with pytest.raises(RequestError, match="'gpt-9'") as caught:
        await answer(backend, ChatRequest(messages=(ChatMessage("user", "a"),), model="gpt-9"))
    assert caught.value.code == "unknown_model"
    with pytest.raises(RequestError, match="no user message"):
        await answer(backend, ChatRequest(messages=(ChatMessage("system", "a"),)))
    with pytest.raises(ValueError, match="positive"):
        EchoBackend(0)


async def test_close_ends_answers() -> None:
    backend = EchoBackend(1e6)
    answering = backend.generate(encode(ChatRequest(messages=(ChatMessage("user", "a b c"),))))
    assert await anext(answering) == TextDelta("a")
    await backend.close()
    assert isinstance(await anext(answering), Failure)
    assert [event async for event in answering] == []
