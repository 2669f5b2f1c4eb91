"""The parts of a scenario file: loss, outages, rate, queue, and the flows of cross traffic.

These dataclasses are the file's format (docs/netem.md): a field made by `key` is a key of the file.
Each says in words what it does: `words`.
"""

from dataclasses import dataclass, field

from eloquent_netem.scenario_schema import (
    ListOf,
    OneOf,
    Place,
    choice,
    key,
    number,
    spans,
    steps,
    text,
    truth,
    whole,
)

MAX_DELAY_MS = 60_000
MAX_LENGTH_S = 86_400
MIN_RATE_MBIT_S = 0.001
MAX_RATE_MBIT_S = 100_000
MAX_PACKETS = 10_000_000
DEFAULT_LIMIT_PACKETS = 1000
"The transmit queue of a Linux interface (txqueuelen), and the limit of its pfifo and CoDel."

SLOT_MS = 1.0
"Burst loss is decided in slots of time of this length."

UP, DOWN, BOTH = "up", "down", "both"

a_rate = number(least=MIN_RATE_MBIT_S, most=MAX_RATE_MBIT_S)
a_limit = whole(least=1, most=MAX_PACKETS)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoLossSpec:
    """Nothing is lost."""

    def words(self) -> str:
        """Say what it does."""
        return "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndependentLossSpec:
    """Each packet is lost with the same probability, whatever happened to others."""

    probability: float = field(metadata=key(number(least=0, below=1)))

    def words(self) -> str:
        """Say what it does."""
        return f"{self.probability:.3g} of all packets, each for itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstLossSpec:
    """Gilbert-Elliott, clocked in slots of 1 ms: what is sent in a burst is lost."""

    loss: float = field(metadata=key(number(least=0, below=1)))
    "The share of time, and so of evenly sent packets, that bursts take."
    burst_ms: float = field(metadata=key(number(least=SLOT_MS, most=MAX_DELAY_MS)))
    "The mean length of a burst."

    def words(self) -> str:
        """Say what it does."""
        return f"{self.loss:.3g} of the time, in bursts of {self.burst_ms:g} ms in the mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class PacketBurstLossSpec:
    """Gilbert-Elliott, stepping once a packet: unfair to a sender that slows down."""

    loss: float = field(metadata=key(number(least=0, below=1)))
    burst_packets: float = field(metadata=key(number(least=1, most=MAX_PACKETS)))
    "The mean length of a burst, in packets."

    def words(self) -> str:
        """Say what it does."""
        return (
            f"{self.loss:.3g} of all packets, in bursts of {self.burst_packets:g} packets in the "
            "mean (clocked by packets: not for comparing protocols)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DropListSpec:
    """The packets with the given indices are lost; the first is 0."""

    indices: tuple[int, ...] = field(metadata=key(ListOf(whole(least=0))))

    def words(self) -> str:
        """Say what it does."""
        return f"the packets {', '.join(map(str, self.indices)) or '(none)'}, counted from 0"


LOSSES: dict[str, type] = {
    "none": NoLossSpec,
    "independent": IndependentLossSpec,
    "bursts": BurstLossSpec,
    "packet-bursts": PacketBurstLossSpec,
    "drop-list": DropListSpec,
}
NO_LOSS = NoLossSpec()
LossSpec = NoLossSpec | IndependentLossSpec | BurstLossSpec | PacketBurstLossSpec | DropListSpec

EFFECTS = {"drop": "what is sent is lost", "hold": "what is sent waits"}
an_effect = choice(*EFFECTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpansSpec:
    """Outages at given times."""

    spans_s: tuple[tuple[float, float], ...] = field(metadata=key(spans))
    effect: str = field(metadata=key(an_effect))
    "drop: what is sent is lost; hold: it waits in the queue, and then goes on."

    def words(self) -> str:
        """Say what it does."""
        spans_s = ", ".join(f"{start:g} to {stop:g} s" for start, stop in self.spans_s)
        return f"{spans_s}: {EFFECTS[self.effect]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoversSpec:
    """Outages at random times, such as a moving phone has them."""

    every_s: float = field(metadata=key(number(least=0.1, most=MAX_LENGTH_S)))
    "The mean time from the start of one to the start of the next."
    lasting_ms: float = field(metadata=key(number(least=SLOT_MS, most=MAX_DELAY_MS)))
    effect: str = field(metadata=key(an_effect))

    def check(self, place: Place) -> None:
        """Refuse what no link can do."""
        if self.lasting_ms >= self.every_s * 1000:
            raise place.at("lasting_ms").error(
                f"must be below every_s ({self.every_s * 1000:g} ms), not {self.lasting_ms:g}"
            )

    def words(self) -> str:
        """Say what it does."""
        what = EFFECTS[self.effect]
        return f"every {self.every_s:g} s in the mean for {self.lasting_ms:g} ms: {what}"


OUTAGES: dict[str, type] = {"spans": SpansSpec, "handovers": HandoversSpec}
OutageSpec = SpansSpec | HandoversSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlimitedRateSpec:
    """Takes no time."""

    def words(self) -> str:
        """Say what it does."""
        return "unlimited"


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedRateSpec:
    """A constant rate."""

    mbit_s: float = field(metadata=key(a_rate))

    def words(self) -> str:
        """Say what it does."""
        return f"{self.mbit_s:g} Mbit/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class SteppedRateSpec:
    """A rate that changes at given times."""

    steps: tuple[tuple[float, float], ...] = field(metadata=key(steps(a_rate)))
    "From when on in seconds, the first 0, and Mbit/s."

    def words(self) -> str:
        """Say what it does."""
        rates = [rate for _, rate in self.steps]
        return f"{len(rates)} steps between {min(rates):g} and {max(rates):g} Mbit/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRateSpec:
    """A recording in the mahimahi format; it starts over at its end."""

    file: str = field(metadata=key(text))
    "Relative to the scenario file."

    def words(self) -> str:
        """Say what it does."""
        return f"the recording {self.file}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellularRateSpec:
    """A synthetic cellular link: its rate wanders and at times it stalls, differently by seed."""

    mean_mbit_s: float = field(metadata=key(number(least=MIN_RATE_MBIT_S, most=200)))
    "Over the whole of it, stalls included."
    stall_share: float = field(default=0.03, metadata=key(number(least=0, most=0.5)))
    "The part of the time that stalls take."
    stall_ms: float = field(default=400.0, metadata=key(number(least=50, most=MAX_DELAY_MS)))
    "The mean length of a stall."

    def words(self) -> str:
        """Say what it does."""
        return (
            f"synthetic cellular, {self.mean_mbit_s:g} Mbit/s in the mean, stalled "
            f"{self.stall_share:.3g} of the time for {self.stall_ms:g} ms in the mean"
        )


RATES: dict[str, type] = {
    "unlimited": UnlimitedRateSpec,
    "fixed": FixedRateSpec,
    "steps": SteppedRateSpec,
    "trace": TraceRateSpec,
    "cellular": CellularRateSpec,
}
UNLIMITED = UnlimitedRateSpec()
RateSpec = UnlimitedRateSpec | FixedRateSpec | SteppedRateSpec | TraceRateSpec | CellularRateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DropTailSpec:
    """First in, first out; what finds it full is dropped."""

    packets: int | None = field(default=None, metadata=key(a_limit))
    bytes: int | None = field(default=None, metadata=key(whole(least=1500)))

    def check(self, place: Place) -> None:
        """Refuse a queue without end: it would hide every loss behind delay."""
        if self.packets is None and self.bytes is None:
            raise place.error("must have a limit; give packets or bytes")

    def words(self) -> str:
        """Say what it does."""
        limits = [f"{self.packets} packets"] if self.packets is not None else []
        limits += [f"{self.bytes} bytes"] if self.bytes is not None else []
        return f"drop-tail, at most {' and '.join(limits)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoDelSpec:
    """CoDel (RFC 8289): drops, or marks, what keeps a standing queue."""

    target_ms: float = field(default=5.0, metadata=key(number(above=0, most=MAX_DELAY_MS)))
    interval_ms: float = field(default=100.0, metadata=key(number(above=0, most=MAX_DELAY_MS)))
    ecn: bool = field(default=False, metadata=key(truth))
    "Whether packets that can be marked are marked instead of dropped."
    packets: int = field(default=DEFAULT_LIMIT_PACKETS, metadata=key(a_limit))

    def words(self) -> str:
        """Say what it does."""
        ecn = "marks" if self.ecn else "drops"
        return (
            f"CoDel, {ecn} above {self.target_ms:g} ms for {self.interval_ms:g} ms, "
            f"at most {self.packets} packets"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DualPi2Spec:
    """DualPI2 (RFC 9332): a low-latency queue for ECT(1) beside a classic one."""

    scheduler: str = field(default="wrr", metadata=key(choice("wrr", "time-shifted")))
    packets: int = field(default=10_000, metadata=key(a_limit))

    def words(self) -> str:
        """Say what it does."""
        return f"DualPI2 with the {self.scheduler} scheduler, at most {self.packets} packets"


QUEUES: dict[str, type] = {"drop-tail": DropTailSpec, "codel": CoDelSpec, "dualpi2": DualPi2Spec}
QueueSpec = DropTailSpec | CoDelSpec | DualPi2Spec

DEFAULT_QUEUE = DropTailSpec(packets=DEFAULT_LIMIT_PACKETS)


a_loss, a_rate_spec, a_queue = OneOf(LOSSES), OneOf(RATES), OneOf(QUEUES)
outage_list = ListOf(OneOf(OUTAGES))


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionSpec:
    """One direction of the path."""

    delay_ms: float = field(default=0.0, metadata=key(number(least=0, most=MAX_DELAY_MS)))
    jitter_ms: float = field(default=0.0, metadata=key(number(least=0, most=MAX_DELAY_MS)))
    "A further delay, uniform from 0 to this: a function of time, so that packets keep their order."
    reorder: bool = field(default=False, metadata=key(truth))
    "Whether jitter is drawn for each packet instead, so that packets may overtake each other."
    duplicate: float = field(default=0.0, metadata=key(number(least=0, most=1)))
    "The probability that a packet arrives twice."
    loss: LossSpec = field(default=NO_LOSS, metadata=key(a_loss))
    outages: tuple[OutageSpec, ...] = field(default=(), metadata=key(outage_list))
    rate: RateSpec = field(default=UNLIMITED, metadata=key(a_rate_spec))
    queue: QueueSpec = field(default=DEFAULT_QUEUE, metadata=key(a_queue))

    def words(self) -> list[str]:
        """Say what it does, in some lines."""
        order = "packets may overtake" if self.reorder else "in order"
        jitter = f", and 0 to {self.jitter_ms:g} ms of jitter, {order}" if self.jitter_ms else ""
        copies = [f"{self.duplicate:.3g} of all packets arrive twice"] if self.duplicate else []
        return [
            f"delay {self.delay_ms:g} ms{jitter}",
            f"loss: {self.loss.words()}",
            *(f"outage: {outage.words()}" for outage in self.outages),
            f"rate: {self.rate.words()}",
            f"queue: {self.queue.words()}",
            *copies,
        ]


PLAIN = DirectionSpec()

a_direction = choice(UP, DOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSpec:
    """What every kind of cross traffic has."""

    direction: str = field(metadata=key(a_direction))
    rtt_ms: float | None = field(default=None, metadata=key(number(above=0, most=MAX_DELAY_MS)))
    "The flow's round-trip time without queues; the two delays of the path unless given."
    start_s: float = field(default=0.0, metadata=key(number(least=0, most=MAX_LENGTH_S)))
    "When it begins."
    count: int = field(default=1, metadata=key(whole(least=1, most=100)))
    "How many of them there are."

    def words(self, rtt_ms: float) -> str:
        """Say what it does; `rtt_ms` is its round-trip time without queues."""
        return f"{self._begin()}, round trip {rtt_ms:g} ms without queues"

    def _begin(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{times}{kind_of(self)} {self.direction} from {self.start_s:g} s on"


@dataclass(frozen=True, slots=True, kw_only=True)
class PragueSpec(FlowSpec):
    """A bulk transfer under a scalable congestion control, in ECT(1) packets (RFC 9331)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CubicSpec(FlowSpec):
    """A bulk transfer under CUBIC (RFC 9438)."""

    ecn: bool = field(default=False, metadata=key(truth))
    "Whether it sends ECT(0) and takes marks for losses (RFC 3168)."

    def words(self, rtt_ms: float) -> str:
        """See `FlowSpec.words`."""
        return f"{FlowSpec.words(self, rtt_ms)}{', ECN' if self.ecn else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstsSpec(FlowSpec):
    """ECT(1) packets that heed no mark and no loss, in bursts."""

    mbit_s: float = field(metadata=key(a_rate))
    "Within a burst."
    burst_ms: float = field(default=100.0, metadata=key(number(least=1, most=MAX_DELAY_MS)))
    "The mean length of a burst."
    pause_ms: float = field(default=1000.0, metadata=key(number(least=1, most=MAX_DELAY_MS)))
    "The mean length of the pause between two."

    def words(self, rtt_ms: float) -> str:
        """See `FlowSpec.words`; it waits for no round trip."""
        return (
            f"{self._begin()}, {self.mbit_s:g} Mbit/s for {self.burst_ms:g} ms, then "
            f"{self.pause_ms:g} ms of pause, both in the mean"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSpec(FlowSpec):
    """Transfers of a random size with pauses of a random length, under CUBIC."""

    every_s: float | None = field(default=None, metadata=key(number(least=0.1, most=MAX_LENGTH_S)))
    "Instead of pauses: transfers begin at multiples of this, those of all such flows together."

    def words(self, rtt_ms: float) -> str:
        """See `FlowSpec.words`."""
        times = "" if self.every_s is None else f", at multiples of {self.every_s:g} s"
        return f"{FlowSpec.words(self, rtt_ms)}{times}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PragueWebSpec(WebSpec):
    """Such transfers under a scalable congestion control, in ECT(1) packets."""


CROSS: dict[str, type] = {
    "prague": PragueSpec,
    "cubic": CubicSpec,
    "bursts": BurstsSpec,
    "web": WebSpec,
    "prague-web": PragueWebSpec,
}
CrossSpec = PragueSpec | CubicSpec | BurstsSpec | WebSpec | PragueWebSpec


def kind_of(part: object) -> str:
    """Return the `kind` under which a part stands in a file."""
    for kinds in (LOSSES, OUTAGES, RATES, QUEUES, CROSS):
        for kind, form in kinds.items():
            if type(part) is form:
                return kind
    raise ValueError(f"{part!r} is no part of a scenario file")
