"""Each loss model drops what it says."""

import os
import random
import subprocess
import sys
import warnings
from itertools import groupby, pairwise
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eloquent_netem.loss import (
    DropList,
    GilbertElliott,
    IndependentLoss,
    Loss,
    NoLoss,
    Outages,
    PacketClockedLossWarning,
    PacketGilbertElliott,
    handover_spans,
    merge_spans,
)

BURSTS = """
from eloquent_netem.link import stage_rng
from eloquent_netem.loss import GilbertElliott
loss = GilbertElliott(loss=0.2, burst_s=0.05, rng=stage_rng(7, "down", "loss"), loss_in_bad=0.8)
print([index for index in range(5000) if loss.drops(index * 0.003)])
"""

SLOT_S = 0.001

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


def test_an_outage_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2\.0 s to 1\.0 s cannot be"):
        Outages([(2.0, 1.0)], NoLoss())


@given(spans, st.integers(0, 30))
def test_merged_spans_hold_the_same_instants(found: list[tuple[float, float]], now: int) -> None:
    merged = merge_spans(found)
    assert any(start <= now < stop for start, stop in found) == any(
        start <= now < stop for start, stop in merged
    )
    assert all(start < stop for start, stop in merged)
    assert all(before[1] < after[0] for before, after in pairwise(merged))


def bursts(
    seed: int, loss: float = 0.1, burst_s: float = 0.05, loss_in_bad: float = 1.0
) -> GilbertElliott:
    rng = random.Random(seed)
    return GilbertElliott(loss=loss, burst_s=burst_s, rng=rng, loss_in_bad=loss_in_bad)


def slots(loss: Loss, length_s: float) -> list[bool]:
    """Return for each slot of a millisecond, asked in its middle, whether it drops."""
    return [loss.drops((index + 0.5) * SLOT_S) for index in range(round(length_s / SLOT_S))]


@given(
    st.integers(0, 1000),
    st.lists(st.floats(0, 20), max_size=60),
    st.lists(st.floats(0, 20), max_size=60),
)
def test_two_senders_meet_the_same_bursts_whenever_they_send(
    seed: int, first: list[float], second: list[float]
) -> None:
    lone, busy = bursts(seed), bursts(seed)
    fate = dict(zip(sorted(first), fates(lone, sorted(first)), strict=True))
    everything = sorted(first + second)
    for time, lost in zip(everything, fates(busy, everything), strict=True):
        assert lost == fate.get(time, lost)
        assert lost == bursts(seed).drops(time)


def test_a_burst_begins_and_ends_at_the_same_instant_for_a_slow_and_a_fast_sender() -> None:
    fast, slow = bursts(3), bursts(3)
    by_slot = slots(fast, 30.0)
    assert 10 < sum(before < after for before, after in pairwise(by_slot)) < 200
    assert slots(slow, 30.0)[::40] == by_slot[::40]
    late = bursts(3)
    assert [late.drops((index + 0.5) * SLOT_S) for index in range(0, 30_000, 977)] == by_slot[::977]


def test_draws_within_bursts_shift_no_burst() -> None:
    sure, leaky = bursts(3, loss=0.1), bursts(3, loss=0.05, loss_in_bad=0.5)
    certain, some = slots(sure, 60.0), slots(leaky, 60.0)
    assert all(bad for bad, lost in zip(certain, some, strict=True) if lost)
    assert sum(some) / sum(certain) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("loss", "burst_s"), [(0.01, 0.01), (0.05, 0.05), (0.1, 0.15), (0.5, 0.02), (0.9, 0.1)]
)
def test_bursts_have_the_share_and_the_mean_length_asked_for(loss: float, burst_s: float) -> None:
    length_s = 1000.0
    lost = slots(bursts(11, loss, burst_s), length_s)
    runs = {
        bad: [len(list(run)) * SLOT_S for is_bad, run in groupby(lost) if is_bad == bad]
        for bad in (True, False)
    }
    count = len(runs[True])
    # Lengths are geometric, so their deviation is about their mean; 4 standard errors.
    assert fmean(runs[True]) == pytest.approx(burst_s, rel=4 / count**0.5)
    assert fmean(runs[False]) == pytest.approx(burst_s * (1 - loss) / loss, rel=4 / count**0.5)
    # A share made of `count` good and bad periods in turn deviates by sqrt(2 / count) (1 - loss).
    assert fmean(lost) == pytest.approx(loss, rel=4 * (2 / count) ** 0.5 * (1 - loss))


