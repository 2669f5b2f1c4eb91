"""The engine's process: it answers, it dies and comes back, and it never outlives the server."""

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import engine_child
import pytest
from processes import children, is_alive, is_gone
from tiny_model import CONTEXT_TOKENS, reference_text, tiny_loaded

from eloquent.core.events import Failure, TextDelta
from eloquent.errors import ConfigurationError, RequestError
from eloquent_server.backends.base import Finish, Tenant
from eloquent_server.chat import ChatMessage, ChatRequest
from eloquent_server.engine.child import Child
from eloquent_server.engine.client import EngineClient, EngineOptions
from eloquent_server.engine.client_turn import EngineTurn
from eloquent_server.engine.prompt import PromptEncoder
from eloquent_server.engine.turn import EngineEvent, Tokens

TOKENS = 60
SEED = 5
DEADLINE_S = 120.0
"Ends a hang; decides nothing."


def ask(text: str, **options: Any) -> ChatRequest:
    options = {"temperature": 0, "max_tokens": TOKENS, **options}
    return ChatRequest(messages=(ChatMessage("user", text),), **options)


def expected(request: ChatRequest) -> str:
    prompt = PromptEncoder(tiny_loaded().tokenizer).encode(request.messages)
    assert request.max_tokens is not None
    return reference_text(prompt, request.max_tokens)


@asynccontextmanager
async def running(model: str, **options: Any) -> AsyncIterator[EngineClient]:
    async with asyncio.timeout(DEADLINE_S):
        client = await EngineClient.start(
            EngineOptions(model, **options), command=engine_child.COMMAND
        )
        try:
            yield client
        finally:
            await client.close()
        assert client.pid is None


async def collect(turn: EngineTurn) -> list[EngineEvent]:
    return [event async for event in turn]


