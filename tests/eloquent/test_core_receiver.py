"""The receiver puts the log together whatever the path does, and says what it has."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent.core.events import Event, TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.receiver import (
    GAP_REPORT_S,
    MAX_AHEAD_BYTES,
    REPORT_BEAT_S,
    TIMED_REPORT_S,
    Receiver,
)
from eloquent.core.varint import VARINT_MAX
from eloquent.core.wire import MAX_ARRIVALS, Arrival, Bundle, Ended, Report, encode_report
from eloquent.errors import IntegrityError, WireError

TURN = 1
TOKEN_BYTES = 3
"Each token below is one letter: kind, length, letter."


def letters(text: str, *, closed: bool = False) -> TokenLog:
    log = TokenLog()
    for letter in text:
        log.append(TextDelta(letter))
    if closed:
        log.close("stop", model="m", prompt_tokens=1, completion_tokens=len(text))
    return log


def bundle(log: TokenLog, number: int, first: int, stop: int | None = None) -> Bundle:
    """The bundle with tokens `first` to `stop`, or to the log's end."""
    end = log.length if stop is None else stop * TOKEN_BYTES
    start = first * TOKEN_BYTES
    return Bundle(TURN, number, start, log.read(start, end))


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def report(receiver: Receiver) -> Report | None:
    """The report that is scheduled, made at its time."""
    time = receiver.next_time()
    return None if time is None else receiver.next_report(time)


# What comes out.


def test_in_order() -> None:
    log, receiver = letters("abc", closed=True), Receiver(TURN)
    assert text(receiver.on_bundle(bundle(log, 0, 0, 1), 0.0)) == "a"
    assert text(receiver.on_bundle(bundle(log, 1, 1, 3), 0.0)) == "bc"
    assert not receiver.is_complete
    assert receiver.on_bundle(bundle(log, 2, 3), 0.0) == [log.end]
    assert receiver.is_complete
    assert receiver.contiguous == log.length


def test_reordered() -> None:
    log, receiver = letters("abcd"), Receiver(TURN)
    assert receiver.on_bundle(bundle(log, 2, 2, 3), 0.0) == []
    assert receiver.on_bundle(bundle(log, 1, 1, 2), 0.0) == []
    assert receiver.contiguous == 0
    assert text(receiver.on_bundle(bundle(log, 0, 0, 1), 0.0)) == "abc"
    assert text(receiver.on_bundle(bundle(log, 3, 3, 4), 0.0)) == "d"


def test_overlapping() -> None:
    log, receiver = letters("abcdef"), Receiver(TURN)
    assert text(receiver.on_bundle(bundle(log, 0, 0, 2), 0.0)) == "ab"
    assert text(receiver.on_bundle(bundle(log, 1, 1, 4), 0.0)) == "cd"
    assert text(receiver.on_bundle(bundle(log, 2, 0, 6), 0.0)) == "ef"


def test_repeated() -> None:
    log, receiver = letters("ab"), Receiver(TURN)
    assert text(receiver.on_bundle(bundle(log, 0, 0), 0.0)) == "ab"
    assert receiver.on_bundle(bundle(log, 0, 0), 0.0) == []
    assert receiver.on_bundle(bundle(log, 1, 1), 0.0) == []
    assert receiver.contiguous == log.length


def test_a_gap_then_its_fill() -> None:
    log, receiver = letters("abcdef"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0, 1), 0.0)
    assert receiver.on_bundle(bundle(log, 2, 2, 4), 0.0) == []
    assert receiver.on_bundle(bundle(log, 3, 5, 6), 0.0) == []
    assert text(receiver.on_bundle(bundle(log, 4, 1, 2), 0.0)) == "bcd"
    assert text(receiver.on_bundle(bundle(log, 5, 3, 5), 0.0)) == "ef"


