"""Drives one channel over a WebSocket on an asyncio loop, the same at both ends."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable
from typing import Any

from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

from eloquent.core.channel import Channel
from eloquent.core.turns import TurnEvent
from eloquent.core.wire import PROTOCOL_VERSION, request_due_s
from eloquent.errors import WireError

SUBPROTOCOL = Subprotocol(f"eloquent.{PROTOCOL_VERSION}")

UNSENT_BYTES = 1 << 14
"What may wait in the process, and in the kernel: what is there cannot be chosen any more."

CLOSE_TIMEOUT_S = 0.5
"How long an orderly end may take."

MAX_REASON_BYTES = 120
"A close frame has room for 123 bytes of reason (RFC 6455 section 5.5)."

_TCP_NOTSENT_LOWAT = getattr(
    socket, "TCP_NOTSENT_LOWAT", {"linux": 25, "darwin": 0x201}.get(sys.platform)
)

OPTIONS: dict[str, Any] = {
    # What is compressed with secrets beside it gives them away by its length.
    "compression": None,
    "close_timeout": CLOSE_TIMEOUT_S,
    "ping_interval": None,  # the channel has beats
    "max_queue": 4,
    "write_limit": UNSENT_BYTES,
}
"Of `websockets`, the same at both ends."


class HeardConnection(Connection):
    """A WebSocket that knows when bytes last came: a long message may take long to be whole."""

    heard_s = float("-inf")
    "In the loop's time."
    _begun_s: float | None = None
    "When what came of a message that is not whole began to come."
    _so_far = 0

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self.heard_s = self.loop.time()
        super().data_received(data)
        if not self.protocol.reader.buffer and self.protocol.current_size is None:
            self._begun_s = None
        elif self._begun_s is None:
            self._begun_s, self._so_far = self.heard_s, len(data)
        else:
            self._so_far += len(data)

    @property
    def message_due_s(self) -> float:
        """When the message that is on its way has to be whole; infinity: there is none."""
        if self._begun_s is None:
            return float("inf")
        return request_due_s(self._begun_s, self._so_far)


class ChannelDriver:
    """The thin shell of I/O around a channel.

    `pump` must follow every call to the channel that may have something to say.
    """

    def __init__(
        self,
        channel: Channel,
        websocket: HeardConnection,
        on_event: Callable[[TurnEvent], None],
        *,
        silent_s: float | None = None,
    ) -> None:
        """A peer that is silent for `silent_s` seconds is given up; None: never.

        So is then one whose message takes too long.
        """
        self._channel = channel
        self._websocket = websocket
        self._on_event = on_event
        self._silent_s = silent_s
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None
        tcp = websocket.transport.get_extra_info("socket")
        if _TCP_NOTSENT_LOWAT is not None and tcp is not None:  # None: it is over already
            with contextlib.suppress(OSError):  # a system that knows none: late binding is coarser
                tcp.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    @property
    def is_peers_end(self) -> bool:
        """Whether the peer ended the connection in order, as a server does when it stops."""
        received = self._websocket.protocol.close_rcvd
        return received is not None and received.code == CloseCode.NORMAL_CLOSURE

    def now(self) -> float:
        """Return the loop's time in seconds."""
        return self._loop.time()

    def pump(self) -> None:
        """Give out events, and have sent what there is to send."""
        self._give_out()
        self._news.set()

    async def run(self) -> str:
        """Exchange messages until the connection is over; return why it is."""
        self._sending = asyncio.ensure_future(self._send())
        try:
            async for message in self._websocket:
                if isinstance(message, str):
                    raise WireError("A text message came; messages are binary.")
                self._channel.receive(message, self.now())
                self.pump()
        except WireError as error:
            reason = str(error).encode()[:MAX_REASON_BYTES].decode(errors="ignore")
            await self._websocket.close(CloseCode.PROTOCOL_ERROR, reason)
            return str(error)
        except ConnectionClosed as error:
            return _reason(error)
        finally:
            await self._stop_sending()
        return _reason(self._websocket.protocol.close_exc)

    async def close(self, reason: str = "") -> None:
        """Say what is still to be said, if the connection takes it, and end it."""
        await self._stop_sending()
        with contextlib.suppress(TimeoutError, ConnectionClosed):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while (message := self._channel.next_message(self.now())) is not None:
                    await self._websocket.send(message)
        await self._websocket.close(reason=reason)

    def abort(self) -> None:
        """End the connection at once."""
        self._websocket.transport.abort()

    def _give_out(self) -> None:
        while (event := self._channel.next_event()) is not None:
            self._on_event(event)

    async def _send(self) -> None:
        """Send messages, each made when the connection takes more."""
        try:
            while not self._is_given_up:
                self._news.clear()
                message = self._channel.next_message(self.now())
                self._give_out()
                if message is None:
                    await self._wait()
                else:
                    async with asyncio.timeout(self._silent_s):
                        await self._websocket.send(message)
        except TimeoutError:
            pass  # the peer takes nothing
        except ConnectionClosed:
            return  # `run` says why
        self.abort()

    @property
    def _given_up_s(self) -> float | None:
        """When the peer is given up, unless something more comes; None: never."""
        if self._silent_s is None:
            return None
        return min(self._websocket.heard_s + self._silent_s, self._websocket.message_due_s)

    @property
    def _is_given_up(self) -> bool:
        given_up_s = self._given_up_s
        return given_up_s is not None and self.now() >= given_up_s

    async def _wait(self) -> None:
        """Wait until there may be something to send."""
        times = [t for t in (self._channel.next_time(), self._given_up_s) if t is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min(times, default=None)):
                await self._news.wait()

    async def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait((self._sending,))


def _reason(error: ConnectionClosed | None) -> str:
    if error is None or isinstance(error, ConnectionClosedOK):
        return (error and error.rcvd and error.rcvd.reason) or "it was closed"
    if error.rcvd is not None:
        return error.rcvd.reason or f"closed with code {error.rcvd.code}"
    return "it broke off"
