"""Who may ask, and how much: what the hub asks before a reader gets anything."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose turns they are; ids of turns are scoped by it."""

    name: str
    weight: float = 1.0
    "The part of the engine against others'; above 0."


class Admission(Protocol):
    """Knows the keys and the limits; its methods do not block."""

    def principal(self, key: str) -> Principal:
        """Return who asks with a key; "" is no key. Asked for each reader, of old turns too.

        Raises:
            RequestError: `unauthorized`.
        """

    def named(self, name: str) -> Principal:
        """Return whose a stored turn is; the key may be gone by now."""

    def admit(self, principal: Principal, body_bytes: int) -> None:
        """Allow a new turn; `ended` follows when it is over.

        Raises:
            RequestError: `rate_limited`, `too_many_turns` or `overloaded`; it is not counted then.
        """

    def ended(self, principal: Principal) -> None:
        """Take note that a turn that was admitted is generated no more."""


class Open:
    """Everybody is the same, and may ask as much as the machine can do; an `Admission`."""

    def principal(self, key: str) -> Principal:
        """See `Admission.principal`."""
        return LOCAL

    def named(self, name: str) -> Principal:
        """See `Admission.named`."""
        return Principal(name)

    def admit(self, principal: Principal, body_bytes: int) -> None:
        """See `Admission.admit`."""

    def ended(self, principal: Principal) -> None:
        """See `Admission.ended`."""


LOCAL = Principal("local")
