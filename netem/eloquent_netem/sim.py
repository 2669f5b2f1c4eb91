"""The virtual-time simulator: actors that say when they want to act, and no clock."""

from collections.abc import Callable, Sequence
from typing import Protocol

from eloquent_netem.packet import Packet


class Actor(Protocol):
    """Something that acts at times of its own choosing."""

    def next_time(self) -> float | None:
        """Return when it wants to act next, in seconds, or None."""

    def act(self, now: float) -> None:
        """Do what is due at `now`."""


class CrossTraffic(Actor, Protocol):
    """Traffic that shares the links with the subject, in packets whose `flow` is not `SUBJECT`.

    It has no host: it puts its packets into the links by itself, and they end with the link.
    """

    def on_delivered(self, now: float, packet: Packet) -> None:
        """See a packet of cross traffic, any actor's, that came out of a link at `now`."""


class StuckError(RuntimeError):
    """The simulation did not reach its goal: nobody wants to act, or time ran out or stopped."""


MOST_STEPS_AT_ONCE = 100_000
"At one instant of virtual time; whoever needs more will never have done."


def simulate(
    actors: Sequence[Actor], *, until: Callable[[], bool], start_s: float, limit_s: float
) -> float:
    """Let the actors act, each at its time, until `until()` holds; return that time in seconds.

    Raises:
        StuckError: it did not come to hold by `limit_s`, or time stands still.
    """
    now, steps = start_s, 0
    while not until():
        times = [time for actor in actors if (time := actor.next_time()) is not None]
        if not times:
            raise StuckError(f"At {now:.3f} s nothing is left to happen.")
        steps = steps + 1 if min(times) <= now else 0
        if steps > MOST_STEPS_AT_ONCE:
            raise StuckError(f"At {now:.3f} s the actors act on and on, and time stands still.")
        now = max(now, min(times))
        if now > limit_s:
            raise StuckError(f"Not done after {limit_s} s of virtual time.")
        for actor in actors:
            time = actor.next_time()
            if time is not None and time <= now:
                actor.act(now)
    return now
