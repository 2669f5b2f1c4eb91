"""What one acknowledgement says, and what is to be sent for it."""

from dataclasses import dataclass
from enum import Enum, auto


class Repeat(Enum):
    """What to send after an ACK."""

    NOTHING = auto()
    NEW = auto()
    "New data if there is any (F-RTO), lost segments otherwise."
    LOST = auto()


@dataclass(slots=True)
class AckNews:
    """What one ACK says."""

    una_before: int
    has_data: bool = False
    has_echo: bool = False
    "ECN: the receiver has seen congestion."
    advances: bool = False
    has_acked: bool = False
    "A whole segment was acknowledged."
    has_sacked: bool = False
    has_sacked_original: bool = False
    "Of what was sent before the recovery began, something arrived that was never repeated."
    has_acked_repeat: bool = False
    has_duplicate: bool = False
    "A DSACK: a retransmission was in vain."
    has_duplicate_probe: bool = False
    lost_repeat: bool = False
    echo_ms: int = 0
    sets_timer: bool = False
    wait_s: float = 0.0
    "Reordered segments have this long still to come (RACK); 0: nothing is awaited."

    @property
    def is_duplicate_ack(self) -> bool:
        """Whether it says nothing but that something has arrived."""
        return not (self.advances or self.has_data or self.has_acked or self.has_duplicate)

    @property
    def is_dubious(self) -> bool:
        """Whether it needs a closer look."""
        return (
            not (self.has_data or self.has_acked)
            or self.has_sacked
            or self.has_echo
            or self.has_duplicate
        )
