"""What the token store keeps of a turn, and the errors it raises."""

import enum
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from eloquent.errors import EloquentError
from eloquent_server.meters import StoreMeters


class StoreError(EloquentError):
    """The token store cannot do what was asked; its text says what to do."""


class StoreLockedError(StoreError):
    """Another process has this store open: a store has one owner."""


class StoreClosedError(StoreError):
    """The store has been closed."""


class StoreFullError(StoreError):
    """The store holds as many bytes as it was allowed to."""


class TurnTooLargeError(StoreError):
    """One turn would hold more bytes than a turn may."""


class StoreAwayError(StoreError):
    """The store does not answer at the moment; whether it did what was asked is not known."""


class StaleOwnerError(StoreError):
    """The turn is another process's by now, so that nothing of this one's is added to it."""


class TurnEndedError(StoreError):
    """Something was to be added to a turn that is ended or deleted."""


class TurnExistsError(StoreError):
    """A turn with this id was created before; `record` is that turn, or its tombstone."""

    def __init__(self, record: "TurnRecord") -> None:
        super().__init__(
            f"Turn {record.turn_id.hex()} was asked before and is not generated twice "
            f"({record.state.name.lower()}): read that one, or make a new turn id."
        )
        self.record = record


class TurnState(enum.IntEnum):
    """Where a turn is in its life; the values are those in the file."""

    OPEN = 0
    "Being generated, or to be generated further after a restart."
    ENDED = 1
    "Complete; kept for readers until its time to live ends."
    TOMBSTONE = 2
    "Expired or deleted: only its id is left, so that a replayed request starts nothing."


@dataclass(slots=True, eq=False)
class TurnRecord:
    """The store's handle of a turn; what is known without reading the file.

    Only the store changes it.
    """

    row: int
    "Its number in the file; never used twice while the store is open."
    principal: str
    "Who asked: turn ids are scoped by it."
    turn_id: bytes
    secret_hash: bytes = field(repr=False)
    "SHA-256 of the resume secret; empty in a tombstone."
    body_hash: bytes
    "SHA-256 of the request body; empty in a tombstone."
    state: TurnState
    created_s: float
    "Wall clock, as all times here."
    updated_s: float
    "The last append; once ended, the end; of a tombstone, when it became one."
    length: int = 0
    "Bytes in the log, those still on their way to the file included."
    size: int = 0
    "Bytes that count against the limits: body, log and continuations."
    chunks: int = 0
    "How many appends it took."
    fence: int = 0
    "The number of this ownership of the turn; each is higher. 0: there is one owner, or none."
    failure: StoreError | None = None
    "Why nothing more can be stored of this turn; set by the writer when a commit failed."

    @property
    def key(self) -> tuple[str, bytes]:
        """What identifies the turn."""
        return self.principal, self.turn_id

    def check_next(self, offset: int) -> None:
        """Check that an append at `offset` may follow.

        Raises:
            StoreError: an earlier one could not be stored; of that error's kind.
            TurnEndedError: the turn is ended or deleted.
            ValueError: `offset` is not the log's length.
        """
        if self.failure is not None:
            raise type(self.failure)(str(self.failure))
        if self.state is not TurnState.OPEN:
            raise TurnEndedError(
                f"Turn {self.turn_id.hex()} is {self.state.name.lower()}: nothing can be added. "
                "Make a new turn."
            )
        if offset != self.length:
            raise ValueError(f"the log has {self.length} bytes, so {offset} does not follow")

    def check_room(self, count: int, max_bytes: int) -> None:
        """Check that a turn that may hold `max_bytes` has room for so many more.

        Raises:
            TurnTooLargeError: it has not.
        """
        if self.size + count > max_bytes:
            raise TurnTooLargeError(
                f"Turn {self.turn_id.hex()} would take more than {max_bytes} bytes in the token "
                "store. Ask for a shorter answer, or raise the server's limit."
            )

    def grow(self, count: int, now_s: float) -> None:
        """Count an append of so many bytes of the log."""
        self.length += count
        self.chunks += 1
        self.updated_s = now_s


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """A turn as the file has it: everything that was appended before it was asked for."""

    record: TurnRecord
    "The handle with which to go on appending."
    state: TurnState
    "When it was read; the record's may be newer."
    log: bytes = field(repr=False)
    body: bytes = field(repr=False)
    "The request; empty once the turn is ended, since only going on needs it."
    continuations: tuple[bytes, ...] = field(repr=False)
    "What was given as `continuation`, in order; empty once the turn is ended."
    is_elsewhere: bool = False
    "Whether another process generates it: it is to be followed, and nothing to be appended."


