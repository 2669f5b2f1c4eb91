"""Running a server: load the backend, listen, and stop in an orderly way."""

import asyncio
import datetime
import importlib.util
import os
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from eloquent.core.schemes import scheme
from eloquent.errors import ConfigurationError
from eloquent.quic import listen as quic
from eloquent.quic.certificate import ServerCertificate
from eloquent.quic.qlog import QlogDirectory
from eloquent.serving import TurnService
from eloquent.websocket import server as websocket
from eloquent_server import models
from eloquent_server.admission import open_gate
from eloquent_server.backends import echo
from eloquent_server.backends.base import Backend
from eloquent_server.backends.echo import EchoBackend
from eloquent_server.backends.loading import LoadingBackend
from eloquent_server.backends.local import LocalBackend
from eloquent_server.certificates import chosen_certificate, follow, url_of
from eloquent_server.drain import Door, Signals, drain, notify
from eloquent_server.gateway import Gateway
from eloquent_server.options import ServerOptions
from eloquent_server.state import open_tickets
from eloquent_server.store_types import TurnStore
from eloquent_server.stores import open_turn_store
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


async def start_backend(options: ServerOptions) -> Backend:
    """Return the backend that the options ask for, when it is fetched, loaded or looked at.

    Raises:
        ConfigurationError: there is no such model, or it cannot be loaded; an engine's URL or key
            is missing or wrong.
    """
    if options.upstream:
        return await _start_upstreams(options)
    model = options.model or models.EMBEDDED_MODEL
    if model == echo.NAME:
        return EchoBackend()
    progress = models.progress_printer(sys.stderr)
    return await LocalBackend.start(
        model,
        device=options.device,
        precision=options.precision,
        kv=options.kv,
        progress=progress,
    )


async def _start_upstreams(options: ServerOptions) -> Backend:
    if importlib.util.find_spec("httpx2") is None:
        raise ConfigurationError(
            "--upstream needs httpx2, which is not installed: pip install 'eloquent-stream[server]'"
        )
    from eloquent_server.backends.upstream import FIRST_BYTE_S, Patience
    from eloquent_server.backends.upstreams import UpstreamBackend

    key, idle_s = "", options.upstream_timeout
    if options.upstream_key_env is not None:
        key = os.environ.get(options.upstream_key_env, "").strip()
        if not key:
            raise ConfigurationError(
                f"--upstream-key-env names {options.upstream_key_env}, and no such variable is set "
                "in the server's environment. Put the engine's key there."
            )
    backend = UpstreamBackend(
        options.upstream,
        model=options.model or "",
        key=key,
        salt=options.upstream_salt,
        continues=options.upstream_continues,
        patience=Patience(first_byte_s=max(FIRST_BYTE_S, idle_s), idle_s=idle_s),
        rng=random.Random(),  # noqa: S311 (it spreads probes)
    )
    await backend.start()
    return backend


async def run_server(options: ServerOptions) -> None:
    """Serve until the process is told to stop, or until its standard input closes.

    The latter if `exit_with_parent`; see `drain` for the former.

    Raises:
        ConfigurationError: the model cannot be loaded, the address cannot be had, or options do
            not go together.
        StoreError: the turns cannot be kept where they are to be.
    """
    loop = asyncio.get_running_loop()
    signals = Signals()
    signals.watch(loop)
    if options.exit_with_parent:
        _watch_parent(loop, signals.end)
    make_sender = scheme(options.scheme)
    marks, records = marking_with(
        options.ecn,
        has_tuning=options.swiftqueue_tuning,
        records=options.swiftqueue_records,
        split=options.swiftqueue_records_split,
    )
    qlog = None if options.qlog is None else QlogDirectory(options.qlog)
    gate = open_gate(options.keys, host=options.host, max_turns=options.max_turns)
    if options.keys is not None:
        signals.on_hangup(loop, gate.reload)
    now = datetime.datetime.now(datetime.UTC)
    certificate, files = chosen_certificate(options, now)
    async with AsyncExitStack() as stack:
        if records is not None:
            stack.push_async_callback(records.close)  # after the last connection's end
        store = await open_turn_store(options)
        stack.push_async_callback(store.close)
        # Readers of turns that are stored need no model, and would take a closed port for the end.
        backend = LoadingBackend(start_backend(options))
        stack.push_async_callback(backend.close)
        _work(stack, _tidy(store))
        door = Door(gate, loop.time)
        gateway = Gateway(backend, tenant_of=tenants(options.state))
        hub = TurnHub(gateway.handle, store, admission=door, go_on=gateway.go_on)
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
        over_udp, over_tcp = await _listen(stack, listen, options, certificate, hub)
        shown = [over_udp.show]
        if over_tcp is not None:
            shown.append(over_tcp.show)
        if files is not None:
            asked = asyncio.Event()
            signals.on_hangup(loop, asked.set)
            _work(stack, follow(files, shown, asked))
        stack.push_async_callback(hub.close, is_restart=bool(options.state or options.store))
        loading = asyncio.ensure_future(backend.ready())
        stopping = asyncio.ensure_future(signals.stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return
        loading.result()
        hub.recover()
        url = url_of(certificate, options.host, over_udp.port)
        print(READY_PREFIX, url, flush=True)  # noqa: T201
        notify("READY=1")
        await stopping
        notify("STOPPING=1")
        await drain(door, hub, signals, options.drain_timeout)


async def _listen(
    stack: AsyncExitStack,
    listen: Callable[[int], Awaitable[quic.Listener]],
    options: ServerOptions,
    certificate: ServerCertificate,
    service: TurnService,
) -> tuple[quic.Listener, websocket.WebSocketListener | None]:
    """Listen for QUIC, and for WebSocket at the same port unless it is left out.

    Both end when `stack` is left.
    """
    tries_left = 1 if options.port else FREE_PORT_TRIES
    while True:
        tries_left -= 1
        over_udp = await listen(options.port)
        if not options.websocket:
            stack.push_async_callback(over_udp.close)
            return over_udp, None
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
            return over_udp, over_tcp


def _work(stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
    """Do this beside everything else until `stack` is left."""
    stack.callback(asyncio.ensure_future(work).cancel)


async def _tidy(store: TurnStore) -> None:
    """Let expired turns go from an idle server, too."""
    while True:
        await asyncio.sleep(TIDY_EVERY_S)
        store.expire()


def _watch_parent(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        loop.call_soon_threadsafe(stop)
        time.sleep(STOP_DEADLINE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
