"""What makes a path lossy or bursty, and for how long."""

import pytest

from eloquent.core.path import LOSS_MEMORY_BUNDLES, LOSS_WEIGHT, UNKNOWN_COPIES, Path


def test_a_new_path_is_unknown_and_not_lossy() -> None:
    path = Path()
    assert path.loss == 0
    assert not path.is_lossy
    assert path.is_unknown
    for _ in range(UNKNOWN_COPIES):
        path.note_copy()
    assert not path.is_unknown


def test_one_loss_makes_the_path_lossy_for_a_while() -> None:
    path = Path()
    path.on_outcome(lost=True)
    assert path.loss == pytest.approx(LOSS_WEIGHT)
    bundles = 0
    while path.is_lossy:
        path.on_outcome(lost=False)
        bundles += 1
    assert bundles == LOSS_MEMORY_BUNDLES


def test_losses_of_one_in_a_hundred_keep_it_lossy() -> None:
    path = Path()
    for number in range(4000):
        path.on_outcome(lost=number % 100 == 0)
        assert path.is_lossy


def test_a_loss_in_the_handshake_or_upwards_makes_it_lossy() -> None:
    path = Path()
    path.on_loss_elsewhere()
    assert path.is_lossy
    assert path.loss == 0


def test_losses_that_all_prove_wrong_do_not_leave_it_lossy() -> None:
    path = Path()
    for _ in range(3):
        path.on_outcome(lost=True)
    path.on_late()
    path.on_late()
    assert path.is_lossy
    path.on_late()
    assert not path.is_lossy
    path.on_outcome(lost=True)
    assert path.is_lossy


def test_losses_while_a_queue_stands_are_congestion_and_do_not() -> None:
    path = Path()
    path.has_queue = True
    path.on_outcome(lost=True)
    path.on_loss_elsewhere()
    assert not path.is_lossy
    assert path.loss == 0


@pytest.mark.parametrize("every", [2, 5, 20])
def test_the_estimate_settles_near_the_true_share(every: int) -> None:
    path = Path()
    for number in range(2000):
        path.on_outcome(lost=number % every == 0)
    assert path.loss == pytest.approx(1 / every, abs=LOSS_WEIGHT)


def test_pairs_that_share_their_fate_make_it_bursty() -> None:
    path = Path()
    for _ in range(20):
        path.on_pair(True, False)
        path.on_pair(False, True)
        path.on_pair(False, False)
    assert not path.is_bursty
    for _ in range(8):
        path.on_pair(True, True)
    assert path.is_bursty


def test_the_rate_is_the_window_in_a_round_trip_and_the_ack_delay() -> None:
    path = Path(srtt_s=0.1)
    assert path.bytes_per_s is None
    path.window_bytes, path.ack_delay_s = 1500, 0.05
    assert path.bytes_per_s == pytest.approx(10_000)


def test_silence_counts_from_when_an_acknowledgement_is_overdue() -> None:
    path = Path()
    assert path.silence_s(10.0) == 0
    path.waiting_since, path.probe_timeout_s = 9.0, 0.3
    assert path.silence_s(9.2) == 0
    assert path.silence_s(10.0) == pytest.approx(0.7)
