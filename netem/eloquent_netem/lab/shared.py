"""Several flows over one link: ports of a shared link, and the flows that use them."""

from collections import Counter
from collections.abc import Callable, Sequence

from eloquent_netem.link import Link
from eloquent_netem.packet import Packet
from eloquent_netem.queues import DropTail, Queue
from eloquent_netem.sim import Actor
from eloquent_netem.tcp import TcpPair

OnDelivered = Callable[[float, Packet], None]
"Takes the time and a packet that came out."


class WatchedQueue(DropTail):
    """First in, first out, with a limit in bytes; it says how full it is."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes=limit_bytes)
        self._limit = limit_bytes

    @property
    def share(self) -> float:
        """How much of the limit is taken, 0 to 1."""
        return self._bytes / self._limit


class SharedLink:
    """An actor that hands what comes out of a link to the port of its flow.

    It must stand before the flows among the actors, so that these see a packet when it arrives.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.delivered_bytes: Counter[int] = Counter()
        "By flow."
        self._ports: dict[int, Port] = {}
        self._listeners: list[OnDelivered] = []

    def port(self, flow: int) -> "Port":
        """Return a new port for a flow."""
        self._ports[flow] = port = Port(self.link, flow)
        return port

    def listen(self, on_delivered: OnDelivered) -> None:
        """Tell cross traffic of every packet that comes out."""
        self._listeners.append(on_delivered)

    def next_time(self) -> float | None:
        """See `Actor.next_time`."""
        return self.link.next_time()

    def act(self, now: float) -> None:
        """See `Actor.act`."""
        for packet in self.link.poll(now):
            self.delivered_bytes[packet.flow] += packet.size
            port = self._ports.get(packet.flow)
            if port is not None:
                port.deliver(now, packet)
            for on_delivered in self._listeners:
                on_delivered(now, packet)


class Port(Link):
    """One flow's view of a shared link: a link for its type, all it does the shared one does."""

    def __init__(self, shared: Link, flow: int) -> None:
        self._shared = shared
        self._flow = flow
        self._waiting: list[tuple[float, Packet]] = []
        self._packets = 0
        self._packet_bytes = 0

    @property
    def packets_sent(self) -> int:
        """How many packets the flow has put in."""
        return self._packets

    @property
    def bytes_sent(self) -> int:
        """How many bytes the flow has put in, headers included."""
        return self._packet_bytes

    @property
    def packets_lost(self) -> int:
        """See `Link.packets_lost`; of all flows."""
        return self._shared.packets_lost

    @property
    def queue(self) -> Queue:
        """See `Link.queue`."""
        return self._shared.queue

    def send(self, now: float, packet: Packet) -> None:
        """See `Link.send`."""
        packet.flow = self._flow
        self._packets += 1
        self._packet_bytes += packet.size
        self._shared.send(now, packet)

    def deliver(self, now: float, packet: Packet) -> None:
        """Take a packet that came out of the shared link."""
        self._waiting.append((now, packet))

    def next_time(self) -> float | None:
        """See `Link.next_time`: a packet that has come out waits to be polled."""
        return self._waiting[0][0] if self._waiting else None

    def poll(self, now: float) -> list[Packet]:
        """See `Link.poll`."""
        packets = [packet for _, packet in self._waiting]
        self._waiting.clear()
        return packets


class Flow:
    """The actors of one flow as one, asked for their next time only after something happened.

    With hundreds of actors that is what makes the simulation bearable. `begin` is called at
    `start_s`.
    """

    def __init__(
        self, actors: Sequence[Actor], port: Port, start_s: float, begin: Callable[[float], None]
    ) -> None:
        self._actors = actors
        self._port = port
        self._begin: Callable[[float], None] | None = begin
        self._time: float | None = start_s

    def next_time(self) -> float | None:
        """See `Actor.next_time`."""
        arrival = self._port.next_time()
        if arrival is None or self._time is None:
            return self._time if arrival is None else arrival
        return min(arrival, self._time)

    def act(self, now: float) -> None:
        """See `Actor.act`."""
        if self._begin is not None:
            self._begin(now)
            self._begin = None
        for actor in self._actors:
            time = actor.next_time()
            if time is not None and time <= now:
                actor.act(now)
        times = (actor.next_time() for actor in self._actors)
        self._time = min((time for time in times if time is not None), default=None)


class Alarms:
    """An actor that calls at given times."""

    def __init__(self, calls: Sequence[tuple[float, Callable[[], None]]]) -> None:
        self._calls = sorted(calls, key=lambda call: call[0])

    def next_time(self) -> float | None:
        """See `Actor.next_time`."""
        return self._calls[0][0] if self._calls else None

    def act(self, now: float) -> None:
        """See `Actor.act`."""
        while self._calls and self._calls[0][0] <= now:
            self._calls.pop(0)[1]()


class TcpTokens:
    """A token source over the TCP model: an actor beside those of its `pair`."""

    REQUEST = b"GET / HTTP/1.1\r\n\r\n"

    def __init__(
        self, *, up: Link, down: Link, flow: int, tokens_per_s: float, token_bytes: int
    ) -> None:
        self._interval_s = 1 / tokens_per_s
        self._token = b"x" * token_bytes
        self._token_at: float | None = None
        self.pair = TcpPair(up=up, down=down, flow=flow, on_server_data=self._on_request)

    def begin(self, now: float) -> None:
        """Connect and ask."""
        self.pair.client.write(self.REQUEST, now)
        self.pair.connect(now)

    def next_time(self) -> float | None:
        """See `Actor.next_time`."""
        return self._token_at

    def act(self, now: float) -> None:
        """See `Actor.act`: write a token."""
        assert self._token_at is not None
        self._token_at += self._interval_s
        self.pair.server.write(self._token, now)
        self.pair.flush(now)

    def _on_request(self, data: bytes, now: float) -> None:
        if self._token_at is None:
            self._token_at = now
