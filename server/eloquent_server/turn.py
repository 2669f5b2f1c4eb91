"""One turn: its log, who reads it, and what generates it sees of it."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from eloquent.core.events import Delta, Event, Failure
from eloquent.core.log import TokenLog
from eloquent.core.wire import Request
from eloquent.errors import RequestError
from eloquent.serving import Reader
from eloquent_server.admission import Principal
from eloquent_server.logs import TurnClock
from eloquent_server.store_types import TurnRecord

TurnKey = tuple[str, bytes]
"Whose it is, and its id."


class Keeper(Protocol):
    """Whom a turn tells what is generated."""

    def keep(self, turn: "Turn", continuation: bytes | None = None) -> bool:
        """Have stored what the turn's log has more; readers get it then.

        Say whether the turn goes on.
        """

    def decline(self, turn: "Turn", error: RequestError) -> None:
        """Drop a turn to which nothing was appended."""


@dataclass(frozen=True, slots=True)
class StoredPart:
    """What the store has of a turn that was cut off with its server."""

    events: tuple[Event, ...]
    "Empty once the turn is ended, as only going on needs them."
    continuations: tuple[bytes, ...]
    "What was given to `Turn.append` with them, in order."


class Turn:
    """One turn as what generates it sees it: append events, then close.

    The task that generates is cancelled when nobody wants the turn any more.
    """

    def __init__(
        self,
        hub: Keeper,
        request: Request,
        principal: Principal,
        record: TurnRecord,
        *,
        log: TokenLog | None = None,
        stored: StoredPart | None = None,
        is_elsewhere: bool = False,
    ) -> None:
        """`record` is the store's handle; with `log` the turn was begun before, or elsewhere.

        Then `stored` is what there is of it.
        """
        self._hub = hub
        self.record = record
        self.secret_hash, self.body_hash = record.secret_hash, record.body_hash
        self.stored = stored
        "None: the turn began in this process."
        self.log = TokenLog(is_held=True) if log is None else log
        self.is_elsewhere = is_elsewhere
        "Whether another process generates it, or may: here it is only read."
        self.is_cancelled = False
        "Whether its owner wants no more of it."
        self.readers: dict[Reader, None] = {}
        self.late: dict[Reader, asyncio.Task[None]] = {}
        "Those that wait until a turn that is followed has come as far as they are."
        self.task: asyncio.Task[None] | None = None
        self.grace: asyncio.TimerHandle | None = None
        self.handed = self._restored_bytes = self.log.written
        "How many bytes of the log the store was given."
        self._clock = TurnClock()
        self._request = request
        self.principal = principal
        "Whose turn it is."
        self.is_admitted = False
        "Whether `Admission.ended` is to be told of its end."

    @property
    def request(self) -> Request:
        """What the client asked."""
        return self._request

    @property
    def key(self) -> TurnKey:
        """What tells it from all others."""
        return self.principal.name, self._request.turn_id

    @property
    def name(self) -> str:
        """The turn's id, as logs have it."""
        return self._request.turn_id.hex()

    @property
    def is_over(self) -> bool:
        """Whether nothing will be appended any more."""
        return self.log.is_closed

    @property
    def is_waiting_to_go_on(self) -> bool:
        """Whether it was cut off with its server and nothing has come since."""
        return self.stored is not None and self.log.written == self._restored_bytes

    def append(self, event: Delta, continuation: bytes | None = None) -> None:
        """Add an event to the answer; it leaves as soon as it is stored.

        `continuation` is stored with it, for going on after a restart: what that needs beyond what
        was given with earlier events.

        Raises:
            asyncio.CancelledError: it cannot be stored, so nobody wants the turn any more.
        """
        self.log.append(event)
        self._clock.event()
        if not self._hub.keep(self, continuation):
            raise asyncio.CancelledError

    def close(
        self,
        finish_reason: str,
        *,
        model: str,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        usage: bytes = b"",
    ) -> None:
        """End the answer; see `End`."""
        end = self.log.close(
            finish_reason,
            model=model,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=cached_tokens,
            usage=usage,
        )
        self._clock.say_end(self.name, self.principal.name, end)
        self._hub.keep(self)

    def end_early(self, reason: str, failure: Failure | None = None) -> None:
        """End an answer that will not be whole; its counts are not known."""
        if failure is not None:
            self.log.append(failure)
        self.close(reason, model="", prompt_tokens=0, completion_tokens=0)

    def reject(self, error: RequestError) -> None:
        """Decline the turn, before anything was appended; the id may be used again."""
        self._hub.decline(self, error)

    def grow(self, data: bytes) -> None:
        """Add what another process has stored; readers may have it.

        Raises:
            WireError, IntegrityError: it is no part of this turn's log.
        """
        self.log.extend(data)
        self.handed = self.log.written
        self.log.release(self.handed)

    def give_up(self) -> None:
        """Generate no more, and take back what is not stored: it is another process's turn."""
        if self.task is not None:
            self.task.cancel()
        self.log.rewind(self.log.length)
        self.handed = self.log.written
        self.is_elsewhere = True

    def take_over(self, stored: StoredPart) -> None:
        """Be generated here from now on, from what is stored."""
        self.stored = stored
        self._restored_bytes = self.log.written
        self.is_elsewhere = False


TurnHandler = Callable[[Turn], Awaitable[None]]


def hash_of(data: bytes) -> bytes:
    """Return the SHA-256 of a secret or a body, as the store keeps it."""
    return hashlib.sha256(data).digest()
