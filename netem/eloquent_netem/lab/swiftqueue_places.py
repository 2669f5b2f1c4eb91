"""The networks that SwiftQueue learns from, and those that it is judged on.

All have a DualPI2 bottleneck on the downlink and an uplink of 20 Mbit/s without it. A *family*
draws another network for each seed: round trip 20 to 100 ms, rate 4 to 50 Mbit/s, and the figures
of its cross traffic. Families are what is split: the predictor is trained on those of `TRAIN`,
watched on those of `VALIDATION`, and judged on those of `TEST`, which it has never seen, and on
recordings, which it has never seen either.

Policies are compared on `CONGESTED`, where there is something to win, and on `OTHERS`, where there
is not. Both lists are constants. They were fixed before anything was trained: on 2026-11-22, after
a thin flow that raced both queues (`eloquent_netem.dualpi2_watch`) was tried on them and nothing
else; the history of this file says when they last changed. Under Linux's scheduler the race's 99th
percentile of delay is at least 20 % below that of the L queue on each of `CONGESTED`. Under the
time-shifted one it is nowhere: there, what comes to L goes before what comes to C at the same time
and up to 50 ms before, so L is the faster queue but for what it drops.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.places import NetworkOptions, make_places
from eloquent_netem.lab.rows import Place
from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_parts import (
    DOWN,
    BurstsSpec,
    CellularRateSpec,
    CrossSpec,
    CubicSpec,
    DirectionSpec,
    DualPi2Spec,
    FixedRateSpec,
    PragueSpec,
    PragueWebSpec,
    RateSpec,
    SteppedRateSpec,
    TraceRateSpec,
    WebSpec,
)
from eloquent_netem.scenario_schema import Place as FilePlace

TRAIN, VALIDATION, TEST = "train", "validation", "test"

LENGTH_S = 60.0
STEPS_S = 90.0
"Rates change for so long, since a run begins with a warm-up and ends with what is late."

UP_MBIT_S = 20.0
RTT_MS = (20.0, 100.0)
RATE_MBIT_S = (4.0, 50.0)

RECORDING_RTT_MS = 50.0

WIFI_SHARES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9, 1.0)
"The rates of 802.11n's modulations (MCS 0 to 7), over the greatest."

Steps = tuple[tuple[float, float], ...]
"From when in seconds, and Mbit/s."


class Draw:
    """What a family draws a network from: each seed its own."""

    def __init__(self, family: str, seed: int) -> None:
        self._rng = random.Random(f"swiftqueue/{family}/{seed}")  # noqa: S311  (emulation)
        self.rtt_ms = self.between(*RTT_MS)
        self.mbit_s = self.between(*RATE_MBIT_S)

    def between(self, low: float, high: float) -> float:
        """Draw a value, evenly by its logarithm, with three digits or so."""
        return float(f"{exp(self._rng.uniform(log(low), log(high))):.3g}")

    def whole(self, low: int, high: int) -> int:
        """Draw a whole number, both ends included."""
        return self._rng.randint(low, high)

    def happens(self, probability: float) -> bool:
        """Draw whether something happens."""
        return self._rng.random() < probability


def down_of(rate: RateSpec, rtt_ms: float, scheduler: str = "wrr") -> DirectionSpec:
    """Return a downlink with DualPI2."""
    return DirectionSpec(delay_ms=rtt_ms / 2, rate=rate, queue=DualPi2Spec(scheduler=scheduler))


def place_of(
    name: str, rate: RateSpec | float, rtt_ms: float, *cross: CrossSpec, up: RateSpec | None = None
) -> Place:
    """Return a network; a rate that is a number is fixed, in Mbit/s."""
    if isinstance(rate, float | int):
        rate = FixedRateSpec(mbit_s=rate)
    up_rate = FixedRateSpec(mbit_s=UP_MBIT_S) if up is None else up
    scenario = Scenario(
        name=name,
        place=FilePlace(name),
        folder=Path(),
        length_s=LENGTH_S,
        up=DirectionSpec(delay_ms=rtt_ms / 2, rate=up_rate),
        down=down_of(rate, rtt_ms),
        cross=cross,
    )
    return Place(name=name, scenario=scenario)


def prague(count: int = 1) -> PragueSpec:
    """Return bulk flows in L."""
    return PragueSpec(direction=DOWN, count=count)


def prague_web(count: int, every_s: float | None = None) -> PragueWebSpec:
    """Return transfers in L, one after another in each of so many flows."""
    return PragueWebSpec(direction=DOWN, count=count, every_s=every_s)


def cubic(count: int = 1) -> CubicSpec:
    """Return bulk flows in C."""
    return CubicSpec(direction=DOWN, count=count)


def web(count: int) -> WebSpec:
    """Return transfers in C, one after another in each of so many flows."""
    return WebSpec(direction=DOWN, count=count)


def bursts(mbit_s: float, burst_ms: float, pause_ms: float) -> BurstsSpec:
    """Return bursts into L that heed nothing."""
    return BurstsSpec(direction=DOWN, mbit_s=mbit_s, burst_ms=burst_ms, pause_ms=pause_ms)


def drawn_bursts(draw: Draw) -> BurstsSpec:
    """Draw bursts that the link cannot carry."""
    mbit_s = round(draw.mbit_s * draw.between(1.2, 4), 2)
    return bursts(mbit_s, draw.between(50, 300), draw.between(500, 3000))


def drawn_drops(draw: Draw) -> SteppedRateSpec:
    """Draw when the rate falls to 10 to 50 % of itself for 0.2 to 3 s."""
    return SteppedRateSpec(steps=tuple(_drops(draw)))


def _drops(draw: Draw) -> Iterator[tuple[float, float]]:
    now_s = 0.0
    while now_s < STEPS_S:
        yield round(now_s, 3), draw.mbit_s
        now_s += draw.between(1.5, 8)
        yield round(now_s, 3), round(draw.mbit_s * draw.between(0.1, 0.5), 3)
        now_s += draw.between(0.2, 3)


def drawn_wifi(draw: Draw) -> SteppedRateSpec:
    """Draw a rate that goes up and down among Wi-Fi's modulations every 20 to 200 ms."""
    return SteppedRateSpec(steps=tuple(_wifi(draw)))


