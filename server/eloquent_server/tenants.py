"""What a tenant is called towards engines: the salt under which they keep its prefixes apart.

An engine that caches prefixes tells by its speed whether somebody has asked the same before. So a
tenant's requests go to it with a salt that nobody else can have: it comes from the tenant's name,
under a key that only this server knows.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from pathlib import Path

from eloquent.errors import ConfigurationError
from eloquent_server.admission import Principal
from eloquent_server.backends.base import Tenant
from eloquent_server.state import write_private

SALT_FILE = "salt.key"
SALT_KEY_BYTES = 32


def tenants(directory: Path | None) -> Callable[[Principal], Tenant]:
    """Return what makes a principal a tenant, with the key of the state directory.

    Without one the key is a new one, and no prefix is found again after a restart.

    Raises:
        ConfigurationError: the key cannot be read or written.
    """
    key = secrets.token_bytes(SALT_KEY_BYTES) if directory is None else _kept_key(directory)

    def tenant_of(principal: Principal) -> Tenant:
        salt = hmac.digest(key, principal.name.encode(), hashlib.sha256).hex()
        return Tenant(principal.name, principal.weight, salt)

    return tenant_of


def _kept_key(directory: Path) -> bytes:
    """Return the key of a state directory; make it if it is not there."""
    path = directory / SALT_FILE
    try:
        if not path.exists():
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(path, secrets.token_bytes(SALT_KEY_BYTES))
        key = path.read_bytes()
        if len(key) != SALT_KEY_BYTES:
            raise ValueError(f"it has {len(key)} bytes and not {SALT_KEY_BYTES}")
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"The key in {path} cannot be used ({error}): give a directory that this user can "
            "write to with --state, or remove the file, and a new key is made. Then engines behind "
            "the server find no prefix of before."
        ) from error
    return key
