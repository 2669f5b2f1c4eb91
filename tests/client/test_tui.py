"""The terminal chat, driven by Textual's pilot, against a real server on loopback."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from loopback import DEADLINE_S, HOST, Hanging, StartServer, saying
from textual.pilot import Pilot
from textual.widgets import RichLog

from eloquent.core.events import Failure, TextDelta
from eloquent.session import retries
from eloquent.session.states import LinkState
from eloquent.url import ServerUrl
from eloquent_client import Client, LocalServerError, StreamStats
from eloquent_client.tui.app import ChatApp
from eloquent_client.tui.chat import ChatScreen
from eloquent_client.tui.loading import LoadingScreen
from eloquent_client.tui.status import Status, StatusBar, status_line
from eloquent_client.tui.widgets import Notice, Prompt, Question, Reply
from eloquent_server.turns import Turn

WIDTH = 120
FENCE = "Look:\n\n```python\nprint(1)\n```\n"


class Chat:
    """The app, as a user sees it."""

    def __init__(self, app: ChatApp, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Let the app work until something is so."""
        async with asyncio.timeout(DEADLINE_S):
            while not is_so():
                await self.pilot.pause(0.01)

    async def send(self, text: str) -> None:
        """Write a line and send it."""
        await self.pilot.press(*text, "enter")

    @property
    def status(self) -> str:
        """The status line."""
        return str(self.app.screen.query_one(StatusBar).content)

    @property
    def written(self) -> str:
        """What stands in the input."""
        return self.app.screen.query_one(Prompt).text

    @property
    def questions(self) -> list[str]:
        """What the user said."""
        return [str(widget.content) for widget in self.app.screen.query(Question)]

    @property
    def replies(self) -> list[str]:
        """The answers, as their Markdown."""
        return [widget.source for widget in self.app.screen.query(Reply)]

    @property
    def notices(self) -> list[str]:
        """What the program itself said."""
        return [str(widget.content) for widget in self.app.screen.query(Notice)]


def resolved(client: Client) -> asyncio.Future[Client]:
    future: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
    future.set_result(client)
    return future


@asynccontextmanager
async def chatting(url: ServerUrl, **options: str) -> AsyncIterator[Chat]:
    async with Client(url, connect_timeout_s=DEADLINE_S) as client:
        app = ChatApp(resolved(client), asyncio.Queue(), **options)
        async with app.run_test(size=(WIDTH, 30)) as pilot:
            chat = Chat(app, pilot)
            await chat.until(lambda: isinstance(app.screen, ChatScreen))
            yield chat


async def test_send_and_receive(start_server: StartServer) -> None:
    bodies: list[dict[str, object]] = []

    async def handle(turn: Turn) -> None:
        bodies.append(json.loads(turn.request.body))
        await saying("Hello ", "**you**")(turn)

    server = await start_server(handle)
    async with chatting(server.url, system="Be kind.", model="m") as chat:
        await chat.until(lambda: "● connected" in chat.status)
        await chat.send("one")
        # The status line is drawn anew a few times a second.
        await chat.until(lambda: chat.replies == ["Hello **you**"] and "2 tokens" in chat.status)
        assert chat.questions == ["one"]
        assert chat.written == ""
        assert "no packet lost" in chat.status
        assert "first after" in chat.status
        await chat.send("two")
        await chat.until(lambda: len(bodies) == 2 and len(chat.replies) == 2)
    assert bodies[1]["model"] == "m"
    assert bodies[1]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Hello **you**"},
        {"role": "user", "content": "two"},
    ]


async def test_a_message_of_several_lines(start_server: StartServer) -> None:
    server = await start_server(saying("yes"))
    async with chatting(server.url) as chat:
        await chat.pilot.press("enter", "a", "ctrl+j", "b", "shift+enter", "c")
        assert chat.written == "a\nb\nc"
        await chat.pilot.press("enter")
        await chat.until(lambda: chat.replies == ["yes"])
        assert chat.questions == ["a\nb\nc"]


