"""The same asyncio code over the kernel's loopback and the virtual one comes to the same end."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable

import pytest
from virtual_hosts import network_with

from eloquent_netem.vloop import run

Side = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]

RESETTING = struct.pack("ii", 1, 0)


async def meet(server_side: Side, client_side: Side) -> tuple[str, str]:
    """Return what the server's and the client's side came to."""
    served: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.set_result(await outcome(server_side, reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        client = await outcome(client_side, reader, writer)
        return await served, client


async def outcome(side: Side, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    async with asyncio.timeout(20):
        try:
            result = repr(await side(reader, writer))
        except OSError as error:
            result = type(error).__name__
        writer.close()
        try:
            await writer.wait_closed()
        except OSError as error:
            result += f", closed by {type(error).__name__}"
        return result


async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    return await reader.read()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    question = await reader.read()
    writer.write(question * 10_000)
    await writer.drain()
    return len(question)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    writer.write(b"x" * 100)
    writer.write_eof()
    return len(await reader.read())


async def abort(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"some")
    writer.transport.abort()


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETTING)
    writer.transport.abort()


async def write_and_reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"some")
    await asyncio.sleep(0.05)
    await reset(reader, writer)


async def read_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(0.2)
    reader._transport.resume_reading()  # type: ignore[attr-defined]
    data = await reader.readexactly(4)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    return data


async def leave_unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(0.05)


async def write_and_wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"nobody reads this")
    return await reader.read()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    return None


async def write_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert await reader.read() == b""
    for _ in range(100):
        writer.write(b"is anybody there?")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("server_side", "client_side"),
    [
        (answer, ask),
        (read, abort),
        (read, reset),
        (leave_unread, write_and_wait),
        (hang_up, write_on),
        (write_and_reset, read_late),
        (hang_up, read),
    ],
    ids=lambda side: side.__name__,
)
def test_both_loops_come_to_the_same(server_side: Side, client_side: Side) -> None:
    real = asyncio.run(meet(server_side, client_side))
    virtual = run(meet(server_side, client_side), network_with())
    assert virtual == real


def test_both_loops_refuse_alike() -> None:
    async def attempt() -> tuple[str, int | None]:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        try:
            await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError as error:
            return str(error).replace(str(port), "PORT"), error.errno
        raise AssertionError("somebody listens")

    assert run(attempt(), network_with()) == asyncio.run(attempt())
