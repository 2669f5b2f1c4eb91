"""What tests of the hub read and generate with: everything is written down."""

import asyncio
import secrets
from collections.abc import Callable

from eloquent.core.events import End, Event, EventDecoder, TextDelta
from eloquent.core.log import Log
from eloquent.core.wire import Request
from eloquent_server.turns import Turn

BODY = b'{"messages": []}'
DEADLINE_S = 20.0
"Ends a hang; decides nothing."


class Notes:
    """A `Reader` that reads everything at once, as a perfect link would."""

    is_silent = False
    report = None

    def __init__(
        self,
        turn_id: bytes,
        secret: bytes,
        *,
        body: bytes = BODY,
        offset: int = 0,
        is_owner: bool = True,
    ) -> None:
        self.request = Request(turn_id, body, secret, offset, is_owner)
        self.rejected: tuple[str, str] | None = None
        self.events: list[Event] = []
        self._log: Log | None = None
        self._decoder = EventDecoder(offset)
        self.offset = offset
        self.news = asyncio.Event()

    def accept(self, log: Log) -> None:
        self._log = log
        self.log_grew()

    def log_grew(self) -> None:
        assert self._log is not None
        assert self.rejected is None
        data = self._log.read(self.offset, self._log.length)
        self.events += self._decoder.feed(data)
        self.offset += len(data)
        self.news.set()

    def reject(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        assert self.rejected is None
        self.rejected = (code, message)
        self.news.set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def is_over(self) -> bool:
        return self.rejected is not None or bool(self.events and isinstance(self.events[-1], End))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self.news.clear()
                await self.news.wait()

    async def finished(self) -> list[Event]:
        await self.until(lambda: self.is_over)
        return self.events


class Script:
    """A handler that says a word each time it is let go on; it counts how often it was asked."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.asked = 0
        self.gate = asyncio.Semaphore(0)
        self.ended = asyncio.Event()

    async def __call__(self, turn: Turn) -> None:
        self.asked += 1
        try:
            for word in self.words:
                await self.gate.acquire()
                turn.append(TextDelta(word))
            await self.gate.acquire()
            turn.close("stop", model="m", prompt_tokens=1, completion_tokens=len(self.words))
        finally:
            self.ended.set()

    def go(self, steps: int = 100) -> None:
        for _ in range(steps):
            self.gate.release()


def names() -> tuple[bytes, bytes]:
    return secrets.token_bytes(16), secrets.token_bytes(16)
