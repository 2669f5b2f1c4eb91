"""Drives one connection on an asyncio loop: timer, sending, events."""

import asyncio
from collections.abc import Callable

from eloquent.quic.connection import Address, Connection, ConnectionEvent
from eloquent.quic.ecn import Ecn


class Driver:
    """The thin shell of I/O around a sans-I/O `Connection`.

    `pump` must follow every call to the connection that may have something to say.
    """

    def __init__(
        self,
        connection: Connection,
        send: Callable[[bytes, Address, Ecn], None],
        on_event: Callable[[ConnectionEvent], None],
    ) -> None:
        self._connection = connection
        self._send = send
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def now(self) -> float:
        """Return the loop's time in seconds."""
        return self._loop.time()

    def receive(self, data: bytes, address: Address, ecn: Ecn = Ecn.NOT_ECT) -> None:
        """Hand over a UDP datagram."""
        self._connection.receive(data, address, self.now(), ecn)
        self.pump()

    def pump(self) -> None:
        """Give out events, send what there is to send, set the timer."""
        while (event := self._connection.next_event()) is not None:
            self._on_event(event)
        for data, address, ecn in self._connection.send(self.now()):
            self._send(data, address, ecn)
        self._set_timer()

    def stop(self) -> None:
        """Set no timer any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self.stop()
        if self._connection.is_ended:
            return
        time = self._connection.next_time()
        if time is not None:
            self._timer = self._loop.call_at(time, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._connection.handle_timer(self.now())
        self.pump()
