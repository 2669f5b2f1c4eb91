"""A trace's digest is stable and tells traces apart; captured packets can be read back."""

import io
import os
import shutil
import struct
import subprocess
import sys

import pytest
from tools import needs_tool

from eloquent_netem.capture import (
    CLIENT,
    SERVER,
    Captured,
    Fate,
    PcapWriter,
    TraceDigest,
    ip_as_it_is,
    ipv4_port_unreachable,
    ipv4_udp,
)
from eloquent_netem.link import Link
from eloquent_netem.loss import DropList
from eloquent_netem.packet import Ecn, Packet, udp_packet

DIGEST = """
from eloquent_netem.capture import Captured, TraceDigest
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import IndependentLoss
from eloquent_netem.packet import udp_packet
digest = TraceDigest()
loss = IndependentLoss(0.3, stage_rng(7, "down", "loss"))
link = Captured(Link(delay_s=0.05, seed=7, name="down", loss=loss, jitter_s=0.02), "down",
                [digest.observe])
for index in range(50):
    link.send(index * 0.01, udp_packet(bytes(index)))
while (time := link.next_time()) is not None:
    link.poll(time)
print(digest.hexdigest(), digest.entries)
"""


def digest_of_a_process(hash_seed: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def digest_of(*entries: tuple[float, str, int, Ecn, str]) -> str:
    digest = TraceDigest()
    for entry in entries:
        digest.add(*entry)
    return digest.hexdigest()


def internet_sum(data: bytes) -> int:
    """Add 16-bit words with end-around carry: 0xFFFF over data with a right checksum."""
    total = 0
    for index in range(0, len(data), 2):
        total += int.from_bytes(data[index : index + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total


def read_pcap(data: bytes) -> list[tuple[int, bytes]]:
    """Return time in ns and bytes of each packet of a pcap file (little-endian, ns, raw IP)."""
    magic, major, minor, _, _, _, link_type = struct.unpack_from("<IHHiIII", data)
    assert (magic, major, minor, link_type) == (0xA1B23C4D, 2, 4, 101)
    packets, at = [], 24
    while at < len(data):
        seconds, ns, kept, original = struct.unpack_from("<IIII", data, at)
        assert kept == original
        packets.append((seconds * 10**9 + ns, data[at + 16 : at + 16 + kept]))
        at += 16 + kept
    return packets


def captured(writer: PcapWriter) -> None:
    """Send three packets down, of which the second is lost, and one up."""
    down = Captured(
        Link(delay_s=0.05, seed=1, name="down", loss=DropList([1])), "down", [writer.observe]
    )
    up = Captured(Link(delay_s=0.01, seed=1, name="up"), "up", [writer.observe])
    for index, payload in enumerate((b"one", b"two", b"three")):
        down.send(1.0 + index, udp_packet(payload, Ecn.ECT_1))
    up.send(4.0, udp_packet(b"four"))
    for time in (1.05, 3.05):
        down.poll(time)
    up.poll(4.01)


def test_a_digest_is_the_same_in_every_process() -> None:
    digests = {digest_of_a_process(hash_seed) for hash_seed in ("0", "1", "4242")}
    assert len(digests) == 1
    # Figures that were published with a digest stay checkable.
    assert digests.pop() == "f85fa06d5baf6b91b6ef4b43496b0302 92\n"


ENTRY = (1.5, "up", 100, Ecn.ECT_1, "sent")


@pytest.mark.parametrize(
    "other",
    [
        (1.500000001, "up", 100, Ecn.ECT_1, "sent"),
        (1.5, "down", 100, Ecn.ECT_1, "sent"),
        (1.5, "up", 101, Ecn.ECT_1, "sent"),
        (1.5, "up", 100, Ecn.CE, "sent"),
        (1.5, "up", 100, Ecn.ECT_1, "delivered"),
    ],
)
def test_each_part_of_an_entry_counts(other: tuple[float, str, int, Ecn, str]) -> None:
    assert digest_of(ENTRY) == digest_of(ENTRY)
    assert digest_of(ENTRY) != digest_of(other)
    assert digest_of(ENTRY, other) != digest_of(other, ENTRY)
    assert digest_of(ENTRY) != digest_of(ENTRY, ENTRY)


def test_times_count_to_the_nanosecond_only() -> None:
    assert digest_of(ENTRY) == digest_of((1.5 + 2e-16, *ENTRY[1:]))


def test_contents_do_not_count() -> None:
    digests = []
    for payload in (b"abc", b"xyz"):
        digest = TraceDigest()
        digest.observe(0.0, "up", udp_packet(payload), Fate.SENT)
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1]


def test_a_captured_link_is_the_link_and_tells_what_goes_in_and_comes_out() -> None:
    seen: list[tuple[float, str, bytes, str]] = []
    link = Link(delay_s=0.05, seed=1, name="down", loss=DropList([1]))
    watched = Captured(
        link, "down", [lambda now, way, packet, fate: seen.append((now, way, packet.data, fate))]
    )
    watched.send(1.0, Packet(b"a", 1))
    watched.send(1.01, Packet(b"b", 1))
    assert watched.next_time() == link.next_time() == pytest.approx(1.05)
    assert [packet.data for packet in watched.poll(1.05)] == [b"a"]
    assert seen == [
        (1.0, "down", b"a", "sent"),
        (1.01, "down", b"b", "sent"),
        (1.05, "down", b"a", "delivered"),
    ]


def test_a_capture_at_the_receiver_reads_back() -> None:
    file = io.BytesIO()
    captured(PcapWriter(file))
    packets = read_pcap(file.getvalue())
    assert [time for time, _ in packets] == [1_050_000_000, 3_050_000_000, 4_010_000_000]
    assert [packet[28:] for _, packet in packets] == [b"one", b"three", b"four"]
    assert [packet[1] for _, packet in packets] == [Ecn.ECT_1, Ecn.ECT_1, Ecn.NOT_ECT]
    client, server = bytes((192, 0, 2, 1)), bytes((198, 51, 100, 1))
    assert [packet[12:20] for _, packet in packets] == [server + client] * 2 + [client + server]


def test_a_capture_at_the_sender_shows_what_is_lost_later() -> None:
    file = io.BytesIO()
    captured(PcapWriter(file, at=Fate.SENT))
    packets = read_pcap(file.getvalue())
    assert [packet[28:] for _, packet in packets] == [b"one", b"two", b"three", b"four"]


def test_whole_ip_packets_are_written_as_they_are() -> None:
    file = io.BytesIO()
    writer = PcapWriter(file, to_ip=ip_as_it_is)
    writer.observe(2.0, "up", Packet(b"E-whole-packet", 14), Fate.DELIVERED)
    assert read_pcap(file.getvalue()) == [(2_000_000_000, b"E-whole-packet")]


@pytest.mark.parametrize("payload", [b"", b"odd", b"even", bytes(1200)])
def test_synthesised_headers_are_right(payload: bytes) -> None:
    packet = ipv4_udp(CLIENT, SERVER, payload, Ecn.CE)
    assert packet[0] == 0x45
    assert packet[1] == 3
    assert packet[9] == 17
    assert int.from_bytes(packet[2:4], "big") == len(packet) == 28 + len(payload)
    assert struct.unpack_from("!HHH", packet, 20) == (49152, 4433, 8 + len(payload))
    assert internet_sum(packet[:20]) == 0xFFFF
    pseudo_header = packet[12:20] + struct.pack("!HH", 17, 8 + len(payload))
    assert internet_sum(pseudo_header + packet[20:]) == 0xFFFF


def test_a_udp_checksum_of_zero_is_sent_as_ones() -> None:
    # The payload is chosen so that all the words add up to 0xFFFF.
    plain = ipv4_udp(CLIENT, SERVER, b"\0\0", Ecn.NOT_ECT)
    packet = ipv4_udp(CLIENT, SERVER, plain[26:28], Ecn.NOT_ECT)
    assert packet[26:28] == b"\xff\xff"


def test_port_unreachable_quotes_the_datagram() -> None:
    packet = ipv4_port_unreachable(SERVER, CLIENT)
    assert len(packet) == 56
    assert packet[9] == 1
    assert packet[20:22] == b"\x03\x03"
    assert internet_sum(packet[20:]) == 0xFFFF
    assert packet[28:] == ipv4_udp(CLIENT, SERVER, b"", Ecn.NOT_ECT)


@needs_tool("tcpdump")
def test_tcpdump_reads_a_capture() -> None:
    tcpdump = shutil.which("tcpdump")
    assert tcpdump is not None
    file = io.BytesIO()
    captured(PcapWriter(file))
    shown = subprocess.run(
        [tcpdump, "-nn", "-vv", "-tt", "-r", "-"],
        input=file.getvalue(),
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert "198.51.100.1.4433 > 192.0.2.1.49152" in shown
    assert shown.count("udp sum ok") == 3
