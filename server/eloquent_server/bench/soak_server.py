"""The server that a soak looks at: all of a server but the HTTP front, in a process of its own."""

import asyncio
import contextlib
import datetime
import gc
import logging
import os
import re
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from eloquent.quic import listen as quic
from eloquent.quic.certificate import make_certificate
from eloquent.quic.tickets import TicketBook
from eloquent.websocket import server as websocket
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.gateway import Gateway
from eloquent_server.metered import MeteredBackend
from eloquent_server.metrics import Metrics, Sources
from eloquent_server.store import TokenStore
from eloquent_server.tidying import tidy
from eloquent_server.turns import TurnHub

HOST = "127.0.0.1"
LOOK = "look"
COUNT = "count"
"Look, and count Python's objects, for which a place of some megabytes is needed."
STOP = "stop"
TICKETS = 500
"""The book of session tickets is full before memory is looked at. A server's takes 10,000, which is
10 MB, and fills for an hour."""
_SAMPLE = re.compile(r"^([a-z_:]+)(\{[^}]*\})? (\S+)$", re.MULTILINE)
"A line of Prometheus' text format."


@dataclass(frozen=True, slots=True)
class Serving:
    """How the server is set up."""

    state: str
    "Directory for the store."
    tokens_per_s: float
    "Of each turn."
    grace_s: float
    ttl_s: float
    "Ended turns are kept for so long, and their ids for as long again."


@dataclass(frozen=True, slots=True)
class Look:
    """The server at one time."""

    resident_bytes: int
    open_files: int
    threads: int
    objects: int | None
    "Python's, those that its garbage collector knows, after it has run; None: not counted."
    cpu_s: float
    metrics: dict[str, float]
    "What `/metrics` says, by name and labels."


def run(serving: Serving, parent: Connection) -> None:
    """Serve; answer `LOOK` and `COUNT` of the parent's with a `Look`, until it says `STOP`."""
    logging.getLogger("quic").setLevel(logging.ERROR)  # as `eloquent serve` has it
    asyncio.run(_serve(serving, parent))


async def _serve(serving: Serving, parent: Connection) -> None:
    certificate = make_certificate(HOST, datetime.datetime.now(datetime.UTC))
    store = TokenStore.open(
        Path(serving.state) / "turns.sqlite",
        ttl_s=serving.ttl_s,
        tombstone_ttl_s=serving.ttl_s,
    )
    backend = MeteredBackend(EchoBackend(serving.tokens_per_s))
    gateway = Gateway(backend)
    hub = TurnHub(gateway.handle, store, go_on=gateway.go_on, grace_s=serving.grace_s)
    over_udp = await quic.listen(
        HOST, 0, certificate=certificate, service=hub, tickets=TicketBook(TICKETS)
    )
    over_tcp = await websocket.listen(HOST, over_udp.port, certificate=certificate, service=hub)
    sources = Sources(backend=backend, hub=hub, store=store, quic=over_udp, websocket=over_tcp)
    metrics = Metrics(sources)
    parent.send((over_udp.port, certificate.pin))
    tidying = asyncio.ensure_future(tidy(store))
    try:
        while (message := await asyncio.to_thread(parent.recv)) != STOP:
            parent.send(_look(metrics, is_count=message == COUNT))
    finally:
        tidying.cancel()
        await hub.close()
        await over_udp.close()
        await over_tcp.close()


def _look(metrics: Metrics, *, is_count: bool) -> Look:
    if is_count:
        gc.collect()
    text = metrics.render()[0].decode()
    status = Path("/proc/self/status").read_text()
    resident_kb = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    threads = re.search(r"^Threads:\s+(\d+)$", status, re.MULTILINE)
    assert resident_kb is not None
    assert threads is not None
    with contextlib.closing(os.scandir("/proc/self/fd")) as files:
        open_files = sum(1 for _ in files) - 1  # the directory itself
    times = os.times()
    return Look(
        resident_bytes=int(resident_kb[1]) << 10,
        open_files=open_files,
        threads=int(threads[1]),
        objects=len(gc.get_objects()) if is_count else None,
        cpu_s=times.user + times.system,
        metrics={name + labels: float(value) for name, labels, value in _SAMPLE.findall(text)},
    )
