"""What chat products use: OpenAI's chunks as server-sent events over HTTP/1.1, TLS and TCP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

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

PATH = "/v1/chat/completions"
FIELD = "data: "

NOBODY = "http://127.0.0.1:9/"
"Nothing listens there."


async def serve(end: End) -> None:
    """Answer over HTTP, with uvicorn."""

    async def complete(request: Request) -> StreamingResponse:
        await request.json()
        return StreamingResponse(_events(end), media_type="text/event-stream")

    context, hello = server_identity()
    config = uvicorn.Config(
        Starlette(routes=[Route(PATH, complete, methods=["POST"])]),
        ssl_context_factory=lambda *_: context,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
    )
    server = uvicorn.Server(config)
    sock = listening_socket(SERVER_ADDRESS, end.setup.congestion)
    await asyncio.gather(server.serve(sockets=[sock]), end.serve_until_stopped(hello))


async def ask(end: End) -> None:
    """Ask with httpx2, and note the text of each event."""
    async with httpx2.AsyncClient(trust_env=False) as client:
        with contextlib.suppress(httpx2.ConnectError):
            await client.get(NOBODY)  # It loads much of itself only now.
    server = await end.until_start()
    transport = httpx2.AsyncHTTPTransport(
        verify=client_context(server), socket_options=socket_options(end.setup.congestion)
    )
    url = f"https://{SERVER_ADDRESS}:{PORT}{PATH}"
    async with (
        httpx2.AsyncClient(transport=transport, timeout=None) as client,
        client.stream("POST", url, json=REQUEST) as response,
    ):
        response.raise_for_status()
        async for line in response.aiter_lines():
            data = line.removeprefix(FIELD)
            if data == DONE:
                break
            if data and (text := text_of(data)):
                end.note(text)
        end.leave()


async def _events(end: End) -> AsyncIterator[str]:
    async for text, is_last in answer_of(end):
        if text:
            yield f"{FIELD}{chunk(text)}\n\n"
        if is_last:
            yield f"{FIELD}{chunk('', is_last=True)}\n\n"
    yield f"{FIELD}{DONE}\n\n"
