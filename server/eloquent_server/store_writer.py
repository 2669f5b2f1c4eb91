"""The token store's thread: it owns the file, and commits what has gathered as one transaction."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eloquent_server.meters import StoreMeters
from eloquent_server.store_sqlite import StoreDatabase
from eloquent_server.store_types import StoreError, TurnRecord

BATCH_WRITES = 1_000
"A transaction holds at most this many writes, so that none waits long for the others."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Write:
    """Something to be stored."""

    action: Callable[[StoreDatabase], None]
    turn: TurnRecord | None = None
    "Whose failure, once something of it could not be stored, refuses this write too."
    loop: asyncio.AbstractEventLoop | None = None
    "Where `done` is called; without one, nobody is told."
    done: Callable[[StoreError | None], None] | None = None
    "Called with None once it is committed, else with why it is not."


@dataclass(frozen=True, slots=True)
class Read:
    """Something to be read, after all that was written before."""

    action: Callable[[StoreDatabase], Any]
    loop: asyncio.AbstractEventLoop
    done: Callable[[Any], None]
    "Called with the result or a `StoreError`."


class Writer:
    """A thread that does jobs in order, and tells their event loops how they went."""

    def __init__(self, path: Path | None, *, durable: bool) -> None:
        """Open the file in a thread of its own, and wait for that.

        Raises:
            StoreError: see `StoreDatabase`.
        """
        self.meters = StoreMeters()
        self._jobs: queue.SimpleQueue[Write | Read | None] = queue.SimpleQueue()
        opened: Future[list[TurnRecord]] = Future()
        # A daemon, so that a program that ends without closing the store does end.
        self._thread = threading.Thread(
            target=self._run, args=(path, durable, opened), name="token-store", daemon=True
        )
        self._thread.start()
        self.records = opened.result()

    def put(self, job: Write | Read) -> None:
        """Hand over a job; returns at once."""
        self._jobs.put(job)

    async def close(self) -> None:
        """Do all that was put before, close the file, and end the thread."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self, path: Path | None, durable: bool, opened: "Future[list[TurnRecord]]") -> None:
        try:
            database = StoreDatabase(path, durable=durable)
            try:
                records = database.records()
            except BaseException:
                database.close()
                raise
        except BaseException as error:  # noqa: BLE001 (raised again, by the thread that waits)
            opened.set_exception(error)
            return
        opened.set_result(records)
        try:
            self._serve(database)
        finally:
            database.close()

    def _serve(self, database: StoreDatabase) -> None:
        while True:
            writes: list[Write] = []
            job = self._jobs.get()
            while isinstance(job, Write):
                writes.append(job)
                if len(writes) >= BATCH_WRITES or self._jobs.empty():
                    break
                job = self._jobs.get()
            if writes:
                began_s = time.monotonic()
                is_stored = _commit(database, writes)
                self.meters.on_flush(len(writes), time.monotonic() - began_s, is_stored=is_stored)
            if isinstance(job, Read):
                _read(database, job)
            elif job is None:
                return


def _commit(database: StoreDatabase, writes: list[Write]) -> bool:
    """Commit all of `writes`; a failure is that of every turn that is among them."""
    sound = [write for write in writes if write.turn is None or write.turn.failure is None]
    failure = _attempt(database, sound)
    if failure is not None:
        for write in sound:
            if write.turn is not None:
                write.turn.failure = failure
    reports: dict[asyncio.AbstractEventLoop, list[tuple[Callable[[Any], None], Any]]] = {}
    for write in writes:
        if write.loop is not None and write.done is not None:
            outcome = failure if write.turn is None else write.turn.failure
            reports.setdefault(write.loop, []).append((write.done, outcome))
    for loop, calls in reports.items():
        _tell(loop, calls)
    return failure is None


def _attempt(database: StoreDatabase, writes: list[Write]) -> StoreError | None:
    try:
        with database.transaction():
            for write in writes:
                write.action(database)
    except StoreError as error:
        logger.error("nothing stored of %d writes: %s", len(writes), error)
        return error
    except Exception as error:
        # The thread's boundary: whoever waits must be told, and the next turns be served.
        logger.exception("a fault in the token store")
        return _fault(error)
    return None


def _read(database: StoreDatabase, job: Read) -> None:
    try:
        result = job.action(database)
    except StoreError as error:
        result = error
    except Exception as error:
        # As in `_attempt`.
        logger.exception("a fault in the token store")
        result = _fault(error)
    _tell(job.loop, [(job.done, result)])


def _fault(error: Exception) -> StoreError:
    return StoreError(
        f"The token store has a fault ({error!r}), so this was not done. The server's log has the "
        "details: please report them."
    )


def _tell(
    loop: asyncio.AbstractEventLoop, calls: Iterable[tuple[Callable[[Any], None], Any]]
) -> None:
    """Make the calls on `loop`, with one wake-up for all of them."""

    def make() -> None:
        for call, argument in calls:
            loop.call_soon(call, argument)

    try:
        loop.call_soon_threadsafe(make)
    except RuntimeError:
        # The loop is closed: what was stored stays so, and nobody is left to hear of it.
        logger.debug("nobody heard how a write to the token store went: the event loop is closed")
