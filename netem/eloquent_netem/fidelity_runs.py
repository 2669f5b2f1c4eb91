"""A fidelity report's runs: real programs through the TUN router, and the same in the model."""

import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from eloquent_netem.errors import NetemError
from eloquent_netem.fidelity_ends import DATAGRAM_BYTES, TOKEN_BYTES, US_PER_S
from eloquent_netem.fidelity_rows import FLOOD_PACKETS_PER_S, RENO_LOSS, RTT_S, Pair
from eloquent_netem.namespaces import CLIENT_ADDRESS, SERVER_ADDRESS, Side
from eloquent_netem.packet import udp_packet
from eloquent_netem.realtime import LATENESS_BOUND_S, DriverStats
from eloquent_netem.scenario import Scenario, load_scenario, parse_scenario
from eloquent_netem.tcp.tokens import START_S, even_tokens, send_tokens
from eloquent_netem.tun import TunNetwork, tun_network

INTERVAL_S = 0.02
END_WITHIN_S = 600.0
"Ends a hang; decides nothing."
STOP_WITHIN_S = 0.2
"How often a run looks whether it is to stop."


class FidelityError(NetemError):
    """A program inside the namespaces failed, so there is nothing to compare."""


class StoppedError(FidelityError):
    """The report is being ended, so the run is void."""


def clocked_loss(loss: float) -> Scenario:
    """Return a path of `RTT_S` whose slots of 1 ms are bad with this probability, both ways."""
    way = f"{{ kind = 'bursts', loss = {loss}, burst_ms = 1 }}"
    return parse_scenario(
        f"up = {{ delay_ms = {500 * RTT_S}, loss = {way} }}\n"
        f"down = {{ delay_ms = {500 * RTT_S}, loss = {way} }}\n"
    )


def independent_loss(loss: float) -> Scenario:
    """Return a path of `RTT_S` that loses this share of the packets down, and nothing up."""
    return parse_scenario(
        f"up = {{ delay_ms = {500 * RTT_S} }}\n"
        f"down = {{ delay_ms = {500 * RTT_S}, "
        f"loss = {{ kind = 'independent', probability = {loss} }} }}\n"
    )


def simulated_udp(scenario: Scenario, count: int, seed: int) -> list[float]:
    """Return the delays of the datagrams that arrive in the simulator."""
    _, link = scenario.links(seed)
    delays: list[float] = []
    for index in range(count + 1):
        now = START_S + index * INTERVAL_S if index < count else math.inf
        while (due := link.next_time()) is not None and due <= now:
            delays += [due - packet.entered_s for packet in link.poll(due)]
        if index < count:
            link.send(now, udp_packet(bytes(DATAGRAM_BYTES)))
    return delays


def simulated_tcp(scenario: Scenario, count: int, seed: int) -> list[float]:
    """Return the delays of tokens over the TCP model."""
    up, down = scenario.links(seed)
    plan = even_tokens(count, interval_s=INTERVAL_S, token_bytes=TOKEN_BYTES)
    times = send_tokens(up=up, down=down, plan=plan)
    return [seen - made for made, seen in zip(times.generated_s, times.rendered_s, strict=True)]


