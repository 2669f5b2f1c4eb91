"""What other gateways write to Redis: turns that are followed here, and messages to this one."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from eloquent_server.store_redis_link import RedisLink
from eloquent_server.store_redis_scripts import Keys, inbox
from eloquent_server.store_types import StoreAwayError, StoreError

BLOCK_MS = 1000
"How long Redis waits for news before it answers that there are none."
LOOK_EVERY_S = 1.0
"How often it is asked whether the followed turns have owners."
READ_TTL_MS = 10_000
"For so long a turn counts as read elsewhere after its follower last said so."
MESSAGES = 1000
"About so many messages an inbox holds."
INBOX_TTL_MS = 60_000
RETRY_S = 0.5
FETCH_ENTRIES = 256
"Of each stream in one answer."

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Followed:
    keys: Keys
    newest: bytes
    "The id of the last entry that was read."
    news: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    "None: it has no owner any more, or it is not known."


class Follower:
    """Reads streams with one blocking call for all, which takes a connection of its own."""

    def __init__(self, link: RedisLink, owner: bytes, on_cancel: Callable[[bytes], None]) -> None:
        """`on_cancel` is called with the name of a turn whose generation is to stop."""
        self._link = link
        self._inbox = inbox(owner)
        self._on_cancel = on_cancel
        self._newest_message = b"0-0"
        self._followed: dict[bytes, _Followed] = {}
        self._is_closed = False
        self._task = asyncio.ensure_future(self._run())

    async def follow(self, keys: Keys, chunks: int) -> AsyncGenerator[bytes]:
        """Yield what is appended to a turn after its first `chunks` appends, until its owner goes.

        Raises:
            StoreError: Redis is away.
        """
        followed = self._followed[keys.log] = _Followed(keys, b"%d-0" % chunks)
        try:
            await self._send(self._inbox, b"look", b"")  # ends the blocking call
            while (data := await followed.news.get()) is not None:
                yield data
        finally:
            if self._followed.get(keys.log) is followed:
                del self._followed[keys.log]

    async def cancel(self, keys: Keys) -> None:
        """Have a turn's owner stop its generation.

        Raises:
            StoreError: Redis is away, or refuses.
        """
        owner = await self._link.command("GET", keys.lease)
        if owner is not None:
            await self._send(inbox(owner), b"cancel", keys.name)

    async def close(self) -> None:
        """End; who follows a turn is told that it has no owner."""
        self._is_closed = True  # A connection that is just being made swallows a cancel.
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._end_all()

    async def _send(self, to: bytes, what: bytes, name: bytes) -> None:
        await self._link.commands(
            ("XADD", to, "MAXLEN", "~", MESSAGES, "*", "what", what, "name", name),
            ("PEXPIRE", to, INBOX_TTL_MS),
        )

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        look_at_s = loop.time()
        while not self._is_closed:
            try:
                await self._read()
                if self._followed and loop.time() >= look_at_s:
                    look_at_s = loop.time() + LOOK_EVERY_S
                    await self._look_for_owners()
            except StoreAwayError:
                self._end_all()
                await asyncio.sleep(RETRY_S)
            except StoreError as error:
                logger.error("turns of other gateways cannot be followed: %s", error)
                self._end_all()
                await asyncio.sleep(RETRY_S)

    async def _read(self) -> None:
        """Wait for news, and hand them out."""
        followed = dict(self._followed)
        names = [self._inbox, *followed]
        newest = [self._newest_message, *(each.newest for each in followed.values())]
        reply = await self._link.command(
            "XREAD", "COUNT", FETCH_ENTRIES, "BLOCK", BLOCK_MS, "STREAMS", *names, *newest
        )
        for name, entries in reply or ():
            if name == self._inbox:
                self._take_messages(entries)
            else:
                each = followed[name]
                each.newest = entries[-1][0]
                each.news.put_nowait(b"".join(fields[b"d"] for _, fields in entries))

    def _take_messages(self, entries: list[tuple[bytes, Any]]) -> None:
        for number, fields in entries:
            self._newest_message = number
            if fields[b"what"] == b"cancel":
                self._on_cancel(fields[b"name"])

    async def _look_for_owners(self) -> None:
        """End the following of turns that nobody owns; say of the others that they are read."""
        followed = list(self._followed.values())
        owners, *_ = await self._link.commands(
            ("MGET", *(each.keys.lease for each in followed)),
            *(("SET", each.keys.read, b"", "PX", READ_TTL_MS) for each in followed),
        )
        for each, owner in zip(followed, owners, strict=True):
            if owner is None:
                each.news.put_nowait(None)

    def _end_all(self) -> None:
        for each in self._followed.values():
            each.news.put_nowait(None)
