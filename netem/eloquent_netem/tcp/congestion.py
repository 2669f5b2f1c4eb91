"""Congestion control: how many packets may be under way. Reno (RFC 5681) and CUBIC (RFC 9438).

Windows count packets, as in Linux. Source: net/ipv4/tcp_cong.c.
"""

from collections.abc import Callable
from typing import Protocol

from eloquent_netem.tcp.cubic import Cubic
from eloquent_netem.tcp.errors import TcpError
from eloquent_netem.tcp.window import Window


class Controller(Protocol):
    """A congestion control algorithm; it moves `window`."""

    window: Window

    def reduced(self) -> int:
        """Return the slow-start threshold after a loss or an ECN echo."""

    def on_ack(self, now: float, acked: int) -> None:
        """Grow for `acked` packets delivered outside of recovery."""

    def on_rtt(self, now: float, rtt_s: float, *, una: int, nxt: int) -> None:
        """Take a round-trip time."""

    def on_timeout(self, now: float, nxt: int) -> None:
        """Forget what the path was like: a timeout has struck."""

    def on_resume(self, now: float, idle_s: float) -> None:
        """Sending resumes after `idle_s` with nothing under way."""


class Reno:
    """One packet more per round trip, half on loss."""

    def __init__(self) -> None:
        self.window = Window()

    def reduced(self) -> int:
        """See `Controller.reduced`."""
        return max(self.window.cwnd >> 1, 2)

    def on_ack(self, now: float, acked: int) -> None:
        """See `Controller.on_ack`."""
        window = self.window
        if not window.may_grow:
            return
        if window.in_slow_start:
            acked = window.slow_start(acked)
        if acked:
            window.grow(window.cwnd, acked)

    def on_rtt(self, now: float, rtt_s: float, *, una: int, nxt: int) -> None:
        """See `Controller.on_rtt`."""

    def on_timeout(self, now: float, nxt: int) -> None:
        """See `Controller.on_timeout`."""

    def on_resume(self, now: float, idle_s: float) -> None:
        """See `Controller.on_resume`."""


CONTROLLERS: dict[str, Callable[[], Controller]] = {"cubic": Cubic, "reno": Reno}


def make_controller(name: str) -> Controller:
    """Return a new controller: "cubic" or "reno".

    Raises:
        TcpError: there is none of that name.
    """
    if name not in CONTROLLERS:
        raise TcpError(
            f"There is no congestion control {name!r} in the TCP model: choose one of "
            f"{', '.join(CONTROLLERS)}."
        )
    return CONTROLLERS[name]()
