"""The demo over TUN: real programs, each pair in namespaces of its own."""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec

from eloquent_netem.errors import NetemError
from eloquent_netem.lab.demo import OURS, Feed, News
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.sources import Recording
from eloquent_netem.lab.tun_ends import SETUP, Go, Hello, Setup
from eloquent_netem.namespaces import Side
from eloquent_netem.tun import TunNetwork, tun_network

TCP = "tcp-sse"
KINDS = {TCP: "sse", OURS: "quic"}

LEAD_S = 0.3
"From the start of the networks' clocks to the clients' beginning."

LATENESS_BOUND_S = 0.05
"Of the router: nothing is measured, and an eye does not see less."

PROGRAMS_S = 0.002
"About what the programs at both ends take for a token, which no network is to blame for."

END_S = 5.0
"A program that has done its work is gone by then."


@contextlib.contextmanager
def over_tun(place: Place, source: Recording, seed: int) -> Iterator[Feed]:
    """Give a feed of real programs, each pair in namespaces of its own.

    Raises:
        NetemError: the namespaces cannot be made; the message says why and what helps.
    """
    with contextlib.ExitStack() as stack:
        feed = _Live(place)
        stack.callback(feed.close)  # After the networks, which end what still runs.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eloquent-demo-")))
        for pane, scheme in enumerate(feed.schemes):
            mine = folder / scheme
            mine.mkdir()
            setup = Setup(scheme=scheme, padding=True, congestion="cubic", plan=source.plan(seed))
            (mine / SETUP).write_bytes(msgspec.json.encode(setup))
            links = partial(place.scenario.links, seed, LEAD_S)
            network = stack.enter_context(tun_network(links, lateness_bound_s=LATENESS_BOUND_S))
            feed.add(pane, network, KINDS[scheme], mine)
        try:
            yield feed
        finally:
            feed.stop()


class _Live(Feed):
    def __init__(self, place: Place) -> None:
        super().__init__("live, real sockets and kernel TCP", (TCP, OURS))
        self._base_delay_s = place.base_delay_s + PROGRAMS_S
        self._networks: list[TunNetwork] = []
        self._clients: list[subprocess.Popen[str]] = []
        self._servers: list[subprocess.Popen[str]] = []
        self._hellos: list[Hello] = []
        self._threads: list[threading.Thread] = []

    def add(self, pane: int, network: TunNetwork, kind: str, folder: Path) -> None:
        """Start the two programs of a pane, and wait until they are ready."""
        sides: dict[Side, subprocess.Popen[str]] = {}
        for side in ("server", "client"):
            sides[side] = _start(network, side, kind, folder)
        hello, _ = (_ready(sides[side], folder, side) for side in ("server", "client"))
        self._networks.append(network)
        self._servers.append(sides["server"])
        self._clients.append(sides["client"])
        self._hellos.append(msgspec.json.decode(hello, type=Hello))
        takers: dict[Side, Callable[[float, str], News]] = {
            "server": lambda time_s, text: News(pane, time_s + self._base_delay_s, None),
            "client": lambda time_s, text: News(pane, time_s, text),
        }
        for side, take in takers.items():
            self._threads.append(
                threading.Thread(target=self._listen, args=(sides[side], take), daemon=True)
            )

    def begin(self) -> None:
        for network in self._networks:
            network.start()
        start_s = time.monotonic() + LEAD_S
        for client, hello in zip(self._clients, self._hellos, strict=True):
            assert client.stdin is not None
            client.stdin.write(msgspec.json.encode(Go(start_s, hello)).decode() + "\n")
            client.stdin.flush()
        for thread in self._threads:
            thread.start()

    def is_over(self) -> bool:
        return all(client.poll() is not None for client in self._clients)

    def stop(self) -> None:
        """End the servers; the clients end with their answers, or with the networks."""
        for server in self._servers:
            assert server.stdin is not None
            server.stdin.close()
        for server in self._servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(END_S)

    def close(self) -> None:
        """Close the pipes to what has ended."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for process in (*self._servers, *self._clients):
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _listen(self, process: "subprocess.Popen[str]", take: Callable[[float, str], News]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):  # Else whoever wrote it was ended in the middle.
                self.news.put(take(*json.loads(line)))


def _start(network: TunNetwork, side: Side, kind: str, folder: Path) -> "subprocess.Popen[str]":
    with (folder / f"{side}.err").open("w") as complaints:
        return network.popen(
            side,
            [sys.executable, "-m", "eloquent_netem.lab.demo_end", kind, side, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            start_new_session=True,  # Ctrl-C is for us, who end it.
        )


def _ready(process: "subprocess.Popen[str]", folder: Path, side: Side) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        complaint = (folder / f"{side}.err").read_text(encoding="utf-8", errors="replace")
        reason = complaint.strip().splitlines()[-1:] or ["it said nothing"]
        raise NetemError(f"The demo's {side} did not start: {reason[0]}.")
    return line
