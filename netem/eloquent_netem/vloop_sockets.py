"""TCP sockets of the virtual network, in the form of `socket.socket`.

asyncio's own transports, servers and TLS run over them, so that flow control, end of stream and
the order of callbacks are the real loop's. They never block.
"""

import errno
import selectors
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

from eloquent_netem.capture import Address
from eloquent_netem.vloop_names import shown_address
from eloquent_netem.vloop_network import ANY_IP, os_error, plain_ip
from eloquent_netem.vloop_tcp import Endpoint, Listener, Port, TcpStack
from eloquent_netem.vloop_time import VIRTUAL_FD

_LINGER = struct.Struct("ii")


class SocketTable:
    """The open sockets by the numbers that stand for their file descriptors."""

    def __init__(self, stack: TcpStack) -> None:
        self.stack = stack
        self._sockets: dict[int, VirtualSocket] = {}
        self._next = VIRTUAL_FD

    def open(self, family: int) -> "VirtualSocket":
        """Return a new socket."""
        number, self._next = self._next, self._next + 1
        opened = self._sockets[number] = VirtualSocket(self, family, number)
        return opened

    def forget(self, number: int) -> None:
        """Take note that a socket is closed."""
        self._sockets.pop(number, None)

    def readiness(self, number: int, events: int) -> int:
        """Return for which of these `selectors` events a socket is ready."""
        found = self._sockets.get(number)
        ready = 0
        if found is not None:
            if events & selectors.EVENT_READ and found.is_readable:
                ready |= selectors.EVENT_READ
            if events & selectors.EVENT_WRITE and found.is_writable:
                ready |= selectors.EVENT_WRITE
        return ready


