"""TCP segments on the wire: IPv4 and TCP headers as the kernel writes them, checksums left out.

Options are what Linux sends: maximum segment size, SACK permitted, timestamps and window scale on
the SYN; timestamps and SACK blocks (RFC 2018, RFC 2883, RFC 7323) on the rest; none on a reset.
Checksums are zero, as in a capture with checksum offload.
"""

import functools
import ipaddress
import struct
from dataclasses import dataclass

from eloquent_netem.capture import Address
from eloquent_netem.packet import SUBJECT, Ecn, Packet
from eloquent_netem.tcp.errors import SegmentError

FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10
ECE = 0x40
CWR = 0x80

IP_HEADER_BYTES = 20
TCP_HEADER_BYTES = 20
TIMESTAMP_OPTION_BYTES = 12
HEADER_BYTES = IP_HEADER_BYTES + TCP_HEADER_BYTES + TIMESTAMP_OPTION_BYTES
"Of a segment without SACK blocks."

MTU_BYTES = 1500
MSS_BYTES = MTU_BYTES - HEADER_BYTES
"Payload of a full segment."

SACK_BLOCKS_MAX = 3
"As many as fit beside the timestamps (RFC 2018 section 3)."

WINDOW_SCALE = 7
"What Linux offers with its default buffers of up to 6 MB."

WINDOW_FIELD_MAX = 0xFFFF
WINDOW_MAX_BYTES = WINDOW_FIELD_MAX << WINDOW_SCALE
SERVER_PORT = 443
CLIENT_PORT = 40000
"A flow's client port is this plus its number."

