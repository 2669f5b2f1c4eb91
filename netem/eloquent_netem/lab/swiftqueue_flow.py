"""Answers over a bottleneck with two queues: each packet, and what both queues did or would do.

Both real QUIC ends run in virtual time, with the scheme `eloquent` and Prague, over a scenario
whose downlink has a watched DualPI2 (`eloquent_netem.dualpi2_watch`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eloquent.quic.marking import Marking
from eloquent.swiftqueue.records import Flow, Queue
from eloquent_netem.dualpi2_watch import Passage, Watch
from eloquent_netem.lab.answer import START_S, AnswerRun, LabPath
from eloquent_netem.lab.shared import Alarms
from eloquent_netem.lab.shared import Flow as FlowActor
from eloquent_netem.lab.simulated import Loaded, load
from eloquent_netem.lab.sources import ConstantRate, Token
from eloquent_netem.lab.swiftqueue_recorder import LinkTap, Recorder, matched, record
from eloquent_netem.link import Link
from eloquent_netem.packet import SUBJECT
from eloquent_netem.rate import MS_PER_S
from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_build import build_link
from eloquent_netem.scenario_parts import CROSS, DOWN, UP
from eloquent_netem.sim import Actor, simulate

SCHEME = "eloquent"
TOKENS_PER_S = 50.0

WARM_UP_S = 5.0
"Cross traffic is there for so long before the answer."
SETTLE_S = 2.0
"After the answer's time the run goes on for so long: what is in flight comes or does not."
LATE_S = 60.0
"An answer that is so late is given up."

FIRST_OF_CROWD = 1000
"The second flow's number where there are many; cross traffic has those from 1 on."
STAGGER_S = 0.1
"The flows of a crowd begin so far apart."

L_KINDS = ("prague", "prague-web", "bursts")
"Cross traffic that goes into L."

BITS_PER_MBIT = 1e6

Plan = Sequence[Token]
"What an answer's tokens are, and when."


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRun:
    """What one answer's bundles met, in order of sending, and what it cost the others."""

    flow: Flow
    "The record; its delays are by the receiver's clock."
    left_by: NDArray[np.int8]
    "The queue that each packet left by: in a race not always the one it was marked for."
    is_copy: NDArray[np.bool_]
    arrived_s: NDArray[np.float64]
    "By the sender's clock; NaN: lost."
    is_dropped: NDArray[np.bool_]
    "Whether it was lost; in a race, where each waits in both queues, in one of them at least."
    generated_s: tuple[float, ...]
    rendered_s: tuple[float, ...]
    "Per token."
    base_delay_s: float
    wire_bytes: int
    wire_packets: int
    "Downlink, all headers."
    cross_mbit: Mapping[str, float]
    "Goodput of the downlink's cross traffic while the answer lasted, by kind and queue (`web C`)."

    @property
    def latency_s(self) -> NDArray[np.float64]:
        """How long each packet's bundle took; copies of one instant count once."""
        return latencies(self.flow.sent_s, self.arrived_s, self.is_copy, self.is_dropped)

    @property
    def latency_every_packet_s(self) -> NDArray[np.float64]:
        """The like with every packet counted by itself."""
        alone = np.zeros_like(self.is_copy)
        return latencies(self.flow.sent_s, self.arrived_s, alone, self.is_dropped)

    @property
    def c_share(self) -> float:
        """The share of packets, copies included, that went into C."""
        return float(np.mean(self.left_by == Queue.C))

    @property
    def reported_share(self) -> float:
        """The share of packets whose fate the sender learnt."""
        return float(np.mean(np.isfinite(self.flow.known_s)))


