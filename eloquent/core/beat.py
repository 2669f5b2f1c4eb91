"""The beat: what either end sends while it hears nothing, so that a link's return is noticed.

Doubling timers notice the return of a link after an outage only when the outage has doubled. A
steady beat notices it within a beat, and costs a few small packets a second:

| | beat | after `STEADY_S` | after `SLOW_FROM_S` |
|---|---|---|---|
| client (a report) | 0.5 round trips + 50 ms | slack grows to 350 ms | every `SLOW_BEAT_S` |
| server (a bundle) | 1 round trip + 50 ms | slack grows to 350 ms | every `SLOW_BEAT_S` |

The client's beat goes up, and the first packet of it that arrives brings the backlog down: the
reader is up to date 1.5 round trips + 50 ms after the link's return (+ 300 ms after a long outage).
"""

SLACK_S = 0.05
STEADY_S = 8.0
MORE_SLACK_S = 0.3
MORE_SLACK_AFTER_S = 20.0
"For `STEADY_S` the beat's slack is `SLACK_S`; it grows by `MORE_SLACK_S` in the time after that."

SLOW_FROM_S = 120.0
SLOW_BEAT_S = 2.0
"After `SLOW_FROM_S` without a word a beat comes every `SLOW_BEAT_S`."

CLIENT_RTTS = 0.5
SERVER_RTTS = 1.0

QUIET_GAPS = 2.5
QUIET_MAX_S = 1.0
"""A client asks whether the link is alive when nothing has come for `QUIET_GAPS` token gaps. Each
answer doubles that time, up to `QUIET_MAX_S`: the model is silent, not the link."""

ANSWER_SLACK_S = 0.02

GAP_WEIGHT = 1 / 8

BEATS_PER_S = 1000.0
"What all outages together may cost a server, in packets a second."


def beat_s(silence_s: float, srtt_s: float, rtts: float) -> float:
    """Return how long to wait for the next beat after `silence_s` without a word."""
    if silence_s >= SLOW_FROM_S:
        return SLOW_BEAT_S
    grown = min(max(silence_s - STEADY_S, 0.0) / MORE_SLACK_AFTER_S, 1.0)
    return rtts * srtt_s + SLACK_S + MORE_SLACK_S * grown


class BeatLimit:
    """A token bucket for beats, shared by the connections of a server."""

    def __init__(self, beats_per_s: float = BEATS_PER_S) -> None:
        self._beats_per_s = beats_per_s
        self._left = beats_per_s
        self._updated_at = 0.0

    def take(self, now: float) -> bool:
        """Return whether a beat may go out at `now`, and count it."""
        earned = max(0.0, now - self._updated_at) * self._beats_per_s
        self._left = min(self._left + earned, self._beats_per_s)
        self._updated_at = max(now, self._updated_at)
        if self._left < 1:
            return False
        self._left -= 1
        return True


class ClientBeat:
    """When a client that hears nothing should report, though it has nothing new to say."""

    def __init__(self) -> None:
        self._heard_at = 0.0
        self._content_at: float | None = None
        self._gap_s = 0.1
        self._quiet_s: float | None = None
        self._beat_at: float | None = None
        self._beats = 0

    @property
    def beats(self) -> int:
        """How many beats have gone out since anything was heard."""
        return self._beats

    def on_heard(self, now: float, *, has_content: bool) -> None:
        """Take note that a packet came; `has_content`: it brought something of a turn."""
        if has_content:
            if self._content_at is not None:
                self._gap_s += GAP_WEIGHT * (min(now - self._content_at, 1.0) - self._gap_s)
            self._content_at = now
            self._quiet_s = None
        elif self._beats:
            self._quiet_s = min(2 * (self._quiet_s or QUIET_GAPS * self._gap_s), QUIET_MAX_S)
        self._heard_at = now
        self._beats = 0
        self._beat_at = None

    def next_time(self, srtt_s: float, ack_delay_s: float) -> float:
        """Return when the next beat is due; `ack_delay_s` is how long the server may take."""
        if self._beat_at is None:
            quiet_s = self._quiet_s or min(QUIET_GAPS * self._gap_s, QUIET_MAX_S)
            return self._heard_at + max(quiet_s, beat_s(0.0, srtt_s, CLIENT_RTTS))
        wait_s = beat_s(self._beat_at - self._heard_at, srtt_s, CLIENT_RTTS)
        if self._beats == 1:
            # The first is a question: give its answer time.
            wait_s = max(wait_s, srtt_s + ack_delay_s + ANSWER_SLACK_S)
        return self._beat_at + wait_s

    def on_beat(self, now: float) -> None:
        """Take note that a report went out, which the server will answer if it gets it."""
        if self._beat_at is None or now > self._beat_at:
            self._beats += 1
            self._beat_at = now
