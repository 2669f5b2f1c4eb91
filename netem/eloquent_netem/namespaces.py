"""Two network namespaces with a TUN device each, held by the process that made them.

They have no names: they live in open files of one process, and the kernel removes them, devices
included, when that process and those inside are gone, however they ended. `ip netns list` never
shows them; `Namespaces.entry` tells how to get in. All is done as root, or without root in a user
namespace of our own (user_namespaces(7)) where those are allowed.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eloquent_netem.errors import NetemError

Side = Literal["client", "server"]

CLIENT_ADDRESS = "192.0.2.1"
SERVER_ADDRESS = "192.0.2.2"
"TEST-NET-1 (RFC 5737); they exist only inside the namespaces."
CLIENT_ADDRESS_V6 = "2001:db8::1"
SERVER_ADDRESS_V6 = "2001:db8::2"
"The documentation prefix (RFC 3849)."

DEFAULT_MTU = 1500
DEVICE = "tun0"
TUN_PATH = Path("/dev/net/tun")

NamespaceId = tuple[int, int]
"Device and inode of a namespace: what tells it from all others."

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
"linux/sched.h"
_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
"linux/if_tun.h"
_TUN_QUEUE_PACKETS = 10_000
"The kernel drops what the router has not read when this is full; the default is 500."
_KILL_GRACE_S = 1.0
_TX_DROPPED_FIELD = 11
"In a line of /proc/net/dev: the fourth field of the second half."

_SYSCTLS = (
    # A connection must not inherit what an earlier one learned of the path.
    ("net/ipv4/tcp_no_metrics_save", "1"),
)
_SYSCTLS_V6 = (
    # No packets that nobody sent: they would shift loss that counts packets.
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
    ("net/ipv6/conf/default/addr_gen_mode", "1"),
)


class NamespaceError(NetemError):
    """The namespaces could not be made."""


class ToolMissingError(NamespaceError):
    """A program that is needed is not installed."""


class TunMissingError(NamespaceError):
    """There is no usable /dev/net/tun."""


class PrivilegeError(NamespaceError):
    """Neither root nor user namespaces."""


class LimitError(NamespaceError):
    """The kernel's limit on the number of namespaces is reached."""


@dataclass(frozen=True, slots=True)
class Namespaces:
    """How to reach the two namespaces while the process that holds them lives; picklable."""

    holder_pid: int
    is_rootless: bool
    fds: dict[Side, int]
    ids: dict[Side, NamespaceId]

    def entry(self, side: Side) -> list[str]:
        """Return the words to put before a command for it to run in a namespace."""
        proc = f"/proc/{self.holder_pid}"
        user = [f"--user={proc}/ns/user", "--preserve-credentials"] if self.is_rootless else []
        return ["nsenter", *user, f"--net={proc}/fd/{self.fds[side]}", "--"]

    def hold(self) -> list[int]:
        """Keep the namespaces, whoever else lets go of them, until these files are closed."""
        proc = f"/proc/{self.holder_pid}"
        return [os.open(f"{proc}/fd/{fd}", os.O_RDONLY) for fd in self.fds.values()]


class NamespaceHolder:
    """Makes the two namespaces for this process, which moves into a third, empty one.

    The process must have a single thread. `tun_fds` are the router's ends of the devices.

    Raises:
        ToolMissingError: `ip` or `nsenter` is not installed.
        TunMissingError: /dev/net/tun is absent, or not for us.
        PrivilegeError: namespaces are not allowed.
        LimitError: there are too many already.
    """

    def __init__(self, *, mtu: int = DEFAULT_MTU, rootless: bool | None = None) -> None:
        check_tools()
        is_rootless = _leave_network(rootless)  # Where we are now becomes the client's.
        self._device_files: dict[Side, int] = {}
        self.tun_fds: dict[Side, int] = {}
        fds: dict[Side, int] = {}
        ends: dict[Side, tuple[str, str]] = {
            "client": (CLIENT_ADDRESS, CLIENT_ADDRESS_V6),
            "server": (SERVER_ADDRESS, SERVER_ADDRESS_V6),
        }
        for side, addresses in ends.items():
            fds[side] = os.open("/proc/self/ns/net", os.O_RDONLY)
            self.tun_fds[side] = open_tun()
            _configure(*addresses, mtu=mtu)
            # It stays a view of this namespace, wherever the process goes.
            self._device_files[side] = os.open("/proc/self/net/dev", os.O_RDONLY)
            _unshare(_CLONE_NEWNET)  # On to the next, of which the last stays empty.
        ids: dict[Side, NamespaceId] = {side: _id(os.fstat(fd)) for side, fd in fds.items()}
        self.namespaces = Namespaces(os.getpid(), is_rootless, fds, ids)

    def tx_dropped(self) -> int:
        """Return how many packets the kernel dropped because the router did not read them."""
        return sum(_tx_dropped(fd) for fd in self._device_files.values())

    def close(self) -> None:
        """End what still runs in the namespaces, and let go of them."""
        kill_inside(self.namespaces.ids.values())
        for files in (self.tun_fds, self._device_files, self.namespaces.fds):
            for fd in files.values():
                os.close(fd)


