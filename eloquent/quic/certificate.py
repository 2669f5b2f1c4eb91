"""Certificates: a self-signed one for loopback and trials, and pins to recognise one by."""

import datetime
import ipaddress
import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import NameOID

VALID_DAYS = 10
"Short, since nobody can revoke it; also the longest that browsers accept for a pinned one."

_SERIAL_BITS = 127
_SERIAL_TOP_BIT = 1 << (_SERIAL_BITS - 1)


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """What a server shows and signs with."""

    certificate: x509.Certificate
    private_key: ed25519.Ed25519PrivateKey

    @property
    def pin(self) -> str:
        """SHA-256 of the certificate (DER), in hexadecimal."""
        return certificate_pin(self.certificate)


def certificate_pin(certificate: x509.Certificate) -> str:
    """Return SHA-256 of the certificate (DER), in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def make_certificate(host: str, not_before: datetime.datetime) -> ServerCertificate:
    """Make a self-signed certificate for a host name or address, valid for `VALID_DAYS`.

    Ed25519, whose signatures have one length, and a serial number of one length: handshakes are
    alike, byte for byte in size.
    """
    private_key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "eloquent")])
    try:
        subject: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        subject = x509.DNSName(host)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private_key.public_key())
        .serial_number(_SERIAL_TOP_BIT | secrets.randbits(_SERIAL_BITS - 1))
        .not_valid_before(not_before)
        .not_valid_after(not_before + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([subject]), critical=False)
        .sign(private_key, None)
    )
    return ServerCertificate(certificate, private_key)
