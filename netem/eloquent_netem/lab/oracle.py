"""The oracle: what no sender can beat on a place, whatever it does."""

from collections.abc import Callable, Sequence

from eloquent_netem.jitter import JitterInOrder
from eloquent_netem.lab.rows import Bound, Place
from eloquent_netem.link import stage_rng
from eloquent_netem.loss import Outages
from eloquent_netem.rate import MS_PER_S, PausedRate
from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_build import build_loss, build_rate, outage_spans
from eloquent_netem.scenario_parts import DOWN, UP


def passes(scenario: Scenario, direction: str, seed: int) -> Callable[[float], float]:
    """Return what tells when, at a time of the scenario's clock or later, a packet gets through.

    That is when the loss lets one in and the rate takes one. Queues are empty, whoever else sends;
    independent loss bounds nothing (`Loss.passes_from`).
    """
    dropped, held = outage_spans(scenario, direction, seed)
    loss = Outages(dropped, build_loss(scenario.direction(direction), direction, seed))
    rate = PausedRate(build_rate(scenario, direction, seed), held)
    return lambda now: rate.ready_from(loss.passes_from(now))


def asked_s(place: Place, seed: int, begin_s: float) -> float:
    """Return when a request can be at the server, at best, on the scenario's clock.

    The reader begins to connect at `begin_s`: a handshake there and back, then the request.
    """
    now = begin_s
    for direction in (UP, DOWN, UP):
        delay_s = place.scenario.direction(direction).delay_ms / MS_PER_S
        now = passes(place.scenario, direction, seed)(now) + delay_s
    return now


def bound(place: Place, seed: int, generated_s: Sequence[float], origin_s: float) -> Bound:
    """Return the bound for tokens generated at these times, in order, in seconds.

    `origin_s` is when the scenario's clock was at 0 on the clock of these times. A packet's own
    time on the wire is not counted, nor jitter that is drawn for each packet.
    """
    down = place.scenario.down
    passes_from = passes(place.scenario, DOWN, seed)
    jitter = JitterInOrder(
        0.0 if down.reorder else down.jitter_ms / MS_PER_S, stage_rng(seed, DOWN, "jitter-in-order")
    )
    passes_s = [passes_from(time - origin_s) for time in generated_s]
    return Bound(
        passes_s=tuple(time + origin_s for time in passes_s),
        rendered_s=tuple(
            time + origin_s + place.base_delay_s + jitter.at(time) for time in passes_s
        ),
    )
