"""How often and how long a session tries: to reach its server, and to climb to a better rung.

Times are the loop's, in seconds.
"""

RETRY_FIRST_S = 0.25
RETRY_MAX_S = 5.0
RETRY_GROWTH = 2.0
"A failed attempt to reconnect is followed by the next after these waits, each twice the last."

REFUSED_FOR_S = 5.0
MIN_REFUSALS = 4
"When so many refusals have come for so long, the server is gone, and its turns fail."

STOPPED_FOR_S = 60.0
"As long it is waited for where it said before that it stops: it is being restarted, or moved."

REFUSALS_APART_S = 30.0
"""Attempts without an answer do not take that back (machines limit how often they refuse); but
after so long without a refusal the next one is the first."""

RETRY_FOR_S = 300.0
"""After so much time of trying, refused or not, turns fail. As long a server goes on with a turn of
a client that vanished: its connection is over after 180 s, and the turn 120 s later."""

CLIMB_FIRST_S = 10.0
CLIMB_EVERY_S = 60.0
"On a rung below QUIC, a better one is tried after these times, and when the network changes."

CLIMB_GROWTH = 2.0
CLIMB_MAX_S = 600.0
CLIMB_GOOD_S = 300.0
"""Where QUIC did not last for `CLIMB_GOOD_S`, the first climb comes later each time: each switch
back costs the reader the two seconds until the silence is certain."""


class Retries:
    """Attempts to reach a server since it was last reached."""

    def __init__(self) -> None:
        self._wait_s = RETRY_FIRST_S
        self._spent_s = 0.0
        self._first_refused_s = self._last_refused_s = float("-inf")
        self._refusals = 0
        self._is_refused = False
        self._refused_for_s = REFUSED_FOR_S

    @property
    def is_over(self) -> bool:
        """Whether there is no use in going on."""
        refused_s = self._last_refused_s - self._first_refused_s
        is_gone = self._refusals >= MIN_REFUSALS and refused_s >= self._refused_for_s
        return (self._is_refused and is_gone) or self._spent_s >= RETRY_FOR_S

    def hurry(self) -> None:
        """Begin with short waits again: something has changed."""
        self._wait_s = RETRY_FIRST_S

    def on_stop(self) -> None:
        """Take note that the server said that it stops."""
        self._refused_for_s = STOPPED_FOR_S

    def on_failure(self, begun_s: float, now_s: float, *, is_refusal: bool) -> float:
        """Take note of an attempt that failed; return how long to wait before the next."""
        self._is_refused = is_refusal
        if is_refusal:
            if now_s - self._last_refused_s > REFUSALS_APART_S:
                self._first_refused_s, self._refusals = now_s, 0
            self._last_refused_s = now_s
            self._refusals += 1
        wait_s = self._wait_s
        self._wait_s = min(wait_s * RETRY_GROWTH, RETRY_MAX_S)
        self._spent_s += now_s - begun_s + wait_s
        return wait_s


class Climbs:
    """When to try QUIC again after a fall to a lower rung, on one way to the server."""

    def __init__(self) -> None:
        self._wait_s = CLIMB_FIRST_S
        self._quic_since_s: float | None = None

    def on_quic(self, now_s: float) -> None:
        """Take note that QUIC is in use."""
        if self._quic_since_s is None:
            self._quic_since_s = now_s

    def on_fall(self, now_s: float) -> float:
        """Take note that a lower rung is in use; return how long to wait before the climb."""
        if self._quic_since_s is not None and now_s - self._quic_since_s >= CLIMB_GOOD_S:
            self._wait_s = CLIMB_FIRST_S
        wait_s = self._wait_s
        if self._quic_since_s is not None:
            self._wait_s = min(wait_s * CLIMB_GROWTH, CLIMB_MAX_S)
        self._quic_since_s = None
        return wait_s
