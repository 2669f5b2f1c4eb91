"""OpenAI's own client, unchanged, against the HTTP front."""

import asyncio
import json
from typing import Any

import openai
import pytest
from http_front import DEADLINE_S, Front, Scripted, front_with

from eloquent.core.events import (
    ChosenLogprob,
    Failure,
    Logprobs,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)
from eloquent.errors import RequestError
from eloquent_server.admission import Principal
from eloquent_server.backends.base import Finish
from eloquent_server.backends.echo import EchoBackend

MESSAGES: Any = [{"role": "user", "content": "to be or not to be"}]
CALLS = [
    ReasoningDelta("hm"),
    ToolCallDelta(0, "call_1", "weather", ""),
    ToolCallDelta(0, "", "", '{"city": '),
    ToolCallDelta(0, "", "", '"Rome"}'),
]
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]


def client_of(front: Front, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{front.url}/v1", api_key="k", timeout=DEADLINE_S, max_retries=0, **options
    )


async def test_it_streams() -> None:
    async with front_with(EchoBackend(1000)) as front, client_of(front) as client:
        stream = await client.chat.completions.create(
            model="echo",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "to be or not to be"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


async def test_it_gets_a_whole_answer() -> None:
    async with front_with(EchoBackend(1000)) as front, client_of(front) as client:
        answer = await client.chat.completions.create(model="echo", messages=MESSAGES)
        models = [model.id async for model in client.models.list()]
        model = await client.models.retrieve("echo")
    assert answer.choices[0].message.content == "to be or not to be"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 12
    assert models == [model.id] == ["echo"]


def _with_the_sync_client(url: str) -> tuple[str, str | None]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", timeout=DEADLINE_S) as client:
        stream = client.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        answer = client.chat.completions.create(model="echo", messages=MESSAGES)
    return text, answer.choices[0].message.content


async def test_the_sync_one_does_too() -> None:
    async with front_with(EchoBackend(1000)) as front:
        text, whole = await asyncio.to_thread(_with_the_sync_client, front.url)
    assert text == whole == "to be or not to be"


async def test_it_gathers_a_call() -> None:
    backend = Scripted(CALLS, Finish("tool_calls", 7, 4))
    async with front_with(backend) as front, client_of(front) as client:
        async with client.chat.completions.stream(
            model="scripted", messages=MESSAGES, tools=TOOLS
        ) as stream:
            streamed = (await stream.get_final_completion()).choices[0]
        whole = (
            await client.chat.completions.create(model="scripted", messages=MESSAGES, tools=TOOLS)
        ).choices[0]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    for choice in (streamed, whole):
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function"
        assert (call.id, call.function.name) == ("call_1", "weather")
        assert json.loads(call.function.arguments) == {"city": "Rome"}
        assert (choice.message.model_extra or {})["reasoning_content"] == "hm"
        assert choice.message.content is None or choice.message.content == ""


async def test_it_reads_logprobs() -> None:
    tokens = [
        ChosenLogprob(word.encode(), -0.5, (TokenLogprob(b"no", -1.5),)) for word in ("to ", "be")
    ]
    said = [
        event for token in tokens for event in (TextDelta(token.token.decode()), Logprobs((token,)))
    ]
    async with front_with(Scripted(said)) as front, client_of(front) as client:
        async with client.chat.completions.stream(
            model="scripted", messages=MESSAGES, logprobs=True, top_logprobs=1
        ) as stream:
            streamed = (await stream.get_final_completion()).choices[0].logprobs
        whole = (
            (
                await client.chat.completions.create(
                    model="scripted", messages=MESSAGES, logprobs=True
                )
            )
            .choices[0]
            .logprobs
        )
    assert streamed is not None
    assert whole is not None
    assert [each.token for each in streamed.content or ()] == ["to ", "be"]
    assert [each.model_dump() for each in whole.content or ()] == [
        each.model_dump() for each in streamed.content or ()
    ]
    assert (whole.content or ())[0].top_logprobs[0].bytes == list(b"no")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("invalid_request", openai.BadRequestError),
        ("unknown_model", openai.NotFoundError),
        ("turn_conflict", openai.ConflictError),
        ("rate_limited", openai.RateLimitError),
        ("overloaded", openai.InternalServerError),
        ("upstream_error", openai.InternalServerError),
    ],
)
async def test_it_raises_its_own_errors(code: str, error: type[openai.APIStatusError]) -> None:
    backend = Scripted([RequestError(code, "because")])
    async with front_with(backend) as front, client_of(front) as client:
        with pytest.raises(error, match="because") as caught:
            await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert caught.value.code == code


async def test_it_raises_an_error_in_mid_answer() -> None:
    backend = Scripted([TextDelta("to "), Failure("engine_error", "broken")])
    async with front_with(backend) as front, client_of(front) as client:
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        texts: list[str | None] = []

        async def read() -> None:
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content)  # noqa: PERF401 - it may raise

        with pytest.raises(openai.APIError, match="broken"):
            await read()
    assert texts == ["", "to "]


class OneKey:
    """An `Admission` that knows one key."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def principal(self, key: str) -> Principal:
        if key != "k":
            raise RequestError("unauthorized", "no such key")
        return Principal("alice")

    def named(self, name: str) -> Principal:
        return Principal(name)

    def admit(self, principal: Principal, body_bytes: int) -> None:
        self.bytes.append(body_bytes)

    def ended(self, principal: Principal, answer_bytes: int) -> None:
        self.bytes.append(answer_bytes)


async def test_its_key_lets_it_in() -> None:
    gate: Any = OneKey()
    async with front_with(EchoBackend(1000), gate=gate) as front, client_of(front) as client:
        answer = await client.chat.completions.create(model="echo", messages=MESSAGES)
        assert answer.choices[0].message.content == "to be or not to be"
        for key in ("wrong", "é" * 200):
            response = await front.http.post(
                "/v1/chat/completions",
                content=b"{",
                headers={"Authorization": f"Bearer {key}".encode()},
            )
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/v1/models/echo", "/v1/files"):
            assert (await front.http.get(path)).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
    assert len(gate.bytes) == 2
