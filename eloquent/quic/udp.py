"""A UDP endpoint that sets and reads the ECN field of each packet.

asyncio's own endpoint does neither, and gives out one datagram for each round of the loop. This
one reads bursts of datagrams with `recvmsg` and sends with `sendmsg`: the field travels as control
data, IP_TOS for IPv4 (also the IPv4 traffic of a socket for both, whose peers look like
`::ffff:192.0.2.1`) and IPV6_TCLASS for IPv6. It needs a loop with readers. On others (virtual time,
Windows' proactor) asyncio's endpoint is used: there the field can be set as far as the socket
takes the option, and be read only if the transport tells it (`get_extra_info("ecn")`).

Sending does not wait. What the system has no room for is dropped, as any router on the way may do.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import sys
from abc import ABC, abstractmethod
from typing import Any, Protocol, cast

from eloquent.quic.ecn import Ecn

BURST_DATAGRAMS = 64
"So many datagrams are read before the loop's other business has its turn."

MAX_DATAGRAM_BYTES = 4096
"Larger ones are cut, which no QUIC packet survives; nobody sends us one over 1500."

BUFFER_BYTES = 4 << 20
"""What we ask of the system for each direction; it gives what it allows. Its usual 208 KiB hold
some 270 small packets: the bursts of a few readers."""

CONTROL_BYTES = 64 if sys.platform == "win32" else socket.CMSG_SPACE(4) + socket.CMSG_SPACE(4)
ECN_MASK = 0b11
"The part of the type-of-service byte that is the ECN field (RFC 3168 section 5)."

MAPPED_PREFIX = "::ffff:"
"How an IPv6 socket shows an IPv4 peer (RFC 4291 section 2.5.5.2)."

_CODEPOINTS = tuple(Ecn)
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOPROTOOPT)
_IP_RECVTOS: int | None = getattr(socket, "IP_RECVTOS", None)
_IPV6_TCLASS: int | None = getattr(socket, "IPV6_TCLASS", None)
_IPV6_RECVTCLASS: int | None = getattr(socket, "IPV6_RECVTCLASS", None)

Control = list[tuple[int, int, bytes]]
Address = Any
"A socket address, as the socket's family has it."

logger = logging.getLogger(__name__)


class UdpProtocol(Protocol):
    """What an endpoint hands its datagrams to; the calls are those of asyncio's, and ECN."""

    def connection_made(self, transport: "UdpTransport") -> None:
        """Take the transport; the first call."""

    def datagram_received(self, data: bytes, addr: Address, ecn: Ecn) -> None:
        """Take a datagram."""

    def error_received(self, exc: OSError) -> None:
        """Take note that the system refused to send or to receive."""


class UdpTransport(ABC):
    """An open endpoint."""

    @property
    @abstractmethod
    def local_address(self) -> Address:
        """Where it is bound."""

    @property
    @abstractmethod
    def peer_address(self) -> Address | None:
        """Where it is connected to, if it is."""

    @property
    @abstractmethod
    def can_mark(self) -> bool:
        """Whether ECN fields can be set, as far as is known."""

    @abstractmethod
    def send(self, data: bytes, address: Address, ecn: Ecn) -> None:
        """Send a datagram now or never; None: to the peer."""

    @abstractmethod
    def is_closing(self) -> bool:
        """Return whether `close` was called."""

    @abstractmethod
    def close(self) -> None:
        """Release the socket; nothing is received from here on."""


