"""What the peer reports: whether it can be, and whether it is there at all.

A peer, or what lies between, may report anything: arrivals that cannot be, by a clock that is set,
always the same one, nothing. None of that may cost more than the steering: the policy falls back.
"""

import math
from collections import deque

from eloquent.quic.marking import SentPacket
from eloquent.swiftqueue.least import Least
from eloquent.swiftqueue.queues import queue_of
from eloquent.swiftqueue.records import Queue

JUMP_S = 0.03
"By so much an arrival must contradict the others, to be one that cannot be; less is jitter."
ABSURD_S = 60.0
"No packet is that late."
STRIKES = 3
STRIKES_WITHIN_S = 5.0
"So many arrivals that cannot be, in this time, and none is believed."

SILENCE_RTTS = 2.0
SILENCE_MIN_S = 0.5
SILENCE_MAX_S = 1.0
"""Feedback is absent after so many round trips without, but not before `SILENCE_MIN_S`, up to which
there are forecasts, nor later than `SILENCE_MAX_S`."""
OVERDUE_DEVIATIONS = 4.0
OVERDUE_SLACK_S = 0.015
"A packet is overdue that much later than usual; arrivals are reported up to 10 ms late."
MEAN_WEIGHT = 1 / 8
DEVIATION_WEIGHT = 1 / 4
"Of one report in the usual time and its deviation (RFC 6298 section 2)."
MAX_WAITING = 1024
"Packets of a queue whose arrival is waited for, at most."


class FeedbackCheck:
    """Finds arrivals that cannot be.

    Only differences of the peer's clock mean anything. Of each packet two are known: *forward*,
    its arrival less its sending, and *back*, when we heard of it (by the acknowledgement or by
    the report, whichever came first) less its arrival. Both are delays, up to the offset between
    the clocks, which the one has with the opposite sign. So if one goes far below the least that
    it has had, and the two together do not, it is the clock, or a lie.
    """

    def __init__(self) -> None:
        self._forward = Least()
        self._back = Least()
        self._strikes: deque[float] = deque(maxlen=STRIKES)

    @property
    def base_s(self) -> float:
        """The least one-way delay of the last half minute, by both clocks; NaN: none is known."""
        return self._forward.least

    def fault(self, now: float, packet: SentPacket, heard_s: float, arrived_s: float) -> str:
        """Return why an arrival cannot be, or nothing; `heard_s`: when we first knew of it."""
        fault = self._fault(packet, heard_s, arrived_s)
        if fault:
            self._strikes.append(now)
            return fault
        self._forward.learn(now, arrived_s - packet.sent_s)
        self._back.learn(now, heard_s - arrived_s)
        return ""

    def is_out(self, now: float) -> bool:
        """Return whether so much was impossible lately that nothing can be believed."""
        strikes = self._strikes
        return len(strikes) == STRIKES and now - strikes[0] <= STRIKES_WITHIN_S

    def _fault(self, packet: SentPacket, heard_s: float, arrived_s: float) -> str:
        if not math.isfinite(arrived_s):
            return "an arrival is no time"
        forward_s = arrived_s - packet.sent_s - self._forward.least
        back_s = heard_s - arrived_s - self._back.least
        if abs(forward_s) > ABSURD_S:  # False: it is the first, and `least` is NaN
            return "an arrival is a minute off"
        if forward_s + back_s > -JUMP_S:  # Else the path is faster than it was seen till now.
            if forward_s < -JUMP_S and back_s > JUMP_S:
                return "packets arrive sooner than they can: the peer's clock was set, or it lies"
            if forward_s > JUMP_S and back_s < -JUMP_S:
                return "packets arrive after we heard of them: the peer's clock was set, or it lies"
        return ""


class FeedbackClock:
    """When feedback is due, and since when there is none. Times in seconds."""

    def __init__(self) -> None:
        self._usual_s = math.nan
        self._deviation_s = 0.0
        self._silence_s = SILENCE_MAX_S
        self._waiting: tuple[deque[tuple[int, float]], ...] = tuple(
            deque(maxlen=MAX_WAITING) for _ in Queue
        )
        "By queue, number and time of packets later than the last that is known to have arrived."
        self._sent_s = -math.inf
        self._unheard_since_s = math.inf
        "When the first packet left after the last feedback."

    def on_sent(self, packet: SentPacket) -> None:
        """Take note of a packet."""
        self._waiting[queue_of(packet)].append((packet.number, packet.sent_s))
        is_after_pause = packet.sent_s > self._sent_s + SILENCE_MAX_S
        if is_after_pause or self._unheard_since_s == math.inf:
            self._unheard_since_s = packet.sent_s
        self._sent_s = packet.sent_s

    def on_arrival(self, now: float, packet: SentPacket) -> None:
        """Take note that an arrival was reported: what its queue had before it has come out."""
        waiting = self._waiting[queue_of(packet)]
        while waiting and waiting[0][0] <= packet.number:
            waiting.popleft()
        took_s = now - packet.sent_s
        if math.isnan(self._usual_s):
            self._usual_s, self._deviation_s = took_s, took_s / 2
        else:
            error_s = took_s - self._usual_s
            self._deviation_s += DEVIATION_WEIGHT * (abs(error_s) - self._deviation_s)
            self._usual_s += MEAN_WEIGHT * error_s
        self._silence_s = min(max(SILENCE_RTTS * self._usual_s, SILENCE_MIN_S), SILENCE_MAX_S)
        self._unheard_since_s = math.inf

    def is_silent(self) -> bool:
        """Return whether packets have left for so long, up to the last one, without feedback."""
        return self._sent_s - self._unheard_since_s > self._silence_s

    def is_overdue(self, now: float, queue: Queue) -> bool:
        """Return whether a packet in the queue should have been reported by now."""
        waiting = self._waiting[queue]
        if not waiting:
            return False
        due_s = self._usual_s + OVERDUE_DEVIATIONS * self._deviation_s + OVERDUE_SLACK_S
        return now - waiting[0][1] > due_s  # False: nothing is usual yet, and `due_s` is NaN
