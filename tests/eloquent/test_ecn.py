"""The validation's state machine: every row of its table, and every way to fail."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent.quic.ecn import TEST_PACKETS, Ecn, EcnCounts, EcnState, EcnValidation


def sent(count: int, *, validation: EcnValidation | None = None) -> EcnValidation:
    """Return a validation that has seen so many packets leave with ECT(1)."""
    validation = EcnValidation() if validation is None else validation
    for _ in range(count):
        validation.on_sent(Ecn.ECT_1)
    return validation


def ack(
    validation: EcnValidation,
    new: int,
    counts: EcnCounts | None,
    *,
    raises_largest: bool = True,
) -> EcnCounts | None:
    for _ in range(new):
        validation.on_acked(Ecn.ECT_1)
    return validation.on_ack_frame(counts, raises_largest=raises_largest)


def test_a_new_path_is_tested_with_marks() -> None:
    assert EcnValidation().state is EcnState.TESTING
    assert EcnValidation().may_mark


def test_an_ack_whose_counts_account_for_what_it_acknowledges_proves_the_path() -> None:
    validation = sent(3)
    growth = ack(validation, 2, EcnCounts(ect1=2))
    assert growth == EcnCounts(ect1=2)
    assert validation.state is EcnState.CAPABLE


def test_ce_on_a_lone_packet_proves_the_path_and_is_reported() -> None:
    validation = sent(1)
    assert ack(validation, 1, EcnCounts(ce=1)) == EcnCounts(ce=1)
    assert validation.state is EcnState.CAPABLE


def test_after_the_test_packets_marking_pauses_until_an_ack_speaks() -> None:
    validation = sent(TEST_PACKETS)
    assert validation.state is EcnState.UNKNOWN
    assert not validation.may_mark
    ack(validation, 1, EcnCounts(ect1=1))
    assert validation.state is EcnState.CAPABLE
    assert validation.may_mark


@pytest.mark.parametrize(
    ("new", "counts", "why"),
    [
        (1, None, "without reporting"),
        (2, EcnCounts(), "cleared"),
        (3, EcnCounts(ect1=2), "cleared"),
        (2, EcnCounts(ect0=2), "cleared"),
        (1, EcnCounts(ect1=1, ect0=1), "more marks than were sent"),
        (1, EcnCounts(ect1=6), "more marks than were sent"),
        (1, EcnCounts(ect1=3, ce=3), "more marks than were sent"),
    ],
    ids=[
        *("no counts", "bleached", "one bleached", "remarked to ECT(0)"),
        *("ECT(0) never sent", "too many", "too many with CE"),
    ],
)
@pytest.mark.parametrize("packets", [5, TEST_PACKETS], ids=["testing", "unknown"])
def test_an_ack_that_disproves_the_marks(
    packets: int, new: int, counts: EcnCounts | None, why: str
) -> None:
    validation = sent(packets)
    if counts is not None and "more" in why and not counts.ect0:
        counts.ect1 += packets - 5
    assert ack(validation, new, counts) is None
    assert validation.state is EcnState.FAILED
    assert why in validation.failure
    assert not validation.may_mark


def test_a_path_that_begins_to_bleach_fails_later() -> None:
    validation = sent(8)
    ack(validation, 4, EcnCounts(ect1=4))
    ack(validation, 4, EcnCounts(ect1=6))
    assert validation.state is EcnState.FAILED


def test_counts_that_go_back_fail() -> None:
    validation = sent(8)
    ack(validation, 4, EcnCounts(ect1=4))
    ack(validation, 0, EcnCounts(ect1=3))
    assert validation.state is EcnState.FAILED


def test_counts_that_go_back_fail_though_their_sum_grows() -> None:
    validation = sent(8)
    ack(validation, 4, EcnCounts(ect1=2, ce=2))
    ack(validation, 2, EcnCounts(ect1=6, ce=1))
    assert validation.state is EcnState.FAILED


@pytest.mark.parametrize("counts", [None, EcnCounts(), EcnCounts(ect1=1)])
def test_an_ack_that_does_not_raise_the_largest_is_not_judged(counts: EcnCounts | None) -> None:
    validation = sent(8)
    ack(validation, 4, EcnCounts(ect1=4))
    assert ack(validation, 2, counts, raises_largest=False) is None
    assert validation.state is EcnState.CAPABLE
    assert ack(validation, 2, EcnCounts(ect1=8)) == EcnCounts(ect1=4)
    assert validation.state is EcnState.CAPABLE


def test_a_lost_ack_leaves_counts_that_are_ahead() -> None:
    validation = sent(8)
    ack(validation, 2, EcnCounts(ect1=2))
    ack(validation, 3, EcnCounts(ect1=4, ce=3))
    assert validation.state is EcnState.CAPABLE


@pytest.mark.parametrize("counts", [None, EcnCounts()])
def test_an_ack_of_unmarked_packets_says_nothing(counts: EcnCounts | None) -> None:
    validation = sent(2)
    ack(validation, 0, counts)
    assert validation.state is EcnState.TESTING


def test_a_path_that_drops_all_marked_packets_and_lets_others_through_fails() -> None:
    validation = sent(TEST_PACKETS)
    for _ in range(TEST_PACKETS):
        validation.on_lost()
    assert validation.state is EcnState.UNKNOWN  # nothing got through: an outage, maybe
    ack(validation, 0, None)
    assert validation.state is EcnState.FAILED
    assert "vanish" in validation.failure


def test_what_is_left_in_flight_is_known() -> None:
    validation = sent(5)
    ack(validation, 2, EcnCounts(ect1=2))
    validation.on_lost()
    assert validation.in_flight == 2


def test_the_first_report_on_a_later_path_is_where_counting_begins() -> None:
    validation = sent(4, validation=EcnValidation(carried=3))
    ack(validation, 0, EcnCounts(ect1=500, ect0=7))
    assert validation.state is EcnState.TESTING
    ack(validation, 4, EcnCounts(ect1=507, ect0=7))  # three of them had been under way
    assert validation.state is EcnState.CAPABLE


def test_a_later_path_with_nothing_under_way_begins_at_the_first_report_too() -> None:
    validation = sent(4, validation=EcnValidation(carried=0))
    ack(validation, 1, EcnCounts(ect1=501))
    ack(validation, 3, EcnCounts(ect1=504))
    assert validation.state is EcnState.CAPABLE


def test_nothing_is_heard_after_failure() -> None:
    validation = sent(4)
    ack(validation, 1, None)
    assert ack(validation, 3, EcnCounts(ect1=4)) is None
    assert validation.state is EcnState.FAILED


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=60))
def test_an_honest_path_never_fails(packets: list[tuple[bool, bool, bool]]) -> None:
    """Any pattern of loss, marks and lost ACKs: (arrives, with CE, its ACK arrives)."""
    validation = EcnValidation()
    counts, unacked = EcnCounts(), 0
    for arrives, is_congested, is_acked in packets:
        marked = validation.may_mark
        if marked:
            validation.on_sent(Ecn.ECT_1)
        if not arrives:
            if marked:
                validation.on_lost()
            continue
        if marked:
            counts.add(Ecn.CE if is_congested else Ecn.ECT_1)
            unacked += 1
        if is_acked:
            reported = EcnCounts(counts.ect0, counts.ect1, counts.ce) if counts.total else None
            ack(validation, unacked, reported)
            unacked = 0
    if counts.total:
        assert validation.state is not EcnState.FAILED
