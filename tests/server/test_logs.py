"""Logs: what a line has, which turn it is about, and what it never has."""

import asyncio
import contextlib
import io
import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from secrets import token_bytes

import httpx2
import pytest
from bad_engine import Asked, BadEngine
from server_process import DEADLINE_S, server_process

from eloquent.core.events import End
from eloquent.core.wire import SECRET_BYTES, TURN_ID_BYTES, Request
from eloquent.errors import RequestError
from eloquent.quic.connect import connect as connect_quic
from eloquent.session.session import Connector, Session
from eloquent.url import ServerUrl
from eloquent.websocket.client import connect as connect_websocket
from eloquent_server.keys import entry_for, new_key
from eloquent_server.logs import (
    FIELDS,
    MOST_ALIKE,
    WINDOW_S,
    LogFormat,
    LogLevel,
    TurnClock,
    about_turn,
    configure,
    configured,
    progress,
)

NAMES = ("", "eloquent", "eloquent_server", "eloquent.websocket", "quic")
logger = logging.getLogger("eloquent_server.some")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Leave the logging of the other tests alone."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], [logging.getLogger(name).level for name in NAMES]
    for handler in handlers:
        root.removeHandler(handler)
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    for name, level in zip(NAMES, levels, strict=True):
        logging.getLogger(name).setLevel(level)