_WRAP = 1 << 32
_IP = struct.Struct("!BBHHHBBH4s4s")
_TCP = struct.Struct("!HHIIBBHHH")
_TIMESTAMPS = struct.Struct("!BBBBII")
_SYN_OPTIONS = struct.Struct("!BBHBBBBIIBBBB")
_CLIENT_IP = "192.0.2.1"
_SERVER_IP = "192.0.2.2"
_TCP_PROTOCOL = 6
_SACK_OPTION = 5


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment; sequence numbers and times are full, the wire carries their low 32 bits."""

    seq: int
    ack: int
    flags: int
    tsval_ms: int
    "The sender's clock (RFC 7323 section 3.2); Linux counts milliseconds."
    tsecr_ms: int
    "The peer's clock, echoed."
    sack: tuple[tuple[int, int], ...] = ()
    "Blocks received out of order, first and end; a duplicate comes first (RFC 2883)."
    payload: bytes = b""
    window: int = WINDOW_MAX_BYTES
    """How many bytes behind `ack` the sender of this segment can take. The wire has it in steps of
    `2**WINDOW_SCALE`, rounded up, and on a SYN in bytes (RFC 7323 section 2.2)."""

    @property
    def end(self) -> int:
        """The sequence number after its last byte; a SYN and a FIN count as one."""
        return self.seq + len(self.payload) + bool(self.flags & SYN) + bool(self.flags & FIN)


@dataclass(slots=True)
class TcpPacket(Packet):
    """A packet with a segment and its addresses; `data` is the whole IP packet."""

    source: Address = (_CLIENT_IP, CLIENT_PORT)
    destination: Address = (_SERVER_IP, SERVER_PORT)


def flow_addresses(flow: int) -> tuple[Address, Address]:
    """Return the addresses of client and server of a flow that has a pair of links for itself."""
    return (_CLIENT_IP, CLIENT_PORT + flow), (_SERVER_IP, SERVER_PORT)


def to_packet(
    segment: Segment,
    *,
    source: Address,
    destination: Address,
    ecn: Ecn = Ecn.NOT_ECT,
    flow: int = SUBJECT,
) -> TcpPacket:
    """Return the IP packet that carries a segment."""
    window = -(-segment.window >> WINDOW_SCALE)
    if segment.flags & SYN:
        options, window = _syn_options(segment), segment.window
    elif segment.flags & RST:
        options = b""
    else:
        options = _options(segment)
    size = IP_HEADER_BYTES + TCP_HEADER_BYTES + len(options) + len(segment.payload)
    addresses = _packed(source[0]), _packed(destination[0])
    data = b"".join(
        (
            _IP.pack(0x45, ecn, size, 0, 0x4000, 64, _TCP_PROTOCOL, 0, *addresses),
            _TCP.pack(
                source[1],
                destination[1],
                segment.seq % _WRAP,
                segment.ack % _WRAP,
                (TCP_HEADER_BYTES + len(options)) << 2,
                segment.flags,
                min(window, WINDOW_FIELD_MAX),
                0,
                0,
            ),
            options,
            segment.payload,
        )
    )
    return TcpPacket(data, size, ecn, flow, source=source, destination=destination)


def from_packet(packet: Packet, *, seq: int, ack: int, now_ms: int) -> Segment:
    """Return the segment in an IP packet, its numbers those nearest to the given ones.

    Raises:
        SegmentError: the packet holds no TCP segment as this module writes them.
    """
    data = packet.data
    if len(data) < IP_HEADER_BYTES + TCP_HEADER_BYTES or data[9] != _TCP_PROTOCOL:
        raise SegmentError(
            f"A packet of {len(data)} bytes is not TCP over IPv4: something else was put into this "
            "connection's link; give each its own."
        )
    _, _, wire_seq, wire_ack, offset, flags, window, *_ = _TCP.unpack_from(data, IP_HEADER_BYTES)
    options_end = IP_HEADER_BYTES + (offset >> 2)
    tsval, tsecr, blocks = _read_options(data[IP_HEADER_BYTES + TCP_HEADER_BYTES : options_end])
    return Segment(
        seq=_near(wire_seq, seq),
        ack=_near(wire_ack, ack),
        flags=flags,
        tsval_ms=_near(tsval, now_ms),
        tsecr_ms=_near(tsecr, now_ms),
        sack=tuple((_near(first, ack), _near(end, ack)) for first, end in blocks),
        payload=data[options_end:],
        window=window if flags & SYN else window << WINDOW_SCALE,
    )


@functools.lru_cache(64)
def _packed(ip: str) -> bytes:
    return ipaddress.IPv4Address(ip).packed


def is_opening(packet: Packet) -> bool:
    """Return whether a packet with a segment asks for a connection."""
    return packet.data[IP_HEADER_BYTES + 13] & (SYN | ACK | RST) == SYN


def _near(wire: int, reference: int) -> int:
    """Return the number nearest to `reference` whose low 32 bits are `wire`."""
    return reference + (wire - reference + _WRAP // 2) % _WRAP - _WRAP // 2


def _options(segment: Segment) -> bytes:
    options = _TIMESTAMPS.pack(1, 1, 8, 10, segment.tsval_ms % _WRAP, segment.tsecr_ms % _WRAP)
    if not segment.sack:
        return options
    blocks = [number % _WRAP for block in segment.sack for number in block]
    head = bytes((1, 1, _SACK_OPTION, 2 + 4 * len(blocks)))
    return options + head + struct.pack(f"!{len(blocks)}I", *blocks)


def _syn_options(segment: Segment) -> bytes:
    return _SYN_OPTIONS.pack(
        2,
        4,
        MTU_BYTES - IP_HEADER_BYTES - TCP_HEADER_BYTES,
        4,
        2,
        8,
        10,
        segment.tsval_ms % _WRAP,
        segment.tsecr_ms % _WRAP,
        1,
        3,
        3,
        WINDOW_SCALE,
    )


def _read_options(options: bytes) -> tuple[int, int, list[tuple[int, int]]]:
    tsval = tsecr = 0
    blocks: list[tuple[int, int]] = []
    at = 0
    while at < len(options):
        kind = options[at]
        if kind == 1:
            at += 1
            continue
        length = options[at + 1] if at + 1 < len(options) else 0
        if length < 2 or at + length > len(options):
            raise SegmentError("A TCP option is cut off: the packet was damaged on the way.")
        if kind == 8:
            tsval, tsecr = struct.unpack_from("!II", options, at + 2)
        elif kind == _SACK_OPTION:
            blocks = list(struct.iter_unpack("!II", options[at + 2 : at + length]))
        at += length
    return tsval, tsecr, blocks
