"""A server that is told to stop: it takes no more, lets answers end, and does so in time."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import cycle
from pathlib import Path

import httpx2
import pytest
from server_process import DEADLINE_S, ServerProcess, server_process

from eloquent.core.events import Event, Failure, TextDelta
from eloquent.errors import RequestError
from eloquent.quic.connect import connect as connect_quic
from eloquent.session.session import Connector, Session
from eloquent.url import ServerUrl
from eloquent.websocket.client import connect as connect_websocket
from eloquent_server.admission import LOCAL, Gate
from eloquent_server.drain import MIN_RETRY_AFTER_S, ClosableGate, notify

WORDS = " ".join(f"word{number}" for number in range(200))
"Four seconds of the echo backend."
CONNECTORS = (connect_quic, connect_websocket)
LONG = " ".join(f"word{number}" for number in range(3000))
"A minute of it."


def body(text: str, **more: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], **more}).encode()


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


class Reading:
    """An answer that is being read."""

    def __init__(self, url: ServerUrl, text: str, connector: Connector) -> None:
        self._session = Session(url, connector=connector)
        self.events: list[Event] = []
        self._begun = asyncio.Event()
        self._task = asyncio.ensure_future(self._read(text))

    async def begun(self) -> None:
        """Wait for the first event."""
        async with asyncio.timeout(DEADLINE_S):
            await self._begun.wait()

    async def whole(self) -> str:
        """Wait for the end; return the text."""
        async with asyncio.timeout(DEADLINE_S):
            await self._task
        return text_of(self.events)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))
        await self._session.close()

    async def _read(self, text: str) -> None:
        async for event in self._session.ask(body(text)):
            self.events.append(event)
            self._begun.set()


@asynccontextmanager
async def reading(
    server: ServerProcess, text: str, connector: Connector = connect_quic
) -> AsyncIterator[Reading]:
    found = Reading(server.url, text, connector)
    try:
        await found.begun()
        yield found
    finally:
        await found.close()


async def refusal(url: ServerUrl, asked: bytes) -> RequestError:
    """Ask for a new turn, which is refused."""
    session = Session(url)
    try:
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(RequestError) as refused:
                async for _ in session.ask(asked):
                    pass
    finally:
        await session.close()
    return refused.value


async def test_answers_end_and_no_new_ones_begin(tmp_path: Path) -> None:
    async with server_process(tmp_path, "--log-level", "info") as server:
        async with reading(server, WORDS) as answer:
            server.signal(signal.SIGTERM)
            await server.says("stopping: 1 turns under way")
            refused = await refusal(server.url, body(WORDS))
            assert refused.code == "overloaded"
            assert refused.retry_after_s >= MIN_RETRY_AFTER_S
            assert await answer.whole() == WORDS
        assert await server.wait() == 0


async def test_an_idle_server_stops_at_once_whatever_was_asked_before(tmp_path: Path) -> None:
    async with server_process(tmp_path, "--drain-timeout", "1000000", "--http", "0") as server:
        async with reading(server, "short") as answer:
            assert await answer.whole() == "short"
        async with reading(server, LONG):
            pass  # cancelled
        assert (await refusal(server.url, b"no chat")).code == "invalid_request"
        front = (await server.line()).partition(" ")[2]
        async with httpx2.AsyncClient(base_url=front, timeout=DEADLINE_S) as http:
            url = "/v1/chat/completions"
            assert (await http.post(url, content=body("short"))).status_code == 200
            assert (await http.post(url, content=b"no chat")).status_code == 400
            async with http.stream("POST", url, content=body(LONG, stream=True)) as streamed:
                await anext(streamed.aiter_lines())
            assert (await http.post("/v1/embeddings", content=b"{}")).status_code == 404
        server.signal(signal.SIGTERM)
        assert await server.wait() == 0


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT,)]
)
async def test_a_second_signal_and_an_interrupt_stop_at_once(
    numbers: tuple[signal.Signals, ...], tmp_path: Path
) -> None:
    options = ("--drain-timeout", "1000000", "--log-level", "info")
    async with server_process(tmp_path, *options) as server, reading(server, LONG) as answer:
        *earlier, last = numbers
        for number in earlier:
            server.signal(number)
            await server.says("stopping: 1 turns under way")
        server.signal(last)
        text = await answer.whole()
        assert await server.wait() == 0
        assert text != LONG
        assert LONG.startswith(text)
        assert any(isinstance(event, Failure) for event in answer.events)


async def test_what_does_not_end_in_time_is_ended(tmp_path: Path) -> None:
    options = ("--drain-timeout", "0.2")
    async with server_process(tmp_path, *options) as server, reading(server, LONG) as answer:
        server.signal(signal.SIGTERM)
        text = await answer.whole()
        assert await server.wait() == 0
        assert text != LONG
        assert LONG.startswith(text)
        assert any(isinstance(event, Failure) for event in answer.events)
        assert "stopping with 1 turns under way" in server.log


async def test_with_a_state_directory_answers_go_on_over_restarts(tmp_path: Path) -> None:
    """Their readers come back by themselves, on either rung."""
    options = ("--state", str(tmp_path / "state"), "--drain-timeout", "0")
    texts = [f"{number} {WORDS}" for number in range(10)]
    async with AsyncExitStack() as stack:
        async with server_process(tmp_path, *options) as server:
            port = str(server.url.port)
            answers = [
                await stack.enter_async_context(reading(server, text, connector))
                for text, connector in zip(texts, cycle(CONNECTORS), strict=False)
            ]
            server.signal(signal.SIGTERM)
            assert await server.wait() == 0
        assert [text_of(answer.events) for answer in answers] != texts
        async with server_process(tmp_path, *options, "--port", port) as server:
            server.signal(signal.SIGTERM)
            assert await server.wait() == 0
        async with server_process(tmp_path, *options, "--port", port):
            assert [await answer.whole() for answer in answers] == texts


async def test_a_hangup_ends_nothing_where_there_is_nothing_to_read_again(tmp_path: Path) -> None:
    async with server_process(tmp_path) as server, reading(server, WORDS) as answer:
        server.signal(signal.SIGHUP)
        assert await answer.whole() == WORDS
        assert not server.has_ended


@pytest.fixture
def hangups_end() -> Iterator[None]:
    """Have a hangup end the processes that are started, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_end")
