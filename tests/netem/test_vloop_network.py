"""Datagrams in virtual time take their paths, and meet what they would meet in a kernel."""

import asyncio
import errno
import io
import socket
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

from eloquent_netem.capture import (
    Captured,
    Fate,
    PcapWriter,
    ipv4_port_unreachable,
    ipv4_udp,
)
from eloquent_netem.link import Link
from eloquent_netem.loss import DropList
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.queues import DropTail
from eloquent_netem.rate import FixedRate
from eloquent_netem.vloop import (
    NetworkSetupError,
    VirtualNetwork,
    run,
)
from eloquent_netem.vloop_network import to_ip


def test_a_datagram_takes_the_link_s_time_each_way() -> None:
    network = network_with()

    async def main() -> None:
        with network.on("server"):
            await opened(Echo, local_addr=("0.0.0.0", 7))
        await asyncio.sleep(1)
        transport, inbox = await opened(Inbox, remote_addr=("server", 7))
        assert transport.get_extra_info("peername") == (SERVER_IP, 7)
        assert transport.get_extra_info("sockname") == (CLIENT_IP, 49152)
        transport.sendto(b"hello")
        assert await inbox.next() == (1 + UP_S + DOWN_S, b"hello", (SERVER_IP, 7))

    run(main(), network)


def test_an_unconnected_socket_sends_where_it_is_told() -> None:
    network = network_with()

    async def main() -> None:
        with network.on("server"):
            await opened(Echo, local_addr=("0.0.0.0", 7))
            await opened(Echo, local_addr=("server", 8))
        transport, inbox = await opened(Inbox, local_addr=("0.0.0.0", 0))
        transport.sendto(b"to 8", (SERVER_IP, 8))
        transport.sendto(b"to 7", (SERVER_IP, 7))
        assert [(await inbox.next())[1:] for _ in range(2)] == [
            (b"to 8", (SERVER_IP, 8)),
            (b"to 7", (SERVER_IP, 7)),
        ]
        with pytest.raises(ValueError, match="needs an address"):
            transport.sendto(b"whither?")

    run(main(), network)


def test_a_lost_datagram_does_not_come() -> None:
    network = network_with(loss=DropList([0]))

    async def main() -> None:
        _, inbox = await opened(Inbox, local_addr=(SERVER_IP, 7))
        transport, _ = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        transport.sendto(b"lost")
        transport.sendto(b"found")
        assert (await inbox.next())[1] == b"found"
        await asyncio.sleep(1)
        assert inbox.items == []

    run(main(), network)


def test_a_connected_socket_hears_its_peer_only() -> None:
    network = network_with()

    async def main() -> None:
        _, peer = await opened(Inbox, local_addr=(SERVER_IP, 7))
        other, _ = await opened(Inbox, local_addr=(SERVER_IP, 8))
        transport, inbox = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        transport.sendto(b"here I am", (SERVER_IP, 7))
        *_, address = await peer.next()
        other.sendto(b"hey", address)
        await asyncio.sleep(1)
        assert inbox.items == []
        with pytest.raises(ValueError, match="Invalid address"):
            transport.sendto(b"elsewhere", (SERVER_IP, 8))

    run(main(), network)


def test_a_connected_socket_learns_that_nobody_listens() -> None:
    async def main() -> None:
        transport, inbox = await opened(Inbox, remote_addr=("server", 7))
        transport.sendto(b"anybody?")
        time, error, _ = await inbox.next()
        assert isinstance(error, ConnectionRefusedError)
        assert time == UP_S + DOWN_S

    virtually(main())


def test_an_unconnected_socket_does_not_learn_that_nobody_listens() -> None:
    async def main() -> None:
        transport, inbox = await opened(Inbox, local_addr=("0.0.0.0", 0))
        transport.sendto(b"anybody?", ("198.51.100.1", 7))
        await asyncio.sleep(10)
        assert inbox.items == []

    virtually(main())


