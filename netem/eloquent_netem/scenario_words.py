"""What a scenario does, in words and figures."""

from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_parts import (
    BurstLossSpec,
    BurstsSpec,
    CellularRateSpec,
    CoDelSpec,
    CrossSpec,
    CubicSpec,
    DirectionSpec,
    DropListSpec,
    DropTailSpec,
    FixedRateSpec,
    IndependentLossSpec,
    LossSpec,
    OutageSpec,
    PacketBurstLossSpec,
    QueueSpec,
    RateSpec,
    SpansSpec,
    TraceRateSpec,
    kind_of,
)

HEADINGS = {"up": "up (client to server)", "down": "down (server to client)"}


def describe(scenario: Scenario) -> str:
    """Return a few lines on the path, each direction, and the cross traffic."""
    rtt_ms = scenario.up.delay_ms + scenario.down.delay_ms
    lines = [f"{scenario.name}: {scenario.description}" if scenario.description else scenario.name]
    lines += [
        f"  {scenario.length_s:g} s, round trip {rtt_ms:g} ms without queues and jitter, "
        f"seed {scenario.seed} unless given"
    ]
    lines += [f"  both ways: {_outage(outage)}" for outage in scenario.outages]
    for name, heading in HEADINGS.items():
        lines.append(f"  {heading}")
        lines += [f"    {line}" for line in _direction(scenario.direction(name))]
    lines += [f"  cross traffic: {_cross(flow, scenario.rtt_ms(flow))}" for flow in scenario.cross]
    return "\n".join(lines)


def _direction(spec: DirectionSpec) -> list[str]:
    lines = [f"delay {spec.delay_ms:g} ms{_jitter(spec)}", f"loss: {_loss(spec.loss)}"]
    lines += [f"outage: {_outage(outage)}" for outage in spec.outages]
    lines.append(f"rate: {_rate(spec.rate)}")
    lines.append(f"queue: {_queue(spec.queue)}")
    if spec.duplicate:
        lines.append(f"{spec.duplicate:.3g} of all packets arrive twice")
    return lines


def _jitter(spec: DirectionSpec) -> str:
    if not spec.jitter_ms:
        return ""
    order = "packets may overtake" if spec.reorder else "in order"
    return f", and 0 to {spec.jitter_ms:g} ms of jitter, {order}"


def _loss(loss: LossSpec) -> str:
    if isinstance(loss, IndependentLossSpec):
        return f"{loss.probability:.3g} of all packets, each for itself"
    if isinstance(loss, BurstLossSpec):
        return f"{loss.loss:.3g} of the time, in bursts of {loss.burst_ms:g} ms in the mean"
    if isinstance(loss, PacketBurstLossSpec):
        return (
            f"{loss.loss:.3g} of all packets, in bursts of {loss.burst_packets:g} packets in the "
            "mean (clocked by packets: not for comparing protocols)"
        )
    if isinstance(loss, DropListSpec):
        return f"the packets {', '.join(map(str, loss.indices)) or '(none)'}, counted from 0"
    return "none"


def _outage(outage: OutageSpec) -> str:
    what = "what is sent is lost" if outage.effect == "drop" else "what is sent waits"
    if isinstance(outage, SpansSpec):
        spans = ", ".join(f"{start:g} to {stop:g} s" for start, stop in outage.spans_s)
        return f"{spans}: {what}"
    return f"every {outage.every_s:g} s in the mean for {outage.lasting_ms:g} ms: {what}"


def _rate(rate: RateSpec) -> str:
    if isinstance(rate, FixedRateSpec):
        return f"{rate.mbit_s:g} Mbit/s"
    if isinstance(rate, TraceRateSpec):
        return f"the recording {rate.file}"
    if isinstance(rate, CellularRateSpec):
        return (
            f"synthetic cellular, {rate.mean_mbit_s:g} Mbit/s in the mean, stalled "
            f"{rate.stall_share:.3g} of the time for {rate.stall_ms:g} ms in the mean"
        )
    return "unlimited"


def _queue(queue: QueueSpec) -> str:
    if isinstance(queue, DropTailSpec):
        limits = [f"{queue.packets} packets"] if queue.packets is not None else []
        limits += [f"{queue.bytes} bytes"] if queue.bytes is not None else []
        return f"drop-tail, at most {' and '.join(limits)}"
    if isinstance(queue, CoDelSpec):
        ecn = "marks" if queue.ecn else "drops"
        return (
            f"CoDel, {ecn} above {queue.target_ms:g} ms for {queue.interval_ms:g} ms, "
            f"at most {queue.packets} packets"
        )
    return f"DualPI2 with the {queue.scheduler} scheduler, at most {queue.packets} packets"


def _cross(flow: CrossSpec, rtt_ms: float) -> str:
    times = f"{flow.count} x " if flow.count > 1 else ""
    text = f"{times}{kind_of(flow)} {flow.direction} from {flow.start_s:g} s on"
    if isinstance(flow, BurstsSpec):
        return (
            f"{text}, {flow.mbit_s:g} Mbit/s for {flow.burst_ms:g} ms, then {flow.pause_ms:g} ms "
            "of pause, both in the mean"
        )
    ecn = ", ECN" if isinstance(flow, CubicSpec) and flow.ecn else ""
    return f"{text}, round trip {rtt_ms:g} ms without queues{ecn}"
