"""Real servers on loopback, with handlers made for a test."""

import asyncio
from collections.abc import Awaitable, Callable

from eloquent.core.events import TextDelta
from eloquent.quic.certificate import ServerCertificate
from eloquent.quic.listen import Listener, listen
from eloquent.url import ServerUrl
from eloquent_server.store import TokenStore
from eloquent_server.turns import Turn, TurnHandler, TurnHub

HOST = "127.0.0.1"
DEADLINE_S = 30.0
"Ends a hang; decides nothing."


class Server:
    """A server that listens until it is closed, and can come back at the same address."""

    def __init__(self, handler: TurnHandler, certificate: ServerCertificate) -> None:
        self._handler = handler
        self._certificate = certificate
        self._listener: Listener | None = None
        self._hub: TurnHub | None = None
        self.url = ServerUrl(HOST, 0, certificate.pin)

    async def open(self) -> None:
        """Listen, the first time on a free port."""
        self._hub = TurnHub(self._handler, TokenStore.open(None))
        self._listener = await listen(
            HOST, self.url.port, certificate=self._certificate, service=self._hub
        )
        self.url = ServerUrl(HOST, self._listener.port, self._certificate.pin)

    async def close(self) -> None:
        """Close all connections and the socket."""
        if self._hub is not None and self._listener is not None:
            await self._hub.close()
            await self._listener.close()
            self._listener = self._hub = None


StartServer = Callable[[TurnHandler], Awaitable[Server]]


def saying(*texts: str, finish_reason: str = "stop") -> TurnHandler:
    """Return a handler that says these texts; each counts as one token."""

    async def handle(turn: Turn) -> None:
        for text in texts:
            turn.append(TextDelta(text))
            await asyncio.sleep(0)
        turn.close(finish_reason, model="told", prompt_tokens=7, completion_tokens=len(texts))

    return handle


class Hanging:
    """A handler that says one thing and then nothing; it tells what becomes of the turn."""

    def __init__(self, text: str | None = "And then") -> None:
        self._text = text
        self.asked = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, turn: Turn) -> None:
        self.asked.set()
        if self._text is not None:
            turn.append(TextDelta(self._text))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
