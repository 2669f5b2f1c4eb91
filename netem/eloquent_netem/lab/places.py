"""The networks of a comparison: from options, scenarios and recordings."""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from eloquent.errors import ConfigurationError
from eloquent_netem.errors import NetemError
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.sources import ConstantRate
from eloquent_netem.loss import GilbertElliott, PacketClockedLossWarning
from eloquent_netem.rate import MS_PER_S
from eloquent_netem.scenario import Scenario, load_scenario
from eloquent_netem.scenario_parts import (
    MAX_DELAY_MS,
    NO_LOSS,
    BurstLossSpec,
    DirectionSpec,
    DropTailSpec,
    FixedRateSpec,
    IndependentLossSpec,
    LossSpec,
    TraceRateSpec,
)
from eloquent_netem.scenario_schema import Place as FilePlace

DEFAULT_RTT_MS = 100.0
DEFAULT_LOSS = 0.05

RECORDING_RTT_MS = 50.0
RECORDING_QUEUE_PACKETS = 1000
"As in the scenario `lte-drive`: cellular queues are deep."
RECORDING_LENGTH_S = 100.0
"An answer begins anywhere within this, or within the recording if that is shorter."
NO_UPLINK_MBIT_S = 10.0
"The uplink's rate where only the downlink was recorded."

RECORDING_LOSS = 0.02
RECORDINGS = (
    "ATT-LTE-driving-2016",
    "Verizon-LTE-short",
    "TMobile-UMTS-driving",
    "nyc-taxi3",
    "nyc-timessquare-3204803",
)
"""Recordings in mahimahi's format, NAME.down and mostly NAME.up; nothing of them is shipped. Ours
are replayed with so much independent loss."""

MadeT = TypeVar("MadeT")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """What the command line says of the networks; None and empty: nothing."""

    scenarios: tuple[str, ...] = ()
    "Names of the library, or paths."
    down_trace: Path | None = None
    up_trace: Path | None = None
    loss: float | None = None
    "Mean share of packets lost each way."
    burst_ms: float | None = None
    rtt_ms: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no network is asked for."""
        return self == NetworkOptions()


def standard_places() -> list[tuple[Place, ConstantRate]]:
    """Return the comparison that runs where no network is asked for."""
    return [
        (synthetic(rtt_ms=100, loss=0.05), ConstantRate(30)),
        (synthetic(rtt_ms=100, loss=0.10), ConstantRate(30)),
        (synthetic(rtt_ms=100, loss=0.10, burst_ms=150), ConstantRate(30)),
        (synthetic(rtt_ms=300, loss=0.10), ConstantRate(50)),
    ]


def make_places(options: NetworkOptions) -> list[Place]:
    """Return the networks that the options ask for.

    Loss, bursts and round trip alone are a synthetic network; with scenarios or recordings they
    take the place of what these have, in both directions.

    Raises:
        ConfigurationError: an option is impossible, or a file cannot be used.
    """
    _check(options)
    if options.down_trace is not None:
        found = [_traced(options)]
    elif options.scenarios:
        found = [_changed(_load(name), options) for name in dict.fromkeys(options.scenarios)]
    else:
        rtt_ms = DEFAULT_RTT_MS if options.rtt_ms is None else options.rtt_ms
        loss = DEFAULT_LOSS if options.loss is None else options.loss
        found = [synthetic(rtt_ms=rtt_ms, loss=loss, burst_ms=options.burst_ms)]
    with warnings.catch_warnings():
        # `Scenario.warnings` has it in the user's words.
        warnings.simplefilter("ignore", PacketClockedLossWarning)
        for place in found:
            _blaming(place.scenario.links)  # A recording may be missing, or none.
    return found


def synthetic(*, rtt_ms: float, loss: float, burst_ms: float | None = None) -> Place:
    """Return a network with a round trip and a loss each way, and nothing else."""
    name = ", ".join((f"{rtt_ms:g} ms", _loss_words(loss, burst_ms)))
    path = DirectionSpec(delay_ms=rtt_ms / 2, loss=_loss(loss, burst_ms))
    scenario = Scenario(name=name, place=FilePlace(name), folder=Path(), up=path, down=path)
    return Place(name=name, scenario=scenario, begins_s=0.0)


def recorded(
    down: Path,
    up: Path | None = None,
    *,
    loss: float = 0.0,
    burst_ms: float | None = None,
    rtt_ms: float = RECORDING_RTT_MS,
) -> Place:
    """Return a recorded cellular link, in mahimahi's format, replayed behind a deep queue."""
    lost = _loss(loss, burst_ms)

    def direction(trace: Path | None) -> DirectionSpec:
        rate = FixedRateSpec(mbit_s=NO_UPLINK_MBIT_S)
        return DirectionSpec(
            delay_ms=rtt_ms / 2,
            loss=lost,
            rate=rate if trace is None else TraceRateSpec(file=str(trace.absolute())),
            queue=DropTailSpec(packets=RECORDING_QUEUE_PACKETS),
        )

    name = down.name.removesuffix(".down")
    if loss:
        name += f", {_loss_words(loss, burst_ms)}"
    if rtt_ms != RECORDING_RTT_MS:
        name += f", {rtt_ms:g} ms"
    scenario = Scenario(
        name=name,
        place=FilePlace(name),
        folder=Path(),
        length_s=RECORDING_LENGTH_S,
        up=direction(up),
        down=direction(down),
    )
    return Place(name=name, scenario=scenario)