async def test_code_fences_are_drawn_whole(start_server: StartServer) -> None:
    server = await start_server(saying(*FENCE))
    async with chatting(server.url) as chat:
        await chat.send("code")
        await chat.until(lambda: chat.replies == [FENCE] and "connected" in chat.status)
        fences = chat.app.screen.query("MarkdownFence")
        await chat.until(lambda: len(fences) == 1 and fences.first().size.height > 0)
        assert "print(1)" in str(fences.first().query_one("Label").render())


async def test_escape_cancels_and_keeps_the_text(start_server: StartServer) -> None:
    hanging = Hanging("So far")
    server = await start_server(hanging)
    async with chatting(server.url) as chat:
        await chat.send("go on")
        await chat.until(lambda: chat.replies == ["So far"] and "receiving" in chat.status)
        await chat.pilot.press(*"next", "enter")
        assert chat.written == "next", "a draft stays while an answer comes"
        await chat.pilot.press("escape")
        async with asyncio.timeout(DEADLINE_S):
            await hanging.cancelled.wait()
        await chat.until(lambda: chat.notices == ["Stopped."] and "connected" in chat.status)
        assert chat.replies == ["So far"]
        assert chat.written == "next"


async def test_waiting_for_the_model(start_server: StartServer) -> None:
    server = await start_server(Hanging(text=None))
    async with chatting(server.url) as chat:
        await chat.send("anything?")
        await chat.until(lambda: "waiting for the model" in chat.status)
        await chat.pilot.press("escape")
        await chat.until(lambda: chat.notices == ["Stopped."])
        assert chat.replies == []


async def test_a_new_conversation(start_server: StartServer) -> None:
    hanging = Hanging("So far")
    server = await start_server(hanging)
    async with chatting(server.url) as chat:
        await chat.send("first")
        await chat.until(lambda: chat.replies == ["So far"])
        await chat.pilot.press("ctrl+n")
        async with asyncio.timeout(DEADLINE_S):
            await hanging.cancelled.wait()
        await chat.until(lambda: not (chat.questions or chat.replies or chat.notices))


async def test_a_link_that_is_lost_and_comes_back(start_server: StartServer) -> None:
    server = await start_server(saying("here"))
    async with chatting(server.url) as chat:
        await chat.send("one")
        await chat.until(lambda: chat.replies == ["here"])
        await server.close()
        await chat.until(lambda: "link lost" in chat.status)
        await chat.send("two")
        await chat.until(lambda: len(chat.notices) == 1)
        assert "Nothing listens" in chat.notices[0]
        assert "connects again" in chat.notices[0]
        await chat.until(lambda: chat.written == "two")
        await server.open()
        await chat.pilot.press("enter")
        await chat.until(lambda: chat.replies == ["here", "here"] and "connected" in chat.status)


async def test_a_link_that_is_lost_in_mid_answer_is_shown_and_escape_still_works(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "STOPPED_FOR_S", retries.REFUSED_FOR_S)  # it will not be back
    server = await start_server(Hanging("So far"))
    async with chatting(server.url) as chat:
        await chat.send("go on")
        await chat.until(lambda: chat.replies == ["So far"] and "receiving" in chat.status)
        assert server._listener is not None
        await server._listener.close()
        await chat.until(lambda: "reconnecting at token 1" in chat.status)
        await chat.pilot.press("escape")
        await chat.until(lambda: chat.notices == ["Stopped."])
        assert chat.replies == ["So far"]
        await chat.until(lambda: "link lost" in chat.status)


async def test_no_server_is_said_at_once() -> None:
    async with chatting(ServerUrl(HOST, 9)) as chat:
        await chat.until(lambda: len(chat.notices) == 1)
        assert "Nothing listens" in chat.notices[0]
        await chat.until(lambda: "link lost" in chat.status)


async def test_a_failure_of_the_server_is_shown(start_server: StartServer) -> None:
    async def handle(turn: Turn) -> None:
        turn.append(TextDelta("So far"))
        turn.append(Failure("unavailable", "The engine is gone."))
        turn.close("error", model="told", prompt_tokens=0, completion_tokens=0)

    server = await start_server(handle)
    async with chatting(server.url) as chat:
        await chat.send("go")
        await chat.until(lambda: chat.notices == ["The engine is gone."])
        assert chat.replies == ["So far"]


