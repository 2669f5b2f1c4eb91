"""The HTTP front that the options ask for, with metrics of all parts of the server."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eloquent.addresses import is_loopback
from eloquent.errors import ConfigurationError
from eloquent.quic.certificate import ServerCertificate
from eloquent.quic.listen import Listener
from eloquent.websocket.server import WebSocketListener
from eloquent_server.admission import Principal
from eloquent_server.backends.base import Tenant
from eloquent_server.backends.loading import LoadingBackend
from eloquent_server.drain import DRAINING, ClosableGate
from eloquent_server.metered import MeteredBackend
from eloquent_server.store_types import StoreError, TurnStore
from eloquent_server.turns import TurnHub

if TYPE_CHECKING:
    from eloquent_server.http.listen import HttpListener

LOADING = "The model is loading."
LOOK_EVERY_S = 1.0
NOT_STORING = "Answers cannot be stored at the moment; the server's log says why."

logger = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
MAX_PORT = 65535


@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """What answers turns, whoever brings them."""

    hub: TurnHub
    gate: ClosableGate
    "The hub's admission."
    loading: LoadingBackend
    backend: MeteredBackend
    "The same, measured."
    store: TurnStore
    storing: "Storing"
    "Of that store."
    tenant_of: Callable[[Principal], Tenant]
    refusals: Mapping[str, int]
    "Requests that were refused for their key or a limit, by reason."

    async def why_not_ready(self) -> str:
        """Return why it takes no turns now; empty: it does."""
        if self.gate.is_shut:
            return DRAINING
        if self.loading.backend is None:
            return LOADING
        return "" if await self.storing.is_possible() else NOT_STORING


class Storing:
    """Whether turns can be stored: each look writes, so there are few, however many ask."""

    def __init__(self, store: TurnStore) -> None:
        self._store = store
        self._looked_s = float("-inf")
        self._is_possible = True

    async def is_possible(self) -> bool:
        """Say how it was `LOOK_EVERY_S` ago or later; the log has the reason."""
        now = time.monotonic()
        if now >= self._looked_s + LOOK_EVERY_S:
            self._looked_s = now
            try:
                await self._store.check()
            except StoreError as error:
                logger.warning("Not ready: %s", error)
                self._is_possible = False
            else:
                self._is_possible = True
        return self._is_possible


async def open_front(
    address: str,
    core: Core,
    *,
    quic: Listener,
    websocket: WebSocketListener | None,
    has_engines: bool,
    certificate: ServerCertificate | None,
    names: Collection[str] = (),
) -> "HttpListener":
    """Answer HTTP at an address of the form [HOST:]PORT; with a certificate it is HTTPS.

    `names` are hosts as which a reverse proxy in front has it known.

    `quic` and `websocket` are measured, too. With `has_engines` what is no chat goes to those that
    the backend has.

    Raises:
        ConfigurationError: the address is none, or cannot be had, or packages are missing.
    """
    host, port = address_of(address)
    try:
        from eloquent_server.backends.upstream_forward import UpstreamForward
        from eloquent_server.http.app import Behind
        from eloquent_server.http.listen import listen
        from eloquent_server.metrics import Metrics, Sources
    except ImportError as error:
        raise ConfigurationError(
            f"--http needs packages that are not installed ({error}): pip install "
            "'eloquent-stream[server]'."
        ) from error

    async def scrape() -> tuple[bytes, str]:
        return await metrics.scrape()

    behind = Behind(
        hub=core.hub,
        admission=core.gate,
        models=lambda: core.loading.models,
        why_not_ready=core.why_not_ready,
        metrics=scrape,
        pass_through=UpstreamForward(lambda: core.loading.backend, core.tenant_of)
        if has_engines
        else None,
    )
    front = await listen(host, port, behind, certificate=certificate, names=names)
    metrics = Metrics(
        Sources(
            backend=core.backend,
            hub=core.hub,
            store=core.store,
            quic=quic,
            websocket=websocket,
            http=front,
            requests_refused=core.refusals,
            inner=lambda: core.loading.backend,
        )
    )
    return front


def address_of(text: str) -> tuple[str, int]:
    """Read [HOST:]PORT; IPv6 addresses stand in brackets.

    Raises:
        ConfigurationError: it is none.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or len(port) > len(str(MAX_PORT)) or int(port) > MAX_PORT:
        raise ConfigurationError(
            f"{text!r} is no address for --http: write a port, or HOST:PORT, as in 8080 or "
            "0.0.0.0:8080 or [::]:8080."
        )
    return host.removeprefix("[").removesuffix("]") or LOCALHOST, int(port)


def is_for_others(address: str) -> bool:
    """Return whether other machines reach the address.

    Programs on this one, such as a reverse proxy, reach it under no name of a certificate.

    Raises:
        ConfigurationError: it is no address.
    """
    return not is_loopback(address_of(address)[0])


def url_of_front(address: str, port: int, *, is_tls: bool) -> str:
    """Return where a front that listens at `port` is found."""
    host = address_of(address)[0]
    host = f"[{host}]" if ":" in host else host
    return f"http{'s' if is_tls else ''}://{host}:{port}"
