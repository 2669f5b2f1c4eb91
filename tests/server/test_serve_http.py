"""`eloquent serve --http` and --cert: a real process, from outside."""

import asyncio
import dataclasses
import json
import signal
import socket
import ssl
from pathlib import Path

import httpx2
import pytest
from authority import Authority
from redis_server import RedisServer
from server_process import DEADLINE_S, ServerProcess, server_process
from tools import needs_tool

from eloquent.core.events import TextDelta
from eloquent.errors import ConfigurationError, EloquentError
from eloquent.quic.connect import connect as connect_quic
from eloquent.session.session import Connector, Session
from eloquent.url import ServerUrl
from eloquent.websocket.client import connect as connect_websocket
from eloquent_server.front import NOT_STORING, address_of, is_for_others, url_of_front
from eloquent_server.serve import HTTP_PREFIX

HOST = "127.0.0.1"
LONG = " ".join(f"word{number}" for number in range(3000))
"A minute of the echo backend."


def chat(text: str, **more: object) -> dict[str, object]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **more}


def client(url: str, trusted: Path | None = None) -> httpx2.AsyncClient:
    verify = ssl.create_default_context(cafile=trusted) if trusted is not None else True
    return httpx2.AsyncClient(base_url=url, timeout=DEADLINE_S, verify=verify)


async def front_of(server: ServerProcess) -> str:
    prefix, _, url = (await server.line()).partition(" ")
    assert prefix == HTTP_PREFIX
    return url


async def said_back(url: ServerUrl, connector: Connector) -> str:
    session = Session(url, connector=connector)
    try:
        async with asyncio.timeout(DEADLINE_S):
            events = [event async for event in session.ask(json.dumps(chat("hello")).encode())]
    finally:
        await session.close()
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def test_it_answers_over_http_beside_quic(tmp_path: Path) -> None:
    async with server_process(tmp_path, "--http", "0") as server:
        async with client(await front_of(server)) as http:
            assert (await http.get("/ready")).status_code == 200
            answer = (await http.post("/v1/chat/completions", json=chat("hello"))).json()
            assert answer["choices"][0]["message"]["content"] == "hello"
            assert await said_back(server.url, connect_quic) == "hello"
            metrics = (await http.get("/metrics")).text
            assert 'vllm:request_success_total{engine="0",finished_reason="stop"' in metrics
        server.signal(signal.SIGTERM)
        assert await server.wait() == 0


