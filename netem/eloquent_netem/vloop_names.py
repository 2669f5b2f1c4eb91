"""Names and addresses of the virtual network, in the forms of the socket module."""

import socket
from typing import Any

from eloquent_netem.capture import Address
from eloquent_netem.vloop_network import ANY_IP, LOOPBACK_IP, VirtualNetwork

AddrInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]

PROTOCOLS = {socket.SOCK_STREAM: socket.IPPROTO_TCP, socket.SOCK_DGRAM: socket.IPPROTO_UDP}


def lookup(
    network: VirtualNetwork,
    host: bytes | str | None,
    port: bytes | str | int | None,
    *,
    family: int = 0,
    kind: int = 0,
    flags: int = 0,
) -> list[AddrInfo]:
    """Return what `socket.getaddrinfo` would if the virtual network were real.

    Hosts have IPv4 addresses; for `AF_INET6` they come in their mapped form, `::ffff:a.b.c.d`.

    Raises:
        OSError: (`socket.gaierror`) no host has that name, or the port is no number.
    """
    name = host.decode() if isinstance(host, bytes) else host
    if not name:
        name = ANY_IP if flags & socket.AI_PASSIVE or name == "" else LOOPBACK_IP
    ip = network.resolve(name)
    if ip is None or (":" in name and family == socket.AF_INET):
        raise socket.gaierror(
            socket.EAI_NONAME, f"no host of the virtual network is called {name!r}"
        )
    try:
        number = int(port or 0)
    except ValueError as error:
        raise socket.gaierror(socket.EAI_SERVICE, f"{port!r} is no port number") from error
    if family == 0:
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
    shown = shown_address((ip, number), family)
    return [
        (socket.AddressFamily(family), each, protocol, "", shown)
        for each, protocol in PROTOCOLS.items()
        if kind in (0, each)
    ]


def shown_address(address: Address, family: int) -> Any:
    """Return an address as a socket of this family shows it."""
    if family != socket.AF_INET6:
        return address
    ip, port = address
    return ("::" if ip == ANY_IP else f"::ffff:{ip}", port, 0, 0)
