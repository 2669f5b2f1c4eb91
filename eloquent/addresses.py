"""How many connections one address may have, so that one host cannot take all that there are."""

import ipaddress
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Generic, TypeVar

MAX_PER_ADDRESS = 1000
"A tenth of a server's connections: many people can be behind one address of a carrier's."

IPV6_PREFIX = 64
"What one customer has at least (RFC 6177), so its addresses count as one."

T = TypeVar("T")


@lru_cache(maxsize=1024)
def site_of(host: str) -> str:
    """Return what an address counts as: IPv6's its network, any other itself."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    network = int(address) >> (128 - IPV6_PREFIX) << (128 - IPV6_PREFIX)
    return f"{ipaddress.IPv6Address(network)}/{IPV6_PREFIX}"


def is_loopback(host: str) -> bool:
    """Return whether a host name or address always means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def first_of_largest(sites: Iterable[tuple[T, str]]) -> T | None:
    """Return the first of the site that has the most of them; None: there are none."""
    among = list(sites)
    crowds = Counter(site for _, site in among)
    first, _ = max(among, key=lambda each: crowds[each[1]], default=(None, ""))
    return first


class Sites(Generic[T]):
    """Where the connections of one endpoint come from."""

    def __init__(self, most: int) -> None:
        """`most` is how many each address may have."""
        self._most = most
        self._of: dict[T, str] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._of)

    def has_room(self, host: str) -> bool:
        """Return whether an address may have another connection."""
        return self._counts[site_of(host)] < self._most

    def first_of_largest(self, among: Iterable[T]) -> T | None:
        """Return the first of these connections of the address that has the most of them."""
        return first_of_largest((each, self._of[each]) for each in among if each in self._of)

    def begin(self, connection: T, host: str) -> None:
        """Count a connection for the address that it began at; it may move."""
        self._of[connection] = site_of(host)
        self._counts[self._of[connection]] += 1

    def done(self, connection: T) -> None:
        """Count it no more; a second call does nothing."""
        site = self._of.pop(connection, None)
        if site is not None:
            self._counts[site] -= 1
            if not self._counts[site]:
                del self._counts[site]
