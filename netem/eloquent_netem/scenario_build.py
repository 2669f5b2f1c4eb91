"""From a scenario to links: every stage with a random stream of its own."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

from eloquent_netem.cellular import synthetic_cellular
from eloquent_netem.cross import (
    CrossFlow,
    CubicEcnFlow,
    CubicFlow,
    PragueFlow,
    PragueWebFlows,
    UnresponsiveBursts,
    WebFlows,
)
from eloquent_netem.cross_windowed import Send
from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.dualpi2_watch import Watch, WatchedDualPi2
from eloquent_netem.errors import NetemError
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import (
    DropList,
    GilbertElliott,
    IndependentLoss,
    Loss,
    NoLoss,
    Outages,
    PacketGilbertElliott,
    handover_spans,
)
from eloquent_netem.packet import SUBJECT
from eloquent_netem.queues import CoDel, DropTail, Queue
from eloquent_netem.rate import (
    MS_PER_S,
    FixedRate,
    PausedRate,
    Rate,
    SteppedRate,
    TraceRate,
    UnlimitedRate,
    load_trace,
)
from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_parts import (
    BOTH,
    UP,
    BurstLossSpec,
    BurstsSpec,
    CellularRateSpec,
    CoDelSpec,
    CrossSpec,
    CubicSpec,
    DirectionSpec,
    DropListSpec,
    DropTailSpec,
    DualPi2Spec,
    FixedRateSpec,
    HandoversSpec,
    IndependentLossSpec,
    OutageSpec,
    PacketBurstLossSpec,
    PragueWebSpec,
    SteppedRateSpec,
    TraceRateSpec,
    WebSpec,
)
from eloquent_netem.scenario_schema import Place, ScenarioError

BITS_PER_MBIT = 1_000_000

CELLULAR_LENGTH_S = 600.0
"A synthetic cellular link starts over after this, like a recording."

Spans = list[tuple[float, float]]


def build_link(
    scenario: Scenario, direction: str, seed: int, origin_s: float, watch: Watch | None = None
) -> Link:
    """Return a new link for one direction; with `watch`, its DualPI2 is a `WatchedDualPi2`.

    Raises:
        ScenarioError: a part refuses its figures, a file that is named cannot be read, or the queue
            to watch is not DualPI2.
    """
    link: Link

    def ready_s() -> float:  # The queue needs its link, which needs the queue to be made.
        return link.ready_s()

    spec = scenario.direction(direction)
    place = scenario.place.at(direction)
    dropped, held = outage_spans(scenario, direction, seed)
    with _blame(place.at("loss")):
        loss = build_loss(spec, direction, seed)
    with _blame(place.at("rate")):
        rate = build_rate(scenario, direction, seed)
    with _blame(place.at("queue")):
        make_dualpi2: Callable[..., DualPi2] = DualPi2
        if watch is not None:
            if not isinstance(spec.queue, DualPi2Spec):
                raise place.at("queue").error("cannot be watched: only dualpi2 has two queues")
            make_dualpi2 = partial(
                WatchedDualPi2,
                shadow_rng=stage_rng(seed, direction, "shadows"),
                watch=watch,
                ready_s=ready_s,
                rate_at=lambda now: rate.bits_per_s(now - origin_s),
            )
        queue = build_queue(spec, direction, seed, rate, make_dualpi2)
    if dropped:
        loss = Outages(dropped, loss)
    if held:
        rate = PausedRate(rate, held)
    link = Link(
        delay_s=spec.delay_ms / MS_PER_S,
        seed=seed,
        name=direction,
        loss=loss,
        rate=rate,
        queue=queue,
        jitter_s=spec.jitter_ms / MS_PER_S,
        reorders=spec.reorder,
        duplicates=spec.duplicate,
        origin_s=origin_s,
    )
    return link


def outage_spans(scenario: Scenario, direction: str, seed: int) -> tuple[Spans, Spans]:
    """Return the spans, in seconds, in which a direction drops, and those in which it holds.

    The outages of both directions come from a stream that both share: they are at the same
    instants.
    """
    dropped: Spans = []
    held: Spans = []
    shared, own = scenario.outages, scenario.direction(direction).outages
    here = scenario.place
    for owner, outages, place in ((BOTH, shared, here), (direction, own, here.at(direction))):
        for index, outage in enumerate(outages):
            with _blame(place.at("outages").at(index)):
                found = _spans(outage, f"outages-{index}", owner, seed, scenario.length_s)
            (dropped if outage.effect == "drop" else held).extend(found)
    return dropped, held


def build_loss(spec: DirectionSpec, direction: str, seed: int) -> Loss:
    """Return a direction's loss, without its outages."""
    loss = spec.loss
    rng = stage_rng(seed, direction, "loss")
    if isinstance(loss, IndependentLossSpec):
        return IndependentLoss(loss.probability, rng)
    if isinstance(loss, DropListSpec):
        return DropList(loss.indices)
    if isinstance(loss, BurstLossSpec):
        return GilbertElliott(loss=loss.loss, burst_s=loss.burst_ms / MS_PER_S, rng=rng)
    if isinstance(loss, PacketBurstLossSpec):
        return PacketGilbertElliott(loss=loss.loss, burst_packets=loss.burst_packets, rng=rng)
    return NoLoss()


