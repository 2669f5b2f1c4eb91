"""UDP sockets of the virtual loop, as asyncio's transports."""

import asyncio
import contextvars
import errno
import socket
from typing import Any, cast

from eloquent_netem.capture import Address
from eloquent_netem.packet import Ecn
from eloquent_netem.vloop_names import shown_address
from eloquent_netem.vloop_network import Binding, VirtualNetwork, os_error, plain_ip

ECN_MASK = 0b11
"The part of the type-of-service byte that is the ECN field (RFC 3168 section 5)."


class SocketView:
    """What `get_extra_info("socket")` returns: the ECN field can be set with IP_TOS."""

    def __init__(self, family: int, transport: "VirtualDatagramTransport") -> None:
        self.family = family
        self.type = socket.SOCK_DGRAM
        self.ecn = Ecn.NOT_ECT
        self._transport = transport

    def getsockname(self) -> Any:
        """Return the local address."""
        return self._transport.get_extra_info("sockname")

    def getpeername(self) -> Any:
        """Return the peer's address.

        Raises:
            OSError: it is not connected.
        """
        peer = self._transport.get_extra_info("peername")
        if peer is None:
            raise os_error(errno.ENOTCONN)
        return peer

    def setsockopt(self, level: int, option: int, value: Any, *_: int) -> None:
        """Take the ECN field of IP_TOS and IPV6_TCLASS; other options have no effect here."""
        if is_traffic_class(level, option):
            self.ecn = Ecn(int(value) & ECN_MASK)

    def getsockopt(self, level: int, option: int, *_: int) -> int:
        """Return the ECN field for IP_TOS and IPV6_TCLASS, else 0."""
        return int(self.ecn) if is_traffic_class(level, option) else 0


class VirtualDatagramTransport(asyncio.DatagramTransport):
    """A UDP socket in the virtual network, with the manners of asyncio's own.

    Besides what asyncio's offers, `get_extra_info("ecn")` is the ECN field of the datagram being
    received. Callbacks run in the context in which the socket was made, so on its host.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        network: VirtualNetwork,
        *,
        family: int,
        real: socket.socket | None = None,
    ) -> None:
        super().__init__()
        self._loop = loop
        self._network = network
        self._protocol = asyncio.DatagramProtocol()
        self._family = family
        self._real = real
        self._view = SocketView(family, self)
        if real is not None:
            self._view.ecn = _sent_ecn(real)
        self._context = contextvars.copy_context()
        self._binding: Binding | None = None
        self._is_closing = False
        self._extra: dict[str, Any] = {"socket": self._view, "peername": None}

    def open(self, local: Address, peer: Address | None) -> None:
        """Bind to a port, and connect to a peer if there is one.

        Raises:
            OSError: as a kernel would say.
        """
        self._binding = self._network.bind(*local, peer, self)
        self._extra["sockname"] = shown_address(
            (self._binding.ip, self._binding.port), self._family
        )
        if peer is not None:
            self._extra["peername"] = shown_address(peer, self._family)

    # What the application calls.

    def sendto(
        self,
        data: bytes | bytearray | memoryview,
        addr: Any = None,
    ) -> None:
        """See `asyncio.DatagramTransport`."""
        if self._binding is None:
            return
        peer = self._binding.peer
        if peer is None:
            if addr is None:
                raise ValueError("a socket that is not connected needs an address to send to")
            peer = self._meant(addr)
        elif addr is not None and self._meant(addr) != peer:
            raise ValueError(f"Invalid address: must be None or {self._extra['peername']}")
        try:
            self._network.send(self._loop.time(), self._binding, bytes(data), peer, self._view.ecn)
        except OSError as error:
            self._protocol.error_received(error)

    def close(self) -> None:
        """See `asyncio.BaseTransport`."""
        if not self._is_closing:
            self._is_closing = True
            self._loop.call_soon(self._lose, context=self._context)

    def abort(self) -> None:
        """See `asyncio.DatagramTransport`."""
        self.close()

    def is_closing(self) -> bool:
        """See `asyncio.BaseTransport`."""
        return self._is_closing

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """See `asyncio.BaseTransport`."""
        self._protocol = cast(asyncio.DatagramProtocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """See `asyncio.BaseTransport`."""
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See `asyncio.BaseTransport`."""
        return self._extra.get(name, default)

    def get_write_buffer_size(self) -> int:
        """Return 0: what is sent leaves at once."""
        return 0

    # What the network calls.

    def deliver(self, data: bytes, source: Address, ecn: Ecn) -> None:
        """Take a datagram."""
        self._loop.call_soon(self._receive, data, source, ecn, context=self._context)

    def refuse(self) -> None:
        """Take note that nobody listens at the peer's port."""
        self._loop.call_soon(self._report_refusal, context=self._context)

    def _receive(self, data: bytes, source: Address, ecn: Ecn) -> None:
        if not self._is_closing:
            self._extra["ecn"] = ecn
            self._protocol.datagram_received(data, shown_address(source, self._family))

    def _report_refusal(self) -> None:
        if not self._is_closing:
            self._protocol.error_received(os_error(errno.ECONNREFUSED))

    def _lose(self) -> None:
        self.release()
        self._protocol.connection_lost(None)

    def release(self) -> None:
        """Give the port back, and close the real socket that was handed in."""
        if self._binding is not None:
            self._network.release(self._binding)
            self._binding = None
        if self._real is not None:
            self._real.close()
            self._real = None

    def _meant(self, addr: Any) -> Address:
        ip = plain_ip(addr[0])
        if ip is None:
            raise os_error(errno.ENETUNREACH)
        return ip, addr[1]


def is_traffic_class(level: int, option: int) -> bool:
    """Return whether a socket option sets the byte that the ECN field is in."""
    return (level, option) in (
        (socket.IPPROTO_IP, socket.IP_TOS),
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    )


def _sent_ecn(sock: socket.socket) -> Ecn:
    """Return the ECN field that a real socket was told to send."""
    if sock.family == socket.AF_INET6:
        value = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    else:
        value = sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS)
    return Ecn(max(value, 0) & ECN_MASK)
