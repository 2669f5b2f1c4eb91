"""Where a server is: `eloquent://HOST[:PORT][#sha256=PIN]`."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from eloquent.errors import ConfigurationError

DEFAULT_PORT = 4433
SCHEME = "eloquent"

_FORM = f"{SCHEME}://HOST[:PORT][#sha256=PIN]"


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """A server's address, and how to recognise it."""

    host: str
    port: int = DEFAULT_PORT
    pin: str | None = None
    "SHA-256 of the certificate to accept, in hexadecimal; None: ask the system's authorities."

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        pin = f"#sha256={self.pin}" if self.pin else ""
        return f"{SCHEME}://{host}:{self.port}{pin}"


def parse_url(text: str) -> ServerUrl:
    """Read a server's URL.

    Raises:
        ConfigurationError: it does not have the form `eloquent://HOST[:PORT][#sha256=PIN]`.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigurationError(f"{text!r} is no server URL ({error}): write {_FORM}.") from error
    if (
        parts.scheme != SCHEME
        or not host
        or port == 0
        or parts.path.strip("/")
        or parts.query
        or "@" in parts.netloc
    ):
        raise ConfigurationError(f"{text!r} is no server URL: write {_FORM}.")
    pin = None
    if parts.fragment:
        match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
        if match is None:
            raise ConfigurationError(
                f"The part after '#' in {text!r} is no certificate pin: write {_FORM}, the pin "
                "with 64 hexadecimal digits, as `eloquent serve` prints it."
            )
        pin = match.group(1).lower()
    return ServerUrl(host, DEFAULT_PORT if port is None else port, pin)
