"""`kill -9` of the server at random moments, with a real model: answers are the undisturbed ones.

`ELOQUENT_KILLS=20 .venv/bin/pytest tests/e2e/test_kill.py -s` kills as often as the promise says,
and prints what came of it (five minutes on two cores); `ELOQUENT_SEED` chooses other moments.
"""

import asyncio
import os
import random
import subprocess
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import Serving, serving, tiny_model_in

from eloquent.core.events import Logprobs, TextDelta
from eloquent_client import Client, MessageStream
from eloquent_server import models

KILLS = int(os.environ.get("ELOQUENT_KILLS", "3"))
SEED = int(os.environ.get("ELOQUENT_SEED", "20261122"))
DEADLINE_S = 120.0 + 60.0 * KILLS
"Ends a hang; decides nothing."
TOKENS = 40
"Of an answer."
UNSURE = 1e-3
"Two tokens whose logits differ by less may change places."
STEP_S = 0.05
"A step of the engine takes some such time; the kill comes anywhere in it, or in the commit."


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and by whom it is read."""

    text: str
    parameters: dict[str, Any]
    by_new_process: bool = False
    "Its reader ends with the server; another process goes on, with the name that was kept."

    @property
    def body(self) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.text}]
        return {"messages": messages, "max_tokens": TOKENS, **self.parameters}


GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 11}
QUESTIONS = [
    Question("Why is the sky blue?", GREEDY),
    Question("Tell me a story of a lighthouse.", SAMPLED),
    Question("Name ten animals, and say something about each.", GREEDY, True),
]


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """An answer as it is without a kill."""

    text: str
    unsure_from: int | None
    "After so many characters there is a step whose two best tokens are as good as each other."

    def is_same(self, text: str) -> bool:
        return text == self.text

    def is_excused(self, text: str) -> bool:
        """Say whether `text` differs from such a step on only."""
        return self.unsure_from is not None and text.startswith(self.text[: self.unsure_from])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model if it is on this machine; else the tiny one, which is not fetched."""
    if any(each.name == models.EMBEDDED_MODEL and each.present for each in models.list_models()):
        return models.EMBEDDED_MODEL
    return str(tiny_model_in(tmp_path_factory.mktemp("model")))


async def undisturbed(client: Client, question: Question) -> Undisturbed:
    """Have a question answered, with how sure the model is of each token."""
    text, unsure_from = "", None
    body = question.body | {"logprobs": True, "top_logprobs": 2}
    async with client.stream(**body) as stream:
        async for event in stream:
            if isinstance(event, TextDelta):
                text += event.text
            elif isinstance(event, Logprobs) and unsure_from is None:
                # They come after their text, so what is before them is not all sure.
                tops = [token.top for token in event.tokens]
                if any(top[0].logprob - top[1].logprob < UNSURE for top in tops):
                    unsure_from = max(0, len(text) - sum(len(t.token) for t in event.tokens))
        message = await stream.get_final_message()
    assert message.text == text
    return Undisturbed(text, unsure_from)


async def resumed_elsewhere(server: Serving, token: str) -> str:
    """Go on with an answer, from its start, in a process of its own."""
    name = ":".join(token.split(":")[:2])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "eloquent", "resume", name, "--url", server.url),
        stdout=PIPE,
        stderr=PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode().removesuffix("\n")  # the terminal's, after the answer


async def ask_and_kill(
    server: Serving, questions: list[Question], at: int, delay_s: float
) -> list[str]:
    """Ask all, kill the server when `at` pieces have come, start it again; return the texts."""
    pieces, killing = 0, asyncio.Event()

    async def read(stream: MessageStream) -> str:
        nonlocal pieces
        text = ""
        async for piece in stream.text_stream:
            text += piece
            pieces += 1
            if pieces >= at:
                killing.set()
        killing.set()
        assert (await stream.get_final_message()).text == text
        assert (stream.stats.duplicates, stream.stats.missing) == (0, 0)
        return text

    async with Client(server.url) as lasting, Client(server.url) as passing:
        clients = [passing if question.by_new_process else lasting for question in questions]
        streams = [
            client.stream(**question.body)
            for client, question in zip(clients, questions, strict=True)
        ]
        for stream in streams:
            await stream.__aenter__()
        readings = [asyncio.ensure_future(read(stream)) for stream in streams]
        if at == 0:
            killing.set()
        await killing.wait()
        await asyncio.sleep(delay_s)
        await server.kill()
        for reading, question in zip(readings, questions, strict=True):
            if question.by_new_process:
                reading.cancel()
        await passing.close()
        await server.start()
        texts = []
        for reading, stream, question in zip(readings, streams, questions, strict=True):
            if question.by_new_process:
                texts.append(await resumed_elsewhere(server, stream.token))
            else:
                texts.append(await reading)
        for stream in streams:
            await stream.close()
    return texts


async def test_answers_of_a_server_that_is_killed_at_random_are_the_undisturbed_ones(
    model: str, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    options = ("--precision=fp32", "--device=cpu")
    async with serving(model, tmp_path, *options, deadline_s=DEADLINE_S) as server:
        async with Client(server.url) as client:
            expected = [await undisturbed(client, question) for question in QUESTIONS]
        for kill in range(KILLS):
            at, delay_s = rng.randint(0, TOKENS * len(QUESTIONS) // 2), rng.uniform(0, STEP_S)
            moment = f"kill {kill} after {at} pieces and {1e3 * delay_s:.0f} ms, seed {SEED}"
            before = server.log.count("goes on where it was cut off")
            texts = await ask_and_kill(server, QUESTIONS, at, delay_s)
            gone_on = server.log.count("goes on where it was cut off") - before
            outcomes["gone on with"] += gone_on
            for question, text, want in zip(QUESTIONS, texts, expected, strict=True):
                if want.is_same(text):
                    outcomes["exact, sampled" if question.parameters is SAMPLED else "exact"] += 1
                else:
                    assert want.is_excused(text), f"{moment}: {text!r} is not {want.text!r}"
                    outcomes["apart"] += 1
    print(f"\n{KILLS} kills of {model}, seed {SEED}: {dict(outcomes)}")  # noqa: T201
    assert outcomes["gone on with"] >= KILLS, "turns were to be cut off"


async def test_a_second_server_on_the_same_state_is_refused(tmp_path: Path) -> None:
    words = " ".join(f"word-{i}" for i in range(100))
    async with serving("echo", tmp_path) as server, Client(server.url) as client:
        async with client.stream([{"role": "user", "content": words}]) as stream:
            await anext(stream.text_stream)
            second = await asyncio.to_thread(
                subprocess.run,
                server.command,
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                check=False,
            )
            assert (second.returncode, second.stdout) == (1, "")
            assert "in use by another process, and a token store has one owner" in second.stderr
            assert "Traceback" not in second.stderr
            assert (await stream.get_final_message()).text == words
        assert server.log.count("word") == 0, "no text in logs"
