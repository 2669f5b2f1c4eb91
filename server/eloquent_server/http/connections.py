"""HTTP connections over TCP: uvicorn's, with bounds on their number, and on the time they take.

What uvicorn leaves open: TLS and a request's headers may take as long as they like, a reader that
reads nothing keeps its connection for ever, and the rest of a refused body is read to its end.
"""

import asyncio
import logging
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from eloquent.addresses import MAX_PER_ADDRESS, Sites
from eloquent.handshakes import HANDSHAKE_S, Handshakes
from eloquent.openai import error_body

MAX_CONNECTIONS = 2000
MAX_HANDSHAKES = 200
"""Connections without a request on them, new or kept alive: when there are more, the oldest goes.
With TLS each has buffers of 400 KB."""
KEEP_ALIVE_S = 8
"""So long a connection may rest between requests. More than the 5 s after which httpx2 uses it no
more, so that a request does not cross its end; less than `HANDSHAKE_S`."""
SLOW_READER_S = 60.0
"A connection that takes nothing for so long is given up."
CLOSE_S = 2.0
"How long the rest of a request that was refused is passed over, so that its client hears why."
MAX_PASSED_OVER_BYTES = 1 << 16

MALFORMED = "The request is no HTTP, or its headers are too long."

logger = logging.getLogger(__name__)


class Connections:
    """What the connections of one listener share."""

    def __init__(
        self,
        most: int = MAX_CONNECTIONS,
        waiting: int = MAX_HANDSHAKES,
        of_one: int = MAX_PER_ADDRESS,
    ) -> None:
        """`most` connections may be open, `waiting` of them without a request, `of_one` address."""
        self._most = most
        self._sites: Sites[Connection] = Sites(of_one)
        self.open: set[Connection] = set()
        self.waiting: Handshakes[Connection] = Handshakes(waiting, Connection.give_up)
        self.refused: Counter[str] = Counter()
        "How many connections were refused or given up, by reason."
        self.tls: Callable[[], ssl.SSLContext] | None = None
        "Returns what is shown to a new connection; None: there is no TLS."

    def has_room(self, host: str) -> bool:
        """Return whether one more may come in from an address."""
        return len(self.open) < self._most and self._sites.has_room(host)

    def begin(self, connection: "Connection", host: str) -> None:
        """Take note of a new one."""
        self.open.add(connection)
        self._sites.begin(connection, host)

    def done(self, connection: "Connection") -> None:
        """Take note that one is over."""
        self.open.discard(connection)
        self._sites.done(connection)


class Connection(H11Protocol):
    """One connection; TLS is made here, so that few are made at a time."""

    def __init__(self, all_: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._all = all_
        self._below: asyncio.Transport | None = None
        "TCP, until there can be a request."
        self._early = bytearray()
        "What came with the end of TLS's handshake."
        self._securing: asyncio.Task[None] | None = None
        self._host = ""
        self._is_waiting = False
        self._stuck: asyncio.TimerHandle | None = None
        self._passed_over: int | None = None
        "How many bytes came after the response to a request that is not whole."
        self._closing: asyncio.TimerHandle | None = None
        "Ends the connection then."

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`: there is TCP."""
        self._below = cast(asyncio.Transport, transport)
        self._host = (transport.get_extra_info("peername") or ("",))[0]
        if not self._all.has_room(self._host):
            self._all.refused["too_many_connections"] += 1
            self._below.abort()
            return
        self._all.begin(self, self._host)
        self._wait(is_waiting=True)
        if self._all.tls is None:
            self._begin(self._below)
        else:
            self._securing = asyncio.ensure_future(self._secure(self._below, self._all.tls()))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._passed_over is not None:
            self._pass_over(data)
        elif self._below is not None:
            self._early += data
        else:
            super().data_received(data)
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._all.done(self)
        self._wait(is_waiting=False)
        self._is_unstuck()
        if self._below is None:
            super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Take the next request, unless this one was not read to its end."""
        if self.conn.their_state is not h11.SEND_BODY or self.transport.is_closing():
            super().on_response_complete()
            self._wait_for_headers()
            return
        # Closed at once, the kernel would answer what still comes with a reset, and the client
        # might never see the response (RFC 9112 section 9.6).
        self._passed_over = 0
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._closing = self.loop.call_later(CLOSE_S, self.transport.abort)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._stuck = self.loop.call_later(SLOW_READER_S, self._give_up_reader)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        self._is_unstuck()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in JSON; called by `H11Protocol`."""
        self._all.refused["malformed_request"] += 1
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = msgspec.json.encode(error_body("malformed_request", MALFORMED))
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        if self.cycle is not None:
            self.cycle.disconnected = True  # Of a request that broke in its body: nobody hears it.
        self.transport.close()

    def _pass_over(self, data: bytes) -> None:
        """Take what comes after the response to a request that was not whole."""
        assert self._passed_over is not None
        self._passed_over += len(data)
        if self._passed_over > MAX_PASSED_OVER_BYTES:
            self.transport.abort()
        elif not self.transport.can_write_eof():
            # TLS: the client has not heard that this is the end, so it is none if it can be helped.
            super().data_received(data)
            if self.conn.our_state is not h11.DONE and self._closing is not None:
                self._closing.cancel()
                self._passed_over = self._closing = None
                self._wait_for_headers()

    def give_up(self) -> None:
        """End a connection on which no request came in time, or that must make room."""
        self._is_waiting = False
        self._all.refused["request_timeout"] += 1
        (self._below or self.transport).abort()

    async def _secure(self, below: asyncio.Transport, tls: ssl.SSLContext) -> None:
        try:
            secured = await self.loop.start_tls(
                below,
                self,
                tls,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=CLOSE_S,
            )
        except OSError as error:  # TLS's errors and timeouts are such, too
            logger.debug("no TLS: %s", error)
            secured = None
        if secured is None or secured.is_closing():
            self._wait(is_waiting=False)
            self._all.done(self)
            return
        self._begin(secured)

    def _begin(self, transport: asyncio.Transport) -> None:
        """Let requests come."""
        self._below = None
        super().connection_made(transport)
        if self._early:
            early, self._early = bytes(self._early), bytearray()
            self.data_received(early)

    def _wait_for_headers(self) -> None:
        self._wait(is_waiting=self.conn.their_state is h11.IDLE)

    def _wait(self, *, is_waiting: bool) -> None:
        """Take note whether there is a request; the time without one counts from the first note."""
        if is_waiting and not self._is_waiting:
            self._all.waiting.begin(self, self._host)
        elif self._is_waiting and not is_waiting:
            self._all.waiting.done(self)
        self._is_waiting = is_waiting

    def _is_unstuck(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _give_up_reader(self) -> None:
        self._all.refused["slow_reader"] += 1
        self.transport.abort()