async def open_udp(
    protocol: UdpProtocol,
    *,
    local: tuple[str, int] | None = None,
    remote: tuple[str, int] | None = None,
) -> UdpTransport:
    """Open an endpoint bound to `local`, or connected to `remote` (host and port).

    Raises:
        OSError: the name is unknown, the address cannot be had, or there is no route.
    """
    loop = asyncio.get_running_loop()
    if not _has_readers(loop):
        transport, _ = await loop.create_datagram_endpoint(
            lambda: _LoopTransport(protocol), local_addr=local, remote_addr=remote
        )
        return cast(_LoopTransport, transport.get_protocol())
    host, port = (local or remote or ("", 0))[:2]
    found = await loop.getaddrinfo(
        host,
        port,
        type=socket.SOCK_DGRAM,
        flags=0 if local is None else socket.AI_PASSIVE,
    )
    failure: OSError | None = None
    for family, _, _, _, address in found:
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                with contextlib.suppress(OSError):  # macOS refuses what others cut down
                    sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
            if local is None:
                sock.connect(address)
            else:
                if family == socket.AF_INET6 and address[0] == "::":
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.bind(address)
        except OSError as error:
            failure = failure or error
            if sock is not None:
                sock.close()
        else:
            return _SocketTransport(loop, sock, protocol)
    raise failure or OSError(errno.EADDRNOTAVAIL, f"{host} has no address")


