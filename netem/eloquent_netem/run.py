"""Running programs over a scenario: in namespaces behind the TUN router, or through a UDP proxy."""

import atexit
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from eloquent_netem.capture import Captured, PcapWriter, ToIp, udp_to_ip
from eloquent_netem.errors import NetemError
from eloquent_netem.link import Link
from eloquent_netem.namespaces import CLIENT_ADDRESS, SERVER_ADDRESS
from eloquent_netem.packet import Packet
from eloquent_netem.proxy import start_proxy
from eloquent_netem.queues import Queue
from eloquent_netem.realtime import LATENESS_BOUND_S, DriverStats, MakeLinks
from eloquent_netem.scenario import Scenario
from eloquent_netem.tun import tun_network, with_ecn

SERVER_VARIABLE = "NETEM_SERVER"
CLIENT_VARIABLE = "NETEM_CLIENT"
"Environment variables with the two ends' IPv4 addresses, for the commands that are run."

EXIT_SIGNAL = 128
"As a shell reports a program that a signal ended: this plus the signal's number."


class AddressError(NetemError):
    """An address on the command line is not of the form HOST:PORT."""


class CommandError(NetemError):
    """A command that was given as one string cannot be taken apart."""


class PcapError(NetemError):
    """The file for the packets cannot be written."""


def run_commands(
    scenario: Scenario,
    seed: int,
    client: Sequence[str],
    *,
    server: str | None,
    report: TextIO,
    live: bool = False,
    pcap: Path | None = None,
    lateness_bound_s: float = LATENESS_BOUND_S,
) -> int:
    """Run a command on the client's side, and perhaps one on the server's; return its exit code.

    The server's command is started first and ended with the client's. With `live` the terminal
    shows the links, and what the commands print goes to a file. `pcap` is where to write the
    packets that come out of the links. A run in which more than 1% of the packets come out later
    than `lateness_bound_s` is refused.

    Raises:
        CommandError: the server's command is none.
        NetemError: the namespaces cannot be made, or the run was not faithful to the scenario.
    """
    server_words = None if server is None else split_command(server)
    environment = {
        **os.environ,
        CLIENT_VARIABLE: CLIENT_ADDRESS,
        SERVER_VARIABLE: SERVER_ADDRESS,
    }
    links = _links(scenario, seed, pcap, _marked_ip)
    cross = partial(scenario.cross_flows, seed=seed)
    with ExitStack() as stack:
        options: dict[str, Any] = {"env": environment}
        output = _output_file() if live else None
        if output is not None:
            stack.callback(print, f"The commands' output is in {output}", file=report)
            file = stack.enter_context(output.open("wb"))
            options |= {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        network = stack.enter_context(
            tun_network(links, cross=cross, lateness_bound_s=lateness_bound_s)
        )
        stack.enter_context(sigterm_as_exit())
        network.start()
        if server_words is not None:
            network.popen("server", server_words, **options)
        process = network.popen("client", client, **options)
        if output is not None:
            footer = f"output: {output}   Ctrl-C ends it"
            _show_until(
                partial(_has_ended, process),
                lambda: network.stats().driver,
                f"{scenario.description}, seed {seed}",
                footer,
            )
        code = process.wait()
    _report(network.stats().driver, report)
    return EXIT_SIGNAL - code if code < 0 else code


def run_proxy(
    scenario: Scenario,
    seed: int,
    *,
    listen: str,
    target: str,
    report: TextIO,
    live: bool = False,
    pcap: Path | None = None,
    lateness_bound_s: float = LATENESS_BOUND_S,
) -> None:
    """Forward UDP through a scenario until SIGINT or SIGTERM.

    `live`, `pcap` and `lateness_bound_s` are those of `run_commands`; the packets get headers that
    are made up.

    Raises:
        AddressError: an address is not HOST:PORT.
        NetemError: an address cannot be had, or the run was not faithful to the scenario.
    """
    if live:
        _refuse_without_terminal()
    with start_proxy(
        _links(scenario, seed, pcap, udp_to_ip),
        target=parse_address(target),
        listen=parse_address(listen),
        cross=partial(scenario.cross_flows, seed=seed),
        lateness_bound_s=lateness_bound_s,
    ) as proxy:
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        proxy.start()
        listening = f"{proxy.address[0]}:{proxy.port}"
        print(f"LISTENING {listening}", flush=True)  # noqa: T201
        if live:
            title = f"eloquent netem proxy: {listening} to {target}, seed {seed}"
            _show_until(stopped.wait, lambda: proxy.stats().driver, title, "Ctrl-C ends it")
        stopped.wait()
    _report(proxy.stats().driver, report)


def split_command(text: str) -> list[str]:
    """Take a command apart as a shell does.

    Raises:
        CommandError: a quotation has no end, or there is no word.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise CommandError(
            f"The command {text!r} cannot be taken apart ({error}): quote it as for a shell."
        ) from error
    if not words:
        raise CommandError("The server's command is empty: give one, or leave --server out.")
    return words


def parse_address(text: str) -> tuple[str, int]:
    """Read `HOST:PORT`; an IPv6 address stands in brackets.

    Raises:
        AddressError: it is something else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"{text!r} is no address: write HOST:PORT, such as 127.0.0.1:4433.")
    return host.removeprefix("[").removesuffix("]"), int(port)