def test_a_bundle_may_end_within_an_event() -> None:
    log, receiver = letters("ab"), Receiver(TURN)
    assert receiver.on_bundle(Bundle(TURN, 0, 0, log.read(0, 2)), 0.0) == []
    assert receiver.contiguous == 2
    assert text(receiver.on_bundle(Bundle(TURN, 1, 2, log.read(2, 6)), 0.0)) == "ab"


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), max_size=25), st.randoms())
def test_any_pieces_in_any_order_give_the_log_once(
    pieces: list[tuple[int, int]], random: object
) -> None:
    log, receiver = letters("abcdefgh", closed=True), Receiver(TURN)
    everything = [*pieces, (0, 20), (10, 50), (45, log.length)]
    random.shuffle(everything)  # type: ignore[attr-defined]
    out: list[Event] = []
    for number, (start, size) in enumerate(everything):
        data = log.read(start, start + size)
        if data:
            out += receiver.on_bundle(Bundle(TURN, number, start, data), 0.0)
            assert receiver.contiguous <= log.length
    assert text(out) == "abcdefgh"
    assert out[-1] == log.end
    assert len(out) == 9


def test_data_too_far_ahead_is_dropped_and_reported_missing() -> None:
    log, receiver = letters("ab"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0, 1), 0.0)
    limit = TOKEN_BYTES + MAX_AHEAD_BYTES
    receiver.on_bundle(Bundle(TURN, 1, limit - 10, b"x" * 11), 0.0)
    assert report(receiver) == Report(TURN, TOKEN_BYTES, 1)
    # Nothing of it was kept: other bytes at the same place are taken as new ones.
    receiver.on_bundle(Bundle(TURN, 2, limit - 10, b"y" * 10), 0.0)
    assert receiver.stats.repeated_bytes == 0
    receiver.on_bundle(Bundle(TURN, 3, limit - 10, b"y" * 10), 0.0)
    assert receiver.stats.repeated_bytes == 10


def test_data_up_to_the_bound_is_kept() -> None:
    log = TokenLog()
    log.append(TextDelta("first"))
    size = log.length
    while log.length < size + MAX_AHEAD_BYTES - 1000:
        log.append(TextDelta("x" * 500))
    receiver = Receiver(TURN)
    receiver.on_bundle(Bundle(TURN, 1, size, log.read(size, log.length)), 0.0)
    receiver.on_bundle(Bundle(TURN, 0, 0, log.read(0, size)), 0.0)
    assert receiver.contiguous == log.length


def test_a_bundle_at_the_largest_offset_costs_no_memory() -> None:
    receiver = Receiver(TURN)
    largest = Bundle(TURN, VARINT_MAX - 1, VARINT_MAX - 1, b"x")
    assert receiver.on_bundle(largest, 0.0) == []
    said = report(receiver)
    assert said == Report(TURN, 0, VARINT_MAX - 1)
    encode_report(said)


# The end and its confirmation.


@pytest.mark.parametrize("is_early", [True, False])
def test_a_right_confirmation_before_or_after_the_end(is_early: bool) -> None:
    log, receiver = letters("a", closed=True), Receiver(TURN)
    assert log.end is not None
    said = Ended(log.end.length, log.end.digest)
    if is_early:
        receiver.on_ended(said)
        assert not receiver.is_complete
    receiver.on_bundle(bundle(log, 0, 0), 0.0)
    if not is_early:
        receiver.on_ended(said)
    assert receiver.is_complete


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize("is_length", [True, False])
def test_a_wrong_confirmation_before_or_after_the_end(is_early: bool, is_length: bool) -> None:
    log, receiver = letters("a", closed=True), Receiver(TURN)
    assert log.end is not None
    said = Ended(log.end.length + is_length, log.end.digest if is_length else bytes(16))
    if is_early:
        receiver.on_ended(said)
        with pytest.raises(IntegrityError, match="confirmation"):
            receiver.on_bundle(bundle(log, 0, 0), 0.0)
    else:
        receiver.on_bundle(bundle(log, 0, 0), 0.0)
        with pytest.raises(IntegrityError, match="confirmation"):
            receiver.on_ended(said)


