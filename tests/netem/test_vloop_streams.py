"""asyncio's TCP in virtual time: connections, streams, flow control, and how they end.

The way to the server takes 30 ms, the way back 50 ms.
"""

import asyncio
import errno
import io
import socket
import struct
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from virtual_hosts import (
    CLIENT_IP,
    DOWN_S,
    SERVER_IP,
    UP_S,
    Echo,
    Inbox,
    network_with,
    now,
    opened,
    virtually,
)
from virtual_streams import echo, serving

from eloquent_netem.capture import Captured, Fate, PcapWriter
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import DropList, IndependentLoss, NoLoss, Outages
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.queues import DropTail
from eloquent_netem.rate import FixedRate
from eloquent_netem.tcp.segment import SYN, Segment, TcpPacket, to_packet
from eloquent_netem.vloop import VirtualNetwork, run
from eloquent_netem.vloop_network import to_ip

RTT_S = UP_S + DOWN_S


def test_a_stream_is_echoed_in_the_links_time() -> None:
    network = network_with()

    async def main() -> None:
        async with serving(network, echo):
            start = now()
            reader, writer = await asyncio.open_connection("server", 80)
            assert now() - start == pytest.approx(RTT_S)
            assert writer.get_extra_info("peername") == (SERVER_IP, 80)
            assert writer.get_extra_info("sockname") == (CLIENT_IP, 49152)
            assert writer.get_extra_info("socket").type == socket.SOCK_STREAM
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            assert now() - start == pytest.approx(2 * RTT_S)
            assert writer.can_write_eof()
            writer.write_eof()
            assert await reader.read() == b""
            assert now() - start == pytest.approx(3 * RTT_S)
            writer.close()
            await writer.wait_closed()

    run(main(), network)


def test_a_server_knows_its_clients_and_runs_on_its_host() -> None:
    network = network_with()

    async def main() -> None:
        seen = []

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append((writer.get_extra_info("peername"), writer.get_extra_info("sockname")))
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("localhost", 81)
            with pytest.raises(OSError, match="error while attempting to bind"):
                await asyncio.start_server(echo, "client", 80)
            writer.close()

        async with serving(network, handle) as server:
            assert [s.getsockname() for s in server.sockets] == [("0.0.0.0", 80)]
            for _ in range(2):
                reader, writer = await asyncio.open_connection(SERVER_IP, 80)
                assert await reader.read() == b""
                writer.close()
        assert seen == [((CLIENT_IP, port), (SERVER_IP, 80)) for port in (49152, 49153)]

    run(main(), network)


def test_nobody_listens() -> None:
    async def main() -> None:
        with pytest.raises(ConnectionRefusedError, match="Connect call failed"):
            await asyncio.open_connection("server", 80)
        assert now() == pytest.approx(RTT_S)

    virtually(main())


def test_a_server_that_has_closed_refuses_and_its_port_is_free() -> None:
    network = network_with()

    async def main() -> None:
        async with serving(network, echo):
            with pytest.raises(OSError, match="in use") as error:
                await asyncio.start_server(echo, "server", 80)
            assert error.value.errno == errno.EADDRINUSE
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("server", 80)
        async with serving(network, echo):
            _, writer = await asyncio.open_connection("server", 80)
            writer.close()

    run(main(), network)


def test_a_dead_link_is_given_up_as_linux_does() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError) as error:
            await asyncio.open_connection("server", 80)
        assert error.value.errno == errno.ETIMEDOUT
        assert now() == 131

    run(main(), network_with(loss=DropList(range(100))))


def test_a_link_that_dies_breaks_the_connection_after_a_quarter_of_an_hour() -> None:
    network = network_with(loss=Outages([(1.0, 1e6)], NoLoss()))

    async def main() -> None:
        with network.on("server"):
            await asyncio.start_server(echo, port=80)
        reader, writer = await asyncio.open_connection("server", 80)
        await asyncio.sleep(1)
        writer.write(b"anybody?")
        with pytest.raises(TimeoutError):
            await reader.read()
        assert 924.6 < now() < 1050
        with pytest.raises(TimeoutError):
            await writer.wait_closed()

    run(main(), network)


def test_a_connection_can_be_cancelled_while_it_is_made() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.open_connection("server", 80)
        assert now() == 5

    run(main(), network_with(loss=DropList(range(100))))


