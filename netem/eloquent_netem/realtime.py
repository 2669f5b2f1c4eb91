"""The wall clock: one loop that drives two links, and knows how late it was."""

import array
import contextlib
import ctypes
import math
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.errors import NetemError
from eloquent_netem.link import Link
from eloquent_netem.packet import SUBJECT, Packet
from eloquent_netem.queues import CoDel, Queue
from eloquent_netem.sim import CrossTraffic

LATENESS_BOUND_S = 0.001
"A run in which more than 1% of the packets come out later than this is refused."

_DELAYS_KEPT = 1024
"Enough for a median, few enough to sort between two packets."

_REAL_TIME_PRIORITY = 10
_PR_SET_TIMERSLACK = 29
"linux/prctl.h; in nanoseconds. By default the kernel may wake us 50 us late."


class LatenessError(NetemError):
    """Packets came out of the links too late for the figures to mean anything."""


class OverloadError(NetemError):
    """The machine lost packets that the links did not lose."""


class NotStartedError(NetemError):
    """Packets came, but the scenario's clock was never started."""


@dataclass(frozen=True, slots=True)
class Lateness:
    """By how much packets came out later than the links wanted, in seconds."""

    packets: int
    p50_s: float
    p99_s: float
    max_s: float

    def refuse_above(self, bound_s: float, *, is_real_time: bool) -> None:
        """Do nothing if the run can be trusted.

        Raises:
            LatenessError: the 99th percentile is above the bound.
        """
        if self.p99_s <= bound_s:
            return
        advice = (
            "use a less busy machine, send less"
            if is_real_time
            else "run it where SCHED_FIFO is allowed (as root, or with CAP_SYS_NICE), or on a "
            "machine with nothing else to do"
        )
        raise LatenessError(
            f"One packet in 100 came out {self.p99_s * 1e3:.2f} ms late or later, and "
            f"{bound_s * 1e3:.2f} ms is the bound, so this run's figures would show the machine "
            f"and not the network: {advice}, or widen the bound (--lateness-bound-ms; in code "
            "lateness_bound_s)."
        )


class LatenessHistogram:
    """Counts delays in steps of 1 us up to 20 ms; what is beyond counts as the largest seen."""

    STEP_S = 1e-6
    STEPS = 20_000

    def __init__(self) -> None:
        self._counts = array.array("Q", bytes(8 * (self.STEPS + 1)))
        self._packets = 0
        self._max_s = 0.0

    def record(self, lateness_s: float) -> None:
        """Count one packet."""
        self._counts[min(int(lateness_s / self.STEP_S), self.STEPS)] += 1
        self._packets += 1
        self._max_s = max(self._max_s, lateness_s)

    def summary(self) -> Lateness:
        """Return what has been seen; percentiles are rounded up to the step."""
        return Lateness(self._packets, self._percentile(0.5), self._percentile(0.99), self._max_s)

    def _percentile(self, share: float) -> float:
        wanted = math.ceil(share * self._packets)
        seen = 0
        for step in range(self.STEPS):
            seen += self._counts[step]
            if seen >= wanted:
                return min((step + 1) * self.STEP_S, self._max_s)
        return self._max_s


@dataclass(frozen=True, slots=True)
class DirectionStats:
    """What went through one link, cross traffic included."""

    packets_sent: int
    bytes_sent: int
    packets_lost: int
    "Taken by the link's loss."
    queue_drops: int
    packets_delivered: int
    "Packets of the subject that came out, duplicates included; cross traffic never comes out."
    subject: "SubjectStats"
    queue: "QueueStats"


@dataclass(frozen=True, slots=True)
class SubjectStats:
    """What the subject alone sent and received over one link."""

    packets_sent: int = 0
    bytes_sent: int = 0
    bytes_delivered: int = 0
    delay_p50_s: float | None = None
    "One way through the link, lateness not counted, of the last packets before these figures."
    delay_max_s: float | None = None
    "The longest since the figures before; None: nothing came out since then."


@dataclass(frozen=True, slots=True)
class QueueStats:
    """The bottleneck's queue, now."""

    packets: int = 0
    marks: int = 0
    "Packets marked CE since the beginning."
    l_packets: int | None = None
    "Of them in DualPI2's L; None: another kind of queue."
    p: float | None = None
    "DualPI2's probability; None: another kind of queue."


