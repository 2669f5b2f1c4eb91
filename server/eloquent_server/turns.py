"""Turns: they outlive the connections that read them, and the process that generates them.

A request makes a turn, or finds it: the same id is never generated twice. What is generated goes
into the turn's log, from there into the store, and only then to its readers, of which there may
be any number and none. A turn's life (`State`):

    GENERATING --the log's end--> ENDED
    GENERATING --declined before the first event--> forgotten
    GENERATING --cancelled by its owner, or no reader for `grace_s`--> ENDED ("cancelled")
    GENERATING --a fault--> ENDED ("error", a Failure before it)
    GENERATING --the store cannot keep it--> forgotten, its readers told
    GENERATING --the server stops, and its store is kept--> GENERATING, in the next process

An ended turn leaves the memory as soon as the store has it and nobody reads it; a request for it
brings it back. One that the store has without its end was cut off with its server: it is generated
further from where it was, or gets a Failure and its end if that is not possible.
"""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from eloquent.core.events import Delta, Event, Failure
from eloquent.core.log import TokenLog
from eloquent.core.wire import Request
from eloquent.errors import EloquentError, RequestError
from eloquent.serving import Reader
from eloquent_server.admission import Admission, Gate, Principal
from eloquent_server.logs import TurnClock
from eloquent_server.store import StoredTurn, StoreError, TokenStore, TurnRecord, TurnState

GRACE_S = 120.0
"A turn that nobody reads is generated for so long."

STOP_S = 1.0
"How long `close` waits for the turns' tasks."

UNKNOWN_TURN = (
    "There is no such turn, or it is kept no longer, or the secret is not its: ask it anew, "
    "under a new turn id."
)
DELETED = "The turn was deleted, as its owner asked."
REPLACED = "The turn goes on over another connection of its owner."
INTERRUPTED = "The server was restarted in mid-answer; what there is of it is here. Ask again."
SHUTTING_DOWN = "The server is shutting down. What has come is kept; ask again in a moment."
NOT_STORED = (
    "The server has no place to keep the answer, so it does not go on; its log has the reason. "
    "Tell whoever runs it, and ask again later."
)
UNREADABLE = "The server cannot read what it kept of the turn; its log has the reason. Ask it anew."
FAULT = "The server failed; its log has the reason. What has come is kept; ask again."

TurnKey = tuple[str, bytes]
"Whose it is, and its id."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredPart:
    """What the store has of a turn that was cut off with its server."""

    events: tuple[Event, ...]
    continuations: tuple[bytes, ...]
    "What was given to `Turn.append` with them, in order."


