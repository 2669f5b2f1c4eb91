"""`eloquent serve` on both rungs: a real process, QUIC and WebSocket at one port."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from eloquent.core.events import TextDelta
from eloquent.errors import ConnectionFailedError
from eloquent.link import Rung
from eloquent.quic.connect import connect as connect_quic
from eloquent.session.session import Connector, Session
from eloquent.url import ServerUrl, parse_url
from eloquent.websocket.client import connect as connect_websocket
from eloquent_server.serve import READY_PREFIX

BODY = json.dumps({"messages": [{"role": "user", "content": "say this again"}]}).encode()
DEADLINE_S = 60.0


@asynccontextmanager
async def serving(*options: str) -> AsyncIterator[ServerUrl]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "eloquent", "serve", "--model", "echo", "--port", "0", "--exit-with-parent"),
        *options,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            line = (await process.stdout.readline()).decode()
        yield parse_url(line.removeprefix(READY_PREFIX).strip())
    finally:
        process.stdin.close()
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0


async def answer(url: ServerUrl, connector: Connector) -> tuple[str, Rung]:
    session = Session(url, connector=connector)
    try:
        async with asyncio.timeout(DEADLINE_S):
            events = [event async for event in session.ask(BODY)]
        assert session.link is not None
        rung = session.link.rung
    finally:
        await session.close()
    return "".join(event.text for event in events if isinstance(event, TextDelta)), rung


async def test_both_rungs_answer_at_one_port() -> None:
    async with serving() as url:
        over_quic = await answer(url, connect_quic)
        over_websocket = await answer(url, connect_websocket)
    assert "say this again" in over_quic[0]
    assert over_quic == (over_websocket[0], Rung.DATAGRAMS)
    assert over_websocket[1] is Rung.WEBSOCKET


async def test_websocket_can_be_left_out() -> None:
    async with serving("--no-websocket") as url:
        assert "say this again" in (await answer(url, connect_quic))[0]
        with pytest.raises(ConnectionFailedError, match=r"Nothing listens on .* TCP port"):
            await answer(url, connect_websocket)


async def test_a_port_that_is_taken_for_tcp_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "eloquent", "serve", "--model", "echo", "--port", str(port)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate()
    assert process.returncode != 0
    assert out == b""
    assert f"TCP port {port}" in err.decode()
    assert "--no-websocket" in err.decode()
