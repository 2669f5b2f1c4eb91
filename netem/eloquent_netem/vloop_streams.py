"""TCP for the virtual loop: asyncio's own transports, servers and TLS over virtual sockets.

Of asyncio this replaces only where it would make a socket; the rest is what runs on real ones, so
an application meets the same flow control and the same order of callbacks.
"""

import asyncio
import errno
import os
import socket
import ssl as tls
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from eloquent_netem.errors import NetemError
from eloquent_netem.vloop_names import AddrInfo, lookup
from eloquent_netem.vloop_network import VirtualNetwork
from eloquent_netem.vloop_sockets import SocketTable, VirtualSocket
from eloquent_netem.vloop_tcp import TcpStack
from eloquent_netem.vloop_time import TimeLoop

ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)


class NotVirtualError(NetemError, NotImplementedError):
    """The code wants something of the real world that the virtual loop does not have.

    A `NotImplementedError` too, as asyncio's loops raise for what they lack.
    """


class StreamLoop(TimeLoop):
    """A loop whose time and TCP are virtual."""

    def __init__(self, network: VirtualNetwork, limit_s: float) -> None:
        super().__init__(network, limit_s)
        self._network = network
        self._stack = TcpStack(network, self.time)
        self._table = SocketTable(self._stack)

    def readiness(self, number: int, events: int) -> int:
        """See `TimeLoop.readiness`."""
        return self._table.readiness(number, events)

    async def create_connection(
        self,
        protocol_factory: Callable[[], ProtocolT],
        host: str | None = None,
        port: int | str | None = None,
        *,
        ssl: bool | tls.SSLContext | None = None,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        sock: socket.socket | None = None,
        local_addr: tuple[str, int] | None = None,
        server_hostname: str | None = None,
        all_errors: bool = False,
        **options: Any,
    ) -> tuple[asyncio.Transport, ProtocolT]:
        """See `asyncio.loop.create_connection`; a host has one address, so nothing races.

        Raises:
            OSError: as a kernel would say, `TimeoutError` after 131 s without an answer; or no host
                has that name.
            NotVirtualError: `sock` was given.
            ValueError: the arguments do not fit together.
        """
        _refuse_real(sock)
        if host is None and port is None:
            raise ValueError("host and port was not specified and no sock specified")
        if server_hostname is not None and not ssl:
            raise ValueError("server_hostname is only meaningful with ssl")
        if ssl and server_hostname is None:
            if not host:
                raise ValueError("You must set server_hostname when using ssl without a host")
            server_hostname = host
        try:
            stream = await self._connected(self._stream_info(host, port, family), local_addr)
        except OSError as error:
            if all_errors:
                raise ExceptionGroup("create_connection failed", [error]) from None
            raise
        return await super().create_connection(
            protocol_factory,
            sock=cast(socket.socket, stream),
            ssl=ssl,
            server_hostname=server_hostname,
            **options,
        )

    async def create_server(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        host: str | Iterable[str] | None = None,
        port: int | str | None = None,
        *,
        family: int = 0,
        flags: int = socket.AI_PASSIVE,
        sock: socket.socket | None = None,
        reuse_address: bool | None = None,
        reuse_port: bool | None = None,
        start_serving: bool = True,
        **options: Any,
    ) -> asyncio.Server:
        """See `asyncio.loop.create_server`; `reuse_port` does not share a port.

        Raises:
            OSError: as a kernel would say; or no host has that name.
            NotVirtualError: `sock` was given.
            ValueError: the arguments do not fit together.
        """
        _refuse_real(sock)
        if host is None and port is None:
            raise ValueError("Neither host/port nor sock were specified")
        names = [host] if host is None or isinstance(host, str) else list(host)
        infos = [self._stream_info(name or None, port, family, flags) for name in names]
        streams = self._bound(dict.fromkeys(infos))
        try:
            server = await super().create_server(
                protocol_factory,
                sock=cast(socket.socket, streams[0]),
                start_serving=False,
                **options,
            )
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        # asyncio's own way to a server of several sockets makes real ones.
        server._sockets.extend(streams[1:])  # type: ignore[attr-defined]
        if start_serving:
            await server.start_serving()
        return server

    async def sock_sendfile(self, sock: Any, *_: Any, **__: Any) -> int:
        """Send asyncio, which asks this of its transports first, to its own way of sending files.

        Raises:
            NotVirtualError: the socket is a real one.
            asyncio.SendfileNotAvailableError: always, else.
        """
        if not isinstance(sock, VirtualSocket):
            _refuse_real(sock)
        raise asyncio.SendfileNotAvailableError("a virtual socket has no kernel to send files")

    def _stream_info(
        self, host: str | None, port: int | str | None, family: int, flags: int = 0
    ) -> AddrInfo:
        infos = lookup(
            self._network, host, port, family=family, kind=socket.SOCK_STREAM, flags=flags
        )
        return infos[0]

    async def _connected(self, info: AddrInfo, local_addr: tuple[str, int] | None) -> VirtualSocket:
        family, *_, address = info
        stream = self._table.open(family)
        try:
            if local_addr is not None:
                stream.bind(self._stream_info(*local_addr, family)[4])
            opened = asyncio.Event()
            stream.connect(address, opened.set)
            await opened.wait()
            error = stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, f"Connect call failed {address}")
        except BaseException:
            stream.close()
            raise
        return stream

    def _bound(self, infos: Iterable[AddrInfo]) -> list[VirtualSocket]:
        streams: list[VirtualSocket] = []
        try:
            for family, *_, address in infos:
                stream = self._table.open(family)
                streams.append(stream)
                stream.bind(address)
        except OSError as error:
            for stream in streams:
                stream.close()
            code = error.errno or errno.EADDRNOTAVAIL
            raise OSError(
                code,
                f"error while attempting to bind on address {address!r}: "
                f"{os.strerror(code).lower()}",
            ) from None
        return streams


def _refuse_real(sock: socket.socket | None) -> None:
    if sock is not None:
        raise NotVirtualError(
            "A real TCP socket (sock=) cannot be had in virtual time: the loop's network is "
            "emulated. Give host and port instead, or run the code over the TUN driver."
        )
