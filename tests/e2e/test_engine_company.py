"""The embedded model's greedy answers are those of turns alone, whatever happens around them."""

import asyncio
import os
import signal
from pathlib import Path

from tiny_model import Sink

from eloquent.core.events import Failure
from eloquent_server import models
from eloquent_server.backends.base import Tenant
from eloquent_server.chat import ChatMessage, ChatRequest
from eloquent_server.engine.client import EngineClient, EngineOptions
from eloquent_server.engine.client_turn import EngineTurn
from eloquent_server.engine.engine import Engine
from eloquent_server.engine.loader import load
from eloquent_server.engine.prompt import PromptEncoder
from eloquent_server.engine.settings import KvOptions
from eloquent_server.engine.turn import TurnRequest

DEADLINE_S = 400.0
"Ends a hang; decides nothing."
TOKENS = 32
GUIDE = " ".join(f"Rule {i}: name what you know of it, and be brief." for i in range(16))
QUESTIONS = [
    "Why is the sky blue?",
    "Count from one to ten.",
    "Write two sentences about 東京.",
    "What is the capital of France?",
    "Say hello 👋 and goodbye 👋.",
    "Name three rivers.",
]


def asked(question: str) -> ChatRequest:
    messages = (ChatMessage("system", GUIDE), ChatMessage("user", question))
    return ChatRequest(messages=messages, temperature=0, max_tokens=TOKENS)


def alone(model: models.ModelSource) -> list[list[int]]:
    """Answer each question by itself: one row, nothing shared, no guesses."""
    loaded = load(model.path, model.name, device="cpu", precision="fp32")
    engine = Engine(loaded, max_running=1, prefix_cache=False)
    encoder = PromptEncoder(loaded.tokenizer)
    found = []
    for question in QUESTIONS:
        sink = Sink()
        prompt = encoder.encode(asked(question).messages)
        engine.submit(TurnRequest(prompt=prompt, seed=0, temperature=0, max_tokens=TOKENS), sink)
        assert not isinstance(sink.end(), Failure)
        found.append(sink.tokens)
    engine.close()
    return found


async def wait_for(turn: EngineTurn, tokens: int) -> None:
    while len(turn.generated) < tokens:  # noqa: ASYNC110 (only the events wake it)
        await asyncio.sleep(0.01)


async def finish(turns: list[EngineTurn]) -> None:
    for turn in turns:
        assert not isinstance([event async for event in turn][-1], Failure)


async def test_answers_are_those_of_turns_alone(
    tmp_path: Path, embedded_model: models.ModelSource
) -> None:
    expected = await asyncio.to_thread(alone, embedded_model)
    kv = KvOptions(memory_bytes=44 << 20, directory=str(tmp_path), disk_bytes=1 << 30)
    options = EngineOptions(embedded_model.name, "cpu", "fp32", max_running=3, kv=kv)
    async with asyncio.timeout(DEADLINE_S):
        client = await EngineClient.start(options)
        first = [client.submit(asked(question), seed=0) for question in QUESTIONS]
        other = client.submit(asked(QUESTIONS[0]), seed=0, tenant=Tenant("another"))
        await wait_for(first[0], 4)
        first[0].hint(60.0)  # It has much to read and others wait: it gives up its row.
        await finish([*first, other])
        before = await client.stats()
        second = [client.submit(asked(question), seed=0) for question in QUESTIONS]
        await wait_for(second[1], 5)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await finish(second)
        after = await client.stats()
        assert client.restarts == 1
        await client.close()
    assert before["cached_tokens"] > 0
    assert before["preemptions"] > 0
    assert before["evicted_blocks"] > 0
    assert after["restored_tokens"] > 0, "from the disk, by the second process"
    for turns in (first, [other], second):
        for turn, tokens in zip(turns, expected, strict=False):
            assert list(turn.generated) == tokens
