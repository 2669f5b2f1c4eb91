"""What went over a link: a digest of the packet trace, and capture to pcap files.

`Captured` stands where a link stands and tells observers of every packet that goes in or comes
out. `TraceDigest.observe` and `PcapWriter.observe` are such observers.
"""

import hashlib
import ipaddress
import struct
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import BinaryIO, Protocol

from eloquent_netem.packet import SUBJECT, Ecn, Packet

NS_PER_S = 1_000_000_000

Address = tuple[str, int]
"An IPv4 address and a UDP port."

CLIENT: Address = ("192.0.2.1", 49152)
SERVER: Address = ("198.51.100.1", 4433)
"What synthesised headers name (addresses for documentation, RFC 5737)."


class Fate(StrEnum):
    """What an entry of a packet trace says about its packet."""

    SENT = "sent"
    "It entered the link."
    DELIVERED = "delivered"
    "It came out; one that never does was lost, one that does twice was duplicated."


class PacketLink(Protocol):
    """What drivers need of a link."""

    def send(self, now: float, packet: Packet) -> None:
        """Put a packet in at `now` (seconds, never going back)."""

    def next_time(self) -> float | None:
        """Return when something happens next, in seconds, or None."""

    def poll(self, now: float) -> list[Packet]:
        """Return the packets that have come out by `now`."""


Observer = Callable[[float, str, Packet, Fate], None]
"Takes time in seconds, direction, packet and fate."


class Captured:
    """A link that is watched; `direction` names it in the trace ("up" or "down").

    Observers hear of the subject's packets, not of cross traffic, which may enter unwatched.
    """

    def __init__(self, link: PacketLink, direction: str, observers: Sequence[Observer]) -> None:
        self._link = link
        self._direction = direction
        self._observers = tuple(observers)

    def send(self, now: float, packet: Packet) -> None:
        """See `PacketLink.send`."""
        self._tell(now, packet, Fate.SENT)
        self._link.send(now, packet)

    def next_time(self) -> float | None:
        """See `PacketLink.next_time`."""
        return self._link.next_time()

    def poll(self, now: float) -> list[Packet]:
        """See `PacketLink.poll`."""
        packets = self._link.poll(now)
        for packet in packets:
            self._tell(now, packet, Fate.DELIVERED)
        return packets

    def _tell(self, now: float, packet: Packet, fate: Fate) -> None:
        if packet.flow != SUBJECT:
            return
        for observer in self._observers:
            observer(now, self._direction, packet, fate)


class TraceDigest:
    """A running hash of a packet trace: equal digests, equal traces.

    It covers time (rounded to ns), direction, size, ECN and fate of each entry, in order, and
    not what packets carry, which in QUIC is random. It is BLAKE2b of the entries' encoding and
    so the same in every process.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._entries = 0

    @property
    def entries(self) -> int:
        """How many entries it covers."""
        return self._entries

    def add(self, time_s: float, direction: str, size: int, ecn: Ecn, fate: str) -> None:
        """Add an entry; `size` is in bytes."""
        time_ns = round(time_s * NS_PER_S)
        self._hash.update(f"{time_ns} {direction} {size} {int(ecn)} {fate}\n".encode())
        self._entries += 1

    def observe(self, now: float, direction: str, packet: Packet, fate: Fate) -> None:
        """See `Observer`."""
        self.add(now, direction, packet.size, packet.ecn, fate)

    def hexdigest(self) -> str:
        """Return the digest of what was added so far: 32 hexadecimal digits."""
        return self._hash.hexdigest()


ToIp = Callable[[str, Packet], bytes]
"Makes a whole IP packet of a packet that goes in the given direction."


def udp_to_ip(direction: str, packet: Packet) -> bytes:
    """Give a UDP payload headers between `CLIENT` and `SERVER`, whence "down" comes."""
    source, destination = (SERVER, CLIENT) if direction == "down" else (CLIENT, SERVER)
    return ipv4_udp(source, destination, packet.data, packet.ecn)


def ip_as_it_is(direction: str, packet: Packet) -> bytes:
    """Return what a driver carries that carries whole IP packets."""
    return packet.data


class PcapWriter:
    """Writes packets to a pcap file (nanoseconds, raw IP), as Wireshark and tcpdump read it.

    As an observer it writes the packets that have the fate `at`: `DELIVERED` is what a capture at
    the receiver shows, `SENT` at the sender. Time 0 is shown as 1970-01-01. The caller opens the
    binary file and closes it.
    """

    MAGIC_NS = 0xA1B23C4D
    VERSION = (2, 4)
    SNAP_BYTES = 65535
    LINKTYPE_RAW = 101
    "Packets begin with their IP header (https://www.tcpdump.org/linktypes.html)."

    def __init__(
        self, file: BinaryIO, *, to_ip: ToIp = udp_to_ip, at: Fate = Fate.DELIVERED
    ) -> None:
        self._file = file
        self._to_ip = to_ip
        self._at = at
        file.write(
            struct.pack(
                "<IHHiIII", self.MAGIC_NS, *self.VERSION, 0, 0, self.SNAP_BYTES, self.LINKTYPE_RAW
            )
        )

    def observe(self, now: float, direction: str, packet: Packet, fate: Fate) -> None:
        """See `Observer`."""
        if fate is self._at:
            self.write(now, self._to_ip(direction, packet))

    def write(self, time_s: float, ip_packet: bytes) -> None:
        """Write a whole IP packet."""
        seconds, ns = divmod(round(time_s * NS_PER_S), NS_PER_S)
        kept = ip_packet[: self.SNAP_BYTES]
        self._file.write(struct.pack("<IIII", seconds, ns, len(kept), len(ip_packet)) + kept)


PROTOCOL_ICMP = 1
PROTOCOL_UDP = 17
TTL_HOPS = 64


def ipv4_udp(source: Address, destination: Address, payload: bytes, ecn: Ecn) -> bytes:
    """Return an IPv4 packet with a UDP datagram (RFC 791, RFC 768)."""
    length = 8 + len(payload)
    ports = struct.pack("!HHH", source[1], destination[1], length)
    pseudo = _packed(source) + _packed(destination) + struct.pack("!HH", PROTOCOL_UDP, length)
    # A checksum that comes out as 0 is sent as its other form: 0 says that there is none.
    checksum = _checksum(pseudo + ports + b"\0\0" + payload) or 0xFFFF
    return _ipv4(
        source, destination, PROTOCOL_UDP, ports + struct.pack("!H", checksum) + payload, ecn
    )


def ipv4_port_unreachable(source: Address, destination: Address) -> bytes:
    """Return the ICMP message "port unreachable" from `source`, where nobody listens (RFC 792).

    It quotes the headers of an empty datagram from `destination`.
    """
    quoted = ipv4_udp(destination, source, b"", Ecn.NOT_ECT)
    checksum = _checksum(struct.pack("!BBHI", 3, 3, 0, 0) + quoted)
    message = struct.pack("!BBHI", 3, 3, checksum, 0) + quoted
    return _ipv4(source, destination, PROTOCOL_ICMP, message, Ecn.NOT_ECT)


def _ipv4(source: Address, destination: Address, protocol: int, body: bytes, ecn: Ecn) -> bytes:
    start = struct.pack("!BBHHHBB", 0x45, ecn, 20 + len(body), 0, 0, TTL_HOPS, protocol)
    addresses = _packed(source) + _packed(destination)
    checksum = _checksum(start + b"\0\0" + addresses)
    return start + struct.pack("!H", checksum) + addresses + body


def _packed(address: Address) -> bytes:
    return ipaddress.IPv4Address(address[0]).packed


def _checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
