"""How fast the emulation runs: virtual time with a real QUIC connection in it, and DualPI2.

Figures for the benchmarks, no tests: they depend on the machine and on what else it does.
"""

import asyncio
import datetime
import platform
import random
import socket
import ssl
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import DatagramFrameReceived, QuicEvent

from eloquent.errors import EloquentError
from eloquent.quic.certificate import make_certificate
from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.scenario import load_scenario
from eloquent_netem.vloop import VirtualNetwork, run, scenario_network

VIRTUAL_S = 120.0
DATAGRAMS_PER_S = 50
DATAGRAM_BYTES = 200
PORT = 4433
VIRTUAL_TIME_BOUND = 50.0
"""Virtual seconds per CPU-second, which is a second where nothing else runs: virtual time waits for
nothing. Real time itself would judge the machine's other work."""

PACKETS = 200_000
BACKLOG_PACKETS = 50
GAP_S = 0.00012
DUALPI2_BOUND = 200_000.0
"Packets per CPU-second."

RUNS = 3
"The median counts: one run may have shared the processor with others."
_ALPN = "netem-speed"


class SpeedError(EloquentError):
    """The load was not what it should be, so the figure would mean nothing."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One figure: the median of its runs, beside what it must be at least."""

    name: str
    unit: str
    measured: float
    bound: float | None
    "None: the figure is there to explain another."
    runs: tuple[float, ...]

    @property
    def is_met(self) -> bool:
        """Whether it is no lower than its bound."""
        return self.bound is None or self.measured >= self.bound

    def __str__(self) -> str:
        low, high = min(self.runs), max(self.runs)
        figure = f"{self.name}: {self.measured:,.0f} {self.unit} ({low:,.0f} to {high:,.0f})"
        if self.bound is None:
            return figure
        verdict = "met" if self.is_met else "MISSED"
        return f"{figure}; at least {self.bound:,.0f}: {verdict}"


def measure(*, virtual_s: float = VIRTUAL_S, packets: int = PACKETS) -> list[Speed]:
    """Measure everything, `RUNS` times.

    Raises:
        SpeedError: the load was not what it should be.
    """
    times = [virtual_time(virtual_s) for _ in range(RUNS)]
    dualpi2 = [dualpi2_packets_per_s(packets) for _ in range(RUNS)]
    name = f"Virtual time, one aioquic connection with {DATAGRAMS_PER_S} datagrams/s"
    walls, cpus = zip(*times, strict=True)
    return [
        _speed(name, "virtual s per CPU-s", VIRTUAL_TIME_BOUND, cpus),
        _speed(name, "virtual s per s", None, walls),
        _speed("DualPI2", "packets per CPU-s", DUALPI2_BOUND, tuple(dualpi2)),
    ]


def to_json(speeds: list[Speed]) -> dict[str, Any]:
    """Return an object with `meta` and `rows`, whose keys are `Speed`'s fields and `is_met`."""
    meta = {"python": platform.python_version(), "machine": platform.machine(), "runs": RUNS}
    return {"meta": meta, "rows": [asdict(speed) | {"is_met": speed.is_met} for speed in speeds]}


def virtual_time(virtual_s: float = VIRTUAL_S) -> tuple[float, float]:
    """Return how many virtual seconds pass per second and per CPU-second.

    A stock aioquic client sends `DATAGRAMS_PER_S` datagrams to a stock aioquic server over the
    scenario `clean`. The handshake is left out.

    Raises:
        SpeedError: a datagram did not arrive.
    """
    network = scenario_network(load_scenario("clean"), 1)
    count = round(virtual_s * DATAGRAMS_PER_S)
    received, wall_s, cpu_s = run(_send_datagrams(network, count), network, limit_s=2 * virtual_s)
    if received != count:
        raise SpeedError(
            f"{received} of {count} datagrams arrived in a scenario without loss: the "
            "connection did not do the work that is measured; see what aioquic logs."
        )
    return virtual_s / wall_s, virtual_s / cpu_s


class _Counter(QuicConnectionProtocol):
    received = 0

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, DatagramFrameReceived):
            self.received += 1


async def _send_datagrams(network: VirtualNetwork, count: int) -> tuple[int, float, float]:
    """Return how many arrived, and the seconds and CPU-seconds they took."""
    loop = asyncio.get_running_loop()
    made: list[_Counter] = []

    def make_server(*arguments: Any, **options: Any) -> _Counter:
        made.append(_Counter(*arguments, **options))
        return made[-1]

    with network.on("server"):
        server = await serve(
            "server",
            PORT,
            configuration=_server_configuration(),
            create_protocol=make_server,
        )
    addresses = await loop.getaddrinfo("server", PORT, family=socket.AF_INET)
    connection = QuicConnection(configuration=_client_configuration())
    transport, client = await loop.create_datagram_endpoint(
        lambda: QuicConnectionProtocol(connection), family=socket.AF_INET
    )
    client.connect(addresses[0][4])
    await client.wait_connected()
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(count):
        connection.send_datagram_frame(bytes(DATAGRAM_BYTES))
        client.transmit()
        await asyncio.sleep(1 / DATAGRAMS_PER_S)
    wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
    await asyncio.sleep(1)
    client.close()
    await client.wait_closed()
    transport.close()
    server.close()
    return sum(protocol.received for protocol in made), wall_s, cpu_s


def _client_configuration() -> QuicConfiguration:
    return QuicConfiguration(
        is_client=True,
        alpn_protocols=[_ALPN],
        max_datagram_frame_size=65535,
        verify_mode=ssl.CERT_NONE,
    )


def _server_configuration() -> QuicConfiguration:
    certificate = make_certificate("server", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    return QuicConfiguration(
        is_client=False,
        alpn_protocols=[_ALPN],
        max_datagram_frame_size=65535,
        certificate=certificate.certificate,
        private_key=certificate.private_key,
    )


def dualpi2_packets_per_s(packets: int = PACKETS) -> float:
    """Return how many packets per CPU-second pass DualPI2, enqueued and dequeued.

    A packet comes and one goes every 120 us (100 Mbit/s of 1500 bytes), half of them ECT(1).
    What waits is about 50 packets of C, 12 ms: just below the controller's target, so that a
    decision is drawn for every packet, but hardly one is dropped to make the work less.

    Raises:
        SpeedError: more than 0.1% were dropped.
    """
    queue = DualPi2(rng=random.Random(1))  # noqa: S311  (emulation, not cryptography)
    load = [Packet(b"", 1500, Ecn.ECT_1 if index % 2 else Ecn.NOT_ECT) for index in range(packets)]
    passed = 0
    start_s = time.process_time()
    for index, packet in enumerate(load):
        packet.entered_s = now = index * GAP_S
        queue.enqueue(now, packet)
        if index >= BACKLOG_PACKETS:
            passed += queue.dequeue(now) is not None
    rate = passed / (time.process_time() - start_s)
    if queue.drops > packets / 1000:
        raise SpeedError(
            f"DualPI2 dropped {queue.drops} of {packets} packets, which is less work than passing "
            "them: the figure would flatter it. Give the benchmark a lower backlog."
        )
    return rate


def _speed(name: str, unit: str, bound: float | None, runs: tuple[float, ...]) -> Speed:
    return Speed(name, unit, median(runs), bound, runs)
