"""Sockets that listen for TCP."""

import socket


def listen_tcp(host: str, port: int) -> socket.socket:
    """Return a socket that listens at a host's first address; `port` 0 takes a free one.

    asyncio turns Nagle's algorithm off only where it sees that the protocol is TCP, which it does
    not on what `socket.create_server` makes: a stream's second write would wait for the peer's
    delayed acknowledgement, 40 ms on Linux.

    Raises:
        OSError: the address cannot be had.
        UnicodeError, OverflowError: it cannot be an address.
    """
    family, kind, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            is_every = address[0] == "::"  # of IPv4, too, as for UDP
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_every)
        listening.bind(address)
        listening.listen()
    except OSError:
        listening.close()
        raise
    return listening
