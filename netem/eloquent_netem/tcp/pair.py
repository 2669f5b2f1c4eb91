"""Both ends of a TCP connection over two emulated links, in virtual time."""

from collections.abc import Callable

from eloquent_netem.link import Link
from eloquent_netem.packet import SUBJECT
from eloquent_netem.tcp.connection import TcpConnection

OnData = Callable[[bytes, float], None]
"Takes what an end has received, in order, and the time."


def ignore(data: bytes, now: float) -> None:
    """Read and forget."""


class _End:
    """Drives one connection: what comes out of its link goes in, what it sends goes out."""

    def __init__(
        self, connection: TcpConnection, inbound: Link, outbound: Link, on_data: OnData
    ) -> None:
        self._connection = connection
        self._inbound = inbound
        self._outbound = outbound
        self._on_data = on_data

    def next_time(self) -> float | None:
        times = (self._inbound.next_time(), self._connection.next_time())
        return min((time for time in times if time is not None), default=None)

    def act(self, now: float) -> None:
        for packet in self._inbound.poll(now):
            self._connection.receive(packet, now)
            # The kernel answers each packet before it looks at the next.
            self.flush(now)
        timer = self._connection.next_time()
        if timer is not None and timer <= now:
            self._connection.handle_timer(now)
        data = self._connection.read()
        if data:
            self._on_data(data, now)
        self.flush(now)

    def flush(self, now: float) -> None:
        for packet in self._connection.packets_to_send(now):
            self._outbound.send(now, packet)


class TcpPair:
    """A client and a server that talk through `up` and `down`; nothing else may use these.

    The applications read at once. After a call to one of the connections from outside, `flush`
    sends what it has to say. The parts in `actors` go to `simulate`.
    """

    def __init__(
        self,
        *,
        up: Link,
        down: Link,
        congestion: str = "cubic",
        ecn: bool = False,
        flow: int = SUBJECT,
        has_window: bool = False,
        on_client_data: OnData = ignore,
        on_server_data: OnData = ignore,
    ) -> None:
        self.client, self.server = (
            TcpConnection(
                is_client=is_client,
                congestion=congestion,
                ecn=ecn,
                flow=flow,
                has_window=has_window,
            )
            for is_client in (True, False)
        )
        self._client_end = _End(self.client, down, up, on_client_data)
        self._server_end = _End(self.server, up, down, on_server_data)
        self.actors = (self._client_end, self._server_end)

    def connect(self, now: float) -> None:
        """Begin the handshake."""
        self.client.connect(now)
        self.flush(now)

    def flush(self, now: float) -> None:
        """Send what either end has to say."""
        self._client_end.flush(now)
        self._server_end.flush(now)
