"""Running a server: load the backend, listen, and stop in an orderly way."""

import asyncio
import contextlib
import datetime
import errno
import logging
import os
import resource
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
from eloquent.seldom import Seldom
from eloquent.serving import TurnService
from eloquent.websocket import server as websocket
from eloquent_server.admission import open_gate
from eloquent_server.backends.loading import LoadingBackend
from eloquent_server.certificates import chosen_certificate, follow, url_of
from eloquent_server.drain import ClosableGate, Signals, drain, notify
from eloquent_server.front import Core, Storing, address_of, is_for_others, open_front, url_of_front
from eloquent_server.gateway import Gateway
from eloquent_server.metered import MeteredBackend
from eloquent_server.options import ServerOptions
from eloquent_server.starting import start_backend
from eloquent_server.state import open_tickets
from eloquent_server.stores import open_turn_store
from eloquent_server.swiftqueue_records import marking_with
from eloquent_server.tenants import tenants
from eloquent_server.tidying import tidy
from eloquent_server.turns import TurnHub

READY_PREFIX = "LISTENING"
"The line on standard output that tells a parent process the server's URL."

HTTP_PREFIX = "HTTP"
"With --http a second line says where that is answered."

PLAIN = (
    "HTTP at %s is not encrypted: whoever is on the way reads keys and conversations. Give a "
    "certificate (--cert), or listen on this machine alone, behind a proxy that has one."
)

MAX_FILES = 65536
"So many the process asks for, if the system allows them: each TCP connection takes one."

OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NO_FILE_LEFT = (
    "There is no file left for another connection over TCP (%s): raise `ulimit -n`, see "
    "docs/operations.md, 'Limits'."
)

FREE_PORT_TRIES = 10
"A port that is free for UDP may be taken for TCP; then another is tried."

STOP_DEADLINE_S = 3.0
"After the parent's end, a server that is still loading is ended the hard way."

logger = logging.getLogger(__name__)


async def run_server(options: ServerOptions) -> None:
    """Serve until the process is told to stop, or until its standard input closes.

    The latter if `exit_with_parent`; see `drain` for the former.

    Raises:
        ConfigurationError: the model cannot be loaded, the address cannot be had, or options do
            not go together.
        StoreError: the turns cannot be kept where they are to be.
    """
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_fault_handler())
    _take_files()
    signals = Signals(loop)
    if options.exit_with_parent:
        _watch_parent(loop, signals.end)
    async with AsyncExitStack() as stack:
        core = await _open_core(stack, options, signals)
        said = await _open_endpoints(stack, options, core, signals)
        stack.push_async_callback(core.hub.close, is_restart=bool(options.state or options.store))
        loading = asyncio.ensure_future(core.loading.ready())
        stopping = asyncio.ensure_future(signals.stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return
        loading.result()
        core.hub.recover()
        for line in said:
            print(line, flush=True)  # noqa: T201
        notify("READY=1")
        await stopping
        notify("STOPPING=1")
        await drain(core.gate, core.hub, signals, options.drain_timeout)


async def _open_core(stack: AsyncExitStack, options: ServerOptions, signals: Signals) -> Core:
    """Open the store and begin to load the model; both end when `stack` is left."""
    if options.max_turns is not None and options.max_turns < 1:
        raise ConfigurationError("--max-turns is at least 1; without it there is no such limit.")
    keys = open_gate(options.keys, host=_most_open(options), max_turns=options.max_turns)
    if options.keys is not None:
        signals.on_hangup(keys.reload)
    store = await open_turn_store(options)
    stack.push_async_callback(store.close)
    # Readers of turns that are stored need no model, and would take a closed port for the end.
    loading = LoadingBackend(start_backend(options))
    stack.push_async_callback(loading.close)
    _work(stack, tidy(store))
    backend = MeteredBackend(loading)
    tenant_of = tenants(options.state)
    gateway = Gateway(backend, tenant_of=tenant_of)
    gate = ClosableGate(keys, asyncio.get_running_loop().time)
    hub = TurnHub(gateway.handle, store, admission=gate, go_on=gateway.go_on)
    return Core(
        hub=hub,
        gate=gate,
        loading=loading,
        backend=backend,
        store=store,
        storing=Storing(store),
        tenant_of=tenant_of,
        refusals=keys.refusals,
    )


async def _open_endpoints(
    stack: AsyncExitStack, options: ServerOptions, core: Core, signals: Signals
) -> list[str]:
    """Listen until `stack` is left; return the lines that say where."""
    certificate, files = chosen_certificate(options, datetime.datetime.now(datetime.UTC))
    marks, records = marking_with(
        options.ecn,
        has_tuning=options.swiftqueue_tuning,
        records=options.swiftqueue_records,
        split=options.swiftqueue_records_split,
    )
    if records is not None:
        stack.push_async_callback(records.close)  # after the last connection's end
    listen = partial(
        quic.listen,
        options.host,
        certificate=certificate,
        service=core.hub,
        make_sender=scheme(options.scheme),
        padding=options.padding,
        marking=marks,
        qlog=None if options.qlog is None else QlogDirectory(options.qlog),
        tickets=open_tickets(options.state),
    )
    over_udp, over_tcp = await _listen(stack, listen, options, certificate, core.hub)
    shown = [over_udp.show] if over_tcp is None else [over_udp.show, over_tcp.show]
    said = [f"{READY_PREFIX} {url_of(certificate, options.host, over_udp.port)}"]
    if options.http is not None:
        is_tls = files is not None and is_for_others(options.http)
        if is_for_others(options.http) and not is_tls:
            logger.warning(PLAIN, options.http)
        front = await open_front(
            options.http,
            core,
            quic=over_udp,
            websocket=over_tcp,
            has_engines=bool(options.upstream),
            certificate=certificate if is_tls else None,
            names=options.http_name,
        )
        stack.push_async_callback(front.close)
        shown += [front.show] if is_tls else []
        said.append(f"{HTTP_PREFIX} {url_of_front(options.http, front.port, is_tls=is_tls)}")
    if files is not None:
        asked = asyncio.Event()
        signals.on_hangup(asked.set)
        _work(stack, follow(files, shown, asked))
    return said


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


def _most_open(options: ServerOptions) -> str:
    """Return the one of the hosts to listen on that more people reach."""
    is_open = options.http is not None and is_for_others(options.http)
    return address_of(options.http)[0] if is_open and options.http else options.host


def _take_files() -> None:
    """Have as many files as the system allows this process, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has other limits, too.
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _fault_handler() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Return what logs the event loop's faults.

    One that anybody can cause, by connecting, is a line now and then: asyncio makes thousands.
    """
    seldom = Seldom(logger)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
            seldom.warn(loop.time(), NO_FILE_LEFT % error.strerror)
        else:
            loop.default_exception_handler(context)

    return handle


def _work(stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
    """Do this beside everything else until `stack` is left; a fault in it is logged at once."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(_say_fault)
    stack.callback(task.cancel)


def _say_fault(task: asyncio.Task[None]) -> None:
    fault = None if task.cancelled() else task.exception()
    if fault is not None:
        logger.error("A part of the server works no more; restart it.", exc_info=fault)


def _watch_parent(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        loop.call_soon_threadsafe(stop)
        time.sleep(STOP_DEADLINE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
