"""A set of half-open integer ranges, kept sorted and merged."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class RangeSet:
    """Which bytes (or numbers) are in a set, as few ranges as possible."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __repr__(self) -> str:
        return f"RangeSet({list(self)})"

    def add(self, start: int, stop: int) -> None:
        """Put in all of `start <= x < stop`; an empty range changes nothing."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def subtract(self, start: int, stop: int) -> None:
        """Take out all of `start <= x < stop`."""
        if start >= stop:
            return
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last:
            return
        kept = [
            (low, high)
            for low, high in ((self._starts[first], start), (stop, self._stops[last - 1]))
            if low < high
        ]
        self._starts[first:last] = [low for low, _ in kept]
        self._stops[first:last] = [high for _, high in kept]

    def first_gap(self, start: int = 0) -> int:
        """Return the lowest number not below `start` that is not in the set."""
        index = bisect_right(self._starts, start) - 1
        return max(start, self._stops[index]) if index >= 0 else start

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the ranges within `start..stop` that are not in the set."""
        found: list[tuple[int, int]] = []
        for low, high in zip(self._starts, self._stops, strict=True):
            if low >= stop:
                break
            if high > start:
                if low > start:
                    found.append((start, low))
                start = high
        if start < stop:
            found.append((start, stop))
        return found
