"""A server of streams on a virtual host, for tests of the virtual loop's TCP."""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from eloquent_netem.vloop import VirtualNetwork

LINGER_0 = struct.pack("ii", 1, 0)
"The value of SO_LINGER with which closing a socket resets the connection."

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(
    network: VirtualNetwork, handler: Handler, port: int = 80
) -> AsyncIterator[asyncio.Server]:
    """Serve on the server's host; what a handler raises ends the test."""
    handling: list[asyncio.Task[None]] = []

    def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def whole() -> None:
            await handler(reader, writer)

        handling.append(asyncio.ensure_future(whole()))

    with network.on("server"):
        server = await asyncio.start_server(handle, port=port)
    async with server:
        yield server
        await asyncio.gather(*handling)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
