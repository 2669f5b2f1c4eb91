"""How much a key may have, in virtual time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_server.limits import ROUNDING, KeyLimits, TokenBucket, Usage

RATES = st.floats(0.01, 1000)
BURSTS = st.floats(1, 1000)


@given(
    rate=RATES,
    burst=BURSTS,
    asks=st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 20)), max_size=60),
)
def test_in_any_span_a_bucket_gives_no_more_than_its_rate_and_one_burst(
    rate: float, burst: float, asks: list[tuple[float, float]]
) -> None:
    """Whoever asks whenever: also from the middle of a run on, not only from its start."""
    bucket = TokenBucket(rate, burst)
    now, given_out = 0.0, []
    for pause_s, wanted in asks:
        now += pause_s
        amount = min(wanted, burst)
        if bucket.wait_s(now, amount) == 0:
            bucket.spend(now, amount)
            given_out.append((now, amount))
    for start, (began_s, _) in enumerate(given_out):
        total = 0.0
        for ended_s, amount in given_out[start:]:
            total += amount
            most = rate * (ended_s - began_s) + burst
            assert total <= most * (1 + 1e-9) + ROUNDING * len(given_out)


@given(rate=RATES, burst=BURSTS, spent=st.floats(0, 5000), amount=st.floats(0.1, 2000))
def test_whoever_waits_as_long_as_it_says_is_given_what_was_asked(
    rate: float, burst: float, spent: float, amount: float
) -> None:
    bucket = TokenBucket(rate, burst)
    bucket.spend(10.0, spent)
    wait_s = bucket.wait_s(10.0, amount)
    assert wait_s >= 0
    if wait_s > 0.01:
        assert bucket.wait_s(10.0 + 0.9 * wait_s, amount) > 0
    assert bucket.wait_s(10.0 + wait_s, amount) == 0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(1.0, 1.0)
    bucket.spend(100.0)
    assert bucket.wait_s(50.0) == pytest.approx(1.0)
    assert bucket.wait_s(100.0) == pytest.approx(1.0)


def codes(usage: Usage, times: list[float], body_bytes: int = 10) -> list[str]:
    """Ask at these times, and begin what is not refused; return what is said."""
    said = []
    for now in times:
        refused = usage.refusal(now, body_bytes)
        if refused is None:
            usage.begin(now, body_bytes)
        said.append("" if refused is None else refused[1].code)
    return said


def test_a_key_without_limits_may_have_anything() -> None:
    assert codes(Usage(KeyLimits()), [0.0] * 1000, 1 << 20) == [""] * 1000


def test_requests_above_the_rate_are_told_when_to_come_again() -> None:
    usage = Usage(KeyLimits(requests_per_minute=6, burst=2))
    assert codes(usage, [0, 0, 0]) == ["", "", "rate_limited"]
    refused = usage.refusal(4.0, 10)
    assert refused is not None
    assert refused[0] == "requests"
    assert refused[1].retry_after_s == pytest.approx(6.0)
    assert "6 requests a minute" in refused[1].message
    assert "in 6 s" in refused[1].message
    assert codes(usage, [10.0, 10.0]) == ["", "rate_limited"]


def test_a_slow_rate_lets_one_request_through_at_once() -> None:
    assert codes(Usage(KeyLimits(requests_per_minute=0.5)), [0, 0, 119, 120]) == [
        "",
        "rate_limited",
        "rate_limited",
        "",
    ]


def test_turns_at_once_are_counted_until_they_end() -> None:
    usage = Usage(KeyLimits(turns=2))
    assert codes(usage, [0, 0, 0]) == ["", "", "too_many_turns"]
    usage.end(1.0, 0)
    assert codes(usage, [1, 1]) == ["", "too_many_turns"]


def test_a_refused_request_costs_nothing() -> None:
    usage = Usage(KeyLimits(turns=1, requests_per_minute=60, burst=2))
    assert codes(usage, [0, 0, 0, 0]) == ["", *["too_many_turns"] * 3]
    usage.end(0.0, 0)
    assert codes(usage, [0]) == [""]


def test_the_bytes_of_answers_are_paid_afterwards() -> None:
    usage = Usage(KeyLimits(bytes_per_minute=600))
    assert codes(usage, [0], 100) == [""]
    usage.end(0.0, 1100)
    refused = usage.refusal(0.0, 100)
    assert refused is not None
    assert refused[0] == "bytes"
    assert refused[1].retry_after_s == pytest.approx(70.0)  # 600 owed, and 100 wanted, at 10/s
    assert codes(usage, [69.0, 70.0], 100) == ["rate_limited", ""]


def test_a_body_larger_than_a_minute_s_bytes_goes_through_after_a_rest() -> None:
    usage = Usage(KeyLimits(bytes_per_minute=600))
    assert codes(usage, [0, 60, 120], 1200) == ["", "rate_limited", ""]
    assert not math.isinf(usage.refusal(120.0, 1 << 20)[1].retry_after_s)  # type: ignore[index]