def build_rate(scenario: Scenario, direction: str, seed: int) -> Rate:
    """Return a direction's rate, without the outages that hold."""
    rate = scenario.direction(direction).rate
    if isinstance(rate, FixedRateSpec):
        return FixedRate(rate.mbit_s * BITS_PER_MBIT)
    if isinstance(rate, SteppedRateSpec):
        return SteppedRate([(from_s, mbit_s * BITS_PER_MBIT) for from_s, mbit_s in rate.steps])
    if isinstance(rate, TraceRateSpec):
        return TraceRate(load_trace(scenario.folder / rate.file))
    if isinstance(rate, CellularRateSpec):
        times_ms = synthetic_cellular(
            rng=stage_rng(seed, direction, "rate"),
            mean_bits_per_s=rate.mean_mbit_s * BITS_PER_MBIT,
            length_s=min(scenario.length_s, CELLULAR_LENGTH_S),
            stall_share=rate.stall_share,
            stall_s=rate.stall_ms / MS_PER_S,
        )
        return TraceRate(times_ms)
    return UnlimitedRate()


def build_queue(
    spec: DirectionSpec,
    direction: str,
    seed: int,
    rate: Rate,
    make_dualpi2: Callable[..., DualPi2] = DualPi2,
) -> Queue:
    """Return a direction's queue, before a rate; `make_dualpi2` takes what `DualPi2` takes."""
    queue = spec.queue
    if isinstance(queue, DropTailSpec):
        return DropTail(limit_packets=queue.packets, limit_bytes=queue.bytes)
    if isinstance(queue, CoDelSpec):
        return CoDel(
            limit_packets=queue.packets,
            target_s=queue.target_ms / MS_PER_S,
            interval_s=queue.interval_ms / MS_PER_S,
            ecn=queue.ecn,
        )
    return make_dualpi2(
        rng=stage_rng(seed, direction, "queue"),
        scheduler=queue.scheduler,
        bits_per_s=_usual_bits_per_s(rate),
        limit_packets=queue.packets,
    )


def _usual_bits_per_s(rate: Rate) -> float | None:
    """Return the rate that who sets up a queue would name, or None where there is none."""
    if isinstance(rate, TraceRate):
        return rate.mean_bits_per_s
    if isinstance(rate, SteppedRate):
        return rate.greatest_bits_per_s
    return rate.bits_per_s(0) if isinstance(rate, FixedRate) else None


def build_cross(
    scenario: Scenario, links: tuple[Link, Link], seed: int, origin_s: float
) -> tuple[CrossFlow, ...]:
    """Return new flows of cross traffic, numbered from 1 on in the order of the file."""
    flows = []
    numbers = count(SUBJECT + 1)
    for index, spec in enumerate(scenario.cross):
        link = links[0] if spec.direction == UP else links[1]
        for copy in range(spec.count):
            rng = stage_rng(seed, spec.direction, f"cross-{index}-{copy}")
            start_s = spec.start_s + origin_s
            flows.append(_flow(scenario, spec, next(numbers), link.send, rng=rng, start_s=start_s))
    return tuple(flows)


def _flow(
    scenario: Scenario,
    spec: CrossSpec,
    number: int,
    send: Send,
    *,
    rng: random.Random,
    start_s: float,
) -> CrossFlow:
    rtt_s = scenario.rtt_ms(spec) / MS_PER_S
    if isinstance(spec, BurstsSpec):
        return UnresponsiveBursts(
            number,
            send,
            rtt_s,
            rng,
            bits_per_s=spec.mbit_s * BITS_PER_MBIT,
            mean_burst_s=spec.burst_ms / MS_PER_S,
            mean_pause_s=spec.pause_ms / MS_PER_S,
            start_s=start_s,
        )
    forward_s = scenario.direction(spec.direction).delay_ms / MS_PER_S
    if isinstance(spec, WebSpec):
        web = PragueWebFlows if isinstance(spec, PragueWebSpec) else WebFlows
        return web(
            number, send, rtt_s, rng, forward_s=forward_s, start_s=start_s, every_s=spec.every_s
        )
    make: type[PragueFlow | CubicFlow] = PragueFlow
    if isinstance(spec, CubicSpec):
        make = CubicEcnFlow if spec.ecn else CubicFlow
    return make(number, send, rtt_s, rng, forward_s=forward_s, start_s=start_s)


def _spans(outage: OutageSpec, stage: str, owner: str, seed: int, length_s: float) -> Spans:
    if isinstance(outage, HandoversSpec):
        return list(
            handover_spans(
                every_s=outage.every_s,
                lasting_s=outage.lasting_ms / MS_PER_S,
                length_s=length_s,
                rng=stage_rng(seed, owner, stage),
            )
        )
    return list(outage.spans_s)


@contextmanager
def _blame(place: Place) -> Iterator[None]:
    """Turn what a part says of its figures into an error that names file and key."""
    try:
        yield
    except ScenarioError:
        raise
    except (ValueError, NetemError) as error:
        raise place.error(str(error).rstrip(".")) from error
    except OSError as error:
        raise place.error(f"{error.filename} cannot be read: {error.strerror}") from error