def _wifi(draw: Draw) -> Iterator[tuple[float, float]]:
    now_s, at = 0.0, draw.whole(0, len(WIFI_SHARES) - 1)
    while now_s < STEPS_S:
        yield round(now_s, 4), round(draw.mbit_s * WIFI_SHARES[at], 3)
        now_s += draw.between(0.02, 0.2)
        at = min(max(at + draw.whole(-2, 2), 0), len(WIFI_SHARES) - 1)


def _several(draw: Draw) -> int:
    """Draw how many flows of short transfers come; alone, each takes 1 Mbit/s or less."""
    return min(max(round(draw.mbit_s * draw.between(0.4, 1.4)), 3), 20)


def _bursts(draw: Draw, name: str) -> Place:
    return place_of(name, draw.mbit_s, draw.rtt_ms, drawn_bursts(draw))


def _prague_drops(draw: Draw, name: str) -> Place:
    return place_of(name, drawn_drops(draw), draw.rtt_ms, prague(draw.whole(1, 4)))


def _prague_web(draw: Draw, name: str) -> Place:
    return place_of(name, draw.mbit_s, draw.rtt_ms, prague_web(_several(draw)))


def _cubic(draw: Draw, name: str) -> Place:
    return place_of(name, draw.mbit_s, draw.rtt_ms, cubic(draw.whole(1, 3)))


def _cubic_bursts(draw: Draw, name: str) -> Place:
    flows = cubic(draw.whole(1, 3))
    return place_of(name, draw.mbit_s, draw.rtt_ms, flows, drawn_bursts(draw))


def _web(draw: Draw, name: str) -> Place:
    return place_of(name, draw.mbit_s, draw.rtt_ms, web(_several(draw)))


def _cellular(draw: Draw, name: str) -> Place:
    rate = CellularRateSpec(
        mean_mbit_s=draw.mbit_s,
        stall_share=draw.between(0.005, 0.05),
        stall_ms=draw.between(100, 500),
    )
    flows: list[CrossSpec] = [
        prague(draw.whole(1, 2)) if draw.happens(0.5) else prague_web(_several(draw))
    ]
    if draw.happens(0.4):
        flows.append(web(draw.whole(1, 3)))
    return place_of(name, rate, draw.rtt_ms, *flows)


