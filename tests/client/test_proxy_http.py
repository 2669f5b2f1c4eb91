"""`eloquent proxy` as a process: what reaches it over HTTP, and how it begins and ends."""

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from loopback import DEADLINE_S, HOST, Hanging, StartServer, saying

from eloquent.core.events import TextDelta
from eloquent.core.wire import MAX_REQUEST_BODY_BYTES
from eloquent_server.turns import Turn
from tests.client.test_proxy import ASKED, said

CHAT = "/chat/completions"


class Proxy:
    """A running `eloquent proxy`."""

    def __init__(self, process: Process, base: str) -> None:
        self.process = process
        self.base = base

    def http(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self.base)


async def start(*arguments: str, **options: Any) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "eloquent", "proxy", *arguments, stdout=PIPE, stderr=PIPE, **options
    )


@asynccontextmanager
async def proxy(*arguments: str, **options: Any) -> AsyncIterator[Proxy]:
    process = await start("--port", "0", *arguments, **options)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = (await process.stdout.readline()).decode()
            assert line.startswith("LISTENING http://"), line
            yield Proxy(process, line.removeprefix("LISTENING ").strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def refused(*arguments: str, **options: Any) -> str:
    process = await start(*arguments, **options)
    try:
        async with asyncio.timeout(DEADLINE_S):
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 1
    return errors.decode()


async def exchanged(base: str, request: bytes) -> bytes:
    """Return what the proxy answers to these bytes, up to its end of the connection."""
    url = httpx2.URL(base)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(request)
    reply = await reader.read()
    writer.close()
    await writer.wait_closed()
    return reply


def asking(host: str, *headers: str) -> bytes:
    body = json.dumps(ASKED)
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", "Connection: close", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", body]).encode()


async def curl(base: str, question: str = "Hello") -> Process:
    body = json.dumps(ASKED | {"messages": [{"role": "user", "content": question}]})
    return await asyncio.create_subprocess_exec(
        "curl", "-sN", f"{base}{CHAT}", "-d", body, stdout=PIPE
    )


async def test_curl_gets_each_piece_as_it_comes(start_server: StartServer) -> None:
    more = asyncio.Event()

    async def handle(turn: Turn) -> None:
        turn.append(TextDelta("one "))
        await more.wait()
        turn.append(TextDelta("two"))
        turn.close("stop", model="told", prompt_tokens=1, completion_tokens=2)

    server = await start_server(handle)
    async with proxy("--url", str(server.url)) as running:
        asked = await curl(running.base)
        assert asked.stdout is not None
        got = b""
        while b"one " not in got:
            got += await asked.stdout.readline()
        more.set()
        rest, _ = await asked.communicate()
    events = said((got + rest).decode())
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert ("".join(deltas), events[-1]) == ("one two", "[DONE]")


@pytest.mark.parametrize("text", ["And then", None])
async def test_a_program_that_is_gone_cancels(start_server: StartServer, text: str | None) -> None:
    hanging = Hanging(text)
    server = await start_server(hanging)
    async with proxy("--url", str(server.url)) as running:
        asked = await curl(running.base)
        await hanging.asked.wait()
        asked.kill()
        await asked.communicate()
        await hanging.cancelled.wait()
        async with running.http() as http:
            assert (await http.get("/models")).status_code == 200


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("evil.example", "misdirected"),
        ("evil.example:{port}", "misdirected"),
        ("", "misdirected"),
        ("127.0.0.1:{port}\r\nOrigin: http://evil.example", "forbidden"),
        ("127.0.0.1:{port}\r\nOrigin: null", "forbidden"),
        ("127.0.0.1:{port}\r\nOrigin: http://[::1", "forbidden"),
        ("[::1", "misdirected"),
    ],
)
async def test_web_pages_are_kept_out(start_server: StartServer, line: str, code: str) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    async with proxy("--url", str(server.url)) as running:
        port = httpx2.URL(running.base).port
        reply = await exchanged(running.base, asking(line.format(port=port)))
    assert reply.startswith((b"HTTP/1.1 421", b"HTTP/1.1 403"))
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == code
    assert b"access-control" not in reply.lower()
    assert not hanging.asked.is_set()