def check_tools() -> None:
    """Check that the programs are there.

    Raises:
        ToolMissingError: one is not.
    """
    for tool, package in (("ip", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(tool) is None:
            raise ToolMissingError(
                f"The TUN router needs the program {tool}: install the package {package}, or use "
                "the UDP proxy, which needs nothing."
            )


def processes_inside(ids: Collection[NamespaceId]) -> list[int]:
    """Return the processes whose network namespace is one of these."""
    pids = []
    for entry in Path("/proc").iterdir():
        # Processes end while we look, and others' are hidden from us.
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and _id((entry / "ns/net").stat()) in ids:
                pids.append(int(entry.name))
    return pids


def kill_inside(ids: Collection[NamespaceId]) -> None:
    """End all processes in these namespaces: SIGTERM, and after a second SIGKILL."""
    ids = frozenset(ids)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _KILL_GRACE_S
        _signal_all(processes_inside(ids), number)
        while (left := processes_inside(ids)) and time.monotonic() < deadline:
            time.sleep(0.01)
            if number == signal.SIGKILL:
                _signal_all(left, number)  # They may have multiplied.


def _signal_all(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _id(status: os.stat_result) -> NamespaceId:
    return status.st_dev, status.st_ino


def _leave_network(rootless: bool | None) -> bool:
    """Enter a new network namespace, in a new user namespace if need be; return whether it was."""
    if not rootless:
        try:
            _unshare(_CLONE_NEWNET)
        except OSError as error:
            if rootless is not None:
                raise PrivilegeError(
                    "This user may not make network namespaces: run it as root, or rootless."
                ) from error
        else:
            return False
    uid, gid = os.geteuid(), os.getegid()
    try:
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            Path("/proc/self", name).write_text(text, encoding="ascii")
    except OSError as error:
        raise PrivilegeError(
            "The TUN router needs root, or user namespaces, which this system does not allow "
            f"({error.strerror}): run it as root, allow them (on Ubuntu: sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0; in a container: --cap-add "
            "SYS_ADMIN --cap-add NET_ADMIN --device /dev/net/tun), or use the UDP proxy."
        ) from error
    return True


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.ENOSPC:
        raise LimitError(
            "The kernel's limit on namespaces is reached, and the TUN router needs three network "
            "namespaces, and a user namespace without root: end other emulated networks and "
            "containers, raise the limits (sysctl user.max_net_namespaces and "
            "user.max_user_namespaces), or use the UDP proxy."
        )
    raise OSError(number, os.strerror(number))


def open_tun(path: Path = TUN_PATH) -> int:
    """Make a TUN device in the present network namespace; return the router's end.

    Raises:
        TunMissingError: there is no TUN driver behind `path`, or it is not for us.
        PrivilegeError: this process may not make devices.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except PermissionError as error:
        raise TunMissingError(
            f"This user may not open {path}: make it accessible (chmod 0666 {path} is what most "
            "systems have), run it as root, or use the UDP proxy."
        ) from error
    except OSError as error:
        raise _no_tun(path, error) from error
    flags = _IFF_TUN | _IFF_NO_PI  # No offloads: what the router sees is what is on the wire.
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
    except OSError as error:
        os.close(fd)
        if isinstance(error, PermissionError):
            raise PrivilegeError(
                "This process may not make a TUN device: it needs CAP_NET_ADMIN; run it as root "
                "(in a container with --cap-add NET_ADMIN)."
            ) from error
        raise _no_tun(path, error) from error
    return fd


def _no_tun(path: Path, error: OSError) -> TunMissingError:
    return TunMissingError(
        f"There is no working {path} ({error.strerror}): load the kernel's module (modprobe tun; "
        "in a container: --device /dev/net/tun), or use the UDP proxy."
    )


def _configure(address: str, address_v6: str, *, mtu: int) -> None:
    """Configure the present network namespace."""
    has_v6 = Path("/proc/sys/net/ipv6").exists()
    for name, value in _SYSCTLS + (_SYSCTLS_V6 if has_v6 else ()):
        _set_sysctl(name, value)
    _ip("link", "set", "lo", "up")
    _ip("link", "set", DEVICE, "mtu", str(mtu), "txqueuelen", str(_TUN_QUEUE_PACKETS))
    # The device exists already and has taken the old defaults.
    for name, value in _SYSCTLS_V6 if has_v6 else ():
        _set_sysctl(name.replace("/default/", f"/{DEVICE}/"), value)
    _ip("addr", "add", f"{address}/30", "dev", DEVICE)
    if has_v6:
        _ip("addr", "add", f"{address_v6}/126", "dev", DEVICE, "nodad")
    _ip("link", "set", DEVICE, "up")


def _ip(*words: str) -> None:
    """Run `ip` in the present network namespace."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)  # noqa: S603, S607
    if done.returncode != 0:
        raise NamespaceError(
            f"`ip {' '.join(words)}` failed inside a namespace of ours: {done.stderr.strip()}; "
            "see that iproute2 is complete and the kernel has what it asks for."
        )


def _set_sysctl(name: str, value: str) -> None:
    try:
        Path("/proc/sys", name).write_text(value, encoding="ascii")
    except OSError as error:
        raise NamespaceError(
            f"The setting {name} cannot be changed inside a namespace of ours "
            f"({error.strerror}): see that /proc/sys is writable (in a container: --privileged)."
        ) from error


def _tx_dropped(fd: int) -> int:
    """Return the device's tx_dropped from an open /proc/net/dev."""
    text = os.pread(fd, 65536, 0).decode("ascii")
    line = re.search(rf"^\s*{DEVICE}:(.*)$", text, re.MULTILINE)
    assert line is not None
    return int(line[1].split()[_TX_DROPPED_FIELD])