async def test_two_colons_are_all_addresses_of_both_families(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("there is no IPv6 here")
    options = ("--host", "::", "--http", "[::]:0", "--dev-cert")
    async with server_process(tmp_path, *options) as server:
        port = (await front_of(server)).rpartition(":")[2]
        for host in (HOST, "::1"):
            url = dataclasses.replace(server.url, host=host)
            assert await said_back(url, connect_quic) == "hello"
            assert await said_back(url, connect_websocket) == "hello"
            shown = f"[{host}]" if ":" in host else host
            async with client(f"http://{shown}:{port}") as http:
                assert (await http.get("/health")).status_code == 200


async def test_while_it_stops_it_is_not_ready_and_says_so_over_http(tmp_path: Path) -> None:
    options = ("--http", "0", "--log-level", "info")
    async with (
        server_process(tmp_path, *options) as server,
        client(await front_of(server)) as http,
        http.stream("POST", "/v1/chat/completions", json=chat(LONG, stream=True)) as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        server.signal(signal.SIGTERM)
        await server.says("stopping: 1 turns under way")
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 503
        refused = await http.post("/v1/chat/completions", json=chat("hello"))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["Retry-After"]) > 0
        server.signal(signal.SIGINT)
        rest = [line async for line in lines]
        assert any("error" in line for line in rest)
        assert await server.wait() == 0


async def when_ready_is(http: httpx2.AsyncClient, status: int) -> httpx2.Response:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            response = await http.get("/ready")
            if response.status_code == status:
                return response
            await asyncio.sleep(0.1)


@needs_tool("redis-server")
async def test_it_is_ready_while_turns_can_be_stored(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    redis.start()
    try:
        async with (
            server_process(tmp_path, "--http", "0", "--store", redis.url) as server,
            client(await front_of(server)) as http,
        ):
            assert (await http.get("/ready")).status_code == 200
            redis.stop()
            response = await when_ready_is(http, 503)
            assert response.json()["error"]["message"] == NOT_STORING
            await server.says(f"Not ready: {redis.url} cannot be reached")
            assert (await http.get("/health")).status_code == 200
            redis.start()
            await when_ready_is(http, 200)
    finally:
        redis.stop()


async def test_a_certificate_from_files_needs_no_pin_and_is_read_anew_on_a_hangup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority()
    trusted = authority.write(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    cert, key = authority.issue("localhost", HOST).write(tmp_path)
    options = ("--host", HOST, "--cert", str(cert), "--cert-key", str(key))
    log = ("--log-level", "info")
    async with server_process(tmp_path, *options, *log, "--http", "0.0.0.0:0") as server:
        assert server.url == ServerUrl(HOST, server.url.port)
        url = (await front_of(server)).replace("0.0.0.0", HOST)
        assert url.startswith("https://")
        async with client(url, trusted) as http:
            assert (await http.get("/ready")).status_code == 200
        assert await said_back(server.url, connect_quic) == "hello"
        stranger = Authority().issue(HOST)
        stranger.write(tmp_path)
        server.signal(signal.SIGHUP)
        await server.says("was read anew")
        for connector in (connect_quic, connect_websocket):
            with pytest.raises(EloquentError):
                await said_back(server.url, connector)
        async with client(url, trusted) as http:
            with pytest.raises(httpx2.ConnectError, match="certificate"):
                await http.get("/ready")
        cert.write_text("broken")
        server.signal(signal.SIGHUP)
        await server.says("The certificate stays what it was")
        server.signal(signal.SIGTERM)
        assert await server.wait() == 0


async def test_before_engines_it_passes_on_what_is_no_chat(tmp_path: Path) -> None:
    """The engine is another server of ours."""
    (tmp_path / "engine").mkdir()
    async with server_process(tmp_path / "engine", "--http", "0") as engine:
        behind = await front_of(engine)
        options = ("--upstream", behind, "--http", "0")
        async with (
            server_process(tmp_path, *options) as server,
            client(await front_of(server)) as http,
        ):
            assert await said_back(server.url, connect_quic) == "hello"
            answer = await http.post("/v1/embeddings", json={"model": "echo", "input": "hello"})
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "not_found"
            metrics = (await http.get("/metrics")).text
            assert 'vllm:request_success_total{engine="0",finished_reason="stop"' in metrics
    async with client(behind) as http:
        with pytest.raises(httpx2.ConnectError):
            await http.get("/health")


async def test_plain_http_and_no_keys_are_said_where_others_reach_it(tmp_path: Path) -> None:
    async with server_process(tmp_path, "--http", "0.0.0.0:0") as server:
        await front_of(server)
        assert "is not encrypted" in server.log
        assert "--keys" in server.log
        server.signal(signal.SIGTERM)
        assert await server.wait() == 0
    async with server_process(tmp_path, "--http", "0") as server:
        await front_of(server)
        assert server.log.count("is not encrypted") == 1, "of the run before"


@pytest.mark.parametrize(
    ("text", "address", "url", "is_reached"),
    [
        ("8080", (HOST, 8080), "http://127.0.0.1:7", False),
        (":8080", (HOST, 8080), "http://127.0.0.1:7", False),
        ("localhost:80", ("localhost", 80), "http://localhost:7", False),
        ("0.0.0.0:0", ("0.0.0.0", 0), "http://0.0.0.0:7", True),
        ("[::1]:80", ("::1", 80), "http://[::1]:7", False),
        ("[::]:80", ("::", 80), "http://[::]:7", True),
    ],
)
def test_addresses(text: str, address: tuple[str, int], url: str, is_reached: bool) -> None:
    assert address_of(text) == address
    assert url_of_front(text, 7, is_tls=False) == url
    assert url_of_front(text, 7, is_tls=True) == url.replace("http", "https")
    assert is_for_others(text) is is_reached


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "localhost:",
        "80:http",
        "0.0.0.0:65536",
        "-1",
        pytest.param("9" * 5000, id="9s"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no address for --http"):
        address_of(text)