def test_loopback_takes_no_time_and_no_link() -> None:
    network = network_with(loss=DropList(range(100)))

    async def main() -> None:
        for host, other in (("client", "server"), ("server", "client")):
            with network.on(host):
                echo, _ = await opened(Echo, local_addr=("127.0.0.1", 7))
                transport, inbox = await opened(Inbox, remote_addr=("localhost", 7))
                transport.sendto(b"hello")
                assert await inbox.next() == (0.0, b"hello", ("127.0.0.1", 7))
                echo.close()
                await asyncio.sleep(0)
                transport.sendto(b"anybody?")
                assert isinstance((await inbox.next())[1], ConnectionRefusedError)
            with network.on(other):
                await opened(Inbox, local_addr=("127.0.0.1", 8))
        assert now() == 0

    run(main(), network)


def test_a_host_reaches_itself_by_its_own_address() -> None:
    async def main() -> None:
        await opened(Echo, local_addr=("0.0.0.0", 7))
        transport, inbox = await opened(Inbox, local_addr=("0.0.0.0", 0))
        transport.sendto(b"me", (CLIENT_IP, 7))
        assert await inbox.next() == (0.0, b"me", (CLIENT_IP, 7))

    virtually(main())


def test_what_a_socket_starts_runs_on_its_host() -> None:
    network = network_with()

    class Server(Inbox):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.task = asyncio.ensure_future(self.ask_a_neighbour(addr))

        async def ask_a_neighbour(self, addr: Any) -> None:
            transport, inbox = await opened(Inbox, remote_addr=("localhost", 8))
            transport.sendto(b"neighbour?")
            answer = (await inbox.next())[1]
            assert self.transport is not None
            self.transport.sendto(answer, addr)

    async def main() -> None:
        with network.on("server"):
            await opened(Server, local_addr=("0.0.0.0", 7))
            await opened(Echo, local_addr=("127.0.0.1", 8))
        transport, inbox = await opened(Inbox, remote_addr=("server", 7))
        transport.sendto(b"hello")
        assert (await inbox.next())[1] == b"neighbour?"

    run(main(), network)


def test_a_dual_stack_socket_speaks_of_ipv4_in_ipv6_form() -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6 sockets, which this Python lacks")
    network = network_with()
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    except OSError as error:
        pytest.skip(f"needs IPv6 sockets: {error}")
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 1)
    sock.bind(("::", 0, 0, 0))

    async def main() -> None:
        with network.on("server"):
            echo, echoed = await opened(Echo, local_addr=("::", 7))
        transport, inbox = await opened(Inbox, sock=sock)
        assert transport.get_extra_info("sockname") == ("::", 49152, 0, 0)
        transport.sendto(b"hello", (f"::ffff:{SERVER_IP}", 7, 0, 0))
        *_, address = await inbox.next()
        assert address == (f"::ffff:{SERVER_IP}", 7, 0, 0)
        assert (await echoed.next())[2] == (f"::ffff:{CLIENT_IP}", 49152, 0, 0)
        assert echo.get_extra_info("ecn") is Ecn.ECT_1
        transport.close()

    run(main(), network)
    assert sock.fileno() == -1


def test_the_ecn_field_goes_the_way_and_may_be_marked() -> None:
    class Marking(DropTail):
        def enqueue(self, now: float, packet: Packet) -> bool:
            packet.ecn = Ecn.CE if packet.ecn is Ecn.ECT_1 else packet.ecn
            return super().enqueue(now, packet)

    network = network_with(queue=Marking())

    async def main() -> None:
        server, inbox = await opened(Inbox, local_addr=(SERVER_IP, 7))
        transport, _ = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        marks = []
        for ecn in (Ecn.NOT_ECT, Ecn.ECT_0, Ecn.ECT_1):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_IP, socket.IP_TOS, ecn)
            transport.sendto(b"x")
            await inbox.next()
            marks.append(server.get_extra_info("ecn"))
        assert marks == [Ecn.NOT_ECT, Ecn.ECT_0, Ecn.CE]

    run(main(), network)


