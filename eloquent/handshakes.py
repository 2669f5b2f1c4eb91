"""Connections that are being made: anybody may begin one, so they are few and have little time.

A handshake costs the server memory and time before it knows anything of the client. When there are
too many the oldest makes room: one that is meant takes a few round trips, one that is not stays. It
is the oldest of the address that has the most, so that who begins many only hurts its own.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from eloquent.addresses import first_of_largest, site_of

HANDSHAKE_S = 10.0
"A connection has to be made within this time."

T = TypeVar("T")


class Handshakes(Generic[T]):
    """The connections of one endpoint that are being made."""

    def __init__(self, most: int, give_up: Callable[[T], None]) -> None:
        """`give_up` ends a connection that took too long, or that must make room."""
        self._most = most
        self._give_up = give_up
        self._pending: dict[T, tuple[asyncio.TimerHandle, str]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def begin(self, connection: T, host: str) -> None:
        """Take note of a new connection from an address."""
        if len(self._pending) >= self._most:
            self._make_room()
        timer = asyncio.get_running_loop().call_later(HANDSHAKE_S, self._end, connection)
        self._pending[connection] = timer, site_of(host)

    def done(self, connection: T) -> None:
        """Take note that a connection is made, or over."""
        pending = self._pending.pop(connection, None)
        if pending is not None:
            pending[0].cancel()

    def close(self) -> None:
        """Give up all."""
        for connection in list(self._pending):
            self._end(connection)

    def _make_room(self) -> None:
        oldest = first_of_largest((each, site) for each, (_, site) in self._pending.items())
        if oldest is not None:
            self._end(oldest)

    def _end(self, connection: T) -> None:
        self.done(connection)
        self._give_up(connection)
