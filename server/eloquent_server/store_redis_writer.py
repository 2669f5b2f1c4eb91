"""What is to be written to Redis: what has gathered goes in one round trip, in order."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from eloquent.seldom import Seldom
from eloquent_server.meters import StoreMeters
from eloquent_server.store_redis_link import RedisLink
from eloquent_server.store_redis_scripts import OPEN_KEY, WRITE, Keys
from eloquent_server.store_types import (
    StaleOwnerError,
    StoreAwayError,
    StoreError,
    TurnRecord,
)

BATCH_WRITES = 200
"A script call holds at most this many, so that Redis is not kept from others."
RETRY_FIRST_S = 0.05
RETRY_GROWTH = 2.0
RETRY_MAX_S = 1.0

STALE = (
    "Turn {name} is another gateway's by now, or was deleted: nothing that this one generates is "
    "added to it."
)
GAP = (
    "Redis has lost a part of turn {name} that it had confirmed, so nothing can follow. It was "
    "restarted without its newest data: see `appendfsync` in its configuration."
)

WriteKind = Literal["append", "end", "release"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Write:
    """Something to be stored of one turn."""

    what: WriteKind
    record: TurnRecord
    keys: Keys
    sequence: int
    offset: int
    data: bytes
    continuation: bytes | None
    done: Callable[[StoreError | None], None]
    "Called with None once Redis has it, else with why it never will."


class RedisWriter:
    """Sends writes for one owner; a Redis that is away is tried again until they are given up."""

    def __init__(
        self,
        link: RedisLink,
        owner: bytes,
        *,
        ttl_s: float,
        tombstone_ttl_s: float,
        now: Callable[[], float],
    ) -> None:
        """`now` is the wall clock."""
        self._link = link
        self._head = (owner, round(1000 * ttl_s), round(1000 * tombstone_ttl_s))
        self._now = now
        self._waiting: deque[Write] = deque()
        self._has_work = asyncio.Event()
        self._given = self._settled = 0
        "How many writes were handed over, and how many of them were dealt with."
        self._settling: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._warnings = Seldom(logger)
        self.meters = StoreMeters()
        self._is_closed = False
        self._task = asyncio.ensure_future(self._run())

    def put(self, write: Write) -> None:
        """Hand over a write; returns at once."""
        self._waiting.append(write)
        self._given += 1
        self._has_work.set()

    async def settled(self) -> None:
        """Wait until all that was handed over before is written, or never will be."""
        if self._settled < self._given:
            settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._settling.append((self._given, settled))
            await settled

    async def close(self) -> None:
        """End; what still waits is not written."""
        self._is_closed = True  # A connection that is just being made swallows a cancel.
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while not self._is_closed:
            await self._has_work.wait()
            # One more turn of the loop: what it brings goes in the same round trip.
            await asyncio.sleep(0)
            batch = [self._waiting.popleft() for _ in range(min(BATCH_WRITES, len(self._waiting)))]
            await self._store(batch)
            self._settled += len(batch)
            while self._settling and self._settling[0][0] <= self._settled:
                _, settled = self._settling.popleft()
                asyncio.get_running_loop().call_soon(_settle, settled)
            if not self._waiting:
                self._has_work.clear()

    async def _store(self, batch: list[Write]) -> None:
        """Write a batch, and say of each write how it went."""
        wait_s = RETRY_FIRST_S
        while (batch := _report_given_up(batch)) and not self._is_closed:
            try:
                replies = await self._measured(batch)
            except StoreAwayError as error:
                self._warnings.warn(time.monotonic(), f"{len(batch)} writes wait: {error}")
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * RETRY_GROWTH, RETRY_MAX_S)
            except StoreError as error:
                logger.error("nothing stored of %d writes: %s", len(batch), error)
                _fail(batch, error)
            except Exception as error:
                # The task's boundary: whoever waits must be told, and the next turns be served.
                logger.exception("a fault in the token store")
                _fail(batch, StoreError(f"The token store has a fault ({error!r})."))
            else:
                for write, reply in zip(batch, replies, strict=True):
                    _report(write, _error(write, reply))
                return

    async def _measured(self, batch: list[Write]) -> list[bytes]:
        began_s, is_stored = time.monotonic(), False
        try:
            replies = await self._send(batch)
            is_stored = True
        finally:
            self.meters.on_flush(len(batch), time.monotonic() - began_s, is_stored=is_stored)
        return replies

    async def _send(self, batch: list[Write]) -> list[bytes]:
        owner, ttl_ms, tombstone_ttl_ms = self._head
        keys: list[bytes] = [OPEN_KEY]
        arguments: list[object] = [owner, self._now(), ttl_ms, tombstone_ttl_ms]
        for write in batch:
            names = write.keys
            more = write.continuation
            keys += (names.turn, names.log, names.continuations, names.lease, names.grave)
            arguments += (
                write.what,
                write.record.fence,
                write.sequence,
                write.offset,
                write.data,
                b"" if more is None else b"+" + more,
                names.name,
            )
        replies: list[bytes] = await self._link.run(WRITE, keys, arguments)
        return replies


def _settle(settled: "asyncio.Future[None]") -> None:
    if not settled.done():  # Whoever waited may have been cancelled.
        settled.set_result(None)


def _fail(batch: list[Write], error: StoreError) -> None:
    for write in batch:
        write.record.failure = write.record.failure or error


def _report_given_up(batch: list[Write]) -> list[Write]:
    """Report the writes of turns that have failed meanwhile; return the others."""
    for write in batch:
        if write.record.failure is not None:
            _report(write, write.record.failure)
    return [write for write in batch if write.record.failure is None]


def _error(write: Write, reply: bytes) -> StoreError | None:
    record = write.record
    if reply != b"stored" and record.failure is None:
        name = record.turn_id.hex()
        if reply == b"stale":
            record.failure = StaleOwnerError(STALE.format(name=name))
        else:
            record.failure = StoreError(GAP.format(name=name))
    return record.failure


def _report(write: Write, error: StoreError | None) -> None:
    """Call `done` by itself, so that a fault in one is not the others'."""
    asyncio.get_running_loop().call_soon(write.done, error)