def test_each_half_ends_by_itself() -> None:
    network = network_with()

    async def main() -> None:
        async def total(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            question = await reader.read()
            for _ in range(10):
                await asyncio.sleep(1)
                writer.write(b"%d " % len(question))
            writer.close()
            await writer.wait_closed()

        async with serving(network, total):
            reader, writer = await asyncio.open_connection("server", 80)
            writer.write(bytes(5000))
            writer.write_eof()
            with pytest.raises(RuntimeError, match="after write_eof"):
                writer.write(b"more")
            assert await reader.read() == b"5000 " * 10
            writer.close()
            await writer.wait_closed()

    run(main(), network)


def test_a_bulk_transfer_fills_a_long_path() -> None:
    # Send and receive buffers grow with the window, so that 20 Mbit/s come to be used.
    network = network_with(rate=FixedRate(20e6), queue=DropTail(limit_packets=400))
    size = 5_000_000

    async def main() -> float:
        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert len(await reader.readexactly(size)) == size
            writer.close()

        async with serving(network, take):
            reader, writer = await asyncio.open_connection("server", 80)
            start = now()
            writer.write(bytes(size))
            assert await reader.read() == b""
            writer.close()
            return now() - start

    assert size / 2.5e6 < run(main(), network) < 1.6 * size / 2.5e6


@pytest.mark.parametrize("seed", range(5))
def test_what_a_lossy_link_takes_comes_all_the_same(seed: int) -> None:
    rngs = {name: stage_rng(seed, name, "loss") for name in ("up", "down")}
    network = VirtualNetwork.between(
        *(
            Link(delay_s=0.05, seed=seed, name=name, loss=IndependentLoss(0.05, rng))
            for name, rng in rngs.items()
        )
    )
    data = bytes(index * index % 251 for index in range(300_000))

    async def main() -> None:
        async with serving(network, echo):
            reader, writer = await asyncio.open_connection("server", 80)
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data
            writer.close()
            await writer.wait_closed()

    run(main(), network)


def test_loopback_takes_no_link() -> None:
    network = network_with(loss=DropList(range(100)))

    async def main() -> None:
        server = await asyncio.start_server(echo, "localhost", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = bytes(1_000_000)
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == data
        assert writer.get_extra_info("sockname")[0] == "127.0.0.1"
        assert now() < 0.5
        writer.close()
        server.close()

    run(main(), network)


def test_datagrams_and_a_stream_share_a_link() -> None:
    sent: list[type[Packet]] = []
    up = Captured(
        Link(delay_s=UP_S, seed=1, name="up"),
        "up",
        [lambda _now, _direction, packet, _fate: sent.append(type(packet))],
    )
    network = VirtualNetwork.between(up, Link(delay_s=DOWN_S, seed=1, name="down"))

    async def main() -> None:
        with network.on("server"):
            await opened(Echo, local_addr=("0.0.0.0", 80))
        async with serving(network, echo, port=80):
            transport, inbox = await opened(Inbox, remote_addr=("server", 80))
            reader, writer = await asyncio.open_connection("server", 80)
            for _ in range(10):
                transport.sendto(b"datagram")
                writer.write(b"stream")
                assert (await inbox.next())[1] == b"datagram"
                assert await reader.readexactly(6) == b"stream"
            writer.close()

    run(main(), network)
    assert {kind.__name__ for kind in sent} == {"Datagram", "TcpPacket"}


def test_segments_are_written_to_pcap_as_they_are() -> None:
    file = io.BytesIO()
    written: list[bytes] = []
    writer_ = PcapWriter(file, to_ip=to_ip)

    def keep(time_s: float, direction: str, packet: Packet, fate: Fate) -> None:
        assert isinstance(packet, TcpPacket)
        written.append(to_ip(direction, packet))
        writer_.observe(time_s, direction, packet, fate)

    network = VirtualNetwork.between(
        Captured(Link(delay_s=UP_S, seed=1, name="up"), "up", [keep]),
        Link(delay_s=DOWN_S, seed=1, name="down"),
    )

    async def main() -> None:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("server", 80)

    run(main(), network)
    syn = written[0]
    assert syn[9] == socket.IPPROTO_TCP
    assert syn[12:24] == (
        socket.inet_aton(CLIENT_IP) + socket.inet_aton(SERVER_IP) + struct.pack("!HH", 49152, 80)
    )
    assert len(file.getvalue()) == 24 + 16 + len(syn)


def test_several_addresses_are_served_by_one_server() -> None:
    network = network_with()

    async def main() -> None:
        with network.on("server"):
            server = await asyncio.start_server(echo, ["localhost", "server"], 80)
            _, local = await asyncio.open_connection("localhost", 80)
        _, remote = await asyncio.open_connection("server", 80)
        assert len(server.sockets) == 2
        local.close()
        remote.close()
        server.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("server", 80)

    run(main(), network)


def test_a_local_address_is_bound() -> None:
    network = network_with()

    async def main() -> None:
        async with serving(network, echo):
            _, writer = await asyncio.open_connection(
                "server", 80, local_addr=("client", 5000), happy_eyeballs_delay=0.25
            )
            assert writer.get_extra_info("sockname") == (CLIENT_IP, 5000)
            with pytest.raises(OSError, match="in use"):
                await asyncio.open_connection("server", 80, local_addr=("client", 5000))
            writer.close()

    run(main(), network)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no sock specified"),
        ({"host": "server", "port": 80, "server_hostname": "x"}, "only meaningful with ssl"),
        ({"port": 80, "ssl": True}, "must set server_hostname"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=message):
            await asyncio.get_running_loop().create_connection(asyncio.Protocol, **arguments)

    virtually(main())


def test_an_unknown_host_is_said_so() -> None:
    async def main() -> None:
        with pytest.raises(socket.gaierror, match="nowhere"):
            await asyncio.open_connection("nowhere", 80)
        with pytest.raises(OSError, match=r"unreachable"):
            await asyncio.open_connection("203.0.113.9", 80)

    virtually(main())


def test_many_connections_at_once_are_accepted_in_order() -> None:
    network = network_with()

    async def main() -> None:
        numbers = count()

        async def number(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"%d" % next(numbers))
            writer.close()

        async def ask() -> bytes:
            reader, writer = await asyncio.open_connection("server", 80)
            answer = await reader.read()
            writer.close()
            return answer

        async with serving(network, number):
            answers = await asyncio.gather(*(ask() for _ in range(50)))
        assert answers == [b"%d" % index for index in range(50)]

    run(main(), network)


def test_files_are_sent_and_debugging_changes_nothing(tmp_path: Path) -> None:
    network = network_with()
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1000)

    async def main() -> float:
        async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with path.open("rb") as file:
                await asyncio.get_running_loop().sendfile(writer.transport, file)
            writer.close()

        async with serving(network, send):
            reader, writer = await asyncio.open_connection("server", 80)
            assert await reader.read() == path.read_bytes()
            writer.close()
        return now()

    in_debug_mode = run(main(), network, debug=True)
    network = network_with()
    assert run(main(), network, debug=False) == in_debug_mode


def test_a_port_is_free_again_when_its_connection_has_waited() -> None:
    network = network_with()

    async def main() -> None:
        async with serving(network, echo):
            for _ in range(3):
                reader, writer = await asyncio.open_connection(
                    "server", 80, local_addr=("client", 5000)
                )
                writer.write_eof()
                assert await reader.read() == b""
                writer.close()
                with pytest.raises(OSError, match="in use"):
                    await asyncio.open_connection("server", 80, local_addr=("client", 5000))
                await asyncio.sleep(61)

    run(main(), network)


def test_a_mark_is_in_the_captured_header() -> None:
    segment = Segment(0, 0, SYN, 0, 0)
    packet = to_packet(segment, source=("192.0.2.1", 1), destination=("192.0.2.2", 2))
    packet.ecn = Ecn.CE
    assert to_ip("up", packet)[1] == Ecn.CE
    assert to_ip("up", packet)[2:] == packet.data[2:]


@pytest.mark.parametrize("seed", range(20))
def test_a_link_that_does_everything_wrong_breaks_no_stream(seed: int) -> None:
    # Loss, jitter that reorders, copies, and readers that pause; both ends write and read at once.
    links = [
        Link(
            delay_s=0.05,
            seed=seed,
            name=name,
            loss=IndependentLoss(0.1, stage_rng(seed, name, "loss")),
            jitter_s=0.03,
            reorders=True,
            duplicates=0.2,
        )
        for name in ("up", "down")
    ]
    network = VirtualNetwork.between(*links)

    async def talk(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes
    ) -> bytes:
        rng = stage_rng(seed, data[:2].hex(), "application")

        async def send() -> None:
            for start in range(0, len(data), 7000):
                writer.write(data[start : start + 7000])
                await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        received = bytearray()
        while chunk := await reader.read(5000):
            received += chunk
            if rng.random() < 0.1:
                await asyncio.sleep(10 * rng.random())
        await sending
        writer.close()
        return bytes(received)

    async def main() -> None:
        question, answer = (stage_rng(seed, name, "data").randbytes(150_000) for name in "qa")
        received: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.append(await talk(reader, writer, answer))

        async with serving(network, serve):
            received.append(await talk(*await asyncio.open_connection("server", 80), question))
        assert sorted(received) == sorted((question, answer))

    run(main(), network)