@pytest.mark.parametrize("is_early", [True, False])
def test_an_offset_within_an_event_is_noticed_at_the_confirmation(is_early: bool) -> None:
    log = TokenLog()
    log.append(TextDelta("one"))
    log.append(TextDelta(" two three"))
    log.close("stop", model="m", prompt_tokens=1, completion_tokens=2)
    assert log.end is not None
    said = Ended(log.end.length, log.end.digest)
    offset = 2  # `o` is no kind of event, and `n` is a length that the answer has not
    receiver = Receiver(TURN, offset=offset)
    rest = Bundle(TURN, 0, offset, log.read(offset, log.length))
    if is_early:
        receiver.on_ended(said)
        with pytest.raises(IntegrityError, match="no event starts there"):
            receiver.on_bundle(rest, 0.0)
    else:
        receiver.on_bundle(rest, 0.0)
        with pytest.raises(IntegrityError, match="no event starts there"):
            receiver.on_ended(said)


def test_the_confirmation_may_come_between_the_last_text_and_the_end() -> None:
    log, receiver = letters("abc", closed=True), Receiver(TURN)
    assert log.end is not None
    receiver.on_bundle(bundle(log, 0, 0, 3), 0.0)
    receiver.on_ended(Ended(log.end.length, log.end.digest))
    assert not receiver.is_complete
    cut = log.end.length + 5
    receiver.on_bundle(Bundle(TURN, 1, 0, log.read(0, cut)), 0.0)
    assert receiver.on_bundle(Bundle(TURN, 2, cut, log.read(cut, log.length)), 0.0) == [log.end]


def test_bytes_after_the_end_are_a_wire_error() -> None:
    log, receiver = letters("a", closed=True), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0), 0.0)
    with pytest.raises(WireError):
        receiver.on_bundle(Bundle(TURN, 1, log.length, b"x"), 0.0)


@given(
    st.lists(
        st.builds(
            Bundle,
            st.just(TURN),
            st.integers(0, 20) | st.integers(0, VARINT_MAX - 1),
            st.integers(0, 40) | st.integers(0, VARINT_MAX - 20),
            st.binary(min_size=1, max_size=20),
        ),
        max_size=12,
    )
)
def test_any_bundles_give_events_or_a_documented_error(bundles: list[Bundle]) -> None:
    receiver = Receiver(TURN)
    try:
        for number, item in enumerate(bundles):
            receiver.on_bundle(item, float(number))
            said = receiver.next_report(float(number))
            if said is not None:
                encode_report(said)
            assert receiver.stats.loss_recovered >= 0
    except (WireError, IntegrityError):
        pass


# Reports.


def test_nothing_is_reported_before_a_bundle_came() -> None:
    receiver = Receiver(TURN)
    assert receiver.next_time() is None
    assert receiver.next_report(100.0) is None


def test_while_bundles_arrive_in_order_the_reports_keep_a_beat() -> None:
    log, receiver = letters("a" * 100), Receiver(TURN)
    reported_s = []
    for number in range(100):
        now = number * 0.02
        receiver.on_bundle(bundle(log, number, number, number + 1), now)
        if receiver.next_report(now) is not None:
            reported_s.append(now)
    gaps = [later - earlier for earlier, later in pairwise(reported_s)]
    assert reported_s[0] == pytest.approx(REPORT_BEAT_S, abs=0.02)
    assert all(REPORT_BEAT_S - 1e-9 <= gap <= REPORT_BEAT_S + 0.02 for gap in gaps)
    assert len(reported_s) == 7


def test_a_report_tells_contiguous_bytes_and_the_newest_bundle() -> None:
    log, receiver = letters("abcdef"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 7, 3, 4), 0.0)
    receiver.on_bundle(bundle(log, 2, 0, 2), 0.0)
    assert report(receiver) == Report(TURN, 2 * TOKEN_BYTES, 7)


