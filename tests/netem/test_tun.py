"""The TUN router carries what the kernel sends through the links, and leaves nothing behind."""

import contextlib
import functools
import hashlib
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools import needs_tool

from eloquent_netem.link import Link
from eloquent_netem.loss import DropList
from eloquent_netem.namespaces import NamespaceError, NamespaceId, kill_inside, processes_inside
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.queues import DropTail
from eloquent_netem.realtime import LatenessError, NotStartedError, OverloadError
from eloquent_netem.tun import TunNetwork, ip_packet, tun_network, with_ecn
from eloquent_netem.worker import WorkerError

DEADLINE_S = 30.0
"Ends a hang; decides nothing."

needs_ip = needs_tool("ip")

ECHO_SERVER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.socket(family, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 7))
print("ready", flush=True)
while True:
    data, peer = server.recvfrom(2000)
    server.sendto(data, peer)
"""

ECHO_CLIENT = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
client = socket.socket(family, socket.SOCK_DGRAM)
client.connect((sys.argv[1], 7))
for index in range(int(sys.argv[2])):
    client.send(b"%d" % index)
for _ in range(int(sys.argv[3])):
    print(client.recv(2000).decode())
"""

ECN_SERVER = """
import socket, sys
if ":" in sys.argv[1]:
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
else:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
server.bind((sys.argv[1], 7))
print("ready", flush=True)
for _ in range(3):
    _, control, _, _ = server.recvmsg(2000, 100)
    print(control[0][2][0])
"""

ECN_CLIENT = """
import socket, sys
for tos in (0b10110001, 0b10110010, 0b10110000):
    if ":" in sys.argv[1]:
        client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
    else:
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
    client.sendto(b"x", (sys.argv[1], 7))
"""

TCP_SERVER = """
import hashlib, socket
with socket.create_server(("192.0.2.2", 7)) as server:
    print("ready", flush=True)
    stream, _ = server.accept()
    digest = hashlib.sha256()
    while data := stream.recv(65536):
        digest.update(data)
    stream.sendall(digest.hexdigest().encode())
    stream.close()
"""

TCP_CLIENT = """
import random, socket
stream = socket.socket()
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
stream.connect(("192.0.2.2", 7))
stream.sendall(random.Random(1).randbytes(1_000_000))
stream.shutdown(socket.SHUT_WR)
print(stream.recv(100).decode())
"""

DRIVING = """
import json, math
from eloquent_netem.tun import tun_network
from tests.netem.test_tun import links
if __name__ == "__main__":
    with tun_network(links, lateness_bound_s=math.inf) as net:
        net.start()
        net.popen("client", ["sh", "-c", "setsid sleep 1000 & exec sleep 1000"])
        server = net.popen("server", ["sleep", "1000"])
        print(json.dumps([net.router_pid, list(net.namespaces.ids.values())]), flush=True)
        server.wait()
"""


class Marking(DropTail):
    """Marks all that may be marked."""

    def dequeue(self, now: float) -> Packet | None:
        packet = super().dequeue(now)
        if packet is not None and packet.ecn != Ecn.NOT_ECT:
            packet.ecn = Ecn.CE
        return packet


def links(
    delay_s: float = 0.005, drops_up: Sequence[int] = (), marks: bool = False
) -> tuple[Link, Link]:
    return (
        Link(
            delay_s=delay_s,
            seed=1,
            name="up",
            loss=DropList(drops_up),
            queue=Marking() if marks else DropTail(),
        ),
        Link(delay_s=delay_s, seed=1, name="down"),
    )


@contextlib.contextmanager
def network(
    make: functools.partial[tuple[Link, Link]] | None = None,
    *,
    lateness_bound_s: float = math.inf,
    rootless: bool | None = None,
) -> Iterator[TunNetwork]:
    """Make a network, or skip by saying what is missing; with `CI=true` that fails."""
    with contextlib.ExitStack() as stack:
        try:
            net = stack.enter_context(
                tun_network(
                    make or functools.partial(links),
                    lateness_bound_s=lateness_bound_s,
                    rootless=rootless,
                )
            )
        except NamespaceError as error:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(str(error))
        stack.callback(_close_pipes, net)
        yield net


def _close_pipes(net: TunNetwork) -> None:
    for process in net.processes:
        if process.stdout is not None:
            process.stdout.close()


