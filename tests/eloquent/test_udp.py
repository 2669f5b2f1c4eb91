"""The UDP endpoint: real sockets on loopback, and the virtual loop's."""

import asyncio
import errno
import logging
import socket
from typing import Any

import pytest

from eloquent.quic import udp
from eloquent.quic.ecn import Ecn
from eloquent.quic.udp import BURST_DATAGRAMS, UdpTransport, open_udp
from eloquent_netem.link import Link
from eloquent_netem.packet import Ecn as LinkEcn
from eloquent_netem.packet import Packet
from eloquent_netem.vloop import VirtualNetwork, run

DEADLINE_S = 10.0
"Ends a hang; decides nothing."


class Inbox:
    """Keeps what comes."""

    def __init__(self) -> None:
        self.datagrams: list[tuple[bytes, Any, Ecn]] = []
        self.errors: list[OSError] = []
        self.transport: UdpTransport | None = None
        self._came = asyncio.Event()

    def connection_made(self, transport: UdpTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any, ecn: Ecn) -> None:
        self.datagrams.append((data, addr, ecn))
        self._came.set()

    def error_received(self, exc: OSError) -> None:
        self.errors.append(exc)
        self._came.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.datagrams) + len(self.errors) < count:
                self._came.clear()
                await self._came.wait()


class Echo(Inbox):
    """Sends back what comes, with the codepoint that it came with."""

    def datagram_received(self, data: bytes, addr: Any, ecn: Ecn) -> None:
        super().datagram_received(data, addr, ecn)
        assert self.transport is not None
        self.transport.send(data, addr, ecn)


def bindable(host: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not bindable("::1"), reason="no IPv6 here")


@pytest.mark.parametrize(
    ("bound", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        pytest.param("::1", "::1", marks=needs_ipv6),
        pytest.param("::", "127.0.0.1", marks=needs_ipv6),
        pytest.param("::", "::1", marks=needs_ipv6),
    ],
    ids=["IPv4", "IPv6", "IPv4 to a socket for both", "IPv6 to a socket for both"],
)
@pytest.mark.parametrize("ecn", Ecn)
async def test_the_ecn_field_goes_there_and_back(bound: str, host: str, ecn: Ecn) -> None:
    echo, inbox = Echo(), Inbox()
    server = await open_udp(echo, local=(bound, 0))
    client = await open_udp(inbox, remote=(host, server.local_address[1]))
    try:
        client.send(b"there", None, ecn)
        await inbox.until(1)
        assert [(data, mark) for data, _, mark in echo.datagrams] == [(b"there", ecn)]
        assert [(data, mark) for data, _, mark in inbox.datagrams] == [(b"there", ecn)]
    finally:
        client.close()
        server.close()


async def test_each_packet_of_a_burst_has_its_own_codepoint() -> None:
    echo, inbox = Echo(), Inbox()
    server = await open_udp(echo, local=("127.0.0.1", 0))
    client = await open_udp(inbox, remote=server.local_address)
    marks = [Ecn(index % 4) for index in range(BURST_DATAGRAMS + 20)]  # more than one burst
    try:
        for index, mark in enumerate(marks):
            client.send(index.to_bytes(2, "big"), None, mark)
        await inbox.until(len(marks))
        assert [mark for _, _, mark in echo.datagrams] == marks
        assert [mark for _, _, mark in inbox.datagrams] == marks
    finally:
        client.close()
        server.close()


async def test_a_refusal_is_told_to_a_connected_endpoint() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        address = taken.getsockname()
    inbox = Inbox()
    client = await open_udp(inbox, remote=address)
    try:
        client.send(b"anyone?", None, Ecn.ECT_1)
        await inbox.until(1)
        assert isinstance(inbox.errors[0], ConnectionRefusedError)
    finally:
        client.close()


async def test_a_port_that_is_taken_is_an_error_of_the_system() -> None:
    first = await open_udp(Inbox(), local=("127.0.0.1", 0))
    try:
        with pytest.raises(OSError, match="in use") as caught:
            await open_udp(Inbox(), local=first.local_address)
        assert caught.value.errno == errno.EADDRINUSE
    finally:
        first.close()


