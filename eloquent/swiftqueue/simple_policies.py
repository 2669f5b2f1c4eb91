"""Marking policies without a model: what SwiftQueue is compared with, and what collects records."""

import random
from collections import deque

from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import PlainMarking, SentPacket
from eloquent.swiftqueue.least import Least
from eloquent.swiftqueue.queues import codepoint_for, other, queue_of
from eloquent.swiftqueue.records import Queue

RANDOM_SHARE = 0.1
"Of the packets of the comparison's random policy, so many go into C."

SLOW_S = 0.005
"A packet that waits for longer is slow: five times what the L queue of DualPI2 aims at."
MARGIN_S = 0.001
"So much the other queue must be ahead; less is jitter."
NEWS_S = 1.0
"What is known of a queue is good for so long; then L is as good as any."
PROBE_S = 0.2
"How often, while packets go into C, a copy looks after L."
REPORT_WAIT_S = 0.01
"An arrival is reported at most so long after it."
MAX_WAITING = 512
"Packets of a queue whose arrival is waited for, at most."


class ShareMarking(PlainMarking):
    """Each packet into C with a probability, whatever happens."""

    def __init__(self, share: float, rng: random.Random, *, wants_times: bool = False) -> None:
        self._share = share
        self._random = rng.random
        self._wants_times = wants_times

    @property
    def wants_times(self) -> bool:
        """See `MarkingPolicy`."""
        return self._wants_times

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        """See `MarkingPolicy`."""
        return codepoint_for(Queue.C if self._random() < self._share else Queue.L)


class ProbingMarking(PlainMarking):
    """All into one queue, and every so often a copy into the other: both seen at one instant."""

    def __init__(self, queue: Queue = Queue.L) -> None:
        self._queue = queue
        self._probed_s = float("-inf")

    @property
    def wants_times(self) -> bool:
        """See `MarkingPolicy`."""
        return True

    def wants_copy(self, now: float) -> bool:
        """See `MarkingPolicy`."""
        return now >= self._probed_s + PROBE_S

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        """See `MarkingPolicy`."""
        if is_copy:
            self._probed_s = now
            return codepoint_for(other(self._queue))
        return codepoint_for(self._queue)


class AlternatingMarking(PlainMarking):
    """By turns into L and C, for a random time each, so that both are seen at length."""

    def __init__(self, rng: random.Random, *, mean_s: float) -> None:
        self._rng = rng
        self._mean_s = mean_s
        self._queue = rng.choice(tuple(Queue))
        self._until_s: float | None = None

    @property
    def wants_times(self) -> bool:
        """See `MarkingPolicy`."""
        return True

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        """See `MarkingPolicy`."""
        if self._until_s is None or now >= self._until_s:
            self._queue = other(self._queue)
            self._until_s = now + self._rng.expovariate(1 / self._mean_s)
        return codepoint_for(other(self._queue) if is_copy else self._queue)


class LastRttMarking(PlainMarking):
    """What one does without a model: into C while L was slow when last seen, and C was not slower.

    Of each queue it knows how long the newest packet waited that is known to have arrived, and
    that one whose report is overdue waits for at least so long. L is the default, C unseen counts
    as fast; news that are old are none. While in C, copies look after L (`wants_copy`), so that
    going back costs no packet, and copies of the transport go into the other queue.
    """

    def __init__(self) -> None:
        self._queue = Queue.L
        self._queues = (_Seen(), _Seen())
        self._base = Least()
        self._round_trip = Least()
        self._looked_s = float("-inf")
        "When a packet last went into the queue not in use."

    @property
    def wants_times(self) -> bool:
        """See `MarkingPolicy`."""
        return True

    def wants_copy(self, now: float) -> bool:
        """See `MarkingPolicy`."""
        return self._choose(now) is Queue.C and now >= self._looked_s + PROBE_S

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        """See `MarkingPolicy`."""
        return codepoint_for(other(self._queue) if is_copy else self._choose(now))

    def on_sent(self, packet: SentPacket) -> None:
        """See `MarkingPolicy`."""
        if not packet.is_timed:
            return
        queue = queue_of(packet)
        self._queues[queue].waiting.append((packet.number, packet.sent_s))
        if queue is not self._queue:
            self._looked_s = packet.sent_s

    def on_arrival(self, now: float, packet: SentPacket, arrived_s: float) -> None:
        """See `MarkingPolicy`."""
        delay_s = arrived_s - packet.sent_s
        self._base.learn(now, delay_s)
        self._round_trip.learn(now, now - packet.sent_s)
        self._queues[queue_of(packet)].learn(packet, delay_s)

    def _choose(self, now: float) -> Queue:
        """Return the queue for a packet that leaves at `now`."""
        low_s, classic_s = (self._waits_s(seen, now) for seen in self._queues)
        if low_s is None or low_s <= SLOW_S:
            self._queue = Queue.L
        elif classic_s is None or classic_s < low_s - MARGIN_S:
            self._queue = Queue.C
        elif classic_s > low_s + MARGIN_S:
            self._queue = Queue.L
        return self._queue

    def _waits_s(self, seen: "_Seen", now: float) -> float | None:
        """Return how long packets wait in a queue as far as is known, or None."""
        waits_s = None
        if now < seen.sent_s + NEWS_S:
            waits_s = seen.delay_s - self._base.least
        if seen.waiting:
            age_s = now - seen.waiting[0][1]
            late_s = age_s - self._round_trip.least - REPORT_WAIT_S
            if age_s < NEWS_S and late_s > 0:  # False: no report yet, and `least` is NaN
                waits_s = max(waits_s or 0.0, late_s)
        return waits_s


class _Seen:
    """What is known of one queue."""

    __slots__ = ("delay_s", "sent_s", "waiting")

    def __init__(self) -> None:
        self.sent_s = float("-inf")
        "When the newest packet left that is known to have arrived,"
        self.delay_s = 0.0
        "and its one-way delay, by both clocks."
        self.waiting: deque[tuple[int, float]] = deque(maxlen=MAX_WAITING)
        "Number and time of the packets sent after it."

    def learn(self, packet: SentPacket, delay_s: float) -> None:
        while self.waiting and self.waiting[0][0] <= packet.number:
            self.waiting.popleft()
        if packet.sent_s > self.sent_s:
            self.sent_s, self.delay_s = packet.sent_s, delay_s