class VirtualSocket:
    """A TCP socket of a table.

    As in Linux, closing sends what was written and then a FIN; it resets the connection if
    something has come that nobody has read, or if SO_LINGER says so. Of the other options
    TCP_NODELAY is always on, and the rest has no effect.
    """

    def __init__(self, table: SocketTable, family: int, number: int) -> None:
        self.family = socket.AddressFamily(family)
        self.type = socket.SOCK_STREAM
        self.proto = socket.IPPROTO_TCP
        self._table = table
        self._stack = table.stack
        self._number = number
        self._port: Port | None = None
        self._listener: Listener | None = None
        self._endpoint: Endpoint | None = None
        self._is_end_sent = self._is_error_told = False
        self._resets = False

    # What a selector asks.

    @property
    def is_readable(self) -> bool:
        """Whether `recv` or `accept` would not block."""
        if self._listener is not None:
            return bool(self._listener.queue)
        if self._endpoint is None:
            return False
        connection = self._endpoint.connection
        return bool(connection.readable or connection.is_read_over or connection.error)

    @property
    def is_writable(self) -> bool:
        """Whether a third of the send buffer is free (`sk_stream_is_writeable`)."""
        if self._endpoint is None:
            return False
        connection = self._endpoint.connection
        return bool(connection.error) or 3 * connection.unacknowledged <= 2 * connection.send_buffer

    # What asyncio asks of a socket.

    def fileno(self) -> int:
        """Return the socket's number, or -1 if it is closed."""
        return self._number

    def setblocking(self, flag: bool) -> None:
        """Do nothing: it never blocks."""

    def getsockname(self) -> Any:
        """Return the local address."""
        if self._endpoint is not None:
            return shown_address(self._endpoint.local, self.family)
        ip, number = (self._port.ip, self._port.number) if self._port else (ANY_IP, 0)
        return shown_address((ip, number), self.family)

    def getpeername(self) -> Any:
        """Return the peer's address.

        Raises:
            OSError: it is not connected.
        """
        if self._endpoint is None:
            raise os_error(errno.ENOTCONN)
        return shown_address(self._endpoint.remote, self.family)

    def setsockopt(self, level: int, option: int, value: Any, *_: int) -> None:
        """Take SO_LINGER; other options have no effect."""
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            is_on, seconds = _LINGER.unpack(value)
            self._resets = bool(is_on) and seconds == 0

    def getsockopt(self, level: int, option: int, *_: int) -> int:
        """Return the error of SO_ERROR, the size of SO_SNDBUF, 1 for TCP_NODELAY, else 0."""
        connection = self._endpoint.connection if self._endpoint else None
        if (level, option) == (socket.IPPROTO_TCP, socket.TCP_NODELAY):
            return 1
        if level != socket.SOL_SOCKET or connection is None:
            return 0
        if option == socket.SO_ERROR:
            return self._pending_error() or 0
        return connection.send_buffer if option == socket.SO_SNDBUF else 0

    def bind(self, address: Sequence[Any]) -> None:
        """See `socket.socket.bind`.

        Raises:
            OSError: as a kernel would say.
        """
        self._port = self._stack.bind(*_plain(address))

    def listen(self, backlog: int = 100) -> None:
        """See `socket.socket.listen`."""
        if self._listener is None:
            if self._port is None:
                self._port = self._stack.bind(ANY_IP, 0)
            self._listener = self._stack.listen(self._port, backlog)

    def accept(self) -> tuple["VirtualSocket", Any]:
        """See `socket.socket.accept`.

        Raises:
            BlockingIOError: nobody has connected.
        """
        if self._listener is None:
            raise os_error(errno.EINVAL)
        if not self._listener.queue:
            raise os_error(errno.EAGAIN)
        accepted = self._table.open(self.family)
        accepted._endpoint = self._listener.queue.popleft()
        accepted._resets = self._resets
        return accepted, accepted.getpeername()

    def connect(self, address: Sequence[Any], on_open: Callable[[], None]) -> None:
        """Begin to connect; at `on_open` SO_ERROR says how it ended.

        Raises:
            OSError: as a kernel would say.
        """
        if self._port is None:
            self._port = self._stack.bind(ANY_IP, 0)
        self._endpoint = self._stack.connect(self._port, _plain(address), on_open)

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """See `socket.socket.send`.

        Raises:
            OSError: the connection has ended; `BlockingIOError`: the send buffer is full.
        """
        endpoint = self._connected()
        error = self._pending_error()
        if error is not None:
            raise os_error(error)
        if self._is_end_sent or endpoint.connection.error is not None:
            raise os_error(errno.EPIPE)
        connection = endpoint.connection
        room = connection.send_buffer - connection.unacknowledged
        if room <= 0:
            raise os_error(errno.EAGAIN)
        taken = bytes(data[:room])
        self._stack.write(endpoint, taken)
        return len(taken)

    def sendmsg(self, buffers: Sequence[bytes | bytearray | memoryview]) -> int:
        """See `socket.socket.sendmsg`.

        Raises:
            OSError: as `send`.
        """
        return self.send(b"".join(buffers))

    def recv(self, limit: int) -> bytes:
        """See `socket.socket.recv`.

        Raises:
            OSError: the connection has broken; `BlockingIOError`: nothing has come.
        """
        endpoint = self._connected()
        connection = endpoint.connection
        if connection.readable:
            return self._stack.read(endpoint, limit)
        if connection.is_read_over:
            return b""
        error = self._pending_error()
        if error is not None:
            raise os_error(error)
        if connection.error is not None:
            return b""
        raise os_error(errno.EAGAIN)

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        """See `socket.socket.recv_into`.

        Raises:
            OSError: as `recv`.
        """
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def shutdown(self, how: int) -> None:
        """End the sending half (SHUT_WR, or SHUT_RDWR, which is taken for it).

        Raises:
            OSError: it is not connected.
        """
        endpoint = self._connected()
        if how != socket.SHUT_RD:
            self._is_end_sent = True
            self._stack.shutdown(endpoint)

    def close(self) -> None:
        """See `socket.socket.close`."""
        self._table.forget(self._number)
        self._number = -1
        endpoint, listener, port = self._endpoint, self._listener, self._port
        self._endpoint = self._listener = self._port = None
        if listener is not None:
            self._stack.unlisten(listener)
        elif endpoint is not None and self._resets:
            self._stack.abort(endpoint)
        elif endpoint is not None:
            self._stack.close(endpoint)
        elif port is not None:
            self._stack.release(port)

    def _connected(self) -> Endpoint:
        if self._endpoint is None:
            raise os_error(errno.ENOTCONN)
        return self._endpoint

    def _pending_error(self) -> int | None:
        """Return what ended the connection, once."""
        error = self._connected().connection.error
        if self._is_error_told:
            return None
        self._is_error_told = error is not None
        return error


def _plain(address: Sequence[Any]) -> Address:
    ip = plain_ip(address[0])
    if ip is None:
        raise os_error(errno.EADDRNOTAVAIL)
    return ip, address[1]