def start_server(net: TunNetwork, script: str, *arguments: str) -> "subprocess.Popen[str]":
    """Start a server and wait until it listens."""
    server = net.popen(
        "server", [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return server


def run_client(net: TunNetwork, script: str, *arguments: str) -> list[str]:
    """Run a client to its end; return the lines it printed."""
    client = net.popen(
        "client", [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True
    )
    output, _ = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 0
    return output.split()


def await_end(router_pid: int, ids: Sequence[NamespaceId]) -> None:
    """Wait until the router and all in the namespaces are gone."""
    deadline = time.monotonic() + DEADLINE_S
    while processes_inside(set(ids)) or Path(f"/proc/{router_pid}/exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@needs_ip
@pytest.mark.parametrize("address", ["192.0.2.2", "2001:db8::2"])
@pytest.mark.parametrize("rootless", [None, True])
def test_datagrams_come_back_in_order_and_nothing_else_travels(
    address: str, rootless: bool | None
) -> None:
    with network(functools.partial(links, 0.05), rootless=rootless) as net:
        start_server(net, ECHO_SERVER, address)
        net.start()
        assert run_client(net, ECHO_CLIENT, address, "20", "20") == [str(i) for i in range(20)]
    stats = net.stats()
    assert (stats.driver.up.packets_sent, stats.driver.up.packets_delivered) == (20, 20)
    assert (stats.driver.down.packets_sent, stats.driver.down.packets_delivered) == (20, 20)
    assert stats.driver.lateness.packets == 40
    assert (stats.ignored, stats.marked, stats.tun_drops) == (0, 0, 0)
    assert stats.driver.packets_too_early == 0


@needs_ip
def test_a_drop_list_drops_exactly_those_packets() -> None:
    with network(functools.partial(links, drops_up=(0, 3, 4))) as net:
        start_server(net, ECHO_SERVER, "192.0.2.2")
        net.start()
        assert run_client(net, ECHO_CLIENT, "192.0.2.2", "8", "5") == ["1", "2", "5", "6", "7"]
    assert net.stats().driver.up.packets_lost == 3
    assert net.stats().driver.down.packets_lost == 0


@needs_ip
@pytest.mark.parametrize("address", ["192.0.2.2", "2001:db8::2"])
def test_a_mark_of_the_queue_arrives_and_the_rest_of_the_traffic_class_stays(address: str) -> None:
    with network(functools.partial(links, marks=True)) as net:
        server = start_server(net, ECN_SERVER, address)
        net.start()
        run_client(net, ECN_CLIENT, address)
        output, _ = server.communicate(timeout=DEADLINE_S)
    assert [int(line) for line in output.split()] == [0b10110011, 0b10110011, 0b10110000]
    assert net.stats().marked == 2


@needs_ip
def test_a_megabyte_of_tcp_arrives_whole_in_spite_of_loss() -> None:
    with network(functools.partial(links, drops_up=(0, 20, 50, 51))) as net:
        start_server(net, TCP_SERVER)
        net.start()
        digest = hashlib.sha256(random.Random(1).randbytes(1_000_000)).hexdigest()
        assert run_client(net, TCP_CLIENT) == [digest]
    assert net.stats().driver.up.packets_lost == 4
    assert net.stats().driver.up.bytes_sent > 1_000_000


@needs_ip
def test_a_run_whose_clock_was_never_started_is_refused() -> None:
    def run() -> None:
        with network() as net:
            run_client(net, ECHO_CLIENT, "192.0.2.2", "1", "0")
            deadline = time.monotonic() + DEADLINE_S
            while not net.stats().driver.packets_too_early:
                assert time.monotonic() < deadline

    with pytest.raises(NotStartedError, match=r"call start\(\)"):
        run()


@needs_ip
def test_a_run_that_was_too_late_is_refused() -> None:
    def run() -> None:
        with network(lateness_bound_s=0.0) as net:
            start_server(net, ECHO_SERVER, "192.0.2.2")
            net.start()
            run_client(net, ECHO_CLIENT, "192.0.2.2", "3", "3")

    with pytest.raises(LatenessError, match=r"0\.00 ms is the bound"):
        run()


@needs_ip
def test_a_run_in_which_the_router_could_not_keep_up_is_refused() -> None:
    def run() -> None:
        with network() as net:
            assert net.router_pid is not None
            net.start()
            os.kill(net.router_pid, signal.SIGSTOP)
            run_client(net, ECHO_CLIENT, "192.0.2.2", "11000", "0")
            os.kill(net.router_pid, signal.SIGCONT)

    with pytest.raises(OverloadError, match=r"machine lost 1\d\d\d packets"):
        run()


@needs_ip
def test_what_still_runs_is_ended_grandchildren_too() -> None:
    with network() as net:
        process = net.popen("client", ["sh", "-c", "setsid sleep 1000 & exec sleep 1000"])
        ids = net.namespaces.ids.values()
        deadline = time.monotonic() + DEADLINE_S
        while len(processes_inside(set(ids))) < 2:
            assert time.monotonic() < deadline
    assert process.returncode == -signal.SIGTERM
    assert processes_inside(set(ids)) == []
    assert not Path(f"/proc/{net.router_pid}").exists()


@needs_ip
def test_an_exception_passes_and_everything_is_ended() -> None:
    def run() -> None:
        nonlocal net, process
        with network() as net:
            process = net.popen("server", ["sleep", "1000"])
            raise OSError("ours")

    net: TunNetwork
    process: subprocess.Popen[bytes]
    with pytest.raises(OSError, match="ours"):
        run()
    assert process.returncode is not None
    assert processes_inside(set(net.namespaces.ids.values())) == []
    assert not Path(f"/proc/{net.router_pid}").exists()


@needs_ip
@pytest.mark.parametrize("rootless", [None, True])
def test_others_are_not_ended_in_their_stead(
    rootless: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel numbers a new namespace like one that is gone, so ours must be there to the last.
    def check_held_and_kill(ids: Collection[NamespaceId]) -> None:
        held = []
        for fd in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                status = fd.stat()
                held.append((status.st_dev, status.st_ino))
        found.append(set(ids) <= set(held))
        kill_inside(ids)

    found: list[bool] = []
    monkeypatch.setattr("eloquent_netem.tun.kill_inside", check_held_and_kill)
    with network(rootless=rootless) as net:
        before = len(list(Path("/proc/self/fd").iterdir()))
    assert found == [True]
    assert len(list(Path("/proc/self/fd").iterdir())) < before
    assert net.router_pid is not None


@needs_ip
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGKILL, "-9"), (signal.SIGTERM, "1")])
def test_a_run_whose_router_died_is_void(number: signal.Signals, exit_code: str) -> None:
    def run() -> None:
        nonlocal net, process
        with network() as net:
            process = net.popen("server", ["sh", "-c", "setsid sleep 1000 & exec sleep 1000"])
            deadline = time.monotonic() + DEADLINE_S
            while len(processes_inside(set(net.namespaces.ids.values()))) < 2:
                assert time.monotonic() < deadline
            assert net.router_pid is not None
            os.kill(net.router_pid, number)

    net: TunNetwork
    process: subprocess.Popen[bytes]
    with pytest.raises(WorkerError, match=rf"exit code {exit_code}\)"):
        run()
    assert process.returncode is not None
    assert processes_inside(set(net.namespaces.ids.values())) == []


@needs_ip
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_everything_is_ended_when_the_driving_process_is_killed(
    number: signal.Signals, tmp_path: Path
) -> None:
    with network():
        pass  # Or skip.
    script = tmp_path / "driving.py"
    script.write_text(DRIVING, encoding="utf-8")
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((root, *sys.path))},
    ) as driving:
        try:
            assert driving.stdout is not None
            router_pid, ids = json.loads(driving.stdout.readline())
            ids = [tuple(each) for each in ids]
            deadline = time.monotonic() + DEADLINE_S
            while len(processes_inside(set(ids))) < 3:  # They are on their way in.
                assert time.monotonic() < deadline
                time.sleep(0.01)
            driving.send_signal(number)
            driving.wait(DEADLINE_S)
        finally:
            driving.kill()
    await_end(router_pid, ids)


