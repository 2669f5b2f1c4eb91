"""What the token store keeps of a turn, and the errors it raises."""

import enum
from dataclasses import dataclass, field

from eloquent.errors import EloquentError


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
    failure: StoreError | None = None
    "Why nothing more can be stored of this turn; set by the writer when a commit failed."

    @property
    def key(self) -> tuple[str, bytes]:
        """What identifies the turn."""
        return self.principal, self.turn_id


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
