"""What a request says of sampling reaches the engine's process, and what it asks for comes back."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import engine_child
import pytest
import pytest_asyncio

from eloquent.core.events import Logprobs, TextDelta
from eloquent.core.log import TokenLog
from eloquent.errors import RequestError
from eloquent_server.backends.base import BackendEvent, Continuation, Finish
from eloquent_server.backends.local import LocalBackend
from eloquent_server.engine.client import EngineClient, EngineOptions

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
STRICT = {**SCHEMA, "additionalProperties": False}


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="backend")
async def _backend() -> AsyncIterator[LocalBackend]:
    async with asyncio.timeout(120):
        client = await EngineClient.start(EngineOptions("tiny"), command=engine_child.COMMAND)
    backend = LocalBackend(client)
    yield backend
    await backend.close()


async def answer(backend: LocalBackend, **fields: Any) -> list[BackendEvent]:
    body = {"messages": [{"role": "user", "content": "hi"}], "seed": 3, **fields}
    async with asyncio.timeout(120):
        return [
            event
            async for event in backend.generate(json.dumps(body).encode())
            if not isinstance(event, Continuation)
        ]


def text_of(events: list[BackendEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def test_a_schema_is_kept(backend: LocalBackend) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": STRICT}}
    events = await answer(backend, response_format=wanted, temperature=1.2)
    assert json.loads(text_of(events))["ok"] in (True, False)
    assert isinstance(events[-1], Finish)
    assert events[-1].reason == "stop"


async def test_a_wrong_schema_is_refused(backend: LocalBackend) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}
    with pytest.raises(RequestError, match="cannot be used") as caught:
        await answer(backend, response_format=wrong)
    assert caught.value.code == "invalid_request"


async def test_a_bias_against_a_token_that_is_not_there_is_refused(backend: LocalBackend) -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        await answer(backend, logit_bias={"100000": 1})


async def test_logprobs_come_beside_the_text_and_fit_a_log(backend: LocalBackend) -> None:
    events = await answer(backend, logprobs=True, top_logprobs=3, max_tokens=20, temperature=0)
    reports = [each for event in events if isinstance(event, Logprobs) for each in event.tokens]
    assert reports
    assert all(len(each.top) == 3 and each.logprob <= 0 for each in reports)
    said = b"".join(each.token for each in reports).decode(errors="ignore")
    # A random model says bytes that are no characters; they are so marked in the text.
    assert said == text_of(events).replace("\ufffd", "")
    log = TokenLog()
    for event in events:
        if not isinstance(event, Finish):
            log.append(event)
    assert log.written > len(text_of(events))


async def test_a_stop_string_of_the_answer_itself(backend: LocalBackend) -> None:
    whole = text_of(await answer(backend, max_tokens=40, temperature=0))
    stop = whole[len(whole) // 2 :][:3]
    events = await answer(backend, max_tokens=40, temperature=0, stop=stop)
    assert text_of(events) == whole[: whole.index(stop)]
    assert isinstance(events[-1], Finish)
    assert events[-1].reason == "stop"


async def test_a_bias_and_a_seed_change_the_answer(backend: LocalBackend) -> None:
    options = {"temperature": 1.5, "max_tokens": 20}
    first = text_of(await answer(backend, **options))
    assert text_of(await answer(backend, **options)) == first
    assert text_of(await answer(backend, **options, seed=4)) != first
    assert text_of(await answer(backend, **options, logit_bias={"64": 100})) == "a" * 20
