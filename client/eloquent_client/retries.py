"""How often a turn is asked again that never began, and how long that waits."""

from random import Random

from eloquent.errors import EloquentError
from eloquent_client.errors import APIConnectionError, APIStatusError

MAX_RETRIES = 2
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 8.0
BACKOFF_GROWTH = 2.0

JITTER = 0.25
"Up to this share is taken off a wait, so that many clients do not come back at one moment."

MAX_RETRY_AFTER_S = 60.0
"A server that says to come back later than that gets no retry: the program is told instead."

RETRIED_CODES = frozenset({"overloaded", "rate_limited", "unavailable"})
"With these a server declines what it may well take a moment later."


class Retries:
    """Those of one turn; each is asked with the same id and secret, so it is generated once."""

    def __init__(self, most: int, rng: Random) -> None:
        """`most` may be 0: none. `rng` gives the jitter."""
        self._left = most
        self._rng = rng
        self._backoff_s = BACKOFF_FIRST_S

    def wait_s(self, error: EloquentError) -> float | None:
        """Return how many seconds to wait until the turn is asked again; None: let it fail."""
        if isinstance(error, APIStatusError):
            after_s = error.retry_after_s
            is_worth_it = error.code in RETRIED_CODES and after_s <= MAX_RETRY_AFTER_S
        else:
            after_s = 0.0
            is_worth_it = isinstance(error, APIConnectionError)
        if not is_worth_it or self._left <= 0:
            return None
        self._left -= 1
        backoff_s = self._backoff_s * (1 - JITTER * self._rng.random())
        self._backoff_s = min(self._backoff_s * BACKOFF_GROWTH, BACKOFF_MAX_S)
        return after_s + backoff_s