class Turn:
    """One turn as what generates it sees it: append events, then close.

    The task that generates is cancelled when nobody wants the turn any more.
    """

    def __init__(
        self,
        hub: "TurnHub",
        request: Request,
        principal: Principal,
        *,
        stored: StoredTurn | None = None,
    ) -> None:
        self._hub = hub
        self.stored: StoredPart | None = None
        "None: the turn began in this process."
        if stored is None:
            self.secret_hash, self.body_hash = hash_of(request.secret), hash_of(request.body)
            self.log = TokenLog(is_held=True)
        else:
            self.secret_hash, self.body_hash = stored.record.secret_hash, stored.record.body_hash
            self.log, events = TokenLog.restored(stored.log)
            self.stored = StoredPart(tuple(events), stored.continuations)
        self.record = stored.record if stored is not None else None
        "The store's handle, from the first event on: a turn that was declined is not kept."
        self.readers: dict[Reader, None] = {}
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
        """
        self.log.append(event)
        self._clock.event()
        self._hub.keep(self, continuation)

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
            self.append(failure)
        self.close(reason, model="", prompt_tokens=0, completion_tokens=0)

    def reject(self, error: RequestError) -> None:
        """Decline the turn, before anything was appended; the id may be used again."""
        self._hub.forget(self, error)


TurnHandler = Callable[[Turn], Awaitable[None]]


class TurnHub:
    """All turns of a server; a `TurnService`. Use it on one event loop."""

    def __init__(
        self,
        handler: TurnHandler,
        store: TokenStore,
        *,
        admission: Admission | None = None,
        go_on: TurnHandler | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        """`handler` generates a turn; `grace_s` is in seconds; `admission` None lets all ask.

        `go_on` generates the rest of one that has a `stored` part; None: that is not possible.
        """
        self._handler = handler
        self._go_on = go_on
        self._store = store
        self._admission = admission or Gate()
        self._grace_s = grace_s
        self._turns: dict[TurnKey, Turn] = {}
        self._loading: dict[TurnKey, list[Reader]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._of_reader: dict[Reader, Turn] = {}
        self._is_closed = False
        self.resumes = 0
        "How many readers came to a turn that was there, for metrics."

    @property
    def open(self) -> int:
        """How many turns are in memory."""
        return len(self._turns)

    @property
    def unread(self) -> int:
        """How many turns are being generated though nobody reads them at the moment."""
        return sum(turn.grace is not None for turn in self._turns.values())

    @property
    def generating(self) -> int:
        """How many turns are being generated."""
        return sum(not turn.is_over for turn in self._turns.values())

    @property
    def readers(self) -> int:
        """How many readers are attached."""
        return len(self._of_reader)

    async def close(self, *, is_restart: bool = False) -> None:
        """End all turns; whoever reads them is told.

        With `is_restart` a hub on the same store goes on with them: their readers come back.
        """
        self._is_closed = True
        for turn in list(self._turns.values()):
            if is_restart and self._go_on is not None:
                self._put_off(turn)
            elif turn.is_waiting_to_go_on:
                self._park(turn)
            else:
                self._stop(turn, "error", Failure("unavailable", SHUTTING_DOWN))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)
        await self._store.close()

    def recover(self) -> None:
        """Go on with the turns that were cut off with the server before; to be called once."""
        if self._go_on is None:
            return
        for record in self._store.unfinished():
            if record.key not in self._turns:
                self._bring_back(record.key)

    def on_request(self, reader: Reader) -> None:
        """See `TurnService.on_request`."""
        if self._is_closed:
            reader.reject("unavailable", SHUTTING_DOWN)
            return
        try:
            self._attach(reader, self._admission.principal(reader.request.key))
        except RequestError as error:
            reader.reject(error.code, error.message, error.retry_after_s)

    def _attach(self, reader: Reader, principal: Principal) -> None:
        """Find the turn that a reader asks for, or make it."""
        key = principal.name, reader.request.turn_id
        turn = self._turns.get(key)
        record = self._store.find(*key)
        if turn is not None:
            self._admit(reader, turn)
        elif key in self._loading:
            self._loading[key].append(reader)
        elif record is not None and record.state is not TurnState.TOMBSTONE:
            self._bring_back(key)
            self._loading[key].append(reader)
        elif record is not None or not reader.request.body or reader.request.offset:
            raise RequestError("unknown_turn", UNKNOWN_TURN)
        else:
            self._admission.admit(principal, len(reader.request.body))
            turn = self._turns[key] = Turn(self, reader.request, principal)
            turn.is_admitted = True
            self._admit(reader, turn)
            turn.task = self._spawn(self._generate(turn, self._handler))

    def on_cancel(self, reader: Reader) -> None:
        """See `TurnService.on_cancel`."""
        turn = self._of_reader.get(reader)
        if turn is not None and reader.request.is_owner:
            self._stop(turn, "cancelled")

    def on_gone(self, reader: Reader) -> None:
        """See `TurnService.on_gone`."""
        for waiting in self._loading.values():
            if reader in waiting:
                waiting.remove(reader)
        turn = self._of_reader.pop(reader, None)
        if turn is None:
            return
        turn.readers.pop(reader, None)
        if turn.is_over:
            self._leave_memory(turn)
        elif self._is_current(turn):
            self._begin_grace(turn)

    def body_of(self, reader: Reader) -> bytes:
        """Return what was asked in a reader's turn; empty where that is not kept any more."""
        turn = self._of_reader.get(reader)
        return b"" if turn is None else turn.request.body

    def waiting_before(self, reader: Reader) -> int:
        """Return how many turns that were asked before a reader's have not begun either."""
        own, waiting = self._of_reader.get(reader), 0
        for turn in self._turns.values():
            if turn is own:
                break
            waiting += not turn.log.written
        return waiting

    async def delete(self, request: Request) -> None:
        """Forget the turn that a request names, open or ended; who reads it is told.

        Raises:
            RequestError: there is none, or its secret is another (`unknown_turn`); `unauthorized`.
            StoreError: the store did not do it; ask again.
        """
        key = self._admission.principal(request.key).name, request.turn_id
        turn, record = self._turns.get(key), self._store.find(*key)
        known = turn or record
        if known is None or not hmac.compare_digest(hash_of(request.secret), known.secret_hash):
            raise RequestError("unknown_turn", UNKNOWN_TURN)
        if turn is not None:
            if turn.task is not None:
                turn.task.cancel()
            self.forget(turn, RequestError("unknown_turn", DELETED))
        if record is not None:
            await self._store.delete(*key)

    def keep(self, turn: Turn, continuation: bytes | None = None) -> None:
        """Hand what was written to the store; readers get it when it is kept."""
        offset, data = turn.handed, turn.log.written_from(turn.handed)
        turn.handed += len(data)

        def on_stored(error: StoreError | None) -> None:
            if error is None:
                self._release(turn, offset + len(data))
            else:
                self._on_not_stored(turn, error)

        if turn.is_over:
            self._release_admission(turn)
        try:
            turn.record = turn.record or self._create(turn)
            if turn.is_over:
                self._store.close_turn(turn.record, offset, data, on_stored=on_stored)
            else:
                self._store.append(
                    turn.record, offset, data, continuation=continuation, on_stored=on_stored
                )
        except StoreError as error:
            self._on_not_stored(turn, error)

    def forget(self, turn: Turn, error: RequestError) -> None:
        """Drop a turn as if it had never been asked; its readers get the reason."""
        self._turns.pop(turn.key, None)
        self._end_grace(turn)
        self._release_admission(turn)
        for reader in list(turn.readers):
            self._of_reader.pop(reader, None)
            reader.reject(error.code, error.message, error.retry_after_s)
        turn.readers.clear()

    def _create(self, turn: Turn) -> TurnRecord:
        return self._store.create(
            *turn.key,
            turn.secret_hash,
            turn.request.body,
            turn.body_hash,
        )

    def _admit(self, reader: Reader, turn: Turn) -> None:
        request = reader.request
        if not hmac.compare_digest(hash_of(request.secret), turn.secret_hash):
            reader.reject("unknown_turn", UNKNOWN_TURN)
        elif request.body and hash_of(request.body) != turn.body_hash:
            reader.reject(
                "turn_conflict",
                "This turn id was used for another request: make a new id for each turn.",
            )
        elif request.offset > turn.log.length:
            reader.reject(
                "bad_offset",
                f"The turn has {turn.log.length} bytes, and byte {request.offset} was asked: "
                "resume at an offset that was received.",
            )
        else:
            self._end_grace(turn)
            if request.is_owner:
                self._replace_owners(turn)
            self.resumes += turn.task is not None or turn.stored is not None
            turn.readers[reader] = None
            self._of_reader[reader] = turn
            reader.accept(turn.log)

    def _replace_owners(self, turn: Turn) -> None:
        """Let go of the owner's earlier readers: it has come back over another connection."""
        for reader in [reader for reader in turn.readers if reader.request.is_owner]:
            del turn.readers[reader]
            self._of_reader.pop(reader, None)
            reader.reject("replaced", REPLACED)

    def _bring_back(self, key: TurnKey) -> None:
        """Load a turn from the store; readers may be added to those that wait for it."""
        if key not in self._loading:
            self._loading[key] = []
            self._spawn(self._load(key))

    async def _load(self, key: TurnKey) -> None:
        """Bring a turn back from the store for the readers that wait for it."""
        principal, turn_id = self._admission.named(key[0]), key[1]
        try:
            stored = await self._store.load(*key)
            turn = None
            if stored is not None:
                turn = Turn(self, Request(turn_id, stored.body), principal, stored=stored)
        except EloquentError as error:
            logger.error("turn %s cannot be brought back: %s", turn_id.hex(), error)
            for reader in self._loading.pop(key):
                reader.reject("unavailable", UNREADABLE)
            return
        readers = self._loading.pop(key)
        if self._is_closed:
            for reader in readers:
                reader.reject("unavailable", SHUTTING_DOWN)
            return
        if turn is None:
            for reader in readers:
                reader.reject("unknown_turn", UNKNOWN_TURN)
            return
        self._turns[key] = turn
        if not turn.is_over:
            self._continue(turn)
        for reader in readers:
            self._admit(reader, turn)
        if not turn.is_over:
            self._begin_grace(turn)
        self._leave_memory(turn)

    def _continue(self, turn: Turn) -> None:
        """Have a turn that was cut off with its server generated further, or end it."""
        assert turn.stored is not None
        if any(isinstance(event, Failure) for event in turn.stored.events):
            turn.end_early("error")
        elif self._go_on is None:
            turn.end_early("error", Failure("interrupted", INTERRUPTED))
        else:
            logger.info("turn %s goes on where it was cut off", turn.name)
            turn.task = self._spawn(self._generate(turn, self._go_on))

    async def _generate(self, turn: Turn, handler: TurnHandler) -> None:
        try:
            await handler(turn)
        except Exception:
            # The boundary of the application: a fault in one turn ends that turn, says so in the
            # log for the operator, and hurts no other.
            logger.exception("turn %s failed", turn.name)
        if self._is_current(turn) and not turn.is_over:
            if turn.log.written:
                turn.end_early("error", Failure("internal_error", FAULT))
            else:
                turn.reject(RequestError("internal_error", FAULT))

    def _abandon(self, turn: Turn) -> None:
        logger.info("turn %s: nobody reads it any more", turn.name)
        self._stop(turn, "cancelled")

    def _stop(self, turn: Turn, reason: str, failure: Failure | None = None) -> None:
        """End a turn before its time, unless it is over."""
        if turn.is_over or not self._is_current(turn):
            return
        if turn.task is not None:
            turn.task.cancel()
        turn.end_early(reason, failure)

    def _park(self, turn: Turn) -> None:
        """Leave a turn that was cut off as it is, for the next start."""
        if turn.task is not None:
            turn.task.cancel()
        self.forget(turn, RequestError("unavailable", SHUTTING_DOWN))

    def _put_off(self, turn: Turn) -> None:
        """Stop a turn and leave it in the store without an end, as if the server were killed."""
        if not turn.is_over:
            del self._turns[turn.key]
            self._end_grace(turn)
            if turn.task is not None:
                turn.task.cancel()

    def _release(self, turn: Turn, offset: int) -> None:
        turn.log.release(offset)
        for reader in list(turn.readers):
            reader.log_grew()
        self._leave_memory(turn)

    def _on_not_stored(self, turn: Turn, error: StoreError) -> None:
        if self._is_current(turn):
            logger.error("turn %s cannot be stored: %s", turn.name, error)
            if turn.task is not None:
                turn.task.cancel()
            self.forget(turn, RequestError("not_stored", NOT_STORED))

    def _leave_memory(self, turn: Turn) -> None:
        """Drop an ended turn that nobody reads, once the store has all of it."""
        if turn.log.end is not None and not turn.readers and self._is_current(turn):
            del self._turns[turn.key]
            self._end_grace(turn)

    def _is_current(self, turn: Turn) -> bool:
        return self._turns.get(turn.key) is turn

    def _release_admission(self, turn: Turn) -> None:
        """Take a turn that is over off its owner's account."""
        if turn.is_admitted:
            turn.is_admitted = False
            self._admission.ended(turn.principal, turn.log.written)

    def _begin_grace(self, turn: Turn) -> None:
        """Give a turn that nobody reads some time for a reader to come."""
        if not turn.readers and turn.grace is None:
            loop = asyncio.get_running_loop()
            turn.grace = loop.call_later(self._grace_s, self._abandon, turn)

    def _end_grace(self, turn: Turn) -> None:
        if turn.grace is not None:
            turn.grace.cancel()
            turn.grace = None

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def hash_of(data: bytes) -> bytes:
    """Return the SHA-256 of a secret or a body, as the store keeps it."""
    return hashlib.sha256(data).digest()
