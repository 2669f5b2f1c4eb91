"""Which codepoint each packet gets: the interface, and the policies that do not think.

RFC 9331 section 4.1: ECT(1) says that the sender answers marks as a scalable controller does, so
with a policy in place the connection's controller is Prague. Packets meant for the classic queue
go Not-ECT: Prague may not send ECT(0).
"""

from collections.abc import Callable
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


class MarkingPolicy(Protocol):
    """Chooses the queue of each packet; one for each connection."""

    def next_codepoint(self, now: float, size: int) -> Ecn:
        """Return ECT(1) or Not-ECT for the packet of `size` bytes that leaves at `now`."""

    def on_acked(self, now: float, packet: SentPacket) -> None:
        """Take note that a packet arrived; several may come with one acknowledgement."""

    def on_lost(self, packet: SentPacket) -> None:
        """Take note that a packet is taken for lost."""


class ConstantMarking:
    """Every packet alike."""

    def __init__(self, codepoint: Ecn) -> None:
        self._codepoint = codepoint

    def next_codepoint(self, now: float, size: int) -> Ecn:
        """See `MarkingPolicy`."""
        return self._codepoint

    def on_acked(self, now: float, packet: SentPacket) -> None:
        """See `MarkingPolicy`."""

    def on_lost(self, packet: SentPacket) -> None:
        """See `MarkingPolicy`."""


MakeMarking = Callable[[], MarkingPolicy]


def all_l() -> MarkingPolicy:
    """Return the policy that sends everything into the L queue."""
    return ConstantMarking(Ecn.ECT_1)


def all_c() -> MarkingPolicy:
    """Return the policy that sends everything into the classic queue, under Prague all the same."""
    return ConstantMarking(Ecn.NOT_ECT)


MARKINGS: dict[str, MakeMarking | None] = {"off": None, "l4s": all_l, "classic": all_c}
"By the names that `--ecn` takes; off: no marks, and not Prague."


def marking(name: str) -> MakeMarking | None:
    """Return what makes the policies of a name, or None for `off`.

    Raises:
        ConfigurationError: there is no such policy.
    """
    if name not in MARKINGS:
        raise ConfigurationError(
            f"There is no marking policy '{name}': choose one of {', '.join(MARKINGS)}."
        )
    return MARKINGS[name]