def latencies(
    sent_s: NDArray[np.float64],
    arrived_s: NDArray[np.float64],
    is_copy: NDArray[np.bool_],
    is_dropped: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return what each packet took, in seconds, of those whose end is known.

    A packet and the copies right behind it are one: the first to arrive (NaN: never) counts. Where
    one of them was dropped, the first later packet to arrive counts if it is sooner, since bundles
    carry all that is not acknowledged: a copy is never worse than none.
    """
    if not len(sent_s):
        return np.zeros(0)
    starts = np.flatnonzero(~is_copy)
    first_s = np.fmin.reduceat(arrived_s, starts)
    first_or_later_s = np.fmin.accumulate(first_s[::-1])[::-1]
    any_dropped = np.logical_or.reduceat(is_dropped, starts)
    took_s = np.where(any_dropped, first_or_later_s, first_s) - sent_s[starts]
    return took_s[~np.isnan(took_s)]


def raced(
    queue: NDArray[np.int8], is_lost: NDArray[np.bool_], passages: Sequence[Passage | None]
) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """Return by which queue packets left a race, and what was lost or dropped by one at least.

    `queue` is what they were marked for: that of those which left by none.
    """
    unknown = (math.nan, math.nan)
    waits = [unknown if one is None else one.wait_s for one in passages]
    wait_s = np.array(waits, np.float64).reshape(-1, 2)
    has_left = np.isfinite(wait_s)  # By one queue at most.
    left_by = np.where(has_left.any(axis=1), has_left[:, Queue.C], queue).astype(np.int8)
    return left_by, is_lost | np.isinf(wait_s).any(axis=1)


@dataclass(frozen=True, slots=True)
class _Subject:
    """One answer under way."""

    recorder: Recorder
    tap: LinkTap
    answer: AnswerRun

    def found(
        self,
        base_delay_s: float,
        passages: Mapping[int, Passage],
        cross_mbit: Mapping[str, float],
        *,
        is_race: bool = False,
    ) -> FlowRun:
        """Put together what was noted of the bundles."""
        answer = self.answer.answer()
        pairs = [
            (one, packet)
            for one, packet in matched(self.recorder.packets, self.tap.entered)
            if one.is_bundle
        ]
        noted, packets = [one for one, _ in pairs], [packet for _, packet in pairs]
        arrived_s = np.array([self.tap.arrived_s(packet) for packet in packets], np.float64)
        watched = [passages.get(id(packet)) for packet in packets]
        flow = record(self.recorder, noted, arrived_s, watched)
        left_by, is_dropped = flow.queue, np.isnan(arrived_s)
        if is_race:
            left_by, is_dropped = raced(flow.queue, is_dropped, watched)
        return FlowRun(
            flow=flow,
            left_by=left_by,
            is_copy=np.array([one.is_copy for one in noted], np.bool_),
            arrived_s=arrived_s,
            is_dropped=is_dropped,
            generated_s=tuple(answer.generated_s),
            rendered_s=tuple(answer.rendered_s),
            base_delay_s=base_delay_s,
            wire_bytes=answer.downlink_bytes,
            wire_packets=answer.downlink_packets,
            cross_mbit=cross_mbit,
        )


def run_flow(
    scenario: Scenario,
    marking: Marking,
    *,
    seed: int,
    tokens_per_s: float = TOKENS_PER_S,
    length_s: float | None = None,
    is_race: bool = False,
    offset_s: float = 0.0,
) -> FlowRun:
    """Send one answer, as long as the scenario or `length_s`, whose packets `marking` marks.

    In a race each packet waits in both queues and leaves by the first that does not drop it.
    `offset_s` is how much the receiver's clock is ahead.

    Raises:
        DeliveryError: the text did not arrive whole, in order and once.
        StuckError: it did not arrive in time.
        MatchError: the record cannot be trusted.
    """
    length_s = scenario.length_s if length_s is None else length_s
    passages: dict[int, Passage] = {}

    def report(passage: Passage) -> None:
        passages[id(passage.packet)] = passage

    origin_s = START_S - WARM_UP_S
    watch = Watch(report=report, is_race=is_race)
    links = (
        build_link(scenario, UP, seed, origin_s),
        build_link(scenario, DOWN, seed, origin_s, watch),
    )
    loaded = load(scenario, links, seed, origin_s)
    plan = _plan(tokens_per_s, length_s)
    subject = _subject(loaded, SUBJECT, loaded.up.port(SUBJECT), marking, plan)
    subject.recorder.offset_s = offset_s
    answer = subject.answer
    answer.pair.connect(START_S)
    cross_mbit = _simulate(scenario, loaded, [answer], (answer, *answer.pair.actors), length_s)
    return subject.found(_base_delay_s(scenario), passages, cross_mbit, is_race=is_race)


def run_crowd(
    scenario: Scenario,
    marking: Marking,
    *,
    flows: int,
    seed: int,
    tokens_per_s: float = TOKENS_PER_S,
    length_s: float | None = None,
) -> list[FlowRun]:
    """Send so many answers at once over one bottleneck, all by one endpoint; see `run_flow`.

    Each has an uplink of its own, without queue. The other queue's delays are not known.
    """
    length_s = scenario.length_s if length_s is None else length_s
    origin_s = START_S - WARM_UP_S
    loaded = load(scenario, scenario.links(seed, origin_s), seed, origin_s)
    plan = _plan(tokens_per_s, length_s)
    subjects, actors = [], []
    for index in range(flows):
        number = FIRST_OF_CROWD + index if index else SUBJECT
        up = Link(delay_s=scenario.up.delay_ms / MS_PER_S, seed=seed, name=f"up-{number}")
        subject = _subject(loaded, number, up, marking, plan)
        answer = subject.answer
        parts: tuple[Actor, ...] = (answer, *answer.pair.actors)
        begin_s = START_S + index * STAGGER_S
        actors.append(FlowActor(parts, subject.tap.port, begin_s, answer.pair.connect))
        subjects.append(subject)
    answers = [subject.answer for subject in subjects]
    cross_mbit = _simulate(scenario, loaded, answers, actors, length_s)
    return [subject.found(_base_delay_s(scenario), {}, cross_mbit) for subject in subjects]


def _subject(loaded: Loaded, number: int, up: Link, marking: Marking, plan: Plan) -> _Subject:
    tap = LinkTap(loaded.down.port(number), number)
    loaded.down.listen(tap.on_delivered)
    recorder = Recorder(marking)
    path = LabPath(up=up, down=tap.link, base_delay_s=0.0, passes_from=lambda now: now)
    return _Subject(recorder, tap, AnswerRun(path, SCHEME, plan, marking=recorder))


def _plan(tokens_per_s: float, length_s: float) -> Plan:
    return ConstantRate(tokens_per_s, round(length_s * tokens_per_s)).plan(0)


def _base_delay_s(scenario: Scenario) -> float:
    return scenario.down.delay_ms / MS_PER_S


def _simulate(
    scenario: Scenario,
    loaded: Loaded,
    answers: Sequence[AnswerRun],
    actors: Sequence[Actor],
    length_s: float,
) -> dict[str, float]:
    """Let everything run to the answers' end; return the goodput of cross traffic meanwhile."""
    end_s = START_S + length_s
    counts: list[list[int]] = []

    def count() -> None:
        counts.append([flow.delivered_bytes for flow in loaded.flows])

    alarms = Alarms([(START_S, count), (end_s, count), (end_s + SETTLE_S, lambda: None)])
    simulate(
        (*loaded.actors, alarms, *actors),
        until=lambda: alarms.next_time() is None and all(answer.is_done for answer in answers),
        start_s=START_S,
        limit_s=end_s + LATE_S,
    )
    mbit: dict[str, float] = {}
    for label, before, after in zip(_labels(scenario), *counts, strict=True):
        if label is not None:
            mbit[label] = mbit.get(label, 0.0) + 8 * (after - before) / length_s / BITS_PER_MBIT
    return mbit


def _labels(scenario: Scenario) -> list[str | None]:
    """Return kind and queue of each flow of cross traffic (`web C`); None: it is on the uplink."""
    kinds = {part: kind for kind, part in CROSS.items()}
    labels: list[str | None] = []
    for spec in scenario.cross:
        kind = kinds[type(spec)]
        label = f"{kind} {'L' if kind in L_KINDS else 'C'}"
        labels += [label if spec.direction == DOWN else None] * spec.count
    return labels
