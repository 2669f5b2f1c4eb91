"""`eloquent serve` killed in mid-answer: it goes on where it was, and its reader sees a pause."""

import asyncio
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from processes import is_alive
from serving import DEADLINE_S, Serving, serving, tiny_model_in
from tiny_model import tiny_tokenizer

from eloquent_client import Client, PromptTokensDetails

ANSWER_TOKENS = 700
KILLS = 3
SEED = 20261122


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk."""
    return tiny_model_in(tmp_path_factory.mktemp("model"))


async def whole_answer(client: Client, body: dict[str, Any]) -> tuple[str, Any]:
    async with client.stream(**body) as stream:
        message = await stream.get_final_message()
        return message.text, message.usage


async def answer_with_kills(
    server: Serving, client: Client, body: dict[str, Any], at_chars: list[int]
) -> tuple[str, Any]:
    text = ""
    async with client.stream(**body) as stream:
        async for piece in stream.text_stream:
            text += piece
            if at_chars and len(text) >= at_chars[0]:
                at_chars.pop(0)
                await server.kill()
                await server.start()
        message = await stream.get_final_message()
        assert message.text == text
        return text, message.usage


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.2, "seed": 5}], ids=["greedy", "sampled"]
)
async def test_the_answer_of_a_server_that_is_killed_is_the_undisturbed_one(
    model: Path, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "Go on and on"}]
    # A random model ends its answer at random.
    no_end = {str(tiny_tokenizer().eos_token_id): -100}
    body = {"messages": messages, "max_tokens": ANSWER_TOKENS, "logit_bias": no_end, **sampling}
    async with serving(str(model), tmp_path) as server, Client(server.url) as client:
        text, usage = await whole_answer(client, body)
        assert usage.completion_tokens == ANSWER_TOKENS
        at_chars = sorted(random.Random(SEED).sample(range(1, len(text) // 2), KILLS))
        moments = list(at_chars)
        disturbed, its_usage = await answer_with_kills(server, client, body, at_chars)
        assert not at_chars, f"the answer came before it was killed at {moments}, seed {SEED}"
        assert disturbed == text, f"killed at {moments}, seed {SEED}"
        # What was cached when the answer began, whatever the servers after that one had to do.
        cached = (usage.prompt_tokens - 1) // 16 * 16
        assert cached > 0
        assert usage.prompt_tokens_details.cached_tokens == 0
        assert its_usage == dataclasses.replace(
            usage, prompt_tokens_details=PromptTokensDetails(cached)
        )
        assert server.log.count("goes on where it was cut off") >= 1


async def test_a_server_that_is_killed_says_the_rest_of_an_echo(tmp_path: Path) -> None:
    words = " ".join(f"word-{i}" for i in range(120))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": words}]}
    async with serving("echo", tmp_path) as server, Client(server.url) as client:
        text, usage = await answer_with_kills(server, client, body, [1, 300, 500])
        assert (text, usage.completion_tokens) == (words, 120)


async def test_an_answer_goes_on_though_nobody_reads_it(tmp_path: Path) -> None:
    words = " ".join(f"word-{i}" for i in range(60))
    async with serving("echo", tmp_path) as server, Client(server.url) as client:
        async with asyncio.timeout(DEADLINE_S):
            stream = client.stream([{"role": "user", "content": words}])
            async with stream:
                await anext(stream.text_stream)
                await server.kill()
                token = stream.token
                await client.close()
        await server.start()
        while "ended: stop" not in server.log:  # noqa: ASYNC110 (another process writes it)
            await asyncio.sleep(0.05)
        async with Client(server.url) as other, other.resume(token, offset=0) as resumed:
            assert (await resumed.get_final_message()).text == words


async def test_ctrl_c_is_for_the_server_which_ends_the_engine_in_order(
    model: Path, tmp_path: Path
) -> None:
    async with serving(str(model), tmp_path) as server, Client(server.url) as client:
        async with client.stream([{"role": "user", "content": "Go on"}], temperature=0) as stream:
            await anext(stream.text_stream)
            (engine,) = server.engines
            assert await server.interrupt() == 0
            assert not is_alive(engine)
        assert "Traceback" not in server.log
        assert "was ended by" not in server.log
