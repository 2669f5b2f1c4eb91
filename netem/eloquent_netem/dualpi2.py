"""DualPI2, the dual-queue coupled AQM for L4S (RFC 9332 appendix A, Linux `sch_dualpi2.c`).

Two queues share a link: L for scalable senders, which are marked early and often, and C for
classic ones, which keep about 15 ms of queue. One controller serves both:

    enqueue:   ECT(1) and CE go to L, the rest to C; full is full
    each 16 ms: q = the longer of the two heads' sojourn times
               p = clip(p + alpha * (q - target) + beta * (q - q before), 0, 1)
    dequeue:   the scheduler picks L or C and takes its head; then, unless less than 2 MTU is left,
      from C:  with probability p*p it is dropped, or marked if it is ECT(0) and 2p <= 1
      from L:  with probability 2p it is marked; if 2p > 1 (overload), it is dropped with
               probability p*p and marked otherwise
    at last:   what leaves L after more than 1 ms is marked

As in Linux, p*p is two draws of p, what was dropped costs its queue no credit, and "less than
2 MTU is left" does not count the packet in hand.
"""

import random
from collections import deque
from typing import Literal

from eloquent_netem.packet import Ecn, Packet

MTU_BYTES = 1500
L_WEIGHT = 90
C_WEIGHT = 10
TIME_SHIFT_S = 0.05
"The default of ns-3's DualPI2; well above the target, so that L waits only behind old packets."


