"""How long readers can go on reading, by what they report; and who is served first therefore."""

import asyncio
import datetime
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import engine_child
import pytest
from loopback import HOST, Server

from eloquent.core.events import TextDelta
from eloquent.core.wire import Report, Request
from eloquent.quic.certificate import make_certificate
from eloquent.session.session import Session
from eloquent.session.turn import ClientTurn
from eloquent_server.backends.local import LocalBackend
from eloquent_server.engine.client import EngineClient, EngineOptions
from eloquent_server.gateway import Gateway
from eloquent_server.reading import MAX_BUFFERED_S, ReadingClock

DEADLINE_S = 120.0
"Ends a hang; decides nothing."


@dataclass(eq=False)
class FakeReader:
    report: Report | None = None
    is_silent: bool = False

    def has(self, contiguous: int, unread: int) -> None:
        self.report = Report(0, contiguous, contiguous, unread)


class Now:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def test_a_reader_who_takes_what_comes_is_dry() -> None:
    now, reader = Now(), FakeReader()
    clock = ReadingClock(now)
    assert clock.buffered_s([reader]) == 0
    for i in range(5):
        reader.has(100 * i, 0)
        assert clock.buffered_s([reader]) == 0
        now.s += 0.25


def test_a_reader_whose_link_is_dead_can_wait_and_the_others_decide() -> None:
    clock, dry, gone = ReadingClock(Now()), FakeReader(), FakeReader(is_silent=True)
    assert clock.buffered_s([gone]) == MAX_BUFFERED_S
    assert clock.buffered_s([gone, dry]) == 0
    gone.has(100, 0)
    assert clock.buffered_s([gone]) == MAX_BUFFERED_S
    gone.is_silent = False
    assert clock.buffered_s([gone]) == 0


def test_what_is_unread_lasts_as_long_as_it_takes_to_read() -> None:
    now, reader = Now(), FakeReader()
    clock = ReadingClock(now)
    reader.has(1000, 900)
    assert clock.buffered_s([reader]) == 0, "how fast they read is not known yet"
    now.s = 1.0
    reader.has(1300, 1100)
    assert clock.buffered_s([reader]) == pytest.approx(11.0)
    now.s = 3.0
    assert clock.buffered_s([reader]) == pytest.approx(9.0), "no report, and they go on reading"
    now.s = 20.0
    assert clock.buffered_s([reader]) == 0


def test_who_does_not_read_at_all_has_text_for_a_bounded_time() -> None:
    now, reader = Now(), FakeReader()
    clock = ReadingClock(now)
    for i in range(3):
        reader.has(1000 + 50 * i, 1000 + 50 * i)
        left_s = clock.buffered_s([reader])
        now.s += 1.0
    assert left_s == MAX_BUFFERED_S


def test_of_several_readers_the_one_who_has_least_counts() -> None:
    now, slow, eager = Now(), FakeReader(), FakeReader()
    clock = ReadingClock(now)
    for i in range(3):
        slow.has(1000 + 10 * i, 1000)
        eager.has(1000 + 10 * i, 0)
        now.s += 1.0
        both_s, slow_s = clock.buffered_s([slow, eager]), clock.buffered_s([slow])
        clock.buffered_s([slow, eager])
    assert (both_s, slow_s) == (0, MAX_BUFFERED_S)
    assert clock.buffered_s([slow, FakeReader()]) == 0, "one said nothing yet"
    assert clock.buffered_s([]) == MAX_BUFFERED_S, "nobody waits"


@asynccontextmanager
async def one_row() -> AsyncIterator[tuple[EngineClient, Session]]:
    """A server on loopback whose engine computes one turn at a time, and a link to it."""
    client = await EngineClient.start(
        EngineOptions("slow", max_running=1), command=engine_child.COMMAND
    )
    backend = LocalBackend(client, hint_every_s=0.05)
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    server = Server(Gateway(backend).handle, make_certificate(HOST, long_ago))
    try:
        await server.open()
        session = Session(server.url)
        yield client, session
        await session.close()
    finally:
        await server.close()
        await backend.close()


def ask(link: Session, text: str, tokens: int) -> ClientTurn:
    no_end = {"258": -100}
    body = {"messages": [{"role": "user", "content": text}], "logit_bias": no_end}
    body |= {"max_tokens": tokens, "temperature": 0}
    return link.open(Request(secrets.token_bytes(16), json.dumps(body).encode()))


async def read(turn: ClientTurn, pause_s: float, begun: asyncio.Event) -> None:
    async for event in turn:
        if isinstance(event, TextDelta):
            begun.set()
        await asyncio.sleep(pause_s)


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "dry"])
async def test_a_reader_with_a_full_buffer_gives_way_to_a_dry_one(is_full: bool) -> None:
    """Over real QUIC: the first reader's own reports are all that differs."""
    async with asyncio.timeout(DEADLINE_S), one_row() as (client, link):
        begun = asyncio.Event()
        first = ask(link, "first", 140)
        reading = asyncio.ensure_future(read(first, 0.5 if is_full else 0.0, begun))
        await begun.wait()
        await read(ask(link, "second", 30), 0.0, asyncio.Event())
        stats = await client.stats()
        assert stats["preemptions"] == is_full
        assert stats["running"] + stats["waiting"] == is_full, "whether the first is unfinished"
        reading.cancel()
        first.cancel()