def test_bursts_are_as_often_long_as_a_markov_chain_s() -> None:
    lost = slots(bursts(5, loss=0.2, burst_s=0.02), 2000.0)
    lengths = [len(list(run)) for is_bad, run in groupby(lost) if is_bad]
    for slots_long in (1, 10, 20, 60):
        expected = (1 - 1 / 20) ** slots_long
        share = fmean(length > slots_long for length in lengths)
        assert share == pytest.approx(expected, abs=4 * (0.25 / len(lengths)) ** 0.5)


def test_losses_within_both_periods_add_up_to_the_mean() -> None:
    rng = random.Random(2)
    loss = GilbertElliott(loss=0.1, burst_s=0.05, rng=rng, loss_in_good=0.02, loss_in_bad=0.6)
    assert fmean(slots(loss, 1000.0)) == pytest.approx(0.1, abs=0.01)
    assert loss.passes_from(3.0) == 3.0


def test_without_loss_no_burst_ever_comes() -> None:
    loss = bursts(1, loss=0.0)
    assert not any(fates(loss, [0.0, 1.0, 1e6]))
    assert loss.passes_from(1e7) == 1e7


@given(
    st.integers(0, 1000), st.floats(0, 10), st.sampled_from([0.1, 0.6]), st.sampled_from([1.0, 0.5])
)
def test_what_passes_first_after_a_burst_agrees_with_what_is_dropped(
    seed: int, now: float, loss: float, loss_in_bad: float
) -> None:
    chain = bursts(seed, loss * loss_in_bad, 0.02, loss_in_bad)
    passes = chain.passes_from(now)
    if loss_in_bad < 1:
        assert passes == now
        return
    assert passes >= now
    assert not chain.drops(passes)
    steps = [now + index * SLOT_S / 3 for index in range(5000)]
    for step in steps:
        assert chain.drops(step) or step >= passes
        if step >= passes:
            break


def test_the_oracle_may_look_ahead_and_back() -> None:
    asked, plain = bursts(4), bursts(4)
    ahead = asked.passes_from(500.0)
    assert slots(asked, 20.0) == slots(plain, 20.0)
    assert plain.passes_from(500.0) == ahead
    assert asked.passes_from(0.0) == bursts(4).passes_from(0.0)


def test_outages_and_bursts_together_say_when_a_packet_passes() -> None:
    found = handover_spans(every_s=0.2, lasting_s=0.1, length_s=50.0, rng=random.Random(1))
    loss = Outages(found, bursts(4, loss=0.5, burst_s=0.1))
    for index in range(400):
        now = index * 0.1
        passes = loss.passes_from(now)
        assert not loss.drops(passes)
        assert all(loss.drops(now + step * SLOT_S) for step in range(int((passes - now) / SLOT_S)))


def test_bursts_go_on_for_hours() -> None:
    loss, hours_s = bursts(6, loss=0.1, burst_s=0.1), 3 * 3600
    share = fmean(loss.drops(second / 5) for second in range(5 * hours_s))
    assert share == pytest.approx(0.1, abs=0.01)


def test_a_seed_gives_the_same_bursts_in_every_process() -> None:
    traces = {
        subprocess.run(
            [sys.executable, "-c", BURSTS],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1", "4242")
    }
    assert len(traces) == 1
    assert len(traces.pop()) > 1000


def test_a_seed_s_bursts_are_known() -> None:
    # Figures that were published with a seed stay reproducible.
    lost = slots(bursts(1), 2.0)
    edges = [index for index, (before, after) in enumerate(pairwise(lost)) if before != after]
    assert edges == [5, 156, 189, 431, 442, 1154, 1228, 1809, 1823]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss": -0.1}, "mean loss"),
        ({"loss": 1.0}, "mean loss"),
        ({"loss": float("nan")}, "mean loss"),
        ({"loss_in_good": 0.2}, "mean loss"),
        ({"loss": 0.5, "loss_in_bad": 0.5}, "mean loss"),
        ({"loss_in_good": 0.5, "loss_in_bad": 0.5}, "loss in a good period"),
        ({"loss_in_bad": 1.1}, "loss in a good period"),
        ({"loss_in_good": -0.1}, "loss in a good period"),
        ({"burst_s": 0.0005}, "a burst lasts"),
        ({"burst_s": float("inf")}, "a burst lasts"),
        ({"slot_s": 0.0}, "a slot lasts"),
        ({"loss": 0.9, "burst_s": 0.002}, "make the bursts longer"),
    ],
)
def test_an_impossible_chain_is_refused(options: dict[str, float], reason: str) -> None:
    values = {"loss": 0.1, "burst_s": 0.05} | options
    with pytest.raises(ValueError, match=reason):
        GilbertElliott(**values, rng=random.Random(1))


