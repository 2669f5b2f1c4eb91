"""The beat of both ends through a silence, and what a server spends on it."""

from itertools import pairwise

import pytest

from eloquent.core.beat import (
    CLIENT_RTTS,
    MORE_SLACK_S,
    QUIET_MAX_S,
    SERVER_RTTS,
    SLACK_S,
    SLOW_BEAT_S,
    SLOW_FROM_S,
    BeatLimit,
    ClientBeat,
    beat_s,
)

RTT_S = 0.1
ACK_DELAY_S = 0.06


def beats(beat: ClientBeat, until_s: float) -> list[float]:
    """Let beats go out unanswered."""
    times = []
    while (due := beat.next_time(RTT_S, ACK_DELAY_S)) < until_s:
        beat.on_beat(due)
        times.append(due)
    return times


def streaming(gap_s: float = 0.03) -> ClientBeat:
    """A client that has just had the last of 100 tokens, at 10 s."""
    beat = ClientBeat()
    for token in range(100):
        now = 10.0 - gap_s * (99 - token)
        assert beat.next_time(RTT_S, ACK_DELAY_S) > now or token == 0
        beat.on_heard(now, has_content=True)
    return beat


@pytest.mark.parametrize("rtts", [CLIENT_RTTS, SERVER_RTTS])
def test_the_beat_is_steady_then_slower_and_slow_at_last(rtts: float) -> None:
    base = rtts * RTT_S
    assert beat_s(0.0, RTT_S, rtts) == pytest.approx(base + SLACK_S)
    assert beat_s(6.0, RTT_S, rtts) == pytest.approx(base + SLACK_S)
    assert beat_s(60.0, RTT_S, rtts) == pytest.approx(base + SLACK_S + MORE_SLACK_S)
    assert beat_s(SLOW_FROM_S, RTT_S, rtts) == SLOW_BEAT_S


def test_while_tokens_come_a_client_never_beats() -> None:
    for gap_s in (0.01, 0.03, 0.1):
        streaming(gap_s)


def test_a_client_that_hears_nothing_asks_once_and_then_beats() -> None:
    times = beats(streaming(), 12.0)
    assert 10.0 < times[0] <= 10.2
    assert times[1] - times[0] >= RTT_S + ACK_DELAY_S
    gaps = [later - earlier for earlier, later in pairwise(times[1:])]
    assert gaps == pytest.approx([CLIENT_RTTS * RTT_S + SLACK_S] * len(gaps))


def test_a_link_that_answers_is_asked_ever_more_rarely() -> None:
    beat, waits, now = streaming(), [], 10.0
    for _ in range(12):
        due = beat.next_time(RTT_S, ACK_DELAY_S)
        waits.append(due - now)
        beat.on_beat(due)
        now = due + RTT_S
        beat.on_heard(now, has_content=False)
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(QUIET_MAX_S)


def test_a_token_starts_the_questions_anew() -> None:
    beat = streaming()
    for _ in range(12):
        due = beat.next_time(RTT_S, ACK_DELAY_S)
        beat.on_beat(due)
        beat.on_heard(due + RTT_S, has_content=False)
    beat.on_heard(30.0, has_content=True)
    assert beat.next_time(RTT_S, ACK_DELAY_S) < 30.0 + 0.7


def test_a_limit_lets_a_second_s_worth_through_and_then_its_rate() -> None:
    limit = BeatLimit(beats_per_s=10)
    assert sum(limit.take(1.0) for _ in range(100)) == 10
    assert sum(limit.take(1.0 + 0.01 * tick) for tick in range(1, 501)) == pytest.approx(50, abs=1)