async def test_after_close_nothing_is_sent_and_nothing_comes() -> None:
    echo, inbox = Echo(), Inbox()
    server = await open_udp(echo, local=("127.0.0.1", 0))
    client = await open_udp(inbox, remote=server.local_address)
    client.send(b"last", None, Ecn.NOT_ECT)
    server.close()
    client.close()
    assert client.is_closing()
    client.send(b"late", None, Ecn.ECT_1)
    await asyncio.sleep(0.01)
    assert echo.datagrams == inbox.datagrams == []


async def test_an_endpoint_may_be_closed_by_what_it_receives() -> None:
    class Once(Inbox):
        def datagram_received(self, data: bytes, addr: Any, ecn: Ecn) -> None:
            super().datagram_received(data, addr, ecn)
            assert self.transport is not None
            self.transport.close()

    once = Once()
    server = await open_udp(once, local=("127.0.0.1", 0))
    client = await open_udp(Inbox(), remote=server.local_address)
    for _ in range(3):
        client.send(b"x", None, Ecn.NOT_ECT)
    await once.until(1)
    client.close()
    assert len(once.datagrams) == 1
    assert once.errors == []


async def test_a_system_that_cannot_mark_sends_unmarked_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class NoControl(socket.socket):
        def sendmsg(self, *_: Any) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

    echo, inbox = Echo(), Inbox()
    server = await open_udp(echo, local=("127.0.0.1", 0))
    client = await open_udp(inbox, remote=server.local_address)
    real = client._sock  # type: ignore[attr-defined]
    with NoControl(fileno=real.detach()) as sock:
        client._sock = sock  # type: ignore[attr-defined]
        with caplog.at_level(logging.WARNING, logger="eloquent.quic.udp"):
            client.send(b"one", None, Ecn.ECT_1)
            client.send(b"two", None, Ecn.ECT_1)
        await echo.until(2)
        assert [mark for _, _, mark in echo.datagrams] == [Ecn.NOT_ECT] * 2
        assert not client.can_mark
        assert len(caplog.records) == 1
        assert "ECN is off" in caplog.text
        client.close()
    server.close()


async def test_a_system_that_does_not_tell_marks_says_so_and_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp, "_IP_RECVTOS", None)
    echo, inbox = Echo(), Inbox()
    with caplog.at_level(logging.INFO, logger="eloquent.quic.udp"):
        server = await open_udp(echo, local=("127.0.0.1", 0))
    assert len(caplog.records) == 1
    assert "does not tell the ECN field" in caplog.text
    client = await open_udp(inbox, remote=server.local_address)
    try:
        client.send(b"x", None, Ecn.ECT_1)
        await inbox.until(1)
        assert [mark for _, _, mark in echo.datagrams] == [Ecn.NOT_ECT]
    finally:
        client.close()
        server.close()


def test_in_virtual_time_links_see_the_marks_and_change_them() -> None:
    class Congested(Link):
        def send(self, now: float, packet: Packet) -> None:
            seen.append(packet.ecn)
            if packet.ecn is LinkEcn.ECT_1:
                packet.ecn = LinkEcn.CE
            super().send(now, packet)

    seen: list[LinkEcn] = []
    echo = Echo()

    async def main() -> list[Ecn]:
        with network.on("server"):
            server = await open_udp(echo, local=("0.0.0.0", 443))
        inbox = Inbox()
        client = await open_udp(inbox, remote=("server", 443))
        for ecn in (Ecn.ECT_1, Ecn.NOT_ECT, Ecn.ECT_0, Ecn.ECT_1):
            client.send(b"x", None, ecn)
        await inbox.until(4)
        client.close()
        server.close()
        return [mark for _, _, mark in inbox.datagrams]

    network = VirtualNetwork.between(
        Congested(delay_s=0.01, seed=0, name="up"), Link(delay_s=0.01, seed=0, name="down")
    )
    assert run(main(), network) == [Ecn.CE, Ecn.NOT_ECT, Ecn.ECT_0, Ecn.CE]
    assert seen == [LinkEcn.ECT_1, LinkEcn.NOT_ECT, LinkEcn.ECT_0, LinkEcn.ECT_1]
