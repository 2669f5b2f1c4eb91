"""An authority of one's own, and what it vouches for."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
AnyKey = Key | rsa.RSAPrivateKey
DAY = datetime.timedelta(days=1)
START = datetime.datetime.now(datetime.UTC) - DAY


def new_key(kind: str) -> AnyKey:
    """Make a key: `p256`, `p384`, `p521`, `ed25519`, `ed448` or `rsa`."""
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind == "ed448":
        return ed448.Ed448PrivateKey.generate()
    if kind == "rsa":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return ec.generate_private_key(getattr(ec, kind.replace("p", "SECP") + "R1")())


@dataclass(frozen=True)
class Issued:
    """A certificate, its key, and what stands above it."""

    certificate: x509.Certificate
    key: AnyKey
    chain: tuple[x509.Certificate, ...] = ()

    def pem(self) -> bytes:
        """Return certificate and chain."""
        shown = (self.certificate, *self.chain)
        return b"".join(each.public_bytes(Encoding.PEM) for each in shown)

    def key_pem(self, password: bytes | None = None) -> bytes:
        """Return the private key."""
        how: KeySerializationEncryption = NoEncryption()
        if password is not None:
            how = BestAvailableEncryption(password)
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)

    def write(self, folder: Path, name: str = "server") -> tuple[Path, Path]:
        """Write both files; return their paths."""
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(self.pem())
        key.write_bytes(self.key_pem())
        return certificate, key


class Authority:
    """A root, and an intermediate that signs."""

    def __init__(self) -> None:
        self._root = _issue("root", ec.generate_private_key(ec.SECP256R1()), None)
        self._middle = _issue("middle", ec.generate_private_key(ec.SECP256R1()), self._root)

    def issue(self, *names: str, kind: str = "p256", days: int = 30) -> Issued:
        """Vouch for a server; `days` from yesterday on."""
        issued = _issue(names[0], new_key(kind), self._middle, names=names, days=days)
        return Issued(issued.certificate, issued.key, (self._middle.certificate,))

    def write(self, folder: Path) -> Path:
        """Write the root's certificate, for clients to trust."""
        path = folder / "authority.pem"
        path.write_bytes(self._root.pem())
        return path


def _issue(
    subject: str,
    key: AnyKey,
    issuer: Issued | None,
    *,
    names: tuple[str, ...] = (),
    days: int = 30,
) -> Issued:
    def name_of(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(name_of(subject))
        .issuer_name(name_of(subject) if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(START)
        .not_valid_after(START + days * DAY)
        .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general(name) for name in names]), critical=False
        )
    signer = key if issuer is None else issuer.key
    digest = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return Issued(builder.sign(signer, digest), key)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
