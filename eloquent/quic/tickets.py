"""Session tickets: a client that knows a server begins with its requests in the first packet.

Early data (0-RTT, RFC 9001 section 4.6) can be repeated by whoever sees it. What keeps that from
doing harm (RFC 8446 section 8):

- A ticket is good once: the server takes it out of its book, so that a repeated flight becomes an
  ordinary handshake whose early data cannot be read, and which nobody can finish.
- Clients send resumes and reports early, nothing else. Both say the same thing when said twice.
- A server that gets a request for a new turn early, or a cancel, waits for the handshake's end.
- The book outlives the server where it has a file, and with it what was shown already.
"""

import logging
import os
from collections import deque
from dataclasses import replace
from pathlib import Path

import msgspec
from aioquic.tls import SessionTicket

from eloquent.url import ServerUrl

MAX_SERVER_TICKETS = 10_000
"A server keeps so many; the oldest go first. About 1 KiB each."

MAX_CLIENT_TICKETS = 4
"A client keeps so many for its server; each is used once."

LINE_START = b"\n"
"At the front, so that a line that was cut short with the server spoils no other."

logger = logging.getLogger(__name__)


class _Line(msgspec.Struct, omit_defaults=True):
    """What happened to a ticket: it was given out, or shown by its name."""

    put: SessionTicket | None = None
    taken: bytes | None = None


class TicketBook:
    """A server's tickets, each good once.

    With a `file` they are there again after a restart. What happens to tickets is appended to it, a
    line each; when it has `limit` lines it becomes the older of two files, and the one before that
    goes: its tickets are no longer among the newest, and what was shown stays in the same order.
    The lines are not forced to the disk: after a loss of power a ticket may be shown twice.
    """

    def __init__(self, limit: int = MAX_SERVER_TICKETS, *, file: Path | None = None) -> None:
        """Read the book if there is one.

        Raises:
            OSError: it cannot be read.
        """
        self._limit = limit
        self._file = file
        self._lines = 0
        self._tickets: dict[bytes, SessionTicket] = {}
        if file is not None:
            self._read(_older(file))
            self._lines = self._read(file)
            self._tickets = {name: t for name, t in self._tickets.items() if t.is_valid}

    def __len__(self) -> int:
        return len(self._tickets)

    def put(self, ticket: SessionTicket) -> None:
        """Keep a ticket that was given out."""
        self._put(ticket)
        # A server's tickets have no name of it, which the type does not know.
        self._write(_Line(put=replace(ticket, server_name=ticket.server_name or "")))

    def take(self, name: bytes) -> SessionTicket | None:
        """Take out the ticket that a client shows, if it is there and has not been shown before."""
        ticket = self._tickets.pop(name, None)
        if ticket is not None:
            self._write(_Line(taken=name))
        return ticket

    def _put(self, ticket: SessionTicket) -> None:
        self._tickets[ticket.ticket] = ticket
        while len(self._tickets) > self._limit:
            del self._tickets[next(iter(self._tickets))]

    def _read(self, file: Path) -> int:
        """Take over what a file says; return how many lines it has."""
        try:
            lines = file.read_bytes().split(LINE_START)[1:]
        except FileNotFoundError:
            return 0
        for text in lines:
            try:
                line = msgspec.json.decode(text, type=_Line)
            except msgspec.MsgspecError:
                continue  # cut short with the server
            if line.put is not None:
                self._put(line.put)
            elif line.taken is not None:
                self._tickets.pop(line.taken, None)
        return len(lines)

    def _write(self, line: _Line) -> None:
        if self._file is None:
            return
        try:
            if self._lines >= self._limit:
                self._file.replace(_older(self._file))
                self._lines = 0
            _append(self._file, LINE_START + msgspec.json.encode(line))
            self._lines += 1
        except OSError as error:
            logger.warning(
                "Session tickets cannot be kept in %s (%s): clients need a full handshake after "
                "the next restart.",
                self._file,
                error,
            )
            self._file = None


def _older(file: Path) -> Path:
    return file.with_name(file.name + ".older")


def _append(file: Path, data: bytes) -> None:
    """Append to a file that only its owner reads; make it if need be."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


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