def _idle(draw: Draw, name: str) -> Place:
    flows = [web(1)] if draw.happens(0.5) else []
    return place_of(name, draw.mbit_s, draw.rtt_ms, *flows)


def _mixed(draw: Draw, name: str) -> Place:
    flows = prague(draw.whole(1, 2)), cubic(draw.whole(1, 2)), web(draw.whole(1, 4))
    return place_of(name, draw.mbit_s, draw.rtt_ms, *flows)


def _bursts_web(draw: Draw, name: str) -> Place:
    flows = web(_several(draw))
    return place_of(name, draw.mbit_s, draw.rtt_ms, flows, drawn_bursts(draw))


def _bursts_prague(draw: Draw, name: str) -> Place:
    flows = prague(draw.whole(1, 2))
    return place_of(name, draw.mbit_s, draw.rtt_ms, flows, drawn_bursts(draw))


def _wifi_place(draw: Draw, name: str) -> Place:
    flows = prague_web(_several(draw)), web(draw.whole(1, 2))
    return place_of(name, drawn_wifi(draw), draw.rtt_ms, *flows)


def _flash(draw: Draw, name: str) -> Place:
    flows = prague_web(draw.whole(6, 18), every_s=draw.between(1.5, 5))
    return place_of(name, draw.mbit_s, draw.rtt_ms, flows)


@dataclass(frozen=True, slots=True)
class Family:
    """Networks of one kind."""

    name: str
    split: str
    "What it is for: `TRAIN`, `VALIDATION` or `TEST`."
    make: Callable[[Draw, str], Place]
    "Draws one, which gets the name."


FAMILIES = {
    family.name: family
    for family in (
        Family("bursts", TRAIN, _bursts),
        Family("prague-drops", TRAIN, _prague_drops),
        Family("prague-web", TRAIN, _prague_web),
        Family("cubic", TRAIN, _cubic),
        Family("cubic-bursts", TRAIN, _cubic_bursts),
        Family("web", TRAIN, _web),
        Family("cellular", TRAIN, _cellular),
        Family("idle", TRAIN, _idle),
        Family("mixed", VALIDATION, _mixed),
        Family("bursts-web", VALIDATION, _bursts_web),
        Family("bursts-prague", TEST, _bursts_prague),
        Family("wifi", TEST, _wifi_place),
        Family("flash", TEST, _flash),
    )
}


BESIDE: dict[str, tuple[CrossSpec, ...]] = {
    "web": (prague_web(3), web(2)),
    "bulk": (prague_web(3), web(2), prague()),
    "bursts": (bursts(20, 200, 1000),),
}
"What shares a recorded link."


def family_place(family: str, seed: int) -> Place:
    """Return a family's network of a seed, named `FAMILY-SEED`.

    Raises:
        KeyError: there is no such family.
    """
    place = FAMILIES[family].make(Draw(family, seed), f"{family}-{seed}")
    return replace(place, scenario=replace(place.scenario, seed=seed))


def traced_place(down: Path, up: Path | None = None, beside: str = "web") -> Place:
    """Return a recorded link, in mahimahi's format, with DualPI2 and cross traffic of `BESIDE`.

    Nothing is ever trained on it.
    """
    return place_of(
        f"{down.name.removesuffix('.down')}, {beside}",
        TraceRateSpec(file=str(down.absolute())),
        RECORDING_RTT_MS,
        *BESIDE[beside],
        up=None if up is None else TraceRateSpec(file=str(up.absolute())),
    )


def recorded_place(folder: Path, name: str, beside: str = "web") -> Place:
    """Return the recording of a name, NAME.down and perhaps NAME.up in a folder."""
    up = folder / f"{name}.up"
    return traced_place(folder / f"{name}.down", up if up.exists() else None, beside)


def _repeated(cycle: Sequence[tuple[float, float]]) -> SteppedRateSpec:
    """Return a rate of steps (how long in seconds, Mbit/s), again and again."""
    steps: list[tuple[float, float]] = []
    now_s, index = 0.0, 0
    while now_s < STEPS_S:
        lasts_s, mbit_s = cycle[index % len(cycle)]
        steps.append((round(now_s, 4), mbit_s))
        now_s += lasts_s
        index += 1
    return SteppedRateSpec(steps=tuple(steps))