def test_a_report_is_made_once() -> None:
    log, receiver = letters("a"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0), 0.0)
    assert receiver.next_report(REPORT_BEAT_S - 0.001) is None
    assert receiver.next_report(REPORT_BEAT_S) is not None
    assert receiver.next_time() is None
    assert receiver.next_report(100.0) is None


def test_a_gap_is_reported_at_once() -> None:
    log, receiver = letters("abcdef"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0, 1), 0.0)
    receiver.on_bundle(bundle(log, 2, 2, 3), 0.1)
    assert receiver.next_time() == 0.1
    assert receiver.next_report(0.1) == Report(TURN, TOKEN_BYTES, 2)


def test_reports_of_a_gap_keep_their_distance() -> None:
    log, receiver = letters("abcdef"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0, 1), 0.0)
    receiver.on_bundle(bundle(log, 2, 2, 3), 0.1)
    receiver.next_report(0.1)
    receiver.on_bundle(bundle(log, 3, 3, 4), 0.101)
    assert receiver.next_time() == pytest.approx(0.1 + GAP_REPORT_S)


def test_the_end_is_reported_at_once_and_so_is_each_repeat_of_it() -> None:
    log, receiver = letters("a", closed=True), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0, 1), 0.0)
    assert report(receiver) == Report(TURN, TOKEN_BYTES, 0)
    for number in range(1, 4):
        now = REPORT_BEAT_S + number * 2 * GAP_REPORT_S
        receiver.on_bundle(bundle(log, number, 0), now)
        assert receiver.next_time() == now
        assert receiver.next_report(now) == Report(TURN, log.length, number)


def test_reports_of_the_end_keep_their_distance() -> None:
    log, receiver = letters("a", closed=True), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0), 1.0)
    assert receiver.next_time() == pytest.approx(1.0 + GAP_REPORT_S)
    receiver.next_report(1.0 + GAP_REPORT_S)
    receiver.on_bundle(bundle(log, 1, 0), 1.0 + 1.5 * GAP_REPORT_S)
    assert receiver.next_time() == pytest.approx(1.0 + 2 * GAP_REPORT_S)


def test_a_lost_last_report_is_made_again_at_once() -> None:
    log, receiver = letters("a", closed=True), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0), 0.0)
    first = report(receiver)
    receiver.report_again()
    assert receiver.next_report(0.5) == first == Report(TURN, log.length, 0)


# Arrival times.


def timed(number: int) -> Bundle:
    return Bundle(TURN, number, 0, b"\x01\x01a", is_timed=True)


def test_arrivals_are_reported_within_10_ms_and_then_at_once() -> None:
    receiver = Receiver(TURN)
    receiver.on_bundle(timed(0), 5.0)
    assert receiver.next_time() == pytest.approx(5.0 + TIMED_REPORT_S)
    first = receiver.next_report(5.01)
    assert first is not None
    assert first.arrivals == (Arrival(0, 50_000),)
    assert receiver.next_time() is None
    receiver.on_bundle(timed(1), 5.5)
    assert receiver.next_time() == 5.5


def test_reports_of_arrivals_keep_their_distance_and_are_in_order_of_number() -> None:
    receiver = Receiver(TURN)
    receiver.on_bundle(timed(7), 1.0)
    assert report(receiver) is not None
    for number, now in ((9, 1.011), (8, 1.012)):
        receiver.on_bundle(timed(number), now)
    assert receiver.next_time() == pytest.approx(1.01 + TIMED_REPORT_S)
    second = report(receiver)
    assert second is not None
    assert second.arrivals == (Arrival(8, 10_120), Arrival(9, 10_110))


