"""A range set does what a plain set of integers does, in as few ranges as possible."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from eloquent.core.ranges import RangeSet

TOP = 40

bounds = st.integers(0, TOP)
changes = st.lists(st.tuples(st.booleans(), bounds, bounds), max_size=30)


def build(steps: list[tuple[bool, int, int]]) -> tuple[RangeSet, set[int]]:
    ranges, model = RangeSet(), set[int]()
    for is_addition, start, stop in steps:
        if is_addition:
            ranges.add(start, stop)
            model |= set(range(start, stop))
        else:
            ranges.subtract(start, stop)
            model -= set(range(start, stop))
    return ranges, model


def members(ranges: RangeSet | list[tuple[int, int]]) -> set[int]:
    return {number for start, stop in ranges for number in range(start, stop)}


@given(changes)
def test_add_and_subtract_agree_with_a_set(steps: list[tuple[bool, int, int]]) -> None:
    ranges, model = build(steps)
    assert members(ranges) == model
    assert bool(ranges) == bool(model)


@given(changes)
def test_ranges_are_sorted_merged_and_not_empty(steps: list[tuple[bool, int, int]]) -> None:
    ranges, _ = build(steps)
    assert all(start < stop for start, stop in ranges)
    assert all(stop < start for (_, stop), (start, _) in pairwise(ranges))


@given(changes, bounds)
def test_first_gap_is_the_lowest_absent_number(
    steps: list[tuple[bool, int, int]], start: int
) -> None:
    ranges, model = build(steps)
    assert ranges.first_gap(start) == min(set(range(start, TOP + 2)) - model)


@given(changes, bounds, bounds)
def test_gaps_are_the_absent_numbers(
    steps: list[tuple[bool, int, int]], start: int, stop: int
) -> None:
    ranges, model = build(steps)
    gaps = ranges.gaps(start, stop)
    assert members(gaps) == set(range(start, stop)) - model
    assert all(low < high for low, high in gaps)
    assert all(stop < start for (_, stop), (start, _) in pairwise(gaps))


def test_adjacent_ranges_become_one() -> None:
    ranges = RangeSet()
    ranges.add(0, 2)
    ranges.add(4, 6)
    assert list(ranges) == [(0, 2), (4, 6)]
    ranges.add(2, 4)
    assert list(ranges) == [(0, 6)]


def test_a_hole_splits_a_range() -> None:
    ranges = RangeSet()
    ranges.add(0, 10)
    ranges.subtract(3, 5)
    assert list(ranges) == [(0, 3), (5, 10)]
    assert repr(ranges) == "RangeSet([(0, 3), (5, 10)])"


def test_a_set_may_change_while_it_is_iterated() -> None:
    ranges = RangeSet()
    for start in (0, 10, 20):
        ranges.add(start, start + 5)
    for start, stop in ranges:
        ranges.subtract(start, stop)
    assert not ranges


def test_numbers_of_any_size() -> None:
    ranges = RangeSet()
    ranges.add(1 << 61, 1 << 62)
    assert ranges.gaps(0, 1 << 62) == [(0, 1 << 61)]
    assert ranges.first_gap(1 << 61) == 1 << 62
