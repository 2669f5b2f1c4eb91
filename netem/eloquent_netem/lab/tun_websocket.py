"""The same chunks, a WebSocket message each, over TLS and TCP, with `websockets`' defaults."""

import asyncio
import socket

import msgspec
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets

from eloquent_netem.lab.tun_ends import PORT, REQUEST, End, answer_of
from eloquent_netem.lab.tun_tls import (
    DONE,
    chunk,
    client_context,
    listening_socket,
    server_identity,
    socket_options,
    text_of,
)
from eloquent_netem.namespaces import SERVER_ADDRESS


async def serve(end: End) -> None:
    """Answer over WebSocket."""

    async def answer(websocket: ServerConnection) -> None:
        await websocket.recv()
        async for text, is_last in answer_of(end):
            if text:
                await websocket.send(chunk(text))
            if is_last:
                await websocket.send(chunk("", is_last=True))
        await websocket.send(DONE)
        await websocket.wait_closed()

    context, hello = server_identity()
    sock = listening_socket(SERVER_ADDRESS, end.setup.congestion)
    async with serve_websockets(answer, sock=sock, ssl=context, open_timeout=None):
        await end.serve_until_stopped(hello)


async def ask(end: End) -> None:
    """Ask, and note the text of each message."""
    server = await end.until_start()
    context = client_context(server)
    with socket.socket() as sock:
        for level, name, value in socket_options(end.setup.congestion):
            sock.setsockopt(level, name, value)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (SERVER_ADDRESS, PORT))
        url = f"wss://{SERVER_ADDRESS}:{PORT}/"
        async with connect(url, sock=sock, ssl=context, open_timeout=None) as websocket:
            await websocket.send(msgspec.json.encode(REQUEST).decode())
            async for data in websocket:
                if data == DONE:
                    break
                if text := text_of(str(data)):
                    end.note(text)
            end.leave()