def named_recording(folder: Path, name: str) -> Place:
    """Return one of `RECORDINGS`, or another that lies in a folder as they do."""
    up = folder / f"{name}.up"
    return recorded(folder / f"{name}.down", up if up.exists() else None, loss=RECORDING_LOSS)


def _traced(options: NetworkOptions) -> Place:
    assert options.down_trace is not None
    return recorded(
        options.down_trace,
        options.up_trace,
        loss=options.loss or 0.0,
        burst_ms=options.burst_ms,
        rtt_ms=RECORDING_RTT_MS if options.rtt_ms is None else options.rtt_ms,
    )


def _load(name: str) -> Place:
    scenario = _blaming(lambda: load_scenario(name))
    return Place(name=scenario.name, scenario=scenario)


def _changed(place: Place, options: NetworkOptions) -> Place:
    """Put the options' loss and round trip in the place of the scenario's."""
    scenario, words = place.scenario, [place.name]
    up, down = scenario.up, scenario.down
    if options.loss is not None:
        loss = _loss(options.loss, options.burst_ms)
        up, down = replace(up, loss=loss), replace(down, loss=loss)
        words.append(_loss_words(options.loss, options.burst_ms))
    if options.rtt_ms is not None:
        delay_ms = options.rtt_ms / 2
        up, down = replace(up, delay_ms=delay_ms), replace(down, delay_ms=delay_ms)
        words.append(f"{options.rtt_ms:g} ms")
    changed = replace(scenario, up=up, down=down)
    _blaming(lambda: changed.check(changed.place))
    return replace(place, name=", ".join(words), scenario=changed)


def _check(options: NetworkOptions) -> None:
    """Refuse impossible options before the work."""
    loss, burst_ms, rtt_ms = options.loss, options.burst_ms, options.rtt_ms
    if loss is not None and not 0 <= loss < 1:
        raise ConfigurationError(
            f"--loss is a probability, 0 to below 1, not {loss:g}: 5 % is 0.05."
        )
    if rtt_ms is not None and not 0 <= rtt_ms <= 2 * MAX_DELAY_MS:
        raise ConfigurationError(
            f"--rtt-ms is 0 to {2 * MAX_DELAY_MS} milliseconds, not {rtt_ms:g}."
        )
    if options.scenarios and (options.down_trace or options.up_trace):
        raise ConfigurationError(
            "--scenario and --down-trace are two networks: run them one after the other, or name "
            "the recording in the scenario's file (rate = { kind = "
            '"trace", ... }).'
        )
    if options.up_trace is not None and options.down_trace is None:
        raise ConfigurationError("--up-trace goes with --down-trace: tokens come down the link.")
    if burst_ms is None:
        return
    is_other = options.down_trace is not None or bool(options.scenarios)
    if is_other and not loss:
        raise ConfigurationError("--burst-ms says how long losses last: say how many with --loss.")
    share = DEFAULT_LOSS if loss is None else loss
    try:
        GilbertElliott(loss=share, burst_s=burst_ms / MS_PER_S, rng=random.Random(0))  # noqa: S311
    except ValueError as error:
        raise ConfigurationError(f"--loss {share:g} with --burst-ms {burst_ms:g}: {error}.") from (
            error
        )


def _loss(loss: float, burst_ms: float | None) -> LossSpec:
    if not loss:
        return NO_LOSS
    if burst_ms is None:
        return IndependentLossSpec(probability=loss)
    return BurstLossSpec(loss=loss, burst_ms=burst_ms)


def _loss_words(loss: float, burst_ms: float | None) -> str:
    bursts = "" if burst_ms is None or not loss else f" in bursts of {burst_ms:g} ms"
    return f"{100 * loss:g} % loss{bursts}"


def _blaming(make: Callable[[], MadeT]) -> MadeT:
    """Turn netem's errors into those that the command line shows."""
    try:
        return make()
    except NetemError as error:
        raise ConfigurationError(str(error)) from error
