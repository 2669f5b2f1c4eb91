"""What the comparison is made of: places, drivers, what an answer did, and the row it becomes."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from eloquent_netem.lab.measures import DeliveryError, measure_stalls, recovery_s
from eloquent_netem.lab.sources import Source
from eloquent_netem.link import stage_rng
from eloquent_netem.rate import MS_PER_S
from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_parts import BurstLossSpec, IndependentLossSpec, TraceRateSpec

ORACLE = "oracle"
"Not a scheme: the link's own bound, what no sender can beat (`eloquent_netem.lab.oracle`)."


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Place:
    """One network of a comparison; its `repr` is its identity, traces' contents included."""

    name: str
    "A row's `scenario`."
    scenario: Scenario
    begins_s: float | None = None
    """When on the scenario's clock the reader connects. None: the seed chooses, so that the answer
    is over when the scenario's length is, if it fits."""

    def begin_s(self, seed: int, answer_s: float) -> float:
        """Return when on the scenario's clock the reader connects, for an answer so long.

        The clock thus reads `begin_s` when a run begins: links whose `origin_s` is that much
        before the run's beginning (`Scenario.links`), a router whose clock starts there.
        """
        if self.begins_s is not None:
            return self.begins_s
        latest_s = max(self.scenario.length_s - answer_s, 0.0)
        return latest_s * stage_rng(seed, "both", "begin").random()

    @property
    def base_delay_s(self) -> float:
        """What a packet takes down the path without queues, jitter aside."""
        return self.scenario.down.delay_ms / MS_PER_S

    @property
    def rtt_s(self) -> float:
        """The round trip without queues, jitter aside."""
        return self.base_delay_s + self.scenario.up.delay_ms / MS_PER_S

    @property
    def loss(self) -> float:
        """The mean share of downlink packets that is lost on entering, outages aside."""
        loss = self.scenario.down.loss
        if isinstance(loss, IndependentLossSpec):
            return loss.probability
        return loss.loss if isinstance(loss, BurstLossSpec) else 0.0

    @property
    def burst_ms(self) -> float | None:
        """The mean length of the bursts in which they are lost; None: each is lost for itself."""
        loss = self.scenario.down.loss
        return loss.burst_ms if isinstance(loss, BurstLossSpec) else None

    def __repr__(self) -> str:
        scenario = self.scenario
        traces = [
            _file_hash(scenario.folder / path.rate.file)
            for path in (scenario.up, scenario.down)
            if isinstance(path.rate, TraceRateSpec)
        ]
        return (
            f"Place({self.name!r}, {self.begins_s}, {scenario.length_s}, {scenario.up}, "
            f"{scenario.down}, {scenario.outages}, {scenario.cross}, {traces})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """What one answer did, before any measure; all times in seconds on one clock."""

    generated_s: tuple[float, ...]
    rendered_s: tuple[float, ...]
    "Per token, in their order: when the reader had it and all before it."
    requested_s: float
    "When the reader began to connect; time to first token counts from here."
    base_delay_s: float
    origin_s: float
    "When the scenario's clock was at 0; what the oracle needs."
    downlink_packets: int
    downlink_bytes: int
    uplink_bytes: int
    "All headers included, from the first token's generation to the last one's rendering."
    duplicates: int = 0
    missing: int = 0
    "Bytes of the answer that came twice, or not at all; a changed byte is a missing one."
    programs_s: float = 0.0
    """The part of `base_delay_s` that is not the path's: what the programs at both ends took for a
    token that met nothing on its way. In virtual time they take none."""
    lateness_p50_us: float | None = None
    lateness_p99_us: float | None = None
    """How late the router was with one packet in two, and in 100; None: in virtual time nothing is
    late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What no sender can beat, for the tokens of one answer: `eloquent_netem.lab.oracle`."""

    passes_s: tuple[float, ...]
    "The first instant, the token's generation or later, at which the link lets a packet in."
    rendered_s: tuple[float, ...]
    "When that packet comes out."


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run: a line of `--json`. Ratios are shares of one, not percentages."""

    scenario: str
    source: str
    scheme: str
    driver: str
    seed: int
    rtt_ms: float
    loss: float
    burst_ms: float | None
    tokens: int
    stall_ratio: float
    stall_ratio_200ms: float
    excess_strict: float | None
    excess_200ms: float | None
    "The ratios minus the oracle's for the same tokens; None: it is not known."
    delay_p50_ms: float
    delay_p99_ms: float
    delay_mean_ms: float
    delay_max_ms: float
    "Token delay: rendered minus generated minus the path's base delay."
    gap_p99_ms: float
    "Between one instant at which something was rendered and the next."
    ttft_ms: float
    "From when the reader began to connect to the first rendering, handshake included."
    wire_bytes_per_token: float
    packets_per_token: float
    "Downlink, all headers included."
    uplink_bytes_per_token: float
    recovery_rtts: float | None
    """From the link's return until the reader has what was generated by then, in round trips: the
    mean over the outages and bursts in which tokens waited for the link. None: there was none, or
    the oracle is not known."""
    duplicates: int
    missing: int
    "Always 0: a run in which it is not has no row (`DeliveryError`)."
    programs_ms: float
    "What the programs took for a token, which no figure above has in it but `ttft_ms`."
    lateness_p50_us: float | None
    lateness_p99_us: float | None


class Driver(Protocol):
    """What runs an answer over a place: virtual time, or real sockets.

    A frozen dataclass, whose `repr` is its identity; it goes to other processes.
    """

    @property
    def name(self) -> str:
        """A row's `driver`, and the option's value."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """What it can run, `ORACLE` aside, in the order of a table."""

    @property
    def most_workers(self) -> int | None:
        """How many runs may go on at once; None: as many as there are processors."""

    def meta(self) -> dict[str, object]:
        """Return what one must know of it to judge its figures, for the file's `meta`."""

    def check(self) -> None:
        """Find out before the work whether this machine can do it.

        Raises:
            EloquentError, NetemError: it cannot; the text says what to do.
        """

    def run(self, place: Place, scheme: str, seed: int, source: Source) -> Arrivals:
        """Send one answer.

        Raises:
            EloquentError, NetemError, StuckError: it did not arrive, or the machine was too slow;
                the run then has no row, and the text says why.
        """


def measure(
    place: Place,
    arrivals: Arrivals,
    oracle: Bound | None,
    *,
    scheme: str,
    driver: str,
    seed: int,
    source: str,
) -> Row:
    """Turn what an answer did into its row; `oracle` is the link's bound for the same tokens.

    Raises:
        DeliveryError: tokens are missing, came twice or out of order: the times mean nothing.
    """
    if arrivals.duplicates or arrivals.missing:
        raise DeliveryError(
            f"{arrivals.missing} bytes of the answer are missing and {arrivals.duplicates} came "
            "twice: the transport is broken, and its times mean nothing."
        )
    mine = measure_stalls(arrivals.generated_s, arrivals.rendered_s, arrivals.base_delay_s)
    strict = beyond = recovery_rtts = None
    if oracle is not None:
        bound = measure_stalls(arrivals.generated_s, oracle.rendered_s, arrivals.base_delay_s)
        strict = mine.stall_ratio - bound.stall_ratio
        beyond = mine.stall_ratio_200ms - bound.stall_ratio_200ms
        took_s = recovery_s(arrivals.generated_s, arrivals.rendered_s, oracle.passes_s)
        recovery_rtts = None if took_s is None or not place.rtt_s else took_s / place.rtt_s
    tokens = len(arrivals.generated_s)
    return Row(
        scenario=place.name,
        source=source,
        scheme=scheme,
        driver=driver,
        seed=seed,
        rtt_ms=place.rtt_s * MS_PER_S,
        loss=place.loss,
        burst_ms=place.burst_ms,
        tokens=tokens,
        stall_ratio=mine.stall_ratio,
        stall_ratio_200ms=mine.stall_ratio_200ms,
        excess_strict=strict,
        excess_200ms=beyond,
        delay_p50_ms=mine.delay_p50_s * MS_PER_S,
        delay_p99_ms=mine.delay_p99_s * MS_PER_S,
        delay_mean_ms=mine.delay_mean_s * MS_PER_S,
        delay_max_ms=mine.delay_max_s * MS_PER_S,
        gap_p99_ms=mine.gap_p99_s * MS_PER_S,
        ttft_ms=(arrivals.rendered_s[0] - arrivals.requested_s) * MS_PER_S,
        wire_bytes_per_token=arrivals.downlink_bytes / tokens,
        packets_per_token=arrivals.downlink_packets / tokens,
        uplink_bytes_per_token=arrivals.uplink_bytes / tokens,
        recovery_rtts=recovery_rtts,
        duplicates=arrivals.duplicates,
        missing=arrivals.missing,
        programs_ms=arrivals.programs_s * MS_PER_S,
        lateness_p50_us=arrivals.lateness_p50_us,
        lateness_p99_us=arrivals.lateness_p99_us,
    )


@lru_cache(maxsize=64)
def _file_hash(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
