"""The simulator lets everyone act in time, in order, and says when it cannot go on."""

from collections.abc import Callable

import pytest

from eloquent_netem.sim import StuckError, simulate


class Scripted:
    """Acts at the given times and writes down when it did."""

    def __init__(self, times: list[float], seen: list[tuple[str, float]], name: str = "a") -> None:
        self.times = sorted(times)
        self._seen = seen
        self._name = name
        self.then: Callable[[float], None] = lambda now: None

    def next_time(self) -> float | None:
        return self.times[0] if self.times else None

    def act(self, now: float) -> None:
        assert self.times.pop(0) <= now
        self._seen.append((self._name, now))
        self.then(now)


def test_actors_act_in_order_of_time_and_then_of_their_list() -> None:
    seen: list[tuple[str, float]] = []
    actors = [Scripted([1.0, 3.0, 3.0], seen, "a"), Scripted([2.0, 3.0], seen, "b")]
    end = simulate(actors, until=lambda: len(seen) == 5, start_s=0.0, limit_s=10.0)
    assert seen == [("a", 1.0), ("b", 2.0), ("a", 3.0), ("b", 3.0), ("a", 3.0)]
    assert end == 3.0


def test_time_never_goes_back() -> None:
    seen: list[tuple[str, float]] = []
    actor = Scripted([5.0], seen)
    actor.then = lambda now: actor.times.append(float("-inf")) if len(seen) < 3 else None
    simulate([actor], until=lambda: len(seen) == 3, start_s=0.0, limit_s=10.0)
    assert [time for _, time in seen] == [5.0] * 3


def test_what_was_due_before_the_start_is_done_at_the_start() -> None:
    seen: list[tuple[str, float]] = []
    assert simulate([Scripted([0.0], seen)], until=lambda: bool(seen), start_s=1.0, limit_s=2) == 1
    assert seen == [("a", 1.0)]


def test_an_actor_woken_by_another_acts_at_the_same_time() -> None:
    seen: list[tuple[str, float]] = []
    later, earlier = Scripted([], seen, "later"), Scripted([], seen, "earlier")
    waker = Scripted([1.0], seen, "waker")
    waker.then = lambda now: (later.times.append(now), earlier.times.append(now))[0]
    simulate([earlier, waker, later], until=lambda: len(seen) == 3, start_s=0.0, limit_s=2.0)
    assert seen == [("waker", 1.0), ("later", 1.0), ("earlier", 1.0)]


def test_nothing_is_done_when_the_goal_is_reached_already() -> None:
    seen: list[tuple[str, float]] = []
    assert simulate([Scripted([1.0], seen)], until=lambda: True, start_s=0.5, limit_s=2.0) == 0.5
    assert seen == []


def test_it_says_so_when_nobody_wants_to_act() -> None:
    with pytest.raises(StuckError, match="nothing is left"):
        simulate([Scripted([1.0], [])], until=lambda: False, start_s=0.0, limit_s=10.0)


def test_it_says_so_when_time_runs_out() -> None:
    seen: list[tuple[str, float]] = []
    with pytest.raises(StuckError, match=r"after 2.0 s"):
        simulate([Scripted([1.0, 2.0, 2.5], seen)], until=lambda: False, start_s=0.0, limit_s=2.0)
    assert [time for _, time in seen] == [1.0, 2.0]


def test_actors_that_never_have_done_at_one_instant_are_stuck() -> None:
    seen: list[tuple[str, float]] = []
    actor = Scripted([5.0], seen)
    actor.then = actor.times.append
    with pytest.raises(StuckError, match=r"At 5\.000 s .* time stands still"):
        simulate([actor], until=lambda: False, start_s=0.0, limit_s=10.0)
