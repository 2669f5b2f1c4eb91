"""A server's certificate for virtual time: the same bytes in every run."""

import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import NameOID

from eloquent.quic.certificate import ServerCertificate


def fixed_certificate() -> ServerCertificate:
    """Return the certificate of the host "server"; random serial numbers vary in length."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(b"netem, not a secret, 32 bytes ok")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=365 * 29))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("server")]), critical=False)
        .sign(key, None)
    )
    return ServerCertificate(certificate, key)
