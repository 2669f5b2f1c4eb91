"""Answers over the kernel's own router: paths that carry less than they say, and NAT.

Three network namespaces, client - router - server. Nothing depends on how long anything takes.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import needs_tool

pytestmark = [needs_tool("ip"), needs_tool("nft"), needs_tool("nsenter")]

DEADLINE_S = 60.0
"Ends a hang; decides nothing."

SERVER, OTHER = "10.98.2.2", "10.98.2.77"
GAP_S = 0.02
TOKENS = 150
CHANGE_AFTER = 40
"The path changes when so many tokens have come."

# Links are not to be replaced here however slow the machine is: what is tested is that they last.
COMMON = """
import asyncio, hashlib, sys
from eloquent.core import liveness
liveness.DEAD_AFTER_S = liveness.MAX_DEAD_AFTER_S = 40.0
host, count, filling, gap_s, change_after = sys.argv[1:]
tokens = [f"{number} " + "x" * int(filling) + " " for number in range(int(count))]
"""

SERVING = """
from rungs import CERTIFICATE
from telling import Telling
from eloquent.quic import listen as quic
from eloquent.websocket import server as websocket

async def main():
    telling = Telling(tokens, float(gap_s))
    over_udp = await quic.listen(host, 4433, certificate=CERTIFICATE, service=telling)
    await websocket.listen(host, 4433, certificate=CERTIFICATE, service=telling)
    made, addresses = set(), set()
    received = over_udp.datagram_received
    def datagram_received(data, address, ecn):
        addresses.add(address)
        received(data, address, ecn)
        made.update(over_udp._peers)
    over_udp.datagram_received = datagram_received
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    print(len(made), len(addresses), flush=True)

asyncio.run(main())
"""

ASKING = """
from rungs import CERTIFICATE
from eloquent.core.events import End, TextDelta
from eloquent.session.race import Race
from eloquent.session.session import Session
from eloquent.url import ServerUrl

async def main():
    session = Session(ServerUrl(host, 4433, CERTIFICATE.pin), connector=Race())
    digest, came = hashlib.sha256(), 0
    async for event in session.ask(b"{}"):
        if isinstance(event, TextDelta):
            digest.update(event.text.encode())
            came += 1
            if came == int(change_after):
                print("changing", flush=True)
                await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    assert isinstance(event, End)
    print(digest.hexdigest(), session.link.rung.name, flush=True)
    await session.close()

