"""What is no chat goes on to the engine behind the server, and its answer back."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx2
import pytest
from http_front import DEADLINE_S, Scripted, front_with, until_true

from eloquent.errors import RequestError
from eloquent_server.admission import LOCAL, Gate, Principal
from eloquent_server.http.forwarding import Forwarded, Headers

Asked = tuple[str, str, Headers, bytes]


@dataclass
class Engine:
    """A `PassThrough` that says two things, the second when it is let go on."""

    error: RequestError | None = None
    late_error: RequestError | None = None
    asked: list[Asked] = field(default_factory=list)
    is_left: bool = False
    sent_bytes: int = 0

    def __post_init__(self) -> None:
        self.gate = asyncio.Event()

    async def forward(
        self, method: str, target: str, headers: Headers, body: bytes, who: Principal = LOCAL
    ) -> Forwarded:
        self.asked.append((method, target, headers, body))
        self.who = who
        if self.error is not None:
            raise self.error
        down = [
            ("Content-Type", "application/json"),
            ("Connection", "close, X-Hop"),
            ("X-Hop", "1"),
            ("X-Model", "m"),
            ("Transfer-Encoding", "chunked"),
            ("Set-Cookie", "a=b"),
        ]
        return Forwarded(201, down, self._say())

    async def _say(self) -> AsyncIterator[bytes]:
        try:
            yield b"one "
            await self.gate.wait()
            if self.late_error is not None:
                raise self.late_error
            yield b"two"
        finally:
            self.is_left = True


async def test_a_request_goes_on_without_what_is_not_for_the_engine() -> None:
    engine = Engine()
    engine.gate.set()
    async with front_with(Scripted(), pass_through=engine) as front:
        response = await front.http.post(
            "/v1/embeddings/a%2Db?a=1&b=%20",
            content=b"{}",
            headers={
                "Authorization": "Bearer mine",
                "Cookie": "secret",
                "Api-Key": "mine",
                "OpenAI-Organization": "mine",
                "Connection": "keep-alive, X-Own",
                "X-Own": "1",
                "X-Eloquent-Turn": "1",
                "X-Other": "2",
                "Content-Type": "application/json",
            },
        )
    ((method, target, headers, body),) = engine.asked
    assert (method, target, body) == ("POST", "/v1/embeddings/a%2Db?a=1&b=%20", b"{}")
    sent = dict(headers)
    assert (sent["x-other"], sent["content-type"]) == ("2", "application/json")
    hidden = {"authorization", "cookie", "connection", "x-own", "x-eloquent-turn", "host"}
    hidden |= {"api-key", "openai-organization"}
    assert not hidden & set(sent)
    assert (response.status_code, response.content) == (201, b"one two")
    assert response.headers["x-model"] == "m"
    assert not {"set-cookie", "x-hop"} & set(response.headers)


async def test_the_engine_hears_whose_request_it_is() -> None:
    class OneTenant(Gate):
        def principal(self, key: str) -> Principal:
            return Principal("team")

    engine = Engine()
    engine.gate.set()
    async with front_with(Scripted(), pass_through=engine, gate=OneTenant()) as front:
        assert (await front.http.get("/v1/responses/1")).status_code == 201
    assert engine.who == Principal("team")


async def test_the_answer_comes_as_it_is_made() -> None:
    engine = Engine()
    async with (
        front_with(Scripted(), pass_through=engine) as front,
        front.http.stream("GET", "/v1/responses/1") as response,
    ):
        pieces = response.aiter_bytes()
        assert await anext(pieces) == b"one "
        engine.gate.set()
        assert await anext(pieces) == b"two"


async def test_an_answer_that_nobody_waits_for_is_given_up() -> None:
    engine, gate = Engine(), Gate(max_turns=1)
    async with front_with(Scripted(), pass_through=engine, gate=gate) as front:
        async with front.http.stream("GET", "/v1/responses/1") as response:
            await anext(response.aiter_bytes())
            assert (await front.http.get("/v1/responses/1")).status_code == 503
        await until_true(lambda: engine.is_left)
        await until_true(lambda: gate.open_turns == 0)


async def test_an_engine_that_cannot_be_reached_is_said_so() -> None:
    engine, gate = Engine(RequestError("upstream_error", "not there")), Gate(max_turns=1)
    async with front_with(Scripted(), pass_through=engine, gate=gate) as front:
        response = await asyncio.wait_for(front.http.get("/v1/responses/1"), DEADLINE_S)
        assert gate.open_turns == 0
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_error"


async def test_an_answer_that_breaks_off_does_so_for_its_reader(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(late_error=RequestError("upstream_error", "gone"))
    engine.gate.set()
    async with front_with(Scripted(), pass_through=engine) as front:
        with pytest.raises(httpx2.RemoteProtocolError):
            await front.http.get("/v1/responses/1")
    assert engine.is_left
    assert "broke off: gone" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_body_that_is_too_large_does_not_go_on() -> None:
    engine = Engine()
    async with front_with(Scripted(), pass_through=engine) as front:
        response = await front.http.post("/v1/embeddings", content=bytes((1 << 20) + 1))
    assert response.status_code == 413
    assert not engine.asked


@pytest.mark.parametrize(
    "target",
    [
        "/v1/turns/00",
        "/v1/files",
        "/v1/load_lora_adapter",
        "/v1/../metrics",
        "/v1/a/%2e%2e/%2e%2e/metrics",
        "/v1/..%5cmetrics",
    ],
)
async def test_what_is_ours_or_leads_elsewhere_does_not_go_on(target: str) -> None:
    engine = Engine()
    async with front_with(Scripted(), pass_through=engine) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n"), DEADLINE_S)
        writer.close()
    assert b" 404 " in head
    assert not engine.asked
