"""TCP of the virtual network, without asyncio: what the kernels of its hosts do for sockets.

A connection outlives its socket, as in a kernel: what was written is still sent, and a closed one
waits for late segments. Segments travel over the same links as datagrams.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from eloquent_netem.capture import Address
from eloquent_netem.tcp.connection import TcpConnection, answer_to_stray
from eloquent_netem.tcp.phases import SYNCHRONISED, Phase
from eloquent_netem.tcp.segment import TcpPacket, is_opening
from eloquent_netem.vloop_network import (
    ANY_IP,
    Host,
    VirtualNetwork,
    free_port,
    in_use,
    is_loopback,
)


@dataclass(slots=True, eq=False)
class Port:
    """A TCP port that is taken."""

    host: Host
    ip: str
    "`ANY_IP`: all addresses of the host."
    number: int


@dataclass(slots=True, eq=False)
class Listener:
    """A port at which connections are accepted."""

    port: Port
    backlog: int
    queue: deque["Endpoint"] = field(default_factory=deque)
    "Connections that nobody has accepted yet."
    is_closed: bool = False


@dataclass(slots=True, eq=False)
class Endpoint:
    """One end of a connection, and where it is."""

    host: Host
    local: Address
    remote: Address
    connection: TcpConnection
    port: Port | None = None
    "Of an end that connected; those that were accepted share their listener's."
    listener: Listener | None = None
    "Until it can be accepted."
    on_open: Callable[[], None] | None = None
    "Called when the handshake is over, or has failed."

    @property
    def key(self) -> tuple[str, Address, Address]:
        """What segments are told apart by; loopback addresses are those of their host."""
        return self.host.name, self.local, self.remote


class TcpStack:
    """The TCP of all hosts; `clock` returns virtual time in seconds."""

    def __init__(self, network: VirtualNetwork, clock: Callable[[], float]) -> None:
        self._network = network
        self._clock = clock
        self._ports: dict[tuple[str, int], list[Port]] = {}
        self._next_ephemeral: dict[str, int] = {}
        self._listeners: list[Listener] = []
        self._endpoints: dict[tuple[str, Address, Address], Endpoint] = {}

    # What sockets ask for.

    def bind(self, ip: str, number: int) -> Port:
        """Take a port; 0 takes the next free one.

        Raises:
            OSError: as a kernel would say: in use, not an address of the host.
        """
        host = self._network.host_of(ip)
        if number == 0:
            number = self._free_port(host)
        taken = self._ports.setdefault((host.name, number), [])
        if any(ANY_IP in (ip, other.ip) or other.ip == ip for other in taken):
            raise in_use()
        port = Port(host, ip, number)
        taken.append(port)
        return port

    def release(self, port: Port) -> None:
        """Give a port back."""
        taken = self._ports[port.host.name, port.number]
        taken.remove(port)
        if not taken:
            del self._ports[port.host.name, port.number]

    def listen(self, port: Port, backlog: int) -> Listener:
        """Accept connections at a port."""
        listener = Listener(port, backlog)
        self._listeners.append(listener)
        return listener

    def unlisten(self, listener: Listener) -> None:
        """Accept no more; who has not been accepted is reset."""
        self._listeners.remove(listener)
        self.release(listener.port)
        listener.is_closed = True
        while listener.queue:
            self.abort(listener.queue.popleft())

    def connect(self, port: Port, remote: Address, on_open: Callable[[], None]) -> Endpoint:
        """Begin a connection; `on_open` is called when it stands, or has failed.

        Raises:
            OSError: as a kernel would say: no route.
        """
        self._network.check_route(port.host, port.ip, remote[0])
        ip = port.ip
        if ip == ANY_IP:
            ip = remote[0] if is_loopback(remote[0]) else port.host.ip
        local = (ip, port.number)
        connection = TcpConnection(is_client=True, addresses=(local, remote), has_window=True)
        endpoint = Endpoint(port.host, local, remote, connection, port=port, on_open=on_open)
        if endpoint.key in self._endpoints:
            raise in_use()
        self._endpoints[endpoint.key] = endpoint
        connection.connect(self._clock())
        self._settle(endpoint)
        return endpoint

    def write(self, endpoint: Endpoint, data: bytes) -> None:
        """Send, in order."""
        endpoint.connection.write(data, self._clock())
        self._settle(endpoint)

    def read(self, endpoint: Endpoint, limit: int) -> bytes:
        """Return what has arrived, `limit` bytes at most."""
        data = endpoint.connection.read(limit)
        self._settle(endpoint)
        return data

    def shutdown(self, endpoint: Endpoint) -> None:
        """End the sending half."""
        endpoint.connection.shutdown(self._clock())
        self._settle(endpoint)

    def close(self, endpoint: Endpoint) -> None:
        """Let the application go."""
        endpoint.on_open = None
        endpoint.connection.close(self._clock())
        self._settle(endpoint)

    def abort(self, endpoint: Endpoint) -> None:
        """Reset the connection."""
        endpoint.on_open = None
        endpoint.connection.abort(self._clock())
        self._settle(endpoint)

    # What the network asks for.

    def next_time(self) -> float | None:
        """Return when a timer is due, in seconds, or None."""
        times = [endpoint.connection.next_time() for endpoint in self._endpoints.values()]
        return min((time for time in times if time is not None), default=None)

    def act(self, now: float) -> None:
        """Let the timers do what is due."""
        for endpoint in list(self._endpoints.values()):
            time = endpoint.connection.next_time()
            if time is not None and time <= now:
                endpoint.connection.handle_timer(now)
                self._settle(endpoint)

    def arrive(self, now: float, host: Host, packet: TcpPacket) -> None:
        """Take a segment that has reached a host."""
        key = (host.name, packet.destination, packet.source)
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            listener = self._listener(host, packet.destination)
            if listener is None or not is_opening(packet):
                answer = answer_to_stray(packet)
                if answer is not None:
                    self._network.carry(now, host, answer)
                return
            if len(listener.queue) > listener.backlog:
                return
            endpoint = self._endpoints[key] = Endpoint(
                host,
                packet.destination,
                packet.source,
                TcpConnection(
                    is_client=False,
                    addresses=(packet.destination, packet.source),
                    has_window=True,
                ),
                listener=listener,
            )
        endpoint.connection.receive(packet, now)
        self._settle(endpoint)

    def _settle(self, endpoint: Endpoint) -> None:
        """Send what a connection has to say, and tell of its beginning and end."""
        now, connection = self._clock(), endpoint.connection
        listener = endpoint.listener
        if listener is not None and connection.phase in SYNCHRONISED:
            endpoint.listener = None
            if listener.is_closed:
                connection.abort(now)
            else:
                listener.queue.append(endpoint)
        for packet in connection.packets_to_send(now):
            self._network.carry(now, endpoint.host, packet)
        if endpoint.on_open is not None and connection.phase is not Phase.SYN_SENT:
            on_open, endpoint.on_open = endpoint.on_open, None
            on_open()
        if connection.phase is Phase.CLOSED:
            self._endpoints.pop(endpoint.key, None)
            port, endpoint.port = endpoint.port, None
            if port is not None:
                self.release(port)

    def _listener(self, host: Host, address: Address) -> Listener | None:
        ip, number = address
        found = [
            listener
            for listener in self._listeners
            if listener.port.host is host
            and listener.port.number == number
            and listener.port.ip in (ANY_IP, ip)
        ]
        return max(found, key=lambda listener: listener.port.ip != ANY_IP, default=None)

    def _free_port(self, host: Host) -> int:
        number, after = free_port(
            self._next_ephemeral.get(host.name, 0),
            lambda candidate: (host.name, candidate) in self._ports,
        )
        self._next_ephemeral[host.name] = after
        return number
