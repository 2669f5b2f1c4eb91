"""SwiftQueue's policy on a path in virtual time, with forecasts and feedback from a script."""

import heapq
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import MarkingPolicy, SentPacket
from eloquent.swiftqueue.forecaster import Forecast
from eloquent.swiftqueue.policy import State, SwiftQueueMarking
from eloquent.swiftqueue.queues import queue_of
from eloquent.swiftqueue.records import Observation, Queue

CLOCK_AHEAD_S = 1000.0
"The peer's clock is ahead of ours by this."
MS = 1e-3

Ms3 = tuple[float, float, float]
CALM: Ms3 = (0.5, 1, 2)
STANDING: Ms3 = (12, 16, 20)
BURST: Ms3 = (30, 45, 60)


class Foretold(NamedTuple):
    """What a script foretells of the L and of the C queue, in milliseconds."""

    low: Ms3
    classic: Ms3
    drop: tuple[float, float] = (0.0, 0.0)


Script = Callable[[float], Foretold | None]


def calm(now: float) -> Foretold:
    """L is fast and C is not."""
    return Foretold(CALM, STANDING)


class ScriptedOutlook:
    def __init__(self, script: Script) -> None:
        self._script = script
        self.sent: list[int] = []
        self.seen: list[Observation] = []
        self.is_closed = False

    def on_sent(self, number: int, sent_s: float, size: int, queue: Queue) -> None:
        assert not self.is_closed
        self.sent.append(number)

    def on_observation(self, seen: Observation) -> None:
        assert not self.is_closed
        self.seen.append(seen)

    def forecast(self, now: float) -> Forecast | None:
        foretold = self._script(now)
        if foretold is None:
            return None
        delay_s = np.array([foretold.low, foretold.classic], np.float32) * np.float32(MS)
        made_s = self.seen[-1].known_s if self.seen else now
        return Forecast(delay_s, delay_s[:, 0], np.array(foretold.drop, np.float32), made_s)

    def close(self) -> None:
        self.is_closed = True


class Outlooks:
    """Opens scripted outlooks, and keeps them."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.opened: list[ScriptedOutlook] = []

    def __call__(self) -> ScriptedOutlook:
        self.opened.append(ScriptedOutlook(self._script))
        return self.opened[-1]


class Left(NamedTuple):
    """A packet that left."""

    time_s: float
    ecn: Ecn
    is_copy: bool
    size: int


def arrives(now: float, queue: Queue) -> float:
    """Return the queueing delays of `calm`, in seconds."""
    return (0.5 * MS, 12 * MS)[queue]


def told_as_it_is(now: float, packet: SentPacket, arrived_s: float) -> float | None:
    return arrived_s


class Line:
    """Sends a packet each `gap_s`, with a copy where the policy wants one, and reports arrivals.

    `waits` gives the queueing delay of a packet, None if it is lost; `tells` the reported arrival
    by the peer's clock, None if there is no report; reports follow acknowledgements by
    `reports_after_s`. Validation may clear marks (`marks`).
    """

    def __init__(
        self,
        policy: MarkingPolicy,
        *,
        gap_s: float = 0.033,
        way_s: float = 0.02,
        size: int = 250,
        waits: Callable[[float, Queue], float | None] = arrives,
        tells: Callable[[float, SentPacket, float], float | None] = told_as_it_is,
        copies: Callable[[float], bool] = lambda now: False,
        marks: Callable[[float], bool] = lambda now: True,
        reports_after_s: float = 0.0,
        seed: int = 1,
    ) -> None:
        self.policy = policy
        self.now = 0.0
        self.left: list[Left] = []
        self._gap_s = gap_s
        self._way_s = way_s
        self._size = size
        self._waits = waits
        self._tells = tells
        self._copies = copies
        self._marks = marks
        self._reports_after_s = reports_after_s
        self._rng = random.Random(seed)
        self._number = 0
        self._next_s = 0.0
        self._news: list[tuple[float, int, SentPacket, float]] = []
        self._reports: list[tuple[float, int, SentPacket, float]] = []

    def run(self, until_s: float) -> "Line":
        while self._next_s < until_s:
            self.now = self._next_s
            self._hear(self.now)
            is_wanted = self.policy.wants_copy(self.now)
            self._send(is_copy=False)
            if is_wanted or self._copies(self.now):
                self._send(is_copy=True)
            self._next_s += self._gap_s
        self.now = until_s
        self._hear(until_s)
        return self

    def since(self, start_s: float, until_s: float = math.inf) -> list[Left]:
        return [left for left in self.left if start_s <= left.time_s < until_s]

    def marks_of(self, start_s: float, until_s: float = math.inf) -> set[Ecn]:
        """Return the codepoints of the packets of a time that are no copies."""
        return {left.ecn for left in self.since(start_s, until_s) if not left.is_copy}

    def copies_of(self, start_s: float, until_s: float = math.inf) -> list[Ecn]:
        return [left.ecn for left in self.since(start_s, until_s) if left.is_copy]

    def _send(self, *, is_copy: bool) -> None:
        ecn = self.policy.next_codepoint(self.now, self._size, is_copy=is_copy)
        if not self._marks(self.now):
            ecn = Ecn.NOT_ECT
        packet = SentPacket(self._number, self.now, self._size, ecn, is_timed=True)
        self._number += 1
        self.left.append(Left(self.now, ecn, is_copy, self._size))
        self.policy.on_sent(packet)
        waits_s = self._waits(self.now, queue_of(packet))
        if waits_s is None:
            news = (self.now + 4 * self._way_s, packet.number, packet, math.nan)
            heapq.heappush(self._news, news)
            return
        way_s = self._way_s + waits_s
        back_s = self._way_s + self._rng.uniform(0, 0.01)
        known_s, arrived_s = self.now + way_s + back_s, self.now + way_s + CLOCK_AHEAD_S
        heapq.heappush(self._news, (known_s, packet.number, packet, arrived_s))
        report = (known_s + self._reports_after_s, packet.number, packet, arrived_s)
        heapq.heappush(self._reports, report)

    def _hear(self, until_s: float) -> None:
        while self._news and self._news[0][0] <= until_s:
            known_s, _, packet, arrived_s = heapq.heappop(self._news)
            if math.isnan(arrived_s):
                self.policy.on_lost(known_s, packet)
            else:
                self.policy.on_acked(known_s, packet)
        while self._reports and self._reports[0][0] <= until_s:
            known_s, _, packet, arrived_s = heapq.heappop(self._reports)
            told_s = self._tells(known_s, packet, arrived_s)
            if told_s is not None:
                self.policy.on_arrival(known_s, packet, told_s)


def steered(
    script: Script = calm, *, has_copies: bool = False, has_probes: bool = False
) -> tuple[SwiftQueueMarking, Outlooks]:
    """Return a policy over a script; without copies of its own unless asked for."""
    outlooks = Outlooks(script)
    return SwiftQueueMarking(outlooks, has_copies=has_copies, has_probes=has_probes), outlooks


def state(line: Line) -> State:
    assert isinstance(line.policy, SwiftQueueMarking)
    return line.policy.state
