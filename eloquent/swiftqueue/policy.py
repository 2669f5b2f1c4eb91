"""SwiftQueue's marking policy: each packet into the queue that is foretold to be the better one.

    state     marks                      why                                 next
    LEARNING  L                          little is known yet                 STEERING, STALE,
                                                                             DISTRUST
    STEERING  the better queue's         `LEARN_OBSERVATIONS` are there      STALE, DISTRUST
    STALE     L                          feedback or forecasts are absent    STEERING, DISTRUST
    DISTRUST  L, and learns nothing      feedback or forecasts are false     LEARNING, in a while
    UNMARKED  L, which the connection    validation takes the mark off       when a mark leaves
              turns into Not-ECT         (see `eloquent.quic.ecn`)           again, LEARNING, or
                                                                             DISTRUST as before

Copies go into the other queue in every state, since that takes no forecast; into the same one only
if the other is foretold to be of no use. Those that the policy asks for itself
(`wants_copy`) are *probes*, since the queue not in use is not seen, and *hedges*, where a packet
may be slow in whichever queue is chosen, or has no feedback when it is due: both queues at once,
and the earlier one renders.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import SentPacket
from eloquent.swiftqueue.budgets import ClassicShare, CopyBudget
from eloquent.swiftqueue.choice import Prospect, QueueChoice, Tail, prospects
from eloquent.swiftqueue.feedback import FeedbackCheck, FeedbackClock
from eloquent.swiftqueue.forecaster import Forecast
from eloquent.swiftqueue.queues import codepoint_for, other, queue_of
from eloquent.swiftqueue.records import Observation, Queue
from eloquent.swiftqueue.shape import LEVELS
from eloquent.swiftqueue.trust import Backoff, Calibration

LEARN_OBSERVATIONS = 8
FORECAST_MAX_AGE_S = 1.0
"What is older foretells nothing."

LOSS_MIN_S = 0.005
LOSS_MAX_S = 0.05
GAP_WEIGHT = 1 / 16
"""A drop costs the usual gap between bundles (a mean in which the newest gap has this weight),
within these bounds: then the next bundle brings what was lost."""

PROBE_SHARE = 0.03
PROBE_BURST = 3.0
PROBE_CALM_S = 5.0
PROBE_BUSY_S = 0.5
"The queue not in use is looked after this often: while both cost little, and else."
BUSY_S = 0.003
"More than this is not little."

HEDGE_SHARE = 0.1
HEDGE_BURST = 20.0
HEDGE_MIN_S = 0.01
"A packet that risks less than this is not hedged."
HEDGE_STEP = 0.05
"Nor one that is not among the riskiest `HEDGE_SHARE`; by this step the bound follows the risks."

TOO_LATE_S = 0.02
"""A copy that may well take so much longer than the packet does at its worst saves nobody from a
delay: it only helps where the packet is dropped. Packets are dropped in C mostly while L overflows,
and then one in the same queue comes sooner."""
DROPPING = 0.3
"Nor does one help that is dropped so often, and more often than the packet."

COPY_WITHIN_S = 0.002
"A probe that was asked for leaves within this time."

MAX_OUT = 1024
"Packets whose fate is waited for, at most; then the oldest is forgotten."

logger = logging.getLogger(__name__)


class State(Enum):
    """See the module's table."""

    LEARNING = auto()
    STEERING = auto()
    STALE = auto()
    DISTRUST = auto()
    UNMARKED = auto()


STEERED = (State.STEERING, State.STALE)


class Foresight(Protocol):
    """What the policy needs of an `eloquent.swiftqueue.forecaster.Outlook`; see there."""

    def on_sent(self, number: int, sent_s: float, size: int, queue: Queue) -> None:
        """Take note of a packet that left."""

    def on_observation(self, seen: Observation) -> None:
        """Take note of a packet's fate."""

    def forecast(self, now: float) -> Forecast | None:
        """Return what is foretold for a packet that leaves at `now`."""

    def close(self) -> None:
        """Let go of what it holds."""


@dataclass(slots=True)
class Counters:
    """What a policy has done, for metrics."""

    packets: int = 0
    "All, copies too,"
    classic: int = 0
    "and those of them that went into C."
    copies: int = 0
    "Of all kinds, the transport's own too."
    probes: int = 0
    hedges: int = 0
    "Copies that were asked for."
    capped: int = 0
    "Packets that went into L since C's share was used up."
    fallbacks: dict[str, int] = field(default_factory=dict)
    "How often it stopped steering, by why: `feedback`, `forecasts` or `silence`."


class _Out:
    """A packet whose fate is waited for."""

    __slots__ = ("base_s", "heard_s", "prospect")

    def __init__(self, prospect: Prospect | None, base_s: float) -> None:
        self.prospect = prospect
        "What was foretold for it,"
        self.base_s = base_s
        "over this delay."
        self.heard_s = math.inf
        "When it was acknowledged."


