"""Certificates: a self-signed one for loopback and trials, and pins to recognise one by."""

import datetime
import ipaddress
import secrets
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

VALID_DAYS = 10
"Short, since nobody can revoke it; also the longest that browsers accept for a pinned one."

_SERIAL_BITS = 127
_SERIAL_TOP_BIT = 1 << (_SERIAL_BITS - 1)


PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
"What a server can sign with; of the curves P-256 and P-384."


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """What a server shows and signs with."""

    certificate: x509.Certificate
    private_key: PrivateKey = field(repr=False)
    chain: tuple[x509.Certificate, ...] = ()
    "What stands between it and an authority that clients know, the nearest first."

    @property
    def pin(self) -> str:
        """SHA-256 of the certificate (DER), in hexadecimal."""
        return certificate_pin(self.certificate)

    @property
    def is_self_signed(self) -> bool:
        """Whether no authority vouches for it, so that clients need its pin."""
        return self.certificate.issuer == self.certificate.subject

    @property
    def names(self) -> list[str]:
        """The host names and addresses that it is for."""
        try:
            found = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            return []
        kinds = (x509.DNSName, x509.IPAddress)
        return [str(name.value) for name in found.value if isinstance(name, kinds)]

    def pem(self) -> bytes:
        """Return the private key, the certificate and its chain as PEM; keep it secret."""
        key = self.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        shown = (self.certificate, *self.chain)
        return key + b"".join(each.public_bytes(Encoding.PEM) for each in shown)

    def tls(self) -> ssl.SSLContext:
        """Return a context for TLS 1.3 over TCP.

        Raises:
            ssl.SSLError: certificate and key are not accepted.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # `ssl` reads files only; the directory is the owner's alone, and gone at once.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "certificate.pem"
            path.touch(mode=0o600)
            path.write_bytes(self.pem())
            context.load_cert_chain(path)
        return context


def certificate_pin(certificate: x509.Certificate) -> str:
    """Return SHA-256 of the certificate (DER), in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def make_certificate(
    host: str, not_before: datetime.datetime, *, days: int = VALID_DAYS
) -> ServerCertificate:
    """Make a self-signed certificate for a host name or address, valid for some `days`.

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
        .not_valid_after(not_before + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([subject]), critical=False)
        .sign(private_key, None)
    )
    return ServerCertificate(certificate, private_key)