def test_the_tightest_chain_alternates() -> None:
    # 9 slots of every 10 are bad, in periods of 9 in the mean: each good one lasts a single slot.
    lost = slots(bursts(1, loss=0.9, burst_s=0.009), 20.0)
    assert {len(list(run)) for is_bad, run in groupby(lost) if not is_bad} == {1}


def packet_bursts(seed: int = 1, **options: float) -> PacketGilbertElliott:
    values = {"loss": 0.1, "burst_packets": 5.0} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PacketClockedLossWarning)
        return PacketGilbertElliott(**values, rng=random.Random(seed))


def test_loss_clocked_by_packets_warns_why() -> None:
    with pytest.warns(PacketClockedLossWarning, match=r"flatters .* hurts .* GilbertElliott"):
        PacketGilbertElliott(loss=0.1, burst_packets=5, rng=random.Random(1))


def test_loss_clocked_by_packets_has_the_share_and_burst_length_asked_for() -> None:
    lost = fates(packet_bursts(), [0.0] * 200_000)
    lengths = [len(list(run)) for is_bad, run in groupby(lost) if is_bad]
    assert fmean(lost) == pytest.approx(0.1, abs=0.01)
    assert fmean(lengths) == pytest.approx(5, rel=4 / len(lengths) ** 0.5)


def test_loss_clocked_by_packets_is_not_a_function_of_time() -> None:
    # What the warning is about: whoever waits out a burst finds it as it was.
    loss = packet_bursts(burst_packets=50.0)
    assert fates(loss, [0.0] * 2000) == fates(packet_bursts(burst_packets=50.0), [9.0] * 2000)
    assert loss.passes_from(2.0) == 2.0


def test_an_impossible_chain_of_packets_is_refused() -> None:
    with pytest.raises(ValueError, match="1 packet or more"):
        packet_bursts(burst_packets=0.5)
    with pytest.raises(ValueError, match="mean loss"):
        packet_bursts(loss=1.0)


def test_handovers_come_as_often_and_last_as_long_as_asked() -> None:
    found = handover_spans(every_s=15.0, lasting_s=2.0, length_s=30_000.0, rng=random.Random(1))
    starts = [start for start, _ in found]
    assert len(found) == pytest.approx(2000, rel=0.02)
    assert all(stop - start == pytest.approx(2.0) for start, stop in found)
    apart = [later - earlier for earlier, later in pairwise(starts)]
    assert 2.0 + 6.5 <= min(apart) < 9.5
    assert 20.5 < max(apart) <= 2.0 + 19.5
    assert 0 <= starts[0] < 13.0
    assert 29_970.0 < starts[-1] < 30_000.0


def test_handovers_are_a_function_of_their_random_stream() -> None:
    first, second, other = (
        handover_spans(every_s=15.0, lasting_s=2.0, length_s=300.0, rng=random.Random(seed))
        for seed in (1, 1, 2)
    )
    assert first == second != other
    assert handover_spans(every_s=15.0, lasting_s=2.0, length_s=0.0, rng=random.Random(1)) == []


@pytest.mark.parametrize(
    "options",
    [{"lasting_s": 15.0}, {"lasting_s": 0.0}, {"length_s": -1.0}, {"length_s": float("inf")}],
)
def test_impossible_handovers_are_refused(options: dict[str, float]) -> None:
    values = {"every_s": 15.0, "lasting_s": 2.0, "length_s": 60.0} | options
    with pytest.raises(ValueError, match=r"handovers last|a length is"):
        handover_spans(**values, rng=random.Random(1))
