"""What a server keeps between its runs: its certificate, its session tickets and the turns."""

import datetime
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from eloquent.errors import ConfigurationError
from eloquent.quic.certificate import ServerCertificate, make_certificate
from eloquent.quic.tickets import TicketBook
from eloquent_server.options import GB, ServerOptions
from eloquent_server.store import TokenStore

CERTIFICATE_FILE = "certificate.pem"
STORE_FILE = "turns.sqlite"
TICKETS_FILE = "tickets"

HOUR_S = 3600.0

CLOCK_SKEW_ALLOWED = datetime.timedelta(hours=1)
KEPT_DAYS = 3650
"""Clients know a kept certificate by its pin, and each would have to be told of another; its owner
revokes it by removing the file."""
RENEW_BEFORE = datetime.timedelta(days=1)
"A kept certificate that ends sooner is made anew, and the server's URL changes."


def open_store(options: ServerOptions) -> TokenStore:
    """Open the store in the state directory, or one that ends with the process.

    Raises:
        EloquentError: it cannot be used, or options contradict each other; the text says why.
    """
    directory = options.state
    if options.durable and directory is None:
        raise ConfigurationError(
            "--durable needs --state DIRECTORY: without one the turns are kept in memory, and end "
            "with the server."
        )
    if options.turn_ttl <= 0 or options.store_limit <= 0:
        raise ConfigurationError("--turn-ttl and --store-limit are above 0.")
    return TokenStore.open(
        directory / STORE_FILE if directory else None,
        ttl_s=options.turn_ttl * HOUR_S,
        max_bytes=round(options.store_limit * GB),
        durable=options.durable,
    )


def open_tickets(directory: Path | None) -> TicketBook:
    """Open the book of tickets in the state directory, or one that ends with the process.

    Raises:
        ConfigurationError: it cannot be read.
    """
    if directory is None:
        return TicketBook()
    path = directory / TICKETS_FILE
    try:
        return TicketBook(file=path)
    except OSError as error:
        raise ConfigurationError(
            f"The session tickets in {path} cannot be read ({error}): give a directory that this "
            "user can read with --state, or remove the file, and there are none."
        ) from error


def server_certificate(
    directory: Path | None, host: str, now: datetime.datetime
) -> ServerCertificate:
    """Return the certificate that is kept in the state directory; make it if need be.

    Without a directory it is a new one. A kept one stays for another host, too: clients know it by
    its pin, and look at no name.

    Raises:
        ConfigurationError: it cannot be read or written.
    """
    if directory is None:
        return make_certificate(host, now - CLOCK_SKEW_ALLOWED)
    path = directory / CERTIFICATE_FILE
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = _read(path) if path.exists() else None
        if kept is not None and kept.certificate.not_valid_after_utc - now > RENEW_BEFORE:
            return kept
        made = make_certificate(host, now - CLOCK_SKEW_ALLOWED, days=KEPT_DAYS)
        write_private(path, made.pem())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"The server's certificate in {path} cannot be used ({error}): give a directory that "
            "this user can write to with --state, or remove the file, and a new one is made."
        ) from error
    return made


def _read(path: Path) -> ServerCertificate:
    data = path.read_bytes()
    key = serialization.load_pem_private_key(data, password=None)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise TypeError("its key is not Ed25519")
    return ServerCertificate(x509.load_pem_x509_certificate(data), key)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user may read; a crash leaves the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)
