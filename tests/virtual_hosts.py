"""Two virtual hosts, and what tests of the virtual loop do with them."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from eloquent_netem.link import Link
from eloquent_netem.vloop import VirtualNetwork, run

T = TypeVar("T")

CLIENT_IP = "192.0.2.1"
SERVER_IP = "198.51.100.1"
UP_S = 0.03
DOWN_S = 0.05


def network_with(**options: Any) -> VirtualNetwork:
    """Return client and server; the options are of the link to the server."""
    return VirtualNetwork.between(
        Link(delay_s=UP_S, seed=1, name="up", **options),
        Link(delay_s=DOWN_S, seed=1, name="down"),
    )


def virtually(main: Coroutine[Any, Any, T]) -> T:
    return run(main, network_with())


def now() -> float:
    return asyncio.get_running_loop().time()


class Inbox(asyncio.DatagramProtocol):
    """Keeps what comes, with the time at which it came."""

    def __init__(self) -> None:
        self.items: list[tuple[float, Any, Any]] = []
        self.came = asyncio.Event()
        self.transport: asyncio.DatagramTransport | None = None
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._keep(data, addr)

    def error_received(self, exc: Exception) -> None:
        self._keep(exc, None)

    def _keep(self, item: Any, addr: Any) -> None:
        self.items.append((now(), item, addr))
        self.came.set()

    async def next(self) -> tuple[float, Any, Any]:
        while not self.items:
            self.came.clear()
            await self.came.wait()
        return self.items.pop(0)


class Echo(Inbox):
    """Sends back what comes."""

    def datagram_received(self, data: bytes, addr: Any) -> None:
        super().datagram_received(data, addr)
        assert self.transport is not None
        self.transport.sendto(data, addr)


P = TypeVar("P", bound=Inbox)


async def opened(make: Callable[[], P], **options: Any) -> tuple[asyncio.DatagramTransport, P]:
    return await asyncio.get_running_loop().create_datagram_endpoint(make, **options)