def test_a_closed_socket_gives_its_port_back_and_hears_nothing() -> None:
    async def main() -> None:
        first, inbox = await opened(Inbox, local_addr=(SERVER_IP, 7))
        with pytest.raises(OSError, match="in use") as caught:
            await opened(Inbox, local_addr=(SERVER_IP, 7))
        assert caught.value.errno == errno.EADDRINUSE
        transport, _ = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        transport.sendto(b"x")
        await asyncio.sleep(UP_S / 2)
        first.close()
        assert first.is_closing()
        await asyncio.sleep(1)
        assert (inbox.items, inbox.is_lost) == ([], True)
        first.sendto(b"from the grave", (CLIENT_IP, 1))
        await opened(Inbox, local_addr=(SERVER_IP, 7))

    virtually(main())


def test_ports_that_nobody_chose_are_alike_in_every_run() -> None:
    async def main() -> list[int]:
        return [
            (await opened(Inbox, local_addr=("0.0.0.0", 0)))[0].get_extra_info("sockname")[1]
            for _ in range(3)
        ]

    assert virtually(main()) == virtually(main()) == [49152, 49153, 49154]


@pytest.mark.parametrize(
    ("address", "code"),
    [("203.0.113.9", errno.ENETUNREACH), ("::", errno.ENETUNREACH)],
)
def test_there_is_no_route_to_who_is_not_there(address: str, code: int) -> None:
    async def main() -> None:
        with pytest.raises(OSError) as caught:  # noqa: PT011  (its errno is checked)
            await opened(Inbox, remote_addr=(address, 7))
        assert caught.value.errno == code
        transport, inbox = await opened(Inbox, local_addr=("0.0.0.0", 0))
        transport.sendto(b"x", (address, 7))
        assert (await inbox.next())[1].errno == code

    virtually(main())


def test_an_address_of_another_host_cannot_be_bound() -> None:
    network = network_with()

    async def main() -> None:
        with network.on("client"), pytest.raises(OSError) as caught:  # noqa: PT011
            await opened(Inbox, local_addr=(SERVER_IP, 7))
        assert caught.value.errno == errno.EADDRNOTAVAIL

    run(main(), network)


def test_a_datagram_that_is_too_large_is_an_error() -> None:
    async def main() -> None:
        transport, inbox = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        transport.sendto(bytes(65508))
        assert (await inbox.next())[1].errno == errno.EMSGSIZE

    virtually(main())


def test_names_are_the_network_s() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        kind = socket.SOCK_DGRAM
        assert await loop.getaddrinfo("server", 80, type=kind) == [
            (socket.AF_INET, kind, socket.IPPROTO_UDP, "", (SERVER_IP, 80))
        ]
        assert len(await loop.getaddrinfo(b"client", "80")) == 2
        mapped = await loop.getaddrinfo("server", 80, family=socket.AF_INET6)
        assert mapped[0][4] == (f"::ffff:{SERVER_IP}", 80, 0, 0)
        anywhere = await loop.getaddrinfo(None, 80, flags=socket.AI_PASSIVE)
        assert anywhere[0][4] == ("0.0.0.0", 80)
        assert await loop.getnameinfo((SERVER_IP, 80)) == ("server", "80")
        with pytest.raises(socket.gaierror, match=r"example\.com"):
            await loop.getaddrinfo("example.com", 80)
        with pytest.raises(socket.gaierror, match="https"):
            await loop.getaddrinfo("server", "https")

    virtually(main())


