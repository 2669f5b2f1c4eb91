"""Whether forecasts deserve to be followed: a model may be wrong about a path it has never seen."""

import math
from collections import deque

CALIBRATION_WINDOW = 256
"Forecasts that are remembered with what became of them,"
CALIBRATION_MIN = 100
"and how many there must be for a verdict."
DEVIATIONS = 4.0
"A share of misses is too high beyond so many standard deviations of a binomial one."
RUN_LENGTH = 10
"Misses come in runs, as packets of one burst: so many observations count as one."
MISS_SHARE = 0.1
MISS_S = 0.002
"A delay misses a quantile when it is above it by more than this share and time."

DISTRUST_S = 5.0
DISTRUST_MAX_S = 300.0
"Nothing is believed for so long, after each fault twice as long, up to the most."
TRUSTED_AFTER_S = 60.0
"After so long without a fault the next one is the first again."


class Calibration:
    """Whether delays exceed their forecast quantiles as seldom as the quantiles' levels say."""

    def __init__(self, levels: tuple[float, ...]) -> None:
        self._chances = tuple(1 - level for level in levels)
        self._window: deque[tuple[bool, ...]] = deque()
        self._misses = [0] * len(levels)

    def add(self, delay_s: float, quantiles_s: tuple[float, ...]) -> None:
        """Take note of a queueing delay and of what was foretold for it, a value for each level."""
        missed = tuple(
            delay_s > quantile_s * (1 + MISS_SHARE) + MISS_S for quantile_s in quantiles_s
        )
        self._window.append(missed)
        self._count(missed, 1)
        if len(self._window) > CALIBRATION_WINDOW:
            self._count(self._window.popleft(), -1)

    def fault(self) -> str:
        """Return what is wrong with the forecasts, or nothing."""
        count = len(self._window)
        if count < CALIBRATION_MIN:
            return ""
        for chance, misses in zip(self._chances, self._misses, strict=True):
            deviation = math.sqrt(chance * (1 - chance) * RUN_LENGTH / count)
            if misses / count > chance + DEVIATIONS * deviation:
                return (
                    f"{misses} of {count} packets took longer than {1 - chance:.0%} of them should"
                )
        return ""

    def _count(self, missed: tuple[bool, ...], step: int) -> None:
        for index, is_miss in enumerate(missed):
            self._misses[index] += step * is_miss


class Backoff:
    """How long nothing is believed after a fault."""

    def __init__(self) -> None:
        self._length_s = DISTRUST_S
        self._until_s = -math.inf

    def begin(self, now: float) -> float:
        """Return how many seconds nothing is to be believed from `now` on."""
        if now - self._until_s > TRUSTED_AFTER_S:
            self._length_s = DISTRUST_S
        length_s = self._length_s
        self._until_s = now + length_s
        self._length_s = min(2 * length_s, DISTRUST_MAX_S)
        return length_s

    def is_over(self, now: float) -> bool:
        """Return whether trust may begin anew."""
        return now >= self._until_s
