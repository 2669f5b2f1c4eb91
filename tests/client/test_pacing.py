"""The pacer on an event loop and in `ask` and `chat`; the connection's log of `ask`."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from loopback import DEADLINE_S, StartServer, saying

from eloquent.core.events import End, Event, Failure, TextDelta
from eloquent_client import Client, Pacer, ServerFaultError, paced
from eloquent_client.pacing import paced_text
from eloquent_client.tui.app import ChatApp
from eloquent_client.tui.status import StatusBar
from eloquent_client.tui.widgets import Prompt, Reply

END = End("stop", "m", 1, 2, 3, bytes(16))


async def telling(*events: Event, error: Exception | None = None) -> AsyncIterator[Event]:
    for event in events:
        await asyncio.sleep(0)
        yield event
    if error is not None:
        raise error


async def text_of(events: AsyncIterator[Event]) -> str:
    return "".join([event.text async for event in events if isinstance(event, TextDelta)])


async def test_the_text_comes_whole_and_in_pieces() -> None:
    pacer = Pacer("reading", chars_per_s=200.0)
    source = telling(TextDelta("Hello "), TextDelta("there"))
    pieces = [event async for event in paced(source, pacer)]
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextDelta)) == "Hello there"
    assert pieces[0] == TextDelta("H")
    assert pacer.stats.characters == len("Hello there")


async def test_the_end_comes_last_and_does_not_wait() -> None:
    pacer = Pacer("reading", chars_per_s=0.001, max_delay_s=1e9)
    events = [event async for event in paced(telling(TextDelta("a" * 1000), END), pacer)]
    assert events[-1] == END
    assert sum(len(event.text) for event in events if isinstance(event, TextDelta)) == 1000


async def test_what_waits_comes_before_the_sources_error() -> None:
    pacer = Pacer("reading", chars_per_s=0.001, max_delay_s=1e9)
    events = paced(telling(TextDelta("Hello"), error=ValueError("broken")), pacer)
    assert await anext(events) == TextDelta("H")
    assert await anext(events) == TextDelta("ello")
    with pytest.raises(ValueError, match="broken"):
        await anext(events)


async def test_what_waits_comes_while_the_source_is_silent() -> None:
    async def then_silent() -> AsyncIterator[Event]:
        yield TextDelta("Hello")
        await asyncio.Event().wait()

    got = ""
    async with asyncio.timeout(30):
        async for event in paced(then_silent(), Pacer("smooth")):
            assert isinstance(event, TextDelta)
            got += event.text
            if got == "Hello":
                break
    assert got == "Hello"


async def test_closing_it_ends_the_source() -> None:
    ended = asyncio.Event()

    async def then_silent() -> AsyncIterator[Event]:
        try:
            yield TextDelta("Hello")
            await asyncio.Event().wait()
        finally:
            ended.set()

    events = paced(then_silent(), Pacer("off"))
    assert await anext(events) == TextDelta("Hello")
    await events.aclose()
    async with asyncio.timeout(30):
        await ended.wait()


async def test_an_empty_source() -> None:
    assert await text_of(paced(telling(), Pacer("smooth"))) == ""


async def test_a_failure_in_mid_answer_comes_after_the_text_before_it() -> None:
    source = telling(TextDelta("Hello"), Failure("engine_error", "It broke."))
    pieces = paced_text(source, Pacer("reading", chars_per_s=0.001, max_delay_s=1e9))
    assert [await anext(pieces), await anext(pieces)] == ["H", "ello"]
    with pytest.raises(ServerFaultError, match="It broke"):
        await anext(pieces)


async def ask(*arguments: str, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "eloquent", "ask", *arguments),
        stdin=DEVNULL,
        stdout=PIPE,
        env=os.environ | environment,
    )
    async with asyncio.timeout(DEADLINE_S):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


@pytest.mark.parametrize("pace", ["off", "smooth", "reading"])
async def test_ask_at_any_pace(start_server: StartServer, pace: str) -> None:
    server = await start_server(saying("Hello ", "the", "re 👋🏽"))
    assert await ask("Hi", "--pace", pace, "--url", str(server.url)) == "Hello there 👋🏽\n"


@pytest.mark.parametrize("by_option", [True, False])
async def test_ask_with_qlog(start_server: StartServer, tmp_path: Path, by_option: bool) -> None:
    server = await start_server(saying("Zebras ", "wander"))
    where = ("--qlog", str(tmp_path / "q")), {"ELOQUENT_QLOG": str(tmp_path / "q")}
    options: tuple[str, ...] = where[0] if by_option else ()
    environment = {} if by_option else where[1]
    assert "Zebras" in await ask("Whither?", *options, "--url", str(server.url), **environment)
    (file,) = (tmp_path / "q").iterdir()
    assert file.name.endswith("_client.sqlog")
    content = file.read_bytes()
    records = [json.loads(record) for record in content.split(b"\x1e")[1:]]
    assert records[0]["qlog_format"] == "JSON-SEQ"
    assert b'"frame_type": "bundle"' in content
    assert not [word for word in (b"Zebras", b"wander", b"Whither") if word in content]


async def test_the_chat_shows_all_of_a_paced_answer(start_server: StartServer) -> None:
    server = await start_server(saying("Hello ", "**you**"))
    async with Client(server.url, connect_timeout_s=DEADLINE_S) as client:
        starting: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        starting.set_result(client)
        app = ChatApp(starting, asyncio.Queue(), pace="smooth")
        async with app.run_test(size=(120, 30)) as pilot, asyncio.timeout(DEADLINE_S):
            while not app.screen.query(Prompt):
                await pilot.pause(0.01)
            await pilot.press(*"one", "enter")
            while [reply.source for reply in app.screen.query(Reply)] != ["Hello **you**"]:
                await pilot.pause(0.01)
            while "2 tokens" not in str(app.screen.query_one(StatusBar).content):
                await pilot.pause(0.01)
