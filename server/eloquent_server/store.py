"""The token store: turns and their logs, stored before they are sent.

A turn is created, appended to, ended, and read again, also after the process was killed. The
event loop never waits for the disk: a thread writes, and commits what has gathered in one
transaction. What `on_stored` has confirmed outlives the process; with `durable`, loss of power too.
"""

import asyncio
import heapq
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from eloquent.core.wire import TURN_ID_BYTES
from eloquent_server.meters import StoreMeters
from eloquent_server.store_sqlite import StoreDatabase
from eloquent_server.store_types import (
    OnStored,
    SoleOwner,
    StoreClosedError,
    StoredTurn,
    StoreError,
    StoreFullError,
    StoreLockedError,
    TurnEndedError,
    TurnExistsError,
    TurnRecord,
    TurnState,
    TurnTooLargeError,
)
from eloquent_server.store_writer import Read, Write, Writer

__all__ = [
    "MAX_BYTES",
    "MAX_TURN_BYTES",
    "TOMBSTONE_TTL_S",
    "TTL_S",
    "OnStored",
    "StoreClosedError",
    "StoreError",
    "StoreFullError",
    "StoreLockedError",
    "StoredTurn",
    "TokenStore",
    "TurnEndedError",
    "TurnExistsError",
    "TurnRecord",
    "TurnState",
    "TurnTooLargeError",
]

TTL_S = 24 * 3600.0
"How long an ended turn is kept for its readers."
TOMBSTONE_TTL_S = 8 * 24 * 3600.0
"""How long an expired turn's id is remembered after that. A 0-RTT request can be replayed as long
as its ticket is good, which is 7 days at most (RFC 8446 section 4.6.1)."""
MAX_TURN_BYTES = 16 << 20
MAX_BYTES = 4 << 30
HASH_BYTES = 32
"SHA-256."

logger = logging.getLogger(__name__)


