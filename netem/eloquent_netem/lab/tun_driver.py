"""The driver `tun`: real programs, the kernel's TCP and our QUIC, through the TUN router."""

import contextlib
import fcntl
import os
import platform
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from eloquent.core.schemes import SCHEMES
from eloquent.errors import ConfigurationError
from eloquent_netem.errors import NetemError
from eloquent_netem.lab.answer import PADDED_SCHEMES, QUIC_STREAM
from eloquent_netem.lab.rows import Arrivals, Place
from eloquent_netem.lab.sources import LiveModel, Source
from eloquent_netem.lab.tun_ends import Setup
from eloquent_netem.lab.tun_links import cross_traffic
from eloquent_netem.lab.tun_run import (
    END_LATENESS_FACTOR,
    LEAD_S,
    Play,
    StarvedError,
    arrivals,
    play,
)
from eloquent_netem.link import Link
from eloquent_netem.realtime import (
    LATENESS_BOUND_S,
    LatenessError,
    OverloadError,
    become_real_time,
)
from eloquent_netem.tun import tun_network

KINDS = {
    **dict.fromkeys((*SCHEMES, QUIC_STREAM), "quic"),
    "tcp-sse": "sse",
    "tcp-websocket": "websocket",
}
"Schemes, and the programs that are their ends."

PACKAGES = ("httpx2", "starlette", "uvicorn", "websockets")
"What the baselines are made of."

RUNS_PER_PROCESSOR = 6
"""A run of 400 tokens at 30 a second takes 1.8 s of a processor's time, start included, in
its 15 s. On two processors 18 at once were no later than 8."""

LIVE_TOKENS_PER_S = 30.0
"A guess, to place the live model's answer on the scenario's clock."


class RefusedError(NetemError):
    """The machine was too slow for a run, again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunDriver:
    """See `Driver`: each run has namespaces, a router and two programs of its own."""

    congestion: str = "cubic"
    "Of the kernel's TCP, at both ends."
    at_once: int = field(
        default_factory=lambda: RUNS_PER_PROCESSOR * (os.cpu_count() or 1), repr=False
    )
    tries: int = field(default=3, repr=False)
    "A run in which the machine was too slow is made so often at most."
    lateness_bound_s: float = LATENESS_BOUND_S
    rootless: bool | None = field(default=None, repr=False)
    "Whether to use user namespaces; None: only if need be."

    @property
    def name(self) -> str:
        """See `Driver.name`."""
        return "tun"

    @property
    def schemes(self) -> tuple[str, ...]:
        """See `Driver.schemes`."""
        return tuple(KINDS)

    @property
    def most_workers(self) -> int | None:
        """See `Driver.most_workers`."""
        return self.at_once

    def meta(self) -> dict[str, object]:
        """See `Driver.meta`."""
        return {
            "time": "real",
            "kernel": platform.release(),
            "scheduling": _scheduling(),
            "tcp": f"the kernel's, {self.congestion}, over TLS 1.3",
            "lateness_bound_us": self.lateness_bound_s * 1e6,
            "end_lateness_bound_us": END_LATENESS_FACTOR * self.lateness_bound_s * 1e6,
            "tries": self.tries,
            "versions": {name: version(name) for name in PACKAGES},
            "at_once": self.at_once,
        }

    def check(self) -> None:
        """See `Driver.check`.

        Raises:
            NamespaceError: the namespaces cannot be made.
            ConfigurationError: a package is missing, or the kernel has no such congestion control.
        """
        for name in PACKAGES:
            if find_spec(name) is None:
                raise ConfigurationError(
                    f"The driver tun needs the package {name}: install eloquent-stream[lab]."
                )
        with tun_network(_no_links, rootless=self.rootless):  # It knows systems that are not Linux.
            pass
        check_congestion(self.congestion)

    def run(self, place: Place, scheme: str, seed: int, source: Source) -> Arrivals:
        """See `Driver.run`.

        Raises:
            DeliveryError: the answer did not arrive whole, in order and once.
            RefusedError: the machine was too slow each time.
            NetemError: the run could not be made.
        """
        live = source if isinstance(source, LiveModel) else None
        plan = () if isinstance(source, LiveModel) else source.plan(seed)
        answer_s = plan[-1].time_s if live is None else live.max_tokens / LIVE_TOKENS_PER_S
        begin_s = place.begin_s(seed, answer_s)
        origin_s = LEAD_S - begin_s
        run = Play(
            kind=KINDS[scheme],
            setup=Setup(
                scheme=scheme,
                padding=scheme in PADDED_SCHEMES,
                congestion=self.congestion,
                plan=plan,
                live=live,
            ),
            links=partial(place.scenario.links, seed, origin_s),
            cross=partial(cross_traffic, place, seed, origin_s),
            lateness_bound_s=self.lateness_bound_s,
            rootless=self.rootless,
        )
        reason = ""
        for _ in range(self.tries):
            try:
                with contextlib.nullcontext() if live is None else _alone():
                    return arrivals(play(run), place, begin_s)
            except (LatenessError, OverloadError, StarvedError) as error:
                reason = str(error)
        raise RefusedError(f"Refused {self.tries} times, the last time so: {reason}")


def check_congestion(name: str) -> None:
    """See that the kernel's TCP has a congestion control.

    Raises:
        ConfigurationError: it has not.
    """
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except PermissionError:
            return  # It is there; inside a namespace of ours it is allowed.
        except OSError as error:
            raise ConfigurationError(
                f"This kernel's TCP has no congestion control {name!r}: load its module "
                f"(modprobe tcp_{name}), or choose one that "
                "`sysctl net.ipv4.tcp_available_congestion_control` names."
            ) from error


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let one run of a live model go on at a time, whichever process makes it."""
    path = Path(tempfile.gettempdir()) / f"eloquent-lab-live-{os.getuid()}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _scheduling() -> str:
    """Return under which policy routers and ends run; each thread has one of its own."""
    with ThreadPoolExecutor(1) as pool:
        return "SCHED_FIFO" if pool.submit(become_real_time).result() else "SCHED_OTHER"


def _no_links() -> tuple[Link, Link]:
    return Link(delay_s=0.0, seed=0, name="up"), Link(delay_s=0.0, seed=0, name="down")
