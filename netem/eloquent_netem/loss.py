"""Loss: which packets a link drops."""

import random
from collections.abc import Sequence
from typing import Protocol


class Loss(Protocol):
    """Decides, packet by packet in order of time, what is dropped."""

    def drops(self, now: float) -> bool:
        """Return whether the packet that enters the link at `now` (seconds) is dropped."""

    def passes_from(self, now: float) -> float:
        """Return the first time, `now` or later, at which a packet could pass.

        It is the bound that no sender can beat. Independent loss bounds nothing: another packet
        at the same instant might pass.
        """


class NoLoss:
    """Drops nothing."""

    def drops(self, now: float) -> bool:
        """See `Loss.drops`."""
        return False

    def passes_from(self, now: float) -> float:
        """See `Loss.passes_from`."""
        return now


class IndependentLoss(NoLoss):
    """Drops each packet with the same probability, whatever happened to others (Bernoulli)."""

    def __init__(self, probability: float, rng: random.Random) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"a loss probability is at least 0 and below 1, not {probability}")
        self._probability = probability
        self._rng = rng

    def drops(self, now: float) -> bool:
        """See `Loss.drops`."""
        return self._rng.random() < self._probability


class Outages:
    """Drops everything during given spans of time, and what `otherwise` drops outside them.

    `otherwise` decides on the packets of an outage too, so that an outage does not change what is
    lost after it.
    """

    def __init__(self, spans_s: Sequence[tuple[float, float]], otherwise: Loss) -> None:
        self._spans_s = sorted(spans_s)
        self._otherwise = otherwise

    def drops(self, now: float) -> bool:
        """See `Loss.drops`."""
        is_out = any(start <= now < stop for start, stop in self._spans_s)
        return self._otherwise.drops(now) or is_out

    def passes_from(self, now: float) -> float:
        """See `Loss.passes_from`."""
        for start, stop in self._spans_s:
            if start <= now < stop:
                now = stop
        later = self._otherwise.passes_from(now)
        return later if later == now else self.passes_from(later)


class DropList:
    """Drops the packets with the given indices (the first is 0): for tests of single losses."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._indices = frozenset(indices)
        self._count = 0

    def drops(self, now: float) -> bool:
        """See `Loss.drops`."""
        index = self._count
        self._count += 1
        return index in self._indices

    def passes_from(self, now: float) -> float:
        """See `Loss.passes_from`."""
        return now
