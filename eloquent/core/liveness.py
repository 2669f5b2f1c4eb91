"""How soon a dead link is noticed, and how a live one is told from it while the model is quiet.

A link lives while what one sends is answered: packets that come prove only that one of its two
ways lives. Whoever has a turn open and gets no answer asks, and the other side acknowledges at once
whatever its model does. Both ends do this, so that both know of a link of which one way is dead.
With 20 % of the packets lost each way a question and its answer get through with probability 0.64;
at 300 ms of round trip eleven or more of them fit between `PROBE_AFTER_S` and `DEAD_AFTER_S`, so
that a live link is taken for dead about once in ten hours at most.
"""

PROBE_AFTER_S = 0.5
FIRST_PROBE_S = 0.2
PROBE_EVERY_S = 0.08
"""While a turn is open and nothing was answered that was sent in the last `PROBE_AFTER_S`, either
end asks the other, waits `FIRST_PROBE_S` for the answer, and then asks every `PROBE_EVERY_S`."""

DEAD_AFTER_S = 1.8
DEAD_AFTER_RTTS = 2.5
MAX_DEAD_AFTER_S = 5.0
"A link on which nothing is answered that was sent so long ago is dead; see `dead_after_s`."

KEEPALIVE_S = 20.0
"""Without an open turn a client that hears nothing sends a PING this often: within the 30 s for
which common NATs keep an idle mapping of UDP."""

TRY_S = 0.5
TRY_RTTS = 2.0
"""After a change of network or a sleep a link has to say something within `TRY_S` and `TRY_RTTS`
round trips, or another one is made beside it."""


def probe_again_s(unanswered_s: float) -> float:
    """Return how long to wait after a probe that was sent after `unanswered_s` without answer."""
    is_first = unanswered_s < PROBE_AFTER_S + PROBE_EVERY_S
    return FIRST_PROBE_S if is_first else PROBE_EVERY_S


def dead_after_s(srtt_s: float) -> float:
    """Return how long an answer may take; a path of more than half a second has more time."""
    return min(max(DEAD_AFTER_S, PROBE_AFTER_S + DEAD_AFTER_RTTS * srtt_s), MAX_DEAD_AFTER_S)