async def test_the_end_by_a_limit_is_said(start_server: StartServer) -> None:
    server = await start_server(saying("cut", finish_reason="length"))
    async with chatting(server.url) as chat:
        await chat.send("go")
        await chat.until(lambda: len(chat.notices) == 1)
        assert "limit" in chat.notices[0]


async def test_escape_sequences_do_not_reach_the_terminal(start_server: StartServer) -> None:
    server = await start_server(saying("\x1b]0;owned\x07ok\x9b"))
    async with chatting(server.url) as chat:
        await chat.send("go")
        await chat.until(lambda: chat.replies == ["]0;ownedok"])


async def test_loading_shows_what_the_server_says(start_server: StartServer) -> None:
    server = await start_server(saying("yes"))
    starting: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
    progress: asyncio.Queue[str] = asyncio.Queue()
    app = ChatApp(starting, progress)
    async with Client(server.url) as client, app.run_test(size=(WIDTH, 30)) as pilot:
        chat = Chat(app, pilot)
        await chat.until(lambda: isinstance(app.screen, LoadingScreen))
        progress.put_nowait("Converting the model")
        log = app.screen.query_one(RichLog)
        await chat.until(lambda: any("Converting" in strip.text for strip in log.lines))
        starting.set_result(client)
        await chat.until(lambda: isinstance(app.screen, ChatScreen))
        await chat.until(lambda: "connected" in chat.status)


async def test_a_server_that_does_not_come_up_ends_the_app() -> None:
    starting: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
    app = ChatApp(starting, asyncio.Queue())
    async with app.run_test() as pilot:
        chat = Chat(app, pilot)
        await chat.until(lambda: isinstance(app.screen, LoadingScreen))
        starting.set_exception(LocalServerError("no"))
        await chat.until(lambda: not app.is_running)
    assert app.return_code == 0


STATS = StreamStats(
    datagrams=150,
    loss_recovered=0,
    duplicates=0,
    missing=0,
    ttft_ms=500,
    duration_ms=2500,
    rtt_ms=23.4,
)
RECEIVING = Status(LinkState.UP, is_answering=True, rtt_ms=23.4, stats=STATS, tokens=101)


@pytest.mark.parametrize(
    ("status", "width", "line"),
    [
        (Status(LinkState.IDLE), 80, "● not connected"),
        (Status(LinkState.UP, rtt_ms=0.42), 80, "● connected  RTT 0.4 ms"),
        (
            RECEIVING,
            120,
            "● receiving  RTT 23 ms  no packet lost  101 tokens  first after 500 ms  50 tokens/s",
        ),
        (
            replace(RECEIVING, stats=replace(STATS, loss_recovered=50)),
            120,
            "● receiving  RTT 23 ms  50 of 200 packets lost, all recovered  101 tokens  "
            "first after 500 ms  50 tokens/s",
        ),
        (
            replace(RECEIVING, stats=replace(STATS, loss_recovered=50)),
            78,
            "● receiving  RTT 23 ms  lost 50/200, recovered  101 tok  first 500 ms  50/s",
        ),
        (
            replace(RECEIVING, stats=replace(STATS, ttft_ms=None), tokens=0, quiet_s=3.2),
            78,
            "● waiting for the model, quiet 3 s  RTT 23 ms  no loss  0 tok",
        ),
        (Status(LinkState.IDLE, had_link=True), 80, "● link lost"),
        (Status(LinkState.CONNECTING, is_answering=True), 80, "● connecting"),
        (Status(LinkState.SILENT, is_answering=True, tokens=37), 80, "● silent at token 37"),
        (Status(LinkState.OFFLINE, is_answering=True, tokens=37), 80, "● offline at token 37"),
        (Status(LinkState.OFFLINE), 80, "● offline"),
        (
            Status(LinkState.RECONNECTING, is_answering=True, tokens=37, quiet_s=9.0),
            80,
            "● reconnecting at token 37",
        ),
        (RECEIVING, 20, "● receiving  RTT 23…"),
    ],
)
def test_the_status_line(status: Status, width: int, line: str) -> None:
    assert status_line(status, width).plain == line
