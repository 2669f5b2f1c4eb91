"""DualPI2 that also says what each packet of the subject would have met in the other queue.

A *passage* is reported for each packet of the subject, flow 0. Beside what became of it, it has

- what a *shadow* met: a packet of no size, put into the other queue at the same instant. Behind the
  packets in front of it, it is served when the scheduler would take it: at the latest when a packet
  behind it is; where nothing really waits beside it, by a credit that starts from the real one and
  changes as the real one would if the shadow were a packet and its own packet were not there. It is
  dropped as a packet there would be, by draws of its own.
- what the *state* foretold: how long the packet would wait in either queue if nothing else came,
  from the packets in front, the scheduler's credit and the link's present rate.

Shadows take no capacity and no draw of others: with or without them, the same packets leave at the
same instants with the same marks. Since a shadow has no size, and its packet is there all the same,
what it meets is the truth for a thin flow: within a packet's time.

In a *race* this is not so: each packet of the subject waits in both queues and leaves by the first
that does not drop it; its copy in the other is then discarded at no cost. What one queue drops
stays in the other, for real, at the place where it has waited there. The credit is then what it
would be, had it been in that queue alone: what one could do who knew, packet by packet, which queue
is faster and which drops.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, nan
from typing import Literal

from eloquent_netem.dualpi2 import C_WEIGHT, L_WEIGHT, MTU_BYTES, DualPi2
from eloquent_netem.packet import SUBJECT, Ecn, Packet

L, C = 0, 1
"The index of what is known by queue."


@dataclass(slots=True, eq=False)
class Passage:
    """What became of a packet of the subject; pairs are by queue, L first."""

    packet: Packet
    entered_s: float
    queue: int
    "`L` or `C`: what its codepoint asked for."
    foretold_s: tuple[float, float]
    "How long the state said that it would wait, in seconds."
    wait_s: list[float] = field(default_factory=lambda: [nan, nan])
    """From its entry until it was served, in seconds; what serving takes comes on top. Infinite: it
    was dropped. NaN: it is not known, since the packet left by the other queue in a race."""


Report = Callable[[Passage], None]
"Takes a passage when all of it is known."


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What is wanted of a watched queue."""

    report: Report
    is_race: bool = False


@dataclass(slots=True, eq=False)
class _Shadow:
    """What waits for a packet in the other queue."""

    passage: Passage
    place: int
    "How many packets will have been taken out of that queue when it is the shadow's turn."
    extra_credit: int = 0
    "What the scheduler's credit would be for it, less what it is."
    is_waiting: bool = True


# For what is not watched: `super()` would take a tenth of all time.
_enqueue, _dequeue = DualPi2.enqueue, DualPi2.dequeue


