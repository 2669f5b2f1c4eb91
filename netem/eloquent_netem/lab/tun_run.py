"""One answer through the TUN router: two programs in two namespaces, and what they saw."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from eloquent_netem.errors import NetemError
from eloquent_netem.lab.measures import DeliveryError, check_delivery
from eloquent_netem.lab.rows import Arrivals, Place
from eloquent_netem.lab.tun_ends import SETUP, Go, Hello, Report, Setup
from eloquent_netem.lab.tun_links import Packets, noted_links, sizes
from eloquent_netem.namespaces import Side
from eloquent_netem.realtime import (
    LATENESS_BOUND_S,
    DriverStats,
    MakeCrossTraffic,
    MakeLinks,
    no_cross_traffic,
)
from eloquent_netem.tun import TunNetwork, tun_network

ENDS = "eloquent_netem.lab.tun_ends"
"The module of the programs."

SIDES: tuple[Side, ...] = ("server", "client")

LEAD_S = 0.1
"From the start of the router's clock to the instant at which the client begins."

END_LATENESS_FACTOR = 5.0
"""A run in which one of 100 timers of an end came later than this many times the router's bound is
refused."""

CLOCK_READINGS = 5

LOOK_EVERY_S = 0.1
US_PER_S = 1e6
PATIENCE_S = 180.0
"How much longer than its generation an answer may take; ends a hang."

LIVE_TOKEN_S = 1.0
"No model that is worth a run is slower."


class TunRunError(NetemError):
    """A program inside the namespaces failed, so the run is void."""


class StarvedError(NetemError):
    """The programs at the ends were woken too late, so they showed the machine."""


@dataclass(frozen=True, slots=True)
class Play:
    """One run, as it is to be."""

    kind: str
    "Of the ends: `eloquent_netem.lab.tun_ends`."
    setup: Setup
    links: MakeLinks
    "Their clock starts `LEAD_S` before the client begins."
    cross: MakeCrossTraffic = no_cross_traffic
    lateness_bound_s: float = LATENESS_BOUND_S
    rootless: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What was seen; times in seconds of CLOCK_MONOTONIC."""

    begun_s: float
    "When the client began."
    server: Report
    client: Report
    packets: Packets
    stats: DriverStats


def play(run: Play) -> Played:
    """Make one run; nothing is left of it.

    Raises:
        NamespaceError: the namespaces cannot be made; the message says why and what helps.
        LatenessError, OverloadError, StarvedError: the machine was too slow, so the run is void.
        TunRunError: a program in it failed, or it did not end.
    """
    with tempfile.TemporaryDirectory(prefix="eloquent-lab-") as name, contextlib.ExitStack() as end:
        folder = Path(name)
        (folder / SETUP).write_bytes(msgspec.json.encode(run.setup))
        notes = folder / "packets"
        with tun_network(
            partial(noted_links, run.links, notes),
            cross=run.cross,
            lateness_bound_s=run.lateness_bound_s,
            rootless=run.rootless,
        ) as network:
            sides: dict[Side, subprocess.Popen[str]] = {}
            for side in SIDES:
                sides[side] = start_end(network, side, run.kind, folder)
                end.callback(close_pipes, sides[side])
            hello = await_ready(sides, folder)
            started_s = _start_clock(network)
            say_go(sides["client"], Go(started_s + LEAD_S, hello))
            _await_end(run, sides, folder)
        reports = {
            side: msgspec.json.decode((folder / f"{side}.json").read_bytes(), type=Report)
            for side in sides
        }
        played = Played(
            begun_s=started_s + LEAD_S,
            server=reports["server"],
            client=reports["client"],
            packets=Packets.read(notes, started_s),
            stats=network.stats().driver,
        )
    _refuse_starved(played, END_LATENESS_FACTOR * run.lateness_bound_s)
    return played


def arrivals(played: Played, place: Place, begin_s: float) -> Arrivals:
    """Return what the answer did, if it arrived whole, in order and once.

    `begin_s` is what the scenario's clock read when the client began.

    Raises:
        DeliveryError: something is missing, doubled or changed.
    """
    check_delivery(played.server.texts, played.client.texts)
    generated_s, rendered_s = played.server.times_s, played.client.times_s
    packets = played.packets
    own_s = packets.programs_s(generated_s, rendered_s)
    down = sizes(packets.down, generated_s[0], rendered_s[-1])
    up = sizes(packets.up, generated_s[0], rendered_s[-1])
    return Arrivals(
        generated_s=generated_s,
        rendered_s=rendered_s,
        requested_s=played.begun_s,
        base_delay_s=place.base_delay_s + own_s,
        programs_s=own_s,
        origin_s=played.begun_s - begin_s,
        downlink_packets=len(down),
        downlink_bytes=sum(down),
        uplink_bytes=sum(up),
        lateness_p50_us=played.stats.lateness.p50_s * US_PER_S,
        lateness_p99_us=played.stats.lateness.p99_s * US_PER_S,
    )


