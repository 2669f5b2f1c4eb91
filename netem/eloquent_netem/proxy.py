"""A UDP proxy that needs no root: what passes it goes through two links.

It leaves ECN alone: it neither reads the field nor sets it, so every packet is Not-ECT to the
queues. What needs ECN needs the TUN router.
"""

import contextlib
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from eloquent_netem.errors import NetemError
from eloquent_netem.link import Link
from eloquent_netem.packet import IP_UDP_HEADER_BYTES, Packet
from eloquent_netem.realtime import (
    LATENESS_BOUND_S,
    Driver,
    DriverStats,
    MakeCrossTraffic,
    MakeLinks,
    no_cross_traffic,
    refuse_unfaithful,
)
from eloquent_netem.worker import Worker

Address = tuple[str, int]

ANY_PORT_ON_LOOPBACK: Address = ("127.0.0.1", 0)
DEFAULT_MAX_CLIENTS = 64
MOST_CLIENTS = 900
"Each has a socket, and `select` ends at 1024 files."

_IPV6_EXTRA_BYTES = 20
"What an IPv6 header has more than an IPv4 header."
_READ_BYTES = 65536
_BATCH_PACKETS = 32
"Read at once from one socket, before looking what is due."
_BUFFER_BYTES = 4 << 20
"Asked of the kernel for each socket; it grants what net.core.rmem_max allows."
_SO_MEMINFO = 55
"asm-generic/socket.h; nine 32-bit counters, the last of them what the socket dropped."


class ProxyError(NetemError):
    """The proxy could not begin."""


@dataclass(frozen=True, slots=True)
class ProxyStats:
    """What the proxy has done."""

    driver: DriverStats
    clients: int
    "How many there have been."
    evicted: int
    "Clients forgotten, the longest silent first, because there were too many."
    socket_drops: int
    "Packets the kernel dropped because the proxy did not read them in time (Linux counts them)."


@dataclass(slots=True)
class _Datagram(Packet):
    """A UDP payload and the client it belongs to; for its type only, every one has a client."""

    client: "_Client | None" = None


class _Client:
    """One client: where it is, and the socket that stands for it at the target."""

    def __init__(self, address: Any, upstream: socket.socket) -> None:
        self.address = address
        self.upstream = upstream
        self.header_bytes = _header_bytes(address[0])
        self.is_open = True