def ones_complement_sum(header: bytes) -> int:
    """Return 0xFFFF if the checksum in the header is right (RFC 791 section 3.1)."""
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.binary(min_size=19, max_size=19), st.sampled_from(Ecn))
def test_the_checksum_is_right_whatever_was_marked(rest: bytes, ecn: Ecn) -> None:
    header = bytearray(b"\x45" + rest)
    header[10:12] = b"\0\0"
    header[10:12] = (~ones_complement_sum(header) & 0xFFFF).to_bytes(2, "big")
    data = bytes(header) + b"payload"
    marked = with_ecn(data, ecn)
    assert ones_complement_sum(marked[:20]) == 0xFFFF
    assert marked[1] == data[1] & 0xFC | ecn
    assert (marked[0], marked[2:10], marked[12:]) == (data[0], data[2:10], data[12:])
    assert (marked is data) == (data[1] & 3 == ecn)


@given(st.binary(min_size=39, max_size=60), st.sampled_from(Ecn))
def test_version_6_keeps_all_but_the_ecn_field(rest: bytes, ecn: Ecn) -> None:
    data = bytes((0x60 | rest[0] & 0xF,)) + rest
    marked = with_ecn(data, ecn)
    assert marked[1] >> 4 & 3 == ecn
    assert marked[1] & 0xCF == data[1] & 0xCF
    assert (marked[0], marked[2:]) == (data[0], data[2:])


@given(st.binary(max_size=60))
def test_any_bytes_are_a_packet_or_ignored(data: bytes) -> None:
    packet = ip_packet(data)
    if packet is not None:
        assert (packet.data, packet.size) == (data, len(data))
        assert with_ecn(data, packet.ecn) is data


def test_multicast_is_ignored() -> None:
    assert ip_packet(b"\x45" + b"\0" * 15 + bytes((192, 0, 2, 1))) is not None
    assert ip_packet(b"\x45" + b"\0" * 15 + bytes((224, 0, 0, 22))) is None
    assert ip_packet(b"\x60" + b"\0" * 23 + b"\x20\x01" + b"\0" * 14) is not None
    assert ip_packet(b"\x60" + b"\0" * 23 + b"\xff\x02" + b"\0" * 14) is None
