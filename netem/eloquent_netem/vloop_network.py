"""The network of the virtual loop, without asyncio: hosts, ports, and the paths between hosts."""

import contextlib
import errno
import functools
import ipaddress
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from eloquent_netem.capture import (
    CLIENT,
    SERVER,
    Address,
    PacketLink,
    ipv4_port_unreachable,
    ipv4_udp,
)
from eloquent_netem.errors import NetemError
from eloquent_netem.packet import IP_UDP_HEADER_BYTES, SUBJECT, Ecn, Packet
from eloquent_netem.sim import Actor, CrossTraffic
from eloquent_netem.tcp.segment import TcpPacket

ANY_IP = "0.0.0.0"  # noqa: S104  (a virtual host's, nothing is bound for real)
LOOPBACK_IP = "127.0.0.1"

EPHEMERAL_PORTS = range(49152, 65536)
"Given in this order to sockets that ask for none (RFC 6335 section 6)."

MAX_PAYLOAD_BYTES = 65507
"What fits into the length field of IPv4, headers taken off."

PORT_UNREACHABLE_BYTES = 56
"An ICMP message that quotes the IP header and 8 bytes (RFC 792)."

_current_host: ContextVar[str | None] = ContextVar("eloquent_netem_host", default=None)


class NetworkSetupError(NetemError):
    """The virtual network is not made, or not used, as it must be."""


class Socket(Protocol):
    """What a port hands its datagrams to."""

    def deliver(self, data: bytes, source: Address, ecn: Ecn) -> None:
        """Take a datagram."""

    def refuse(self) -> None:
        """Take note that nobody listens at the peer's port."""


@dataclass(slots=True)
class Datagram(Packet):
    """A packet with its addresses."""

    source: Address = CLIENT
    destination: Address = SERVER
    is_refusal: bool = False
    "An ICMP message: nobody listens at `source`."


@dataclass(slots=True, eq=False)
class Binding:
    """A socket at its port."""

    host: "Host"
    ip: str
    "The address it is bound to; `ANY_IP`: all of the host's."
    port: int
    peer: Address | None
    "A connected socket takes from and sends to this one only."
    socket: Socket

    def takes(self, ip: str, source: Address) -> bool:
        """Return whether a datagram for `ip` from `source` is for this socket."""
        return self.ip in (ANY_IP, ip) and self.peer in (None, source)


@dataclass(slots=True, eq=False)
class Host:
    """A machine with one address of its own, and the loopback ones."""

    name: str
    ip: str
    ports: dict[int, list[Binding]] = field(default_factory=dict)
    next_ephemeral: int = 0

    def has(self, ip: str) -> bool:
        """Return whether an address leads to this host itself."""
        return ip == self.ip or is_loopback(ip)

    def find(self, ip: str, port: int, source: Address) -> Binding | None:
        """Return who gets a datagram; a connected socket goes before one that takes all."""
        found = [b for b in self.ports.get(port, ()) if b.takes(ip, source)]
        return max(found, key=lambda b: (b.peer is not None, b.ip != ANY_IP), default=None)


class Streams(Actor, Protocol):
    """The hosts' TCP."""

    def arrive(self, now: float, host: Host, packet: TcpPacket) -> None:
        """Take a segment that has reached a host."""