class SwiftQueueMarking:
    """Marks the packets of one connection (`MarkingPolicy`). Times in seconds.

    `open_outlook` gives the connection's forecasts: at first, and anew after each loss of trust.
    """

    def __init__(
        self,
        open_outlook: Callable[[], Foresight],
        *,
        has_copies: bool = True,
        has_probes: bool = True,
    ) -> None:
        self.state = State.LEARNING
        self.counters = Counters()
        self._open_outlook = open_outlook
        self._outlook: Foresight | None = open_outlook()
        self._prospects: tuple[Prospect, Prospect] | None = None
        self._choice = QueueChoice()
        self._classic = ClassicShare()
        self._probes = CopyBudget(PROBE_SHARE, PROBE_BURST) if has_probes else CopyBudget(0.0, 0.0)
        self._hedges = CopyBudget(HEDGE_SHARE, HEDGE_BURST) if has_copies else CopyBudget(0.0, 0.0)
        self._hedge_above_s = HEDGE_MIN_S
        self._probed_s = -math.inf
        "When a probe was last asked for."
        self._decided_s = math.nan
        self._asked = self._last = Queue.L
        "Where the newest packet was to go, and the newest that is no copy."
        self._gap_s = LOSS_MAX_S
        self._tails = (Tail(), Tail())
        self._sent_s = [-math.inf, -math.inf]
        "By queue: when the newest packet left."
        self._out: dict[int, _Out] = {}
        self._observed = 0
        self._clock = FeedbackClock()
        self._feedback = FeedbackCheck()
        self._calibration = Calibration(LEVELS[1:])
        self._backoff = Backoff()
        self._is_silent = self._has_told_silence = False

    @property
    def wants_times(self) -> bool:
        """See `MarkingPolicy`."""
        return self.state is not State.UNMARKED

    @property
    def switches(self) -> int:
        """How often the queue in use has changed."""
        return self._choice.switches

    def close(self) -> None:
        """Let go of the connection's forecasts; nothing is steered any more."""
        if self._outlook is not None:
            self._outlook.close()

    # Sending.

    def wants_copy(self, now: float) -> bool:
        """See `MarkingPolicy`."""
        if now != self._decided_s:
            self._decide(now)
        if self.state is State.DISTRUST or self.state is State.UNMARKED:
            return False
        queue = self._choice.queue
        if self._hedges.has_copy and self._is_risky(now, queue):
            self._hedges.spend()
            self.counters.hedges += 1
            return True
        if self._probes.has_copy and self._is_unseen(now, other(queue)):
            self._probes.spend()
            self.counters.probes += 1
            self._probed_s = now
            return True
        return False

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        """See `MarkingPolicy`."""
        if is_copy:
            queue = self._queue_of_copy(now)
            self.counters.copies += 1
        else:
            if now != self._decided_s:
                self._decide(now)
            queue = self._last = self._choice.queue
            self._count_packet(queue)
        if queue is Queue.C and not self._classic.allows(now, size):
            queue = Queue.L
            self.counters.capped += 1
        self._asked = queue
        return codepoint_for(queue)

    def on_sent(self, packet: SentPacket) -> None:
        """See `MarkingPolicy`."""
        queue = queue_of(packet)
        self._check_mark(queue)
        number, sent_s, size = packet[:3]
        self.counters.packets += 1
        self.counters.classic += queue
        self._classic.on_sent(sent_s, size, queue)
        if not packet.is_timed:
            return  # A bare acknowledgement, say: nobody will tell what became of it.
        gap_s = sent_s - max(self._sent_s)
        if gap_s > 0:  # Else it is a copy.
            gap_s = min(max(gap_s, LOSS_MIN_S), LOSS_MAX_S)
            self._gap_s += GAP_WEIGHT * (gap_s - self._gap_s)
        self._sent_s[queue] = sent_s
        self._clock.on_sent(packet)
        if self._outlook is None:
            return
        self._outlook.on_sent(number, sent_s, size, queue)
        prospect = None if self._prospects is None else self._prospects[queue]
        self._out[number] = _Out(prospect, self._feedback.base_s)
        if len(self._out) > MAX_OUT:
            del self._out[next(iter(self._out))]

    def _decide(self, now: float) -> None:
        """Look at the forecasts for `now`; set the state and the queue in use."""
        self._decided_s = now
        if self.state is State.DISTRUST and self._backoff.is_over(now):
            self._outlook = self._open_outlook()
            self.state = State.LEARNING
        self._prospects = self._look_ahead(now)
        state = self.state
        if state in STEERED or (state is State.LEARNING and self._observed >= LEARN_OBSERVATIONS):
            if self._prospects is not None:
                self.state = State.STEERING
                self._choice.choose(now, self._prospects)
                return
            self.state = State.STALE
        self._choice.fall_back(now)

    def _look_ahead(self, now: float) -> tuple[Prospect, Prospect] | None:
        """Return what is foretold, or None if nothing is or if it is too old."""
        if self._outlook is None:
            return None
        if self._clock.is_silent():
            self._tell_silence()
            return None
        forecast = self._outlook.forecast(now)
        if forecast is None or now - forecast.made_s > FORECAST_MAX_AGE_S:
            return None
        return prospects(forecast, self._gap_s, self._tails)

    def _count_packet(self, queue: Queue) -> None:
        """Fill the budgets for a packet that is no copy, and follow what packets risk."""
        self._probes.on_packet()
        self._hedges.on_packet()
        if self._prospects is None:
            return
        is_above = self._prospects[queue].risk_s > self._hedge_above_s
        above_s = self._hedge_above_s * (1 + HEDGE_STEP * (is_above - HEDGE_SHARE))
        self._hedge_above_s = max(above_s, HEDGE_MIN_S)

    def _is_risky(self, now: float, queue: Queue) -> bool:
        """Return whether a packet in the queue may be so slow that a copy is worth its price."""
        if self._clock.is_overdue(now, queue):
            return True
        if self._prospects is None:
            return False
        prospect = self._prospects[queue]
        if prospect.risk_s <= self._hedge_above_s:
            return False
        return (
            self._best_beside(queue) is not queue
            or prospect.risk_s > prospect.highest_s + HEDGE_MIN_S
        )

    def _best_beside(self, queue: Queue) -> Queue:
        """Return where a copy of a packet in a queue is worth most."""
        there = other(queue)
        if self._prospects is not None:
            its, copys = self._prospects[queue], self._prospects[there]
            if copys.upper_s > its.highest_s + TOO_LATE_S or copys.drop > max(DROPPING, its.drop):
                return queue
        return there

    def _is_unseen(self, now: float, queue: Queue) -> bool:
        """Return whether it is time to look after the queue not in use."""
        is_busy = self._prospects is None or any(
            prospect.cost_s > BUSY_S for prospect in self._prospects
        )
        seen_s = max(self._sent_s[queue], self._probed_s)
        return now - seen_s > (PROBE_BUSY_S if is_busy else PROBE_CALM_S)

    def _queue_of_copy(self, now: float) -> Queue:
        """Return the queue for a copy of the last packet."""
        if now - self._probed_s <= COPY_WITHIN_S:
            return other(self._last)
        return self._best_beside(self._last)

    def _check_mark(self, queue: Queue) -> None:
        """Notice when the connection takes marks off, and when it leaves them on again."""
        if self._asked is Queue.L and queue is Queue.C:
            self.state = State.UNMARKED
        elif self.state is State.UNMARKED and queue is Queue.L:
            self.state = State.LEARNING if self._outlook is not None else State.DISTRUST

    # Learning.

    def on_acked(self, now: float, packet: SentPacket) -> None:
        """See `MarkingPolicy`."""
        out = self._out.get(packet.number)
        if out is not None:
            out.heard_s = min(out.heard_s, now)

    def on_arrival(self, now: float, packet: SentPacket, arrived_s: float) -> None:
        """See `MarkingPolicy`."""
        self._decided_s = math.nan
        self._clock.on_arrival(now, packet)
        self._is_silent = False
        out = self._out.pop(packet.number, None)
        if out is None or self._outlook is None:
            return
        heard_s = min(now, out.heard_s)
        why = self._feedback.fault(now, packet, heard_s, arrived_s)
        if why:
            if self._feedback.is_out(now):
                self._distrust(now, "feedback", why)
            return
        delay_s = arrived_s - packet.sent_s
        self._observe(now, packet, delay_s)
        prospect = out.prospect
        if prospect is None:
            return
        self._tails[queue_of(packet)].learn(delay_s - out.base_s, prospect.highest_s)
        self._calibration.add(delay_s - out.base_s, (prospect.upper_s, prospect.highest_s))
        why = self._calibration.fault()
        if why:
            self._distrust(now, "forecasts", why)

    def on_lost(self, now: float, packet: SentPacket) -> None:
        """See `MarkingPolicy`."""
        self._decided_s = math.nan
        if packet.number in self._out:
            self._observe(now, packet, math.nan)

    def _observe(self, now: float, packet: SentPacket, delay_s: float) -> None:
        assert self._outlook is not None
        number, sent_s, size = packet[:3]
        seen = Observation(number, sent_s, size, queue_of(packet), delay_s, now)
        self._outlook.on_observation(seen)
        self._observed += 1

    def _distrust(self, now: float, cause: str, why: str) -> None:
        assert self._outlook is not None
        self._outlook.close()
        self._outlook = None
        self._prospects = None
        self._out.clear()
        self._observed = 0
        self._feedback = FeedbackCheck()
        self._calibration = Calibration(LEVELS[1:])
        length_s = self._backoff.begin(now)
        self._count_fallback(cause)
        if self.state is not State.UNMARKED:
            self.state = State.DISTRUST
        logger.info(
            "SwiftQueue does not steer for %.0f s: %s. Packets go into the L queue.", length_s, why
        )

    def _tell_silence(self) -> None:
        if not self._is_silent:
            self._is_silent = True
            self._count_fallback("silence")
        if not self._has_told_silence:
            self._has_told_silence = True
            logger.info(
                "SwiftQueue hears of no arrivals: packets go into the L queue until it does."
            )

    def _count_fallback(self, cause: str) -> None:
        self.counters.fallbacks[cause] = self.counters.fallbacks.get(cause, 0) + 1
