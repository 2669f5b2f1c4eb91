"""Two real QUIC ends that pass each other's marks, over links that may change them.

Below turns and logs: what a server sends here are plain datagrams, so that these tests see ECN,
validation and the congestion controller, and nothing of the schemes.
"""

import datetime
from collections.abc import Callable, Iterator
from typing import Any

from aioquic.quic.events import ConnectionTerminated

from eloquent.quic._aioquic import Datagram, LateBoundConnection
from eloquent.quic._ecn import EcnConnection
from eloquent.quic.certificate import make_certificate
from eloquent.quic.client import client_configuration
from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import MarkingPolicy
from eloquent.quic.server import server_configuration
from eloquent.quic.thin import THIN
from eloquent_netem import packet as netem
from eloquent_netem.link import Link
from eloquent_netem.sim import Actor, simulate

CERTIFICATE = make_certificate("ecn", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
CLIENT = ("192.0.2.1", 1)
SERVER = ("192.0.2.2", 2)
TIMER_SLACK_S = 1e-6

Rewrite = Callable[[float, netem.Ecn], netem.Ecn]
"What a link makes of the ECN field of a packet that comes out at a time."


def as_is(now: float, ecn: netem.Ecn) -> netem.Ecn:
    return ecn


class Datagrams:
    """A source that has datagrams at given times; each is `size` bytes, or fills its packet."""

    def __init__(self, times: Iterator[float], size: int | None = None) -> None:
        self._times = times
        self._size = size
        self._due: float | None = next(times, None)
        self.acked = self.lost = 0

    def next_time(self) -> float | None:
        return self._due

    def has_datagram(self, now: float) -> bool:
        return self._due is not None and self._due <= now

    def next_datagram(self, now: float, room: int) -> Datagram | None:
        if not self.has_datagram(now) or room < (self._size or 1000):
            return None
        self._due = next(self._times, None)
        return Datagram(bytes(self._size or room), None)

    def on_delivery(self, token: Any, *, acked: bool) -> None:
        self.acked += acked
        self.lost += not acked


def nothing() -> Datagrams:
    return Datagrams(iter(()))


def always() -> Datagrams:
    """Return a source that fills every packet there may be, from 0.5 s on."""
    return Datagrams(iter(lambda: 0.5, None))


def every(interval_s: float, *, start_s: float = 1.0, count: int = 10**9) -> Datagrams:
    """Return a source like a token stream."""
    return Datagrams((start_s + interval_s * index for index in range(count)), size=100)


class End:
    """Drives one connection."""

    def __init__(
        self,
        quic: LateBoundConnection,
        source: Datagrams,
        *,
        peer: tuple[str, int],
        inbound: Link,
        outbound: Link,
        rewrite: Rewrite,
    ) -> None:
        self.quic = quic
        self.terminated: ConnectionTerminated | None = None
        self.sent: list[Ecn] = []
        "The codepoints of all datagrams, in order."
        self.delays_s: list[float] = []
        "How long each datagram was in the inbound link."
        self._source = source
        self.peer = peer
        self._inbound = inbound
        self._outbound = outbound
        self.rewrite = rewrite
        self._flushed_at = float("-inf")

    def next_time(self) -> float | None:
        timer = self.quic.get_timer()
        times = [self._inbound.next_time(), None if timer is None else timer + TIMER_SLACK_S]
        due = self._source.next_time()
        if due is not None and due > self._flushed_at:
            times.append(due)
        return min((time for time in times if time is not None), default=None)

    def act(self, now: float) -> None:
        for packet in self._inbound.poll(now):
            if packet.flow != netem.SUBJECT:
                continue
            self.delays_s.append(now - packet.entered_s)
            ecn = Ecn(self.rewrite(now, packet.ecn))
            if isinstance(self.quic, EcnConnection):
                self.quic.receive_datagram(packet.data, self.peer, now, ecn)
            else:
                self.quic.receive_datagram(packet.data, self.peer, now)
        timer = self.quic.get_timer()
        if timer is not None and timer <= now:
            self.quic.handle_timer(now)
        while (event := self.quic.next_event()) is not None:
            if isinstance(event, ConnectionTerminated):
                self.terminated = event
        self.flush(now)

    def flush(self, now: float) -> None:
        self._flushed_at = now
        if isinstance(self.quic, EcnConnection):
            for data, _, ecn in self.quic.marked_datagrams_to_send(now):
                self.sent.append(ecn)
                self._outbound.send(now, netem.udp_packet(data, netem.Ecn(ecn)))
        else:
            for data, _ in self.quic.datagrams_to_send(now):
                self._outbound.send(now, netem.udp_packet(data))


class EcnPair:
    """A server that sends datagrams, marked by a policy, and a client that acknowledges them."""

    def __init__(
        self,
        source: Datagrams,
        marking: MarkingPolicy | None,
        *,
        up: Link | None = None,
        down: Link | None = None,
        rewrite: Rewrite = as_is,
        client_class: type[LateBoundConnection] = EcnConnection,
        congestion_control: str = THIN,
        others: tuple[Actor, ...] = (),
    ) -> None:
        self.up = Link(delay_s=0.02, seed=0, name="up") if up is None else up
        self.down = Link(delay_s=0.02, seed=0, name="down") if down is None else down
        self.source = source
        self._others = others
        silent = nothing()
        client = client_class(
            configuration=client_configuration("ecn", pin=CERTIFICATE.pin), source=silent
        )
        configuration = server_configuration(CERTIFICATE)
        configuration.congestion_control_algorithm = congestion_control
        server = EcnConnection(
            configuration=configuration,
            source=source,
            marking=marking,
            original_destination_connection_id=client.original_destination_connection_id,
        )
        self.client = End(
            client, silent, peer=SERVER, inbound=self.down, outbound=self.up, rewrite=rewrite
        )
        self.server = End(
            server, source, peer=CLIENT, inbound=self.up, outbound=self.down, rewrite=as_is
        )
        self.quic = server
        self.now = 0.0
        client.connect(SERVER, now=0.0)
        self.client.flush(0.0)

    def run(self, until_s: float) -> None:
        """Let everything happen up to a time."""
        alarm = Alarm(until_s)
        self.now = simulate(
            (self.client, self.server, *self._others, alarm),
            until=lambda: alarm.rang,
            start_s=self.now,
            limit_s=until_s + 1,
        )


class Alarm:
    """Ends a run."""

    def __init__(self, at: float) -> None:
        self._at: float | None = at
        self.rang = False

    def next_time(self) -> float | None:
        return self._at

    def act(self, now: float) -> None:
        self.rang, self._at = True, None