@dataclass(frozen=True, slots=True)
class DriverStats:
    """What a driver has done since it was made."""

    up: DirectionStats
    down: DirectionStats
    lateness: Lateness
    is_real_time: bool
    "Whether the process had SCHED_FIFO."
    packets_too_early: int
    "Dropped because the scenario's clock had not been started."
    is_started: bool
    clock_s: float = 0.0
    "The scenario's clock at the time of these figures."


MakeLinks = Callable[[], tuple[Link, Link]]
"""Makes the links up (client to server) and down, in the process that drives them; picklable."""

MakeCrossTraffic = Callable[[Link, Link], Sequence[CrossTraffic]]
"""Makes the cross traffic for the links up and down, in the process that drives them."""


def no_cross_traffic(up: Link, down: Link) -> Sequence[CrossTraffic]:
    """Return none."""
    return ()


class _Lane:
    """One link and its far end."""

    def __init__(self, link: Link, deliver: Callable[[Packet], None]) -> None:
        self.link = link
        self._deliver = deliver
        self._sent = self._sent_bytes = 0
        self._delivered = self._delivered_bytes = 0
        self._delays_s: deque[float] = deque(maxlen=_DELAYS_KEPT)
        self._delay_max_s = 0.0

    def send(self, now: float, packet: Packet) -> None:
        self._sent += 1
        self._sent_bytes += packet.size
        self.link.send(now, packet)

    def deliver(self, due: float, packet: Packet) -> None:
        self._deliver(packet)
        self._delivered += 1
        self._delivered_bytes += packet.size
        delay_s = due - packet.entered_s
        self._delays_s.append(delay_s)
        self._delay_max_s = max(self._delay_max_s, delay_s)

    def stats(self) -> DirectionStats:
        """Return what has been done so far; the delays seen so far are forgotten."""
        link = self.link
        delays_s = sorted(self._delays_s)
        subject = SubjectStats(
            packets_sent=self._sent,
            bytes_sent=self._sent_bytes,
            bytes_delivered=self._delivered_bytes,
            delay_p50_s=delays_s[(len(delays_s) - 1) // 2] if delays_s else None,
            delay_max_s=self._delay_max_s if delays_s else None,
        )
        self._delays_s.clear()
        self._delay_max_s = 0.0
        return DirectionStats(
            packets_sent=link.packets_sent,
            bytes_sent=link.bytes_sent,
            packets_lost=link.packets_lost,
            queue_drops=link.queue.drops,
            packets_delivered=self._delivered,
            subject=subject,
            queue=_queue_stats(link.queue),
        )


def _queue_stats(queue: Queue) -> QueueStats:
    if isinstance(queue, DualPi2):
        return QueueStats(queue.packets, queue.marks, queue.l_packets, queue.p)
    return QueueStats(queue.packets, queue.marks if isinstance(queue, CoDel) else 0)


class Driver:
    """Drives the links up and down on the wall clock, whose zero is the call of `start`.

    Until then it drops what is sent, so that no run can begin by accident, with a clock that
    depends on how long programs took to load. It waits in `select.select`, whose timeouts are
    good to the microsecond (epoll's are not), and never spins.
    """

    def __init__(
        self,
        up: Link,
        down: Link,
        *,
        deliver_up: Callable[[Packet], None],
        deliver_down: Callable[[Packet], None],
        cross: Sequence[CrossTraffic] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._up = _Lane(up, deliver_up)
        self._down = _Lane(down, deliver_down)
        self._lanes = (self._up, self._down)
        self._cross = cross
        self._clock = clock
        self._started_at: float | None = None
        self._latest = 0.0
        self._too_early = 0
        self._watched: dict[int, Callable[[], None]] = {}
        self._is_stopped = False
        self._is_real_time = False
        self._lateness = LatenessHistogram()

    def start(self) -> None:
        """Start the scenario's clock, once; later calls change nothing."""
        if self._started_at is None:
            self._started_at = self._clock()

    def watch(self, fd: int, on_readable: Callable[[], None]) -> None:
        """Call `on_readable` whenever `fd` has something to read."""
        self._watched[fd] = on_readable

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; do this before closing it."""
        self._watched.pop(fd, None)

    def send_up(self, packet: Packet) -> None:
        """Put a packet of the subject into the link up, now."""
        self._send(self._up, packet)

    def send_down(self, packet: Packet) -> None:
        """Put a packet of the subject into the link down, now."""
        self._send(self._down, packet)

    def stop(self) -> None:
        """Make `run` return."""
        self._is_stopped = True

    def run(self, *, real_time: bool = False) -> None:
        """Drive the links until `stop`; with `real_time` under SCHED_FIFO, where it is allowed."""
        reduce_timer_slack()
        self._is_real_time = real_time and become_real_time()
        while not self._is_stopped:
            readable, _, _ = select.select(list(self._watched), (), (), self._timeout_s())
            self.deliver_due()
            for fd in readable:
                on_readable = self._watched.get(fd)  # A handler before may have dropped it.
                if on_readable is not None:
                    on_readable()
            self.deliver_due()

    def deliver_due(self) -> None:
        """Let happen, in order of time, all that is due by now."""
        if self._started_at is None:
            return
        now = self._clock() - self._started_at
        while (due := self._next_time()) is not None and due <= now:
            for lane in self._lanes:
                time_of_link = lane.link.next_time()
                if time_of_link is not None and time_of_link <= due:
                    self._deliver(lane, due)
            for actor in self._cross:
                time_of_actor = actor.next_time()
                if time_of_actor is not None and time_of_actor <= due:
                    # A packet of the subject may have entered after `due`: no going back.
                    self._latest = max(due, self._latest)
                    actor.act(self._latest)

    def stats(self) -> DriverStats:
        """Return what has been done so far; delays are those since the call before."""
        started_at = self._started_at
        return DriverStats(
            up=self._up.stats(),
            down=self._down.stats(),
            lateness=self._lateness.summary(),
            is_real_time=self._is_real_time,
            packets_too_early=self._too_early,
            is_started=started_at is not None,
            clock_s=0.0 if started_at is None else self._clock() - started_at,
        )

    def _send(self, lane: _Lane, packet: Packet) -> None:
        if self._started_at is None:
            self._too_early += 1
            return
        self._latest = max(self._clock() - self._started_at, self._latest)
        lane.send(self._latest, packet)

    def _deliver(self, lane: _Lane, due: float) -> None:
        assert self._started_at is not None
        for packet in lane.link.poll(due):
            if packet.flow == SUBJECT:
                lane.deliver(due, packet)
                self._lateness.record(self._clock() - self._started_at - due)
            else:
                for actor in self._cross:
                    actor.on_delivered(due, packet)

    def _next_time(self) -> float | None:
        times = [lane.link.next_time() for lane in self._lanes]
        times += [actor.next_time() for actor in self._cross]
        return min((time for time in times if time is not None), default=None)

    def _timeout_s(self) -> float | None:
        if self._started_at is None or (due := self._next_time()) is None:
            return None
        return max(0.0, due - (self._clock() - self._started_at))


def refuse_unfaithful(stats: DriverStats, *, lateness_bound_s: float, lost_by_us: int) -> None:
    """Do nothing if the run showed the links and nothing else.

    Raises:
        NotStartedError: packets came, but the clock was never started.
        OverloadError: `lost_by_us` packets were lost outside the links.
        LatenessError: packets came out too late.
    """
    if stats.packets_too_early and not stats.is_started:
        raise NotStartedError(
            f"{stats.packets_too_early} packets were dropped because the scenario's clock stood "
            "still: call start() when both ends are ready."
        )
    if lost_by_us:
        raise OverloadError(
            f"The machine lost {lost_by_us} packets that the scenario did not lose, because they "
            "came faster than they could be read: send less, or use a faster machine."
        )
    stats.lateness.refuse_above(lateness_bound_s, is_real_time=stats.is_real_time)


def become_real_time() -> bool:
    """Put this process under SCHED_FIFO; return whether that was allowed."""
    if sys.platform != "linux":
        return False
    policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, policy, os.sched_param(_REAL_TIME_PRIORITY))
        return True
    return False


def reduce_timer_slack() -> None:
    """Ask the kernel to wake this thread on time: a slack of 1 ns (prctl(2)); Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
