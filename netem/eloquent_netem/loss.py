"""Loss: which packets a link drops.

Whatever depends on time here is a seeded function of time, so that the same seed hits every sender
at the same instants, however much or little it sends.
"""

import math
import random
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Protocol

SLOT_S = 0.001
"Bursts begin and end on multiples of this."


class Loss(Protocol):
    """Decides, packet by packet in order of time, what is dropped."""

    def drops(self, now: float) -> bool:
        """Return whether the packet that enters the link at `now` (seconds) is dropped."""

    def passes_from(self, now: float) -> float:
        """Return the first time, `now` or later, at which a packet could pass.

        It is the bound that no sender can beat. Independent loss bounds nothing: another packet
        at the same instant might pass. It may be asked about any time, past ones too.
        """


class PacketClockedLossWarning(UserWarning):
    """The loss in use steps with each packet, which makes senders incomparable."""


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


class GilbertElliott:
    """Drops in bursts: a good and a bad state take turns in time, whoever sends (Gilbert-Elliott).

    A two-state Markov chain steps once a slot of `slot_s`, from time 0 on, so that the state at an
    instant is a function of the seed alone. A steady sender loses the share `loss` in the mean; bad
    periods last `burst_s` in the mean. With the default losses within the states, everything is
    lost in a bad period and nothing outside it. Other values draw per packet, from a stream of
    their own that never shifts the periods.

    Both means are those of the limit: one answer of a few seconds sees more or less.

    Raises:
        ValueError: no such chain exists, or a value is out of range.
    """

    def __init__(
        self,
        *,
        loss: float,
        burst_s: float,
        rng: random.Random,
        loss_in_good: float = 0.0,
        loss_in_bad: float = 1.0,
        slot_s: float = SLOT_S,
    ) -> None:
        if not 0 < slot_s < math.inf:
            raise ValueError(f"a slot lasts more than 0 s, not {slot_s} s")
        if not slot_s <= burst_s < math.inf:
            raise ValueError(f"a burst lasts one slot of {slot_s} s or more, not {burst_s} s")
        self._chain = _Chain(loss, burst_s / slot_s, loss_in_good, loss_in_bad)
        self._slot_s = slot_s
        self._chain_rng = random.Random(rng.getrandbits(64))  # noqa: S311  (emulation)
        self._packet_rng = random.Random(rng.getrandbits(64))  # noqa: S311
        self._starts_bad = self._chain_rng.random() < self._chain.bad_share
        self._ends_s = array("d")
        "Where period 0, 1, ... ends; they take turns. Kept, since the oracle asks about the past."
        self._slots = 0.0
        "How many slots those periods have together."

    def drops(self, now: float) -> bool:
        """See `Loss.drops`."""
        is_bad, _ = self._period(now)
        return self._packet_rng.random() < self._chain.loss_in(is_bad)

    def passes_from(self, now: float) -> float:
        """See `Loss.passes_from`."""
        is_bad, end_s = self._period(now)
        return end_s if is_bad and self._chain.loss_in_bad == 1 else now

    def _period(self, now: float) -> tuple[bool, float]:
        """Return whether the period at `now` is bad, and when it ends."""
        while not self._ends_s or self._ends_s[-1] <= now:
            is_bad = self._is_bad(len(self._ends_s))
            self._slots += _geometric(self._chain.leaves(is_bad), self._chain_rng)
            self._ends_s.append(self._slots * self._slot_s)
        index = bisect_right(self._ends_s, now)
        return self._is_bad(index), self._ends_s[index]

    def _is_bad(self, index: int) -> bool:
        return self._starts_bad == (index % 2 == 0)


class PacketGilbertElliott(NoLoss):
    """Drops in bursts of packets: the chain of `GilbertElliott`, but it steps with each packet.

    For comparison with work that does it so (Linux netem's `loss gemodel`), and it warns: the chain
    stands still while nobody sends. Who sends more gets out of a burst sooner, and a sender that
    backs off sits in it for seconds. It bounds nobody (`passes_from`), since a burst is over once
    enough packets have been thrown at it.

    Raises:
        ValueError: no such chain exists, or a value is out of range.
    """

    def __init__(
        self,
        *,
        loss: float,
        burst_packets: float,
        rng: random.Random,
        loss_in_good: float = 0.0,
        loss_in_bad: float = 1.0,
    ) -> None:
        if not 1 <= burst_packets < math.inf:
            raise ValueError(f"a burst has 1 packet or more, not {burst_packets}")
        self._chain = _Chain(loss, burst_packets, loss_in_good, loss_in_bad)
        self._chain_rng = random.Random(rng.getrandbits(64))  # noqa: S311  (emulation)
        self._packet_rng = random.Random(rng.getrandbits(64))  # noqa: S311
        self._is_bad = self._chain_rng.random() < self._chain.bad_share
        warnings.warn(
            "This loss steps with each packet: its bursts stand still while nobody sends, so that "
            "it flatters a sender that sends more (repeats, probes) and hurts one that backs off, "
            "such as TCP. Do not compare senders with it; use GilbertElliott, which runs in time.",
            PacketClockedLossWarning,
            stacklevel=2,
        )

    def drops(self, now: float) -> bool:
        """See `Loss.drops`."""
        is_lost = self._packet_rng.random() < self._chain.loss_in(self._is_bad)
        self._is_bad ^= self._chain_rng.random() < self._chain.leaves(self._is_bad)
        return is_lost


