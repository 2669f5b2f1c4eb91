"""Turns that are not in memory: looked up in the store, or made, while their readers wait."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from eloquent.core.wire import Request
from eloquent.errors import EloquentError, RequestError
from eloquent.serving import Reader
from eloquent_server.admission import Admission, Principal
from eloquent_server.restoring import is_lost, restored
from eloquent_server.store_types import (
    StoreAwayError,
    StoreError,
    StoreFullError,
    TurnExistsError,
    TurnRecord,
    TurnStore,
)
from eloquent_server.turn import Keeper, StoredPart, Turn, TurnKey, hash_of

UNKNOWN_TURN = (
    "There is no such turn, or it is kept no longer, or the secret is not its: ask it anew, "
    "under a new turn id."
)
NOT_STORED = (
    "The server has no place to keep the answer, so it does not go on; its log has the reason. "
    "Tell whoever runs it, and ask again later."
)
AWAY = (
    "The server does not reach its token store at the moment; its log has the reason. Ask again in "
    "a moment."
)
AWAY_RETRY_S = 2.0
"When to ask again."
UNREADABLE = "The server cannot read what it kept of the turn; its log has the reason. Ask it anew."

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Opening:
    """A turn that is looked up, and who waits for it."""

    readers: dict[Reader, None] = field(default_factory=dict)
    asked: tuple[Request, Principal] | None = None
    "With what it can begin if there is none."
    cancels: set[bytes] = field(default_factory=set)
    "The secrets of those who want it cancelled; nobody has looked yet whether they are right."


class Openings:
    """All that are under way."""

    def __init__(
        self,
        keeper: Keeper,
        store: TurnStore,
        admission: Admission,
        on_open: Callable[[Turn, Opening], None],
    ) -> None:
        """`on_open` is called with a turn that was found or made, and who waits for it."""
        self._keeper = keeper
        self._store = store
        self._admission = admission
        self._on_open = on_open
        self._of_key: dict[TurnKey, Opening] = {}

    def add(self, key: TurnKey, reader: Reader | None, principal: Principal) -> bool:
        """Have a reader wait for a turn; say whether `open` is to be called for it."""
        is_new = key not in self._of_key
        opening = self._of_key.setdefault(key, Opening())
        if reader is not None:
            opening.readers[reader] = None
            if opening.asked is None and reader.request.body and not reader.request.offset:
                opening.asked = reader.request, principal
        return is_new

    def cancel(self, reader: Reader) -> None:
        """Have the turn that a reader waits for cancelled as soon as it is there."""
        for opening in self._of_key.values():
            if reader in opening.readers:
                opening.cancels.add(reader.request.secret)

    def remove(self, reader: Reader) -> None:
        """A reader waits no longer; its turn is opened all the same."""
        for opening in self._of_key.values():
            opening.readers.pop(reader, None)

    async def open(self, key: TurnKey) -> None:
        """Find or make a turn; those who wait for it get it, or the reason why not."""
        opening = self._of_key[key]
        try:
            turn = await self._find(key) or await self._begin(key, opening)
        except RequestError as error:
            self._refuse(key, error)
        except StoreAwayError as error:
            logger.warning("turn %s: %s", key[1].hex(), error)
            self._refuse(key, RequestError("overloaded", AWAY, AWAY_RETRY_S))
        except StoreFullError as error:
            logger.error("turn %s cannot go on: %s", key[1].hex(), error)
            self._refuse(key, RequestError("not_stored", NOT_STORED))
        except EloquentError as error:
            logger.error("turn %s cannot be brought back: %s", key[1].hex(), error)
            self._refuse(key, RequestError("internal_error", UNREADABLE))
        else:
            self._on_open(turn, self._of_key.pop(key))

    def _refuse(self, key: TurnKey, error: RequestError) -> None:
        for reader in self._of_key.pop(key).readers:
            reader.reject(error.code, error.message, error.retry_after_s)

    async def _find(self, key: TurnKey) -> Turn | None:
        """Return the turn that the store has; an open one is this process's if nobody has it."""
        while (stored := await self._store.claim(*key)) is not None:
            log, events = await restored(self._store, stored)
            if not is_lost(stored.record):
                return Turn(
                    self._keeper,
                    Request(key[1], stored.body),
                    self._admission.named(key[0]),
                    stored.record,
                    log=log,
                    stored=StoredPart(tuple(events), stored.continuations),
                    is_elsewhere=stored.is_elsewhere,
                )
        return None

    async def _begin(self, key: TurnKey, opening: Opening) -> Turn:
        """Make a turn that the store does not have.

        Raises:
            RequestError: nobody has asked for a new one, or it is not to be had.
            EloquentError: the store is away, or failed.
        """
        if opening.asked is None:
            raise RequestError("unknown_turn", UNKNOWN_TURN)
        request, principal = opening.asked
        self._admission.admit(principal, len(request.body))
        try:
            record = await self._made(key, request)
            if record is not None:
                turn = Turn(self._keeper, request, principal, record)
                turn.is_admitted = True
                return turn
        except BaseException:
            self._admission.ended(principal, 0)
            raise
        self._admission.ended(principal, 0)
        found = await self._find(key)
        if found is None:
            raise RequestError("unknown_turn", UNKNOWN_TURN)
        return found

    async def _made(self, key: TurnKey, request: Request) -> TurnRecord | None:
        """Store a new turn; None: the id is used up, or another gateway was a moment faster."""
        hashes = hash_of(request.secret), hash_of(request.body)
        try:
            return await self._store.begin(*key, hashes[0], request.body, hashes[1])
        except TurnExistsError:
            return None
        except StoreAwayError:
            raise
        except StoreError as error:
            logger.error("turn %s cannot be stored: %s", key[1].hex(), error)
            raise RequestError("not_stored", NOT_STORED) from error