DROPS = ((3.1, 30.0), (0.8, 5.0), (2.2, 30.0), (0.4, 3.0), (4.3, 30.0), (1.6, 9.0))
WIFI = (
    (0.11, 26.0), (0.06, 15.6), (0.04, 7.8), (0.15, 2.6), (0.09, 7.8), (0.03, 15.6),
    (0.18, 20.8), (0.12, 23.4), (0.05, 10.4), (0.14, 5.2), (0.07, 2.6), (0.19, 5.2),
    (0.10, 10.4), (0.16, 20.8), (0.08, 26.0), (0.17, 23.4), (0.13, 15.6),
)  # fmt: skip
"A cycle of 1.87 s: how long, and Mbit/s."

CONGESTED: tuple[Place, ...] = (
    place_of("C1 bursts, 20 Mbit/s", 20, 40, bursts(45, 150, 1000)),
    place_of("C2 bursts, 6 Mbit/s", 6, 60, bursts(12, 200, 1500)),
    place_of("C3 rate drops, 2 Prague", _repeated(DROPS), 50, prague(2)),
    place_of("C4 bursts, 1 Prague", 20, 30, prague(), bursts(30, 120, 1500)),
    place_of("C5 flash", 20, 60, prague_web(16, every_s=2)),
    place_of("C6 Wi-Fi", _repeated(WIFI), 40, prague_web(4), web(1)),
    place_of("C7 Prague web", 10, 20, prague_web(16)),
)
"Where the classic queue is at times the faster one; see `congested_places`."

CONGESTED_RECORDINGS = (("nyc-taxi3", "bursts"),)
OTHER_RECORDINGS = (("ATT-LTE-driving-2016", "web"), ("nyc-timessquare-3204803", "bulk"))
"""The names of recordings, and their cross traffic. Both queues wait while a link stalls, so those
whose stalls make the long delays, which is most, are among the others."""

OTHERS: tuple[Place, ...] = (
    place_of("O1 CUBIC", 20, 40, cubic()),
    place_of("O2 web", 20, 40, web(6)),
    place_of("O3 Prague, CUBIC, web", 20, 40, prague(), cubic(), web(2)),
    place_of("O4 idle", 20, 40),
    place_of("O5 1 Prague", 20, 40, prague()),
    place_of("O6 3 CUBIC, 5 Mbit/s", 5, 40, cubic(3)),
)
"Where there is nothing to win, and something to lose."

CROWDED = place_of("many flows", 20, 40, bursts(45, 150, 1000), prague(), cubic(), web(2))
"Where many flows of ours choose queues at once, beside others in both."


def congested_places(recordings: Path | None) -> tuple[Place, ...]:
    """Return `CONGESTED`, and its recordings if there is a folder that has them."""
    return CONGESTED + _recorded(recordings, CONGESTED_RECORDINGS)


def other_places(recordings: Path | None) -> tuple[Place, ...]:
    """Return `OTHERS`, and its recordings if there is a folder that has them."""
    return OTHERS + _recorded(recordings, OTHER_RECORDINGS)


def _recorded(folder: Path | None, names: Sequence[tuple[str, str]]) -> tuple[Place, ...]:
    return () if folder is None else tuple(recorded_place(folder, *one) for one in names)


def named_place(name: str) -> Place:
    """Return one of the lists by its name or its first word, or `FAMILY-SEED`, or a scenario.

    Raises:
        ConfigurationError: there is no such network, or its file is wrong.
    """
    for place in (*CONGESTED, *OTHERS, CROWDED):
        if name in (place.name, place.name.split()[0]):
            return place
    family, _, seed = name.rpartition("-")
    if family in FAMILIES and seed.isdecimal():
        return family_place(family, int(seed))
    try:
        return make_places(NetworkOptions(scenarios=(name,)))[0]
    except ConfigurationError as error:
        ours = ", ".join(place.name.split()[0] for place in (*CONGESTED, *OTHERS))
        raise ConfigurationError(
            f"{error} Here there are {ours}, and FAMILY-SEED of {', '.join(FAMILIES)} too."
        ) from error
