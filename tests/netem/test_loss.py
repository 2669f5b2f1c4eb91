"""Each loss model drops what it says."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_netem.loss import DropList, IndependentLoss, Loss, NoLoss, Outages

spans = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 6)).map(
        lambda pair: (float(pair[0]), float(sum(pair)))
    ),
    max_size=5,
)


def fates(loss: Loss, times: list[float]) -> list[bool]:
    return [loss.drops(time) for time in times]


def test_no_loss_drops_nothing() -> None:
    assert not any(fates(NoLoss(), [0.0, 1.0, 2.0]))
    assert NoLoss().passes_from(3.0) == 3.0


@pytest.mark.parametrize("probability", [0.01, 0.2, 0.9])
def test_independent_loss_drops_its_share(probability: float) -> None:
    loss = IndependentLoss(probability, random.Random(1))
    lost = fates(loss, [0.0] * 20_000)
    assert sum(lost) / 20_000 == pytest.approx(probability, abs=0.01)


def test_independent_loss_does_not_depend_on_the_packet_before() -> None:
    lost = fates(IndependentLoss(0.2, random.Random(1)), [0.0] * 20_000)
    after_a_loss = [later for earlier, later in pairwise(lost) if earlier]
    assert sum(after_a_loss) / len(after_a_loss) == pytest.approx(0.2, abs=0.02)


def test_independent_loss_bounds_nobody() -> None:
    assert IndependentLoss(0.9, random.Random(1)).passes_from(2.0) == 2.0


def test_independent_loss_is_a_function_of_its_random_stream() -> None:
    first, second = (IndependentLoss(0.5, random.Random(5)) for _ in range(2))
    assert fates(first, [0.0] * 50) == fates(second, [float(time) for time in range(50)])


@pytest.mark.parametrize("probability", [-0.1, 1.0, 1.5])
def test_an_impossible_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="loss probability"):
        IndependentLoss(probability, random.Random(1))


def test_an_outage_drops_from_its_start_to_before_its_stop() -> None:
    loss = Outages([(5.0, 6.0), (1.0, 2.0)], NoLoss())
    times = [0.9, 1.0, 1.9, 2.0, 4.9, 5.0, 5.9, 6.0]
    assert fates(loss, times) == [False, True, True, False, False, True, True, False]


@pytest.mark.parametrize(
    ("now", "passes"), [(0.5, 0.5), (1.0, 2.0), (1.5, 2.0), (2.0, 2.0), (5.5, 7.0), (6.5, 7.0)]
)
def test_a_packet_passes_from_the_end_of_an_outage_on(now: float, passes: float) -> None:
    # The last two spans meet: whoever waits in one waits for both.
    assert Outages([(6.0, 7.0), (1.0, 2.0), (5.0, 6.0)], NoLoss()).passes_from(now) == passes


@given(spans, spans, st.integers(0, 30))
def test_what_passes_first_is_not_dropped_and_nothing_before_it_passes(
    outer: list[tuple[float, float]], inner: list[tuple[float, float]], now: int
) -> None:
    loss = Outages(outer, Outages(inner, NoLoss()))
    passes = loss.passes_from(now)
    assert passes >= now
    assert not loss.drops(passes)
    step = now + 0.25
    while step < passes:
        assert loss.drops(step)
        step += 0.25


def test_an_outage_does_not_change_what_is_lost_outside_it() -> None:
    times = [index * 0.01 for index in range(300)]
    plain = fates(IndependentLoss(0.3, random.Random(9)), times)
    outage = fates(Outages([(1.0, 2.0)], IndependentLoss(0.3, random.Random(9))), times)
    assert outage[:100] == plain[:100]
    assert all(outage[100:200])
    assert outage[200:] == plain[200:]


def test_a_drop_list_drops_the_packets_named() -> None:
    loss = DropList([0, 3])
    assert fates(loss, [0.0] * 6) == [True, False, False, True, False, False]
    assert loss.passes_from(7.0) == 7.0


def test_a_drop_list_counts_the_packets_of_an_outage_too() -> None:
    loss = Outages([(0.0, 1.0)], DropList([2]))
    assert fates(loss, [0.0, 0.5, 1.0, 1.5]) == [True, True, True, False]
