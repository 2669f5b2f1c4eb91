"""How long a session goes on trying, without a loop."""

import pytest

from eloquent.session.retries import (
    MIN_REFUSALS,
    REFUSALS_APART_S,
    REFUSED_FOR_S,
    RETRY_FIRST_S,
    RETRY_FOR_S,
    RETRY_MAX_S,
    STOPPED_FOR_S,
    Retries,
)


def refused(retries: Retries, *times_s: float) -> bool:
    """Let attempts be refused at these times; return whether there is no use in going on."""
    for time_s in times_s:
        retries.on_failure(time_s, time_s, is_refusal=True)
    return retries.is_over


def test_waits_grow_until_something_changes() -> None:
    retries = Retries()
    waits = [retries.on_failure(0.0, 0.0, is_refusal=False) for _ in range(8)]
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, RETRY_MAX_S, RETRY_MAX_S, RETRY_MAX_S]
    retries.hurry()
    assert retries.on_failure(0.0, 0.0, is_refusal=False) == RETRY_FIRST_S


def test_refusals_for_five_seconds_are_enough() -> None:
    retries = Retries()
    assert not refused(retries, 10.0, 11.0, 12.0, 13.0)
    assert refused(retries, 10.0 + REFUSED_FOR_S)


def test_a_server_that_said_that_it_stops_is_waited_for() -> None:
    retries = Retries()
    retries.on_stop()
    count = int(STOPPED_FOR_S / RETRY_MAX_S)
    assert not refused(retries, *(10.0 + RETRY_MAX_S * number for number in range(count)))
    assert refused(retries, 10.0 + STOPPED_FOR_S)


def test_a_refusal_that_was_late_is_not_enough() -> None:
    """It was sent before this process was stopped."""
    retries = Retries()
    assert not refused(retries, *(10.0 + 10.0 * count for count in range(MIN_REFUSALS - 1)))


def test_attempts_without_an_answer_between_refusals_are_no_good_news() -> None:
    retries = Retries()
    refused(retries, 10.0, 10.5, 11.0)
    retries.on_failure(12.0, 17.0, is_refusal=False)
    assert not retries.is_over
    assert refused(retries, 18.0)


def test_refusals_far_apart_are_of_different_absences() -> None:
    retries = Retries()
    refused(retries, 10.0, 10.5, 11.0, 12.0)
    assert not refused(retries, 12.0 + REFUSALS_APART_S + 0.1)


def test_time_that_was_spent_is_bounded() -> None:
    retries, now_s = Retries(), 0.0
    while not retries.is_over:
        now_s += 5.0 + retries.on_failure(now_s, now_s + 5.0, is_refusal=False)
    assert now_s == pytest.approx(RETRY_FOR_S, abs=10.0)
