"""Certificates from files: read, checked, and read again when they change."""

import asyncio
import contextlib
import datetime
import logging
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from eloquent.addresses import is_loopback
from eloquent.errors import ConfigurationError
from eloquent.quic.certificate import PrivateKey, ServerCertificate
from eloquent.url import ServerUrl
from eloquent_server.options import ServerOptions
from eloquent_server.state import server_certificate

CHECK_EVERY_S = 60.0
"How often the files are looked at."

WARN_BEFORE = datetime.timedelta(days=7)
WARN_EVERY = datetime.timedelta(days=1)

CURVES = (ec.SECP256R1, ec.SECP384R1)
KINDS = "Take ECDSA with P-256 or P-384, Ed25519, or RSA."

SELF_MADE = (
    "The certificate is self-made: clients know it by its pin, the part of the URL after `#`. "
    "For a name that any client can check give files with --cert and --cert-key; --dev-cert says "
    "that this is meant."
)

logger = logging.getLogger(__name__)


class CertificateFiles:
    """A certificate with its chain, and its private key, in two files (PEM)."""

    def __init__(
        self,
        certificate: Path,
        key: Path,
        *,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        """`now` is the wall clock, which decides whether the certificate is still good."""
        self._certificate = certificate
        self._key = key
        self._now = now
        self._seen = self._state()
        self._until: datetime.datetime | None = None
        "When what was read last ends."
        self._warned_at: datetime.datetime | None = None

    def read(self) -> ServerCertificate:
        """Read the files as they are now.

        Raises:
            ConfigurationError: they cannot be read, do not belong together, or are good no longer.
        """
        self._seen = self._state()
        try:
            shown = x509.load_pem_x509_certificates(self._certificate.read_bytes())
            public_key = shown[0].public_key()
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigurationError(
                f"The certificate in {self._certificate} cannot be used ({error}): give a PEM file "
                "that has the server's certificate first and then its chain, with --cert."
            ) from error
        key = self._read_key()
        certificate = ServerCertificate(shown[0], key, tuple(shown[1:]))
        if public_key != key.public_key():
            raise ConfigurationError(
                f"The key in {self._key} is not that of the certificate in {self._certificate}: "
                "give two files that belong together with --cert and --cert-key; the server's own "
                "certificate comes first in its file."
            )
        until = shown[0].not_valid_after_utc
        if until <= self._now():
            raise ConfigurationError(
                f"The certificate in {self._certificate} was good until {until:%Y-%m-%d %H:%M} "
                "UTC, so clients would refuse it: renew it."
            )
        try:
            certificate.tls()
        except ssl.SSLError as error:
            raise ConfigurationError(
                f"TLS does not take the certificate in {self._certificate} ({error}). {KINDS}"
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"The certificate in {self._certificate} cannot be made ready for TLS "
                f"({error.strerror}): that takes a directory for temporary files (TMPDIR) with "
                "some room."
            ) from error
        self._until = until
        return certificate

    def has_changed(self) -> bool:
        """Return whether the files are others than when they were last read."""
        return self._state() != self._seen

    def warn_if_late(self) -> None:
        """Log that the certificate is about to end, once a day."""
        now = self._now()
        is_late = self._until is not None and self._until - now < WARN_BEFORE
        if is_late and (self._warned_at is None or now - self._warned_at >= WARN_EVERY):
            self._warned_at = now
            logger.warning(
                "The certificate in %s is good until %s only: renew it.",
                *(self._certificate, self._until),
            )

    def _read_key(self) -> PrivateKey:
        try:
            key = serialization.load_pem_private_key(self._key.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigurationError(
                f"The private key in {self._key} cannot be used ({error}): give a PEM file without "
                "a password, which this user can read, with --cert-key."
            ) from error
        is_taken = isinstance(key, ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) or (
            isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, CURVES)
        )
        if not is_taken:
            raise ConfigurationError(f"The private key in {self._key} is of another kind. {KINDS}")
        assert isinstance(key, PrivateKey)
        return key

    def _state(self) -> list[tuple[int, int, int] | None]:
        """What tells whether the files are the same; links are followed."""
        found: list[tuple[int, int, int] | None] = []
        for path in (self._certificate, self._key):
            try:
                stat = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return found


async def follow(
    files: CertificateFiles,
    shown: Sequence[Callable[[ServerCertificate], None]],
    asked: asyncio.Event,
    *,
    every_s: float = CHECK_EVERY_S,
) -> None:
    """Show the certificate anew whenever its files change, or `asked` is set, until cancelled.

    `shown` are what shows it.

    Files that cannot be used are logged, once, and the certificate before stays. They are read
    again each time: what was wrong may have been the system's.
    """
    said = ""
    "What is wrong with the files, as far as the log has it."
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every_s):
                await asked.wait()
        files.warn_if_late()
        if not (said or asked.is_set() or files.has_changed()):
            continue
        try:
            certificate = files.read()
            for show in shown:
                show(certificate)
        except (ConfigurationError, OSError) as error:
            if asked.is_set() or str(error) != said:
                logger.error("The certificate stays what it was. %s", error)
            said = str(error)
        else:
            said = ""
            until = certificate.certificate.not_valid_after_utc
            logger.info("The certificate was read anew; good until %s", until.isoformat())
        asked.clear()


def chosen_certificate(
    options: ServerOptions, now: datetime.datetime
) -> tuple[ServerCertificate, CertificateFiles | None]:
    """Return the certificate that a server is to show, and the files that it comes from, if any.

    Raises:
        ConfigurationError: it cannot be used, or options contradict each other.
    """
    if options.cert is not None:
        if options.dev_cert:
            raise ConfigurationError(
                "--cert and --dev-cert exclude each other: show a certificate from files, or have "
                "one made."
            )
        files = CertificateFiles(options.cert, options.cert_key or options.cert)
        return files.read(), files
    if options.cert_key is not None:
        raise ConfigurationError("--cert-key needs --cert FILE: the certificate of that key.")
    if not options.dev_cert and not is_loopback(options.host):
        logger.warning(SELF_MADE)
    return server_certificate(options.state, options.host, now), None


def url_of(certificate: ServerCertificate, host: str, port: int) -> ServerUrl:
    """Return the URL at which clients reach a server that listens on `host`.

    One that an authority vouches for goes by the first name in its certificate, unless this is for
    `host` itself; any other is known by its pin.
    """
    if certificate.is_self_signed:
        return ServerUrl(host, port, certificate.pin)
    names = certificate.names
    if host not in names:
        host = next((name for name in names if "*" not in name), host)
    return ServerUrl(host, port)
