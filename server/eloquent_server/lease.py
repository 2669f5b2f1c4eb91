"""Leases: which turns this process owns, and until when it may believe so.

A lease is a key in the store that only its owner renews and that the store drops when nobody does.
The owner goes by its own monotonic clock, from before it asked: so its lease is over for it before
it can be another's, whatever became of the answer. A clock that stood still (a process that was
stopped) does not matter either: each lease has a *fencing number*, and the store takes nothing from
a number that is not the turn's newest.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from eloquent.seldom import Seldom
from eloquent_server.store_types import OnRecord, StoreError, TurnRecord

LEASE_S = 5.0
"How long a turn of a dead owner waits for the next one."
RENEWALS = 3
"So many times in a lease's length it is renewed."
RETRIES = 12
"As often, where that failed."
SHARE = 0.9
"An owner gives up after this share of the length: its clock may be slower than the store's."
RENEW_TURNS = 250
"So many leases are renewed by one call."

Renew = Callable[[Sequence[TurnRecord]], Awaitable[Sequence[bool]]]
"Lengthens leases in the store, and says of each whether it was still this process's."

logger = logging.getLogger(__name__)


class Leases:
    """The turns that this process owns, renewed until they are dropped or lost."""

    def __init__(self, length_s: float, renew: Renew, on_lost: OnRecord) -> None:
        """`on_lost` is called for each lease that could not be renewed, as soon as it is over."""
        self._length_s = length_s
        self._renew = renew
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._of_key: dict[tuple[str, bytes], TurnRecord] = {}
        self._until_s: dict[TurnRecord, float] = {}
        self._warnings = Seldom(logger)
        self._alarm: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._task = asyncio.ensure_future(self._run())

    @property
    def held(self) -> list[TurnRecord]:
        """The turns that are owned."""
        return list(self._until_s)

    def of(self, principal: str, turn_id: bytes) -> TurnRecord | None:
        """Return the record of a turn that is owned."""
        return self._of_key.get((principal, turn_id))

    def take(self, record: TurnRecord, asked_s: float) -> None:
        """Begin a lease that was granted, and asked for at `asked_s` by the loop's clock."""
        previous = self._of_key.get(record.key)
        if previous is not None:
            self.lose(previous)
        self._of_key[record.key] = record
        self._lengthen(record, asked_s)
        self._set_alarm()

    def drop(self, record: TurnRecord) -> bool:
        """End a lease; say whether there was one."""
        if self._until_s.pop(record, None) is None:
            return False
        del self._of_key[record.key]
        return True

    def lose(self, record: TurnRecord) -> None:
        """End a lease that is another's by now, and say so, once."""
        if self.drop(record):
            self._on_lost(record)

    async def close(self) -> None:
        """Renew nothing any more."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._is_closed = True  # A call that is under way may swallow a cancel.
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        wait_s = self._length_s / RENEWALS
        while not self._is_closed:
            await asyncio.sleep(wait_s)
            held, wait_s = self.held, self._length_s / RENEWALS
            for first in range(0, len(held), RENEW_TURNS):
                if not await self._renew_some(held[first : first + RENEW_TURNS]):
                    wait_s = self._length_s / RETRIES

    async def _renew_some(self, records: list[TurnRecord]) -> bool:
        """Renew leases; say whether the store answered."""
        asked_s = self._loop.time()
        try:
            answers = await self._renew(records)
        except StoreError as error:
            self._warnings.warn(asked_s, f"{len(records)} leases were not renewed: {error}")
            return False
        for record, is_renewed in zip(records, answers, strict=True):
            if record not in self._until_s:
                continue
            if is_renewed:
                self._lengthen(record, asked_s)
            else:
                self.lose(record)
        return True

    def _lengthen(self, record: TurnRecord, asked_s: float) -> None:
        self._until_s[record] = asked_s + SHARE * self._length_s

    def _set_alarm(self) -> None:
        if self._alarm is None and self._until_s:
            # All are as long, so none that is taken later is over much earlier.
            self._alarm = self._loop.call_at(min(self._until_s.values()), self._give_up)

    def _give_up(self) -> None:
        """Lose the leases whose time is over."""
        self._alarm = None
        now_s = self._loop.time()
        for record in [each for each, until_s in self._until_s.items() if until_s <= now_s]:
            self.lose(record)
        self._set_alarm()
