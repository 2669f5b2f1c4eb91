"""The digest of a scenario: a hash of what becomes of a fixed load, packet by packet.

The same seed has the same digest in every process; a figure quoted with it can be checked.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from eloquent_netem.cross import CrossFlow
from eloquent_netem.link import Link
from eloquent_netem.packet import SUBJECT, Ecn, Packet
from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_parts import DOWN, UP
from eloquent_netem.sim import Actor, simulate

LOAD_GAP_S = 0.005
LOAD_BYTES = 100
LOAD_ECN = (Ecn.NOT_ECT, Ecn.ECT_1)
"The load's packets take turns, so that it sees both queues of DualPI2."

DRAIN_S = 10.0
"How long packets may take to arrive after the load has ended."

NS_PER_S = 1_000_000_000


@dataclass(slots=True)
class Passage:
    """What became of one packet of the load."""

    direction: str
    sent_s: float
    packet: Packet
    arrived_s: tuple[float, ...] = ()
    "When it arrived, and when its copy did; empty if it was lost or is held at the end."

    def lines(self) -> str:
        """Return what the digest hashes; times in whole nanoseconds: floats round there."""
        fate = "arrived" if self.arrived_s else "lost"
        rest = f"{self.direction} {self.packet.size} {int(self.packet.ecn)} {fate}"
        times = (self.sent_s, *self.arrived_s) if self.arrived_s else (self.sent_s,)
        return " ".join(str(round(time * NS_PER_S)) for time in times) + f" {rest}\n"


class _Load:
    """Sends a packet into both links at a steady pace, and hears of what arrives."""

    def __init__(self, links: dict[str, Link], length_s: float) -> None:
        self.passages: list[Passage] = []
        self._links = links
        self._count = 0
        self._last = int(length_s / LOAD_GAP_S)

    def next_time(self) -> float | None:
        return self._count * LOAD_GAP_S if self._count < self._last else None

    def act(self, now: float) -> None:
        for direction, link in self._links.items():
            data = len(self.passages).to_bytes(8, "big")
            packet = Packet(data, LOAD_BYTES, LOAD_ECN[self._count % len(LOAD_ECN)])
            self.passages.append(Passage(direction, now, packet))
            link.send(now, packet)
        self._count += 1

    def arrived(self, now: float, packet: Packet) -> None:
        passage = self.passages[int.from_bytes(packet.data, "big")]
        passage.arrived_s += (now,)


class _Arrivals:
    """Takes out of a link what has come through."""

    def __init__(self, link: Link, load: _Load, cross: Sequence[CrossFlow]) -> None:
        self._link = link
        self._load = load
        self._cross = cross

    def next_time(self) -> float | None:
        return self._link.next_time()

    def act(self, now: float) -> None:
        for packet in self._link.poll(now):
            if packet.flow == SUBJECT:
                self._load.arrived(now, packet)
            else:
                for flow in self._cross:
                    flow.on_delivered(now, packet)


class _End:
    """Is over at a given time."""

    def __init__(self, time_s: float) -> None:
        self.is_over = False
        self._time_s = time_s

    def next_time(self) -> float | None:
        return self._time_s

    def act(self, now: float) -> None:
        self.is_over = True


def passages(scenario: Scenario, seed: int | None = None) -> list[Passage]:
    """Return what becomes of 100 bytes every 5 ms both ways for the scenario's length.

    The scenario's cross traffic is there too.

    Raises:
        ScenarioError: see `Scenario.links`.
    """
    links = dict(zip((UP, DOWN), scenario.links(seed), strict=True))
    cross = scenario.cross_flows(links[UP], links[DOWN], seed)
    load = _Load(links, scenario.length_s)
    end = _End(scenario.length_s + DRAIN_S)
    actors: list[Actor] = [
        load,
        *cross,
        *(_Arrivals(link, load, cross) for link in links.values()),
        end,
    ]
    limit_s = scenario.length_s + 2 * DRAIN_S
    simulate(actors, until=lambda: end.is_over, start_s=0.0, limit_s=limit_s)
    return load.passages


def digest(scenario: Scenario, seed: int | None = None) -> str:
    """Return the hash of what becomes of the load, in hexadecimal.

    Raises:
        ScenarioError: see `Scenario.links`.
    """
    sha = hashlib.sha256()
    for passage in passages(scenario, seed):
        sha.update(passage.lines().encode())
    return sha.hexdigest()
