"""Turns that another process generates: their logs grow here as that one stores them."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing, suppress

from eloquent.core.events import Event
from eloquent.errors import EloquentError, RequestError
from eloquent_server.opening import AWAY
from eloquent_server.restoring import is_lost, restored
from eloquent_server.store_types import StoreAwayError, StoredTurn, TurnStore
from eloquent_server.turn import StoredPart, Turn

AWAY_S = 60.0
"How long the readers of a turn wait for a store that is away."
AWAY_POLL_S = 0.5

NOT_KEPT = "The turn is kept no longer: ask it anew, under a new turn id."
LOST = (
    "The server's token store does not have what it had kept of the answer; the server's log has "
    "the reason. Ask it anew."
)

logger = logging.getLogger(__name__)


async def follow(
    store: TurnStore,
    turn: Turn,
    *,
    on_grown: Callable[[Turn], None],
    is_wanted: Callable[[Turn], bool],
) -> None:
    """Have a turn's log grow until it ends, or nobody wants it, or this process is its owner.

    In the last case the turn is no longer `is_elsewhere`, and is to be generated. `on_grown` is
    called when there is more.

    Raises:
        RequestError: the turn cannot be read any further; for its readers.
    """
    try:
        while True:
            stored = await _claim(store, turn)
            events: list[Event] = []
            if not stored.is_elsewhere:
                _, events = await restored(store, stored)
                if is_lost(stored.record):
                    continue
            if not is_wanted(turn):
                # The task was cancelled in vain, while a connection was being made.
                store.abandon(stored.record)
                return
            turn.record = stored.record
            turn.grow(stored.log[turn.log.written :])
            if not stored.is_elsewhere and not turn.is_over:
                turn.take_over(StoredPart(tuple(events), stored.continuations))
            on_grown(turn)
            if not turn.is_elsewhere or turn.is_over:
                return
            with suppress(StoreAwayError):  # `_claim` waits until it is back.
                async with aclosing(store.follow(turn.record)) as pieces:
                    async for data in pieces:
                        turn.grow(data)
                        on_grown(turn)
                        if turn.is_over or not is_wanted(turn):
                            return
    except RequestError:
        raise
    except EloquentError as error:
        logger.error("turn %s cannot be followed: %s", turn.name, error)
        raise RequestError("internal_error", LOST) from error


async def _claim(store: TurnStore, turn: Turn) -> StoredTurn:
    """Become a turn's owner if nobody is; wait for a store that is away.

    Raises:
        RequestError: the turn is not there any more, or the store is away for too long.
        EloquentError: see `TurnStore.claim`.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + AWAY_S
    while True:
        try:
            stored = await store.claim(*turn.key)
            break
        except StoreAwayError as error:
            if loop.time() >= until_s:
                logger.error("turn %s cannot be followed: %s", turn.name, error)
                raise RequestError("not_stored", AWAY) from error
        await asyncio.sleep(AWAY_POLL_S)
    if stored is None:
        raise RequestError("unknown_turn", NOT_KEPT)
    if len(stored.log) < turn.log.length:
        logger.error("turn %s: the store has lost a part of it", turn.name)
        store.let_go(stored.record)
        raise RequestError("not_stored", LOST)
    return stored