def test_what_does_not_fit_a_report_is_in_the_next() -> None:
    receiver = Receiver(TURN)
    for number in range(5):
        receiver.on_bundle(timed(number), 1.0)
    told: list[int] = []
    now = 1.01
    while (made := receiver.next_report(now, 2)) is not None:
        told += [arrival.number for arrival in made.arrivals]
        due = receiver.next_time()
        assert due is None or due == pytest.approx(now + TIMED_REPORT_S)
        now += TIMED_REPORT_S
    assert told == [0, 1, 2, 3, 4]


def test_arrivals_of_a_lost_report_are_told_again_at_once() -> None:
    receiver = Receiver(TURN)
    receiver.on_bundle(timed(0), 1.0)
    lost = report(receiver)
    assert lost is not None
    receiver.tell_again(lost.arrivals)
    assert receiver.next_time() == float("-inf")
    again = receiver.next_report(1.2)
    assert again is not None
    assert again.arrivals == lost.arrivals


def test_a_lost_report_without_arrivals_brings_no_other() -> None:
    log, receiver = letters("ab"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0), 1.0)
    lost = report(receiver)
    assert lost is not None
    receiver.tell_again(lost.arrivals)
    assert receiver.next_time() is None


def test_of_arrivals_that_cannot_be_reported_the_newest_are_kept() -> None:
    receiver = Receiver(TURN)
    for number in range(MAX_ARRIVALS + 50):
        receiver.on_bundle(timed(number), 1.0)
    made = report(receiver)
    assert made is not None
    assert [arrival.number for arrival in made.arrivals] == list(range(50, MAX_ARRIVALS + 50))


def test_on_a_new_connection_the_clock_is_another_and_nothing_old_is_told() -> None:
    receiver = Receiver(TURN)
    receiver.on_bundle(timed(4), 1.0)
    receiver.attach(9, clock_s=2.0)
    receiver.on_bundle(replace(timed(0), turn=9), 2.5)
    made = report(receiver)
    assert made is not None
    assert made.arrivals == (Arrival(0, 5_000),)


# Counters.


def test_bundles_that_were_not_missed_are_counted_as_recovered() -> None:
    log, receiver = letters("abcd"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0, 1), 0.0)
    assert receiver.stats.loss_recovered == 0
    receiver.on_bundle(bundle(log, 3, 0, 4), 0.0)
    assert receiver.stats.loss_recovered == 2
    assert receiver.stats.datagrams == 2


def test_a_bundle_that_comes_late_was_not_lost() -> None:
    log, receiver = letters("abcd"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 2, 0, 3), 0.0)
    assert receiver.stats.loss_recovered == 2
    receiver.on_bundle(bundle(log, 1, 0, 2), 0.0)
    receiver.on_bundle(bundle(log, 1, 0, 2), 0.0)
    assert receiver.stats.loss_recovered == 1


def test_a_loss_is_not_recovered_while_its_bytes_are_missing() -> None:
    log, receiver = letters("abcd"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0, 1), 0.0)
    receiver.on_bundle(bundle(log, 2, 2, 3), 0.0)
    assert receiver.stats.loss_recovered == 0
    receiver.on_bundle(bundle(log, 3, 1, 2), 0.0)
    assert receiver.stats.loss_recovered == 1


def test_repeated_bytes_are_counted() -> None:
    log, receiver = letters("abcdef"), Receiver(TURN)
    receiver.on_bundle(bundle(log, 0, 0, 2), 0.0)
    assert receiver.stats.repeated_bytes == 0
    receiver.on_bundle(bundle(log, 1, 0, 3), 0.0)  # a, b again
    assert receiver.stats.repeated_bytes == 2 * TOKEN_BYTES
    receiver.on_bundle(bundle(log, 2, 4, 5), 0.0)  # new, above a gap
    receiver.on_bundle(bundle(log, 3, 3, 6), 0.0)  # e again
    assert receiver.stats.repeated_bytes == 3 * TOKEN_BYTES
    receiver.on_bundle(bundle(log, 3, 3, 6), 0.0)  # d, e, f again
    assert receiver.stats.repeated_bytes == 6 * TOKEN_BYTES