class VirtualNetwork:
    """Hosts and paths; a path is a link each way. It serves one run of a loop.

    Code runs on the host that `on` names, for tasks too that are made in its block; elsewhere on
    the first host, unless it binds an address of another.
    """

    def __init__(self) -> None:
        self._hosts: dict[str, Host] = {}
        self._by_ip: dict[str, Host] = {}
        self._routes: dict[tuple[str, str], PacketLink] = {}
        self._links: list[PacketLink] = []
        self._cross: list[CrossTraffic] = []
        self._is_attached = False
        self._streams: Streams | None = None
        self._loopback: deque[tuple[float, Host, TcpPacket]] = deque()

    @classmethod
    def between(cls, up: PacketLink, down: PacketLink) -> "VirtualNetwork":
        """Return a network of the hosts "client" and "server"; `up` leads to the server."""
        network = cls()
        network.add_host("client", CLIENT[0])
        network.add_host("server", SERVER[0])
        network.add_path("client", "server", up, down)
        return network

    def add_host(self, name: str, ip: str) -> None:
        """Add a host by a name and an IPv4 address.

        Raises:
            NetworkSetupError: the name or the address is taken, or is none.
        """
        try:
            ip = str(ipaddress.IPv4Address(ip))
        except ValueError as error:
            raise NetworkSetupError(
                f"Host {name!r} has the address {ip!r}, which is no IPv4 address: give one, such "
                "as 192.0.2.1."
            ) from error
        if name in self._hosts or ip in self._by_ip or is_loopback(ip) or ip == ANY_IP:
            raise NetworkSetupError(
                f"Host {name!r} with address {ip} cannot be added: each host needs a name and an "
                "address of its own, and not a loopback one."
            )
        self._hosts[name] = self._by_ip[ip] = Host(name, ip)

    def add_path(self, first: str, second: str, up: PacketLink, down: PacketLink) -> None:
        """Join two hosts: `up` leads from the first to the second, `down` back.

        Raises:
            NetworkSetupError: a host is unknown, or they are joined already.
        """
        one, other = self._host(first), self._host(second)
        if one is other or (one.ip, other.ip) in self._routes:
            raise NetworkSetupError(
                f"Hosts {first!r} and {second!r} cannot be joined: a path leads from one host to "
                "another, and there is one path between two hosts."
            )
        self._routes[one.ip, other.ip] = up
        self._routes[other.ip, one.ip] = down
        self._links += [up, down]

    def add_cross(self, traffic: CrossTraffic) -> None:
        """Let cross traffic act, which sends into the links by itself.

        While it wants to act there is no deadlock; the loop's time limit ends such a run.
        """
        self._cross.append(traffic)

    def attach(self, streams: Streams) -> None:
        """Take note that a loop runs this network, with this TCP.

        Raises:
            NetworkSetupError: one has run it before.
        """
        if self._is_attached:
            raise NetworkSetupError(
                "This virtual network has been run already: a link's time never goes back, so "
                "make a new network, with new links, for each run."
            )
        self._is_attached = True
        self._streams = streams

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Let code in the block, and tasks made there, run on the host with this name.

        Raises:
            NetworkSetupError: there is no such host.
        """
        self._host(name)
        token = _current_host.set(name)
        try:
            yield
        finally:
            _current_host.reset(token)

    def resolve(self, name: str) -> str | None:
        """Return the address of a name or address, or None: unknown."""
        if name in self._hosts:
            return self._hosts[name].ip
        if name.lower() in ("localhost", "ip6-localhost"):
            return LOOPBACK_IP
        return plain_ip(name)

    def name_of(self, ip: str) -> str | None:
        """Return the name of the host with an address."""
        if is_loopback(ip):
            return "localhost"
        host = self._by_ip.get(ip)
        return None if host is None else host.name

    def bind(self, ip: str, port: int, peer: Address | None, socket: Socket) -> Binding:
        """Open a port; 0 takes the next free one.

        Raises:
            OSError: as a kernel would say: in use, not an address of the host, no route.
        """
        host = self.host_of(ip)
        if peer is not None:
            self.check_route(host, ip, peer[0])
            if ip == ANY_IP:
                ip = peer[0] if is_loopback(peer[0]) else host.ip
        if port == 0:
            port, host.next_ephemeral = free_port(
                host.next_ephemeral, lambda number: number in host.ports
            )
        taken = host.ports.setdefault(port, [])
        if any(ANY_IP in (ip, other.ip) or other.ip == ip for other in taken):
            raise in_use()
        binding = Binding(host, ip, port, peer, socket)
        taken.append(binding)
        return binding

    def release(self, binding: Binding) -> None:
        """Close a port."""
        taken = binding.host.ports[binding.port]
        taken.remove(binding)
        if not taken:
            del binding.host.ports[binding.port]

    def send(
        self, now: float, binding: Binding, payload: bytes, destination: Address, ecn: Ecn
    ) -> None:
        """Send a datagram.

        Raises:
            OSError: as a kernel would say: too large, no route.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise os_error(errno.EMSGSIZE)
        host = binding.host
        self.check_route(host, binding.ip, destination[0])
        source_ip = binding.ip
        if source_ip == ANY_IP:
            source_ip = destination[0] if host.has(destination[0]) else host.ip
        size = len(payload) + IP_UDP_HEADER_BYTES
        datagram = Datagram(
            payload, size, ecn, source=(source_ip, binding.port), destination=destination
        )
        if host.has(destination[0]):
            self._arrive(now, host, datagram)
        else:
            self._routes[host.ip, destination[0]].send(now, datagram)

    def carry(self, now: float, host: Host, packet: TcpPacket) -> None:
        """Send a segment from a host; one to the host itself arrives at once."""
        if host.has(packet.destination[0]):
            self._loopback.append((now, host, packet))
        else:
            self._routes[host.ip, packet.destination[0]].send(now, packet)

    def next_time(self) -> float | None:
        """Return when something happens next, on a link or by a timer of TCP, or None."""
        if self._loopback:
            return self._loopback[0][0]
        times = [link.next_time() for link in self._links]
        times += [traffic.next_time() for traffic in self._cross]
        if self._streams is not None:
            times.append(self._streams.next_time())
        return min((time for time in times if time is not None), default=None)

    def poll(self, now: float) -> None:
        """Deliver what has come out of the links by `now`; let TCP and cross traffic act."""
        assert self._streams is not None
        for _ in range(len(self._loopback)):
            self._streams.arrive(now, *self._loopback.popleft()[1:])
        for link in self._links:
            for packet in link.poll(now):
                if isinstance(packet, Datagram):
                    self._arrive(now, self._by_ip[packet.destination[0]], packet)
                elif isinstance(packet, TcpPacket):
                    self._streams.arrive(now, self._by_ip[packet.destination[0]], packet)
                elif packet.flow != SUBJECT:
                    for traffic in self._cross:
                        traffic.on_delivered(now, packet)
        for actor in (self._streams, *self._cross):
            time = actor.next_time()
            if time is not None and time <= now:
                actor.act(now)

    def _arrive(self, now: float, host: Host, datagram: Datagram) -> None:
        ip, port = datagram.destination
        binding = host.find(ip, port, datagram.source)
        if datagram.is_refusal:
            # As Linux does: a socket that is not connected does not learn of it.
            if binding is not None and binding.peer is not None:
                binding.socket.refuse()
        elif binding is not None:
            binding.socket.deliver(datagram.data, datagram.source, datagram.ecn)
        else:
            self._refuse(now, host, datagram)

    def _refuse(self, now: float, host: Host, datagram: Datagram) -> None:
        refusal = Datagram(
            b"",
            PORT_UNREACHABLE_BYTES,
            source=datagram.destination,
            destination=datagram.source,
            is_refusal=True,
        )
        if host.has(datagram.source[0]):
            self._arrive(now, host, refusal)
        else:
            self._routes[host.ip, datagram.source[0]].send(now, refusal)

    def check_route(self, host: Host, ip: str, destination_ip: str) -> None:
        """Make sure that a path leads from a host's address to another.

        Raises:
            OSError: as a kernel would say.
        """
        if host.has(destination_ip):
            return
        if is_loopback(ip):
            raise os_error(errno.EINVAL)
        if (host.ip, destination_ip) not in self._routes:
            raise os_error(errno.ENETUNREACH)

    def host_of(self, ip: str) -> Host:
        """Return the host on which code runs that binds this address.

        Raises:
            OSError: the address is not the host's.
        """
        name = _current_host.get()
        host = (self._by_ip.get(ip) or self._first_host()) if name is None else self._host(name)
        if ip != ANY_IP and not host.has(ip):
            raise os_error(errno.EADDRNOTAVAIL)
        return host

    def _host(self, name: str) -> Host:
        if name not in self._hosts:
            known = ", ".join(self._hosts) or "none"
            raise NetworkSetupError(
                f"There is no host {name!r} in the virtual network (there are: {known}): add it "
                "with add_host."
            )
        return self._hosts[name]

    def _first_host(self) -> Host:
        for host in self._hosts.values():
            return host
        raise NetworkSetupError("The virtual network has no host: add one with add_host.")


