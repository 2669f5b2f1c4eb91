"""Stateless resets: how a server says that it does not know a connection (RFC 9000 section 10.3).

A server that was restarted has forgotten its connections. With the key it had before, which comes
from its certificate's, it can still make the tokens that it gave out then, so that its clients
need not wait until they take it for silent.
"""

import hashlib
import hmac
import secrets

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from eloquent.quic.certificate import PrivateKey

TOKEN_BYTES = 16

MIN_RESET_BYTES = 21
"The least that is a reset (RFC 9000 section 10.3): 5 bytes that look like a packet's, and a token."

MAX_RESET_BYTES = 43
"A larger one says no more."

RESETS_PER_S = 1000.0
"A server sends no more of them, so that it cannot be used to flood others."

FIXED_BIT = 0x40
SHORT_HEADER_MASK = 0x3F


class ResetKey:
    """Makes the token of each connection id."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of(cls, private_key: PrivateKey) -> "ResetKey":
        """Return the key that belongs to a certificate's, the same after each restart."""
        secret = private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return cls(hmac.digest(secret, b"eloquent stateless reset", hashlib.sha256))

    def token(self, connection_id: bytes) -> bytes:
        """Return the token that proves a reset of the connection with this id."""
        return hmac.digest(self._key, connection_id, hashlib.sha256)[:TOKEN_BYTES]

    def reset(self, connection_id: bytes, received_bytes: int) -> bytes | None:
        """Return the answer to a packet of a connection that is not known.

        It is smaller than the packet, so that two servers that do not know each other's packets
        come to an end (section 10.3.3); None: the packet is too small for that.
        """
        size = min(received_bytes - 1, MAX_RESET_BYTES)
        if size < MIN_RESET_BYTES:
            return None
        noise = secrets.token_bytes(size - TOKEN_BYTES)
        first = FIXED_BIT | (noise[0] & SHORT_HEADER_MASK)
        return bytes((first,)) + noise[1:] + self.token(connection_id)


class ResetLimit:
    """A bucket of `RESETS_PER_S` resets."""

    def __init__(self) -> None:
        self._budget = RESETS_PER_S
        self._updated_at = 0.0

    def allows(self, now: float) -> bool:
        """Return whether one may leave at `now` (seconds), and count it."""
        earned = max(0.0, now - self._updated_at) * RESETS_PER_S
        self._budget = min(RESETS_PER_S, self._budget + earned)
        self._updated_at = now
        if self._budget < 1:
            return False
        self._budget -= 1
        return True