class UdpProxy:
    """Listens at one address and forwards to another, through a link up and a link down.

    The target sees each client as a socket of its own. Packets are dropped until `start`, the
    zero of the scenario's clock. Whoever makes it calls `driver.run()`, and then `close()`;
    `start_proxy` does all this in a process of its own, which keeps better time.

    Raises:
        ProxyError: an address cannot be resolved or listened at, or `max_clients` is too large.
    """

    def __init__(
        self,
        up: Link,
        down: Link,
        *,
        target: Address,
        listen: Address = ANY_PORT_ON_LOOPBACK,
        max_clients: int = DEFAULT_MAX_CLIENTS,
        cross: MakeCrossTraffic = no_cross_traffic,
    ) -> None:
        if not 1 <= max_clients <= MOST_CLIENTS:
            raise ProxyError(
                f"The proxy can serve 1 to {MOST_CLIENTS} clients at once, not {max_clients}."
            )
        self._target_family, self._target = _resolve(target)
        family, address = _resolve(listen)
        self._listener = _udp_socket(family)
        try:
            self._listener.bind(address)
        except OSError as error:
            self._listener.close()
            raise ProxyError(
                f"The proxy cannot listen at {listen[0]} port {listen[1]} ({error.strerror}): "
                "choose another port, or 0 for any that is free."
            ) from error
        self._max_clients = max_clients
        self._clients: OrderedDict[Any, _Client] = OrderedDict()
        self._seen = 0
        self._evicted = 0
        self._socket_drops = 0
        self.driver = Driver(
            up,
            down,
            deliver_up=self._deliver_up,
            deliver_down=self._deliver_down,
            cross=cross(up, down),
        )
        self.driver.watch(self._listener.fileno(), self._read_clients)

    def ready(self) -> Address:
        """Return where it listens."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Start the scenario's clock."""
        self.driver.start()

    def stats(self) -> ProxyStats:
        """Return what has been done so far."""
        open_sockets = [self._listener, *(client.upstream for client in self._clients.values())]
        drops = sum(_dropped(each) for each in open_sockets if each.fileno() >= 0)
        return ProxyStats(
            self.driver.stats(), self._seen, self._evicted, self._socket_drops + drops
        )

    def close(self) -> None:
        """Close all sockets."""
        while self._clients:
            self._forget_oldest()
        self.driver.unwatch(self._listener.fileno())
        self._socket_drops += _dropped(self._listener)
        self._listener.close()

    def _read_clients(self) -> None:
        for _ in range(_BATCH_PACKETS):
            try:
                payload, address = self._listener.recvfrom(_READ_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # A client was gone when something came for it.
            client = self._client(address)
            self.driver.send_up(self._datagram(payload, client))

    def _read_target(self, client: _Client) -> None:
        for _ in range(_BATCH_PACKETS):
            if not client.is_open:
                return
            try:
                payload = client.upstream.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # The target did not listen when something came for it.
            self.driver.send_down(self._datagram(payload, client))

    def _datagram(self, payload: bytes, client: _Client) -> Packet:
        return _Datagram(payload, len(payload) + client.header_bytes, client=client)

    def _client(self, address: Any) -> _Client:
        """Return the client at this address; it is now the one heard last."""
        client = self._clients.get(address)
        if client is None:
            if len(self._clients) >= self._max_clients:
                self._forget_oldest()
                self._evicted += 1
            upstream = _udp_socket(self._target_family)
            upstream.connect(self._target)  # So that only the target can answer.
            client = self._clients[address] = _Client(address, upstream)
            self._seen += 1
            self.driver.watch(upstream.fileno(), partial(self._read_target, client))
        self._clients.move_to_end(address)
        return client

    def _forget_oldest(self) -> None:
        _, client = self._clients.popitem(last=False)
        self.driver.unwatch(client.upstream.fileno())
        self._socket_drops += _dropped(client.upstream)
        client.upstream.close()
        client.is_open = False

    def _deliver_up(self, packet: Packet) -> None:
        assert isinstance(packet, _Datagram)
        assert packet.client is not None
        if packet.client.is_open:
            # What the system cannot send now is lost, as anything may be with UDP.
            with contextlib.suppress(OSError):
                packet.client.upstream.send(packet.data)

    def _deliver_down(self, packet: Packet) -> None:
        assert isinstance(packet, _Datagram)
        assert packet.client is not None
        if packet.client.is_open:
            with contextlib.suppress(OSError):
                self._listener.sendto(packet.data, packet.client.address)


class ProxyProcess:
    """A proxy in a process of its own, seen from outside; made by `start_proxy`."""

    def __init__(self, worker: Worker[Address, ProxyStats]) -> None:
        self._worker = worker
        self.address: Address = worker.ready

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.address[1]

    @property
    def pid(self) -> int | None:
        """The id of its process."""
        return self._worker.pid

    def start(self) -> None:
        """Start the scenario's clock; packets before it are dropped."""
        self._worker.start()

    def stats(self) -> ProxyStats:
        """Return what it has done so far; after the end, in the whole run."""
        return self._worker.stats()


@contextlib.contextmanager
def start_proxy(
    links: MakeLinks,
    *,
    target: Address,
    listen: Address = ANY_PORT_ON_LOOPBACK,
    max_clients: int = DEFAULT_MAX_CLIENTS,
    cross: MakeCrossTraffic = no_cross_traffic,
    lateness_bound_s: float = LATENESS_BOUND_S,
    real_time: bool = True,
) -> Iterator[ProxyProcess]:
    """Run a `UdpProxy` in a process of its own, which ends with the block or with its starter.

    Call `start` on what it gives when both ends are ready. `links` and `cross` are called in that
    process, so they must be picklable: functions of a module, or `functools.partial`s of such.

    Raises:
        ProxyError: an address cannot be resolved or listened at.
        NotStartedError: at the end, if packets came and `start` was never called.
        LatenessError: at the end, if the 99th percentile of lateness is above the bound.
        OverloadError: at the end, if the kernel dropped packets before the proxy read them.
        WorkerError: its process ended before its time.
    """
    make = partial(_make_proxy, links, target, listen, max_clients, cross)
    worker = Worker(make, real_time=real_time)
    try:
        yield ProxyProcess(worker)
    except BaseException:
        worker.abandon()
        raise
    stats = worker.close()
    refuse_unfaithful(
        stats.driver, lateness_bound_s=lateness_bound_s, lost_by_us=stats.socket_drops
    )


def _make_proxy(
    links: MakeLinks, target: Address, listen: Address, max_clients: int, cross: MakeCrossTraffic
) -> UdpProxy:
    up, down = links()
    return UdpProxy(up, down, target=target, listen=listen, max_clients=max_clients, cross=cross)


def _resolve(address: Address) -> tuple[socket.AddressFamily, Any]:
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)
    except (OSError, OverflowError) as error:
        raise ProxyError(
            f"{address[0]} port {address[1]} is no address the proxy can use ({error}): give a "
            "host name or an IP address, and a port."
        ) from error
    family, _, _, _, resolved = found[0]
    return family, resolved


def _header_bytes(host: str) -> int:
    """Return the size of the IP and UDP headers of what comes from `host`.

    An IPv4 peer of a dual-stack socket appears as ::ffff:a.b.c.d (RFC 4291 section 2.5.5.2).
    """
    is_v6 = ":" in host and not host.startswith("::ffff:")
    return IP_UDP_HEADER_BYTES + (_IPV6_EXTRA_BYTES if is_v6 else 0)


def _udp_socket(family: socket.AddressFamily) -> socket.socket:
    made = socket.socket(family, socket.SOCK_DGRAM)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    return made


def _dropped(which: socket.socket) -> int:
    if sys.platform != "linux":
        return 0
    counters = struct.unpack("9I", which.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))
    return int(counters[8])
