"""Prompts are warm in a new engine process: after an orderly end, and after a killed one."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import engine_child
import pytest
from tiny_model import reference_text, tiny_loaded

from eloquent.core.events import TextDelta
from eloquent.errors import ConfigurationError
from eloquent_server.backends.base import Finish
from eloquent_server.chat import ChatMessage, ChatRequest
from eloquent_server.engine.client import EngineClient, EngineOptions
from eloquent_server.engine.prompt import PromptEncoder
from eloquent_server.engine.settings import KvOptions

DEADLINE_S = 120.0
"Ends a hang; decides nothing."
REQUEST = ChatRequest(
    messages=(ChatMessage("user", "a question of some length, " * 4),), temperature=0, max_tokens=20
)
PROMPT = PromptEncoder(tiny_loaded().tokenizer).encode(REQUEST.messages)
BLOCKS = (len(PROMPT) - 1) // 16


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[EngineClient]:
    options = EngineOptions("tiny", kv=KvOptions(directory=str(directory), disk_bytes=1 << 26))
    async with asyncio.timeout(DEADLINE_S):
        client = await EngineClient.start(options, command=engine_child.COMMAND)
        try:
            yield client
        finally:
            await client.close()


async def answer(client: EngineClient) -> tuple[str, int]:
    events = [event async for event in client.submit(REQUEST, seed=0)]
    end = events[-1]
    assert isinstance(end, Finish)
    return "".join(e.text for e in events if isinstance(e, TextDelta)), end.cached_tokens


def blocks_in(directory: Path) -> int:
    return len(list((directory / "raw").glob("*.kv")))


@pytest.mark.parametrize("killed", [False, True])
async def test_warm_after_a_restart(tmp_path: Path, killed: bool) -> None:
    expected = reference_text(PROMPT, 20)
    async with running(tmp_path) as client:
        assert await answer(client) == (expected, 0)
        if killed:
            while blocks_in(tmp_path) < BLOCKS:  # noqa: ASYNC110 (the files have no event)
                await asyncio.sleep(0.01)
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
    assert blocks_in(tmp_path) >= BLOCKS
    async with running(tmp_path) as client:
        assert await answer(client) == (expected, BLOCKS * 16)
        assert (await client.stats())["restored_tokens"] == BLOCKS * 16


async def test_a_directory_that_cannot_be_had_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigurationError, match="taken"):
        async with running(tmp_path / "taken"):
            pass