asyncio.run(main())
"""


class Network:
    """Client, router and server, joined by two links; `c` and `s` are the router's ends."""

    def __init__(self) -> None:
        self._holders = {name: self._hold() for name in ("client", "router", "server")}
        self._processes: list[subprocess.Popen[str]] = []
        for letter, name, subnet in (("c", "client", "10.98.1"), ("s", "server", "10.98.2")):
            pid = self._holders[name].pid
            self.run("router", f"ip link add {letter} type veth peer name e netns {pid}")
            self.run("router", f"ip addr add {subnet}.1/24 dev {letter}")
            self.run("router", f"ip link set {letter} up")
            self.run(name, f"ip addr add {subnet}.2/24 dev e")
            self.run(name, "ip link set e up")
            self.run(name, f"ip route add default via {subnet}.1")
        self.run("router", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def run(self, where: str, script: str) -> None:
        """Run a shell script in a namespace."""
        words = [*self._entry(where), "sh", "-c", script]
        subprocess.run(words, check=True, timeout=DEADLINE_S, capture_output=True, text=True)

    def nft(self, rules: str) -> None:
        """Add rules to the router."""
        words = [*self._entry("router"), "nft", "--file", "-"]
        subprocess.run(
            words, check=True, timeout=DEADLINE_S, capture_output=True, text=True, input=rules
        )

    def python(self, where: str, script: str, filling: int) -> "subprocess.Popen[str]":
        """Start a Python script in a namespace."""
        arguments = (SERVER, str(TOKENS), str(filling), str(GAP_S), str(CHANGE_AFTER))
        process = subprocess.Popen(
            [*self._entry(where), sys.executable, "-c", COMMON + script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End all that was started; the namespaces go with it."""
        for process in (*self._processes, *self._holders.values()):
            process.kill()
            process.communicate()

    def _entry(self, where: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._holders[where].pid}/ns/net", "--"]

    def _hold(self) -> "subprocess.Popen[str]":
        holder = subprocess.Popen(
            ["unshare", "--net", "--", "sh", "-c", f"echo ready; exec sleep {10 * DEADLINE_S}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        return holder


@pytest.fixture
def network() -> Iterator[Network]:
    """Make the network, or skip by saying what is missing; with `CI=true` that fails."""
    if os.geteuid() != 0 and os.environ.get("CI") != "true":
        pytest.skip("needs root, to make a router of network namespaces")
    with contextlib.closing(Network()) as made:
        yield made


def answered(network: Network, change: str = "", filling: int = 0) -> tuple[str, int, int]:
    """Have a question answered, with `change` done at the router on the way.

    The answer has to be what was told. Returns the rung that it came to its end on, and how many
    QUIC connections and addresses the server has seen.
    """
    server = network.python("server", SERVING, filling)
    assert line_of(server) == "ready"
    client = network.python("client", ASKING, filling)
    assert line_of(client) == "changing"
    if change:
        network.run("router", change)
    said, _ = client.communicate("go on\n", timeout=DEADLINE_S)
    assert client.returncode == 0
    digest, rung = said.split()
    told = "".join(f"{number} " + "x" * filling + " " for number in range(TOKENS))
    assert digest == hashlib.sha256(told.encode()).hexdigest()
    counts, _ = server.communicate("and?\n", timeout=DEADLINE_S)
    connections, addresses = counts.split()
    return rung, int(connections), int(addresses)


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


NO_ICMP = """
table inet silent {
    chain out { type filter hook output priority 0; icmp type destination-unreachable drop; }
}
"""
MASQUERADE = """
table ip nat {
    chain out { type nat hook postrouting priority srcnat; oifname "s" masquerade fully-random; }
}
"""
CLAMP = """
table inet clamp {
    chain pass {
        type filter hook forward priority 0; tcp flags syn tcp option maxseg size set rt mtu;
    }
}
"""


def test_a_plain_router_is_no_obstacle(network: Network) -> None:
    assert answered(network) == ("DATAGRAMS", 1, 1)


@pytest.mark.parametrize("mtu", [1000, 600])
def test_an_mtu_that_shrinks_in_mid_answer_where_nobody_is_told(network: Network, mtu: int) -> None:
    network.nft(NO_ICMP)
    # Each token fills more than a full packet.
    rung, connections, _ = answered(network, f"ip link set c mtu {mtu}", filling=2000)
    assert (rung, connections) == ("DATAGRAMS", 1)


def test_a_nat_that_gives_the_client_another_address_in_mid_answer(network: Network) -> None:
    network.nft(MASQUERADE)
    # The kernel forgets a masquerade's mappings with the address that they lead to.
    change = f"ip addr flush dev s; ip addr add {OTHER}/24 dev s"
    assert answered(network, change) == ("DATAGRAMS", 1, 2)


def test_a_nat_that_gives_the_client_another_port_in_mid_answer(network: Network) -> None:
    network.nft(MASQUERADE)
    change = "ip link set s down; ip link set s up"
    assert answered(network, change) == ("DATAGRAMS", 1, 2)


def test_a_path_that_carries_no_packet_of_1200_bytes(network: Network) -> None:
    """As behind a tunnel whose router tells TCP, and drops ICMP."""
    network.nft(NO_ICMP + CLAMP)
    network.run("router", "ip link set c mtu 1000")
    rung, _, _ = answered(network)
    assert rung == "WEBSOCKET"