def logging_to(level: LogLevel = "info", log_format: LogFormat = "json") -> io.StringIO:
    stream = io.StringIO()
    configure(level, log_format, stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_line_of_json() -> None:
    stream = logging_to()
    logger.info("two\nlines and %d", 7, extra={FIELDS: {"tokens": 3}})
    (line,) = lines(stream)
    assert str(line.pop("time")).endswith("Z")
    assert line == {
        "level": "info",
        "logger": "eloquent_server.some",
        "message": "two\nlines and 7",
        "tokens": 3,
    }


def test_an_exception_is_in_its_line() -> None:
    stream = logging_to()
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("failed")
    (line,) = lines(stream)
    assert "ValueError: why" in str(line["exception"])


async def test_each_record_has_the_turn_in_which_it_was_made() -> None:
    stream = logging_to()

    async def handle(name: str) -> None:
        with about_turn(name):
            logger.info("begun")
            await asyncio.sleep(0)
            await asyncio.gather(work())

    async def work() -> None:
        logging.getLogger("another.library").warning("within")

    await asyncio.gather(handle("aa"), handle("bb"))
    logger.info("of none")
    said = sorted((str(line["message"]), str(line.get("turn"))) for line in lines(stream))
    assert said == [
        ("begun", "aa"),
        ("begun", "bb"),
        ("of none", "None"),
        ("within", "aa"),
        ("within", "bb"),
    ]


def test_text_has_the_turn_once() -> None:
    stream = logging_to(log_format="text")
    with about_turn("aa17"):
        logger.info("something")
        logger.info("turn aa17 ended")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("INFO eloquent_server.some: something (turn aa17)")
    assert second.endswith("turn aa17 ended")


def test_what_goes_wrong_again_and_again_does_not_fill_the_log() -> None:
    now = [100.0]
    stream = io.StringIO()
    configure("info", "json", stream, clock=lambda: now[0])
    for second in (100.0, 100.5, 101.0, 102.0):
        now[0] = second
        for number in range(1000):
            logger.error("broken %d", number)
            logger.info("went well")
        logger.warning("something else")
    said = [str(line["message"]) for line in lines(stream)]
    assert said.count("went well") == 4000
    assert said.count("something else") == 4
    assert [text for text in said if text.startswith("broken")] == [
        *(f"broken {number}" for number in range(10)),
        "broken 0 (1990 more like it were left out)",
        *(f"broken {number}" for number in range(1, 10)),
        "broken 0 (990 more like it were left out)",
        *(f"broken {number}" for number in range(1, 10)),
    ]


async def test_whoever_breaks_connections_does_not_fill_the_log(tmp_path: Path) -> None:
    """Both libraries write down where in them it happened."""
    async with server_process(tmp_path, "--http", "0") as server:
        http = int((await server.line()).rpartition(":")[2])
        began_s = time.monotonic()
        for _ in range(100):
            reader, writer = await asyncio.open_connection("127.0.0.1", http)
            writer.write(
                b"POST /nothing HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n"
            )
            await reader.read()
            writer.close()
        windows = (time.monotonic() - began_s) // WINDOW_S + 2
        server.signal(signal.SIGTERM)
        assert await server.wait() == 0
    assert server.log.count("Traceback") <= windows * MOST_ALIKE


def test_the_end_of_a_turn_says_what_it_was() -> None:
    stream = logging_to()
    clock = TurnClock()
    clock.event()
    end = End("stop", "m", 5, 7, length=9, digest=b"", cached_tokens=2)
    clock.say_end("aa17", "alice", end)
    TurnClock().say_end("bb", "alice", end)
    line, silent = lines(stream)
    assert isinstance(line["ttft_ms"], float)
    assert isinstance(line["duration_ms"], float)
    assert line["ttft_ms"] <= line["duration_ms"]
    assert silent["ttft_ms"] is None
    wanted = {"turn": "aa17", "tenant": "alice", "model": "m", "reason": "stop"}
    counts = {"prompt_tokens": 5, "completion_tokens": 7, "cached_tokens": 2}
    assert (wanted | counts).items() <= line.items()


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_child_process_can_be_told_the_same(level: LogLevel, log_format: LogFormat) -> None:
    logging_to(level, log_format)
    assert configured() == (level, log_format)


def test_what_other_libraries_write_down_is_left_out() -> None:
    stream = logging_to("debug")
    for name in ("websockets", "httpx2", "uvicorn.access", "asyncio"):
        logging.getLogger(name).info("what was said")
    logging.getLogger("eloquent.websocket.server").debug("what was said")
    logging.getLogger("quic").warning("what a peer did")
    assert stream.getvalue() == ""
    logging.getLogger("eloquent.quic.listen").debug("ours")
    logging.getLogger("uvicorn.error").error("broken")
    assert [line["message"] for line in lines(stream)] == ["ours", "broken"]


def test_progress_is_a_line_for_people_and_records_for_programs() -> None:
    stream = logging_to()
    show = progress("json", stream)
    for fraction in (0.1, 0.2):
        show("Fetching a model", fraction)
    show("Loading a model", None)
    assert [line["message"] for line in lines(stream)] == ["Fetching a model", "Loading a model"]
    stream = io.StringIO()
    progress("text", stream)("Loading a model", None)
    assert stream.getvalue() == "Loading a model\n"


SECRET = "quetzalcoatl"
"A word of the conversation; the echo backend says it back."


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_no_log_of_a_server_has_text_or_keys(log_format: str, tmp_path: Path) -> None:
    key = new_key()
    keys = tmp_path / "keys.toml"
    keys.write_text(entry_for(key, "alice"))
    keys.chmod(0o600)
    options = ("--log-level", "debug", "--log-format", log_format, "--keys", str(keys))
    async with server_process(tmp_path, *options, "--state", str(tmp_path / "state")) as server:
        for connector in (connect_quic, connect_websocket):
            for shown in (key, "elq_wrong", ""):
                await ask(server.url, connector, shown)
        server.signal(signal.SIGTERM)
        assert await server.wait() == 0
    log = server.log
    for word in (SECRET, SECRET[::-1], key.removeprefix("elq_"), "elq_wrong"):
        assert word not in log
    assert "BINARY" not in log, "websockets' frames, of which it shows a part in hexadecimal"
    if log_format == "json":
        said = [json.loads(line) for line in log.splitlines()]
        ends = [line for line in said if "reason" in line]
        assert [(line["tenant"], line["model"], line["reason"]) for line in ends] == [
            ("alice", "echo", "stop"),
            ("alice", "echo", "stop"),
        ]
        assert all(line["completion_tokens"] == 2 for line in ends)
    else:
        assert log.count("ended: stop, 2 tokens") == 2


async def test_words_of_an_engine_that_quotes_the_conversation_are_in_no_log(
    tmp_path: Path,
) -> None:
    async def quote(asked: Asked) -> None:
        """Fail before the first token, or, every other time, after it."""
        error = {"message": f"cannot answer {asked.body.decode()}", "code": "broken"}
        if len(engine.chats) % 2:
            asked.reply(500, json.dumps({"error": error}))
        else:
            asked.begin()
            asked.say(SECRET)
            asked.piece(b"data: " + json.dumps({"error": error}).encode() + b"\n\n")
            asked.end()

    async with BadEngine(quote, "model") as engine:
        options = ("--log-level", "debug", "--upstream", engine.url, "--http", "0")
        async with server_process(tmp_path, *options, model="model") as server:
            for _ in range(2):
                await ask(server.url, connect_quic, "")
            url = (await server.line()).partition(" ")[2]
            body = {"model": "model", "messages": [{"role": "user", "content": SECRET}]}
            async with httpx2.AsyncClient(base_url=url, timeout=DEADLINE_S) as http:
                for stream in (False, True):
                    for path in ("chat/completions", f"completions?input={SECRET}"):
                        given = {"Authorization": f"Bearer {SECRET}"}
                        asked = {**body, "stream": stream}
                        await http.post(f"/v1/{path}", json=asked, headers=given)
            server.signal(signal.SIGTERM)
            assert await server.wait() == 0
        assert len(engine.chats) >= 4
    assert "broken" in server.log, "the engine's own word for it"
    assert SECRET not in server.log


async def ask(url: ServerUrl, connector: Connector, key: str) -> None:
    """Have the secret said back, or be refused."""
    text = f"{SECRET} {SECRET[::-1]}"
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    request = Request(token_bytes(TURN_ID_BYTES), body, token_bytes(SECRET_BYTES), key=key)
    session = Session(url, connector=connector)
    try:
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(RequestError):
                async for _ in session.open(request):
                    pass
    finally:
        await session.close()