def test_a_capture_names_hosts_ports_and_refusals() -> None:
    file = io.BytesIO()
    writer = PcapWriter(file, to_ip=to_ip, at=Fate.SENT)
    network = VirtualNetwork.between(
        Captured(Link(delay_s=UP_S, seed=1, name="up"), "up", [writer.observe]),
        Captured(Link(delay_s=DOWN_S, seed=1, name="down"), "down", [writer.observe]),
    )

    async def main() -> None:
        transport, inbox = await opened(Inbox, remote_addr=("server", 7))
        transport.sendto(b"anybody?")
        await inbox.next()

    run(main(), network)
    client, server = (CLIENT_IP, 49152), (SERVER_IP, 7)
    asked = ipv4_udp(client, server, b"anybody?", Ecn.NOT_ECT)
    refused = ipv4_port_unreachable(server, client)
    data = file.getvalue()
    assert data[24 + 16 :][: len(asked)] == asked
    assert data[24 + 16 + len(asked) + 16 :] == refused


def test_cross_traffic_shares_the_link_and_ends_with_it() -> None:
    class Flood:
        """Sends a packet of 1000 bytes at 1.0 s, just before the subject does."""

        def __init__(self) -> None:
            self.time: float | None = 1.0
            self.delivered: list[float] = []

        def next_time(self) -> float | None:
            return self.time

        def act(self, now: float) -> None:
            up.send(now, Packet(b"", 1000, flow=1))
            self.time = None

        def on_delivered(self, now: float, packet: Packet) -> None:
            self.delivered.append(now)

    seen: list[float] = []
    up = Link(delay_s=UP_S, seed=1, name="up", rate=FixedRate(8000.0))
    down = Link(delay_s=DOWN_S, seed=1, name="down")
    watched = Captured(up, "up", [lambda now, way, packet, fate: seen.append(now)])
    network = VirtualNetwork.between(watched, down)
    flood = Flood()
    network.add_cross(flood)

    async def main() -> float:
        _, inbox = await opened(Inbox, local_addr=(SERVER_IP, 7))
        transport, _ = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        await asyncio.sleep(1.5)
        transport.sendto(bytes(72))  # 100 bytes with its headers: 0.1 s at this rate
        return (await inbox.next())[0]

    assert run(main(), network) == pytest.approx(2.0 + 0.1 + UP_S)
    assert flood.delivered == [2.0 + UP_S]
    assert seen == [1.5, pytest.approx(2.1 + UP_S)]


def test_a_network_runs_once() -> None:
    network = network_with()

    async def main() -> None:
        await asyncio.sleep(0)

    run(main(), network)
    with pytest.raises(NetworkSetupError, match="new network"):
        run(main(), network)


def test_a_network_is_set_up_with_care() -> None:
    network = network_with()
    for name, ip in (("server", "192.0.2.7"), ("third", SERVER_IP), ("fourth", "127.0.0.1")):
        with pytest.raises(NetworkSetupError, match="of its own"):
            network.add_host(name, ip)
    with pytest.raises(NetworkSetupError, match="no IPv4 address"):
        network.add_host("fifth", "2001:db8::1")
    link = Link(delay_s=0, seed=1, name="x")
    with pytest.raises(NetworkSetupError, match="cannot be joined"):
        network.add_path("server", "client", link, link)
    with pytest.raises(NetworkSetupError, match=r"client, server"), network.on("nobody"):
        pass


def test_three_hosts_have_paths_of_their_own() -> None:
    network = network_with()
    network.add_host("upstream", "203.0.113.1")
    network.add_path(
        "server",
        "upstream",
        Link(delay_s=1, seed=1, name="a"),
        Link(delay_s=2, seed=1, name="b"),
    )

    async def main() -> None:
        await opened(Echo, local_addr=("203.0.113.1", 7))
        with network.on("server"):
            transport, inbox = await opened(Inbox, remote_addr=("upstream", 7))
        transport.sendto(b"far")
        assert (await inbox.next())[:2] == (3.0, b"far")
        with pytest.raises(OSError, match="unreachable"):
            await opened(Inbox, remote_addr=("upstream", 7))

    run(main(), network)
