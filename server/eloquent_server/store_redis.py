"""The token store in Redis, for several gateways: one of them generates a turn, all can read it.

Who generates a turn has a lease on it, and the newest fencing number: Redis takes appends with that
alone. What `on_stored` has confirmed outlives every gateway, and Redis's own end as far as Redis is
set up for that.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

from eloquent_server.lease import LEASE_S, Leases
from eloquent_server.meters import StoreMeters
from eloquent_server.store import MAX_TURN_BYTES, TOMBSTONE_TTL_S, TTL_S
from eloquent_server.store_redis_follow import Follower
from eloquent_server.store_redis_link import RedisLink
from eloquent_server.store_redis_scripts import (
    BEGIN,
    BURY,
    CHECK_KEY,
    CLAIM,
    FENCE_KEY,
    OPEN_KEY,
    READ,
    RELEASE,
    RENEW,
    Keys,
    turn_named,
)
from eloquent_server.store_redis_writer import RedisWriter, Write, WriteKind
from eloquent_server.store_types import (
    OnRecord,
    OnStored,
    StaleOwnerError,
    StoreAwayError,
    StoreClosedError,
    StoredTurn,
    StoreError,
    TurnExistsError,
    TurnRecord,
    TurnState,
)

ASKING = 8
"So many turns are begun or read at once, so that writes and renewals always have a connection."
ASK_S = 5.0
"Who has to wait for longer is told to come back."
SCAN_EVERY_S = 15.0
"How often open turns without an owner are looked for, after the first time."
SCAN_TURNS = 500
"So many of the open turns are looked at by one call."
READ_ENTRIES = 4096
"So much of a turn is read by one call, which takes Redis a few milliseconds."
CLOSE_S = 2.0
"What could not be written in this time after the end was asked for is not."

logger = logging.getLogger(__name__)


def _ignore(_: Any) -> None:
    """Nobody is told."""


class RedisTokenStore:
    """One gateway's part of a token store in Redis; a `TurnStore`."""

    def __init__(
        self,
        link: RedisLink,
        *,
        lease_s: float = LEASE_S,
        ttl_s: float = TTL_S,
        tombstone_ttl_s: float = TOMBSTONE_TTL_S,
        max_turn_bytes: int = MAX_TURN_BYTES,
        owner: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Use `RedisTokenStore.open`."""
        self._link = link
        self._owner = (owner or secrets.token_hex(8)).encode()
        self._ttl_ms, self._tombstone_ttl_ms = round(1000 * ttl_s), round(1000 * tombstone_ttl_s)
        self._lease_ms = round(1000 * lease_s)
        self._max_turn_bytes = max_turn_bytes
        self._now = now
        self._lease_s = lease_s
        self._leases = Leases(lease_s, self._renew, self._on_lease_lost)
        self._writer = RedisWriter(
            link, self._owner, ttl_s=ttl_s, tombstone_ttl_s=tombstone_ttl_s, now=now
        )
        self._follower = Follower(link, self._owner, self._on_cancel_message)
        self._on_lost: OnRecord = _ignore
        self._on_cancel: OnRecord = _ignore
        self._asking = asyncio.Semaphore(ASKING)
        self._is_closed = False

    @classmethod
    async def open(cls, url: str, *, password: str | None = None, **options: Any) -> Self:
        """Connect to a Redis; `options` as those of the class.

        Raises:
            StoreError: it cannot be used; the text says why, and what to do.
        """
        link = RedisLink(url, password)
        try:
            await link.open()
        except BaseException:
            await link.close()
            raise
        return cls(link, **options)

    @property
    def size(self) -> int:
        """Bytes of the turns that this gateway owns: bodies, logs and continuations."""
        return sum(record.size for record in self._leases.held)

    @property
    def turns(self) -> int:
        """How many turns this gateway owns."""
        return len(self._leases.held)

    @property
    def meters(self) -> StoreMeters:
        """How its round trips went."""
        return self._writer.meters

    async def begin(
        self, principal: str, turn_id: bytes, secret_hash: bytes, body: bytes, body_hash: bytes
    ) -> TurnRecord:
        """See `TurnStore.begin`.

        Raises:
            StoreAwayError: Redis does not answer.
            As `TurnStore.begin`.
        """
        await self._settled(principal, turn_id)
        keys, now_s = Keys(principal, turn_id), self._now()
        record = TurnRecord(
            row=0,
            principal=principal,
            turn_id=turn_id,
            secret_hash=secret_hash,
            body_hash=body_hash,
            state=TurnState.OPEN,
            created_s=now_s,
            updated_s=now_s,
        )
        record.check_room(len(body), self._max_turn_bytes)
        record.size = len(body)
        async with self._turn_to_ask():
            asked_s = asyncio.get_running_loop().time()
            record.fence = await self._link.run(
                BEGIN,
                (keys.turn, keys.lease, keys.grave, FENCE_KEY, OPEN_KEY),
                (
                    *(self._owner, self._lease_ms, now_s, self._ttl_ms, self._tombstone_ttl_ms),
                    *(keys.name, secret_hash, body_hash, body),
                ),
            )
        if not record.fence:
            raise TurnExistsError(record)
        self._leases.take(record, asked_s)
        return record

    async def claim(self, principal: str, turn_id: bytes) -> StoredTurn | None:
        """See `TurnStore.claim`.

        Raises:
            StoreAwayError: Redis does not answer.
            StoreError: it cannot be read.
        """
        await self._settled(principal, turn_id)
        keys = Keys(principal, turn_id)
        async with self._turn_to_ask():
            asked_s = asyncio.get_running_loop().time()
            fence = await self._link.run(
                CLAIM,
                (keys.turn, keys.lease, FENCE_KEY, OPEN_KEY),
                (self._owner, self._lease_ms, keys.name),
            )
            stored = await self._load(principal, turn_id, fence)
        if fence and stored is not None and stored.state is TurnState.OPEN:
            self._leases.take(stored.record, asked_s)
        return stored

    async def load(self, principal: str, turn_id: bytes) -> StoredTurn | None:
        """See `TurnStore.load`.

        Raises:
            As `claim`.
        """
        await self._settled(principal, turn_id)
        async with self._turn_to_ask():
            return await self._load(principal, turn_id, 0)

    def append(
        self,
        record: TurnRecord,
        offset: int,
        data: bytes,
        *,
        continuation: bytes | None = None,
        on_stored: OnStored | None = None,
    ) -> None:
        """See `TurnStore.append`.

        Raises:
            StaleOwnerError: this gateway owns the turn no longer.
            TurnEndedError: the turn is ended.
            TurnTooLargeError: there is no room; nothing was added.
            StoreClosedError: the store is closed.
            ValueError: `offset` is not the log's length.
        """
        self._add(record, offset, data, continuation)
        self._write(
            "append", record, on_stored, offset=offset, data=data, continuation=continuation
        )

    def close_turn(
        self,
        record: TurnRecord,
        offset: int,
        data: bytes = b"",
        *,
        on_stored: OnStored | None = None,
    ) -> None:
        """See `TurnStore.close_turn`; its time to live runs from now on.

        Raises:
            As `append`.
        """
        self._add(record, offset, data, None, is_last=True)
        record.state = TurnState.ENDED

        def on_ended(error: StoreError | None) -> None:
            # Owned until it is stored: Redis may be away, and the lease must not end meanwhile.
            self._leases.drop(record)
            if on_stored is not None:
                on_stored(error)

        self._write("end", record, on_ended, offset=offset, data=data)

    def let_go(self, record: TurnRecord) -> None:
        """See `TurnStore.let_go`."""
        if record.failure is None and self._leases.of(*record.key) is record:
            # Owned until then, so that a claim of the same turn waits for it.
            self._write("release", record, lambda _: self._drop(record))
        else:
            self._drop(record)

    def abandon(self, record: TurnRecord) -> None:
        """See `TurnStore.abandon`."""
        self._leases.drop(record)

    async def delete(self, principal: str, turn_id: bytes) -> bool:
        """See `TurnStore.delete`.

        Raises:
            As `claim`.
        """
        await self._settled(principal, turn_id)
        keys = Keys(principal, turn_id)
        owned = self._leases.of(principal, turn_id)
        async with self._turn_to_ask():
            found = await self._link.run(
                BURY,
                (keys.turn, keys.log, keys.continuations, keys.lease, keys.grave, OPEN_KEY),
                (self._tombstone_ttl_ms, keys.name),
            )
        if owned is not None:
            self._leases.drop(owned)
            owned.state = TurnState.TOMBSTONE
        return bool(found)

    def attend(self, on_lost: OnRecord, on_cancel: OnRecord) -> None:
        """See `TurnStore.attend`."""
        self._on_lost, self._on_cancel = on_lost, on_cancel

    async def abandoned(self) -> AsyncGenerator[tuple[str, bytes]]:
        """See `TurnStore.abandoned`; goes on looking until it is closed."""
        wait_s = self._lease_s  # then those of a gateway that was killed just now are free
        while True:
            try:
                first = 0
                while names := await self._open_turns(first):
                    for name in await self._without_owner(names):
                        yield turn_named(name)
                    first += len(names)
            except StoreError as error:
                logger.warning("no look for turns without an owner: %s", error)
            await asyncio.sleep(wait_s)
            wait_s = max(SCAN_EVERY_S, self._lease_s)

    async def follow(self, record: TurnRecord) -> AsyncGenerator[bytes]:
        """See `TurnStore.follow`.

        Raises:
            StoreError: Redis is away.
        """
        following = self._follower.follow(Keys(*record.key), record.chunks)
        try:
            async for data in following:
                yield data
        finally:
            await following.aclose()

    async def cancel_elsewhere(self, record: TurnRecord) -> None:
        """See `TurnStore.cancel_elsewhere`.

        Raises:
            As `claim`.
        """
        await self._follower.cancel(Keys(*record.key))

    async def is_read_elsewhere(self, record: TurnRecord) -> bool:
        """See `TurnStore.is_read_elsewhere`.

        Raises:
            As `claim`.
        """
        return bool(await self._link.command("EXISTS", Keys(*record.key).read))

    async def check(self) -> None:
        """See `TurnStore.check`.

        Raises:
            StoreFullError: Redis has reached its `maxmemory`.
            As `claim`.
        """
        self._check_open()
        async with self._turn_to_ask():
            await self._link.command("SET", CHECK_KEY, b"", "PX", self._lease_ms)

    def expire(self) -> None:
        """Do nothing: Redis itself lets go of turns whose time to live is over."""

    async def close(self) -> None:
        """See `TurnStore.close`; open turns are free at once for another gateway."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._writer.settled()
                leases = [Keys(*record.key).lease for record in self._leases.held]
                if leases:
                    await self._link.run(RELEASE, leases, (self._owner,))
        except (TimeoutError, StoreError) as error:
            logger.warning("the store was closed before all was written: %s", error or "no answer")
        await self._leases.close()
        await self._follower.close()
        await self._writer.close()
        await self._link.close()

    async def _load(self, principal: str, turn_id: bytes, fence: int) -> StoredTurn | None:
        keys = Keys(principal, turn_id)
        fields, more = await self._link.commands(
            ("HGETALL", keys.turn), ("LLEN", keys.continuations), is_transaction=True
        )
        if not fields:
            return None
        # Both only grow, so that what is there by now can be read bit by bit.
        log = await self._log(keys, int(fields[b"chunks"]))
        continuations = await self._continuations(keys, more)
        if len(log) != int(fields[b"length"]):
            if not await self._link.command("EXISTS", keys.turn):
                return None  # It was deleted meanwhile.
            raise StoreError(
                f"{self._link.name} has turn {turn_id.hex()} without a part of its log. Was its "
                "memory full, with a policy that evicts? The token store needs `noeviction`."
            )
        is_open = fields[b"state"] == b"open"
        record = TurnRecord(
            row=0,
            principal=principal,
            turn_id=turn_id,
            secret_hash=fields[b"secret"],
            body_hash=fields[b"body_hash"],
            state=TurnState.OPEN if is_open else TurnState.ENDED,
            created_s=float(fields[b"created"]),
            updated_s=float(fields[b"updated"]),
            length=len(log),
            size=int(fields[b"size"]),
            chunks=int(fields[b"chunks"]),
            fence=fence,
        )
        return StoredTurn(
            record,
            record.state,
            log,
            fields.get(b"body", b""),
            tuple(continuations) if is_open else (),
            is_elsewhere=is_open and not fence,
        )

    async def _log(self, keys: Keys, chunks: int) -> bytes:
        log = bytearray()
        for first in range(1, chunks + 1, READ_ENTRIES):
            last = min(first + READ_ENTRIES - 1, chunks)
            log += await self._link.run(READ, (keys.log,), (b"%d-0" % first, b"%d-0" % last))
        return bytes(log)

    async def _continuations(self, keys: Keys, count: int) -> list[bytes]:
        found: list[bytes] = []
        for first in range(0, count, READ_ENTRIES):
            last = min(first + READ_ENTRIES, count) - 1
            found += await self._link.command("LRANGE", keys.continuations, first, last)
        return found

    def _add(
        self,
        record: TurnRecord,
        offset: int,
        data: bytes,
        continuation: bytes | None,
        *,
        is_last: bool = False,
    ) -> None:
        """Check that this can be added to a turn, and count it.

        What all turns may take together is Redis's `maxmemory`.
        """
        self._check_open()
        record.check_next(offset)
        count = len(data) + len(continuation or b"")
        if not is_last:
            record.check_room(count, self._max_turn_bytes)
        record.size += count
        record.grow(len(data), self._now())

    def _write(
        self,
        what: WriteKind,
        record: TurnRecord,
        done: OnStored | None,
        *,
        offset: int = 0,
        data: bytes = b"",
        continuation: bytes | None = None,
    ) -> None:
        def on_written(error: StoreError | None) -> None:
            if isinstance(error, StaleOwnerError):
                self._leases.lose(record)
            if done is not None:
                done(error)

        keys = Keys(*record.key)
        self._writer.put(
            Write(what, record, keys, record.chunks, offset, data, continuation, on_written)
        )

    async def _renew(self, records: Sequence[TurnRecord]) -> list[bool]:
        keys: list[bytes] = []
        for record in records:
            names = Keys(*record.key)
            keys += (names.lease, names.turn, names.log, names.continuations)
        replies = await self._link.run(RENEW, keys, (self._owner, self._lease_ms, self._ttl_ms))
        return [bool(reply) for reply in replies]

    def _on_lease_lost(self, record: TurnRecord) -> None:
        record.failure = record.failure or StaleOwnerError(
            f"The lease on turn {record.turn_id.hex()} has ended, so it may be another gateway's: "
            "nothing is added to it from here."
        )
        self._on_lost(record)

    async def _open_turns(self, first: int) -> list[bytes]:
        last = first + SCAN_TURNS - 1
        names: list[bytes] = await self._link.command("ZRANGE", OPEN_KEY, first, last)
        return names

    async def _without_owner(self, names: list[bytes]) -> list[bytes]:
        leases = [Keys(*turn_named(name)).lease for name in names]
        owners = await self._link.command("MGET", *leases)
        return [name for name, owner in zip(names, owners, strict=True) if owner is None]

    def _on_cancel_message(self, name: bytes) -> None:
        record = self._leases.of(*turn_named(name))
        if record is not None:
            self._on_cancel(record)

    @asynccontextmanager
    async def _turn_to_ask(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(ASK_S):
                await self._asking.acquire()
        except TimeoutError as error:
            raise StoreAwayError(
                f"{self._link.name} is asked for more turns at once than it answers for."
            ) from error
        try:
            yield
        finally:
            self._asking.release()

    def _drop(self, record: TurnRecord) -> None:
        self._leases.drop(record)

    async def _settled(self, principal: str, turn_id: bytes) -> None:
        """Wait until what was handed over of a turn is written, so that what is read has it."""
        self._check_open()
        if self._leases.of(principal, turn_id) is not None:
            await self._writer.settled()

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosedError("The token store is closed: the server is shutting down.")