def _start_clock(network: TunNetwork) -> float:
    """Start the scenario's clock; return when that was.

    Of some readings of the clock, each of which took a while, the quickest is the most exact.
    """
    network.start()
    readings = []
    for _ in range(CLOCK_READINGS):
        before_s = time.monotonic()
        clock_s = network.stats().driver.clock_s
        took_s = time.monotonic() - before_s
        readings.append((took_s, before_s + took_s / 2 - clock_s))
    return min(readings)[1]


def start_end(
    network: TunNetwork, side: Side, kind: str, folder: Path, *, module: str = ENDS
) -> "subprocess.Popen[str]":
    """Start one end of an answer, whose setup is in `folder`; `module` is like `ENDS`."""
    with (folder / f"{side}.err").open("w") as complaints:
        return network.popen(
            side,
            [sys.executable, "-m", module, kind, side, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            start_new_session=True,  # Ctrl-C is for us, who end it.
        )


def await_ready(sides: "Mapping[Side, subprocess.Popen[str]]", folder: Path) -> Hello:
    """Wait until both ends are ready; return the server's word.

    Raises:
        TunRunError: one of them failed.
    """
    said = {}
    for side in SIDES:
        pipe = sides[side].stdout
        assert pipe is not None
        said[side] = pipe.readline()
        if not said[side]:
            raise failed(folder, side, sides[side].wait())
    return msgspec.json.decode(said["server"], type=Hello)


def say_go(client: "subprocess.Popen[str]", go: Go) -> None:
    """Tell a client when to begin."""
    assert client.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # Its end is noticed at once.
        client.stdin.write(f"{msgspec.json.encode(go).decode()}\n")
        client.stdin.flush()


def close_pipes(process: "subprocess.Popen[str]") -> None:
    """Close the pipes to an end, whether it is there or not; a server then ends."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _await_end(run: Play, sides: "dict[Side, subprocess.Popen[str]]", folder: Path) -> None:
    """Wait until the client has the answer, then end the server."""
    plan, live = run.setup.plan, run.setup.live
    length_s = plan[-1].time_s if live is None else live.max_tokens * LIVE_TOKEN_S
    deadline_s = time.monotonic() + length_s + PATIENCE_S
    _await(sides, "client", folder, deadline_s)
    server = sides["server"].stdin
    assert server is not None
    server.close()  # That tells it to end.
    _await(sides, "server", folder, deadline_s)


def _await(
    sides: "dict[Side, subprocess.Popen[str]]", side: Side, folder: Path, deadline_s: float
) -> None:
    """Wait until a program has ended well; the server is not to end before the client."""
    while sides[side].poll() is None and (side == "server" or sides["server"].poll() is None):
        if time.monotonic() > deadline_s:
            raise DeliveryError(
                f"The answer was not whole {PATIENCE_S:g} s after its generation: the network "
                "lets nothing through, or the transport hangs."
            )
        time.sleep(LOOK_EVERY_S)
    server_code, code = sides["server"].poll(), sides[side].poll()
    if server_code or code is None:  # If both failed, the client did because the server had.
        raise failed(folder, "server", server_code or 0)
    if code:
        raise failed(folder, side, code)


def failed(folder: Path, side: Side, code: int) -> TunRunError:
    """Return the error that tells of a failed end, in its own last words."""
    complaint = (folder / f"{side}.err").read_text(encoding="utf-8", errors="replace")
    reason = complaint.strip().splitlines()[-1:] or [f"exit code {code}"]
    return TunRunError(
        f"The {side}'s program in its namespace failed ({reason[0]}), so the run is void. Run it "
        "again; if it fails again, report it."
    )


def _refuse_starved(played: Played, bound_s: float) -> None:
    late_s = max(played.server.late_p99_s, played.client.late_p99_s)
    if late_s > bound_s:
        raise StarvedError(
            f"A program in the namespaces was woken {late_s * 1e3:.1f} ms late or later in one "
            f"case of 100, and {bound_s * 1e3:.0f} ms is the bound, so this run's "
            "figures would show the machine and not the network: run fewer at a time, or use a "
            "less busy machine."
        )
