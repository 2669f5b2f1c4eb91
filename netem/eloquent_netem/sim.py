"""The virtual-time simulator: actors that say when they want to act, and no clock."""

from collections.abc import Callable, Sequence
from typing import Protocol


class Actor(Protocol):
    """Something that acts at times of its own choosing."""

    def next_time(self) -> float | None:
        """Return when it wants to act next, in seconds, or None."""

    def act(self, now: float) -> None:
        """Do what is due at `now`."""


class StuckError(RuntimeError):
    """The simulation did not reach its goal: nobody wants to act, or time ran out."""


def simulate(
    actors: Sequence[Actor], *, until: Callable[[], bool], start_s: float, limit_s: float
) -> float:
    """Let the actors act, each at its time, until `until()` holds; return that time in seconds.

    Raises:
        StuckError: it did not come to hold by `limit_s`.
    """
    now = start_s
    while not until():
        times = [time for actor in actors if (time := actor.next_time()) is not None]
        if not times:
            raise StuckError(f"At {now:.3f} s nothing is left to happen.")
        now = max(now, min(times))
        if now > limit_s:
            raise StuckError(f"Not done after {limit_s} s of virtual time.")
        for actor in actors:
            time = actor.next_time()
            if time is not None and time <= now:
                actor.act(now)
    return now
