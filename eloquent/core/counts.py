"""Counts of all connections of a server since its start, for whoever runs it."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class LinkCounts:
    """Plain sums, which only grow; the connections of one endpoint share one."""

    bundles: int = 0
    "Bundles that were sent, repeats included."
    lost_bundles: int = 0
    "Of these, declared lost."
    late_bundles: int = 0
    "Of those, acknowledged after all."
    recovered_bundles: int = 0
    """Lost ones that were the first to carry some text, which other bundles carried by then, too:
    nobody had to wait for it to be sent again."""
    resent_bundles: int = 0
    "Lost ones of which something had to be sent again."
    datagrams_in: int = 0
    "UDP datagrams, of all kinds."
    bytes_in: int = 0
    "In them, without the headers of UDP and IP."
    datagrams_out: int = 0
    bytes_out: int = 0
    handshakes: int = 0
    "Connections that were begun."
    retries: int = 0
    "Clients that first had to show their address (RFC 9000 section 8.1.2)."
    given_up: int = 0
    "Connections that were not made in time, or idle, and had to make room for others."
    refused: int = 0
    "Connections that were refused because too many are open."
    refusals: Counter[str] = field(default_factory=Counter)
    "What readers were told instead of an answer, by code (`docs/protocol.md`)."