class TokenStore(SoleOwner):
    """One store file, or a private one in memory and temporary files; a `TurnStore`.

    All methods but `open` are called on an event loop, and `on_stored` is called on the same one.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        ttl_s: float,
        tombstone_ttl_s: float,
        max_turn_bytes: int,
        max_bytes: int,
        now: Callable[[], float],
    ) -> None:
        """Use `TokenStore.open`."""
        self._writer = writer
        self._ttl_s = ttl_s
        self._tombstone_ttl_s = tombstone_ttl_s
        self._max_turn_bytes = max_turn_bytes
        self._max_bytes = max_bytes
        self._now = now
        self._is_closed = False
        self._records = {record.key: record for record in writer.records}
        self._size = sum(record.size for record in writer.records)
        self._next_row = 1 + max((record.row for record in writer.records), default=0)
        # When a record is to be looked at again: (time, row, record). The row breaks ties.
        self._due: list[tuple[float, int, TurnRecord]] = []
        for record in writer.records:
            self._schedule(record)

    @classmethod
    def open(
        cls,
        path: Path | None,
        *,
        ttl_s: float = TTL_S,
        tombstone_ttl_s: float = TOMBSTONE_TTL_S,
        max_turn_bytes: int = MAX_TURN_BYTES,
        max_bytes: int = MAX_BYTES,
        durable: bool = False,
        now: Callable[[], float] = time.time,
    ) -> "TokenStore":
        """Open a store, made if it is not there; None is a private one that ends with the process.

        Blocks while the file is read: call it before serving. `durable` waits for the disk at each
        commit. `now` is the wall clock, seconds since the epoch.

        Raises:
            StoreLockedError: another process has it open.
            StoreError: it cannot be used; the text says why, and what to do.
        """
        return cls(
            Writer(path, durable=durable),
            ttl_s=ttl_s,
            tombstone_ttl_s=tombstone_ttl_s,
            max_turn_bytes=max_turn_bytes,
            max_bytes=max_bytes,
            now=now,
        )

    @property
    def size(self) -> int:
        """Bytes that count against `max_bytes`: bodies, logs and continuations."""
        return self._size

    @property
    def turns(self) -> int:
        """How many turns it knows, tombstones included."""
        return len(self._records)

    @property
    def meters(self) -> StoreMeters:
        """How its commits went."""
        return self._writer.meters

    def create(
        self, principal: str, turn_id: bytes, secret_hash: bytes, body: bytes, body_hash: bytes
    ) -> TurnRecord:
        """Begin a turn; it is on its way to the file when this returns.

        Should that fail, the first `append` reports it, and the id is free again.

        Raises:
            TurnExistsError: there is such a turn, or its tombstone.
            TurnTooLargeError, StoreFullError: there is no room for the body.
            StoreClosedError: the store is closed.
            ValueError: the id has not 16 bytes, or a hash not 32.
        """
        if len(turn_id) != TURN_ID_BYTES or {len(secret_hash), len(body_hash)} != {HASH_BYTES}:
            raise ValueError("a turn id has 16 bytes, and a SHA-256 hash 32")
        existing = self.find(principal, turn_id)
        if existing is not None:
            raise TurnExistsError(existing)
        now = self._now()
        record = TurnRecord(
            row=self._next_row,
            principal=principal,
            turn_id=turn_id,
            secret_hash=secret_hash,
            body_hash=body_hash,
            state=TurnState.OPEN,
            created_s=now,
            updated_s=now,
        )
        self._claim(record, len(body))
        self._next_row += 1
        self._records[record.key] = record
        self._write(
            lambda database: database.create(record, body),
            record,
            partial(self._on_created, record),
        )
        return record

    def append(
        self,
        record: TurnRecord,
        offset: int,
        data: bytes,
        *,
        continuation: bytes | None = None,
        on_stored: OnStored | None = None,
    ) -> None:
        """Add bytes to a turn's log, and to what going on with it after a restart needs.

        Returns at once. Both are committed together, in the order of the calls, and then
        `on_stored` is called. Continuations are kept side by side, not put in each other's place:
        give what is new (token ids, the generator's position), so that the cost stays linear.

        Raises:
            TurnEndedError: the turn is ended or deleted.
            TurnTooLargeError, StoreFullError: there is no room; nothing was added.
            StoreError: an earlier append could not be stored, so this cannot follow it.
            StoreClosedError: the store is closed.
            ValueError: `offset` is not the log's length.
        """
        self._add(record, offset, data, continuation)
        sequence, now = record.chunks, record.updated_s
        self._write(
            lambda database: database.append(
                record.row, sequence, offset, stored_s=now, data=data, continuation=continuation
            ),
            record,
            on_stored,
        )

    def close_turn(
        self,
        record: TurnRecord,
        offset: int,
        data: bytes = b"",
        *,
        on_stored: OnStored | None = None,
    ) -> None:
        """End a turn, with the last bytes of its log: both are committed, or neither.

        From now on its time to live runs, and its body and continuations are gone. There is always
        room for this.

        Raises:
            As `append`.
        """
        self._add(record, offset, data, None, is_last=True)
        record.state = TurnState.ENDED
        sequence, now, length = record.chunks, record.updated_s, record.length

        def end(database: StoreDatabase) -> None:
            database.append(
                record.row, sequence, offset, stored_s=now, data=data, continuation=None
            )
            database.end(record.row, length, length, now)

        self._release(record, record.size - length)
        self._schedule(record)
        self._write(end, record, on_stored)

    def find(self, principal: str, turn_id: bytes) -> TurnRecord | None:
        """Return what is known of a turn without reading the file, tombstones included."""
        self.expire()
        return self._records.get((principal, turn_id))

    async def load(self, principal: str, turn_id: bytes) -> StoredTurn | None:
        """Read a turn with all that was appended before this call; None if there is none.

        A tombstone holds nothing to read: `find` tells it from a turn that never was.

        Raises:
            StoreError: the file cannot be read, or the turn could not be stored.
            StoreClosedError: the store is closed.
        """
        record = self.find(principal, turn_id)
        if record is None or record.state is TurnState.TOMBSTONE:
            return None
        found = await self._read(lambda database: database.load(record.row))
        if found is None:
            if record.failure is not None:
                raise StoreError(str(record.failure))
            return None
        return StoredTurn(record, *found)

    async def begin(
        self, principal: str, turn_id: bytes, secret_hash: bytes, body: bytes, body_hash: bytes
    ) -> TurnRecord:
        """See `TurnStore.begin`; does not wait.

        Raises:
            As `create`.
        """
        return self.create(principal, turn_id, secret_hash, body, body_hash)

    async def claim(self, principal: str, turn_id: bytes) -> StoredTurn | None:
        """See `TurnStore.claim`; does not wait to say that there is none.

        Raises:
            As `load`.
        """
        return await self.load(principal, turn_id)

    def let_go(self, record: TurnRecord) -> None:
        """See `TurnStore.let_go`."""
        if record.state is TurnState.OPEN and not record.chunks and not self._is_closed:
            self._forget(record)

    async def delete(self, principal: str, turn_id: bytes) -> bool:
        """Remove a turn, open or ended, and leave its tombstone; say whether there was one.

        When this returns, its text is overwritten in the file; the write-ahead log can hold it
        until its place there is used again or the store is closed.

        Raises:
            StoreError: it could not be removed; ask again.
            StoreClosedError: the store is closed.
        """
        record = self.find(principal, turn_id)
        if record is None:
            return False
        loop = asyncio.get_running_loop()
        removed: asyncio.Future[StoreError | None] = loop.create_future()
        before = replace(record)
        self._entomb(record, lambda error: self._on_entombed(record, before, removed, error))
        error = await removed
        if error is not None:
            raise error
        return True

    async def check(self) -> None:
        """See `TurnStore.check`.

        Raises:
            StoreFullError: all that may be held is.
            StoreError: the file takes nothing.
            StoreClosedError: the store is closed.
        """
        self._check_open()
        self._check_room(1)
        written: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
        self._write(StoreDatabase.try_room, None, partial(_settle, written))
        error = await written
        if error is not None:
            raise error

    def unfinished(self) -> list[TurnRecord]:
        """Return the turns that are open: after a start, those to go on with, oldest first."""
        turns = [record for record in self._records.values() if record.state is TurnState.OPEN]
        return sorted(turns, key=lambda record: record.row)

    async def abandoned(self) -> AsyncGenerator[tuple[str, bytes]]:
        """See `TurnStore.abandoned`: those of `unfinished`."""
        for record in self.unfinished():
            yield record.key

    def expire(self) -> None:
        """Turn ended turns whose time is over into tombstones, and remove old tombstones.

        `create`, `find`, `load` and `delete` do this first, so they never see an expired turn. Call
        it now and then as well, so that an idle server's file does not keep text.
        """
        if self._is_closed:
            return
        now = self._now()
        while self._due and self._due[0][0] <= now:
            _, _, record = heapq.heappop(self._due)
            if self._due_s(record) > now or self._records.get(record.key) is not record:
                continue
            if record.state is TurnState.ENDED:
                self._entomb(record, None)
            else:
                self._forget(record)

    async def close(self) -> None:
        """Store what was handed over, then release the file; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            await self._writer.close()

    def _add(
        self,
        record: TurnRecord,
        offset: int,
        data: bytes,
        continuation: bytes | None,
        *,
        is_last: bool = False,
    ) -> None:
        """Check that this can be added to a turn, and count it."""
        record.check_next(offset)
        self._claim(record, len(data) + len(continuation or b""), is_last=is_last)
        record.grow(len(data), self._now())

    def _claim(self, record: TurnRecord, count: int, *, is_last: bool = False) -> None:
        """Count bytes against the limits, to which a turn's last ones are not held."""
        self._check_open()
        if not is_last:
            record.check_room(count, self._max_turn_bytes)
            self._check_room(count)
        record.size += count
        self._size += count

    def _check_room(self, count: int) -> None:
        if self._size + count > self._max_bytes:
            raise StoreFullError(
                f"The token store holds {self._size} bytes and may hold {self._max_bytes}. Old "
                "turns make room as they expire: wait, raise the limit, or shorten their time."
            )

    def _release(self, record: TurnRecord, count: int) -> None:
        record.size -= count
        self._size -= count

    def _due_s(self, record: TurnRecord) -> float:
        """When something is to be done with the record; never with an open one."""
        if record.state is TurnState.ENDED:
            return record.updated_s + self._ttl_s
        if record.state is TurnState.TOMBSTONE:
            return record.updated_s + self._tombstone_ttl_s
        return float("inf")

    def _schedule(self, record: TurnRecord) -> None:
        if record.state is not TurnState.OPEN:
            heapq.heappush(self._due, (self._due_s(record), record.row, record))

    def _entomb(self, record: TurnRecord, done: OnStored | None) -> None:
        self._check_open()
        self._release(record, record.size)
        record.state = TurnState.TOMBSTONE
        record.secret_hash = record.body_hash = b""
        record.length = 0
        record.updated_s = now = self._now()
        self._schedule(record)
        self._write(lambda database: database.entomb(record.row, now), None, done)

    def _on_entombed(
        self,
        record: TurnRecord,
        before: TurnRecord,
        removed: "asyncio.Future[StoreError | None]",
        error: StoreError | None,
    ) -> None:
        """Take a turn that is still in the file back, so that its deletion can be asked again."""
        if error is not None and self._records.get(record.key) is record:
            record.state, record.updated_s = before.state, before.updated_s
            record.secret_hash, record.body_hash = before.secret_hash, before.body_hash
            record.length = before.length
            self._release(record, record.size - before.size)
            self._schedule(record)
        _settle(removed, error)

    def _forget(self, record: TurnRecord) -> None:
        """Remove a turn and its id."""
        if self._records.get(record.key) is record:
            del self._records[record.key]
            self._release(record, record.size)
            self._writer.put(Write(partial(StoreDatabase.forget, row=record.row)))

    def _on_created(self, record: TurnRecord, error: StoreError | None) -> None:
        """Free the id of a turn that is not in the file."""
        if error is not None and self._records.get(record.key) is record:
            del self._records[record.key]
            self._release(record, record.size)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosedError("The token store is closed: the server is shutting down.")

    def _write(
        self,
        action: Callable[[StoreDatabase], None],
        turn: TurnRecord | None,
        done: OnStored | None,
    ) -> None:
        loop = None if done is None else asyncio.get_running_loop()
        self._writer.put(Write(action, turn, loop, done))

    async def _read(self, action: Callable[[StoreDatabase], Any]) -> Any:
        self._check_open()
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Any] = loop.create_future()
        self._writer.put(Read(action, loop, partial(_settle, found)))
        result = await found
        if isinstance(result, StoreError):
            raise result
        return result


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    if not future.done():  # Whoever waited may have been cancelled.
        future.set_result(result)
