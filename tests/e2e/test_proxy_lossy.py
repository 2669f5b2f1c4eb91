"""Unchanged programs through `eloquent proxy`, over a lossy link with an outage in the middle.

Real programs, processes, sockets and time: OpenAI's library and curl ask a proxy, which asks a
server through the emulator. Everything else is as a user would have it.
"""

import asyncio
import contextlib
import json
import math
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from eloquent.url import ServerUrl, parse_url
from eloquent_netem.proxy import ProxyProcess, start_proxy
from eloquent_netem.scenario import load_scenario

DEADLINE_S = 300.0
"Ends a hang; decides nothing."

SEED = 11
OUTAGE_S = (3.0, 8.0)
SCENARIO = f"""
length_s = 60
[up]
delay_ms = 25
loss = {{ kind = "independent", probability = 0.1 }}
[down]
delay_ms = 25
loss = {{ kind = "independent", probability = 0.1 }}
[[outages]]
kind = "spans"
spans_s = [[{OUTAGE_S[0]}, {OUTAGE_S[1]}]]
effect = "drop"
"""

WORDS = 600
"At the echo's 50 words a second they take 12 s."
TEXT = " ".join(f"word{number}" for number in range(WORDS))

PROGRAM = """
import json, sys
from openai import OpenAI
print("ready", flush=True)
stream = OpenAI(max_retries=0).chat.completions.create(
    model="echo",
    messages=[{"role": "user", "content": sys.stdin.read()}],
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    print(chunk.model_dump_json(exclude_unset=True), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program was told."""

    text: str
    finish_reason: str
    usage: dict[str, Any]
    ids: frozenset[str]


def answer_of(chunks: list[dict[str, Any]]) -> Answer:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return Answer(
        "".join(choice["delta"].get("content") or "" for choice in choices),
        "".join(choice["finish_reason"] or "" for choice in choices),
        chunks[-1]["usage"],
        frozenset(chunk["id"].removeprefix("chatcmpl-") for chunk in chunks),
    )


@contextlib.asynccontextmanager
async def running(*command: str, log: Path) -> AsyncIterator[tuple[Process, str]]:
    """Run one of our commands; give it, and what it listens at."""
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "eloquent", *command, stdout=PIPE, stderr=errors
        )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        assert line.startswith("LISTENING "), f"see {log}"
        yield process, line.removeprefix("LISTENING ").strip()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@contextlib.contextmanager
def lossy(server: ServerUrl, tmp_path: Path) -> Iterator[tuple[ProxyProcess, str]]:
    """Give the emulator, and the URL of the server behind it."""
    file = tmp_path / "outage.toml"
    file.write_text(SCENARIO)
    links = partial(load_scenario(str(file)).links, seed=SEED)
    target = (server.host, server.port)
    with start_proxy(links, target=target, lateness_bound_s=math.inf) as emulator:
        yield emulator, str(ServerUrl(*emulator.address, server.pin))


async def openais(base: str) -> Process:
    """Start a program with OpenAI's library, which asks as soon as it is told what."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM),
        stdin=PIPE,
        stdout=PIPE,
        env={"OPENAI_BASE_URL": base, "OPENAI_API_KEY": "none is needed"},
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


async def by_openai(process: Process) -> Answer:
    output, _ = await process.communicate(TEXT.encode())
    assert process.returncode == 0
    return answer_of([json.loads(line) for line in output.splitlines()])


async def by_curl(base: str) -> tuple[Answer, str]:
    """Return the answer, and all that curl printed."""
    body = {
        "model": "echo",
        "messages": [{"role": "user", "content": TEXT}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sN", f"{base}/chat/completions", "-H", "Content-Type: application/json"),
        *("-d", "@-"),
        stdin=PIPE,
        stdout=PIPE,
    )
    output, _ = await process.communicate(json.dumps(body).encode())
    assert process.returncode == 0
    printed = output.decode()
    *events, done = re.findall(r"^data: (.*)$", printed, re.MULTILINE)
    assert done == "[DONE]"
    return answer_of([json.loads(event) for event in events]), printed


async def test_openais_library_and_curl_over_a_lossy_link_with_an_outage(
    tmp_path: Path,
) -> None:
    serve = ("serve", "--model", "echo", "--port", "0", "--no-websocket", "--log-level", "info")
    proxy = ("proxy", "--port", "0", "--url")
    async with (
        asyncio.timeout(DEADLINE_S),
        running(*serve, "--log-format", "json", log=tmp_path / "serve") as (server, url),
    ):
        with lossy(parse_url(url), tmp_path) as (emulator, lossy_url):
            async with (
                running(*proxy, url, log=tmp_path / "direct") as (_, direct),
                running(*proxy, lossy_url, log=tmp_path / "lossy") as (_, base),
            ):
                reference, program = await openais(direct), await openais(base)
                emulator.start()
                undisturbed, library, (curl, printed) = await asyncio.gather(
                    by_openai(reference), by_openai(program), by_curl(base)
                )
                async with httpx2.AsyncClient() as http:
                    health = (await http.get(f"{base.removesuffix('/v1')}/health")).json()
        server.terminate()
        await server.wait()
    stats = emulator.stats().driver
    lost = stats.up.packets_lost + stats.down.packets_lost
    sent = stats.up.packets_sent + stats.down.packets_sent
    ends = [
        (record["turn"], record["reason"], record["completion_tokens"])
        for record in map(json.loads, (tmp_path / "serve").read_text().splitlines())
        if "reason" in record
    ]
    comments = re.findall(r"^: (.*)$", printed, re.MULTILINE)
    print(f"seed {SEED}: {lost} of {sent} packets lost; {health['link']}; {comments}; {ends}")  # noqa: T201

    assert undisturbed.text == TEXT
    for answer in (library, curl):
        assert answer.text == undisturbed.text
        assert answer.finish_reason == undisturbed.finish_reason == "stop"
        assert answer.usage == undisturbed.usage
        assert answer.usage["completion_tokens"] == WORDS
    # The server has generated each answer once, and no other.
    assert sorted(ends) == sorted(
        (turn, "stop", WORDS) for each in (undisturbed, library, curl) for turn in each.ids
    )
    assert len(ends) == 3
    # The link was what it is meant to be, and the programs waited while it was gone.
    assert lost > 0.08 * sent
    assert health["link"]["rung"] != "WebSocket"
    assert any(re.fullmatch(r"link (silent|reconnecting) at token \d+", each) for each in comments)
