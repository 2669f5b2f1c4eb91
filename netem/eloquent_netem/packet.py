"""What travels over a link."""

from dataclasses import dataclass
from enum import IntEnum


class Ecn(IntEnum):
    """The ECN field of the IP header (RFC 3168 section 5, RFC 9331)."""

    NOT_ECT = 0
    ECT_1 = 1
    "L4S: the sender's congestion control is scalable."
    ECT_0 = 2
    CE = 3
    "Congestion experienced: set on the way."


IP_UDP_HEADER_BYTES = 28
"IPv4 and UDP headers of one packet."

SUBJECT = 0
"Flow 0 is the traffic under test; cross traffic has the others."


@dataclass(slots=True)
class Packet:
    """One IP packet; a queue may change `ecn` to CE, nothing else changes."""

    data: bytes
    "What the driver carries: a UDP payload or a whole IP packet. The link does not look into it."
    size: int
    "Bytes on the wire, IP header included: what rates and queues count."
    ecn: Ecn = Ecn.NOT_ECT
    flow: int = SUBJECT
    entered_s: float = 0.0
    "When it entered the link, in seconds; the link sets it."
    fate: tuple[float, bool, float] = (0.0, False, 0.0)
    "Jitter of its own in seconds, whether it arrives twice, and its copy's; the link draws them."


def udp_packet(payload: bytes, ecn: Ecn = Ecn.NOT_ECT, flow: int = SUBJECT) -> Packet:
    """Return a packet with a UDP payload, counted with IPv4 and UDP headers."""
    return Packet(payload, len(payload) + IP_UDP_HEADER_BYTES, ecn, flow)