class Outages:
    """Drops everything during given spans of time, and what `otherwise` drops outside them.

    `otherwise` decides on the packets of an outage too, so that an outage does not change what is
    lost after it.

    Raises:
        ValueError: a span ends before it begins.
    """

    def __init__(self, spans_s: Iterable[tuple[float, float]], otherwise: Loss) -> None:
        self._spans_s = merge_spans(spans_s)
        self._otherwise = otherwise

    def drops(self, now: float) -> bool:
        """See `Loss.drops`."""
        is_out = span_at(self._spans_s, now) is not None
        return self._otherwise.drops(now) or is_out

    def passes_from(self, now: float) -> float:
        """See `Loss.passes_from`."""
        while True:
            span = span_at(self._spans_s, now)
            over = now if span is None else span[1]
            passes = self._otherwise.passes_from(over)
            if passes == now:
                return now
            now = passes


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


def handover_spans(
    *, every_s: float, lasting_s: float, length_s: float, rng: random.Random
) -> list[tuple[float, float]]:
    """Return the spans of handovers that begin before `length_s`: for `Outages` or `PausedRate`.

    They begin `every_s` apart in the mean and last `lasting_s` each. The time from one's end to the
    next's begin varies uniformly by half of itself either way, and the first comes at any time
    within one such gap; so they never overlap.

    Raises:
        ValueError: they would overlap, or a value is out of range.
    """
    if not 0 < lasting_s < every_s < math.inf:
        raise ValueError(
            "handovers last more than 0 s and less than the time from one to the next: "
            f"{lasting_s} s every {every_s} s cannot be"
        )
    if not 0 <= length_s < math.inf:
        raise ValueError(f"a length is 0 s or more, not {length_s} s")
    gap_s = every_s - lasting_s
    spans = []
    start = rng.uniform(0, gap_s)
    while start < length_s:
        spans.append((start, start + lasting_s))
        start += lasting_s + rng.uniform(0.5, 1.5) * gap_s
    return spans


def merge_spans(spans_s: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the same instants as spans in order that neither overlap nor touch; none is empty.

    Raises:
        ValueError: a span ends before it begins.
    """
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans_s):
        if not start <= stop:
            raise ValueError(f"a span ends after it begins: {start} s to {stop} s cannot be")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return merged


def span_at(merged: Sequence[tuple[float, float]], now: float) -> tuple[float, float] | None:
    """Return the span of `merge_spans` that holds `now` (its start does, its stop does not)."""
    index = bisect_right(merged, (now, math.inf)) - 1
    return merged[index] if index >= 0 and now < merged[index][1] else None


class _Chain:
    """The probabilities of a good and a bad state that take turns, step by step."""

    def __init__(
        self, loss: float, burst_steps: float, loss_in_good: float, loss_in_bad: float
    ) -> None:
        if not 0 <= loss_in_good < loss_in_bad <= 1:
            raise ValueError(
                "the loss in a good period is at least 0 and below that in a bad one, which is at "
                f"most 1: {loss_in_good} and {loss_in_bad} cannot be"
            )
        if not loss_in_good <= loss < loss_in_bad:
            raise ValueError(
                f"the mean loss lies between that in good periods ({loss_in_good}) and, not "
                f"reaching it, that in bad ones ({loss_in_bad}): {loss} cannot be"
            )
        self.bad_share = (loss - loss_in_good) / (loss_in_bad - loss_in_good)
        "Of all steps."
        self.loss_in_good = loss_in_good
        self.loss_in_bad = loss_in_bad
        self._leaves_bad = 1 / burst_steps
        # In the long run as many steps lead into the bad state as out of it.
        self._leaves_good = self.bad_share / (1 - self.bad_share) * self._leaves_bad
        if math.isclose(self._leaves_good, 1):
            self._leaves_good = 1.0
        if self._leaves_good > 1:
            raise ValueError(
                f"bad periods of {burst_steps:g} steps cannot fill {self.bad_share:.3g} of all "
                "steps, since a good one lies between two of them: make the bursts longer or the "
                "loss smaller"
            )

    def loss_in(self, is_bad: bool) -> float:
        """Return the probability that a packet is lost."""
        return self.loss_in_bad if is_bad else self.loss_in_good

    def leaves(self, is_bad: bool) -> float:
        """Return the probability that the state changes at a step."""
        return self._leaves_bad if is_bad else self._leaves_good


def _geometric(probability: float, rng: random.Random) -> float:
    """Draw how many steps a state lasts that is left with `probability` at each."""
    if probability == 0:
        return math.inf
    if probability == 1:
        return 1.0
    return 1.0 + math.floor(math.log1p(-rng.random()) / math.log1p(-probability))
