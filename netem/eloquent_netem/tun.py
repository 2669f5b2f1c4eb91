"""The TUN router: kernel TCP, or anything else that speaks IP, through two links.

Two network namespaces have a TUN device each; between them a process of its own reads IP packets
from one, puts them through a link, and writes them to the other.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from eloquent_netem.namespaces import (
    DEFAULT_MTU,
    NamespaceHolder,
    Namespaces,
    Side,
    check_tools,
    kill_inside,
)
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.realtime import (
    LATENESS_BOUND_S,
    Driver,
    DriverStats,
    MakeCrossTraffic,
    MakeLinks,
    no_cross_traffic,
    refuse_unfaithful,
)
from eloquent_netem.worker import Worker, WorkerError

_READ_BYTES = 65536
_BATCH_PACKETS = 32
"Read at once from one device, before looking what is due."
_END_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class TunStats:
    """What the router has done."""

    driver: DriverStats
    marked: int
    "Packets that went out with another ECN field than they came in with: CE, set by a queue."
    ignored: int
    "Packets the links never saw: multicast, and what is not IP."
    tun_drops: int
    "Packets the kernel dropped because the router did not read them in time (tx_dropped)."


class TunNetwork:
    """The two namespaces, seen from outside; made by `tun_network`."""

    def __init__(self, worker: Worker[Namespaces, TunStats]) -> None:
        self._worker = worker
        self._namespaces = worker.ready
        # While they are held, the kernel gives their numbers to no others, whom `close` would end.
        self._held = self._namespaces.hold()
        self.processes: list[subprocess.Popen[Any]] = []
        "What `popen` has started."

    @property
    def router_pid(self) -> int | None:
        """The id of the process between the namespaces."""
        return self._worker.pid

    @property
    def namespaces(self) -> Namespaces:
        """How to reach the two namespaces."""
        return self._namespaces

    def start(self) -> None:
        """Start the scenario's clock; packets before it are dropped."""
        self._worker.start()

    def command(self, side: Side, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs `arguments` in the client's or the server's namespace."""
        return [*self._namespaces.entry(side), *arguments]

    def popen(
        self, side: Side, arguments: Sequence[str], **options: Any
    ) -> "subprocess.Popen[Any]":
        """Start a command in a namespace; the options are those of `subprocess.Popen`.

        The process is the command itself, so signals reach it. What still runs in the namespaces
        at the end is ended, children included.
        """
        process = subprocess.Popen(self.command(side, arguments), **options)  # noqa: S603
        self.processes.append(process)
        return process

    def stats(self) -> TunStats:
        """Return what the router has done so far; after the end, in the whole run."""
        return self._worker.stats()

    def close(self) -> TunStats:
        """End everything in the namespaces and the router.

        Raises:
            WorkerError: the router had ended before; everything is ended all the same.
        """
        try:
            return self._worker.close()
        finally:
            kill_inside(self._namespaces.ids.values())
            for process in self.processes:
                _reap(process)
            while self._held:
                os.close(self._held.pop())


@contextlib.contextmanager
def tun_network(
    links: MakeLinks,
    *,
    cross: MakeCrossTraffic = no_cross_traffic,
    lateness_bound_s: float = LATENESS_BOUND_S,
    mtu: int = DEFAULT_MTU,
    real_time: bool = True,
    rootless: bool | None = None,
) -> Iterator[TunNetwork]:
    """Set up two namespaces with the links between them; nothing of it is left afterwards.

    Call `start` on what it gives when both ends are ready. `links` and `cross` are called in the
    router's process, so they must be picklable: functions of a module, or `functools.partial`s of
    such. `rootless` says whether to use a user namespace; None: only if need be.

    Raises:
        NamespaceError: the namespaces cannot be made; the message says why and what helps.
        NotStartedError: at the end, if packets came and `start` was never called.
        LatenessError: at the end, if the 99th percentile of lateness is above the bound.
        OverloadError: at the end, if the kernel dropped packets before the router read them.
        WorkerError: the router's process ended before its time.
    """
    check_tools()
    worker = Worker(partial(_Router, links, cross, mtu, rootless), real_time=real_time)
    network = TunNetwork(worker)
    try:
        yield network
    except BaseException:
        with contextlib.suppress(WorkerError):  # What went wrong first is what counts.
            network.close()
        raise
    stats = network.close()
    refuse_unfaithful(stats.driver, lateness_bound_s=lateness_bound_s, lost_by_us=stats.tun_drops)


def _reap(process: "subprocess.Popen[Any]") -> None:
    """Wait for a process that has been ended; it may have been on its way into the namespace."""
    try:
        process.wait(_END_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Router:
    """What the router's process does."""

    def __init__(
        self, links: MakeLinks, cross: MakeCrossTraffic, mtu: int, rootless: bool | None
    ) -> None:
        self._holder = NamespaceHolder(mtu=mtu, rootless=rootless)
        self._client = self._holder.tun_fds["client"]
        self._server = self._holder.tun_fds["server"]
        self._marked = 0
        self._ignored = 0
        up, down = links()
        self.driver = Driver(
            up,
            down,
            deliver_up=partial(self._write, self._server),
            deliver_down=partial(self._write, self._client),
            cross=cross(up, down),
        )
        self.driver.watch(self._client, partial(self._read, self._client, self.driver.send_up))
        self.driver.watch(self._server, partial(self._read, self._server, self.driver.send_down))

    def ready(self) -> Namespaces:
        return self._holder.namespaces

    def stats(self) -> TunStats:
        return TunStats(self.driver.stats(), self._marked, self._ignored, self._holder.tx_dropped())

    def close(self) -> None:
        self._holder.close()

    def _read(self, fd: int, send: Callable[[Packet], None]) -> None:
        for _ in range(_BATCH_PACKETS):
            try:
                data = os.read(fd, _READ_BYTES)
            except BlockingIOError:
                return
            packet = ip_packet(data)
            if packet is None:
                self._ignored += 1
            else:
                send(packet)

    def _write(self, fd: int, packet: Packet) -> None:
        data = with_ecn(packet.data, packet.ecn)
        if data is not packet.data:
            self._marked += 1
        os.write(fd, data)


def ip_packet(data: bytes) -> Packet | None:
    """Return a packet with the ECN field of its IP header, version 4 or 6.

    None: it is no unicast IP packet. What the kernel says to groups on its own (router and
    neighbour discovery, group membership) is no traffic of the subject.
    """
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20 and not 0xE0 <= data[16] <= 0xEF:
        return Packet(data, len(data), Ecn(data[1] & 0b11))
    if version == 6 and len(data) >= 40 and data[24] != 0xFF:
        return Packet(data, len(data), Ecn(data[1] >> 4 & 0b11))
    return None


def with_ecn(data: bytes, ecn: Ecn) -> bytes:
    """Return the IP packet with this ECN field, its header checksum (version 4) kept right.

    The same object if the field is as wanted. The checksum is updated after RFC 1624 section 3.
    """
    if data[0] >> 4 == 6:
        if data[1] >> 4 & 0b11 == ecn:
            return data
        return b"%c%c%b" % (data[0], data[1] & 0b11001111 | ecn << 4, data[2:])
    if data[1] & 0b11 == ecn:
        return data
    traffic_class = data[1] & 0b11111100 | ecn
    old_word, new_word = data[0] << 8 | data[1], data[0] << 8 | traffic_class
    checksum = int.from_bytes(data[10:12], "big")
    total = (~checksum & 0xFFFF) + (~old_word & 0xFFFF) + new_word
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return b"%c%c%b%b%b" % (
        data[0],
        traffic_class,
        data[2:10],
        (~total & 0xFFFF).to_bytes(2, "big"),
        data[12:],
    )