async def test_names_of_this_machine_are_let_in(start_server: StartServer) -> None:
    server = await start_server(saying("yes"))
    async with proxy("--url", str(server.url)) as running:
        port = httpx2.URL(running.base).port
        for host in ["localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", "[::1]:80"]:
            reply = await exchanged(running.base, asking(host))
            assert reply.startswith(b"HTTP/1.1 200")
        own = f"127.0.0.1:{port}"
        assert b" 200 " in await exchanged(running.base, asking(own, f"Origin: http://{own}"))


async def test_a_body_that_is_too_large_is_refused(start_server: StartServer) -> None:
    server = await start_server(saying("yes"))
    async with proxy("--url", str(server.url)) as running, running.http() as http:
        for size in [MAX_REQUEST_BODY_BYTES + 1, 10 * MAX_REQUEST_BODY_BYTES]:
            reply = await http.post(CHAT, content=b"x" * size)
            assert reply.status_code == 413
        assert (await http.post(CHAT, json=ASKED)).status_code == 200


async def test_ctrl_c_tells_programs_and_ends_it(start_server: StartServer) -> None:
    hanging = Hanging()
    server = await start_server(hanging)
    async with proxy("--url", str(server.url)) as running:
        asked = await curl(running.base)
        await hanging.asked.wait()
        assert asked.stdout is not None
        got = b""
        while b"And then" not in got:
            got += await asked.stdout.readline()
        running.process.send_signal(signal.SIGINT)
        rest, _ = await asked.communicate()
        await hanging.cancelled.wait()
        _, errors = await running.process.communicate()
    assert running.process.returncode == 0
    assert [event["error"]["code"] for event in said(rest.decode())] == ["unavailable"]
    assert b"Traceback" not in errors
    assert b"OPENAI_BASE_URL=http://127.0.0.1:" in errors


async def test_a_key_from_the_environment_is_used(start_server: StartServer) -> None:
    keys: list[str] = []

    async def handle(turn: Turn) -> None:
        keys.append(turn.request.key)
        await saying("yes")(turn)

    server = await start_server(handle)
    arguments = ("--url", str(server.url), "--key-env", "MY_KEY")
    environment = os.environ | {"MY_KEY": "mine\n"}
    async with proxy(*arguments, env=environment) as running, running.http() as http:
        await http.post(CHAT, json=ASKED, headers={"Authorization": "Bearer another"})
    assert keys == ["mine"]
    assert "MY_KEY is not set" in await refused(*arguments)
    environment["MY_KEY"] = "x" * 300
    assert "300 bytes, and 256 are allowed" in await refused(*arguments, env=environment)


async def test_without_a_url_it_starts_a_server() -> None:
    async with proxy("--model", "echo") as running, running.http() as http:
        reply = await http.post(CHAT, json=ASKED)
        assert said(reply.text)[-1] == "[DONE]"
        running.process.send_signal(signal.SIGINT)
        _, errors = await running.process.communicate()
    assert running.process.returncode == 0
    assert b"Traceback" not in errors


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


async def test_it_ends_with_the_server_that_it_started() -> None:
    async with proxy("--model", "echo") as running:
        server = child_of(running.process.pid)
        asked = await curl(running.base, "some twenty seconds of words " * 200)
        assert asked.stdout is not None
        while b"twenty" not in await asked.stdout.readline():
            pass
        os.kill(server, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            rest, _ = await asked.communicate()
            _, errors = await running.process.communicate()
    assert said(rest.decode())[-1]["error"]["code"] == "unavailable"
    assert running.process.returncode == 1
    assert (
        errors.decode()
        .splitlines()[-1]
        .startswith("eloquent: The server started on this machine ended with exit code -9")
    )


async def test_what_it_cannot_do_it_says() -> None:
    url = f"eloquent://{HOST}:9"
    with socket.create_server((HOST, 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "another port" in await refused("--url", url, "--port", port)
    assert "--allow-remote" in await refused("--url", url, "--host", "0.0.0.0")
    assert "--model is for a server" in await refused("--url", url, "--model", "echo")
    assert "no port" in await refused("--url", url, "--port", "65536")
    assert "no server URL" in await refused("--url", "http://here")
    assert "--grace" in await refused("--url", url, "--grace", "0")


async def test_other_machines_only_if_they_are_allowed(start_server: StartServer) -> None:
    server = await start_server(saying("yes"))
    async with proxy("--url", str(server.url), "--host", "0.0.0.0", "--allow-remote") as running:
        base = running.base.replace("0.0.0.0", HOST)
        assert (await exchanged(base, asking("any.example"))).startswith(b"HTTP/1.1 200")
