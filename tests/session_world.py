"""A server and a session with it in virtual time, over paths that fail on cue."""

import asyncio
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from telling import Telling

from eloquent.core.events import End, Event, TextDelta
from eloquent.quic.certificate import make_certificate
from eloquent.quic.connect import connect
from eloquent.quic.listen import Listener, listen
from eloquent.quic.tickets import Tickets
from eloquent.serving import TurnService
from eloquent.session.session import Session
from eloquent.session.states import LinkState
from eloquent.session.turn import ClientTurn
from eloquent.url import ServerUrl
from eloquent_netem.capture import Address
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss, Loss, NoLoss
from eloquent_netem.packet import Packet
from eloquent_netem.vloop import VirtualLoop, VirtualNetwork, run
from eloquent_netem.vloop_network import Datagram

T = TypeVar("T")

PORT = 4433
CERTIFICATE = make_certificate("server", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
SERVER = "server"
URL = ServerUrl(SERVER, PORT, CERTIFICATE.pin)
KEPT_PACKETS = 1000
OTHER_IP = "203.0.113.9"


class Road:
    """A link of the test's: a plain one behind what may happen on the way to it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.is_cut = False
        self.max_bytes: int | None = None
        "Larger packets vanish."
        self.rewrite: Callable[[Datagram], bool] = lambda packet: True
        "Changes a packet's addresses; False: it vanishes."
        self.ports: dict[int, None] = {}
        "From which packets were sent."
        self.packets: list[tuple[Address, bytes]] = []
        "The first packets that were sent, with their source."
        self.sizes: list[tuple[float, int]] = []
        "Of the packets that were sent, IP and UDP headers included, with their times."

    def send(self, now: float, packet: Packet) -> None:
        assert isinstance(packet, Datagram)
        if len(self.packets) < KEPT_PACKETS:
            self.packets.append((packet.source, packet.data))
        self.ports[packet.source[1]] = None
        self.sizes.append((now, packet.size))
        is_too_large = self.max_bytes is not None and packet.size > self.max_bytes
        if not self.is_cut and not is_too_large and self.rewrite(packet):
            self.link.send(now, packet)

    def next_time(self) -> float | None:
        return self.link.next_time()

    def poll(self, now: float) -> list[Packet]:
        return self.link.poll(now)


class FakeMachine:
    """A `Machine` whose network and sleep are the test's."""

    def __init__(self) -> None:
        self.source: str | None = "wlan"
        self.sleep_s = 0.0
        self._changed = asyncio.Event()

    def source_for(self, host: str) -> str | None:
        return self.source

    def slept_s(self) -> float:
        return self.sleep_s

    async def changes(self) -> AsyncIterator[None]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            yield

    def change(self, source: str | None) -> None:
        """Let the way to the server be another one, or none, from now on."""
        self.source = source
        self._changed.set()


class World:
    """Client, server, the road each way, and what the session said of its link."""

    def __init__(self, service: TurnService, up: Road, down: Road, network: VirtualNetwork) -> None:
        self.service = service
        self.up, self.down, self.network = up, down, network
        self.machine = FakeMachine()
        self.states: list[tuple[float, LinkState]] = []
        self.listener: Listener | None = None
        self.tickets = Tickets(URL)
        self.session = Session(
            URL,
            on_state=lambda state: self.states.append((now(), state)),
            connector=partial(connect, tickets=self.tickets),
            machine=self.machine,
        )

    async def start_server(self, **options: Any) -> Listener:
        with self.network.on("server"):
            self.listener = await listen(
                SERVER, PORT, certificate=CERTIFICATE, service=self.service, **options
            )
        return self.listener

    async def kill_server(self) -> None:
        """Let the server's process die: nobody is told, and its port is free."""
        assert self.listener is not None
        assert self.listener._transport is not None
        for peer in list(self.listener._peers):
            peer.driver.stop()
        self.listener._transport.close()
        self.listener = None
        await asyncio.sleep(0)

    async def cut(self, seconds: float) -> None:
        """Let nothing through, either way, for a while."""
        self.up.is_cut = self.down.is_cut = True
        await asyncio.sleep(seconds)
        self.up.is_cut = self.down.is_cut = False

    def seen(self) -> list[LinkState]:
        """Return the states that the session went through."""
        return [state for _, state in self.states]

    def time_of(self, state: LinkState, *, after: float = 0.0) -> float:
        """Return when the session was first in a state, from a time on."""
        return next(time for time, other in self.states if other is state and time >= after)


class Nat:
    """Gives the client's sockets another address, as a new network or a NAT that forgot does.

    Packets from the ports that were in use until now come from `ip` and a new port, or vanish if
    `keeps_old` is False (their network is gone); so do those from new ports.
    """

    def __init__(self, world: World, *, ip: str | None, keeps_old: bool) -> None:
        self._old = set(world.up.ports)
        self._ip = ip
        self._keeps_old = keeps_old
        self._inside: dict[int, tuple[str, int]] = {}
        world.up.rewrite = self._up
        world.down.rewrite = self._down

    def _up(self, packet: Datagram) -> bool:
        if packet.source[1] in self._old and not self._keeps_old:
            return False
        port = packet.source[1] + 1000
        self._inside[port] = packet.source
        packet.source = (self._ip or packet.source[0], port)
        return True

    def _down(self, packet: Datagram) -> bool:
        inside = self._inside.get(packet.destination[1])
        if inside is not None:
            packet.destination = inside
        return inside is not None


def in_world(
    play: Callable[[World], Awaitable[T]],
    service: Callable[[], TurnService] | None = None,
    *,
    rtt_s: float = 0.1,
    loss: float = 0.0,
    seed: int = 1,
    limit_s: float = 86_400.0,
) -> T:
    """Run `play` in a world whose server is up; `service` tells a hundred tokens by default."""

    def lossy(name: str) -> Loss:
        return IndependentLoss(loss, stage_rng(seed, name, "loss")) if loss else NoLoss()

    up, down = (
        Road(Link(delay_s=rtt_s / 2, seed=seed, name=name, loss=lossy(name)))
        for name in ("up", "down")
    )
    network = VirtualNetwork.between(up, down)
    network.add_host("elsewhere", OTHER_IP)
    network.add_path("server", "elsewhere", down, Road(Link(delay_s=0.0, seed=1, name="unused")))

    async def main() -> T:
        world = World(service() if service else Telling(tokens(100), 0.05), up, down, network)
        await world.start_server()
        try:
            return await play(world)
        finally:
            await world.session.close()
            if world.listener is not None:
                await world.listener.close()

    return run(main(), network, limit_s=limit_s)


def tokens(count: int) -> list[str]:
    return [f"token {number} " for number in range(count)]


def now() -> float:
    return asyncio.get_running_loop().time()


def stop_process(seconds: float) -> None:
    """Let time pass in which nobody on the loop does anything; packets wait for them."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._now += seconds


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds; the loop's limit of time ends a wait in vain."""
    while not holds():  # noqa: ASYNC110  (nothing tells)
        await asyncio.sleep(0.01)


async def read(turn: ClientTurn, times: list[float] | None = None) -> str:
    """Return a turn's text; it has to end as it should. `times` gets those of its events."""
    text, last = "", None
    async for event in turn:
        last = event
        if times is not None:
            times.append(now())
        if isinstance(event, TextDelta):
            text += event.text
    assert isinstance(last, End)
    return text


async def first_events(turn: ClientTurn, count: int) -> list[Event]:
    """Return the next events of a turn."""
    events: list[Event] = []
    iterator = aiter(turn)
    while len(events) < count:
        events.append(await anext(iterator))
    return events