async def test_a_terminal_that_is_closed_ends_the_server_in_it(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    try:
        async with server_process(tmp_path, stdin=theirs) as server:
            server.signal(signal.SIGHUP)
            assert await server.wait() == -signal.SIGHUP
    finally:
        os.close(ours)
        os.close(theirs)


async def test_systemd_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(DEADLINE_S)
        async with server_process(tmp_path, environment={"NOTIFY_SOCKET": str(path)}) as server:
            assert systemd.recv(100) == b"READY=1"
            server.signal(signal.SIGTERM)
            assert await server.wait() == 0
            assert systemd.recv(100) == b"STOPPING=1"


def test_systemd_that_is_gone_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nothing"))
    notify("READY=1")
    assert "could not be told READY=1" in caplog.text
    monkeypatch.delenv("NOTIFY_SOCKET")
    caplog.clear()
    notify("READY=1")
    assert not caplog.records


def test_a_shut_gate_says_when_to_come_back() -> None:
    times = [10.0]
    gate = ClosableGate(Gate(), lambda: times[-1])
    gate.admit(gate.principal(""), 5)
    assert (gate.open_turns, gate.is_shut) == (1, False)
    gate.shut(30.0)
    for now, wait_s in ((15.0, 25.0), (39.5, MIN_RETRY_AFTER_S), (100.0, MIN_RETRY_AFTER_S)):
        times.append(now)
        with pytest.raises(RequestError) as refused:
            gate.admit(LOCAL, 5)
        assert refused.value.code == "overloaded"
        assert refused.value.retry_after_s == wait_s
    assert gate.principal("") == LOCAL, "readers of what there is come in"
    gate.ended(LOCAL, 100)
    assert (gate.open_turns, gate.is_shut) == (0, True)
