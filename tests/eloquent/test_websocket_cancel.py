"""An attempt over WebSocket that is given up, since QUIC was there first, leaves nothing open."""

import asyncio
import contextlib
import gc
import socket
from collections.abc import Sequence

from eloquent.core.events import Event
from eloquent.errors import EloquentError
from eloquent.link import Link
from eloquent.url import ServerUrl
from eloquent.websocket.client import connect

ATTEMPTS = 60
STEPS = 12
"Of the event loop, after which an attempt is given up: before, while and after TCP connects."


class Nobody:
    """A `LinkUser` that is told nothing, for there is no link."""

    def on_early(self, link: Link) -> None:
        raise AssertionError

    def on_progress(self, link: Link, turn: int, events: Sequence[Event]) -> None:
        raise AssertionError

    def on_turn_failed(self, link: Link, turn: int, error: EloquentError) -> None:
        raise AssertionError

    def on_link_ended(self, link: Link, error: EloquentError) -> None:
        raise AssertionError


async def test_whenever_it_is_given_up_no_socket_is_left_open() -> None:
    """An open one would be a warning, which is an error."""
    with socket.create_server(("127.0.0.1", 0), backlog=ATTEMPTS) as server:
        url = ServerUrl("127.0.0.1", server.getsockname()[1], "00" * 32)
        for attempt in range(ATTEMPTS):
            connecting = asyncio.ensure_future(connect(url, Nobody(), 5.0))
            for _ in range(attempt % STEPS):
                await asyncio.sleep(0)
            connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await connecting
    gc.collect()
