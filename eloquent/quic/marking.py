"""Which codepoint each packet gets: the interface, and the policies that do not think.

RFC 9331 section 4.1: ECT(1) says that the sender answers marks as a scalable controller does, so
with a policy in place the connection's controller is Prague. Packets meant for the classic queue
go Not-ECT: Prague may not send ECT(0).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from eloquent.errors import ConfigurationError
from eloquent.quic.ecn import Ecn


class SentPacket(NamedTuple):
    """A packet as it left."""

    number: int
    "QUIC's packet number."
    sent_s: float
    size: int
    "Of the UDP payload, in bytes."
    codepoint: Ecn
    "What it left with; Not-ECT where the path does not carry marks, whatever the policy said."
    is_timed: bool = False
    """Whether the peer is to say when it comes. Of others, such as bare acknowledgements, it may
    never be known what became of them."""


class MarkingPolicy(Protocol):
    """Chooses the queue of each packet; one for each connection. Times in seconds."""

    @property
    def wants_times(self) -> bool:
        """Whether the peer is to report when bundles arrive: those who choose a queue need it."""

    def wants_copy(self, now: float) -> bool:
        """Return whether a bundle that leaves at `now` should be repeated at once.

        The copy may then go into the other queue; the earlier one renders.
        """

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        """Return ECT(1) or Not-ECT for the packet of `size` bytes that leaves at `now`.

        `is_copy`: it repeats the bundle of the packet before it.
        """

    def on_sent(self, packet: SentPacket) -> None:
        """Take note of a packet that left, with the codepoint that it has in the end."""

    def on_acked(self, now: float, packet: SentPacket) -> None:
        """Take note that a packet arrived; several may come with one acknowledgement."""

    def on_arrival(self, now: float, packet: SentPacket, arrived_s: float) -> None:
        """Take note of when a packet arrived by a clock of the peer's, which may be wrong."""

    def on_lost(self, now: float, packet: SentPacket) -> None:
        """Take note that a packet is taken for lost; it may be acknowledged after all."""

    def close(self) -> None:
        """Let go of what it holds: the connection is over. Twice is once."""


class Marking(Protocol):
    """What marks the packets of all connections of an endpoint."""

    def policy(self) -> MarkingPolicy:
        """Return a new connection's policy."""

    def settle(self, now: float) -> None:
        """Do, for all connections together, what the packets that have come by `now` ask for.

        It is called after each burst of them, when what they let leave has left.
        """


class PlainMarking(ABC):
    """A policy that wants nothing and takes note of nothing."""

    @property
    def wants_times(self) -> bool:
        """See `MarkingPolicy`."""
        return False

    def wants_copy(self, now: float) -> bool:
        """See `MarkingPolicy`."""
        return False

    @abstractmethod
    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        """See `MarkingPolicy`."""

    def on_sent(self, packet: SentPacket) -> None:  # noqa: B027  (most need no notes)
        """See `MarkingPolicy`."""

    def on_acked(self, now: float, packet: SentPacket) -> None:  # noqa: B027
        """See `MarkingPolicy`."""

    def on_arrival(self, now: float, packet: SentPacket, arrived_s: float) -> None:  # noqa: B027
        """See `MarkingPolicy`."""

    def on_lost(self, now: float, packet: SentPacket) -> None:  # noqa: B027
        """See `MarkingPolicy`."""

    def close(self) -> None:  # noqa: B027
        """See `MarkingPolicy`."""


class ConstantMarking(PlainMarking):
    """Every packet alike."""

    def __init__(self, codepoint: Ecn) -> None:
        self._codepoint = codepoint

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        """See `MarkingPolicy`."""
        return self._codepoint


@dataclass(frozen=True, slots=True)
class EachAlone:
    """A `Marking` whose connections have nothing in common."""

    make: Callable[[], MarkingPolicy]

    def policy(self) -> MarkingPolicy:
        """See `Marking`."""
        return self.make()

    def settle(self, now: float) -> None:
        """See `Marking`."""


def all_l() -> MarkingPolicy:
    """Return the policy that sends everything into the L queue."""
    return ConstantMarking(Ecn.ECT_1)


def all_c() -> MarkingPolicy:
    """Return the policy that sends everything into the classic queue, under Prague all the same."""
    return ConstantMarking(Ecn.NOT_ECT)


def swiftqueue() -> Marking:
    """Return what chooses the queue of each packet by what a model foretells of both.

    Raises:
        ConfigurationError: the model or a package is missing.
    """
    from eloquent.swiftqueue.serving import make  # numpy, and weights: only for who wants them

    return make()


MARKINGS: dict[str, Callable[[], Marking | None]] = {
    "off": lambda: None,
    "l4s": lambda: EachAlone(all_l),
    "classic": lambda: EachAlone(all_c),
    "swiftqueue": swiftqueue,
}
"By the names that `--ecn` takes; off: no marks, and not Prague."


def marking(name: str) -> Marking | None:
    """Return what marks an endpoint's packets, by its name, or None for `off`.

    Raises:
        ConfigurationError: there is no such policy, or it lacks something.
    """
    if name not in MARKINGS:
        raise ConfigurationError(
            f"There is no marking policy '{name}': choose one of {', '.join(MARKINGS)}."
        )
    return MARKINGS[name]()
