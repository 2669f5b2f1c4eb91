"""How a server stops: at once, or after the answers that are under way.

SIGTERM begins a *drain*: new turns are declined with `overloaded`, and the server waits until
nothing is generated or read any more, for a time that has an end. A second SIGTERM, or SIGINT, ends
it at once. What is not finished then is the hub's matter: with a store that outlives the process it
goes on after the restart.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable

from eloquent.errors import RequestError
from eloquent_server.admission import Admission, Principal
from eloquent_server.turns import TurnHub

LOOK_EVERY_S = 0.1
"How often a drain looks whether it is done."

MIN_RETRY_AFTER_S = 1.0

STDIN = 0

DRAINING = "The server is about to stop and takes no new turns: ask again in a moment."

logger = logging.getLogger(__name__)


class ClosableGate:
    """Lets new turns in until it is shut, by what `behind` says; an `Admission`.

    Readers of turns that there are come in all the same.
    """

    def __init__(self, behind: Admission, now: Callable[[], float]) -> None:
        """`now` is a clock, in seconds."""
        self._behind = behind
        self._now = now
        self._opens_at: float | None = None
        "When it is likely to be open again; None: it is."
        self.open_turns = 0
        "How many were let in and are not over."

    @property
    def is_shut(self) -> bool:
        """Whether no new turn is let in."""
        return self._opens_at is not None

    def shut(self, for_s: float) -> None:
        """Let no new turn in; it is said that the server is back after `for_s` seconds."""
        self._opens_at = self._now() + for_s

    def principal(self, key: str) -> Principal:
        """See `Admission.principal`."""
        return self._behind.principal(key)

    def named(self, name: str) -> Principal:
        """See `Admission.named`."""
        return self._behind.named(name)

    def admit(self, principal: Principal, body_bytes: int) -> None:
        """See `Admission.admit`."""
        if self._opens_at is not None:
            left_s = max(MIN_RETRY_AFTER_S, self._opens_at - self._now())
            raise RequestError("overloaded", DRAINING, left_s)
        self._behind.admit(principal, body_bytes)
        self.open_turns += 1

    def ended(self, principal: Principal, answer_bytes: int) -> None:
        """See `Admission.ended`."""
        self.open_turns -= 1
        self._behind.ended(principal, answer_bytes)


class Signals:
    """What the process is told from outside; the one owner of its signals."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take SIGTERM, SIGINT and SIGHUP from now on; the latter not where there is a terminal.

        A terminal that is closed says so with SIGHUP, and ends what runs in it.
        """
        self.stop = asyncio.Event()
        "The server is to stop."
        self.stop_now = asyncio.Event()
        "It is not to wait for anything."
        self._reload: list[Callable[[], object]] = []
        loop.add_signal_handler(signal.SIGTERM, self._on_terminate)
        loop.add_signal_handler(signal.SIGINT, self.end)
        if not os.isatty(STDIN):
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def on_hangup(self, do: Callable[[], object]) -> None:
        """Have SIGHUP do this, too."""
        self._reload.append(do)

    def end(self) -> None:
        """Stop at once."""
        self.stop_now.set()
        self.stop.set()

    def _on_terminate(self) -> None:
        if self.stop.is_set():
            self.stop_now.set()
        self.stop.set()

    def _on_hangup(self) -> None:
        for do in self._reload:
            do()


async def drain(gate: ClosableGate, hub: TurnHub, signals: Signals, timeout_s: float) -> None:
    """Let no new turn in, and wait until the others are over and read, or `timeout_s` is over.

    Returns earlier when the server is to stop at once.
    """
    if signals.stop_now.is_set():
        return
    gate.shut(timeout_s)
    logger.info(
        "stopping: %d turns under way, %d readers, %g s at most",
        *(hub.generating, hub.readers, timeout_s),
    )
    ends_at = asyncio.get_running_loop().time() + timeout_s
    while gate.open_turns or hub.generating or hub.readers:
        left_s = ends_at - asyncio.get_running_loop().time()
        if left_s <= 0:
            logger.warning(
                "stopping with %d turns under way and %d readers", hub.generating, hub.readers
            )
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left_s, LOOK_EVERY_S)):
                await signals.stop_now.wait()
                return


def notify(state: str) -> None:
    """Tell systemd of a unit with `Type=notify` what the server does (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        try:
            channel.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            channel.send(state.encode())
        except OSError as error:
            logger.warning("systemd could not be told %s: %s", state, error)