class _SocketTransport(UdpTransport):
    """A socket of our own, read when the loop says that there is something."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, protocol: UdpProtocol
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._protocol = protocol
        self._is_ipv6 = sock.family == socket.AF_INET6
        self._local: Address = sock.getsockname()
        try:
            self._peer: Address | None = sock.getpeername()
        except OSError:
            self._peer = None
        self._can_mark = True
        self._is_closing = False
        self._ipv4_control = {ecn: _control(socket.IPPROTO_IP, socket.IP_TOS, ecn) for ecn in Ecn}
        self._ipv6_control = (
            {ecn: _control(socket.IPPROTO_IPV6, _IPV6_TCLASS, ecn) for ecn in Ecn}
            if _IPV6_TCLASS is not None
            else self._ipv4_control
        )
        _read_marks(sock)
        protocol.connection_made(self)
        loop.add_reader(sock, self._on_readable)

    @property
    def local_address(self) -> Address:
        """See `UdpTransport`."""
        return self._local

    @property
    def peer_address(self) -> Address | None:
        """See `UdpTransport`."""
        return self._peer

    @property
    def can_mark(self) -> bool:
        """See `UdpTransport`."""
        return self._can_mark

    def send(self, data: bytes, address: Address, ecn: Ecn) -> None:
        """See `UdpTransport`."""
        if self._is_closing:
            return
        try:
            if ecn is not Ecn.NOT_ECT and self._can_mark and self._send_marked(data, address, ecn):
                return
            if self._peer is None:
                self._sock.sendto(data, address)
            else:
                self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._protocol.error_received(error)

    def is_closing(self) -> bool:
        """See `UdpTransport`."""
        return self._is_closing

    def close(self) -> None:
        """See `UdpTransport`."""
        if not self._is_closing:
            self._is_closing = True
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _send_marked(self, data: bytes, address: Address, ecn: Ecn) -> bool:
        """Send with control data; return False if this system cannot."""
        to = self._peer if address is None or self._peer is not None else address
        assert to is not None
        is_ipv6 = self._is_ipv6 and not to[0].startswith(MAPPED_PREFIX)
        control = (self._ipv6_control if is_ipv6 else self._ipv4_control)[ecn]
        try:
            if self._peer is None:
                self._sock.sendmsg((data,), control, 0, address)
            else:
                self._sock.sendmsg((data,), control)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._can_mark = False
            logger.warning(
                "ECN is off: this system cannot set the field of single packets (%s). Packets go "
                "unmarked.",
                error.strerror,
            )
            return False
        return True

    def _on_readable(self) -> None:
        receive, hand_over = self._sock.recvmsg, self._protocol.datagram_received
        for _ in range(BURST_DATAGRAMS):
            if self._is_closing:
                return
            try:
                data, control, _, address = receive(MAX_DATAGRAM_BYTES, CONTROL_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._protocol.error_received(error)
                continue
            # Nothing else was asked for, so the one piece of control data there may be is the
            # type-of-service byte: one byte for IPv4, an int for IPv6.
            ecn = (
                _CODEPOINTS[int.from_bytes(control[0][2], sys.byteorder) & ECN_MASK]
                if control
                else Ecn.NOT_ECT
            )
            hand_over(data, address, ecn)


class _LoopTransport(UdpTransport, asyncio.DatagramProtocol):
    """asyncio's endpoint, where a loop has no readers."""

    def __init__(self, protocol: UdpProtocol) -> None:
        self._protocol = protocol
        self._transport: asyncio.DatagramTransport | None = None
        self._set_ecn = Ecn.NOT_ECT
        self._can_mark = True

    @property
    def local_address(self) -> Address:
        """See `UdpTransport`."""
        return self._opened.get_extra_info("sockname")

    @property
    def peer_address(self) -> Address | None:
        """See `UdpTransport`."""
        return self._opened.get_extra_info("peername")

    @property
    def can_mark(self) -> bool:
        """See `UdpTransport`."""
        return self._can_mark

    def send(self, data: bytes, address: Address, ecn: Ecn) -> None:
        """See `UdpTransport`."""
        transport = self._opened
        if transport.is_closing():
            return
        if ecn is not self._set_ecn and self._can_mark:
            self._choose(ecn)
        transport.sendto(data, None if transport.get_extra_info("peername") else address)

    def is_closing(self) -> bool:
        """See `UdpTransport`."""
        return self._opened.is_closing()

    def close(self) -> None:
        """See `UdpTransport`."""
        self._opened.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.DatagramProtocol`."""
        self._transport = cast(asyncio.DatagramTransport, transport)
        self._protocol.connection_made(self)

    def datagram_received(self, data: bytes, addr: Address) -> None:
        """See `asyncio.DatagramProtocol`."""
        ecn = self._opened.get_extra_info("ecn", Ecn.NOT_ECT)
        self._protocol.datagram_received(data, addr, _CODEPOINTS[ecn])

    def error_received(self, exc: Exception) -> None:
        """See `asyncio.DatagramProtocol`."""
        self._protocol.error_received(cast(OSError, exc))

    @property
    def _opened(self) -> asyncio.DatagramTransport:
        assert self._transport is not None
        return self._transport

    def _choose(self, ecn: Ecn) -> None:
        """Let the packets from here on leave with a codepoint."""
        sock = self._opened.get_extra_info("socket")
        try:
            if sock.family == socket.AF_INET6 and _IPV6_TCLASS is not None:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TCLASS, int(ecn))
            else:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, int(ecn))
        except OSError as error:
            self._can_mark = False
            logger.warning(
                "ECN is off: this system cannot set the field (%s). Packets go unmarked.",
                error.strerror,
            )
        else:
            self._set_ecn = ecn


def _has_readers(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether the loop watches sockets; asyncio's answer for "no" is an error."""
    if not hasattr(socket.socket, "recvmsg"):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            loop.add_reader(probe, lambda: None)
        except NotImplementedError:
            return False
        loop.remove_reader(probe)
    return True


def _control(level: int, kind: int, ecn: Ecn) -> Control:
    return [(level, kind, int(ecn).to_bytes(4, sys.byteorder))]


def _read_marks(sock: socket.socket) -> None:
    """Ask the system to tell the ECN field of what arrives."""
    options = [(socket.IPPROTO_IP, _IP_RECVTOS)]
    if sock.family == socket.AF_INET6:
        options.append((socket.IPPROTO_IPV6, _IPV6_RECVTCLASS))
    for level, option in options:
        try:
            if option is None:
                raise OSError(errno.ENOPROTOOPT, "Python does not know the option")
            sock.setsockopt(level, option, 1)
        except OSError as error:
            if sock.family == socket.AF_INET6 and level == socket.IPPROTO_IP:
                continue  # a socket for IPv6 only
            logger.info(
                "This system does not tell the ECN field of what arrives (%s): peers that mark "
                "their packets will see that, and stop.",
                error.strerror,
            )
