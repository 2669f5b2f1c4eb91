"""Listening sockets, with asyncio on them."""

import asyncio
import socket

import pytest

from eloquent.listening import listen_tcp


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_small_writes_do_not_wait_for_acknowledgements(host: str) -> None:
    """Without this, an answer's words come in pairs, 40 ms late."""
    accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    with listen_tcp(host, 0) as listening:
        server = await asyncio.start_server(lambda _, writer: accepted.put(writer), sock=listening)
        _, writer = await asyncio.open_connection(*listening.getsockname()[:2])
        theirs = await accepted.get()
        sock = theirs.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for each in (writer, theirs):
            each.close()
            await each.wait_closed()
        server.close()


def test_an_address_that_is_taken_is_an_error() -> None:
    with listen_tcp("127.0.0.1", 0) as listening, pytest.raises(OSError, match="in use"):
        listen_tcp(*listening.getsockname())