def to_ip(direction: str, packet: Packet) -> bytes:
    """Return a `Datagram` or `TcpPacket` as a whole IP packet (for `PcapWriter(to_ip=...)`)."""
    if isinstance(packet, TcpPacket):
        return packet.data[:1] + bytes((packet.ecn,)) + packet.data[2:]
    assert isinstance(packet, Datagram)
    if packet.is_refusal:
        return ipv4_port_unreachable(packet.source, packet.destination)
    return ipv4_udp(packet.source, packet.destination, packet.data, packet.ecn)


@functools.lru_cache(1024)
def plain_ip(text: str) -> str | None:
    """Return the IPv4 address that a literal means, IPv6 forms of one included, or None."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return {"::": ANY_IP, "::1": LOOPBACK_IP}.get(str(address))


def is_loopback(ip: str) -> bool:
    """Return whether an IPv4 address is one of a host's own (RFC 1122 section 3.2.1.3)."""
    return ip.startswith("127.")


def free_port(index: int, is_taken: Callable[[int], bool]) -> tuple[int, int]:
    """Return the first free ephemeral port from an index on, and the index after it.

    Raises:
        OSError: all are taken.
    """
    for _ in EPHEMERAL_PORTS:
        port = EPHEMERAL_PORTS[index % len(EPHEMERAL_PORTS)]
        index += 1
        if not is_taken(port):
            return port, index
    raise in_use()


def in_use() -> OSError:
    """Return the error of a port that is taken."""
    return os_error(errno.EADDRINUSE)


def os_error(code: int) -> OSError:
    """Return the error that a kernel's code stands for."""
    return OSError(code, os.strerror(code))
