"""The driver in virtual time: both real QUIC ends, or the model of TCP, over emulated links."""

from dataclasses import dataclass, replace

from eloquent.core.schemes import SCHEMES
from eloquent.errors import ConfigurationError
from eloquent_netem.cross import CrossFlow
from eloquent_netem.lab.answer import QUIC_STREAM, START_S, TCP_SCHEMES, LabPath, send_answer
from eloquent_netem.lab.oracle import passes
from eloquent_netem.lab.rows import Arrivals, Place
from eloquent_netem.lab.shared import Alarms, SharedLink
from eloquent_netem.lab.sources import LiveModel, Source
from eloquent_netem.link import Link
from eloquent_netem.packet import SUBJECT
from eloquent_netem.rate import MS_PER_S
from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_parts import DOWN
from eloquent_netem.sim import Actor, simulate

NOT_LIVE = (
    "A live model generates in real time, and virtual time does not wait for it: use --driver tun, "
    "or record it first (`eloquent lab record`)."
)


@dataclass(frozen=True, slots=True)
class SimDriver:
    """Virtual time: the same seed gives the same run, and nothing is late."""

    @property
    def name(self) -> str:
        """See `Driver.name`."""
        return "sim"

    @property
    def schemes(self) -> tuple[str, ...]:
        """See `Driver.schemes`."""
        return (*SCHEMES, QUIC_STREAM, *TCP_SCHEMES)

    @property
    def most_workers(self) -> int | None:
        """See `Driver.most_workers`."""
        return None

    def meta(self) -> dict[str, object]:
        """See `Driver.meta`."""
        return {
            "time": "virtual",
            "tcp": "a model of Linux's TCP without TLS, held to the kernel by `eloquent netem "
            "fidelity`",
        }

    def check(self) -> None:
        """See `Driver.check`: any machine can."""

    def run(self, place: Place, scheme: str, seed: int, source: Source) -> Arrivals:
        """See `Driver.run`."""
        if isinstance(source, LiveModel):
            raise ConfigurationError(NOT_LIVE)
        plan = source.plan(seed)
        begin_s = place.begin_s(seed, plan[-1].time_s)
        answer = send_answer(scenario_path(place.scenario, seed, begin_s), scheme, plan)
        return Arrivals(
            generated_s=tuple(answer.generated_s),
            rendered_s=tuple(answer.rendered_s),
            requested_s=START_S,
            base_delay_s=place.base_delay_s,
            origin_s=START_S - begin_s,
            downlink_packets=answer.downlink_packets,
            downlink_bytes=answer.downlink_bytes,
            uplink_bytes=answer.uplink_bytes,
        )


def scenario_path(scenario: Scenario, seed: int, begin_s: float) -> LabPath:
    """Return a path over a scenario's links, for an answer that begins at `begin_s` of its clock.

    Cross traffic has been there since the scenario's beginning by then.
    """
    origin_s = START_S - begin_s
    up, down = scenario.links(seed, origin_s)
    passes_from = passes(scenario, DOWN, seed)
    path = LabPath(
        up=up,
        down=down,
        base_delay_s=scenario.down.delay_ms / MS_PER_S,
        passes_from=lambda now: passes_from(now - origin_s) + origin_s,
    )
    if not scenario.cross:
        return path
    loaded = load(scenario, (up, down), seed, origin_s)
    return replace(
        path,
        up=loaded.up.port(SUBJECT),
        down=loaded.down.port(SUBJECT),
        others=loaded.actors,
    )


@dataclass(frozen=True, slots=True)
class Loaded:
    """Two links, and the cross traffic that has filled them until `START_S`."""

    up: SharedLink
    down: SharedLink
    flows: tuple[CrossFlow, ...]

    @property
    def actors(self) -> tuple[Actor, ...]:
        """All that acts, in its order."""
        return (self.up, self.down, *self.flows)


def load(scenario: Scenario, links: tuple[Link, Link], seed: int, origin_s: float) -> Loaded:
    """Let a scenario's cross traffic fill its links, up and down, from `origin_s` until `START_S`.

    `origin_s` is when the scenario's clock was at 0.
    """
    up, down = map(SharedLink, links)
    loaded = Loaded(up, down, scenario.cross_flows(*links, seed, origin_s))
    for link in (up, down):
        for flow in loaded.flows:
            link.listen(flow.on_delivered)
    is_time: list[bool] = []
    begin = Alarms([(START_S, lambda: is_time.append(True))])
    simulate(
        (*loaded.actors, begin), until=lambda: bool(is_time), start_s=origin_s, limit_s=START_S
    )
    return loaded