@dataclass(frozen=True, slots=True)
class Runs:
    """Makes runs, each in a network of its own; threads may share it.

    All methods raise `NetemError` where the run was refused, could not be made, or a program in
    it failed, and `StoppedError` soon after `stopped` is set; nothing is left of a run then.
    """

    lateness_bound_s: float = LATENESS_BOUND_S
    stopped: threading.Event = field(default_factory=threading.Event)

    def udp_pair(self, scenario: Scenario, count: int, seed: int) -> Pair:
        """Send datagrams down, through the router and in the simulator."""
        amount = (str(count), str(INTERVAL_S))
        said, _ = self.ends(
            scenario,
            seed,
            ("send_datagrams", CLIENT_ADDRESS, *amount),
            ("receive_datagrams", CLIENT_ADDRESS, *amount),
        )
        return Pair(_seconds(said), simulated_udp(scenario, count, seed))

    def tcp_delays(self, scenario: Scenario, count: int, seed: int) -> list[float]:
        """Send tokens down with the kernel's CUBIC, through the router; return their delays."""
        said, _ = self.ends(
            scenario,
            seed,
            ("serve_tokens", SERVER_ADDRESS, str(count), str(INTERVAL_S), "cubic"),
            ("read_tokens", SERVER_ADDRESS),
        )
        delays = _seconds(said)
        if len(delays) != count:
            raise FidelityError(
                f"Only {len(delays)} of {count} tokens came through TCP, so the connection broke "
                "and its delays mean nothing: run it again."
            )
        return delays

    def reno_bits_per_s(self, seconds: float, seed: int) -> float:
        """Return the goodput of one greedy Reno flow of the kernel's, through the router."""
        said, _ = self.ends(
            independent_loss(RENO_LOSS),
            seed,
            ("serve_greedy", SERVER_ADDRESS, "reno"),
            ("read_greedy", SERVER_ADDRESS, str(seconds)),
        )
        return 8 * float(json.loads(said))

    def flood_stats(self, seconds: float) -> DriverStats:
        """Return how the router fared under `FLOOD_PACKETS_PER_S`."""
        server = ("flood", CLIENT_ADDRESS, str(seconds), str(FLOOD_PACKETS_PER_S))
        client = ("sink", CLIENT_ADDRESS, str(seconds))
        return self.ends(load_scenario("clean"), 1, server, client)[1]

    def ends(
        self, scenario: Scenario, seed: int, server: Sequence[str], client: Sequence[str]
    ) -> tuple[str, DriverStats]:
        """Run two programs of `fidelity_ends`; return what the client's printed.

        They start `START_S` after the scenario's clock, as in the simulator.
        """
        self._check_stopped()
        with contextlib.ExitStack() as stack:
            ends: list[subprocess.Popen[str]] = []
            stack.callback(_close_pipes, ends)
            links = partial(scenario.links, seed)
            with tun_network(links, lateness_bound_s=self.lateness_bound_s) as network:
                self._start_end(network, "server", server, ends)
                self._start_end(network, "client", client, ends)
                start_s = time.monotonic() + START_S
                network.start()
                for end in ends:
                    assert end.stdin is not None
                    end.stdin.write(f"{start_s}\n")
                    end.stdin.flush()
                # The client's end ends the server's.
                said = self._finish(ends[1])
                self._finish(ends[0])
        return said, network.stats().driver

    def _check_stopped(self) -> None:
        if self.stopped.is_set():
            raise StoppedError("The report was ended before this run was: run it again.")

    def _start_end(
        self,
        network: TunNetwork,
        side: Side,
        role: Sequence[str],
        ends: "list[subprocess.Popen[str]]",
    ) -> None:
        """Start a program in a namespace, and wait until it is ready."""
        end = network.popen(
            side,
            [sys.executable, "-m", "eloquent_netem.fidelity_ends", *role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us, who end it.
        )
        ends.append(end)
        assert end.stdout is not None
        if end.stdout.readline() != "ready\n":
            self._finish(end)
            raise FidelityError(f"{role[0]} ended before it was ready: run it again.")

    def _finish(self, end: "subprocess.Popen[str]") -> str:
        """Wait for a program's end; return what it printed."""
        deadline_s = time.monotonic() + END_WITHIN_S
        while True:
            self._check_stopped()
            try:
                said, complaint = end.communicate(timeout=STOP_WITHIN_S)
                break
            except subprocess.TimeoutExpired as error:
                if time.monotonic() > deadline_s:
                    raise FidelityError(
                        "A program in the namespaces did not end; is the machine too busy? Run it "
                        "again."
                    ) from error
        if end.returncode:
            reason = complaint.strip().splitlines()[-1:] or [f"exit code {end.returncode}"]
            raise FidelityError(
                f"A program in the namespaces failed ({reason[0]}), so there is nothing to "
                "compare: as root every congestion control of the kernel's may be used, else see "
                "net.ipv4.tcp_allowed_congestion_control."
            )
        return said


def _close_pipes(ends: "Sequence[subprocess.Popen[str]]") -> None:
    for end in ends:
        for pipe in (end.stdin, end.stdout, end.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _seconds(said: str) -> list[float]:
    return [delay_us / US_PER_S for delay_us in json.loads(said)]
