"""An engine that is stuck, not dead: it is noticed, ended and started again, and turns go on."""

import asyncio
import os
import signal
from pathlib import Path

import engine_child
import pytest
from tiny_model import reference_text, tiny_loaded

from eloquent.core.events import TextDelta
from eloquent_server.backends.base import Finish
from eloquent_server.chat import ChatMessage, ChatRequest
from eloquent_server.engine.client import EngineClient, EngineOptions
from eloquent_server.engine.client_turn import EngineTurn
from eloquent_server.engine.prompt import PromptEncoder
from eloquent_server.engine.watchdog import CHECKS, Watchdog

DEADLINE_S = 120.0
"Ends a hang; decides nothing."
HANG_S = 4.0
TOKENS = 40


def checks(dog: Watchdog, *steps: int | None, has_work: bool = True) -> list[bool]:
    return [dog.is_stuck(has_work=has_work, steps=each) for each in steps]


def test_an_engine_that_begins_steps_is_not_stuck() -> None:
    assert not any(checks(Watchdog(), *range(100)))


def test_an_engine_without_work_is_not_stuck() -> None:
    dog = Watchdog()
    assert not any(checks(dog, *[7] * 100, has_work=False))
    assert checks(dog, *[7] * CHECKS) == [False] * (CHECKS - 1) + [True]


@pytest.mark.parametrize("answer", [7, None], ids=["same step", "no answer"])
def test_work_without_a_step_is_stuck_after_some_checks(answer: int | None) -> None:
    dog = Watchdog()
    checks(dog, 6, 7)
    assert checks(dog, *[answer] * CHECKS) == [False] * (CHECKS - 1) + [True]


def test_a_sign_of_life_starts_the_count_anew() -> None:
    dog = Watchdog()
    checks(dog, 7, *[7] * (CHECKS - 1))
    dog.on_message()
    assert checks(dog, 7) == [False]
    checks(dog, *[7] * (CHECKS - 2))
    assert checks(dog, 8, *[8] * (CHECKS - 1)) == [False] * CHECKS


def asked(client: EngineClient, count: int) -> list[tuple[str, EngineTurn]]:
    """Submit turns; return them with what they are to say."""
    found = []
    for i in range(count):
        request = ChatRequest(
            messages=(ChatMessage("user", f"what of {i}?"),), temperature=0, max_tokens=TOKENS
        )
        prompt = PromptEncoder(tiny_loaded().tokenizer).encode(request.messages)
        found.append((reference_text(prompt, TOKENS), client.submit(request, seed=1)))
    return found


async def check(turns: list[tuple[str, EngineTurn]]) -> None:
    for expected, turn in turns:
        events = [event async for event in turn]
        assert isinstance(events[-1], Finish)
        assert "".join(e.text for e in events if isinstance(e, TextDelta)) == expected


async def start(model: str) -> EngineClient:
    return await EngineClient.start(
        EngineOptions(model, hang_s=HANG_S), command=engine_child.COMMAND
    )


async def test_a_step_that_never_returns_is_a_pause_for_readers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await start(f"stuck:{tmp_path / 'it-was'}")
        first = client.pid
        await check(asked(client, 3))
        assert client.restarts >= 1
        assert client.pid != first
        await client.close()
    assert "has begun no step" in caplog.text
    assert "ended by SIGKILL" in caplog.text


async def test_a_process_that_is_stopped_is_a_pause_for_readers() -> None:
    async with asyncio.timeout(DEADLINE_S):
        client = await start("slow")
        turns = asked(client, 3)
        while len(turns[0][1].generated) < 5:  # noqa: ASYNC110 (only the events wake it)
            await asyncio.sleep(0.01)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        await check(turns)
        assert client.restarts >= 1
        await client.close()
