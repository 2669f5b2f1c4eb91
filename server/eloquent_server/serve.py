"""Running a server: load the backend, listen, and stop in an orderly way."""

import asyncio
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

from eloquent.core.schemes import scheme
from eloquent.errors import ConfigurationError
from eloquent.quic import listen as quic
from eloquent.quic.certificate import ServerCertificate
from eloquent.quic.qlog import QlogDirectory
from eloquent.serving import TurnService
from eloquent.url import ServerUrl
from eloquent.websocket import server as websocket
from eloquent_server import models
from eloquent_server.admission import open_gate
from eloquent_server.backends import echo
from eloquent_server.backends.base import Backend
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.backends.loading import LoadingBackend
from eloquent_server.backends.local import LocalBackend
from eloquent_server.engine.settings import KvOptions
from eloquent_server.gateway import Gateway
from eloquent_server.options import ServerOptions
from eloquent_server.state import open_store, open_tickets, server_certificate
from eloquent_server.store import TokenStore
from eloquent_server.swiftqueue_records import marking_with
from eloquent_server.tenants import tenants
from eloquent_server.turns import TurnHub

READY_PREFIX = "LISTENING"
"The line on standard output that tells a parent process the server's URL."

TIDY_EVERY_S = 60.0

FREE_PORT_TRIES = 10
"A port that is free for UDP may be taken for TCP; then another is tried."

STOP_DEADLINE_S = 3.0
"After the parent's end, a server that is still loading is ended the hard way."


async def start_backend(model: str, device: str, precision: str, kv: KvOptions) -> Backend:
    """Return the backend for `--model`, when it is fetched and loaded.

    Raises:
        ConfigurationError: there is no such model, or it cannot be loaded.
    """
    if model == echo.NAME:
        return EchoBackend()
    progress = models.progress_printer(sys.stderr)
    return await LocalBackend.start(
        model, device=device, precision=precision, kv=kv, progress=progress
    )


async def run_server(options: ServerOptions) -> None:
    """Serve until SIGINT or SIGTERM, or until standard input closes if `exit_with_parent`.

    Raises:
        ConfigurationError: the model cannot be loaded, the address cannot be had, or options do
            not go together.
        StoreError: the turns cannot be kept where they are to be.
    """
    if options.durable and options.state is None:
        raise ConfigurationError(
            "--durable needs --state DIRECTORY: without one the turns are kept in memory, and end "
            "with the server."
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if options.exit_with_parent:
        _watch_parent(loop, stop)
    make_sender = scheme(options.scheme)
    marks, records = marking_with(
        options.ecn,
        has_tuning=options.swiftqueue_tuning,
        records=options.swiftqueue_records,
        split=options.swiftqueue_records_split,
    )
    qlog = None if options.qlog is None else QlogDirectory(options.qlog)
    gate = open_gate(options.keys, host=options.host, max_turns=options.max_turns)
    now = datetime.datetime.now(datetime.UTC)
    certificate = server_certificate(options.state, options.host, now)
    async with AsyncExitStack() as stack:
        if records is not None:
            stack.push_async_callback(records.close)  # after the last connection's end
        store = open_store(options.state, durable=options.durable)
        stack.push_async_callback(store.close)
        # Readers of turns that are stored need no model, and would take a closed port for the end.
        backend = LoadingBackend(
            start_backend(options.model, options.device, options.precision, options.kv)
        )
        stack.push_async_callback(backend.close)
        tidying = asyncio.ensure_future(_tidy(store))
        stack.callback(tidying.cancel)
        gateway = Gateway(backend, tenant_of=tenants(options.state))
        hub = TurnHub(gateway.handle, store, admission=gate, go_on=gateway.go_on)
        listen = partial(
            quic.listen,
            options.host,
            certificate=certificate,
            service=hub,
            make_sender=make_sender,
            padding=options.padding,
            marking=marks,
            qlog=qlog,
            tickets=open_tickets(options.state),
        )
        if options.websocket:
            port = await _listen_both(stack, listen, options, certificate, hub)
        else:
            listener = await listen(options.port)
            stack.push_async_callback(listener.close)
            port = listener.port
        stack.push_async_callback(hub.close, is_restart=options.state is not None)
        loading = asyncio.ensure_future(backend.ready())
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return
        loading.result()
        hub.recover()
        url = ServerUrl(options.host, port, certificate.pin)
        print(READY_PREFIX, url, flush=True)  # noqa: T201
        await stopping


async def _listen_both(
    stack: AsyncExitStack,
    listen: Callable[[int], Awaitable[quic.Listener]],
    options: ServerOptions,
    certificate: ServerCertificate,
    service: TurnService,
) -> int:
    """Listen for QUIC and for WebSocket at one port until `stack` is left; return the port."""
    tries_left = 1 if options.port else FREE_PORT_TRIES
    while True:
        tries_left -= 1
        over_udp = await listen(options.port)
        try:
            over_tcp = await websocket.listen(
                options.host,
                over_udp.port,
                certificate=certificate,
                service=service,
                padding=options.padding,
            )
        except ConfigurationError:
            await over_udp.close()
            if not tries_left:
                raise
        else:
            stack.push_async_callback(over_udp.close)
            stack.push_async_callback(over_tcp.close)
            return over_udp.port


async def _tidy(store: TokenStore) -> None:
    """Let expired turns go from an idle server, too."""
    while True:
        await asyncio.sleep(TIDY_EVERY_S)
        store.expire()


def _watch_parent(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        loop.call_soon_threadsafe(stop.set)
        time.sleep(STOP_DEADLINE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
