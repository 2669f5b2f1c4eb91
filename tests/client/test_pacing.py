"""The pacer on an event loop: order, ends, failures, cancellation."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from eloquent.core.events import End, Event, TextDelta
from eloquent.core.pacer import Pacer
from eloquent_client.pacing import paced

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
