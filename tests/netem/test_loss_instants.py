"""UDP, the TCP model and kernel TCP lose what they send at the same instants: those of the seed."""

import functools
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

from eloquent_netem.link import Link
from eloquent_netem.packet import Packet
from eloquent_netem.scenario import Scenario, load_scenario, parse_scenario
from eloquent_netem.scenario_build import build_loss
from eloquent_netem.scenario_parts import DOWN, UP
from eloquent_netem.tcp.tokens import even_tokens, send_tokens
from tests.netem.test_tun import needs_ip, network, run_client, start_server

SEED = 5

LIBRARY = load_scenario("bursts-150ms")
FREQUENT = parse_scenario(
    "[up]\ndelay_ms = 10\n[down]\ndelay_ms = 10\n"
    'loss = { kind = "bursts", loss = 0.15, burst_ms = 60 }\n'
)
"Enough bursts for a run of a few seconds on the wall clock; the way up is clean."

SETTLED_S = 0.3
"What entered so long before the last packet has come out by then, or never will."

Trace = dict[float, bool]
"Whether what entered the link at an instant, in seconds, was lost."


class Recorded(Link):
    """A link that notes when packets enter and, of those that come out, when they had entered."""

    def __init__(self, scenario: Scenario, direction: str, file: Path | None = None) -> None:
        spec = scenario.direction(direction)
        super().__init__(
            delay_s=spec.delay_ms / 1000,
            seed=SEED,
            name=direction,
            loss=build_loss(spec, direction, SEED),
        )
        self.notes: list[tuple[str, float]] = []
        self._file = None if file is None else file.open("w", buffering=1)

    def send(self, now: float, packet: Packet) -> None:
        self._note("entered", now)
        super().send(now, packet)

    def poll(self, now: float) -> list[Packet]:
        packets = super().poll(now)
        for packet in packets:
            self._note("passed", packet.entered_s)
        return packets

    def _note(self, what: str, entered_s: float) -> None:
        self.notes.append((what, entered_s))
        if self._file is not None:
            print(what, entered_s.hex(), file=self._file)


def trace(notes: list[tuple[str, float]]) -> Trace:
    """Return what was lost; packets that enter at the same instant share their fate."""
    counts = Counter(notes)
    entered = sorted({time for what, time in notes if what == "entered"})
    found = {}
    for time in entered:
        sent, passed = counts["entered", time], counts["passed", time]
        assert passed in (0, sent)
        if time < entered[-1] - SETTLED_S:
            found[time] = passed == 0
    return found


def udp_trace(scenario: Scenario, direction: str, length_s: float) -> Trace:
    """Send a datagram in the middle of each slot of 1 ms."""
    link = Recorded(scenario, direction)
    for slot in range(round(length_s * 1000)):
        link.send((slot + 0.5) / 1000, Packet(b"", 100))
    link.poll(length_s + 1)
    return trace(link.notes)


def tcp_model_traces(scenario: Scenario, tokens: int, interval_s: float) -> dict[str, Trace]:
    up, down = Recorded(scenario, UP), Recorded(scenario, DOWN)
    plan = even_tokens(tokens, interval_s=interval_s, token_bytes=200)
    send_tokens(up=up, down=down, plan=plan)
    return {UP: trace(up.notes), DOWN: trace(down.notes)}


def bursts(found: Trace) -> list[tuple[float, float]]:
    """Return the first and the last instant of each run of losses."""
    runs = [list(run) for is_lost, run in groupby(sorted(found), found.__getitem__) if is_lost]
    return [(run[0], run[-1]) for run in runs]


def check_against_the_seed(found: Trace, scenario: Scenario, direction: str) -> None:
    """Ask the loss of the seed, to which nobody has sent anything, about each instant."""
    loss = build_loss(scenario.direction(direction), direction, SEED)
    assert found == {time: loss.passes_from(time) > time for time in found}


def check_against_each_other(dense: Trace, other: Trace) -> None:
    """With the other's packets among them, the dense flow's bursts are as many, and as long."""
    until_s = min(max(dense), max(other))
    dense, other = ({t: f for t, f in found.items() if t < until_s} for found in (dense, other))
    alone, together = bursts(dense), bursts(dense | other)
    assert sum(other.values()) > 0
    assert len(together) == len(alone)
    for (start, stop), (its_start, its_stop) in zip(together, alone, strict=True):
        assert its_start - 0.001 < start <= its_start
        assert its_stop <= stop < its_stop + 0.001


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_udp_and_the_tcp_model_meet_the_same_bursts(direction: str) -> None:
    # 20.3 ms and not 20, lest packets enter where slots meet.
    tcp = tcp_model_traces(LIBRARY, tokens=2000, interval_s=0.0203)[direction]
    udp = udp_trace(LIBRARY, direction, 40.0)
    check_against_the_seed(udp, LIBRARY, direction)
    check_against_the_seed(tcp, LIBRARY, direction)
    check_against_each_other(udp, tcp)
    assert len(bursts(udp)) >= 8
    hit = [start for start, stop in bursts(udp) if any(start <= t <= stop for t in tcp)]
    assert len(hit) >= 5


def links(file: Path) -> tuple[Link, Link]:
    """Make the links, in the router's process."""
    return Recorded(FREQUENT, UP), Recorded(FREQUENT, DOWN, file)


TOKEN_SERVER = """
import socket, time
with socket.create_server(("192.0.2.2", 7)) as server:
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    print("ready", flush=True)
    stream, _ = server.accept()
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(500):
    stream.sendall(bytes(200))
    time.sleep(0.01)
stream.close()
"""

TOKEN_CLIENT = """
import socket
stream = socket.create_connection(("192.0.2.2", 7))
count = 0
while data := stream.recv(65536):
    count += len(data)
print(count)
"""


@needs_ip
def test_kernel_tcp_meets_the_same_bursts_as_udp_and_the_model(tmp_path: Path) -> None:
    file = tmp_path / "down.txt"
    with network(functools.partial(links, file)) as net:
        start_server(net, TOKEN_SERVER)
        net.start()
        assert run_client(net, TOKEN_CLIENT) == ["100000"]
    kernel = trace(
        [
            (what, float.fromhex(time))
            for what, time in (line.split() for line in file.read_text().splitlines())
        ]
    )
    assert len(kernel) > 100
    assert len(bursts(kernel)) >= 3
    check_against_the_seed(kernel, FREQUENT, DOWN)
    model = tcp_model_traces(FREQUENT, tokens=500, interval_s=0.0103)[DOWN]
    check_against_the_seed(model, FREQUENT, DOWN)
    udp = udp_trace(FREQUENT, DOWN, max(*kernel, *model) + 1)
    check_against_each_other(udp, kernel)
    check_against_each_other(udp, model)
