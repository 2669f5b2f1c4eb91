"""The pacer on an event loop: wraps what gives out events, and gives them out evenly."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable

from eloquent.core.events import Event, Failure, TextDelta
from eloquent.core.pacer import Pacer
from eloquent_client.errors import status_error


async def paced(events: AsyncIterable[Event], pacer: Pacer) -> AsyncGenerator[Event, None]:
    """Give out `events` at the pace of `pacer`, in order; text comes in other pieces.

    When the source ends or fails, all that waits comes first. `pacer.stats` has the added delay.
    """
    now = asyncio.get_running_loop().time
    source = aiter(events)
    arrival: asyncio.Future[Event] = asyncio.ensure_future(anext(source))
    try:
        while True:
            due_s = pacer.next_time()
            wait_s = None if due_s is None else max(0.0, due_s - now())
            await asyncio.wait((arrival,), timeout=wait_s)
            if arrival.done():
                if arrival.exception() is not None:
                    break
                pacer.push(now(), (arrival.result(),))
                arrival = asyncio.ensure_future(anext(source))
            if (due_s := pacer.next_time()) is not None and due_s <= now():
                for event in pacer.pop(now()):
                    yield event
        pacer.flush()
        for event in pacer.pop(now()):
            yield event
        if not isinstance(error := arrival.exception(), StopAsyncIteration):
            assert error is not None
            raise error
    finally:
        arrival.cancel()


async def paced_text(events: AsyncIterable[Event], pacer: Pacer) -> AsyncGenerator[str, None]:
    """Give out the text of an answer's `events` at the pace of `pacer`.

    Raises:
        APIStatusError: the server failed in mid-answer; what had come was given out.
    """
    async for event in paced(events, pacer):
        if isinstance(event, TextDelta):
            yield event.text
        elif isinstance(event, Failure):
            raise status_error(event.code, event.message)