OnStored = Callable[[StoreError | None], None]
"Called on the event loop: with None once it is stored, else with why it is not and never will be."

OnRecord = Callable[[TurnRecord], None]


class TurnStore(Protocol):
    """What a server needs of its token store, of which it may be one of several owners.

    All methods are called on one event loop, and never keep it waiting.
    """

    @property
    def size(self) -> int:
        """Bytes of the turns that it knows: bodies, logs and continuations."""

    @property
    def turns(self) -> int:
        """How many turns it knows."""

    @property
    def meters(self) -> StoreMeters:
        """How its commits went."""

    async def begin(
        self, principal: str, turn_id: bytes, secret_hash: bytes, body: bytes, body_hash: bytes
    ) -> TurnRecord:
        """Make a turn, owned by this process.

        Raises:
            TurnExistsError: there is such a turn, or its tombstone.
            TurnTooLargeError, StoreFullError: there is no room for the body.
            StoreError: it cannot be stored.
        """

    async def claim(self, principal: str, turn_id: bytes) -> StoredTurn | None:
        """Read a turn, and become the owner of one that has no end and no owner.

        None: there is no such turn, or only its tombstone.

        Raises:
            StoreError: it cannot be read.
        """

    async def load(self, principal: str, turn_id: bytes) -> StoredTurn | None:
        """Read a turn, whoever owns it; see `claim`."""

    def append(
        self,
        record: TurnRecord,
        offset: int,
        data: bytes,
        *,
        continuation: bytes | None = None,
        on_stored: OnStored | None = None,
    ) -> None:
        """Add bytes to an owned turn's log, and to what going on with it needs; returns at once.

        Raises:
            StoreError: it cannot be added; nothing was.
        """

    def close_turn(
        self,
        record: TurnRecord,
        offset: int,
        data: bytes = b"",
        *,
        on_stored: OnStored | None = None,
    ) -> None:
        """End an owned turn, with the last bytes of its log; returns at once.

        There is always room for these, so that no turn stays open for want of it.

        Raises:
            As `append`.
        """

    def let_go(self, record: TurnRecord) -> None:
        """Give up an owned turn without an end, until somebody asks for it.

        One to which nothing was appended is forgotten: its id is free again.
        """

    def abandon(self, record: TurnRecord) -> None:
        """Own a turn no longer, and leave it to whoever finds it without an owner."""

    async def delete(self, principal: str, turn_id: bytes) -> bool:
        """Remove a turn, open or ended, and leave its tombstone; say whether there was one.

        Raises:
            StoreError: it could not be removed; ask again.
        """

    def attend(self, on_lost: OnRecord, on_cancel: OnRecord) -> None:
        """Have it said when an owned turn is owned no longer, or is to be cancelled."""

    def abandoned(self) -> AsyncGenerator[tuple[str, bytes]]:
        """Yield principals and ids of open turns without an owner, as they are found."""

    def follow(self, record: TurnRecord) -> AsyncGenerator[bytes]:
        """Yield what another process appends to a turn, until it has no owner any more.

        Raises:
            StoreError: the store cannot be read.
        """

    async def cancel_elsewhere(self, record: TurnRecord) -> None:
        """Have the process that owns a turn cancel it.

        Raises:
            StoreError: it could not be told.
        """

    async def is_read_elsewhere(self, record: TurnRecord) -> bool:
        """Say whether another process follows an owned turn for its readers.

        Raises:
            StoreError: that is not known at the moment.
        """

    async def check(self) -> None:
        """Store something that is of no turn, to see whether turns can be stored now.

        Raises:
            StoreError: they cannot.
        """

    def expire(self) -> None:
        """Let go of what is kept no longer; to be called now and then."""

    async def close(self) -> None:
        """Store what was handed over, and release the store; a second call does nothing."""


class SoleOwner:
    """What a store with one owner has to say of others: there are none."""

    def attend(self, on_lost: OnRecord, on_cancel: OnRecord) -> None:
        """See `TurnStore.attend`."""

    def abandon(self, record: TurnRecord) -> None:
        """See `TurnStore.abandon`."""

    async def follow(self, record: TurnRecord) -> AsyncGenerator[bytes]:
        """See `TurnStore.follow`."""
        return
        yield

    async def cancel_elsewhere(self, record: TurnRecord) -> None:
        """See `TurnStore.cancel_elsewhere`."""

    async def is_read_elsewhere(self, record: TurnRecord) -> bool:
        """See `TurnStore.is_read_elsewhere`."""
        return False
