"""Running programs over a scenario: in namespaces behind the TUN router, or through a UDP proxy."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TextIO

from eloquent_netem.errors import NetemError
from eloquent_netem.namespaces import CLIENT_ADDRESS, SERVER_ADDRESS
from eloquent_netem.proxy import start_proxy
from eloquent_netem.realtime import DriverStats
from eloquent_netem.scenario import Scenario
from eloquent_netem.tun import tun_network

SERVER_VARIABLE = "NETEM_SERVER"
CLIENT_VARIABLE = "NETEM_CLIENT"
"Environment variables with the two ends' IPv4 addresses, for the commands that are run."

EXIT_SIGNAL = 128
"As a shell reports a program that a signal ended: this plus the signal's number."


class AddressError(NetemError):
    """An address on the command line is not of the form HOST:PORT."""


def run_commands(
    scenario: Scenario, seed: int, client: Sequence[str], *, server: str | None, report: TextIO
) -> int:
    """Run a command on the client's side, and perhaps one on the server's; return its exit code.

    The server's command is started first and ended with the client's.

    Raises:
        NetemError: the namespaces cannot be made, or the run was not faithful to the scenario.
    """
    environment = {
        **os.environ,
        CLIENT_VARIABLE: CLIENT_ADDRESS,
        SERVER_VARIABLE: SERVER_ADDRESS,
    }
    links = partial(scenario.links, seed)
    cross = partial(scenario.cross_flows, seed=seed)
    with tun_network(links, cross=cross) as network, _signals_as_exit():
        network.start()
        if server is not None:
            network.popen("server", shlex.split(server), env=environment)
        process = network.popen("client", client, env=environment)
        code = process.wait()
    _report(network.stats().driver, report)
    return EXIT_SIGNAL - code if code < 0 else code


def run_proxy(scenario: Scenario, seed: int, *, listen: str, target: str, report: TextIO) -> None:
    """Forward UDP through a scenario until SIGINT or SIGTERM.

    Raises:
        AddressError: an address is not HOST:PORT.
        NetemError: an address cannot be had, or the run was not faithful to the scenario.
    """
    with start_proxy(
        partial(scenario.links, seed),
        target=parse_address(target),
        listen=parse_address(listen),
        cross=partial(scenario.cross_flows, seed=seed),
    ) as proxy:
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        proxy.start()
        print(f"LISTENING {proxy.address[0]}:{proxy.port}", flush=True)  # noqa: T201
        stopped.wait()
    _report(proxy.stats().driver, report)


def parse_address(text: str) -> tuple[str, int]:
    """Read `HOST:PORT`; an IPv6 address stands in brackets.

    Raises:
        AddressError: it is something else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"{text!r} is no address: write HOST:PORT, such as 127.0.0.1:4433.")
    return host.removeprefix("[").removesuffix("]"), int(port)


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that everything is cleaned up."""

    def leave(number: int, frame: object) -> None:
        sys.exit(EXIT_SIGNAL + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(stats: DriverStats, report: TextIO) -> None:
    for name, way in (("up", stats.up), ("down", stats.down)):
        print(
            f"{name}: {way.packets_sent} packets sent, {way.packets_lost} lost, "
            f"{way.queue_drops} dropped by the queue, {way.packets_delivered} delivered",
            file=report,
        )
    print(
        f"router lateness: p50 {1e6 * stats.lateness.p50_s:.0f} us, "
        f"p99 {1e6 * stats.lateness.p99_s:.0f} us",
        file=report,
    )
