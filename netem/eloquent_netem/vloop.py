"""A virtual-time asyncio loop: unmodified asyncio code over emulated links, in no time.

    network = VirtualNetwork.between(up, down)
    run(main(network), network)

Time stands still while anything is ready to run, then jumps to the next timer or to what happens
next on a link. `asyncio.sleep(3600)` takes an hour of virtual time. Datagrams, and the segments of
TCP connections, travel through the `VirtualNetwork`; names are resolved there, and nothing reaches
a real network. TCP is the model in `eloquent_netem.tcp`, and asyncio's own streams, servers and TLS
run over it.

Runs with the same seeds are alike to the nanosecond if the code is: it must not read other clocks
or depend on the order of a set. What aioquic draws from `os.urandom`, and the date in its session
tickets, change contents and not sizes, so nothing of it needs patching; but use a certificate
whose own size does not vary: Ed25519, with a fixed serial number. (aioquic's `QuicServer.close`
closes several connections in the order of a set.) Threads are waited for while time stands still,
and their results come in the order in which they were started; what they give to
`call_soon_threadsafe` comes when it comes.
"""

import asyncio
import errno
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from eloquent_netem.capture import Address, Captured, Observer
from eloquent_netem.errors import NetemError
from eloquent_netem.scenario import Scenario
from eloquent_netem.scenario_parts import DOWN, UP
from eloquent_netem.vloop_names import lookup
from eloquent_netem.vloop_network import (
    ANY_IP,
    NetworkSetupError,
    VirtualNetwork,
    os_error,
    plain_ip,
)
from eloquent_netem.vloop_streams import NotVirtualError, StreamLoop
from eloquent_netem.vloop_time import (
    LIMIT_S,
    DeadlockError,
    LivelockError,
    StalledThreadError,
    TimeLimitError,
    by_age,
)
from eloquent_netem.vloop_udp import VirtualDatagramTransport

__all__ = [
    "LIMIT_S",
    "DeadlockError",
    "LivelockError",
    "NetworkSetupError",
    "NotVirtualError",
    "StalledThreadError",
    "TimeLimitError",
    "VirtualLoop",
    "VirtualNetwork",
    "run",
    "scenario_network",
]

T = TypeVar("T")
ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)

REAL_EPHEMERAL_PORTS = range(32768, 65536)
"Where kernels choose ports for sockets that ask for none (Linux from 32768, others 49152)."


def _refused(what: str, instead: str) -> Any:
    def refuse(self: "VirtualLoop", *_: Any, **__: Any) -> Any:
        raise NotVirtualError(
            f"{what} cannot be had in virtual time: the loop's network is emulated and its clock "
            f"does not pass. {instead}"
        )

    return refuse


NO_SOCKETS = (
    "Use loop.create_datagram_endpoint, loop.create_connection or loop.create_server, or run the "
    "code over the UDP proxy or TUN driver."
)
NO_PROCESSES = "Run the program over the UDP proxy or TUN driver."


