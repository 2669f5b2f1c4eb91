"""Session tickets: a client that knows a server begins with its requests in the first packet.

Early data (0-RTT, RFC 9001 section 4.6) can be repeated by whoever sees it. What keeps that from
doing harm (RFC 8446 section 8):

- A ticket is good once: the server takes it out of its book, so that a repeated flight becomes an
  ordinary handshake whose early data cannot be read, and which nobody can finish.
- Clients send resumes and reports early, nothing else. Both say the same thing when said twice.
- A server that gets a request for a new turn early, or a cancel, waits for the handshake's end.
- The book is in memory: tickets do not outlive the server, the store's turns do.
"""

from collections import deque

import msgspec
from aioquic.tls import SessionTicket

from eloquent.url import ServerUrl

MAX_SERVER_TICKETS = 10_000
"A server keeps so many; the oldest go first. About 1 KiB each."

MAX_CLIENT_TICKETS = 4
"A client keeps so many for its server; each is used once."


class TicketBook:
    """A server's tickets, each good once."""

    def __init__(self, limit: int = MAX_SERVER_TICKETS) -> None:
        self._limit = limit
        self._tickets: dict[bytes, SessionTicket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def put(self, ticket: SessionTicket) -> None:
        """Keep a ticket that was given out."""
        self._tickets[ticket.ticket] = ticket
        while len(self._tickets) > self._limit:
            del self._tickets[next(iter(self._tickets))]

    def take(self, name: bytes) -> SessionTicket | None:
        """Take out the ticket that a client shows, if it is there and has not been shown before."""
        return self._tickets.pop(name, None)


class _Exported(msgspec.Struct):
    """A ticket for another process."""

    host: str
    port: int
    pin: str | None
    ticket: SessionTicket


class Tickets:
    """A client's tickets for one server."""

    def __init__(self, url: ServerUrl) -> None:
        self._url = url
        self._tickets: deque[SessionTicket] = deque(maxlen=MAX_CLIENT_TICKETS)

    def put(self, ticket: SessionTicket) -> None:
        """Keep a ticket that the server gave, which has shown who it is."""
        self._tickets.append(ticket)

    def take(self) -> SessionTicket | None:
        """Take out the newest ticket."""
        return self._tickets.pop() if self._tickets else None

    def exported(self) -> bytes | None:
        """Take out the newest ticket, for another process; keep it as secret as a password."""
        ticket = self.take()
        if ticket is None:
            return None
        url = self._url
        return msgspec.msgpack.encode(_Exported(url.host, url.port, url.pin, ticket))

    def load(self, data: bytes) -> bool:
        """Take a ticket from another process; False: it is none, or another server's."""
        try:
            found = msgspec.msgpack.decode(data, type=_Exported)
        except msgspec.MsgspecError:
            return False
        url = self._url
        is_same = (found.host, found.port, found.pin) == (url.host, url.port, url.pin)
        if is_same:
            self.put(found.ticket)
        return is_same
