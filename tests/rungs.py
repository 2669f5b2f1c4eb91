"""Servers and clients of each rung in virtual time, over links that fail as a test wants."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from certificates import fixed_certificate
from telling import Telling

from eloquent.core.events import Event, TextDelta
from eloquent.quic import listen as quic
from eloquent.session.race import Race
from eloquent.session.session import Session
from eloquent.session.turn import ClientTurn
from eloquent.url import ServerUrl
from eloquent.websocket import server as websocket
from eloquent_netem.link import Link
from eloquent_netem.packet import Packet
from eloquent_netem.tcp.segment import TcpPacket
from eloquent_netem.vloop import VirtualNetwork, run

T = TypeVar("T")

PORT = 4433
DELAY_S = 0.025
RTT_S = 2 * DELAY_S


CERTIFICATE = fixed_certificate()
URL = ServerUrl("server", PORT, CERTIFICATE.pin)


Drops = Callable[[float, Packet], bool]
"Says of a packet that enters a link at a time whether it is lost."


class Filter:
    """A link that loses what `drops` says."""

    def __init__(self, name: str, drops: Drops) -> None:
        self._link = Link(delay_s=DELAY_S, seed=1, name=name)
        self._drops = drops

    def send(self, now: float, packet: Packet) -> None:
        """See `PacketLink.send`."""
        if not self._drops(now, packet):
            self._link.send(now, packet)

    def next_time(self) -> float | None:
        """See `PacketLink.next_time`."""
        return self._link.next_time()

    def poll(self, now: float) -> list[Packet]:
        """See `PacketLink.poll`."""
        return self._link.poll(now)


def nothing(now: float, packet: Packet) -> bool:
    return False


def udp(now: float, packet: Packet) -> bool:
    return not isinstance(packet, TcpPacket)


def udp_between(start_s: float, stop_s: float) -> Drops:
    return lambda now, packet: start_s <= now < stop_s and udp(now, packet)


def network(drops: Drops = nothing) -> VirtualNetwork:
    """Return client and server with the same losses both ways."""
    return VirtualNetwork.between(Filter("up", drops), Filter("down", drops))


def virtually(
    main: Callable[[VirtualNetwork], Coroutine[Any, Any, T]], drops: Drops = nothing
) -> T:
    made = network(drops)
    return run(main(made), made)


def now() -> float:
    return asyncio.get_running_loop().time()


async def collect(turn: ClientTurn) -> list[Event]:
    return [event async for event in turn]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


@asynccontextmanager
async def serving(
    made: VirtualNetwork, telling: Telling, *, has_quic: bool = True, has_websocket: bool = True
) -> AsyncIterator[None]:
    """Serve on the virtual host "server", by QUIC and WebSocket at the same port."""
    listeners: list[quic.Listener | websocket.WebSocketListener] = []
    with made.on("server"):
        if has_quic:
            listeners.append(
                await quic.listen("server", PORT, certificate=CERTIFICATE, service=telling)
            )
        if has_websocket:
            listeners.append(
                await websocket.listen("server", PORT, certificate=CERTIFICATE, service=telling)
            )
    try:
        yield
    finally:
        for listener in listeners:
            await listener.close()


def racing(url: ServerUrl = URL, **options: Any) -> Session:
    """Return a session that takes the best rung there is."""
    race = Race()
    return Session(url, connector=race, climber=race.climb, **options)
