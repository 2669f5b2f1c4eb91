"""The loss estimate: quick to notice, slow to forget."""

import pytest

from eloquent.core.path import LOSS_WEIGHT, LOSSY_ABOVE, Path


def test_a_new_path_is_not_lossy() -> None:
    path = Path()
    assert path.loss == 0
    assert not path.is_lossy


def test_one_loss_makes_the_path_lossy() -> None:
    path = Path()
    path.on_outcome(lost=True)
    assert path.loss == pytest.approx(1 / 64)
    assert path.is_lossy


def test_a_single_loss_is_forgotten_after_some_70_bundles() -> None:
    path = Path()
    path.on_outcome(lost=True)
    bundles = 0
    while path.is_lossy:
        path.on_outcome(lost=False)
        bundles += 1
    assert 65 <= bundles <= 80


@pytest.mark.parametrize("every", [2, 5, 20])
def test_the_estimate_settles_near_the_true_share(every: int) -> None:
    path = Path()
    for number in range(2000):
        path.on_outcome(lost=number % every == 0)
    assert path.loss == pytest.approx(1 / every, abs=LOSS_WEIGHT)
    assert path.is_lossy


def test_rarer_losses_leave_the_path_clean_between_them() -> None:
    path = Path()
    clean = 0
    for number in range(4000):
        path.on_outcome(lost=number % 200 == 0)
        clean += not path.is_lossy
    assert clean > 2000
    assert path.loss < 2 * LOSSY_ABOVE
