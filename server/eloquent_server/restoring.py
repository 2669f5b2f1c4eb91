"""Turns of the store made readable again: their logs are decoded, however long they are."""

import asyncio
from functools import partial

from eloquent.core.events import Event
from eloquent.core.log import TokenLog
from eloquent.errors import EloquentError
from eloquent_server.store_types import (
    StaleOwnerError,
    StoredTurn,
    TurnRecord,
    TurnState,
    TurnStore,
)

LONG_BYTES = 64 << 10
"So much takes some 15 ms; what is longer is decoded in a thread, and keeps nobody waiting."


async def restored(store: TurnStore, stored: StoredTurn) -> tuple[TokenLog, list[Event]]:
    """Return the log of a turn that was claimed, and its events; none of one that is ended.

    The lease can be lost meanwhile: see `is_lost`. If this raises, or is cancelled, the turn is
    owned no longer.

    Raises:
        WireError, IntegrityError: what is stored is no log.
    """
    is_open = stored.state is TurnState.OPEN  # Only going on needs the events.
    decode = partial(TokenLog.restored, stored.log, keeps_events=is_open)
    try:
        return decode() if len(stored.log) < LONG_BYTES else await asyncio.to_thread(decode)
    except EloquentError:
        store.let_go(stored.record)
        raise
    except asyncio.CancelledError:
        store.abandon(stored.record)
        raise


def is_lost(record: TurnRecord) -> bool:
    """Say whether a turn that was claimed is another process's again."""
    return isinstance(record.failure, StaleOwnerError)
