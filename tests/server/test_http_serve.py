"""The HTTP front of a server process: programs that know nothing of Eloquent, and a kill."""

import asyncio
import shutil
import signal
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import httpx2
import pytest
from http_front import Sent, read_sent
from server_process import DEADLINE_S, ServerProcess, server_process

WORDS = " ".join(f"word{number}" for number in range(60))


def chat(text: str) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], "stream": True}


async def http_of(server: ServerProcess) -> httpx2.AsyncClient:
    _, _, url = (await server.line()).partition(" ")
    return httpx2.AsyncClient(base_url=url, timeout=DEADLINE_S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_curl_streams_under_the_name_of_what_is_in_front(tmp_path: Path) -> None:
    async with server_process(tmp_path, "--http", "0", "--http-name", "chat.example") as server:
        url = (await server.line()).partition(" ")[2]
        curl = await asyncio.create_subprocess_exec(
            *("curl", "-sSN", "--fail", f"{url}/v1/chat/completions", "-H", "Host: chat.example"),
            *("-H", "Content-Type: application/json", "--data-binary", "@-"),
            stdin=PIPE,
            stdout=PIPE,
        )
        asked = httpx2.Request("POST", "http://localhost", json=chat("to be")).content
        async with asyncio.timeout(DEADLINE_S):
            out, _ = await curl.communicate(asked)
    sent = Sent()
    for line in out.decode().splitlines():
        sent.take(line)
    assert curl.returncode == 0
    assert sent.text == "to be"
    assert sent.is_done


async def test_a_stream_goes_on_after_the_server_was_killed(tmp_path: Path) -> None:
    options = ("--http", "0", "--state", str(tmp_path / "state"))
    async with (
        server_process(tmp_path, *options) as server,
        await http_of(server) as http,
        http.stream(
            "POST",
            "/v1/chat/completions",
            json=chat(WORDS),
            headers={"X-Eloquent-Resume": "true"},
        ) as response,
    ):
        turn, secret = (response.headers[f"x-eloquent-{name}"] for name in ("turn", "secret"))
        before = await read_sent(response, until=WORDS[: WORDS.index(" word9")])
        server.signal(signal.SIGKILL)
        await server.wait()
    async with (
        server_process(tmp_path, *options) as server,
        await http_of(server) as http,
        http.stream(
            "GET",
            f"/v1/turns/{turn}/events",
            headers={"X-Eloquent-Secret": secret, "Last-Event-ID": before.ids[-1]},
        ) as response,
    ):
        after = await read_sent(response)
    assert before.text + after.text == WORDS
    assert after.is_done