class VirtualLoop(StreamLoop):
    """An asyncio loop whose time and network are virtual; `run` is the usual way to use it."""

    def __init__(self, network: VirtualNetwork, *, limit_s: float = LIMIT_S) -> None:
        super().__init__(network, limit_s)
        try:
            network.attach(self._stack)
        except NetworkSetupError:
            self.close()
            raise

    async def create_datagram_endpoint(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], ProtocolT],
        local_addr: tuple[str, int] | None = None,
        remote_addr: tuple[str, int] | None = None,
        *,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        reuse_port: bool | None = None,
        allow_broadcast: bool | None = None,
        sock: socket.socket | None = None,
    ) -> tuple[asyncio.DatagramTransport, ProtocolT]:
        """See `asyncio.loop.create_datagram_endpoint`; a `sock` lends its address and family.

        A port of `sock` in the ephemeral range is taken for one that the kernel chose, and a
        virtual one is chosen instead, so that runs are alike. `reuse_port` does not share a port.

        Raises:
            OSError: as a kernel would say.
            ValueError: the arguments do not fit together.
        """
        peer: Address | None = None
        if sock is not None:
            if sock.type != socket.SOCK_DGRAM:
                raise ValueError(f"A UDP Socket was expected, got {sock!r}")
            if local_addr or remote_addr:
                raise ValueError("an address and a socket cannot be given together")
            family, local = sock.family, _address_of(sock)
        else:
            if not local_addr and not remote_addr and not family:
                raise ValueError("unexpected address family")
            local = (ANY_IP, 0)
            if remote_addr:
                peer, family = self._resolve(remote_addr, family)
            if local_addr:
                local, family = self._resolve(local_addr, family)
        transport = VirtualDatagramTransport(self, self._network, family=family, real=sock)
        transport.open(local, peer)
        try:
            protocol = protocol_factory()
            transport.set_protocol(protocol)
            made = self.create_future()
            self.call_soon(protocol.connection_made, transport)
            self.call_soon(_settle, made)
            await made
        except BaseException:
            transport.close()
            raise
        return transport, protocol

    async def getaddrinfo(
        self,
        host: bytes | str | None,
        port: bytes | str | int | None,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002  (asyncio's name)
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """See `asyncio.loop.getaddrinfo`; knows the virtual network's names only.

        Raises:
            OSError: (`socket.gaierror`) no host has that name.
        """
        return lookup(self._network, host, port, family=family, kind=type, flags=flags)

    async def getnameinfo(
        self, sockaddr: tuple[str, int] | tuple[str, int, int, int], flags: int = 0
    ) -> tuple[str, str]:
        """See `asyncio.loop.getnameinfo`."""
        ip = plain_ip(sockaddr[0]) or sockaddr[0]
        name = None if flags & socket.NI_NUMERICHOST else self._network.name_of(ip)
        return name or ip, str(sockaddr[1])

    def _resolve(self, address: tuple[str, int], family: int) -> tuple[Address, int]:
        """Return an address of the network, and the family that fits it."""
        info = lookup(self._network, *address, family=family, kind=socket.SOCK_DGRAM)[0]
        ip = plain_ip(info[4][0])
        assert ip is not None
        return (ip, info[4][1]), info[0]

    # What is not there.

    create_unix_connection = _refused("A Unix connection", NO_SOCKETS)
    create_unix_server = _refused("A Unix server", NO_SOCKETS)
    connect_accepted_socket = _refused("A real socket", NO_SOCKETS)
    connect_read_pipe = _refused("A pipe", NO_PROCESSES)
    connect_write_pipe = _refused("A pipe", NO_PROCESSES)
    subprocess_exec = _refused("A sub-process", NO_PROCESSES)
    subprocess_shell = _refused("A sub-process", NO_PROCESSES)
    add_reader = _refused("A real file or socket", NO_SOCKETS)
    add_writer = _refused("A real file or socket", NO_SOCKETS)
    sock_recv = _refused("A real socket", NO_SOCKETS)
    sock_recv_into = _refused("A real socket", NO_SOCKETS)
    sock_recvfrom = _refused("A real socket", NO_SOCKETS)
    sock_recvfrom_into = _refused("A real socket", NO_SOCKETS)
    sock_sendall = _refused("A real socket", NO_SOCKETS)
    sock_sendto = _refused("A real socket", NO_SOCKETS)
    sock_connect = _refused("A real socket", NO_SOCKETS)
    sock_accept = _refused("A real socket", NO_SOCKETS)


def scenario_network(
    scenario: Scenario, seed: int | None = None, *, observers: Sequence[Observer] = ()
) -> VirtualNetwork:
    """Return the hosts "client" and "server", joined by a scenario's path, with its cross traffic.

    Raises:
        ScenarioError: see `Scenario.links`.
    """
    up, down = scenario.links(seed)
    network = VirtualNetwork.between(Captured(up, UP, observers), Captured(down, DOWN, observers))
    for traffic in scenario.cross_flows(up, down, seed):
        network.add_cross(traffic)
    return network


def run(
    main: Coroutine[Any, Any, T],
    network: VirtualNetwork,
    *,
    limit_s: float = LIMIT_S,
    debug: bool | None = None,
) -> T:
    """Run `main` in virtual time, as `asyncio.run` does in real time, and return its result.

    `limit_s` is in virtual seconds.

    Raises:
        DeadlockError: tasks wait and nothing is left to happen.
        LivelockError: code goes round at one instant without end.
        TimeLimitError: it is not done by `limit_s`.
        StalledThreadError: a thread waits for virtual time.
        NetworkSetupError: the network has been run before.
    """
    try:
        with asyncio.Runner(
            debug=debug, loop_factory=lambda: VirtualLoop(network, limit_s=limit_s)
        ) as runner:
            try:
                result = runner.run(main)
            except BaseException as error:
                try:
                    runner.run(_cancel_the_rest())
                except NetemError as second:
                    error.add_note(f"Then cleaning up failed: {second}")
                raise
            runner.run(_cancel_the_rest())
            return result
    finally:
        main.close()


async def _cancel_the_rest() -> None:
    """Cancel what runs on, the oldest first: `asyncio.run` takes an order that varies."""
    tasks = sorted(asyncio.all_tasks() - {asyncio.current_task()}, key=by_age)
    for task in tasks:
        task.cancel()
    for result, task in zip(
        await asyncio.gather(*tasks, return_exceptions=True), tasks, strict=True
    ):
        if isinstance(result, Exception):
            asyncio.get_running_loop().call_exception_handler(
                {
                    "message": "a task failed while it was cancelled",
                    "exception": result,
                    "task": task,
                }
            )


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _address_of(sock: socket.socket) -> Address:
    ip, port = sock.getsockname()[:2]
    plain = plain_ip(ip)
    if plain is None:
        raise os_error(errno.EADDRNOTAVAIL)
    return plain, 0 if port in REAL_EPHEMERAL_PORTS else port