class WatchedDualPi2(DualPi2):
    """A DualPI2 that reports the passages of the subject's packets.

    `ready_s` says when the link can serve the next packet, now or earlier if it can at once;
    `rate_at` says how many bits per second it serves at a time. Shadows draw from `shadow_rng`.
    """

    def __init__(
        self,
        *,
        rng: random.Random,
        shadow_rng: random.Random,
        watch: Watch,
        ready_s: Callable[[], float],
        rate_at: Callable[[float], float],
        scheduler: Literal["wrr", "time-shifted"] = "wrr",
        limit_packets: int = 10_000,
        bits_per_s: float | None = None,
    ) -> None:
        super().__init__(
            rng=rng, scheduler=scheduler, limit_packets=limit_packets, bits_per_s=bits_per_s
        )
        self._shadow_random = shadow_rng.random
        self._report = watch.report
        self._is_race = watch.is_race
        self._ready_s = ready_s
        self._rate_at = rate_at
        self._queues = (self._l, self._c)
        self._shadows: tuple[list[_Shadow], list[_Shadow]] = ([], [])
        "By the queue that they wait in, in order of entry."
        self._subjects: dict[int, _Shadow] = {}
        "By the identity of a packet of the subject that waits, its shadow."
        self._open = 0
        "How many passages are not yet reported; while there are none, nothing is counted."
        self._taken = [0, 0]
        "How many packets have been taken out of either queue."
        self._is_alone = False
        "Only shadows wait, and the link serves the last packet."

    def enqueue(self, now: float, packet: Packet) -> bool:
        """See `Queue.enqueue`."""
        if self._is_alone:
            self._serve_alone(now)
        if packet.flow != SUBJECT:
            return _enqueue(self, now, packet)
        queue = L if packet.ecn is Ecn.ECT_1 or packet.ecn is Ecn.CE else C
        passage = Passage(packet, now, queue, self._foretell(now))
        if not super().enqueue(now, packet):
            passage.wait_s[:] = inf, inf
            self._report(passage)
            return False
        other = 1 - queue
        shadow = _Shadow(passage, self._taken[other] + len(self._queues[other]))
        self._shadows[other].append(shadow)
        self._subjects[id(packet)] = shadow
        self._open += 1
        return True

    def dequeue(self, now: float) -> Packet | None:
        """See `Queue.dequeue`."""
        if not self._open:
            return _dequeue(self, now)
        if now >= self._next_update_s:
            self._update(now)
        packet: Packet | None = None
        while packet is None and (self._l or self._c):
            queue = L if self._l and (not self._c or self._is_turn_of_l()) else C
            winner = self._serve_shadows(now, queue)
            packet = self._take_head(now, queue) if winner is None else self._let_win(now, winner)
        if not self._l and not self._c:
            self._empty()
        return packet

    def _foretell(self, now: float) -> tuple[float, float]:
        """Return how long a packet would wait in L and in C if nothing else came, in seconds."""
        seconds_per_byte = 8 / self._rate_at(now)
        # On a link that stalls, when it goes on is not part of the state: a packet's time is.
        serving_s = min(max(self._ready_s() - now, 0.0), MTU_BYTES * seconds_per_byte)
        return (
            serving_s + self._bytes_before(now, L) * seconds_per_byte,
            serving_s + self._bytes_before(now, C) * seconds_per_byte,
        )

    def _bytes_before(self, now: float, queue: int) -> int:
        """Return how many bytes are served before a packet that enters a queue now."""
        last = Packet(b"", 0, entered_s=now)
        l_queue, c_queue = list(self._l), list(self._c)
        (l_queue if queue == L else c_queue).append(last)
        l_queue.reverse()
        c_queue.reverse()
        credit, served = self._credit, 0
        while True:
            if l_queue and (not c_queue or self._prefers_l(credit, l_queue[-1], c_queue[-1])):
                packet = l_queue.pop()
                credit += C_WEIGHT * packet.size if c_queue else 0
            else:
                packet = c_queue.pop()
                credit -= L_WEIGHT * packet.size if l_queue else 0
            if packet is last:
                return served
            served += packet.size

    def _prefers_l(self, credit: float, l_head: Packet, c_head: Packet) -> bool:
        """Return whether L is next, as `_is_turn_of_l` does, with these heads and this credit."""
        if self._is_wrr:
            return credit <= 0
        return l_head.entered_s - self._time_shift_s <= c_head.entered_s

    def _serve_shadows(self, now: float, queue: int) -> _Shadow | None:
        """Serve the shadows that go before the head of `queue`, which is next.

        In a race, return the first of them instead; where a packet could leave by either queue, it
        leaves by its own.
        """
        due: list[_Shadow] = []
        for of in (L, C):
            for shadow in self._shadows[of]:
                if shadow.place > self._taken[of]:
                    break  # A packet is in front of it, and of those behind.
                if of == queue or self._goes_before(shadow, queue):
                    due.append(shadow)
        if self._is_race:
            head = self._queues[queue][0]
            is_tie = any(shadow.passage.packet is head for shadow in due)
            return due[0] if due and not is_tie else None
        for shadow in due:
            self._serve(now, shadow)
        return None

    def _goes_before(self, shadow: _Shadow, queue: int) -> bool:
        """Return whether the scheduler would take a shadow in place of the other queue's head.

        The shadow is the head of its own queue; its packet is not counted.
        """
        packet, waiting = shadow.passage.packet, self._queues[queue]
        head = waiting[0]
        if head is packet:
            if len(waiting) == 1:
                return True
            head = waiting[1]
        credit = self._credit + shadow.extra_credit
        if queue == L:
            return not self._prefers_l(credit, head, packet)
        return self._prefers_l(credit, packet, head)

    def _drops(self, shadow: _Shadow) -> bool:
        """Decide whether a shadow is dropped, as is decided for a packet of its queue."""
        packet, queue = shadow.passage.packet, shadow.passage.queue
        left_bytes = self._backlog_bytes - (packet.size if id(packet) in self._subjects else 0)
        is_spared = queue == C and self._coupling * self._p <= 1  # It is in L, where it is marked.
        if left_bytes < self._min_backlog_bytes or is_spared:
            return False
        return self._shadow_random() < self._p and self._shadow_random() < self._p

    def _serve(self, now: float, shadow: _Shadow) -> None:
        passage = shadow.passage
        is_dropped = self._drops(shadow)
        self._end(shadow)
        passage.wait_s[1 - passage.queue] = inf if is_dropped else now - passage.entered_s
        if id(passage.packet) not in self._subjects:
            self._close(passage)

    def _end(self, shadow: _Shadow) -> None:
        shadow.is_waiting = False
        self._shadows[1 - shadow.passage.queue].remove(shadow)

    def _close(self, passage: Passage) -> None:
        self._open -= 1
        self._report(passage)

    def _take_head(self, now: float, queue: int) -> Packet | None:
        """Take a queue's head: it is marked, or dropped (None), as is decided for the queue."""
        head = self._queues[queue].popleft()
        self._taken[queue] += 1
        shadow = self._shadow_of(head)
        packet: Packet | None
        if shadow is not None and shadow.passage.queue != queue:
            packet = self._pass_moved(shadow)
        else:
            packet = self._pass_l(now, head) if queue == L else self._pass_c(head)
        if packet is not None:
            self._charge(head, queue)
        if shadow is not None:
            self._leave(now, shadow, queue, is_dropped=packet is None)
        return packet

    def _pass_moved(self, shadow: _Shadow) -> Packet | None:
        """Pass a packet or drop it (None) where its shadow waited, as is decided for a shadow."""
        packet = shadow.passage.packet
        is_dropped = self._drops(shadow)
        self._backlog_bytes -= packet.size
        if not is_dropped:
            return packet
        self._count_drops(1 - shadow.passage.queue, 1)
        return None

    def _count_drops(self, queue: int, number: int) -> None:
        if queue == L:
            self._l_drops += number
        else:
            self._c_drops += number

    def _shadow_of(self, packet: Packet) -> _Shadow | None:
        return self._subjects.get(id(packet)) if packet.flow == SUBJECT else None

    def _charge(self, packet: Packet, queue: int) -> None:
        """Change the credit for a packet that has left a queue, and what it would be for shadows.

        It changes where a packet waits in the other queue. Shadows there are packets to themselves,
        and their own packets are not there.
        """
        other = 1 - queue
        change = C_WEIGHT * packet.size if queue == L else -L_WEIGHT * packet.size
        waiting = self._queues[other]
        if not waiting:
            for shadow in self._shadows[other]:
                if shadow.passage.packet is not packet:
                    shadow.extra_credit += change
            return
        self._credit += change
        without = [self._shadow_of(packet)]
        if len(waiting) == 1:
            without.append(self._shadow_of(waiting[0]))
        for shadow_or_none in without:
            if shadow_or_none is not None:
                shadow_or_none.extra_credit -= change

    def _leave(self, now: float, shadow: _Shadow, queue: int, *, is_dropped: bool) -> None:
        """Take note that a packet of the subject has been taken out of its queue."""
        passage = shadow.passage
        passage.wait_s[queue] = inf if is_dropped else now - passage.entered_s
        if self._is_race and shadow.is_waiting:
            if is_dropped:
                self._move(shadow)
                return
            self._end(shadow)
        del self._subjects[id(passage.packet)]
        if not shadow.is_waiting:
            self._close(passage)

    def _move(self, shadow: _Shadow) -> None:
        """Let a packet that its own queue has dropped wait for real where its shadow has."""
        packet, other = shadow.passage.packet, 1 - shadow.passage.queue
        self._count_drops(1 - other, -1)  # It is not lost: not yet.
        self._backlog_bytes += packet.size
        self._queues[other].insert(shadow.place - self._taken[other], packet)
        shadows = self._shadows[other]
        for behind in shadows[shadows.index(shadow) + 1 :]:
            behind.place += 1
        self._end(shadow)
        self._take_credit(shadow)

    def _let_win(self, now: float, shadow: _Shadow) -> Packet | None:
        """Return the packet of a shadow that is first, or None if the shadow is dropped.

        Either way the queue keeps the credit of its wait, as it does with a packet.
        """
        passage, queue = shadow.passage, shadow.passage.queue
        is_dropped = self._drops(shadow)
        self._end(shadow)
        self._take_credit(shadow)
        passage.wait_s[1 - queue] = inf if is_dropped else now - passage.entered_s
        if is_dropped:
            return None
        packet, waiting = passage.packet, self._queues[queue]
        index = next(at for at, one in enumerate(waiting) if one is packet)
        del waiting[index]
        for other in self._shadows[queue]:
            other.place -= other.place > self._taken[queue] + index
        del self._subjects[id(packet)]
        self._backlog_bytes -= packet.size
        self._close(passage)
        self._charge(packet, 1 - queue)
        return packet

    def _take_credit(self, shadow: _Shadow) -> None:
        """Make the credit of a shadow the real one; that of the others stays what it is."""
        self._credit += shadow.extra_credit
        self._shift_extra(-shadow.extra_credit)

    def _shift_extra(self, by: int) -> None:
        for shadows in self._shadows:
            for shadow in shadows:
                shadow.extra_credit += by

    def _empty(self) -> None:
        """Start the credit anew, since no packet waits; shadows, if there are any, keep theirs."""
        self._shift_extra(self._credit - self._first_credit)
        self._credit = self._first_credit
        self._is_alone = bool(self._shadows[L] or self._shadows[C])

    def _serve_alone(self, now: float) -> None:
        """Serve the shadows if the link was free for them before a packet comes now."""
        self._is_alone = False
        ready_s = self._ready_s()
        if ready_s <= now:
            for shadow in [*self._shadows[L], *self._shadows[C]]:
                self._serve(ready_s, shadow)
