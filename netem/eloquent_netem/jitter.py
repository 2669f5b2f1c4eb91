"""Jitter that keeps packets in order: a delay that is a function of time, alike for all senders."""

import random

from eloquent_netem.loss import SLOT_S


class JitterInOrder:
    """A delay that wanders between 0 and `most_s`, at each instant uniform over seeds.

    Delays of packets drawn one by one, with each packet waiting for the one in front of it, would
    grow with the number of packets. So the delay is the link's: it moves in a straight line through
    a slot of time, to any place on a circle of twice `most_s`, whose two halves are the way up and
    the way down. A slot lasts `most_s`, 1 ms at least, so the delay never falls faster than time
    passes, which is what keeps the order; and after a slot it has forgotten where it was.

    Raises:
        ValueError: `most_s` is below 0.
    """

    def __init__(self, most_s: float, rng: random.Random) -> None:
        if not most_s >= 0:
            raise ValueError(f"jitter is at least 0 s, not {most_s}")
        self._most_s = most_s
        self._slot_s = max(most_s, SLOT_S)
        self._rng = rng
        self._slot = 0
        self._start = rng.uniform(0, 2)
        "Where it is on the circle at the slot's begin, in units of `most_s`."
        self._step = rng.uniform(-1, 1)

    def at(self, now: float) -> float:
        """Return the delay at `now`, in seconds; times never go back. Before 0 it stands still."""
        if self._most_s == 0:
            return 0.0
        slots = max(now, 0.0) / self._slot_s
        while self._slot + 1 <= slots:
            self._slot += 1
            self._start = (self._start + self._step) % 2
            self._step = self._rng.uniform(-1, 1)
        place = (self._start + self._step * (slots - self._slot)) % 2
        return self._most_s * (1 - abs(1 - place))
