"""How TCP connections in virtual time break, and how a slow reader slows the writer down.

The way to the server takes 30 ms, the way back 50 ms.
"""

import asyncio
import socket

import pytest
from virtual_hosts import (
    DOWN_S,
    UP_S,
    network_with,
    now,
)
from virtual_streams import LINGER_0, echo, serving

from eloquent_netem.link import Link
from eloquent_netem.loss import DropList
from eloquent_netem.packet import Packet
from eloquent_netem.tcp.connection import SEND_BUFFER_BYTES
from eloquent_netem.tcp.receiver import BUFFER_BYTES
from eloquent_netem.vloop import VirtualNetwork, run

RTT_S = UP_S + DOWN_S


@pytest.mark.parametrize("resets", [False, True])
def test_an_abort_ends_as_the_socket_s_options_say(resets: bool) -> None:
    # asyncio's `abort` drops its own buffer and closes the socket: a FIN, unless SO_LINGER is 0.
    network = network_with()

    async def main() -> None:
        ended = asyncio.get_running_loop().create_future()

        async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                ended.set_result((now(), await reader.read()))
            except ConnectionResetError:
                ended.set_result((now(), "reset"))
            writer.close()

        async with serving(network, read):
            _, writer = await asyncio.open_connection("server", 80)
            if resets:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            writer.write(b"some")
            writer.transport.abort()
            start = now()
            await asyncio.sleep(1)
            result = await ended
            assert result[1] == ("reset" if resets else b"some")
            assert start - UP_S <= result[0] <= start + UP_S + 1e-9

    run(main(), network)


def test_closing_with_something_unread_resets_the_peer() -> None:
    network = network_with()

    async def main() -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()
            await asyncio.sleep(1)
            writer.close()

        async with serving(network, hang_up):
            reader, writer = await asyncio.open_connection("server", 80)
            writer.write(b"nobody reads this")
            with pytest.raises(ConnectionResetError):
                await reader.read()
            with pytest.raises(ConnectionResetError):
                await writer.wait_closed()

    run(main(), network)


def test_a_reader_that_pauses_stops_the_writer() -> None:
    network = network_with()
    chunk = 16384

    async def main() -> None:
        go_on, done = asyncio.Event(), asyncio.Event()
        received = bytearray()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()
            await go_on.wait()
            writer.transport.resume_reading()
            received.extend(await reader.read())
            done.set()
            writer.close()

        async with serving(network, slow):
            _, writer = await asyncio.open_connection("server", 80)
            sent = 0

            async def write() -> None:
                nonlocal sent
                for index in range(100):
                    writer.write(bytes([index]) * chunk)
                    sent += chunk
                    await writer.drain()
                writer.write_eof()

            writing = asyncio.create_task(write())
            await asyncio.sleep(10)
            high_water = writer.transport.get_write_buffer_limits()[1]
            held = sent
            # The peer's receive buffer, this kernel's send buffer, and asyncio's own.
            assert held <= BUFFER_BYTES + 2 * SEND_BUFFER_BYTES + high_water + chunk
            assert held > BUFFER_BYTES + high_water
            assert writer.transport.get_write_buffer_size() > high_water
            # The closed window is probed, for hours if need be; it is not given up.
            await asyncio.sleep(7200)
            assert sent == held
            go_on.set()
            await writing
            await done.wait()
            assert received == b"".join(bytes([index]) * chunk for index in range(100))
            writer.close()

    run(main(), network)


def test_a_lost_window_update_is_asked_for() -> None:
    downs: list[Packet] = []
    lost: set[int] = set()

    class Down(Link):
        def send(self, now: float, packet: Packet) -> None:
            if len(downs) not in lost:
                super().send(now, packet)
            downs.append(packet)

    network = VirtualNetwork.between(
        Link(delay_s=UP_S, seed=1, name="up"), Down(delay_s=DOWN_S, seed=1, name="down")
    )

    async def main() -> None:
        go_on = asyncio.Event()
        size = 4 * BUFFER_BYTES

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()
            await go_on.wait()
            lost.update(range(len(downs), len(downs) + 2))
            writer.transport.resume_reading()
            assert await reader.readexactly(size) == bytes(size)
            writer.close()

        async with serving(network, slow):
            reader, writer = await asyncio.open_connection("server", 80)
            writer.write(bytes(size))
            await asyncio.sleep(3)
            go_on.set()
            assert await reader.read() == b""
            assert 3 < now() < 12
            writer.close()

    run(main(), network)


def test_the_send_buffer_takes_so_much_and_no_more() -> None:
    network = network_with()

    async def main() -> None:
        async with serving(network, echo):
            _, writer = await asyncio.open_connection("server", 80)
            sock = writer.get_extra_info("socket")._sock
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == SEND_BUFFER_BYTES
            assert sock.send(bytes(50_000)) == 50_000
            assert sock.is_writable
            assert sock.send(bytes(50_000)) == SEND_BUFFER_BYTES - 50_000
            assert not sock.is_writable
            with pytest.raises(BlockingIOError):
                sock.send(b"more")
            writer.close()

    run(main(), network)


def test_a_reset_that_is_lost_is_sent_again_when_something_comes() -> None:
    # The port still listens, but the connection is gone.
    downs = DropList([1])
    network = VirtualNetwork.between(
        Link(delay_s=UP_S, seed=1, name="up"),
        Link(delay_s=DOWN_S, seed=1, name="down", loss=downs),
    )

    async def main() -> None:
        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            writer.close()

        async with serving(network, reset):
            reader, writer = await asyncio.open_connection("server", 80)
            await asyncio.sleep(1)
            assert not reader.at_eof()
            writer.write(b"hello?")
            with pytest.raises(ConnectionResetError):
                await reader.read()
            assert now() == pytest.approx(1 + 2 * RTT_S)
            writer.close()

    run(main(), network)


def test_who_is_not_accepted_waits_in_the_backlog_and_is_reset_with_it() -> None:
    network = network_with()

    async def main() -> None:
        with network.on("server"):
            listening = asyncio.get_running_loop()._table.open(socket.AF_INET)  # type: ignore[attr-defined]
            listening.bind(("0.0.0.0", 80))
            listening.listen(1)
        connected = [await asyncio.open_connection("server", 80) for _ in range(2)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.open_connection("server", 80)
        listening.close()
        for reader, writer in connected:
            with pytest.raises(ConnectionResetError):
                await reader.read()
            writer.close()

    run(main(), network)


def test_a_server_that_closes_during_the_handshake_resets() -> None:
    network = network_with()

    async def main() -> None:
        async with serving(network, echo):
            connecting = asyncio.create_task(asyncio.open_connection("server", 80))
            await asyncio.sleep(UP_S + 0.01)
        reader, writer = await connecting
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()

    run(main(), network)
