"""What one token to one reader costs the server: CPU time over real QUIC on loopback.

The server is a process of its own; its logs are fed directly, a token for each reader in turn, so
that the figure is the transport's alone. The readers are this process's: it needs another core.
"""

import asyncio
import datetime
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from eloquent.core.events import TextDelta
from eloquent.core.log import TokenLog
from eloquent.errors import ConfigurationError
from eloquent.quic.certificate import make_certificate
from eloquent.quic.listen import listen
from eloquent.serving import Reader
from eloquent.session.session import Session
from eloquent.url import ServerUrl

HOST = "127.0.0.1"
TEXT = " tok"
WARM_UP_S = 3.0
"New paths have copies of their first bundles; after this time they are known."
TICK_S = 0.005
"Tokens that are due are told this often."
READY_S = 60.0
"All readers have to be there within this time."
FULL = 0.9
"Of a core, when it counts as full."


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured."""

    readers: int
    tokens_per_s: float
    "To each reader."
    seconds: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What it took."""

    tokens: int
    cpu_s: float
    wall_s: float

    @property
    def us_per_token(self) -> float:
        """CPU time of one token to one reader, in microseconds."""
        return 1e6 * self.cpu_s / self.tokens


class _Telling:
    """A `TurnService` that tells every reader one token after the other."""

    def __init__(self, readers: int) -> None:
        self._wanted = readers
        self._logs: list[tuple[Reader, TokenLog]] = []
        self.all_here = asyncio.Event()

    def on_request(self, reader: Reader) -> None:
        """See `TurnService.on_request`."""
        log = TokenLog()
        self._logs.append((reader, log))
        reader.accept(log)
        if len(self._logs) == self._wanted:
            self.all_here.set()

    def on_cancel(self, reader: Reader) -> None:
        """See `TurnService.on_cancel`."""

    def on_gone(self, reader: Reader) -> None:
        """See `TurnService.on_gone`."""

    async def tell(self, tokens_per_s: float, seconds: float) -> int:
        """Feed the logs, evenly over time; return how many tokens that were."""
        loop = asyncio.get_running_loop()
        started, told = loop.time(), 0
        while (passed := loop.time() - started) < seconds:
            due = int(passed * tokens_per_s * self._wanted)
            while told < due:
                reader, log = self._logs[told % self._wanted]
                log.append(TextDelta(TEXT))
                reader.log_grew()
                told += 1
            await asyncio.sleep(TICK_S)
        return told


async def _serve(load: Load, parent: Connection) -> None:
    certificate = make_certificate(HOST, datetime.datetime.now(datetime.UTC))
    telling = _Telling(load.readers)
    listener = await listen(HOST, 0, certificate=certificate, service=telling)
    parent.send((listener.port, certificate.pin))
    async with asyncio.timeout(READY_S):
        await telling.all_here.wait()
    await telling.tell(load.tokens_per_s, WARM_UP_S)
    cpu_s, wall_s = time.process_time(), time.monotonic()
    tokens = await telling.tell(load.tokens_per_s, load.seconds)
    parent.send(Cost(tokens, time.process_time() - cpu_s, time.monotonic() - wall_s))
    await listener.close()


def _run_server(load: Load, parent: Connection) -> None:
    asyncio.run(_serve(load, parent))


@contextmanager
def _server(load: Load) -> Iterator[Connection]:
    """Run the server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_server, args=(load, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.terminate()
        process.join()
        ours.close()


async def _read(load: Load, url: ServerUrl, server: Connection) -> Cost:
    """Read as so many clients, each over a connection of its own, until the server is done."""
    sessions = [Session(url) for _ in range(load.readers)]

    async def read(session: Session) -> None:
        async for _ in session.ask(b"{}"):
            pass

    readings = [asyncio.ensure_future(read(session)) for session in sessions]
    try:
        cost: Cost = await asyncio.to_thread(server.recv)
    finally:
        for reading in readings:
            reading.cancel()
        await asyncio.gather(*readings, return_exceptions=True)
        await asyncio.gather(*(session.close() for session in sessions))
    return cost


def measure(load: Load) -> Cost:
    """Return what a load costs the server.

    Raises:
        ConfigurationError: there is nothing to measure, or not all readers came.
    """
    if load.readers < 1 or load.tokens_per_s <= 0 or load.seconds <= 0:
        raise ConfigurationError("Readers, tokens per second and seconds must be above 0.")
    with _server(load) as server:
        try:
            port, pin = server.recv()
            return asyncio.run(_read(load, ServerUrl(HOST, port, pin), server))
        except EOFError as error:
            raise ConfigurationError(
                f"The server ended before the figures were there: perhaps not all {load.readers} "
                f"readers came within {READY_S:.0f} s. Try fewer."
            ) from error


def describe(load: Load, cost: Cost) -> str:
    """Return the figures as text."""
    full = FULL * 1e6 / (cost.us_per_token * load.tokens_per_s)
    return (
        f"{load.readers} readers, {load.tokens_per_s:g} tokens/s each, {cost.wall_s:.0f} s: "
        f"{cost.us_per_token:.0f} us of CPU per token and reader "
        f"({100 * cost.cpu_s / cost.wall_s:.0f} % of a core); "
        f"{full:.0f} readers would take {100 * FULL:.0f} %"
    )