class CapturedLink(Link):
    """A link that is watched. A link for its type only: all it does, the one watched does."""

    def __init__(self, link: Link, captured: Captured) -> None:
        self._watched = link
        self._captured = captured

    @property
    def packets_sent(self) -> int:
        """See `Link.packets_sent`."""
        return self._watched.packets_sent

    @property
    def bytes_sent(self) -> int:
        """See `Link.bytes_sent`."""
        return self._watched.bytes_sent

    @property
    def packets_lost(self) -> int:
        """See `Link.packets_lost`."""
        return self._watched.packets_lost

    @property
    def queue(self) -> Queue:
        """See `Link.queue`."""
        return self._watched.queue

    def send(self, now: float, packet: Packet) -> None:
        """See `Link.send`."""
        self._captured.send(now, packet)

    def next_time(self) -> float | None:
        """See `Link.next_time`."""
        return self._captured.next_time()

    def poll(self, now: float) -> list[Packet]:
        """See `Link.poll`."""
        return self._captured.poll(now)


def _links(scenario: Scenario, seed: int, pcap: Path | None, to_ip: ToIp) -> MakeLinks:
    """Return what makes the links in the router's process, watched if there is a `pcap`."""
    links = partial(scenario.links, seed)
    if pcap is None:
        return links
    try:
        pcap.open("wb").close()  # Here, where an error is still easy to report.
    except OSError as error:
        raise PcapError(
            f"The packets cannot be written to {pcap} ({error.strerror}): name a file in a folder "
            "where you may write."
        ) from error
    return partial(_captured_links, links, pcap, to_ip)


def _captured_links(links: MakeLinks, pcap: Path, to_ip: ToIp) -> tuple[Link, Link]:
    file = pcap.open("wb")
    atexit.register(file.close)  # The process was made for these links and ends with them.
    writer = PcapWriter(file, to_ip=to_ip)
    up, down = links()
    return (
        CapturedLink(up, Captured(up, "up", [writer.observe])),
        CapturedLink(down, Captured(down, "down", [writer.observe])),
    )


def _marked_ip(direction: str, packet: Packet) -> bytes:
    """Return an IP packet as it came out: with the mark a queue may have set."""
    return with_ecn(packet.data, packet.ecn)


def _refuse_without_terminal() -> None:
    from eloquent_netem.view import refuse_without_terminal

    refuse_without_terminal()


def _output_file() -> Path:
    """Return a new file for the commands' output, now that the terminal is the view's."""
    _refuse_without_terminal()
    handle, name = tempfile.mkstemp(prefix="eloquent-netem-", suffix=".log")
    os.close(handle)
    return Path(name)


def _show_until(
    ended_within: Callable[[float], bool],
    stats: Callable[[], DriverStats],
    title: str,
    footer: str,
) -> None:
    """Show the links until the end; `ended_within` waits for it that many seconds at most."""
    from eloquent_netem.view import REFRESH_S, live_view

    with live_view(title, footer) as screen:
        while not ended_within(REFRESH_S):
            screen.show(stats())


def _has_ended(process: "subprocess.Popen[Any]", seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
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
