"""The doctor: what an Eloquent client finds on the path from here to a server."""

import asyncio
import random
import socket
from dataclasses import asdict, dataclass
from typing import Any

from eloquent.errors import ConfigurationError, ConnectionFailedError
from eloquent.link import Rung
from eloquent.url import SCHEME, ServerUrl, parse_url
from eloquent_netem.lab.doctor_probes import (
    Attempt,
    Echo,
    Echoes,
    Failure,
    Watched,
    WatchedConnection,
    try_websocket,
)

TIMEOUT_S = 5.0
"For each attempt to connect, as clients have it."


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What was found."""

    url: ServerUrl
    address: str
    quic: Attempt
    websocket: Attempt
    shown_pin: str | None
    "SHA-256 of the certificate that the server showed."
    echoes: Echoes
    watched: Watched | None
    "None: no QUIC connection could be made."

    @property
    def is_trusted(self) -> bool:
        """Whether the server is the one that was meant, as far as is known."""
        return Failure.UNTRUSTED not in (self.quic.failure, self.websocket.failure)

    @property
    def rung(self) -> Rung | None:
        """What answers will come over; None: nothing works."""
        if self.quic.is_fine and self.watched is not None:
            return Rung.DATAGRAMS if self.watched.has_datagrams else Rung.STREAM
        return Rung.WEBSOCKET if self.websocket.is_fine else None

    def to_json(self) -> dict[str, Any]:
        """Return it for a file."""
        return {
            "url": str(self.url),
            "address": self.address,
            "rung": None if self.rung is None else self.rung.value,
            "is_trusted": self.is_trusted,
            "shown_pin": self.shown_pin,
            "quic": _attempt(self.quic),
            "websocket": _attempt(self.websocket),
            "echoes": asdict(self.echoes) | {"lost": self.echoes.lost},
            "watched": None
            if self.watched is None
            else asdict(self.watched) | {"ecn": self.watched.ecn.name, "lost": self.watched.lost},
        }


def parse_target(text: str) -> ServerUrl:
    """Read `HOST[:PORT]` or a server's URL.

    Raises:
        ConfigurationError: it is neither.
    """
    if "://" not in text and text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"  # An IPv6 address as one writes it.
    return parse_url(text if "://" in text else f"{SCHEME}://{text}")


async def examine(url: ServerUrl, seconds: float, seed: int = 0) -> Examination:
    """Try all ways to a server, and measure its path for `seconds`.

    Nothing but handshakes, pings and noise is sent; `seed` makes the noise.

    Raises:
        ConnectionFailedError: the host's name is not known.
        ConfigurationError: `seconds` is no length of time.
    """
    if not 0 < seconds <= 600:
        raise ConfigurationError(f"--seconds is above 0 and up to 600, not {seconds:g}.")
    address = await _resolve(url)
    rng = random.Random(seed)  # noqa: S311  (noise)
    (quic, watched), (websocket, tls_pin), echoes = await asyncio.gather(
        _over_quic(url, address, seconds),
        try_websocket(url, TIMEOUT_S),
        Echo(rng).measure(url, address, seconds),
    )
    return Examination(
        url=url,
        address=address,
        quic=quic,
        websocket=websocket,
        shown_pin=(watched.pin if watched is not None else None) or tls_pin,
        echoes=echoes,
        watched=watched,
    )


async def _resolve(url: ServerUrl) -> str:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(url.host, url.port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConnectionFailedError(
            f"The name {url.host} cannot be resolved ({reason}): it is misspelt, or this machine "
            "has no network or no name server. Nothing else was tried."
        ) from error
    return str(found[0][4][0])


async def _over_quic(
    url: ServerUrl, address: str, seconds: float
) -> tuple[Attempt, Watched | None]:
    """Connect and watch the path; if the certificate is refused, watch it all the same."""
    attempt, watched = await _watched(url, address, seconds, is_checked=True)
    if attempt.failure is Failure.OTHER:
        other, watched = await _watched(url, address, seconds, is_checked=False)
        if other.is_fine:
            return Attempt(other.took_s, Failure.UNTRUSTED, attempt.text), watched
    return attempt, watched


async def _watched(
    url: ServerUrl, address: str, seconds: float, *, is_checked: bool
) -> tuple[Attempt, Watched | None]:
    connection = WatchedConnection(url, is_checked=is_checked)
    try:
        attempt = await connection.open(address, TIMEOUT_S)
        return attempt, await connection.watch(seconds) if attempt.is_fine else None
    finally:
        connection.close()


def _attempt(attempt: Attempt) -> dict[str, Any]:
    failure = None if attempt.failure is None else attempt.failure.name.lower()
    return {"took_s": attempt.took_s, "failure": failure, "text": attempt.text}