def text_of(events: list[EngineEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def kill(client: EngineClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)


async def test_answers_refusals_cancels_and_the_end() -> None:
    async with running("slow") as client:
        assert (client.info.name, client.info.context_tokens) == ("tiny", CONTEXT_TOKENS)
        assert client.pid is not None
        assert os.getsid(client.pid) != os.getsid(0), "a Ctrl-C would reach it"
        requests = [ask(f"question {i} " * (i % 3)) for i in range(6)]
        turns = [client.submit(request, seed=1) for request in requests]
        too_long = client.submit(ask("x" * CONTEXT_TOKENS), seed=1)
        unwanted = [client.submit(ask(f"unwanted {i}"), seed=1) for i in range(6)]
        with pytest.raises(RequestError) as caught:
            await collect(too_long)
        assert caught.value.code == "prompt_too_long"
        for turn in unwanted:
            turn.cancel()
        for request, turn in zip(requests, turns, strict=True):
            events = await collect(turn)
            assert text_of(events) == expected(request)
            assert isinstance(events[-1], Finish)
            tokens = [event for event in events if isinstance(event, Tokens)]
            assert [id_ for event in tokens for id_ in event.ids] == turn.generated
            assert len(turn.generated) == events[-1].completion_tokens
        stats = await client.stats()
        assert (stats["running"], stats["waiting"]) == (0, 0)
        cut_off = client.submit(ask("the last one"), seed=1)
        waiting = asyncio.ensure_future(collect(cut_off))
        while not cut_off.generated:  # noqa: ASYNC110 (only the events wake it)
            await asyncio.sleep(0.01)
        pid = client.pid
        await client.close()
        end = (await waiting)[-1]
        assert isinstance(end, Failure)
        assert end.code == "unavailable"
        assert not is_alive(pid)
        with pytest.raises(RequestError) as caught:
            client.submit(ask("too late"), seed=1)
        assert caught.value.code == "unavailable"
        assert client.restarts == 0


async def test_turns_go_on_when_the_process_is_killed_in_decode_and_in_prefill() -> None:
    async with running("slow", max_running=3) as client:
        requests = [ask(f"what of {i}?") for i in range(5)]
        turns = [client.submit(request, seed=1) for request in requests]
        answers = [asyncio.ensure_future(collect(turn)) for turn in turns]
        while len(turns[0].generated) < 7:  # noqa: ASYNC110 (only the events wake it)
            await asyncio.sleep(0.01)
        assert not turns[-1].generated, "some wait, some run"
        kill(client)
        while client.restarts == 0 or turns[0].standing.in_engine is False:  # noqa: ASYNC110
            await asyncio.sleep(0)
        kill(client)  # The turns have just been submitted again.
        for request, answer in zip(requests, answers, strict=True):
            events = await answer
            assert text_of(events) == expected(request)
            assert isinstance(events[-1], Finish)
            assert events[-1].completion_tokens == len(
                [id_ for event in events if isinstance(event, Tokens) for id_ in event.ids]
            )
        assert client.restarts == 2
        assert await client.stats()


async def test_a_process_that_is_killed_while_it_loads_is_started_again(tmp_path: Path) -> None:
    said: list[str] = []
    model = f"late:{tmp_path / 'came'}"
    client = EngineClient(
        EngineOptions(model),
        progress=lambda text, _: said.append(text),
        command=engine_child.COMMAND,
    )
    async with asyncio.timeout(DEADLINE_S):
        while not said:  # noqa: ASYNC110 (a callback without a loop)
            await asyncio.sleep(0.01)
        kill(client)
        await client.ready()
        assert client.restarts == 1
        answer = text_of(await collect(client.submit(ask("hello"), seed=1)))
        assert answer == expected(ask("hello"))
        await client.close()


async def test_a_process_that_always_dies_while_it_loads_is_given_up() -> None:
    with pytest.raises(ConfigurationError, match=r"SIGKILL.*while it loaded"):
        async with running("dies"):
            pass


async def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        await EngineClient.start(EngineOptions(str(tmp_path)))


async def test_giving_up_while_it_loads_leaves_no_process() -> None:
    client = EngineClient(EngineOptions("hangs"), command=engine_child.COMMAND)
    async with asyncio.timeout(DEADLINE_S):
        while client.pid is None:  # noqa: ASYNC110 (nothing wakes it)
            await asyncio.sleep(0)
        pid = client.pid
        await client.close()
    assert not is_alive(pid)
    with pytest.raises(ConfigurationError):
        await client.ready()


@pytest.mark.parametrize("turns_of_the_loop", range(4))
async def test_giving_up_while_it_starts_leaves_no_process(turns_of_the_loop: int) -> None:
    client = EngineClient(EngineOptions("hangs"), command=engine_child.COMMAND)
    for _ in range(turns_of_the_loop):
        await asyncio.sleep(0)
    pid = client.pid
    await asyncio.wait_for(client.close(), DEADLINE_S)
    assert pid is None or not is_alive(pid)
    assert not [command for command in children() if "engine_child" in command]


async def test_submits_and_cancels_in_any_order_leave_nothing() -> None:
    rng = random.Random(SEED)
    async with running("tiny") as client:
        turns: list[EngineTurn] = []
        for number in range(1000):
            if rng.random() < 0.3:
                await asyncio.sleep(rng.choice([0, 0.002, 0.01]))
            turns.append(client.submit(ask(f"question {number % 40}"), seed=number))
            if rng.random() < 0.95:
                turns.pop(rng.randrange(len(turns))).cancel()
        for turn in turns:
            assert isinstance((await collect(turn))[-1], Finish), f"seed {SEED}"
        stats = await client.stats()
        assert (stats["running"], stats["waiting"]) == (0, 0), f"seed {SEED}"
        assert not client._turns
        assert client.restarts == 0
        assert len([command for command in children() if "engine_child" in command]) == 1
    assert not [command for command in children() if "engine_child" in command]


async def test_a_turn_that_kills_the_engine_ends_and_takes_no_other_with_it() -> None:
    async with running("poisoned") as client:
        innocent = [ask(f"innocent {i}") for i in range(3)]
        turns = [client.submit(request, seed=1) for request in innocent]
        poison = client.submit(ask(f"Say {engine_child.POISON}"), seed=1)
        failure = (await collect(poison))[-1]
        assert isinstance(failure, Failure)
        assert (failure.code, "3 times" in failure.message) == ("engine_error", True)
        for request, turn in zip(innocent, turns, strict=True):
            assert text_of(await collect(turn)) == expected(request)
        assert client.restarts == 3


async def test_a_device_that_is_lost_costs_a_new_process_and_no_turn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(f"broken:{tmp_path / 'it-was'}") as client:
        requests = [ask(f"what of {i}?") for i in range(3)]
        turns = [client.submit(request, seed=1) for request in requests]
        for request, turn in zip(requests, turns, strict=True):
            assert text_of(await collect(turn)) == expected(request)
        assert client.restarts == 1
    assert "ended (70)" in caplog.text


async def test_a_tenant_with_many_turns_does_not_starve_one_with_few() -> None:
    async with running("slow", max_running=2) as client:
        request = ask("go on", max_tokens=20)
        heavy = [client.submit(request, seed=i, tenant=Tenant("heavy")) for i in range(10)]
        light = client.submit(request, seed=1, tenant=Tenant("light", weight=2.0))
        assert isinstance((await collect(light))[-1], Finish)
        assert sum(len(turn.generated) == 20 for turn in heavy) <= 4
        assert not heavy[-1].generated
        for turn in heavy:
            assert isinstance((await collect(turn))[-1], Finish)


SERVER = """
import asyncio, sys
import engine_child
from eloquent_server.chat import ChatMessage, ChatRequest
from eloquent_server.engine.client import EngineClient, EngineOptions

async def main():
    client = EngineClient(EngineOptions(sys.argv[1]), command=engine_child.COMMAND)
    if sys.argv[1] == "hangs":
        while client.pid is None:
            await asyncio.sleep(0.01)
    else:
        await client.ready()
        request = ChatRequest(messages=(ChatMessage("user", "go on and on"),), temperature=0)
        async for event in client.submit(request, seed=1):
            break
    print(client.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("model", ["hangs", "slow"], ids=["loading", "decoding"])
async def test_the_engine_ends_when_the_server_is_killed(model: str) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SERVER,
        model,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(engine_child.__file__).parent)},
    )
    assert server.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        pid = int(await server.stdout.readline())
        assert is_alive(pid)
        server.kill()
        await server.wait()
    assert await is_gone(pid) < 2, "much longer than it takes, and what is promised"


async def test_the_engine_ends_when_its_channel_is_closed() -> None:
    child = await Child.start(engine_child.COMMAND)
    assert is_alive(child.pid)
    assert await asyncio.wait_for(child.stop(), DEADLINE_S) == 0