class DualPi2:
    """The queue; times are in seconds, `alpha` and `beta` in Hz, defaults are those of Linux.

    The scheduler is either `"wrr"`, weighted round robin with 90% for L and 10% for C as in Linux,
    or `"time-shifted"`, the FIFO of RFC 9332's appendix A: the packet that has waited longest goes
    first, those of L being taken to have waited `time_shift_s` longer. On links so slow that two
    packets take longer than `step_s`, the step is as long as these take; this needs `bits_per_s`.

    The controller's 16 ms count from the first packet. They need no timer: the updates that are
    due are made up for, at their own times, before anything changes.
    """

    def __init__(
        self,
        *,
        rng: random.Random,
        scheduler: Literal["wrr", "time-shifted"] = "wrr",
        limit_packets: int = 10_000,
        bits_per_s: float | None = None,
        target_s: float = 0.015,
        update_s: float = 0.016,
        alpha: float = 0.16,
        beta: float = 3.2,
        coupling: float = 2,
        step_s: float = 0.001,
        time_shift_s: float = TIME_SHIFT_S,
        mtu_bytes: int = MTU_BYTES,
    ) -> None:
        if scheduler not in ("wrr", "time-shifted"):
            raise ValueError(f"a scheduler is 'wrr' or 'time-shifted', not {scheduler!r}")
        if limit_packets < 1 or update_s <= 0 or (bits_per_s is not None and bits_per_s <= 0):
            raise ValueError(
                "DualPI2 needs a limit of 1 packet or more, updates more than 0 s apart and a "
                f"rate above 0 bit/s, not {limit_packets}, {update_s} and {bits_per_s}"
            )
        self._random = rng.random
        self._is_wrr = scheduler == "wrr"
        self._limit_packets = limit_packets
        self._target_s = target_s
        self._update_s = update_s
        self._alpha = alpha
        self._beta = beta
        self._coupling = coupling
        two_packets_s = 0.0 if bits_per_s is None else 2 * mtu_bytes * 8 / bits_per_s
        self._step_s = max(step_s, two_packets_s)
        self._time_shift_s = time_shift_s
        self._min_backlog_bytes = 2 * mtu_bytes
        self._first_credit = mtu_bytes * (C_WEIGHT - L_WEIGHT)
        self._credit = self._first_credit
        self._l: deque[Packet] = deque()
        self._c: deque[Packet] = deque()
        self._backlog_bytes = 0
        self._p = 0.0
        self._last_delay_s = 0.0
        self._first_s: float | None = None
        self._updates = 0
        self._next_update_s = float("-inf")
        self._l_marks = self._c_marks = self._l_drops = self._c_drops = 0

    @property
    def packets(self) -> int:
        """See `Queue.packets`."""
        return len(self._l) + len(self._c)

    @property
    def l_packets(self) -> int:
        """How many packets wait in L."""
        return len(self._l)

    @property
    def c_packets(self) -> int:
        """How many packets wait in C."""
        return len(self._c)

    @property
    def p(self) -> float:
        """The controller's probability, 0 to 1, when a packet last came or went.

        C drops or marks with its square, L marks with its double (capped at 1).
        """
        return self._p

    @property
    def step_s(self) -> float:
        """The sojourn time in L, in seconds, above which a packet is marked in any case."""
        return self._step_s

    @property
    def marks(self) -> int:
        """How many packets have been marked CE here."""
        return self._l_marks + self._c_marks

    @property
    def l_marks(self) -> int:
        """How many packets of L have been marked CE."""
        return self._l_marks

    @property
    def c_marks(self) -> int:
        """How many packets of C have been marked CE."""
        return self._c_marks

    @property
    def drops(self) -> int:
        """See `Queue.drops`."""
        return self._l_drops + self._c_drops

    @property
    def l_drops(self) -> int:
        """How many packets meant for L have been dropped."""
        return self._l_drops

    @property
    def c_drops(self) -> int:
        """How many packets meant for C have been dropped."""
        return self._c_drops

    def enqueue(self, now: float, packet: Packet) -> bool:
        """See `Queue.enqueue`."""
        if now >= self._next_update_s:
            self._update(now)
        is_l = packet.ecn is Ecn.ECT_1 or packet.ecn is Ecn.CE
        if len(self._l) + len(self._c) >= self._limit_packets:
            if is_l:
                self._l_drops += 1
            else:
                self._c_drops += 1
            return False
        (self._l if is_l else self._c).append(packet)
        self._backlog_bytes += packet.size
        return True

    def dequeue(self, now: float) -> Packet | None:
        """See `Queue.dequeue`."""
        if now >= self._next_update_s:
            self._update(now)
        l_queue, c_queue = self._l, self._c
        packet: Packet | None = None
        while packet is None and (l_queue or c_queue):
            if l_queue and (not c_queue or self._is_turn_of_l()):
                packet = self._pass_l(now, l_queue.popleft())
                if packet is not None and c_queue:
                    self._credit += C_WEIGHT * packet.size
            else:
                packet = self._pass_c(c_queue.popleft())
                if packet is not None and l_queue:
                    self._credit -= L_WEIGHT * packet.size
        # Linux does it when it is asked for a packet and has none, and asks until it has none.
        if not l_queue and not c_queue:
            self._credit = self._first_credit
        return packet

    def _is_turn_of_l(self) -> bool:
        """Return whether L is next; packets wait in both."""
        if self._is_wrr:
            return self._credit <= 0
        return self._l[0].entered_s - self._time_shift_s <= self._c[0].entered_s

    def _pass_l(self, now: float, packet: Packet) -> Packet | None:
        """Mark the packet or drop it (None), as is decided for L."""
        self._backlog_bytes -= packet.size
        p = self._p
        is_marked = False
        if self._backlog_bytes >= self._min_backlog_bytes:
            marking = self._coupling * p
            if marking > 1:
                if self._random() < p and self._random() < p:
                    self._l_drops += 1
                    return None
                is_marked = True
            else:
                is_marked = self._random() < marking
        if (is_marked or now - packet.entered_s > self._step_s) and packet.ecn is not Ecn.CE:
            packet.ecn = Ecn.CE
            self._l_marks += 1
        return packet

    def _pass_c(self, packet: Packet) -> Packet | None:
        """Mark the packet or drop it (None), as is decided for C."""
        self._backlog_bytes -= packet.size
        p = self._p
        if self._backlog_bytes < self._min_backlog_bytes:
            return packet
        if self._random() < p and self._random() < p:
            if packet.ecn is Ecn.NOT_ECT or self._coupling * p > 1:
                self._c_drops += 1
                return None
            packet.ecn = Ecn.CE
            self._c_marks += 1
        return packet

    def _update(self, now: float) -> None:
        """Make the controller's updates that are due by `now`, each with the delays of its time."""
        if self._first_s is None:
            self._first_s = now
            self._updates = 1
            self._next_update_s = now + self._update_s
        # Between two calls nothing comes or goes, so the heads at these times are those of now.
        entered = [queue[0].entered_s for queue in (self._l, self._c) if queue]
        oldest_s = min(entered, default=None)
        while self._next_update_s <= now:
            delay_s = 0.0 if oldest_s is None else self._next_update_s - oldest_s
            change = self._alpha * (delay_s - self._target_s)
            change += self._beta * (delay_s - self._last_delay_s)
            self._p = min(max(self._p + change, 0.0), 1.0)
            self._last_delay_s = delay_s
            if oldest_s is None and self._p == 0:
                # Empty and at rest: the updates up to now change nothing.
                self._updates = max(self._updates, int((now - self._first_s) / self._update_s))
            self._updates += 1
            self._next_update_s = self._first_s + self._updates * self._update_s
