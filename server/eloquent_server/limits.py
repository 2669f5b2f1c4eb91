"""How much a key may ask for. No clock here: `now` is an argument, in seconds."""

import math
from dataclasses import dataclass

from eloquent.errors import RequestError

MINUTE_S = 60.0

ROUNDING = 1e-6
"Whoever waits for as long as was said is not to hear that it was a microsecond too short."

TURN_ENDS_IN_S = 1.0
"How long to wait for one of one's own turns to end; nobody knows it better."


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What a key may have; None: as much as it likes."""

    turns: int | None = None
    "Turns that are generated at once."
    requests_per_minute: float | None = None
    "New turns; reading one again is free."
    burst: float | None = None
    "Requests at once after a rest; None: one minute's."
    bytes_per_minute: float | None = None
    "Of requests and answers, a minute's worth at once after a rest."


class TokenBucket:
    """Earns `rate_per_s` up to `burst`, and is full at first."""

    def __init__(self, rate_per_s: float, burst: float) -> None:
        """Both are above 0."""
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._level = burst
        self._updated_s = -math.inf

    def wait_s(self, now: float, amount: float = 1.0) -> float:
        """Return for how long there is less than `amount` in it; 0: there is enough.

        More than fits counts as all that fits, so that it can be had at all.
        """
        self._earn(now)
        missing = min(amount, self._burst) - self._level
        return missing / self._rate_per_s if missing > ROUNDING else 0.0

    def spend(self, now: float, amount: float = 1.0) -> None:
        """Take `amount` out, though there may be less: the rest is a debt."""
        self._earn(now)
        self._level -= amount

    def _earn(self, now: float) -> None:
        if now > self._updated_s:
            earned = (now - self._updated_s) * self._rate_per_s
            self._level = min(self._level + earned, self._burst)
            self._updated_s = now


class Usage:
    """What one key has taken, held against its limits."""

    def __init__(self, limits: KeyLimits, open_turns: int = 0) -> None:
        self.limits = limits
        self.open_turns = open_turns
        self._requests = _per_minute(limits.requests_per_minute, limits.burst)
        self._bytes = _per_minute(limits.bytes_per_minute)

    def refusal(self, now: float, body_bytes: int) -> tuple[str, RequestError] | None:
        """Return why a request is too much now, as a word for counters and an error; else None."""
        limits = self.limits
        if limits.turns is not None and self.open_turns >= limits.turns:
            return "turns", RequestError(
                "too_many_turns",
                f"This key has {self.open_turns} answers under way and may have {limits.turns}: "
                "wait for one to end, or cancel one.",
                TURN_ENDS_IN_S,
            )
        if self._requests is not None and (wait_s := self._requests.wait_s(now)):
            return "requests", _rate_limited("requests", limits.requests_per_minute, wait_s)
        if self._bytes is not None and (wait_s := self._bytes.wait_s(now, body_bytes)):
            return "bytes", _rate_limited("bytes", limits.bytes_per_minute, wait_s)
        return None

    def begin(self, now: float, body_bytes: int) -> None:
        """Count a turn that is admitted."""
        self.open_turns += 1
        if self._requests is not None:
            self._requests.spend(now)
        if self._bytes is not None:
            self._bytes.spend(now, body_bytes)

    def end(self, now: float, answer_bytes: int) -> None:
        """Count its end; what it took is a debt where it was more than was left."""
        self.open_turns -= 1
        if self._bytes is not None:
            self._bytes.spend(now, answer_bytes)


def _per_minute(rate: float | None, burst: float | None = None) -> TokenBucket | None:
    return None if rate is None else TokenBucket(rate / MINUTE_S, burst or max(rate, 1.0))


def _rate_limited(what: str, rate: float | None, wait_s: float) -> RequestError:
    return RequestError(
        "rate_limited",
        f"This key may have {rate:g} {what} a minute, and has had them: ask again in "
        f"{math.ceil(wait_s)} s.",
        wait_s,
    )
