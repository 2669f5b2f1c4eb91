"""What a session asks of the machine it runs on: is there a way to the server, has it changed?"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

POLL_S = 1.0
"Where the system does not tell of changes, they are looked for this often."

SETTLE_S = 0.05
"A change comes as several messages (link, address, route); they are waited for this long."

WOKE_S = 1.0
"So much sleep of the machine, or a wait that took so much longer than it should, is a waking up."

_NETLINK_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR and _IPV6_ROUTE of linux/rtnetlink.h."
_NETLINK_ROUTE = 0
_NETLINK_BYTES = 1 << 16

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"Addresses for documentation (RFC 5737, RFC 3849): packets to them would take the default route."


class Machine(Protocol):
    """The machine's network and sleep, as far as a session cares."""

    def source_for(self, host: str) -> str | None:
        """Return which local address packets to `host` would have now; None: no way leads there.

        Whatever the text is, it changes when the way does.
        """

    def slept_s(self) -> float:
        """Return for how long the machine has slept up to now, in seconds, from any origin."""

    def changes(self) -> AsyncIterator[None]:
        """Give a note whenever addresses or routes may have changed, until it is closed."""


class FixedMachine:
    """A machine whose network never changes, as far as can be seen."""

    def source_for(self, host: str) -> str | None:
        """See `Machine.source_for`."""
        return "unknown"

    def slept_s(self) -> float:
        """See `Machine.slept_s`."""
        return 0.0

    async def changes(self) -> AsyncIterator[None]:
        """See `Machine.changes`."""
        await asyncio.Event().wait()
        yield


class SystemMachine:
    """This machine: netlink says on Linux when something changes; elsewhere it is looked for."""

    def source_for(self, host: str) -> str | None:
        """See `Machine.source_for`."""
        try:
            return _source_for(str(ipaddress.ip_address(host)))
        except ValueError:
            found = [_source_for(address) for address in _ELSEWHERE]
            return None if found == [None, None] else str(found)

    def slept_s(self) -> float:
        """See `Machine.slept_s`: clocks that go on in sleep, against one that does not."""
        if sys.platform == "linux":
            return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        return time.time() - time.monotonic()

    async def changes(self) -> AsyncIterator[None]:
        """See `Machine.changes`."""
        try:
            sock = _open_netlink()
        except (OSError, AttributeError):  # another system, or a sandbox
            while True:
                await asyncio.sleep(POLL_S)
                yield
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        loop.add_reader(sock, told.set)
        try:
            while True:
                await told.wait()
                await asyncio.sleep(SETTLE_S)
                told.clear()
                _drain(sock)
                yield
        finally:
            loop.remove_reader(sock)
            sock.close()


def this_machine() -> Machine:
    """Return the machine that the running loop is on: the real one, or in virtual time a fixed one.

    A loop that watches no sockets is not on the machine's network.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            loop.add_reader(probe, os.getpid)
        except NotImplementedError:
            return FixedMachine()
        loop.remove_reader(probe)
    return SystemMachine()


class Route:
    """The way to one server, as it was when it was last looked at."""

    def __init__(self, host: str, machine: Machine | None) -> None:
        """Without a `machine` it is the one that the loop is on."""
        self._host = host
        self._given = machine
        self._source: str | None = None
        self._slept_s = 0.0
        self._looked = 0
        self._was_used = False
        self._changed = asyncio.Event()
        self.changes = 0
        "How often the network may have changed."

    @property
    def source(self) -> str | None:
        """What `Machine.source_for` said."""
        return self._source

    @property
    def is_missing(self) -> bool:
        """Whether no way leads to the server; not so if none was seen while there was a link."""
        return self._was_used and self._machine.source_for(self._host) is None

    def is_another(self, source: str | None) -> bool:
        """Return whether the way is now another one than `source` stands for."""
        return self._machine.source_for(self._host) != source

    def look(self) -> bool:
        """Look at it; return whether it has changed, or the machine has slept."""
        self._looked = self.changes
        before = self._source, self._slept_s
        self._source, self._slept_s = self._machine.source_for(self._host), self._machine.slept_s()
        return self._source != before[0] or self._slept_s - before[1] > WOKE_S

    def has_changed(self) -> bool:
        """Return what `look` does, and look only if there is a reason to."""
        if self._looked == self.changes and self._machine.slept_s() - self._slept_s <= WOKE_S:
            return False
        return self.look()

    def note_use(self) -> None:
        """Take note that there is a link to the server now."""
        self.look()
        self._was_used = self._source is not None

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Watch the machine until this is cancelled."""
        async for _ in self._machine.changes():
            self.changes += 1
            self._changed.set()
            self._changed.clear()
            on_change()

    async def wait(self, changes: int, timeout_s: float) -> bool:
        """Wait until the network changed more often than `changes`; return whether it did."""
        if self.changes == changes:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
        return self.changes != changes

    @property
    def _machine(self) -> Machine:
        if self._given is None:
            self._given = this_machine()
        return self._given


def _open_netlink() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_ROUTE)
    try:
        sock.bind((0, _NETLINK_GROUPS))
    except OSError:
        sock.close()
        raise
    return sock


def _drain(sock: socket.socket) -> None:
    """Read what there is; what the loss of some (ENOBUFS) leaves for later is another change."""
    with contextlib.suppress(OSError):
        while True:
            sock.recv(_NETLINK_BYTES)


def _source_for(address: str) -> str | None:
    """Ask the kernel; connecting a UDP socket sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((address, 9))
            return str(sock.getsockname()[0])
    except OSError:
        return None
